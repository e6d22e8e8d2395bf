"""Ahead-of-time proof of the Triton kernels of ``pre_norm``: for real chips, without spills, in vectors.

Run as a script (`python -m tests.aot.from_test_triton_pre_norm`) it prints the table as JSON; see tests/test_triton_aot.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

from tests.test_triton_aot import MAX_REGISTERS, ROOT, SHARED_LIMIT, compile_launch

KERNELS = ("apply", "backward", "join", "image sums", "backward of NCHW")


def points() -> Iterator[tuple[int, str, str]]:
    """Chip, dtype of the branch, kernel."""
    for kernel in KERNELS:
        for dtype in ("float32", "bfloat16"):
            yield 90, dtype, kernel
        if kernel in ("backward", "image sums"):
            for arch in (80, 100, 120):
                yield arch, "float16", kernel


def launch(dtype: str, kernel: str) -> Any:
    """On the first stage of a Wave-MLP in mixed precision: x and its gradients in float32."""
    import torch

    from wavemix_kernels.ops.norm import triton_pre_norm as kernels

    def image(of: torch.dtype, order: torch.memory_format = torch.channels_last) -> torch.Tensor:
        return torch.empty(128, 64, 56, 56, dtype=of, device="meta").to(memory_format=order)

    branch, x = image(getattr(torch, dtype)), image(torch.float32)
    if kernel.endswith("NCHW"):
        x = image(torch.float32, torch.contiguous_format)
    by_image, by_both, by_channel = (torch.empty(*size, device="meta") for size in ((128,), (128, 64), (64,)))
    per_image, per_channel = kernels.Parameter(by_image, True), kernels.Parameter(by_channel)
    if kernel == "apply":
        return kernels.map_launch(branch, x, kernels.Parameter(by_both), (per_image, per_channel))
    if kernel == "join":
        return kernels.map_launch(x, branch, per_image, w=x)
    if kernel == "image sums":
        return kernels.image_sums_launch(branch, x, by_image, by_image)[0]
    rise = kernels.Parameter(by_both)
    return kernels.map_launch(x, x, per_image, (per_image, per_image), (branch, rise), x)


def compile_point(point: tuple[int, str, str]) -> dict[str, Any]:
    arch, dtype, kernel = point
    return {"arch": arch, "dtype": dtype, "kernel": kernel, **compile_launch(arch, launch(dtype, kernel))}


def main() -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        json.dump(list(pool.map(compile_point, points())), sys.stdout)


@pytest.fixture(scope="module")
def table() -> list[dict[str, Any]]:
    pytest.importorskip("triton", reason="Triton is not installed: pip install wavemix-kernels[triton]")
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_CURRENT_TEST")}
    environment["TRITON_CACHE_DIR"] = str(ROOT / "build/triton-aot")
    command = [sys.executable, "-m", "tests.aot.from_test_triton_pre_norm"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"compiling failed:\n{done.stderr[-4000:]}"
    return json.loads(done.stdout)


def test_leaves_room(table: list[dict[str, Any]]) -> None:
    """No spills, within a thread's registers and a block's shared memory."""
    assert len(table) == len(list(points()))
    for row in table:
        assert row["local"] == 0, row
        assert not {"LDL", "STL"} & {name[:3] for name in row["accesses"]}, row
        assert row["registers"] <= MAX_REGISTERS, row
        assert row["shared"] <= SHARED_LIMIT[row["arch"]], row


def test_moves_vectors(table: list[dict[str, Any]]) -> None:
    """float32 images of channels_last in 16-byte accesses."""
    for row in table:
        if row["kernel"] in ("apply", "backward", "join", "image sums"):
            assert "LDG.E.128" in row["accesses"], row
        if row["kernel"] in ("backward", "join"):
            assert "STG.E.128" in row["accesses"], row


if __name__ == "__main__":
    main()
