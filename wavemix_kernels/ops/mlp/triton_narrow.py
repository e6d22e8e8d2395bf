"""All gradients of a narrow pointwise MLP in one kernel that makes the hidden layer once.

Where all hidden units and all weights fit a program's registers it goes through the pixels alone: the inputs' gradients
and, where wanted, the output are written as it goes, the weights' are summed and stored at its end. Three launches of
the general kernels would read the pixels three times and make the same activations and dropout masks each time, which
is most of a narrow layer's work.
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
from wavemix_kernels.ops.common.triton_words import multiple
from wavemix_kernels.ops.mlp.tiles import MlpConfig, together_config_for
from wavemix_kernels.ops.mlp.triton import FREE, Mlp, launch_by_name
from wavemix_kernels.ops.mlp.triton_backward import _store_transposed
from wavemix_kernels.ops.mlp.triton_blocks import (
    _activation_and_gradient,
    _columns,
    _key,
    _plus_bias,
    _store,
    _two_tiles,
    _units,
    _w2_tiles,
    _with_bias,
)


@triton.jit(do_not_specialize=(*FREE, "rows_each"))
def _backward_together_kernel(
    gx, out, partial1, partial_b1, partial2, partial_b2, g, x, w1, b1, w2, b2, seed,
    rows: tl.int64, rows_each, threshold: tl.int64, factor: tl.float32, gx_stride, out_stride, g_stride, x_stride,
    OUTPUT: tl.constexpr,  # whether the output is written too
    A: tl.constexpr, K: tl.constexpr, OUT: tl.constexpr,
    BIAS1: tl.constexpr, BIAS2: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, HIDDEN: tl.constexpr, X0: tl.constexpr, O0: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """partial1[split] = z's gradient.T @ x, partial2[split] = g.T @ hidden of the split's rows, with the
    sums of z's gradient and of g."""
    split = tl.program_id(0).to(tl.int64)
    gx_stride, out_stride, g_stride, x_stride = (
        multiple(gx_stride, UNIT), multiple(out_stride, UNIT), multiple(g_stride, UNIT), multiple(x_stride, UNIT)
    )  # fmt: skip
    real: tl.constexpr = g.dtype.element_ty
    unit, in_units = _units(0, HIDDEN, K)
    w0, _w1 = _two_tiles(w1, A, unit, in_units, A, X0, 0)
    u0, _u1 = _w2_tiles(w2, unit, in_units, K, OUT, O0, 0)
    dw0 = tl.zeros((HIDDEN, X0), tl.float32)
    du0 = tl.zeros((HIDDEN, O0), tl.float32)
    sum1 = tl.zeros((ROWS, HIDDEN), tl.float32)
    sum2 = tl.zeros((ROWS, O0), tl.float32)
    for start in range(0, rows_each, ROWS):
        row = split * rows_each + start + tl.arange(0, ROWS)
        in_rows = row < rows
        x0, _x1 = _two_tiles(x, x_stride, row, in_rows, A, X0, 0)
        g0, _g1 = _two_tiles(g, g_stride, row, in_rows, OUT, O0, 0)
        z = tl.dot(x0, tl.trans(w0), input_precision=PRECISION)
        z = _with_bias(z, b1, unit, in_units, False, BIAS1)
        grad = tl.dot(g0, u0, input_precision=PRECISION)
        key = _key(seed, DROPOUT)  # here: a load before the loop would cost its loads' overlap
        hidden, grad = _activation_and_gradient(z, grad, key, row, 0, threshold, K, False, DROPOUT)
        if BIAS1:
            sum1 += grad
        if BIAS2:
            sum2 += g0.to(tl.float32)
        left, of_z = hidden.to(real), grad.to(real)
        _store(gx, gx_stride, row, in_rows, tl.dot(of_z, w0, input_precision=PRECISION) * factor, 0, A)
        if OUTPUT:
            value = tl.dot(left, tl.trans(u0), input_precision=PRECISION) * factor
            _store(out, out_stride, row, in_rows, _plus_bias(value, b2, 0, OUT, BIAS2), 0, OUT)
        dw0 = tl.dot(tl.trans(of_z), x0, dw0, input_precision=PRECISION)
        du0 = tl.dot(tl.trans(left), g0, du0, input_precision=PRECISION)
    _store(partial1 + split * K * A, A, unit, in_units, dw0 * factor, 0, A)
    _store_transposed(partial2 + split * K * OUT, unit, in_units, du0 * factor, 0, OUT, K)
    if BIAS1:
        tl.store(partial_b1 + split * K + unit, tl.sum(sum1, 0) * factor, mask=in_units)
    if BIAS2:
        col, in_cols = _columns(0, O0, OUT)
        tl.store(partial_b2 + split * OUT + col, tl.sum(sum2, 0), mask=in_cols)


# --------------------------------------------------------------------------------------------------- launch


class Sums(NamedTuple):
    """Sums over each split's rows, fp32: (splits, K, A), (splits, K), (splits, O, K) and (splits, O)."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


def backward_launch(
    gx: Tensor, out: Tensor | None, grad: Tensor, mlp: Mlp, config: MlpConfig | None = None
) -> tuple[Launch, Sums]:
    """A launch and the sums that it fills."""
    a, _, k, o = mlp.sizes.values()
    config = config or together_config_for()
    rows = grad.shape[0]
    # Deterministic: a function of shapes and device. As many warps as a multiprocessor holds; four blocks of rows each.
    warps = 12 * _native.multiprocessors(grad.device)
    splits = max(1, min(warps // config.num_warps, triton.cdiv(rows, 4 * config.rows)))
    rows_each = triton.cdiv(triton.cdiv(rows, splits), config.rows) * config.rows
    splits = triton.cdiv(rows, rows_each) if rows_each else 1  # rounding may leave the last ones nothing
    shapes = (splits, k, a), (splits, k), (splits, o, k), (splits, o)
    sums = Sums(*(grad.new_empty(shape, dtype=torch.float32) for shape in shapes))
    given = {
        "gx": gx, "out": gx if out is None else out, "partial1": sums.w1, "partial_b1": sums.b1, "partial2": sums.w2,
        "partial_b2": sums.b2, "g": grad, "rows_each": rows_each, "gx_stride": gx.stride(0),
        "out_stride": 0 if out is None else out.stride(0), "g_stride": grad.stride(0), **mlp.pointers, **mlp.scalars,
    }  # fmt: skip
    constants = mlp.constants(config, "together")
    constants |= {"OUTPUT": out is not None, "BIAS2": mlp.b2 is not None, "UNIT": mlp.unit(gx, out, grad)}
    for name in ("CHANNELS", "B", "AFFINE", "X1", "S0", "S1", "O1"):
        del constants[name]
    return launch_by_name(_backward_together_kernel, (splits,), given, constants), sums


def backward(gx: Tensor, out: Tensor | None, grad: Tensor, mlp: Mlp) -> Sums:
    """Writes the gradient of x, a matrix like it, and where wanted the output into `out`."""
    launch, sums = backward_launch(gx, out, grad, mlp)
    launch.run(grad)
    return sums
