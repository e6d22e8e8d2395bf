"""The Triton kernels compiled for real chips without one, by processes of their own: kernels defined under
TRITON_INTERPRET=1, which the CPU test session sets, do not compile.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from benchmarks.predict import kept
from benchmarks.predict.tools import ROOT, key
from tests.aot.table import CACHE, KEPT, Kernel, cuobjdump, machine_code, read

PTX_PRODUCTS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")


def name_of(point: Any) -> str:
    """A readable one, which no other point has."""
    dtype, warps = str(point.dtype).removeprefix("torch."), point.launch.constants["num_warps"]
    return f"triton {point.name} {dtype}, {warps} warps, sm_{point.arch}"


def compiled(index: int) -> dict[str, Any]:
    """One launch exactly as JITFunction specialises it; resources and instructions are read from the cubin."""
    from benchmarks.predict.compiled import on_chip
    from tests.aot.triton_launches import points

    point = points()[index]
    launch = point.launch
    with on_chip(point.arch):
        binary = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = cuobjdump(Path(file.name), "-res-usage")
        ((_, code),) = machine_code(Path(file.name)).items()
    registers, local = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "LOCAL"))
    products = {f"PTX {name}": 1 for name in PTX_PRODUCTS if name in binary.asm["ptx"]}
    return asdict(Kernel(
        name_of(point), point.arch, str(point.dtype).removeprefix("torch."), 32 * launch.constants["num_warps"],
        registers, binary.metadata.shared, local, {**code, **products}, point.demands,
    ))  # fmt: skip


def keys() -> dict[str, str]:
    """point -> a key of what it is compiled from, what it is held to, and the rules."""
    from tests.aot.triton_launches import points

    rules = key([Path(__file__).with_name(f"{name}.py") for name in ("table", "test_rules", "triton_kernels")])
    found = {}
    for point in points():
        code = kept.triton_code(point.launch.kernel, point.launch.args, point.launch.constants, point.arch)
        found[name_of(point)] = kept.key(rules, code, point.demands)
    assert len(found) == len(points())
    return found


def main(anew: bool) -> None:
    """Prints the keys of all points, and rows of those that were not found right before."""
    today, known = keys(), kept.read(KEPT)
    new = [i for i, (name, made_of) in enumerate(today.items()) if not kept.serves(known.get(name), made_of, anew)]
    # A compilation is one thread of Python, LLVM and ptxas.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        json.dump([today, list(pool.map(compiled, new))], sys.stdout)


@functools.cache
def made() -> tuple[dict[str, str], list[Kernel]]:
    """(:func:`keys`, rows of the kernels that are new, or whose day it is: :mod:`benchmarks.predict.kept`)."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    return compile_new()


def kernels() -> list[Kernel]:
    return made()[1]


def compile_new(*options: str) -> tuple[dict[str, str], list[Kernel]]:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_CURRENT_TEST")}
    environment["TRITON_CACHE_DIR"] = str(CACHE / "triton")  # after a change only what it touched is compiled
    command = [sys.executable, "-m", "tests.aot.triton_kernels", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"compiling failed:\n{done.stderr[-4000:]}"
    today, rows = json.loads(done.stdout)
    return today, [read(row) for row in rows]


if __name__ == "__main__":
    main("--anew" in sys.argv)
