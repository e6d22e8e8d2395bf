"""``waveblock``: a whole Waveblock as one differentiable function that saves what recomputing would cost too much.

Upstream's autograd keeps every intermediate (four x-sizes at level 1). Here ``recompute="mlp"`` keeps x and the output
of each upsampling; the reduction, the pyramid and the MLPs (a tenth of the arithmetic) are made again.
``recompute="all"`` keeps x alone. No dropout mask is ever kept: it follows from a seed.

At level 1 the reduction and the MLP could be one kernel; by count it would save too little to be done
(docs/develop/tuning.md, one kernel for the reduction and the MLP).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import layout, plan
from wavemix_kernels.ops.common.autograd import again
from wavemix_kernels.ops.deconv import op as deconv
from wavemix_kernels.ops.deconv import upsample
from wavemix_kernels.ops.mlp import op as pointwise_mlp
from wavemix_kernels.ops.norm import batch_norm
from wavemix_kernels.ops.reduce_haar import op as reduce_haar

RECOMPUTE = ("mlp", "all")


class Level(NamedTuple):
    """Tensors of one feed-forward part; ``mean`` and ``invstd`` None: the batch's own statistics."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    up_weight: Tensor | None
    up_bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    mean: Tensor | None
    invstd: Tensor | None


_FIELDS = len(Level._fields)


class _Parts(NamedTuple):
    """The backend of each op of the block."""

    reduce: str
    mlp: str
    upsample: str
    norm: str

    @classmethod
    def of(cls, backend: str) -> _Parts:
        ops = (reduce_haar, pointwise_mlp, deconv, batch_norm)
        return cls(*(choose.for_part(backend, table) for table in (op.BACKENDS for op in ops)))


def waveblock(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    levels: Sequence[Level],
    *,
    dropout: Sequence[float],
    eps: Sequence[float],
    seeds: Tensor | None,
    kind: str,
    recompute: str,
    residual: bool,
    backend: str,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The Waveblock of checked arguments: output, and per level the (mean, biased variance) of its batch.

    Args:
        x: (N, C, H, W); the output takes its memory format.
        weight, bias: the reduction, (C/4, C, 1, 1) and (C/4).
        levels: one :class:`Level` per DWT level, the finest first; weights in x's dtype.
        dropout, eps: per level.
        seeds: (levels) int64, where any dropout is above 0.
        kind: the upsampling (:mod:`wavemix_kernels.ops.deconv.upsample`).
        recompute: ``"mlp"`` or ``"all"``.
        residual: add x to the output, in the pass that normalises.
    """
    flat = [t for level in levels for t in level]
    out, *stats = _Waveblock.apply(
        len(levels), tuple(dropout), tuple(eps), kind, recompute, residual, backend, x, weight, bias, seeds, *flat
    )
    return out, list(zip(stats[::2], stats[1::2], strict=True))


def _levels(flat: Sequence[Any]) -> list[Level]:
    return [Level(*flat[i : i + _FIELDS]) for i in range(0, len(flat), _FIELDS)]


def _seed(seeds: Tensor | None, level: int) -> Tensor | None:
    return None if seeds is None else seeds[level : level + 1]


def _mlp_arguments(
    level: Level,
    z: Tensor,
    second: Tensor | None,
    second_affine: batch_norm.Affine | None,
    p: float,
    seed: Tensor | None,
) -> tuple[Any, ...]:
    scale, shift = second_affine or (None, None)
    return z, second, scale, shift, level.w1, level.b1, level.w2, level.b2, p, seed


@plan.function
class _Waveblock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, count: int, dropout: tuple[float, ...], eps: tuple[float, ...], kind: str, recompute: str,
        residual: bool, backend: str, x: Tensor, weight: Tensor, bias: Tensor | None, seeds: Tensor | None,
        *flat: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        levels, part = _levels(flat), _Parts.of(backend)
        zs = reduce_haar.fused(x, weight, bias, count, True, part.reduce)
        # Lists are rebound, never written to (torch.compile traces this), and what is done with is dropped at once.
        ys: list[Tensor] = []
        stats: list[tuple[Tensor, Tensor, Tensor]] = []
        second, second_affine = None, None
        for i in range(count - 1, -1, -1):
            level, z = levels[i], zs[-1]
            zs = zs[:-1]
            u = pointwise_mlp.fused(
                *_mlp_arguments(level, z, second, second_affine, dropout[i], _seed(seeds, i)), part.mlp
            )
            frozen = level.mean is not None and level.invstd is not None
            if kind == "deconv" and not frozen:
                assert level.up_weight is not None
                second, mean, var = deconv.with_stats(u, level.up_weight, level.up_bias, part.upsample)
            else:
                second = upsample.forward(kind, u, level.up_weight, level.up_bias, part.upsample)
            ys = [second, *ys]
            del z, u
            if frozen:
                mean, invstd = cast(Tensor, level.mean), cast(Tensor, level.invstd)
                var = mean
            else:
                if kind != "deconv":
                    mean, var = torch.ops.wavemix_kernels.batch_norm_stats(second, part.norm)
                invstd = torch.rsqrt(var + eps[i])
            stats = [(mean, var, invstd), *stats]
            second_affine = batch_norm.affine(mean, invstd, level.bn_weight, level.bn_bias)
        assert second_affine is not None
        out = torch.ops.wavemix_kernels.batch_norm_apply(
            ys[0],
            second_affine.scale,
            second_affine.shift,
            x if residual else None,
            layout.is_channels_last(x),
            part.norm,
        )
        ctx.options = count, dropout, kind, recompute, residual, backend
        ctx.save_for_backward(
            x,
            weight,
            bias,
            seeds,
            *flat,
            *(ys if recompute == "mlp" else []),
            *(s[0] for s in stats),
            *(s[2] for s in stats),
        )
        batch = [t.detach().clone() if levels[i].mean is not None else t for i, s in enumerate(stats) for t in s[:2]]
        ctx.mark_non_differentiable(*batch)
        return (out, *batch)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
        count, dropout, kind, recompute, residual, backend = ctx.options
        x, weight, bias, seeds, *rest = ctx.saved_tensors
        flat, rest = rest[: count * _FIELDS], rest[count * _FIELDS :]
        levels, part = _levels(flat), _Parts.of(backend)
        means, invstds = rest[-2 * count : -count], rest[-count:]
        affines = [
            batch_norm.affine(m, s, level.bn_weight, level.bn_bias)
            for m, s, level in zip(means, invstds, levels, strict=True)
        ]
        zs = reduce_haar.fused(again(x), weight, bias, count, True, part.reduce)
        us: list[Tensor] = []
        if recompute == "mlp":
            ys = list(rest[:count])
        else:
            ys = []
            for i in range(count - 1, -1, -1):
                second, second_affine = (ys[0], affines[i + 1]) if ys else (None, None)
                arguments = _mlp_arguments(levels[i], zs[i], second, second_affine, dropout[i], _seed(seeds, i))
                us = [pointwise_mlp.fused(*arguments, part.mlp), *us]
                ys = [upsample.forward(kind, us[0], levels[i].up_weight, levels[i].up_bias, part.upsample), *ys]

        flat_grads: list[Any] = []
        z_grads: list[Tensor] = []
        upper: Tensor | None = grad
        for i, level in enumerate(levels):
            assert upper is not None
            z, y, zs, ys = zs[0], ys[0], zs[1:], ys[1:]
            batch_stats = level.mean is None
            second, second_affine = (ys[0], affines[i + 1]) if ys else (None, None)
            arguments = _mlp_arguments(level, z, second, second_affine, dropout[i], _seed(seeds, i))
            u, us = us[0] if us else None, us[1:]
            dweight: Tensor | None
            if kind == "deconv" and deconv.folds(part.upsample, cast(Tensor, level.up_weight).shape[0], upper):
                # u made again first, a twentieth of the level's arithmetic, lets one pass over upper and y make both
                # gradients.
                u = pointwise_mlp.fused(*arguments, part.mlp) if u is None else u
                du, dweight, dbn_weight, dbn_bias = deconv.norm_backward(
                    upper, y, means[i], invstds[i], level.bn_weight, batch_stats, u, cast(Tensor, level.up_weight),
                    part.upsample,
                )  # fmt: skip
                del u, y
                mlp = pointwise_mlp.backward(du, *arguments, False, part.mlp)
            else:
                dy, dbn_weight, dbn_bias = batch_norm.backward(
                    upper, y, means[i], invstds[i], level.bn_weight, batch_stats, True, part.norm
                )
                del y
                du = upsample.backward_x(kind, dy, level.up_weight, part.upsample)
                mlp = pointwise_mlp.backward(du, *arguments, u is None, part.mlp)
                dweight = upsample.backward_weight(
                    kind, dy, cast(Tensor, mlp.output if u is None else u), level.up_weight, part.upsample
                )
                del dy, u
            # A batch's mean takes the bias before it away; given statistics pass BatchNorm's gradient on.
            dbias = None
            if level.up_bias is not None:
                dbias = dbn_bias.new_zeros(dbn_bias.shape) if batch_stats else dbn_bias * affines[i].scale
                dbias = dbias.to(level.up_bias.dtype)
            del du, arguments
            z_grads = [*z_grads, mlp.x]
            upper = mlp.second
            flat_grads = [
                *flat_grads,
                mlp.w1, mlp.b1, mlp.w2, mlp.b2, dweight, dbias,
                None if level.bn_weight is None else dbn_weight.to(level.bn_weight.dtype),
                None if level.bn_bias is None else dbn_bias.to(level.bn_bias.dtype),
                None, None,
            ]  # fmt: skip
        dx, dw, db = reduce_haar.backward(z_grads, x, weight, bias is not None, grad if residual else None, part.reduce)
        dw = layout.like_weight(dw, weight)
        return (None, None, None, None, None, None, None, dx, dw, db, None, *flat_grads)
