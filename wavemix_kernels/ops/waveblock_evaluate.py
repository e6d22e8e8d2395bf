"""A Waveblock in evaluation, its BatchNorms folded into the weights before them: no gradient is kept for a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import plan
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.deconv import op as deconv
from wavemix_kernels.ops.deconv import upsample
from wavemix_kernels.ops.mlp import op as pointwise_mlp
from wavemix_kernels.ops.mlp import reference as mlp_reference
from wavemix_kernels.ops.norm import batch_norm
from wavemix_kernels.ops.reduce_haar import op as reduce_haar
from wavemix_kernels.ops.reduce_haar import reference as reduce_haar_reference


class Level(NamedTuple):
    """Weights of one feed-forward part, folded: w1 and w2 as matrices (O, I)."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    up_weight: Tensor | None
    up_bias: Tensor | None


@plan.words
class Options(NamedTuple):
    kind: str  # of upsampling
    channels_last: bool
    residual: bool
    backend: str


def evaluate(options: Options, x: Tensor, weight: Tensor, bias: Tensor | None, levels: Sequence[Level]) -> Tensor:
    """The Waveblock of checked arguments, with gradient of x if one is asked for.

    Args:
        options: the upsampling; the memory order of the output; whether x is added to it; the backend, not
            ``"reference"``.
        x: (N, C, H, W).
        weight, bias: the reduction, (C/4, C, 1, 1) and (C/4), in the dtype of x.
        levels: the finest first.
    """
    tensors = x, weight, bias, *(t for level in levels for t in level)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    run: Any = _evaluate if learns else _by_plan
    out: Tensor = run(options, *tensors)
    return out


def _evaluate(options: Options, x: Tensor, weight: Tensor, bias: Tensor | None, *flat: Any) -> Tensor:
    kind, order, residual, backend = options
    fields = len(Level._fields)
    levels = [Level(*flat[i : i + fields]) for i in range(0, len(flat), fields)]
    zs = reduce_haar.fused(x, weight, bias, len(levels), True, choose.for_part(backend, reduce_haar.BACKENDS))
    # Kernels without gradient add the residual as they store.
    has_gradient = torch.is_grad_enabled() and x.requires_grad
    part = choose.for_part(backend, deconv.BACKENDS)
    out: Tensor | None = None
    for i in range(len(levels) - 1, -1, -1):
        w1, b1, w2, b2, up_weight, up_bias = levels[i]
        mlp = choose.for_part(backend, pointwise_mlp.BACKENDS)
        u = pointwise_mlp.fused(zs[i], out, None, None, w1, b1, w2, b2, 0.0, None, mlp)
        if i == 0 and residual and order and not has_gradient and kind == "deconv":
            assert up_weight is not None
            return deconv.plus_residual(u, up_weight, up_bias, x, part)
        out = upsample.forward(kind, u, up_weight, up_bias, part)
    assert out is not None
    if has_gradient or (order and not residual):
        out = x + out if residual else out
        return out.contiguous(memory_format=torch.channels_last if order else torch.contiguous_format)
    # The pass that normalises also adds and reorders, at the speed of memory; there is nothing left to normalise.
    one = torch.ones(out.shape[1], dtype=accumulate_dtype(out.dtype), device=out.device)
    return torch.ops.wavemix_kernels.batch_norm_apply(
        out, one, torch.zeros_like(one), x if residual else None, order, choose.for_part(backend, batch_norm.BACKENDS)
    )


_by_plan = plan.planned("waveblock_evaluate", _evaluate)


def standard(options: Options, x: Tensor, weight: Tensor, bias: Tensor | None, levels: Sequence[Level]) -> Tensor:
    """:func:`evaluate` in standard operators."""
    out: Tensor | None = None
    zs = reduce_haar_reference.reduce_haar(x, weight, bias, len(levels))
    for z, (w1, b1, w2, b2, up_weight, up_bias) in zip(reversed(zs), reversed(levels), strict=True):
        u = mlp_reference.pointwise_mlp(z, w1, b1, w2, b2, second=out)
        out = upsample.standard(options.kind, u, up_weight, up_bias)
    assert out is not None
    return x + out if options.residual else out
