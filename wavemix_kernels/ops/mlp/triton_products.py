"""The MLP with its products made by the library, and the kernel between them.

Where a program cannot hold its pixels' columns and their sums together, or hidden units for all weights' gradients,
writing the hidden layer costs less than making it again (:func:`wavemix_kernels.ops.choose.pointwise_mlp`).
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels import _native
from wavemix_kernels.ops.common.triton_gelu import gelu
from wavemix_kernels.ops.common.triton_launch import Launch
from wavemix_kernels.ops.mlp.triton import FREE, Mlp, launch_by_name
from wavemix_kernels.ops.mlp.triton_blocks import _key
from wavemix_kernels.ops.mlp.triton_philox import keep_mask

_ROWS, _COLUMNS, _WARPS = 32, 64, 4  # of a tile: two or four loads of 16 bytes for a thread
_BLOCKS = 8  # of a multiprocessor


@triton.jit(do_not_specialize=(*FREE, "rows_each"))
def _between_kernel(
    hidden, grad, partial, seed, rows: tl.int64, rows_each, threshold: tl.int64, factor: tl.float32,
    K: tl.constexpr, BACKWARD: tl.constexpr, BIAS1: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """In place: hidden = Dropout(GELU(hidden)) and, BACKWARD, grad = its gradient by what it was; partial[split] = sums
    of the latter over the split's rows."""
    split, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * COLUMNS
    col = first + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    key = _key(seed, DROPOUT)
    for start in range(0, rows_each, ROWS):
        row = split * rows_each + start + tl.arange(0, ROWS)
        at = row[:, None] * K + col[None, :]
        among = (row < rows)[:, None] & (col < K)[None, :]
        value, slope = gelu(tl.load(hidden + at, mask=among, other=0.0).to(tl.float32))
        value *= factor
        if BACKWARD:
            slope *= tl.load(grad + at, mask=among, other=0.0).to(tl.float32) * factor
        if DROPOUT:
            keep = keep_mask(key, row, first, K, threshold, COLUMNS, False)
            value, slope = tl.where(keep, value, 0.0), tl.where(keep, slope, 0.0)
        tl.store(hidden + at, value.to(hidden.dtype.element_ty), mask=among)
        if BACKWARD:
            tl.store(grad + at, slope.to(grad.dtype.element_ty), mask=among)
            if BIAS1:
                total += tl.where(among, slope, 0.0)
    if BACKWARD and BIAS1:
        tl.store(partial + split * K + col, tl.sum(total, 0), mask=col < K)


@triton.jit(do_not_specialize=("rows",))
def _affine_kernel(
    out, second, scale, shift, rows: tl.int64, second_stride, B: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """out = second * scale + shift."""
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    among = (row < rows)[:, None] & (col < B)[None, :]
    value = tl.load(second + row[:, None] * second_stride + col[None, :], mask=among, other=0.0).to(tl.float32)
    factor = tl.load(scale + col, mask=col < B, other=0.0)
    offset = tl.load(shift + col, mask=col < B, other=0.0)
    value = value * factor[None, :] + offset[None, :]
    tl.store(out + row[:, None] * B + col[None, :], value.to(out.dtype.element_ty), mask=among)


def between_launch(hidden: Tensor, grad: Tensor | None, mlp: Mlp) -> tuple[Launch, Tensor]:
    """A launch on what precedes the activation and, backward, on the gradient of what follows it; and its fp32 sums
    (splits, K) of the bias's gradient, of no elements forward and where there is no bias."""
    rows, k = hidden.shape
    columns = triton.cdiv(k, _COLUMNS)
    splits = max(1, min(_BLOCKS * _native.multiprocessors(hidden.device) // columns, triton.cdiv(rows, _ROWS)))
    rows_each = triton.cdiv(triton.cdiv(rows, splits), _ROWS) * _ROWS
    summed = grad is not None and mlp.b1 is not None
    partial = hidden.new_empty((splits, k if summed else 0), dtype=torch.float32)
    given = {
        "hidden": hidden, "grad": hidden if grad is None else grad, "partial": partial, "seed": mlp.pointers["seed"],
        **mlp.scalars, "rows_each": rows_each,
    }  # fmt: skip
    constants = {
        "K": k, "BACKWARD": grad is not None, "BIAS1": mlp.b1 is not None, "DROPOUT": mlp.drops, "ROWS": _ROWS,
        "COLUMNS": _COLUMNS, "num_warps": _WARPS, "enable_fp_fusion": True,
    }  # fmt: skip
    return launch_by_name(_between_kernel, (columns, splits), given, constants), partial


def affine_launch(out: Tensor, mlp: Mlp) -> Launch:
    rows, b = out.shape
    grid = triton.cdiv(b, _COLUMNS), triton.cdiv(rows, _ROWS)
    given = {"out": out, **mlp.pointers, **mlp.scalars}
    constants = {"B": b, "ROWS": _ROWS, "COLUMNS": _COLUMNS, "num_warps": _WARPS, "enable_fp_fusion": True}
    return launch_by_name(_affine_kernel, grid, given, constants)


def joined(mlp: Mlp) -> Tensor | None:
    """`second * scale + shift` as a matrix, rounded as a tensor core wants its operand."""
    if mlp.second is None or mlp.scale is None:
        return mlp.second
    out = mlp.second.new_empty(mlp.second.shape)
    affine_launch(out, mlp).run(out)
    return out


def before_activation(mlp: Mlp, second: Tensor | None) -> Tensor:
    """(pixels, K); `second` is what :func:`joined` makes."""
    a = mlp.x.shape[1]
    of_x = mlp.w1[:, :a].t()
    z = torch.mm(mlp.x, of_x) if mlp.b1 is None else torch.addmm(mlp.b1, mlp.x, of_x)
    return z if second is None else z.addmm_(second, mlp.w1[:, a:].t())


def after_activation(out: Tensor, hidden: Tensor, mlp: Mlp) -> None:
    """Writes conv1x1(hidden) into `out` (pixels, O)."""
    if mlp.b2 is None:
        torch.mm(hidden, mlp.w2.t(), out=out)
    else:
        torch.addmm(mlp.b2, hidden, mlp.w2.t(), out=out)


def forward(out: Tensor, mlp: Mlp) -> None:
    """Writes the output into `out` (pixels, O)."""
    hidden = before_activation(mlp, joined(mlp))
    between_launch(hidden, None, mlp)[0].run(hidden)
    after_activation(out, hidden, mlp)


def backward_weight(
    dw1: Tensor, dw2: Tensor, grad: Tensor, hidden: Tensor, hidden_grad: Tensor, inputs: Sequence[Tensor]
) -> None:
    """Writes the gradients of both weights; `inputs`: matrices that are the first product's columns side by side."""
    first = 0
    for part in inputs:
        torch.mm(hidden_grad.t(), part, out=dw1[:, first : first + part.shape[1]])
        first += part.shape[1]
    torch.mm(grad.t(), hidden, out=dw2)


def backward_x(gx: Tensor, gs: Tensor | None, hidden_grad: Tensor, mlp: Mlp) -> None:
    """Writes the gradients of x and of `second * scale + shift`; side by side into `gx`, where there is no `gs`."""
    width = gx.shape[1]
    torch.mm(hidden_grad, mlp.w1[:, :width], out=gx)
    if gs is not None:
        torch.mm(hidden_grad, mlp.w1[:, width:], out=gs)
