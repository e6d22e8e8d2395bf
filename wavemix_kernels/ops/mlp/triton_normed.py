"""A small launch behind the product of a hidden layer's gradient with a normalised input. It makes the gradient of
the first weight, and the line that makes the gradient of what the BatchNorm took.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels.ops.common.triton_launch import Launch, pow2_at_least
from wavemix_kernels.ops.mlp.triton import Mlp

_UNITS, _COLUMNS = 512, 4  # of a program's tile at most: all units, whose loads are on their way at once, in fours


class Norm(NamedTuple):
    """A BatchNorm of the MLP's second input: (C) each, contiguous; mean and invstd fp32, the others of any dtype or
    None."""

    mean: Tensor
    invstd: Tensor
    weight: Tensor | None
    bias: Tensor | None


@triton.jit(do_not_specialize=("count",))
def _line_kernel(
    line, of_weight, of_bias, dw1, db1, w1, total_b1, mean, invstd, weight, bias, count: tl.int64,
    A: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, UNITS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The last B columns of dw1 (K, A + B) hold the product of the hidden layer's gradient with the normalised input;
    they become the gradient of the weight. db1 = total_b1, rounded. line (3, B) and the parameters' gradients are those
    of :func:`wavemix_kernels.ops.norm.triton_finish.line_launch`."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < B
    inverse = tl.load(invstd + column, mask=inside, other=0.0)
    centre = tl.load(mean + column, mask=inside, other=0.0)
    factor, offset = tl.zeros_like(inverse) + 1.0, tl.zeros_like(inverse)
    if WEIGHT:
        factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        offset = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    sum_g = tl.zeros((UNITS, COLUMNS), tl.float32)
    sum_gx = tl.zeros((UNITS, COLUMNS), tl.float32)
    for first in tl.static_range(0, K, UNITS):
        unit = first + tl.arange(0, UNITS)
        at = unit[:, None] * (A + B) + (A + column)[None, :]
        mask = (unit < K)[:, None] & inside[None, :]
        product = tl.load(dw1 + at, mask=mask, other=0.0).to(tl.float32)
        into = tl.load(w1 + at, mask=mask, other=0.0).to(tl.float32)
        total = tl.load(total_b1 + unit, mask=unit < K, other=0.0)
        tl.store(dw1 + at, (product * factor[None, :] + total[:, None] * offset[None, :]).to(dw1.dtype.element_ty),
                 mask=mask)  # fmt: skip
        sum_g += into * total[:, None]
        sum_gx += into * product
        if tl.program_id(0) == 0:
            tl.store(db1 + unit, total.to(db1.dtype.element_ty), mask=unit < K)
    total_g, total_gx = tl.sum(sum_g, 0), tl.sum(sum_gx, 0)
    # The norm's own line: dy = scale * (g - mean(g) - yhat * mean(g * yhat)).
    scale, each = inverse * factor, 1.0 / tl.maximum(count, 1).to(tl.float32)
    rise = -scale * inverse * total_gx * each
    tl.store(line + column, scale, mask=inside)
    tl.store(line + B + column, rise, mask=inside)
    tl.store(line + 2 * B + column, -scale * total_g * each - rise * centre, mask=inside)
    tl.store(of_weight + column, total_gx.to(of_weight.dtype.element_ty), mask=inside)
    tl.store(of_bias + column, total_g.to(of_bias.dtype.element_ty), mask=inside)


def line_launch(
    dw1: Tensor, db1: Tensor, total_b1: Tensor, mlp: Mlp, norm: Norm
) -> tuple[Launch, Tensor, Tensor]:  # fmt: skip
    """A launch and what it fills, beside dw1 and db1: (3, B), the line's a, b and d, and (2, B), the gradients of the
    norm's weight and bias, in the weight's dtype if there is one.

    Args:
        dw1: (K, A + B), contiguous, the last columns as :func:`_line_kernel` says.
        total_b1: (K), the first bias's gradient in fp32; db1: where that goes, in its dtype.
    """
    sizes = mlp.sizes
    line = total_b1.new_empty((3, sizes["b"]))
    like = norm.mean if norm.weight is None else norm.weight
    gradients = like.new_empty((2, sizes["b"]))
    weight, bias = (norm.mean if t is None else t for t in (norm.weight, norm.bias))
    args = (
        line, *gradients.unbind(0), dw1, db1, mlp.w1, total_b1, norm.mean, norm.invstd, weight, bias, mlp.x.shape[0],
    )  # fmt: skip
    constants = {
        "A": sizes["a"], "B": sizes["b"], "K": sizes["k"], "WEIGHT": norm.weight is not None,
        "BIAS": norm.bias is not None, "UNITS": min(pow2_at_least(sizes["k"]), _UNITS), "COLUMNS": _COLUMNS,
        "num_warps": 8, "enable_fp_fusion": True,
    }  # fmt: skip
    return Launch(_line_kernel, (triton.cdiv(sizes["b"], _COLUMNS),), args, constants), line, gradients


def line(dw1: Tensor, db1: Tensor, total_b1: Tensor, mlp: Mlp, norm: Norm) -> tuple[Tensor, ...]:
    """a, b, d, and the gradients of weight and bias; see :func:`line_launch`."""
    launch, made, gradients = line_launch(dw1, db1, total_b1, mlp, norm)
    launch.run(dw1)
    return *made.unbind(0), gradients
