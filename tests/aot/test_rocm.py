"""Triton kernels ahead of time for an AMD chip: no spills, and shared memory that it has."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from benchmarks.predict import kept
from benchmarks.predict.tools import ROOT, key
from tests.aot.table import CACHE, KEPT

pytestmark = pytest.mark.prove
TARGET = "gfx942"  # MI300
SHARED = 64 * 1024  # bytes that a block may have


def launches() -> Iterator[tuple[str, Any]]:
    """The default tiles of an AMD chip; what has no products takes the same tiles everywhere."""
    import torch

    from tests.aot import triton_launches as made
    from tests.aot import wavelet_launches as wavelets
    from wavemix_kernels.ops.deconv import tiles as deconv_tiles
    from wavemix_kernels.ops.deconv import triton as deconv
    from wavemix_kernels.ops.deconv import triton_backward as deconv_backward
    from wavemix_kernels.ops.reduce_haar import tiles, triton

    half, single = torch.float16, torch.float32
    for widths in ((192, 96, 384, 192), (128, 0, 256, 128)):
        yield from made.mlp_launches(half, "mfma", *widths)
    for levels, last in ((1, False), (3, True), (5, False)):
        yield from made.reduction_launches(half, 192, levels, "mfma", last)
        x, weight = made.meta(64, 192, 64, 64, dtype=half, last=True), made.meta(48, 192, dtype=half)
        zs = [made.meta(64, 192, 64 >> i, 64 >> i, dtype=half, last=True) for i in range(1, levels + 1)]
        config = tiles.config_for(2, levels, 48, 192, "mfma")
        yield f"reduce_haar 192 L{levels}", triton.launch(zs, x, weight, None, True, config)
    yield from made.reduction_launches(single, 192, 2, "mfma", forward=True)
    u, y = (made.meta(64, 192, size, size, dtype=half, last=True) for size in (32, 64))
    weight, norm = made.meta(192, 192, 4, 4, dtype=half), deconv_backward.Norm(y, *(made.meta(192),) * 4)
    configs = [
        deconv_tiles.config_for(kind, 2, 192, inner, rows, True)
        for kind, inner, rows in (("forward", 192, 65536), ("input", 192, 65536), ("weight", 65536, 768))
    ]
    yield "deconv forward", deconv.forward_launch(y, u, weight, made.meta(192, dtype=half), True, configs[0])[0]
    both = deconv_backward.norm_backward_launch(u, y, norm, u, weight, (configs[1], configs[2]))
    yield "deconv both gradients", both[0]
    for dtype, kernel in ((half, "forward"), (torch.bfloat16, "backward"), (single, "sum backward")):
        yield f"patm {kernel}", made.patm_launch(kernel, dtype)
    for layout, levels, synthesis in (("rows", 1, True), ("rows", 4, False), ("channels", 4, True)):
        yield f"haar {layout} L{levels}", wavelets.haar_point(90, half, layout, levels, synthesis).launch


def constants(launch: Any) -> Any:
    from wavemix_kernels.ops.common.chips import for_chip

    return for_chip(launch.constants, rocm=True)


def compiled(index: int) -> dict[str, Any]:
    from benchmarks.predict.compiled import on_chip

    name, launch = list(launches())[index]
    with on_chip(TARGET):
        binary = launch.kernel.warmup(*launch.args, grid=launch.grid, **constants(launch))
    found = {"name": name, "shared memory": binary.metadata.shared}
    for what in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size"):
        found[what] = int(re.search(rf"\.{what}:\s+(\d+)", binary.asm["amdgcn"])[1])
    return found


def keys() -> dict[str, str]:
    """launch -> a key of what it is compiled from, and of the rules."""
    rules = key([Path(__file__)])
    found = {
        f"rocm {i} {name}": kept.key(rules, kept.triton_code(launch.kernel, launch.args, constants(launch), TARGET))
        for i, (name, launch) in enumerate(launches())
    }
    assert len(found) > 20
    return found


def broken(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    scratch = ("vgpr_spill_count", "private_segment_fixed_size")
    return [row for row in rows if row["shared memory"] > SHARED or any(row[what] for what in scratch)]


def compile_new(*options: str) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """(:func:`keys`, what launches take that are new, or whose day it is: :mod:`benchmarks.predict.kept`)."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_CURRENT_TEST")}
    environment["TRITON_CACHE_DIR"] = str(CACHE / "triton")
    command = [sys.executable, "-m", "tests.aot.test_rocm", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"compiling failed:\n{done.stderr[-4000:]}"
    return json.loads(done.stdout)


def test_kernels_fit_an_amd_chip() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    assert broken(compile_new()[1]) == []


def main(anew: bool) -> None:
    today, known = keys(), kept.read(KEPT)
    new = [i for i, (name, made_of) in enumerate(today.items()) if not kept.serves(known.get(name), made_of, anew)]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        json.dump([today, list(pool.map(compiled, new))], sys.stdout)


if __name__ == "__main__":
    main("--anew" in sys.argv)
