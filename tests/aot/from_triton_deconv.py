"""The Triton kernels of the transposed convolution, compiled for real chips.

Run as a script (`python -m tests.aot.from_triton_deconv`) it prints what the compiled kernels take of a chip as JSON.
The test runs that as a process of its own: kernels defined under TRITON_INTERPRET=1 do not compile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install wavemix-kernels[triton]")

from wavemix_kernels.ops.deconv import tiles as deconv_config
from wavemix_kernels.ops.deconv import triton as kernels
from wavemix_kernels.ops.deconv import triton_backward as deconv_backward

ROOT = Path(__file__).resolve().parents[2]


def compiled_launches() -> list[tuple[str, int, Any]]:
    """(name, architecture, launch) of default tiles, on tensors without storage."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        t = torch.empty(shape, dtype=dtype, device="meta")
        return t.to(memory_format=torch.channels_last) if len(shape) == 4 else t

    found: list[tuple[str, int, Any]] = []
    points = [(arch, torch.float16, 192, "ieee") for arch in (90, 80, 100, 120)]
    points += [(90, torch.float32, 96, "ieee"), (90, torch.float32, 96, "tf32"), (80, torch.float32, 96, "tf32")]
    before = torch.backends.cuda.matmul.fp32_precision
    for arch, dtype, c, precision in points:
        by_warps = arch in (80, 120)
        torch.backends.cuda.matmul.fp32_precision = precision
        u, y = meta(64, c, 32, 32, dtype=dtype), meta(64, c, 64, 64, dtype=dtype)
        weight, norm = torch.empty(c, c, 4, 4, dtype=dtype, device="meta"), deconv_backward.Norm(y, *(meta(c),) * 4)
        pixels = u[:, 0].numel()
        rows = {"forward": pixels, "input": pixels, "weight": 4 * c}
        configs = {
            kind: deconv_config.config_for(
                kind, dtype.itemsize, c, pixels if kind == "weight" else c, rows[kind], by_warps, precision
            )
            for kind in ("forward", "input", "weight")
        }
        both = deconv_backward.norm_gradients_launch(u, y, norm, u, weight, (configs["input"], configs["weight"]))[0]
        launches = {
            "forward": kernels.forward_launch(y, u, weight, meta(c, dtype=dtype), True, configs["forward"])[0],
            "both": both,
        }
        if arch == 90:  # elsewhere the launch of both stands for its parts, which cost CI half a minute
            launches["input"] = deconv_backward.input_grad_launch(u, y, norm, weight, configs["input"])
            launches["weight"] = deconv_backward.weight_grad_launch(y, norm, u, True, configs["weight"])[0]
        found += [(f"{name} {dtype} {precision} {c}", arch, launch) for name, launch in launches.items()]
    torch.backends.cuda.matmul.fp32_precision = before
    half = torch.float16
    u, y, weight = (meta(*s, dtype=half) for s in ((64, 256, 32, 32), (64, 256, 64, 64), (256, 256, 4, 4)))
    both, partial = deconv_backward.norm_gradients_launch(u, y, deconv_backward.Norm(y, *(meta(256),) * 4), u, weight)
    found += [("both torch.float16 256", 90, both)]
    found += [("merge", 90, kernels.merge_launch(meta(3, 2048, 192))[0])]
    found += [("reduce", 90, deconv_backward.reduce_launch(weight, partial))]
    return found


def main() -> None:
    from tests.test_triton_aot import compile_launch

    rows = []
    for name, arch, launch in compiled_launches():
        row = compile_launch(arch, launch)
        ptx = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants).asm["ptx"]
        instructions = [i for i in ("wgmma.mma_async", "tcgen05.mma", "mma.sync") if i in ptx]
        rows.append({"name": name, "arch": arch, **row, "tensor_cores": instructions})
    json.dump(rows, sys.stdout)


def test_compiled_for_real_chips() -> None:
    """No spills, one block at least in every chip's shared memory, 16-byte accesses, each chip's matrix instruction."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_CURRENT_TEST")}
    environment["TRITON_CACHE_DIR"] = str(ROOT / "build/triton-aot")  # a second run compiles only what changed
    command = [sys.executable, "-m", "tests.aot.from_triton_deconv"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"compiling failed:\n{done.stderr[-4000:]}"
    table = json.loads(done.stdout)
    assert len(table) == len(compiled_launches())
    listing = "\n".join(map(str, table))
    matrices = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
    for row in table:
        assert not {"LDL", "STL"} & {name[:3] for name in row["accesses"]}, f"{row['name']} spills:\n{listing}"
        assert row["registers"] * row["constants"]["num_warps"] * 32 <= 65536, f"{row['name']} does not fit:\n{listing}"
        assert row["shared"] <= 99 * 1024, f"{row['name']} does not fit every chip:\n{listing}"
        assert any(".128" in name for name in row["accesses"]), f"{row['name']} has no 16-byte access:\n{listing}"
        if "float16" in row["name"]:
            assert row["tensor_cores"] == [matrices[row["arch"]]], f"{row['name']} multiplies otherwise:\n{listing}"
        if "tf32" in row["name"]:  # 32 columns beside 64 are fewer than wgmma's 64 rows, which mma.sync then takes
            assert matrices[row["arch"]] in row["tensor_cores"], f"{row['name']} multiplies otherwise:\n{listing}"


if __name__ == "__main__":
    main()
