"""The Triton kernels compiled for real chips without one, by processes of their own: kernels defined under
TRITON_INTERPRET=1, which the CPU test session sets, do not compile.
"""

from __future__ import annotations

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
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.predict.tools import ROOT, key
from tests.aot.table import CACHE, Kernel, cached, cuobjdump, machine_code, read

PTX_PRODUCTS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")


def compiled(index: int) -> dict[str, Any]:
    """One launch exactly as JITFunction specialises it; resources and instructions are read from the cubin."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from tests.aot.triton_launches import points

    point = points()[index]

    # The part of a driver that compiling asks for; "device" numbers are architectures.
    driver.set_active(SimpleNamespace(
        get_current_device=lambda: point.arch, get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", point.arch, 32),
    ))  # fmt: skip
    launch = point.launch
    binary = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = cuobjdump(Path(file.name), "-res-usage")
        ((_, code),) = machine_code(Path(file.name)).items()
    registers, local = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "LOCAL"))
    dtype = str(point.dtype).removeprefix("torch.")
    return asdict(Kernel(
        f"triton {point.name} {dtype}, {launch.constants['num_warps']} warps", point.arch, dtype,
        32 * launch.constants["num_warps"], registers, binary.metadata.shared, local,
        {**code, **{f"PTX {name}": 1 for name in PTX_PRODUCTS if name in binary.asm["ptx"]}}, point.demands,
    ))  # fmt: skip


def main() -> None:
    from tests.aot.triton_launches import points

    # A compilation is one thread of Python, LLVM and ptxas.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        json.dump(list(pool.map(compiled, range(len(points())))), sys.stdout)


def kernels() -> list[Kernel]:
    triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    import torch

    sources = [*(ROOT / "wavemix_kernels").rglob("*.py"), *Path(__file__).parent.glob("*.py")]
    return cached("triton", key(sources, triton.__version__, torch.__version__), compile_all)


def compile_all() -> list[Kernel]:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_CURRENT_TEST")}
    environment["TRITON_CACHE_DIR"] = str(CACHE / "triton")  # after a change only what it touched is compiled
    command = [sys.executable, "-m", "tests.aot.triton_kernels"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"compiling failed:\n{done.stderr[-4000:]}"
    return [read(row) for row in json.loads(done.stdout)]


if __name__ == "__main__":
    main()
