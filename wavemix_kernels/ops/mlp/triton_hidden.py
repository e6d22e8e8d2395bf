"""The hidden layer of a pointwise MLP and its gradient, written for products of the library.

A program holds some pixels and goes through hidden units, as in :mod:`triton_backward`, without sums of the inputs'
gradients: twice as many units at a time, and few pixels share their units among programs.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels import _native
from wavemix_kernels.ops.common.triton_launch import Launch
from wavemix_kernels.ops.mlp.tiles import MlpConfig
from wavemix_kernels.ops.mlp.triton import FREE, Mlp, launch_by_name
from wavemix_kernels.ops.mlp.triton_blocks import (
    _activation_and_gradient,
    _columns,
    _in_order,
    _key,
    _store_sum,
    _two_tiles,
    _units,
    _w1_tiles,
    _w2_tiles,
    _with_bias,
    _z_of_tiles,
)
from wavemix_kernels.ops.mlp.triton_normed import Norm


@triton.jit
def _store_units(matrix, row, in_rows, first, value, K: tl.constexpr, HIDDEN: tl.constexpr):
    """Hidden units from `first` on, in the order of their dropout."""
    col = first + tl.arange(0, HIDDEN)
    among = in_rows[:, None] if K % HIDDEN == 0 else in_rows[:, None] & (col < K)[None, :]
    tl.store(matrix + row[:, None] * K + col[None, :], _in_order(value.to(matrix.dtype.element_ty)), mask=among)


@triton.jit
def _store_part(matrix, row, in_rows, tile, FIRST: tl.constexpr, COUNT: tl.constexpr, STRIDE: tl.constexpr):
    """Columns from FIRST on, of COUNT, of a matrix whose rows are STRIDE apart."""
    col, in_cols = _columns(FIRST, tile.shape[1], COUNT)
    tl.store(matrix + row[:, None] * STRIDE + col[None, :], tile, mask=in_rows[:, None] & in_cols[None, :])


@triton.jit
def _mapped(tile, scale, shift, FIRST: tl.constexpr, COUNT: tl.constexpr, AFFINE: tl.constexpr):
    """tile * scale + shift of columns from FIRST on, of COUNT, in fp32 and rounded once."""
    if AFFINE:
        col, in_cols = _columns(FIRST, tile.shape[1], COUNT)
        factor = tl.load(scale + col, mask=in_cols, other=0.0)
        offset = tl.load(shift + col, mask=in_cols, other=0.0)
        tile = (tile.to(tl.float32) * factor[None, :] + offset[None, :]).to(tile.dtype)
    return tile


@triton.jit
def _normed(tile, mean, invstd, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """(tile - mean) * invstd of columns from FIRST on, of COUNT."""
    col, in_cols = _columns(FIRST, tile.shape[1], COUNT)
    centre = tl.load(mean + col, mask=in_cols, other=0.0)
    inverse = tl.load(invstd + col, mask=in_cols, other=0.0)
    return ((tile.to(tl.float32) - centre[None, :]) * inverse[None, :]).to(tile.dtype)


@triton.jit(do_not_specialize=(*FREE, "splits"))
def _hidden_kernel(
    hidden, hidden_grad, joined, partial_b1, partial_b2, g, x, second, scale, shift, mean, invstd, w1, b1, w2, seed,
    rows: tl.int64, splits, threshold: tl.int64, factor: tl.float32, g_stride, x_stride, second_stride,
    A: tl.constexpr, B: tl.constexpr, K: tl.constexpr, OUT: tl.constexpr,
    AFFINE: tl.constexpr, NORMED: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, HIDDEN: tl.constexpr, EACH: tl.constexpr,
    X0: tl.constexpr, X1: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, O0: tl.constexpr, O1: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program takes a block of rows and EACH hidden units. It stores the layer behind dropout, the gradient of the
    activation's input, and partial_b1[block], that gradient's sums over the rows. A block's first program also stores
    joined = [x | second * scale + shift], where there is a second, and partial_b2[block], sums of g; NORMED: with
    (second - mean) * invstd in that place."""
    block = tl.program_id(0).to(tl.int64) // splits
    split = tl.program_id(0) % splits
    row = block * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    x0, x1 = _two_tiles(x, x_stride, row, in_rows, A, X0, X1)
    s0, s1, t0, t1 = x0, x0, x0, x0
    if S0:
        t0, t1 = _two_tiles(second, second_stride, row, in_rows, B, S0, S1)
        s0 = _mapped(t0, scale, shift, 0, B, AFFINE)
    if S1:
        s1 = _mapped(t1, scale, shift, S0, B, AFFINE)
    g0, g1 = _two_tiles(g, g_stride, row, in_rows, OUT, O0, O1)
    if split == 0:
        if BIAS2:
            _store_sum(partial_b2 + block * OUT, g0, 0, OUT)
            if O1:
                _store_sum(partial_b2 + block * OUT, g1, O0, OUT)
        if B:
            _store_part(joined, row, in_rows, x0, 0, A, A + B)
            if X1:
                _store_part(joined, row, in_rows, x1, X0, A, A + B)
            if NORMED:
                _store_part(joined + A, row, in_rows, _normed(t0, mean, invstd, 0, B), 0, B, A + B)
                if S1:
                    _store_part(joined + A, row, in_rows, _normed(t1, mean, invstd, S0, B), S0, B, A + B)
            else:
                _store_part(joined + A, row, in_rows, s0, 0, B, A + B)
                if S1:
                    _store_part(joined + A, row, in_rows, s1, S0, B, A + B)
    key = _key(seed, DROPOUT)
    for start in range(0, EACH, HIDDEN):
        first = split * EACH + start
        unit, in_units = _units(first, HIDDEN, K)
        w0, w1_, v0, v1 = _w1_tiles(w1, unit, in_units, A, B, X0, X1, S0, S1)
        u0, u1 = _w2_tiles(w2, unit, in_units, K, OUT, O0, O1)
        z = _with_bias(_z_of_tiles(x0, x1, s0, s1, w0, w1_, v0, v1, X1, S0, S1, PRECISION), b1, unit, in_units, False,
                       BIAS1)  # fmt: skip
        grad = tl.dot(g0, u0, input_precision=PRECISION)
        if O1:
            grad = tl.dot(g1, u1, grad, input_precision=PRECISION)
        value, grad = _activation_and_gradient(z, grad, key, row, first, threshold, K, False, DROPOUT)
        grad *= factor
        if BIAS1:
            tl.store(partial_b1 + block * K + unit, tl.sum(grad, 0), mask=in_units)
        _store_units(hidden_grad, row, in_rows, first, grad, K, HIDDEN)
        _store_units(hidden, row, in_rows, first, value * factor, K, HIDDEN)


# --------------------------------------------------------------------------------------------------- launch


class Layer(NamedTuple):
    """The hidden layer and its gradient, matrices (pixels, K); the inputs side by side, (pixels, A + B), the second as
    the given BatchNorm, if any, leaves it before its weight and bias; and sums over blocks of rows, fp32: (blocks, K)
    of the gradient and (blocks, O) of the output's, of no elements without a bias."""

    hidden: Tensor
    grad: Tensor
    joined: Tensor
    b1: Tensor
    b2: Tensor


def launch(grad: Tensor, mlp: Mlp, config: MlpConfig | None = None, norm: Norm | None = None) -> tuple[Launch, Layer]:
    """A launch and what it fills; without a second input `joined` is x itself. `norm`: whose affine map the second
    input's is."""
    config = config or mlp.config("hidden")
    rows, k = grad.shape[0], mlp.w1.shape[0]
    blocks, chunks = triton.cdiv(rows, config.rows), triton.cdiv(k, config.hidden)
    # Few blocks of rows share their units, for one round of programs.
    most = _native.multiprocessors(grad.device) // max(blocks, 1)
    splits = max((n for n in range(1, min(chunks, most) + 1) if chunks % n == 0), default=1)
    joined = mlp.x if mlp.second is None else grad.new_empty((rows, mlp.w1.shape[1]))
    widths = 0 if mlp.b1 is None else k, 0 if mlp.b2 is None else grad.shape[1]
    sums = (grad.new_empty((blocks, width), dtype=torch.float32) for width in widths)
    layer = Layer(grad.new_empty((rows, k)), grad.new_empty((rows, k)), joined, *sums)
    given = {
        "hidden": layer.hidden, "hidden_grad": layer.grad, "joined": joined, "partial_b1": layer.b1,
        "partial_b2": layer.b2, "g": grad, "g_stride": grad.stride(0), "splits": splits,
        "mean": mlp.x if norm is None else norm.mean, "invstd": mlp.x if norm is None else norm.invstd,
        **mlp.pointers, **mlp.scalars,
    }  # fmt: skip
    constants = {
        **mlp.constants(config, "hidden"),
        "NORMED": norm is not None,
        "BIAS2": mlp.b2 is not None,
        "EACH": chunks // splits * config.hidden,
    }
    del constants["CHANNELS"]
    return launch_by_name(_hidden_kernel, (blocks * splits,), given, constants), layer


def make(grad: Tensor, mlp: Mlp, norm: Norm | None = None) -> Layer:
    """From the inputs and the output's gradient, matrices of pixels in a half type."""
    made, layer = launch(grad, mlp, norm=norm)
    made.run(grad)
    return layer
