"""The gradients of a pointwise MLP, in two kernels that make the hidden layer again.

The first holds some pixels and goes through the hidden units: the gradients of the inputs, and sums of the output's
gradient. The second holds some hidden units and goes through the pixels: the gradients of all weights, as partial sums
of fixed runs of pixels that are added in a fixed order.
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
from wavemix_kernels.ops.mlp.tiles import MlpConfig, weights_together
from wavemix_kernels.ops.mlp.triton import FREE, Mlp, launch_by_name
from wavemix_kernels.ops.mlp.triton_blocks import (
    _activation_and_gradient,
    _columns,
    _hidden_gradient,
    _input_tiles,
    _key,
    _store,
    _store_sum,
    _tile,
    _two_tiles,
    _units,
    _w1_tiles,
    _w2_tiles,
    _with_bias,
    _z_of_loops,
    _z_of_tiles,
)


@triton.jit(do_not_specialize=FREE)
def _backward_x_kernel(
    gx, gs, partial_b2, g, x, second, scale, shift, w1, b1, w2, seed,
    rows: tl.int64, threshold: tl.int64, factor: tl.float32, gx_stride, gs_stride, g_stride, x_stride, second_stride,
    A: tl.constexpr, B: tl.constexpr, K: tl.constexpr, OUT: tl.constexpr,
    AFFINE: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr,
    X0: tl.constexpr, X1: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, O0: tl.constexpr, O1: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of x and second; partial_b2[program] = the sums over the program's rows of g."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    at_b2 = partial_b2 + tl.program_id(0).to(tl.int64) * OUT
    if CHANNELS == 0:
        x0, x1, s0, s1 = _input_tiles(
            x, x_stride, second, second_stride, scale, shift, row, in_rows, A, B, AFFINE, X0, X1, S0, S1
        )
        g0, g1 = _two_tiles(g, g_stride, row, in_rows, OUT, O0, O1)
        if BIAS2:
            _store_sum(at_b2, g0, 0, OUT)
            if O1:
                _store_sum(at_b2, g1, O0, OUT)
    elif BIAS2:
        for c in range(0, OUT, CHANNELS):
            col = c + tl.arange(0, CHANNELS)
            tile = _tile(g, g_stride, row, in_rows, col, col < OUT)
            tl.store(at_b2 + col, tl.sum(tile.to(tl.float32), 0), mask=col < OUT)
    key = _key(seed, DROPOUT)
    dx0 = tl.zeros((ROWS, X0), tl.float32)
    dx1 = tl.zeros((ROWS, X1 if X1 else 1), tl.float32)
    ds0 = tl.zeros((ROWS, S0 if S0 else 1), tl.float32)
    ds1 = tl.zeros((ROWS, S1 if S1 else 1), tl.float32)
    for first in range(0, K, HIDDEN):
        unit, in_units = _units(first, HIDDEN, K)
        w0, w1_, v0, v1 = _w1_tiles(w1, unit, in_units, A, B, X0, X1, S0, S1)
        if CHANNELS == 0:
            u0, u1 = _w2_tiles(w2, unit, in_units, K, OUT, O0, O1)
            z = _z_of_tiles(x0, x1, s0, s1, w0, w1_, v0, v1, X1, S0, S1, PRECISION)
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
        _, grad = _activation_and_gradient(z, grad, key, row, first, threshold, K, False, DROPOUT)
        grad = grad.to(gx.dtype.element_ty)
        dx0 = tl.dot(grad, w0, dx0, input_precision=PRECISION)
        if X1:
            dx1 = tl.dot(grad, w1_, dx1, input_precision=PRECISION)
        if S0:
            ds0 = tl.dot(grad, v0, ds0, input_precision=PRECISION)
        if S1:
            ds1 = tl.dot(grad, v1, ds1, input_precision=PRECISION)
    _store(gx, gx_stride, row, in_rows, dx0 * factor, 0, A)
    if X1:
        _store(gx, gx_stride, row, in_rows, dx1 * factor, X0, A)
    if S0:
        _store(gs, gs_stride, row, in_rows, ds0 * factor, 0, B)
    if S1:
        _store(gs, gs_stride, row, in_rows, ds1 * factor, S0, B)


@triton.jit
def _store_transposed(matrix, unit, in_units, value, FIRST: tl.constexpr, COUNT: tl.constexpr, K: tl.constexpr):
    """(units, columns) into a (COUNT, K) matrix."""
    col, in_cols = _columns(FIRST, value.shape[1], COUNT)
    tl.store(matrix + unit[:, None] + (col * K)[None, :], value, mask=in_units[:, None] & in_cols[None, :])


@triton.jit(do_not_specialize=(*FREE, "rows_each"))
def _backward_weight_kernel(
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
    key = _key(seed, DROPOUT)
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
        grad = z
        if OF_X or OF_SECOND:
            if CHANNELS == 0:
                grad = tl.dot(tl.trans(u0), tl.trans(g0), input_precision=PRECISION)
                if O1:
                    grad = tl.dot(tl.trans(u1), tl.trans(g1), grad, input_precision=PRECISION)
            else:
                grad = tl.trans(
                    _hidden_gradient(g, g_stride, w2, row, in_rows, unit, in_units, K, OUT, CHANNELS, PRECISION)
                )
        hidden, grad = _activation_and_gradient(z, grad, key, row, first, threshold, K, True, DROPOUT)
        if OF_W2:
            left = hidden.to(g.dtype.element_ty)
            do0 = tl.dot(left, g0, do0, input_precision=PRECISION)
            if O1:
                do1 = tl.dot(left, g1, do1, input_precision=PRECISION)
        if OF_X or OF_SECOND:
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
        _store(at, A + B, unit, in_units, dx0 * factor, 0, A)
        if X1:
            _store(at, A + B, unit, in_units, dx1 * factor, X0, A)
        if BIAS1:
            tl.store(partial_bias + split * K + unit, bias * factor, mask=in_units)
    if OF_SECOND:
        _store(at + A, A + B, unit, in_units, ds0 * factor, 0, B)
        if S1:
            _store(at + A, A + B, unit, in_units, ds1 * factor, S0, B)
    if OF_W2:
        at = partial2 + split * K * OUT
        _store_transposed(at, unit, in_units, do0 * factor, 0, OUT, K)
        if O1:
            _store_transposed(at, unit, in_units, do1 * factor, O0, OUT, K)


# --------------------------------------------------------------------------------------------------- launch


def backward_x_launch(
    gx: Tensor, gs: Tensor | None, grad: Tensor, mlp: Mlp, config: MlpConfig | None = None
) -> tuple[Launch, Tensor]:
    """A launch and the sums of the output's gradient over runs of rows that it fills, fp32: (programs, O), or of no
    elements without a bias."""
    config = config or mlp.config("input")
    programs = triton.cdiv(grad.shape[0], config.rows)
    sums = grad.new_empty((programs, 0 if mlp.b2 is None else grad.shape[1]), dtype=torch.float32)
    given = {
        "gx": gx, "gs": gx if gs is None else gs, "partial_b2": sums, "g": grad, "gx_stride": gx.stride(0),
        "gs_stride": 0 if gs is None else gs.stride(0), "g_stride": grad.stride(0), **mlp.pointers, **mlp.scalars,
    }  # fmt: skip
    constants = {**mlp.constants(config, "input"), "BIAS2": mlp.b2 is not None}
    return launch_by_name(_backward_x_kernel, (programs,), given, constants), sums


def backward_x(gx: Tensor, gs: Tensor | None, grad: Tensor, mlp: Mlp) -> Tensor:
    """Writes the gradients of x and of `second * scale + shift`, matrices like those; the sums of the launch."""
    launch, sums = backward_x_launch(gx, gs, grad, mlp)
    launch.run(grad)
    return sums


class Partials(NamedTuple):
    """Sums over each split's rows, fp32: (splits, K, A + B), (splits, K) and (splits, O, K)."""

    w1: Tensor
    b1: Tensor
    w2: Tensor


def backward_weight_launches(grad: Tensor, mlp: Mlp, config: MlpConfig | None = None) -> tuple[list[Launch], Partials]:
    """The launches that fill the partial sums: one, or one for each weight where the accumulators of both would not
    fit the registers."""
    config = config or mlp.config("weight")
    a, b, k, o = mlp.sizes.values()
    rows, blocks = grad.shape[0], triton.cdiv(k, config.hidden)
    # Deterministic: a function of shapes and device. Eight warps to a multiprocessor; for the sums' sake at least four
    # blocks of rows each.
    warps = 8 * _native.multiprocessors(grad.device)
    splits = max(1, min(warps // config.num_warps // blocks, triton.cdiv(rows, 4 * config.rows)))
    rows_each = triton.cdiv(triton.cdiv(rows, splits), config.rows) * config.rows
    shapes = (splits, k, a + b), (splits, k), (splits, o, k)
    partials = Partials(*(grad.new_empty(shape, dtype=torch.float32) for shape in shapes))
    given = {
        "partial1": partials.w1, "partial_bias": partials.b1, "partial2": partials.w2, "g": grad,
        "rows_each": rows_each, "g_stride": grad.stride(0), **mlp.pointers, **mlp.scalars,
    }  # fmt: skip
    return [
        launch_by_name(
            _backward_weight_kernel,
            (blocks, splits),
            given,
            {**mlp.constants(config, "weight"), "OF_X": "x" in of, "OF_SECOND": "second" in of, "OF_W2": "w2" in of},
        )
        for of in weights_together(grad.dtype.itemsize, a, b, o, config)
    ], partials


def backward_weight(grad: Tensor, mlp: Mlp) -> Partials:
    """Partial sums of the gradients of w1, b1 (meaningless without one) and w2."""
    launches, partials = backward_weight_launches(grad, mlp)
    for launch in launches:
        launch.run(grad)
    return partials
