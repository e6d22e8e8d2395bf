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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import MOST_COLUMNS
from .launch import Launch, cover, input_precision
from .philox import keep_mask

Kind = Literal["forward", "input", "weight"]
_TOGETHER = 160  # columns of all weights' gradients together, 80 registers a thread of four warps
_PROGRAMS = 264  # two for each of the multiprocessors of an H100: what the split of a weight's gradient aims at


@dataclass(frozen=True)
class MlpConfig:
    """Rows of pixels and hidden units at work at a time, and input channels: 0 for all of them, held on the chip."""

    rows: int
    hidden: int
    channels: int
    num_warps: int
    num_stages: int


def config_for(kernel: Kind, itemsize: int, a: int, b: int, k: int, o: int, warp_groups: bool = True) -> MlpConfig:
    """The default for inputs of a + b columns, k hidden units and o results: a deterministic function of its arguments.

    Half types: 64 rows (for a weight's gradient: units) on four warps are wgmma's own tile, and two blocks of at most
    255 registers a thread share a multiprocessor, so that one multiplies while the other takes error functions.
    192 accumulated columns are 96 registers of a thread, and 32 units of the hidden layer 16, twice in a gradient.
    Where more columns leave no room, a step takes 16; above 288 (144 registers), and on chips without `warp_groups`
    (which multiply by warps, out of registers: 8.x, 12.x), a tile of 32 on eight warps. Of weights' gradients above
    216 input columns one block of eight warps fits a multiprocessor, as many warps as two blocks of four elsewhere.
    fp32 multiplies on the ordinary units, whose operands are registers too: 16 x 16 tiles of the hidden layer on eight
    warps, whose one block keeps two warps on each scheduler, enough for independent multiply-adds.

    Raises:
        ValueError: more columns than the smallest tile can accumulate.
    """
    columns = a + b
    if max(columns, o) > MOST_COLUMNS:
        raise ValueError(
            f"{columns} input and {o} output channels: at most {MOST_COLUMNS}; backend 'reference' takes any"
        )
    if itemsize == 4:
        return MlpConfig(16, 32 if kernel == "weight" and 144 < columns <= 288 else 16, 16, 8, 2)
    if max(columns, o) > 512:
        return MlpConfig(16, 16, 64, 8, 2)
    if not warp_groups:
        return MlpConfig(16 if kernel == "input" else 32, 16, 0, 8, 2)
    if kernel == "forward":
        if columns <= 288 and o <= 192:
            return MlpConfig(64, 32, 0, 4, 2)
        return MlpConfig(64, 16, 0, 4, 2) if columns <= 384 and o <= 256 else MlpConfig(32, 16, 0, 8, 2)
    if kernel == "input":
        if max(columns, o) <= 192:
            return MlpConfig(64, 32, 0, 4, 2)
        return MlpConfig(64, 16, 0, 4, 2) if columns <= 288 and o <= 192 else MlpConfig(32, 16, 0, 8, 2)
    if columns + o <= _TOGETHER:
        return MlpConfig(32, 64, 0, 4, 2)
    if columns <= 216 and o <= 192:
        return MlpConfig(16, 64, 0, 4, 2)
    return MlpConfig(32, 16, 0, 8, 2)


def search_space(itemsize: int) -> Iterator[MlpConfig]:
    """Configurations worth timing."""
    if itemsize == 4:
        for rows, num_warps in ((16, 4), (32, 8)):
            yield MlpConfig(rows, 16, 16, num_warps, 2)
        return
    for rows, hidden, num_warps in ((64, 32, 4), (64, 16, 4), (128, 32, 8), (32, 32, 8), (16, 64, 4), (32, 64, 4)):
        yield MlpConfig(rows, hidden, 0, num_warps, 2)


def _together(b: int, columns: int, config: MlpConfig) -> tuple[tuple[str, ...], ...]:
    """Which gradients a launch accumulates: all where they fit the registers, else one, with the hidden layer made
    again for the next."""
    parts = ("x", "second", "w2") if b else ("x", "w2")
    return (parts,) if columns <= _TOGETHER and config.hidden == 64 else tuple((part,) for part in parts)


# -------------------------------------------------------------------------------------- values in registers
#
# The columns of x, of `second` and of the result lie in two tiles each, of X0 and X1, S0 and S1, O0 and O1 columns
# (launch.cover); a width of 0: no tile, for which another stands in where Triton wants a value.


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
def _columns(FIRST: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """WIDTH columns from FIRST on, and which of them are among COUNT; a mask known to be true costs nothing."""
    col = FIRST + tl.arange(0, WIDTH)
    return col, (tl.full((WIDTH,), 1, tl.int1) if FIRST + WIDTH <= COUNT else col < COUNT)


@triton.jit
def _units(first, HIDDEN: tl.constexpr, K: tl.constexpr):
    unit = first + tl.arange(0, HIDDEN)
    return unit, (tl.full((HIDDEN,), 1, tl.int1) if K % HIDDEN == 0 else unit < K)


@triton.jit
def _two_tiles(matrix, stride, row, in_rows, COUNT: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr):
    """Rows of a matrix of COUNT columns."""
    col, in_cols = _columns(0, W0, COUNT)
    first = _tile(matrix, stride, row, in_rows, col, in_cols)
    rest = first
    if W1:
        col, in_cols = _columns(W0, W1, COUNT)
        rest = _tile(matrix, stride, row, in_rows, col, in_cols)
    return first, rest


@triton.jit
def _input_tiles(
    x, x_stride, second, second_stride, scale, shift, row, in_rows,
    A: tl.constexpr, B: tl.constexpr, AFFINE: tl.constexpr,
    X0: tl.constexpr, X1: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr,
):  # fmt: skip
    """Rows of x and of second * scale + shift."""
    x0, x1 = _two_tiles(x, x_stride, row, in_rows, A, X0, X1)
    s0, s1 = x0, x0
    if S0:
        col, in_cols = _columns(0, S0, B)
        s0 = _second_tile(second, second_stride, scale, shift, row, in_rows, col, in_cols, AFFINE)
    if S1:
        col, in_cols = _columns(S0, S1, B)
        s1 = _second_tile(second, second_stride, scale, shift, row, in_rows, col, in_cols, AFFINE)
    return x0, x1, s0, s1


@triton.jit
def _w1_tiles(
    w1, unit, in_units, A: tl.constexpr, B: tl.constexpr,
    X0: tl.constexpr, X1: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr,
):  # fmt: skip
    """Hidden units' weights of x and of second."""
    x0, x1 = _two_tiles(w1, A + B, unit, in_units, A, X0, X1)
    s0, s1 = x0, x0
    if S0:
        s0, s1 = _two_tiles(w1 + A, A + B, unit, in_units, B, S0, S1)
    return x0, x1, s0, s1


@triton.jit
def _w2_tiles(w2, unit, in_units, K: tl.constexpr, OUT: tl.constexpr, O0: tl.constexpr, O1: tl.constexpr):
    """Results' weights of hidden units, (columns, units)."""
    col, in_cols = _columns(0, O0, OUT)
    first = _tile(w2, K, col, in_cols, unit, in_units)
    rest = first
    if O1:
        col, in_cols = _columns(O0, O1, OUT)
        rest = _tile(w2, K, col, in_cols, unit, in_units)
    return first, rest


@triton.jit
def _with_bias(z, b1, unit, in_units, UNITS_FIRST: tl.constexpr, BIAS1: tl.constexpr):
    if BIAS1:
        bias = tl.load(b1 + unit, mask=in_units, other=0.0).to(tl.float32)
        z += bias[:, None] if UNITS_FIRST else bias[None, :]
    return z


@triton.jit
def _z_of_tiles(
    x0, x1, s0, s1, w0, w1, v0, v1, X1: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, PRECISION: tl.constexpr
):
    """[x0 | x1 | s0 | s1] @ [w0 | w1 | v0 | v1].T in fp32."""
    z = tl.dot(x0, tl.trans(w0), input_precision=PRECISION)
    if X1:
        z = tl.dot(x1, tl.trans(w1), z, input_precision=PRECISION)
    if S0:
        z = tl.dot(s0, tl.trans(v0), z, input_precision=PRECISION)
    if S1:
        z = tl.dot(s1, tl.trans(v1), z, input_precision=PRECISION)
    return z


@triton.jit
def _z_of_loops(
    x, x_stride, second, second_stride, scale, shift, w1, row, in_rows, unit, in_units,
    A: tl.constexpr, B: tl.constexpr, AFFINE: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[x | second * scale + shift] @ w1.T in fp32, CHANNELS columns at a time."""
    z = tl.zeros((row.shape[0], unit.shape[0]), tl.float32)
    for c in range(0, A, CHANNELS):
        col = c + tl.arange(0, CHANNELS)
        weight = _tile(w1, A + B, unit, in_units, col, col < A)
        z = tl.dot(_tile(x, x_stride, row, in_rows, col, col < A), tl.trans(weight), z, input_precision=PRECISION)
    if B:
        for c in range(0, B, CHANNELS):
            col = c + tl.arange(0, CHANNELS)
            tile = _second_tile(second, second_stride, scale, shift, row, in_rows, col, col < B, AFFINE)
            weight = _tile(w1 + A, A + B, unit, in_units, col, col < B)
            z = tl.dot(tile, tl.trans(weight), z, input_precision=PRECISION)
    return z


@triton.jit
def _hidden_gradient(
    g,
    g_stride,
    w2,
    row,
    in_rows,
    unit,
    in_units,
    K: tl.constexpr,
    OUT: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad @ w2 for some rows and hidden units, in fp32."""
    out = tl.zeros((row.shape[0], unit.shape[0]), tl.float32)
    for c in range(0, OUT, CHANNELS):
        col = c + tl.arange(0, CHANNELS)
        weight = _tile(w2, K, col, col < OUT, unit, in_units)
        out = tl.dot(_tile(g, g_stride, row, in_rows, col, col < OUT), weight, out, input_precision=PRECISION)
    return out


@triton.jit
def _normal_cdf(z):
    return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)


@triton.jit
def _dropped(
    value, seed, row, first, threshold, factor, K: tl.constexpr, UNITS_FIRST: tl.constexpr, DROPOUT: tl.constexpr
):
    """Dropped values become exactly 0, NaN included."""
    if DROPOUT:
        if UNITS_FIRST:
            keep = tl.trans(keep_mask(tl.load(seed), row, first, K, threshold, value.shape[0]))
        else:
            keep = keep_mask(tl.load(seed), row, first, K, threshold, value.shape[1])
        value = tl.where(keep, value * factor, 0.0)
    return value


@triton.jit
def _activation(
    z, seed, row, first, threshold, factor, K: tl.constexpr, UNITS_FIRST: tl.constexpr, DROPOUT: tl.constexpr
):
    """Dropout(GELU(z))"""
    return _dropped(z * _normal_cdf(z), seed, row, first, threshold, factor, K, UNITS_FIRST, DROPOUT)


@triton.jit
def _activation_gradient(
    z, grad, seed, row, first, threshold, factor, K: tl.constexpr, UNITS_FIRST: tl.constexpr, DROPOUT: tl.constexpr
):
    """Gradient of z, given that of Dropout(GELU(z))."""
    slope = _normal_cdf(z) + z * (0.3989422804014327 * tl.exp(-0.5 * z * z))
    return _dropped(grad, seed, row, first, threshold, factor, K, UNITS_FIRST, DROPOUT) * slope


# -------------------------------------------------------------------------------------------------- kernels

_FREE = ("rows", "threshold", "factor")  # one binary for all of them


@triton.jit
def _store(matrix, stride, row, in_rows, value, FIRST: tl.constexpr, COUNT: tl.constexpr):
    col, in_cols = _columns(FIRST, value.shape[1], COUNT)
    at = matrix + row[:, None] * stride + col[None, :]
    tl.store(at, value.to(matrix.dtype.element_ty), mask=in_rows[:, None] & in_cols[None, :])


@triton.jit
def _plus_bias(value, bias, FIRST: tl.constexpr, COUNT: tl.constexpr, BIAS: tl.constexpr):
    if BIAS:
        col, in_cols = _columns(FIRST, value.shape[1], COUNT)
        value += tl.load(bias + col, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    return value


@triton.jit(do_not_specialize=_FREE)
def _forward_kernel(
    out, x, second, scale, shift, w1, b1, w2, b2, seed,
    rows: tl.int64, threshold: tl.int64, factor: tl.float32, out_stride, x_stride, second_stride,
    A: tl.constexpr, B: tl.constexpr, K: tl.constexpr, OUT: tl.constexpr,
    AFFINE: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr,
    X0: tl.constexpr, X1: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, O0: tl.constexpr, O1: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    if CHANNELS == 0:
        x0, x1, s0, s1 = _input_tiles(
            x, x_stride, second, second_stride, scale, shift, row, in_rows, A, B, AFFINE, X0, X1, S0, S1
        )
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
        hidden = _activation(z, seed, row, first, threshold, factor, K, False, DROPOUT).to(out.dtype.element_ty)
        u0, u1 = _w2_tiles(w2, unit, in_units, K, OUT, O0, O1)
        acc0 = tl.dot(hidden, tl.trans(u0), acc0, input_precision=PRECISION)
        if O1:
            acc1 = tl.dot(hidden, tl.trans(u1), acc1, input_precision=PRECISION)
    _store(out, out_stride, row, in_rows, _plus_bias(acc0, b2, 0, OUT, BIAS2), 0, OUT)
    if O1:
        _store(out, out_stride, row, in_rows, _plus_bias(acc1, b2, O0, OUT, BIAS2), O0, OUT)


@triton.jit(do_not_specialize=_FREE)
def _input_gradient_kernel(
    gx, gs, g, x, second, scale, shift, w1, b1, w2, seed,
    rows: tl.int64, threshold: tl.int64, factor: tl.float32, gx_stride, gs_stride, g_stride, x_stride, second_stride,
    A: tl.constexpr, B: tl.constexpr, K: tl.constexpr, OUT: tl.constexpr,
    AFFINE: tl.constexpr, BIAS1: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr,
    X0: tl.constexpr, X1: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, O0: tl.constexpr, O1: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    if CHANNELS == 0:
        x0, x1, s0, s1 = _input_tiles(
            x, x_stride, second, second_stride, scale, shift, row, in_rows, A, B, AFFINE, X0, X1, S0, S1
        )
        g0, g1 = _two_tiles(g, g_stride, row, in_rows, OUT, O0, O1)
    dx0 = tl.zeros((ROWS, X0), tl.float32)
    dx1 = tl.zeros((ROWS, X1 if X1 else 1), tl.float32)
    ds0 = tl.zeros((ROWS, S0 if S0 else 1), tl.float32)
    ds1 = tl.zeros((ROWS, S1 if S1 else 1), tl.float32)
    for first in range(0, K, HIDDEN):
        unit, in_units = _units(first, HIDDEN, K)
        w0, w1_, v0, v1 = _w1_tiles(w1, unit, in_units, A, B, X0, X1, S0, S1)
        if CHANNELS == 0:
            z = _z_of_tiles(x0, x1, s0, s1, w0, w1_, v0, v1, X1, S0, S1, PRECISION)
            u0, u1 = _w2_tiles(w2, unit, in_units, K, OUT, O0, O1)
            grad = tl.dot(g0, u0, input_precision=PRECISION)
            if O1:
                grad = tl.dot(g1, u1, grad, input_precision=PRECISION)
        else:
            z = _z_of_loops(
                x, x_stride, second, second_stride, scale, shift, w1, row, in_rows, unit, in_units,
                A, B, AFFINE, CHANNELS, PRECISION,
            )  # fmt: skip
            grad = _hidden_gradient(g, g_stride, w2, row, in_rows, unit, in_units, K, OUT, CHANNELS, PRECISION)
        z = _with_bias(z, b1, unit, in_units, False, BIAS1)
        grad = _activation_gradient(z, grad, seed, row, first, threshold, factor, K, False, DROPOUT).to(
            gx.dtype.element_ty
        )
        dx0 = tl.dot(grad, w0, dx0, input_precision=PRECISION)
        if X1:
            dx1 = tl.dot(grad, w1_, dx1, input_precision=PRECISION)
        if S0:
            ds0 = tl.dot(grad, v0, ds0, input_precision=PRECISION)
        if S1:
            ds1 = tl.dot(grad, v1, ds1, input_precision=PRECISION)
    _store(gx, gx_stride, row, in_rows, dx0, 0, A)
    if X1:
        _store(gx, gx_stride, row, in_rows, dx1, X0, A)
    if S0:
        _store(gs, gs_stride, row, in_rows, ds0, 0, B)
    if S1:
        _store(gs, gs_stride, row, in_rows, ds1, S0, B)


@triton.jit
def _store_transposed(matrix, unit, in_units, value, FIRST: tl.constexpr, COUNT: tl.constexpr, K: tl.constexpr):
    """(units, columns) into a (COUNT, K) matrix."""
    col, in_cols = _columns(FIRST, value.shape[1], COUNT)
    tl.store(matrix + unit[:, None] + (col * K)[None, :], value, mask=in_units[:, None] & in_cols[None, :])


@triton.jit(do_not_specialize=(*_FREE, "rows_each"))
def _weight_gradient_kernel(
    partial1, partial_bias, partial2, g, x, second, scale, shift, w1, b1, w2, seed,
    rows: tl.int64, rows_each, threshold: tl.int64, factor: tl.float32, g_stride, x_stride, second_stride,
    OF_X: tl.constexpr, OF_SECOND: tl.constexpr, OF_W2: tl.constexpr,  # what to make: w1's columns of x, of second; w2
    A: tl.constexpr, B: tl.constexpr, K: tl.constexpr, OUT: tl.constexpr,
    AFFINE: tl.constexpr, BIAS1: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr,
    X0: tl.constexpr, X1: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, O0: tl.constexpr, O1: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """partial1[split] = z's gradient.T @ [x | second], partial2[split] = g.T @ hidden of the split's rows."""
    split = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * HIDDEN
    unit, in_units = _units(first, HIDDEN, K)
    if CHANNELS == 0:
        w0, w1_, v0, v1 = _w1_tiles(w1, unit, in_units, A, B, X0, X1, S0, S1)
        if OF_X or OF_SECOND:
            u0, u1 = _w2_tiles(w2, unit, in_units, K, OUT, O0, O1)
    dx0 = tl.zeros((HIDDEN, X0 if OF_X else 1), tl.float32)
    dx1 = tl.zeros((HIDDEN, X1 if X1 and OF_X else 1), tl.float32)
    ds0 = tl.zeros((HIDDEN, S0 if OF_SECOND else 1), tl.float32)
    ds1 = tl.zeros((HIDDEN, S1 if S1 and OF_SECOND else 1), tl.float32)
    do0 = tl.zeros((HIDDEN, O0 if OF_W2 else 1), tl.float32)
    do1 = tl.zeros((HIDDEN, O1 if O1 and OF_W2 else 1), tl.float32)
    bias = tl.zeros((HIDDEN,), tl.float32)
    for start in range(0, rows_each, ROWS):
        row = split * rows_each + start + tl.arange(0, ROWS)
        in_rows = row < rows
        if CHANNELS == 0 or OF_X or OF_SECOND:
            x0, x1, s0, s1 = _input_tiles(
                x, x_stride, second, second_stride, scale, shift, row, in_rows, A, B, AFFINE, X0, X1, S0, S1
            )
        if CHANNELS == 0 or OF_W2:
            g0, g1 = _two_tiles(g, g_stride, row, in_rows, OUT, O0, O1)
        if CHANNELS == 0:
            z = _z_of_tiles(w0, w1_, v0, v1, x0, x1, s0, s1, X1, S0, S1, PRECISION)
        else:
            z = tl.trans(_z_of_loops(
                x, x_stride, second, second_stride, scale, shift, w1, row, in_rows, unit, in_units,
                A, B, AFFINE, CHANNELS, PRECISION,
            ))  # fmt: skip
        z = _with_bias(z, b1, unit, in_units, True, BIAS1)
        if OF_W2:
            left = _activation(z, seed, row, first, threshold, factor, K, True, DROPOUT).to(g.dtype.element_ty)
            do0 = tl.dot(left, g0, do0, input_precision=PRECISION)
            if O1:
                do1 = tl.dot(left, g1, do1, input_precision=PRECISION)
        if OF_X or OF_SECOND:
            if CHANNELS == 0:
                grad = tl.dot(tl.trans(u0), tl.trans(g0), input_precision=PRECISION)
                if O1:
                    grad = tl.dot(tl.trans(u1), tl.trans(g1), grad, input_precision=PRECISION)
            else:
                grad = tl.trans(
                    _hidden_gradient(g, g_stride, w2, row, in_rows, unit, in_units, K, OUT, CHANNELS, PRECISION)
                )
            grad = _activation_gradient(z, grad, seed, row, first, threshold, factor, K, True, DROPOUT)
            left = grad.to(g.dtype.element_ty)
            if OF_X:
                bias += tl.sum(grad, 1)
                dx0 = tl.dot(left, x0, dx0, input_precision=PRECISION)
                if X1:
                    dx1 = tl.dot(left, x1, dx1, input_precision=PRECISION)
            if OF_SECOND:
                ds0 = tl.dot(left, s0, ds0, input_precision=PRECISION)
                if S1:
                    ds1 = tl.dot(left, s1, ds1, input_precision=PRECISION)
    at = partial1 + split * K * (A + B)
    if OF_X:
        _store(at, A + B, unit, in_units, dx0, 0, A)
        if X1:
            _store(at, A + B, unit, in_units, dx1, X0, A)
        if BIAS1:
            tl.store(partial_bias + split * K + unit, bias, mask=in_units)
    if OF_SECOND:
        _store(at + A, A + B, unit, in_units, ds0, 0, B)
        if S1:
            _store(at + A, A + B, unit, in_units, ds1, S0, B)
    if OF_W2:
        at = partial2 + split * K * OUT
        _store_transposed(at, unit, in_units, do0, 0, OUT, K)
        if O1:
            _store_transposed(at, unit, in_units, do1, O0, OUT, K)


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
        }  # fmt: skip

    def constants(self, config: MlpConfig) -> dict[str, Any]:
        (x0, x1), (s0, s1), (o0, o1) = (cover(self.sizes[name]) for name in ("a", "b", "o"))
        return {
            "A": self.sizes["a"], "B": self.sizes["b"], "K": self.sizes["k"], "OUT": self.sizes["o"],
            "AFFINE": self.scale is not None, "BIAS1": self.b1 is not None, "DROPOUT": self.threshold < 2**32,
            "ROWS": config.rows, "HIDDEN": config.hidden, "CHANNELS": config.channels, "X0": x0, "X1": x1, "S0": s0,
            "S1": s1, "O0": o0, "O1": o1, "PRECISION": input_precision(), "num_warps": config.num_warps,
            "num_stages": config.num_stages, "enable_fp_fusion": True,
        }  # fmt: skip

    def config(self, kernel: Kind) -> MlpConfig:
        warp_groups = not self.x.is_cuda or torch.cuda.get_device_capability(self.x.device)[0] in (9, 10)
        return config_for(kernel, self.x.dtype.itemsize, **self.sizes, warp_groups=warp_groups)


def _launch(kernel: Any, grid: tuple[int, ...], given: dict[str, Any], constants: dict[str, Any]) -> Launch:
    """By the names of the kernel's own arguments."""
    return Launch(kernel, grid, tuple(given[name] for name in kernel.arg_names if name in given), constants)


def forward_launch(out: Tensor, mlp: Mlp, config: MlpConfig | None = None) -> Launch:
    config = config or mlp.config("forward")
    given = {"out": out, "out_stride": out.stride(0), **mlp.pointers, **mlp.scalars}
    constants = {**mlp.constants(config), "BIAS2": mlp.b2 is not None}
    return _launch(_forward_kernel, (triton.cdiv(out.shape[0], config.rows),), given, constants)


def forward(out: Tensor, mlp: Mlp, config: MlpConfig | None = None) -> None:
    """Writes conv1x1(Dropout(GELU(conv1x1([x | second * scale + shift])))) into `out` (pixels, O)."""
    forward_launch(out, mlp, config).run(out)


def input_gradient_launch(
    gx: Tensor, gs: Tensor | None, grad: Tensor, mlp: Mlp, config: MlpConfig | None = None
) -> Launch:
    config = config or mlp.config("input")
    given = {"gx": gx, "gs": gx if gs is None else gs, "g": grad, "gx_stride": gx.stride(0),
             "gs_stride": 0 if gs is None else gs.stride(0), "g_stride": grad.stride(0), **mlp.pointers,
             **mlp.scalars}  # fmt: skip
    return _launch(_input_gradient_kernel, (triton.cdiv(grad.shape[0], config.rows),), given, mlp.constants(config))


def input_gradient(gx: Tensor, gs: Tensor | None, grad: Tensor, mlp: Mlp, config: MlpConfig | None = None) -> None:
    """Writes the gradients of x and of `second * scale + shift`, matrices like those."""
    input_gradient_launch(gx, gs, grad, mlp, config).run(grad)


class Partials(NamedTuple):
    """Sums over each split's rows, fp32: (splits, K, A + B), (splits, K) and (splits, O, K)."""

    w1: Tensor
    b1: Tensor
    w2: Tensor


def weight_gradient_launches(grad: Tensor, mlp: Mlp, config: MlpConfig | None = None) -> tuple[list[Launch], Partials]:
    """The launches that fill the partial sums: one, or one for each weight where the accumulators of both would not
    fit the registers."""
    config = config or mlp.config("weight")
    a, b, k, o = mlp.sizes.values()
    rows, blocks = grad.shape[0], triton.cdiv(k, config.hidden)
    # Deterministic: a function of the shapes. No fewer than four blocks of rows each, for the sums' sake.
    splits = max(1, min(_PROGRAMS // blocks, triton.cdiv(rows, 4 * config.rows)))
    rows_each = triton.cdiv(triton.cdiv(rows, splits), config.rows) * config.rows
    shapes = (splits, k, a + b), (splits, k), (splits, o, k)
    partials = Partials(*(grad.new_empty(shape, dtype=torch.float32) for shape in shapes))
    given = {
        "partial1": partials.w1, "partial_bias": partials.b1, "partial2": partials.w2, "g": grad,
        "rows_each": rows_each, "g_stride": grad.stride(0), **mlp.pointers, **mlp.scalars,
    }  # fmt: skip
    return [
        _launch(
            _weight_gradient_kernel,
            (blocks, splits),
            given,
            {**mlp.constants(config), "OF_X": "x" in of, "OF_SECOND": "second" in of, "OF_W2": "w2" in of},
        )
        for of in _together(b, a + b + o, config)
    ], partials


def weight_gradients(grad: Tensor, mlp: Mlp, config: MlpConfig | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of w1, b1 (meaningless without one) and w2 in fp32, summed in a fixed order."""
    launches, partials = weight_gradient_launches(grad, mlp, config)
    for launch in launches:
        launch.run(grad)
    return partials.w1.sum(0), partials.b1.sum(0), partials.w2.sum(0)
