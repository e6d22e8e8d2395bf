"""The Waveblock's Triton kernels, compiled for real chips.

Run as a script (`python -m tests.aot.from_triton_waveblock`) it prints what the compiled kernels take of an H100 as
JSON. The test runs that as a process of its own: kernels defined under TRITON_INTERPRET=1 do not compile.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wavemix_kernels.ops.haar import pyramid as haar_pyramid

pytest.importorskip("triton", reason="Triton is not installed: pip install wavemix-kernels[triton]")

ROOT = Path(__file__).resolve().parents[2]
#: Shared memory one block may have, bytes (CUDA C++ programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


#: Kernels of which a multiprocessor of sm_90 holds two blocks or more, in half types.
TWO_BLOCKS = r"mlp .* (forward|input gradient)$|mlp .* 128\|0 |reduce_haar .* (192 L3|128 L1 gradients)$"


def meta(*shape: int, dtype: torch.dtype = torch.float32, last: bool = False) -> Tensor:
    t = torch.empty(shape, dtype=dtype, device="meta")
    return t.to(memory_format=torch.channels_last) if last else t


def mlp_launches(
    dtype: torch.dtype, products: str, a: int = 192, b: int = 96, k: int = 384, o: int = 192
) -> Iterator[tuple[str, Any]]:
    """The kernels of a Waveblock's middle level, with the tiles of chips that multiply matrices so."""
    from wavemix_kernels.ops.common.triton_launch import input_precision
    from wavemix_kernels.ops.mlp import triton as forward
    from wavemix_kernels.ops.mlp import triton_backward as backward
    from wavemix_kernels.ops.mlp.tiles import Kind, MlpConfig, config_for

    rows = 65536
    x, second, g = (meta(rows, width, dtype=dtype) for width in (a, b, o))
    mlp = forward.Mlp(
        x, second if b else None, *((meta(b), meta(b)) if b else (None, None)), meta(k, a + b, dtype=dtype),
        meta(k, dtype=dtype), meta(o, k, dtype=dtype), meta(o, dtype=dtype), 0.5, meta(1, dtype=torch.int64),
    )  # fmt: skip

    def config(kernel: Kind) -> MlpConfig:
        tf32 = input_precision() == "tf32"
        return config_for(kernel, dtype.itemsize, a, b, k, o, products, tf32)  # type: ignore[arg-type]

    gs, name = second if b else None, f"pointwise_mlp {dtype} {a}|{b}"
    yield f"{name} forward", forward.forward_launch(g, mlp, config("forward"))
    yield f"{name} input gradient", backward.input_gradient_launch(x, gs, None, g, mlp, config("input"))[0]
    again = backward.input_gradient_launch(x, gs, g, g, mlp, config("input and output"))[0]
    yield f"{name} input gradient and output", again
    launches, _ = backward.weight_gradient_launches(g, mlp, config("weight"))
    assert len(launches) == 1
    yield f"{name} weights' gradients", launches[0]


def reduction_launches(
    dtype: torch.dtype, c: int, levels: int, products: str, last: bool = True, forward: bool = False
) -> Iterator[tuple[str, Any]]:
    """All gradients, and what precedes them, with the tiles of chips that multiply matrices so."""
    from wavemix_kernels.ops.reduce_haar import triton as reductions
    from wavemix_kernels.ops.reduce_haar import triton_backward as gradients

    x, weight, bias = meta(64, c, 64, 64, dtype=dtype, last=last), meta(c // 4, c, dtype=dtype), meta(c // 4)
    zs = [meta(64, c, 64 >> level, 64 >> level, dtype=dtype, last=True) for level in range(1, levels + 1)]
    name = f"reduce_haar {dtype} {c} L{levels}{'' if last else ' of rows'}"
    if forward:
        yield name, reductions.launch(zs, x, weight, bias.to(dtype), True)
    config = gradients.config_for(dtype.itemsize, levels, c // 4, c, not last, products)  # type: ignore[arg-type]
    yield f"{name} gradients", gradients.launch(x, zs, x, weight, x, True, config)[0]


def tf32_launches() -> Iterator[tuple[str, Any]]:
    """fp32 with torch's own switch for matrix products."""
    matmul: Any = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        launches = list(reduction_launches(torch.float32, 192, 1, "wgmma", forward=True))
        launches += [(n, x) for n, x in mlp_launches(torch.float32, "wgmma") if not n.endswith("and output")]
    finally:
        setattr(matmul, name, before)
    return ((f"tf32 {n}", x) for n, x in launches)


def compiled_launches() -> list[tuple[int, str, bool, Any]]:
    """(architecture, name, whether it multiplies matrices, launch) of default tiles, on tensors without storage."""
    from wavemix_kernels.ops.common.triton_launch import Launch
    from wavemix_kernels.ops.haar import triton as haar
    from wavemix_kernels.ops.norm import triton_batch_norm as norms
    from wavemix_kernels.ops.reduce_haar import triton as reductions

    half = torch.float16
    found: list[tuple[int, str, bool, Any]] = []
    for arch in (80, 100, 120):
        of_chip = mlp_launches(torch.float16, "tcgen05" if arch == 100 else "mma")
        found += [(arch, name, True, launch) for name, launch in of_chip]
    # Widths that are no powers of two, where tiles that are too narrow for the layouts spill.
    found += [(120, name, True, launch) for name, launch in mlp_launches(torch.float16, "mma", 144, 72, 288, 144)]
    for arch, levels, products in ((80, 4, "mma"), (90, 3, "wgmma"), (100, 2, "tcgen05"), (120, 1, "mma")):
        found += [(arch, name, True, launch) for name, launch in reduction_launches(half, 192, levels, products, False)]
    for c, levels in ((192, 3), (128, 1)):
        found += [(90, name, True, launch) for name, launch in reduction_launches(half, c, levels, "wgmma")]
    narrow = mlp_launches(half, "wgmma", 128, 0, 256, 128)
    found += [(90, name, True, launch) for name, launch in narrow if name.endswith(("output", "weights' gradients"))]
    found += [(90, name, True, launch) for name, launch in tf32_launches()]
    for dtype in (torch.float16, torch.float32):
        c, levels = 192, 3
        x, weight = meta(64, c, 64, 64, dtype=dtype, last=True), meta(c // 4, c, dtype=dtype)
        zs = [meta(64, c, 64 >> level, 64 >> level, dtype=dtype, last=True) for level in range(1, levels + 1)]
        bias = meta(c // 4, dtype=dtype)
        lows, highs = zip(*map(haar_pyramid._parts, zs), strict=True)
        reduced = meta(64, c // 4, 64, 64, dtype=dtype, last=True)
        for synthesis in (False, True):
            prepared = haar.prepare(
                reduced, lows[-1], highs, levels=levels, synthesis=synthesis, lows=lows[:-1]
            )  # fmt: skip
            found.append((90, f"haar_pyramid {dtype} {'adjoint' if synthesis else ''}", False, Launch(*prepared)))
        found.append((90, f"reduce_haar {dtype} {c} L{levels}", True, reductions.launch(zs, x, weight, bias, True)))
        rows = meta(64, c, 64, 64, dtype=dtype)
        found.append(
            (90, f"reduce_haar {dtype} {c} L{levels} of rows", True, reductions.launch(zs, rows, weight, bias, True))
        )
        found += [(90, name, True, launch) for name, launch in mlp_launches(dtype, "wgmma")]
        x = meta(64, 192, 64, 64, dtype=dtype, last=True)
        plain, per_channel = meta(64, 192, 64, 64, dtype=dtype), meta(192)
        stats, partial = norms.stats_launch(x)
        for name, launch in {
            "stats": stats, "combine": norms.combine_launch(partial)[0],
            "reduce": norms.reduce_launch(x, x, per_channel, per_channel)[0],
            "affine": norms.affine_launch(x, x, per_channel, per_channel, plain),
        }.items():  # fmt: skip
            found.append((90, f"batch_norm {dtype} {name}", False, launch))
    return found


def main() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Target:
        """The part of a driver that compiling asks for."""

        arch = 90

        def get_current_device(self) -> int:
            return self.arch

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", self.arch, 32)

    target = Target()
    driver.set_active(target)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    rows = []
    for target.arch, name, multiplies, launch in compiled_launches():
        compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [cuobjdump, "-res-usage", "-sass", file.name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        text = done.stdout + done.stderr
        registers, local = (int(re.search(rf"\b{key}:(\d+)", text)[1]) for key in ("REG", "LOCAL"))  # type: ignore[index]
        rows.append({
            "arch": target.arch, "name": f"sm_{target.arch} {name}",
            "tensor_cores": multiplies and ("float16" in name or "tf32" in name),
            "registers": registers, "local": local,
            "shared": compiled.metadata.shared, "warps": launch.constants["num_warps"],
            "narrow": len(re.findall(r"\bLDG[.\w]*\.[US](?:8|16)\b", text)),
            "instructions": dict(Counter(re.findall(
                r"\b(H?GMMA|HMMA|UTCHMMA|LDL|STL|(?:LDG|STG|LDGSTS)[.\w]*\.128)\b", text
            ))),
        })  # fmt: skip
    json.dump(rows, sys.stdout)


def test_compiled_for_real_chips() -> None:
    """No spills, tensor cores for the half types, 16-byte accesses; one block at least on a multiprocessor (config_for
    says where one is enough), and two on sm_90 in half types where MLP and reduction had them when this was written."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_CURRENT_TEST")}
    environment["TRITON_CACHE_DIR"] = str(ROOT / "build/triton-aot")  # a second run compiles only what changed
    command = [sys.executable, "-m", "tests.aot.from_triton_waveblock"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"compiling failed:\n{done.stderr[-4000:]}"
    table = json.loads(done.stdout)
    assert len(table) == len(compiled_launches())
    listing = "\n".join(map(str, table))
    for row in table:
        counts = row["instructions"]
        assert row["local"] == 0, f"{row['name']} spills:\n{listing}"
        assert not {"LDL", "STL"} & set(counts), f"{row['name']} spills:\n{listing}"
        assert row["registers"] * row["warps"] * 32 <= 65536, f"{row['name']} does not fit:\n{listing}"
        assert row["shared"] <= SHARED_LIMIT[row["arch"]], f"{row['name']} does not fit:\n{listing}"
        if row["arch"] == 90 and "float16" in row["name"] and re.search(TWO_BLOCKS, row["name"]):
            registers = -(-row["registers"] // 8) * 8 * 32 * row["warps"]
            assert registers <= 32768, f"{row['name']} is one block:\n{listing}"
            assert row["shared"] <= 113 * 1024, f"{row['name']} is one block:\n{listing}"
        if row["arch"] == 90 and re.search(r"mlp torch.float16 192.* (forward|input gradient)$", row["name"]):
            assert "HGMMA" in counts, f"{row['name']} multiplies without wgmma:\n{listing}"
        if re.search(r"float16 192 L(3 of rows|[12] of rows gradients)$", row["name"]):
            assert not row["narrow"], f"{row['name']} loads single pixels:\n{listing}"
        if row["tensor_cores"]:
            assert {"HGMMA", "HMMA", "UTCHMMA"} & set(counts), (
                f"{row['name']} multiplies without tensor cores:\n{listing}"
            )
        assert any(".128" in c for c in counts), f"{row['name']} has no 16-byte access:\n{listing}"


if __name__ == "__main__":
    main()
