"""conv1x1 -> GELU -> Dropout -> conv1x1 on matrices of pixels, the hidden layer in chunks that never leave the chip.

Every kernel makes the chunks of hidden units it needs again from its inputs: for the 64 to 256 channels of a Waveblock
a GEMM on tensor cores takes less time, by an H100's peak numbers, than writing and reading a layer twice as wide as
the input. Each operand is loaded once a program: in forward and in the inputs' gradients a program holds some pixels
and goes through the hidden units, in the weights' gradients it holds some units and goes through the pixels. What it
holds stays in shared memory, what it goes through arrives there one step ahead, for both products that use it.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels import _native
from wavemix_kernels.ops import tuned
from wavemix_kernels.ops.common import chips
from wavemix_kernels.ops.common.precision import input_precision
from wavemix_kernels.ops.common.triton_launch import Launch, cover
from wavemix_kernels.ops.common.triton_words import multiple, unit_of
from wavemix_kernels.ops.mlp.reference import STEPS, dropout
from wavemix_kernels.ops.mlp.tiles import Kind, MlpConfig, config_for, narrowest, search_space
from wavemix_kernels.ops.mlp.triton_blocks import (
    _activation,
    _input_tiles,
    _key,
    _plus_bias,
    _store,
    _units,
    _w1_tiles,
    _w2_tiles,
    _with_bias,
    _z_of_loops,
    _z_of_tiles,
)

FREE = ("rows", "threshold", "factor")  # one binary for all of them


@triton.jit(do_not_specialize=FREE)
def _forward_kernel(
    out, x, second, scale, shift, w1, b1, w2, b2, seed,
    rows: tl.int64, threshold: tl.int64, factor: tl.float32, out_stride, x_stride, second_stride,
    A: tl.constexpr, B: tl.constexpr, K: tl.constexpr, OUT: tl.constexpr,
    AFFINE: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr,
    X0: tl.constexpr, X1: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, O0: tl.constexpr, O1: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    out_stride, x_stride, second_stride = (
        multiple(out_stride, UNIT), multiple(x_stride, UNIT), multiple(second_stride, UNIT)
    )  # fmt: skip
    if CHANNELS == 0:
        x0, x1, s0, s1 = _input_tiles(
            x, x_stride, second, second_stride, scale, shift, row, in_rows, A, B, AFFINE, X0, X1, S0, S1
        )
    key = _key(seed, DROPOUT)
    acc0 = tl.zeros((ROWS, O0), tl.float32)
    acc1 = tl.zeros((ROWS, O1 if O1 else 1), tl.float32)
    for first in range(0, K, HIDDEN):
        unit, in_units = _units(first, HIDDEN, K)
        if CHANNELS == 0:
            w0, w1_, v0, v1 = _w1_tiles(w1, unit, in_units, A, B, X0, X1, S0, S1)
            z = _z_of_tiles(x0, x1, s0, s1, w0, w1_, v0, v1, X1, S0, S1, PRECISION)
        else:
            z = _z_of_loops(
                x, x_stride, second, second_stride, scale, shift, w1, row, in_rows, unit, in_units,
                A, B, AFFINE, CHANNELS, PRECISION,
            )  # fmt: skip
        z = _with_bias(z, b1, unit, in_units, False, BIAS1)
        hidden = _activation(z, key, row, first, threshold, K, DROPOUT).to(out.dtype.element_ty)
        u0, u1 = _w2_tiles(w2, unit, in_units, K, OUT, O0, O1)
        acc0 = tl.dot(hidden, tl.trans(u0), acc0, input_precision=PRECISION)
        if O1:
            acc1 = tl.dot(hidden, tl.trans(u1), acc1, input_precision=PRECISION)
    _store(out, out_stride, row, in_rows, _plus_bias(acc0 * factor, b2, 0, OUT, BIAS2), 0, OUT)
    if O1:
        _store(out, out_stride, row, in_rows, _plus_bias(acc1 * factor, b2, O0, OUT, BIAS2), O0, OUT)


# --------------------------------------------------------------------------------------------------- launch


class Mlp(NamedTuple):
    """The arguments of both directions; x and second as (pixels, channels) with contiguous rows, weights contiguous,
    scale and shift fp32, seed an int64 on the device."""

    x: Tensor
    second: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    p: float
    seed: Tensor | None

    @property
    def sizes(self) -> dict[str, int]:
        a = self.x.shape[1]
        return {"a": a, "b": self.w1.shape[1] - a, "k": self.w1.shape[0], "o": self.w2.shape[0]}

    @property
    def pointers(self) -> dict[str, Tensor]:
        """x stands in for absent tensors, which are never read."""
        named = {"x": self.x, "second": self.second, "scale": self.scale, "shift": self.shift, "w1": self.w1,
                 "b1": self.b1, "w2": self.w2, "b2": self.b2, "seed": self.seed}  # fmt: skip
        return {name: self.x if tensor is None else tensor for name, tensor in named.items()}

    @property
    def threshold(self) -> int:
        return dropout(self.p)[0]

    @property
    def drops(self) -> bool:
        return self.threshold < STEPS

    @property
    def scalars(self) -> dict[str, int | float]:
        threshold, factor = dropout(self.p)
        return {
            "rows": self.x.shape[0], "threshold": threshold, "factor": factor,
            "x_stride": self.x.stride(0), "second_stride": 0 if self.second is None else self.second.stride(0),
        }  # fmt: skip

    def unit(self, *others: Tensor | None) -> int:
        """The strides of rows, and of `others`', are multiples of this."""
        return unit_of(*(t.stride(0) for t in (self.x, self.second, *others) if t is not None))

    def constants(self, config: MlpConfig, kernel: Kind) -> dict[str, Any]:
        least = narrowest(kernel, self.x.dtype.itemsize, config)
        (x0, x1), (s0, s1), (o0, o1) = (cover(self.sizes[name], least) for name in ("a", "b", "o"))
        return {
            "A": self.sizes["a"], "B": self.sizes["b"], "K": self.sizes["k"], "OUT": self.sizes["o"],
            "AFFINE": self.scale is not None, "BIAS1": self.b1 is not None, "DROPOUT": self.drops,
            "ROWS": config.rows, "HIDDEN": config.hidden, "CHANNELS": config.channels, "X0": x0, "X1": x1, "S0": s0,
            "S1": s1, "O0": o0, "O1": o1, "PRECISION": input_precision(), "num_warps": config.num_warps,
            "num_stages": config.num_stages, "enable_fp_fusion": True,
        }  # fmt: skip

    def config(self, kernel: Kind) -> MlpConfig:
        device, itemsize, tf32 = self.x.device, self.x.dtype.itemsize, input_precision() == "tf32"
        found: MlpConfig | None = tuned.tile(
            f"mlp {kernel} tile", MlpConfig, lambda: search_space(itemsize), self.x, self.w1
        )
        if found is not None:
            return found
        each = triton.cdiv(self.x.shape[0], _native.multiprocessors(device))
        return config_for(
            kernel, itemsize, **self.sizes, products=chips.products_of(device), tf32=tf32,
            little_shared=chips.little_shared(device), each=each,
        )  # fmt: skip


def launch_by_name(kernel: Any, grid: tuple[int, ...], given: dict[str, Any], constants: dict[str, Any]) -> Launch:
    """By the names of the kernel's own arguments."""
    return Launch(kernel, grid, tuple(given[name] for name in kernel.arg_names if name in given), constants)


def forward_launch(out: Tensor, mlp: Mlp, config: MlpConfig | None = None) -> Launch:
    config = config or mlp.config("forward")
    given = {"out": out, "out_stride": out.stride(0), **mlp.pointers, **mlp.scalars}
    constants = {**mlp.constants(config, "forward"), "BIAS2": mlp.b2 is not None, "UNIT": mlp.unit(out)}
    return launch_by_name(_forward_kernel, (triton.cdiv(out.shape[0], config.rows),), given, constants)
