"""conv1x1 -> GELU -> Dropout -> conv1x1 on matrices of pixels, the hidden layer in chunks that never leave the chip.

Every kernel makes the chunks of hidden units it needs again from its inputs: for the 64 to 256 channels of a Waveblock
a GEMM on tensor cores takes less time, by an H100's peak numbers, than writing and reading a layer twice as wide as
the input. So backward is three kernels of one shape: the inputs' gradients, and each weight's as partial sums over
blocks of rows.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, Span, input_precision, pow2_at_least, span
from .philox import keep_mask

Kind = Literal["forward", "input", "weight"]
_PROGRAMS = 264  # two for each multiprocessor of an H100: what the split of a weight's gradient aims at


@dataclass(frozen=True)
class MlpConfig:
    """Rows of pixels, hidden units and input channels at work at a time; `columns` of a result held in registers."""

    rows: int
    hidden: int
    channels: int
    columns: int
    num_warps: int
    num_stages: int


def config_for(kernel: Kind, itemsize: int, columns: int, hidden: int, channels: int) -> MlpConfig:
    """The default for a result of `columns` columns: a deterministic function of its arguments.

    Half types fill tensor cores (64 rows are wgmma's least); fp32 multiplies on the ordinary units, where smaller
    tiles leave the registers for the accumulators. Eight warps share a tile: a result of 192 columns then takes half
    of a multiprocessor's registers, and one such block is better than two that make the hidden layer twice.
    """
    half = itemsize == 2
    chunk = min(64 if half else 32, max(16, pow2_at_least(hidden)))
    depth = min(64 if half else 32, max(16, pow2_at_least(channels)))
    # The gradients hold the hidden layer and its gradient at once beside the accumulators.
    most = {"forward": 256, "input": 192, "weight": 192} if half else {"forward": 128, "input": 128, "weight": 64}
    num_warps = 4 if not half and kernel != "weight" and columns <= 64 else 8
    return MlpConfig(64 if half else 32, chunk, depth, most[kernel], num_warps, 3 if half else 2)


def search_space(itemsize: int) -> Iterator[MlpConfig]:
    """Configurations worth timing."""
    for rows in (64, 128) if itemsize == 2 else (32, 64):
        for hidden in (32, 64) if itemsize == 2 else (16, 32):
            for num_warps in (4, 8):
                yield MlpConfig(rows, hidden, 32, 256 if itemsize == 2 else 128, num_warps, 3)


# -------------------------------------------------------------------------------------- values in registers


@triton.jit
def _tile(matrix, stride, row, in_rows, col, in_cols):
    """A tile of a row-major matrix, zero outside."""
    at = matrix + row[:, None] * stride + col[None, :]
    return tl.load(at, mask=in_rows[:, None] & in_cols[None, :], other=0.0)


@triton.jit
def _second_tile(second, stride, scale, shift, row, in_rows, col, in_cols, AFFINE: tl.constexpr):
    """As _tile; the affine map is applied in fp32 and rounded once, as a tensor core wants its operand."""
    tile = _tile(second, stride, row, in_rows, col, in_cols)
    if AFFINE:
        factor = tl.load(scale + col, mask=in_cols, other=0.0)
        offset = tl.load(shift + col, mask=in_cols, other=0.0)
        tile = (tile.to(tl.float32) * factor[None, :] + offset[None, :]).to(second.dtype.element_ty)
    return tile


@triton.jit
def _pre_activation(
    x, x_stride, a, second, second_stride, b, scale, shift, w1, b1, row, in_rows, unit, in_units,
    SECOND: tl.constexpr, AFFINE: tl.constexpr, BIAS1: tl.constexpr, CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[x | second * scale + shift] @ w1.T + b1 for some rows and hidden units, in fp32."""
    z = tl.zeros((row.shape[0], unit.shape[0]), tl.float32)
    for c in range(0, a, CHANNELS):
        col = c + tl.arange(0, CHANNELS)
        weight = _tile(w1, a + b, unit, in_units, col, col < a)
        z = tl.dot(_tile(x, x_stride, row, in_rows, col, col < a), tl.trans(weight), z, input_precision=PRECISION)
    if SECOND:
        for c in range(0, b, CHANNELS):
            col = c + tl.arange(0, CHANNELS)
            tile = _second_tile(second, second_stride, scale, shift, row, in_rows, col, col < b, AFFINE)
            weight = _tile(w1 + a, a + b, unit, in_units, col, col < b)
            z = tl.dot(tile, tl.trans(weight), z, input_precision=PRECISION)
    if BIAS1:
        z += tl.load(b1 + unit, mask=in_units, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def _hidden_gradient(
    g, g_stride, o, w2, k, row, in_rows, unit, in_units, CHANNELS: tl.constexpr, PRECISION: tl.constexpr
):
    """grad @ w2 for some rows and hidden units, in fp32."""
    out = tl.zeros((row.shape[0], unit.shape[0]), tl.float32)
    for c in range(0, o, CHANNELS):
        col = c + tl.arange(0, CHANNELS)
        weight = _tile(w2, k, col, col < o, unit, in_units)
        out = tl.dot(_tile(g, g_stride, row, in_rows, col, col < o), weight, out, input_precision=PRECISION)
    return out


@triton.jit
def _normal_cdf(z):
    return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)


@triton.jit
def _dropped(value, seed, row, first, k, threshold, factor, DROPOUT: tl.constexpr):
    """Dropped values become exactly 0, NaN included."""
    if DROPOUT:
        keep = keep_mask(tl.load(seed), row, first, k, threshold, value.shape[1])
        value = tl.where(keep, value * factor, 0.0)
    return value


@triton.jit
def _activation(z, seed, row, first, k, threshold, factor, DROPOUT: tl.constexpr):
    """Dropout(GELU(z))"""
    return _dropped(z * _normal_cdf(z), seed, row, first, k, threshold, factor, DROPOUT)


@triton.jit
def _activation_gradient(z, grad, seed, row, first, k, threshold, factor, DROPOUT: tl.constexpr):
    """Gradient of z, given that of Dropout(GELU(z))."""
    slope = _normal_cdf(z) + z * (0.3989422804014327 * tl.exp(-0.5 * z * z))
    return _dropped(grad, seed, row, first, k, threshold, factor, DROPOUT) * slope


# -------------------------------------------------------------------------------------------------- kernels
#
# A result's columns are held as WIDTH and, where HALF, WIDTH // 2 more (launch.Span).

_FREE = ("rows", "threshold", "factor")  # one binary for all of them


@triton.jit(do_not_specialize=_FREE)
def _forward_kernel(
    out, x, second, scale, shift, w1, b1, w2, b2, seed,
    rows: tl.int64, threshold: tl.int64, factor: tl.float32, out_stride, x_stride, second_stride, a, b, k, o,
    SECOND: tl.constexpr, AFFINE: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    col0 = tl.program_id(1) * (WIDTH + HALF * (WIDTH // 2)) + tl.arange(0, WIDTH)
    col1 = tl.program_id(1) * (WIDTH + HALF * (WIDTH // 2)) + WIDTH + tl.arange(0, WIDTH // 2)
    acc0 = tl.zeros((ROWS, WIDTH), tl.float32)
    acc1 = tl.zeros((ROWS, WIDTH // 2), tl.float32)
    for first in range(0, k, HIDDEN):
        unit = first + tl.arange(0, HIDDEN)
        z = _pre_activation(
            x, x_stride, a, second, second_stride, b, scale, shift, w1, b1, row, in_rows, unit, unit < k,
            SECOND, AFFINE, BIAS1, CHANNELS, PRECISION,
        )  # fmt: skip
        hidden = _activation(z, seed, row, first, k, threshold, factor, DROPOUT).to(out.dtype.element_ty)
        weight = tl.trans(_tile(w2, k, col0, col0 < o, unit, unit < k))
        acc0 = tl.dot(hidden, weight, acc0, input_precision=PRECISION)
        if HALF:
            weight = tl.trans(_tile(w2, k, col1, col1 < o, unit, unit < k))
            acc1 = tl.dot(hidden, weight, acc1, input_precision=PRECISION)
    if BIAS2:
        acc0 += tl.load(b2 + col0, mask=col0 < o, other=0.0).to(tl.float32)[None, :]
        acc1 += tl.load(b2 + col1, mask=col1 < o, other=0.0).to(tl.float32)[None, :]
    at = out + row[:, None] * out_stride
    tl.store(at + col0[None, :], acc0.to(out.dtype.element_ty), mask=in_rows[:, None] & (col0 < o)[None, :])
    if HALF:
        tl.store(at + col1[None, :], acc1.to(out.dtype.element_ty), mask=in_rows[:, None] & (col1 < o)[None, :])


@triton.jit
def _store_parts(gx, gx_stride, a, gs, gs_stride, b, value, row, in_rows, col, SECOND: tl.constexpr):
    """Columns of [x | second], each part to its own matrix."""
    value = value.to(gx.dtype.element_ty)
    tl.store(gx + row[:, None] * gx_stride + col[None, :], value, mask=in_rows[:, None] & (col < a)[None, :])
    if SECOND:
        mask = in_rows[:, None] & ((col >= a) & (col < a + b))[None, :]
        tl.store(gs + row[:, None] * gs_stride + (col - a)[None, :], value, mask=mask)


@triton.jit(do_not_specialize=_FREE)
def _input_gradient_kernel(
    gx, gs, g, x, second, scale, shift, w1, b1, w2, seed,
    rows: tl.int64, threshold: tl.int64, factor: tl.float32, gx_stride, gs_stride, g_stride, x_stride, second_stride,
    a, b, k, o,
    SECOND: tl.constexpr, AFFINE: tl.constexpr, BIAS1: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    col0 = tl.program_id(1) * (WIDTH + HALF * (WIDTH // 2)) + tl.arange(0, WIDTH)
    col1 = tl.program_id(1) * (WIDTH + HALF * (WIDTH // 2)) + WIDTH + tl.arange(0, WIDTH // 2)
    acc0 = tl.zeros((ROWS, WIDTH), tl.float32)
    acc1 = tl.zeros((ROWS, WIDTH // 2), tl.float32)
    for first in range(0, k, HIDDEN):
        unit = first + tl.arange(0, HIDDEN)
        z = _pre_activation(
            x, x_stride, a, second, second_stride, b, scale, shift, w1, b1, row, in_rows, unit, unit < k,
            SECOND, AFFINE, BIAS1, CHANNELS, PRECISION,
        )  # fmt: skip
        grad = _hidden_gradient(g, g_stride, o, w2, k, row, in_rows, unit, unit < k, CHANNELS, PRECISION)
        grad = _activation_gradient(z, grad, seed, row, first, k, threshold, factor, DROPOUT).to(gx.dtype.element_ty)
        weight = _tile(w1, a + b, unit, unit < k, col0, col0 < a + b)
        acc0 = tl.dot(grad, weight, acc0, input_precision=PRECISION)
        if HALF:
            weight = _tile(w1, a + b, unit, unit < k, col1, col1 < a + b)
            acc1 = tl.dot(grad, weight, acc1, input_precision=PRECISION)
    _store_parts(gx, gx_stride, a, gs, gs_stride, b, acc0, row, in_rows, col0, SECOND)
    if HALF:
        _store_parts(gx, gx_stride, a, gs, gs_stride, b, acc1, row, in_rows, col1, SECOND)


@triton.jit
def _right_operand(
    g, g_stride, o, x, x_stride, a, second, second_stride, b, scale, shift, row, in_rows, col,
    OF: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    if OF == "w2":
        return _tile(g, g_stride, row, in_rows, col, col < o)
    elif OF == "x":
        return _tile(x, x_stride, row, in_rows, col, col < a)
    else:
        return _second_tile(second, second_stride, scale, shift, row, in_rows, col, col < b, AFFINE)


@triton.jit(do_not_specialize=(*_FREE, "rows_each"))
def _weight_gradient_kernel(
    partial, partial_bias, g, x, second, scale, shift, w1, b1, w2, seed,
    rows: tl.int64, rows_each, threshold: tl.int64, factor: tl.float32, partial_stride: tl.int64,
    g_stride, x_stride, second_stride, a, b, k, o,
    OF: tl.constexpr,  # "w2", or the columns of w1 that belong to "x" or "second"
    SECOND: tl.constexpr, AFFINE: tl.constexpr, BIAS1: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """partial[split] = hidden.T @ g (for w2, hence transposed when stored), or z's gradient.T @ [x | second]."""
    split = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * HIDDEN
    unit = first + tl.arange(0, HIDDEN)
    in_units = unit < k
    col0 = tl.program_id(1) * (WIDTH + HALF * (WIDTH // 2)) + tl.arange(0, WIDTH)
    col1 = tl.program_id(1) * (WIDTH + HALF * (WIDTH // 2)) + WIDTH + tl.arange(0, WIDTH // 2)
    acc0 = tl.zeros((HIDDEN, WIDTH), tl.float32)
    acc1 = tl.zeros((HIDDEN, WIDTH // 2), tl.float32)
    bias = tl.zeros((HIDDEN,), tl.float32)
    for start in range(0, rows_each, ROWS):
        row = split * rows_each + start + tl.arange(0, ROWS)
        in_rows = row < rows
        z = _pre_activation(
            x, x_stride, a, second, second_stride, b, scale, shift, w1, b1, row, in_rows, unit, in_units,
            SECOND, AFFINE, BIAS1, CHANNELS, PRECISION,
        )  # fmt: skip
        if OF == "w2":
            left = _activation(z, seed, row, first, k, threshold, factor, DROPOUT)
        else:
            left = _hidden_gradient(g, g_stride, o, w2, k, row, in_rows, unit, in_units, CHANNELS, PRECISION)
            left = _activation_gradient(z, left, seed, row, first, k, threshold, factor, DROPOUT)
            if OF == "x":
                bias += tl.sum(left, 0)
        left = tl.trans(left.to(g.dtype.element_ty))
        right = _right_operand(
            g, g_stride, o, x, x_stride, a, second, second_stride, b, scale, shift, row, in_rows, col0, OF, AFFINE
        )
        acc0 = tl.dot(left, right, acc0, input_precision=PRECISION)
        if HALF:
            right = _right_operand(
                g, g_stride, o, x, x_stride, a, second, second_stride, b, scale, shift, row, in_rows, col1, OF, AFFINE
            )
            acc1 = tl.dot(left, right, acc1, input_precision=PRECISION)
    at = partial + split * partial_stride
    if OF == "w2":
        per_unit, per_col, count = 1, k, o
    elif OF == "x":
        per_unit, per_col, count = a, 1, a
    else:
        per_unit, per_col, count = b, 1, b
    at += unit[:, None] * per_unit
    tl.store(at + col0[None, :] * per_col, acc0, mask=in_units[:, None] & (col0 < count)[None, :])
    if HALF:
        tl.store(at + col1[None, :] * per_col, acc1, mask=in_units[:, None] & (col1 < count)[None, :])
    if OF == "x" and BIAS1:  # noqa: SIM102 (decided when compiling, the inner one by the program)
        if tl.program_id(1) == 0:
            tl.store(partial_bias + split * k + unit, bias, mask=in_units)


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
        """What is absent is never read: x stands in for it."""
        named = {"x": self.x, "second": self.second, "scale": self.scale, "shift": self.shift, "w1": self.w1,
                 "b1": self.b1, "w2": self.w2, "b2": self.b2, "seed": self.seed}  # fmt: skip
        return {name: self.x if tensor is None else tensor for name, tensor in named.items()}

    @property
    def threshold(self) -> int:
        return round((1 - self.p) * 2**32)

    @property
    def scalars(self) -> dict[str, int | float]:
        """A threshold of 2^32 keeps everything, and its factor is 1 in fp32."""
        return {
            "rows": self.x.shape[0], "threshold": self.threshold, "factor": 0.0 if self.p == 1 else 1 / (1 - self.p),
            "x_stride": self.x.stride(0), "second_stride": 0 if self.second is None else self.second.stride(0),
            **self.sizes,
        }  # fmt: skip

    def constants(self, config: MlpConfig, columns: int) -> tuple[Span, dict[str, Any]]:
        chosen = span(columns, config.columns)
        return chosen, {
            "SECOND": self.second is not None, "AFFINE": self.scale is not None, "BIAS1": self.b1 is not None,
            "DROPOUT": self.threshold < 2**32, "ROWS": config.rows, "HIDDEN": config.hidden,
            "CHANNELS": config.channels, "WIDTH": chosen.width, "HALF": chosen.half, "PRECISION": input_precision(),
            "num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True,
        }  # fmt: skip

    def config(self, kernel: Kind, columns: int) -> MlpConfig:
        sizes = self.sizes
        return config_for(kernel, self.x.dtype.itemsize, columns, sizes["k"], max(sizes["a"], sizes["o"]))


def _launch(kernel: Any, grid: tuple[int, ...], given: dict[str, Any], constants: dict[str, Any]) -> Launch:
    """By the names of the kernel's own arguments."""
    return Launch(kernel, grid, tuple(given[name] for name in kernel.arg_names if name in given), constants)


def forward_launch(out: Tensor, mlp: Mlp, config: MlpConfig | None = None) -> Launch:
    columns = mlp.w2.shape[0]
    config = config or mlp.config("forward", columns)
    chosen, constants = mlp.constants(config, columns)
    grid = triton.cdiv(out.shape[0], config.rows), triton.cdiv(columns, chosen.columns)
    given = {"out": out, "out_stride": out.stride(0), **mlp.pointers, **mlp.scalars}
    return _launch(_forward_kernel, grid, given, {**constants, "BIAS2": mlp.b2 is not None})


def forward(out: Tensor, mlp: Mlp, config: MlpConfig | None = None) -> None:
    """Writes conv1x1(Dropout(GELU(conv1x1([x | second * scale + shift])))) into `out` (pixels, O)."""
    forward_launch(out, mlp, config).run(out)


def input_gradient_launch(
    gx: Tensor, gs: Tensor | None, grad: Tensor, mlp: Mlp, config: MlpConfig | None = None
) -> Launch:
    columns = mlp.w1.shape[1]
    config = config or mlp.config("input", columns)
    chosen, constants = mlp.constants(config, columns)
    grid = triton.cdiv(grad.shape[0], config.rows), triton.cdiv(columns, chosen.columns)
    given = {"gx": gx, "gs": gx if gs is None else gs, "g": grad, "gx_stride": gx.stride(0),
             "gs_stride": 0 if gs is None else gs.stride(0), "g_stride": grad.stride(0), **mlp.pointers,
             **mlp.scalars}  # fmt: skip
    return _launch(_input_gradient_kernel, grid, given, constants)


def input_gradient(gx: Tensor, gs: Tensor | None, grad: Tensor, mlp: Mlp, config: MlpConfig | None = None) -> None:
    """Writes the gradients of x and of `second * scale + shift`, matrices like those."""
    input_gradient_launch(gx, gs, grad, mlp, config).run(grad)


def weight_gradient_launch(
    of: str, grad: Tensor, mlp: Mlp, config: MlpConfig | None = None
) -> tuple[Launch, Tensor, Tensor]:
    """A launch and the partial sums it fills: (splits, *weight's shape) and (splits, K) for the bias.

    ``of``: "w2", or the columns of w1 that belong to "x" or to "second".
    """
    sizes = mlp.sizes
    columns = sizes[{"w2": "o", "x": "a", "second": "b"}[of]]
    config = config or mlp.config("weight", columns)
    chosen, constants = mlp.constants(config, columns)
    rows, k = grad.shape[0], sizes["k"]
    blocks = triton.cdiv(k, config.hidden), triton.cdiv(columns, chosen.columns)
    # Deterministic: a function of the shapes. No fewer than four blocks of rows each, for the sums' sake.
    splits = max(1, min(_PROGRAMS // (blocks[0] * blocks[1]), triton.cdiv(rows, 4 * config.rows)))
    rows_each = triton.cdiv(triton.cdiv(rows, splits), config.rows) * config.rows
    shape = (splits, columns, k) if of == "w2" else (splits, k, columns)
    partial = grad.new_empty(shape, dtype=torch.float32)
    bias = grad.new_empty((splits, k), dtype=torch.float32)
    given = {
        "partial": partial, "partial_bias": bias, "g": grad, "rows_each": rows_each,
        "partial_stride": partial.stride(0), "g_stride": grad.stride(0), **mlp.pointers, **mlp.scalars,
    }  # fmt: skip
    return _launch(_weight_gradient_kernel, (*blocks, splits), given, {**constants, "OF": of}), partial, bias


def weight_gradients(grad: Tensor, mlp: Mlp, config: MlpConfig | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of w1, b1 (meaningless without one) and w2 in fp32, summed in a fixed order."""
    launch, partial, bias = weight_gradient_launch("x", grad, mlp, config)
    launch.run(grad)
    dw1, db1 = partial.sum(0), bias.sum(0)
    if mlp.second is not None:
        launch, partial, _ = weight_gradient_launch("second", grad, mlp, config)
        launch.run(grad)
        dw1 = torch.cat((dw1, partial.sum(0)), 1)
    launch, partial, _ = weight_gradient_launch("w2", grad, mlp, config)
    launch.run(grad)
    return dw1, db1, partial.sum(0)
