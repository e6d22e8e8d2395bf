"""``waveblock``: a whole Waveblock as one differentiable function that saves what recomputing would cost too much.

Upstream's autograd keeps every intermediate (four x-sizes at level 1). Here ``recompute="mlp"`` keeps x and the output
of each upsampling; the reduction, the pyramid and the MLPs (a tenth of the arithmetic) are made again.
``recompute="hidden"`` keeps the pyramid and what the MLPs give too, a third of x's size each at most, and makes the
hidden layers alone again; ``"all"`` keeps x alone. No dropout mask is ever kept: it follows from a seed.

At level 1 the reduction and the MLP could be one kernel; by count it would save too little to be done
(docs/develop/tuning.md, one kernel for the reduction and the MLP).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import flops, layout, plan
from wavemix_kernels.ops.common.autograd import again
from wavemix_kernels.ops.common.once import once_differentiable
from wavemix_kernels.ops.deconv import op as deconv
from wavemix_kernels.ops.deconv import upsample
from wavemix_kernels.ops.mlp import op as pointwise_mlp
from wavemix_kernels.ops.norm import batch_norm
from wavemix_kernels.ops.reduce_haar import op as reduce_haar

RECOMPUTE = ("auto", "hidden", "mlp", "all")


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
_STATISTICS = len(batch_norm.Statistics._fields)


class _Options(NamedTuple):
    levels: int
    dropout: tuple[float, ...]
    eps: tuple[float, ...]
    kind: str
    residual: bool
    backend: str
    recompute: str


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
        levels: one :class:`Level` per DWT level, the finest first; weights in x's dtype, w1 and w2 as the 1x1
            convolutions have them, (O, I, 1, 1).
        dropout, eps: per level.
        seeds: (levels) int64, where any dropout is above 0.
        kind: the upsampling (:mod:`wavemix_kernels.ops.deconv.upsample`).
        recompute: one of :data:`RECOMPUTE`; ``"auto"`` as :func:`wavemix_kernels.ops.choose.waveblock_recompute` says.
        residual: add x to the output, in the pass that normalises.
    """
    flat = [t for level in levels for t in level]
    if recompute == "auto":
        recompute = choose.waveblock_recompute(x.device.type)
    options = _Options(len(levels), tuple(dropout), tuple(eps), kind, residual, backend, recompute)
    out, *stats = _Waveblock.apply(options, x, weight, bias, seeds, *flat)
    return out, list(zip(stats[::2], stats[1::2], strict=True))


def _levels(flat: Sequence[Any]) -> list[Level]:
    """The levels, w1 and w2 as matrices (O, I)."""
    levels = [Level(*flat[i : i + _FIELDS]) for i in range(0, len(flat), _FIELDS)]
    return [level._replace(w1=level.w1.flatten(1), w2=level.w2.flatten(1)) for level in levels]


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


def _gradient(of_matrix: Tensor, weight: Tensor) -> Tensor:
    return layout.like_weight(of_matrix.reshape(weight.shape), weight)


def _affine(of: batch_norm.Statistics) -> batch_norm.Affine:
    return batch_norm.Affine(of.scale, of.shift)


def _forward(
    options: _Options, x: Tensor, weight: Tensor, bias: Tensor | None, seeds: Tensor | None, *flat: Tensor | None
) -> list[Tensor]:
    """The output, what each level's upsampling gave, the pyramid and what upsamplings with weights took, where these
    are kept, and each level's :class:`batch_norm.Statistics`."""
    count, dropout, eps, kind, residual, backend, recompute = options
    levels, part = _levels(flat), _Parts.of(backend)
    zs = reduce_haar.fused(x, weight, bias, count, True, part.reduce)
    kept = [*zs] if recompute == "hidden" else []
    # Lists are rebound, never written to (torch.compile traces this), and what is done with is dropped at once.
    ys: list[Tensor] = []
    us: list[Tensor] = []
    stats: list[batch_norm.Statistics] = []
    second, second_affine = None, None
    for i in range(count - 1, -1, -1):
        level, z = levels[i], zs[-1]
        zs = zs[:-1]
        u = pointwise_mlp.fused(*_mlp_arguments(level, z, second, second_affine, dropout[i], _seed(seeds, i)), part.mlp)
        norm = level.bn_weight, level.bn_bias
        if level.mean is not None and level.invstd is not None:
            second = upsample.forward(kind, u, level.up_weight, level.up_bias, part.upsample)
            affine = batch_norm.affine(level.mean, level.invstd, *norm)
            of = batch_norm.Statistics(level.mean, level.mean, level.invstd, *affine)
        elif kind == "deconv":
            assert level.up_weight is not None
            second, of = deconv.with_stats(u, level.up_weight, level.up_bias, *norm, eps[i], part.upsample)
        else:
            second = upsample.forward(kind, u, level.up_weight, level.up_bias, part.upsample)
            of = batch_norm.stats(second, *norm, eps[i], part.norm)
        ys = [second, *ys]
        us = [u, *us] if kept and level.up_weight is not None else us
        del z, u
        stats = [of, *stats]
        second_affine = _affine(of)
    assert second_affine is not None
    out = torch.ops.wavemix_kernels.batch_norm_apply(
        ys[0],
        *second_affine,
        x if residual else None,
        layout.is_channels_last(x),
        part.norm,
    )
    return [out, *ys, *kept, *us, *(t for of in stats for t in of)]


def _backward(
    options: _Options, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, seeds: Tensor | None,
    *rest: Any,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the tensors that :func:`_forward` takes. ``rest``: ``flat``, what was kept of that function's
    results, and the statistics."""
    count, dropout, _, kind, residual, backend, _ = options
    flat, rest, of = rest[: count * _FIELDS], rest[count * _FIELDS : -count * _STATISTICS], rest[-count * _STATISTICS :]
    ys, zs, us = list(rest[:count]), list(rest[count : 2 * count]), list(rest[2 * count :])
    levels, part = _levels(flat), _Parts.of(backend)
    norms = [batch_norm.Statistics(*of[i : i + _STATISTICS]) for i in range(0, len(of), _STATISTICS)]
    before = flops.counted()
    zs = zs or reduce_haar.fused(again(x), weight, bias, count, True, part.reduce)
    if not ys:
        for i in range(count - 1, -1, -1):
            second, second_affine = (ys[0], _affine(norms[i + 1])) if ys else (None, None)
            arguments = _mlp_arguments(levels[i], zs[i], second, second_affine, dropout[i], _seed(seeds, i))
            us = [pointwise_mlp.fused(*arguments, part.mlp), *us]
            ys = [upsample.forward(kind, us[0], levels[i].up_weight, levels[i].up_bias, part.upsample), *ys]
    flops.forget_since(before)

    # A batch's mean takes the bias before it away; given statistics pass BatchNorm's gradient on.
    taken = [level.up_bias for level in levels if level.mean is None and level.up_bias is not None]
    sizes = [t.numel() for t in taken]
    zeros = list(taken[0].new_zeros(sum(sizes)).split(sizes)) if taken else []
    flat_grads: list[Any] = []
    z_grads: list[Tensor] = []
    upper: Tensor | None = grad
    for i, level in enumerate(levels):
        assert upper is not None
        z, y, zs, ys = zs[0], ys[0], zs[1:], ys[1:]
        batch_stats, norm = level.mean is None, norms[i]
        second, second_affine = (ys[0], _affine(norms[i + 1])) if ys else (None, None)
        arguments = _mlp_arguments(level, z, second, second_affine, dropout[i], _seed(seeds, i))
        u, us = us[0] if us else None, us[1:]
        dweight: Tensor | None
        if kind == "deconv" and deconv.folds(part.upsample, cast(Tensor, level.up_weight).shape[0], upper):
            # u made again first, a twentieth of the level's arithmetic, lets one pass over upper and y make both
            # gradients.
            before = flops.counted()
            u = pointwise_mlp.fused(*arguments, part.mlp) if u is None else u
            flops.forget_since(before)
            du, dweight, dbn_weight, dbn_bias = deconv.norm_backward(
                upper, y, norm.mean, norm.invstd, level.bn_weight, batch_stats, u, cast(Tensor, level.up_weight),
                part.upsample,
            )  # fmt: skip
            del u, y
            mlp = pointwise_mlp.backward(du, *arguments, False, part.mlp)
        else:
            dy, dbn_weight, dbn_bias = batch_norm.backward(
                upper, y, norm.mean, norm.invstd, level.bn_weight, batch_stats, True, part.norm
            )
            del y
            du = upsample.backward_x(kind, dy, level.up_weight, part.upsample)
            wanted = u is None and level.up_weight is not None
            mlp = pointwise_mlp.backward(du, *arguments, wanted, part.mlp)
            dweight = upsample.backward_weight(kind, dy, mlp.output if wanted else u, level.up_weight, part.upsample)
            del dy, u
        dbias = None
        if level.up_bias is not None and batch_stats:
            dbias, *zeros = zeros
        elif level.up_bias is not None:
            dbias = (dbn_bias * norm.scale).to(level.up_bias.dtype)
        del du, arguments
        z_grads = [*z_grads, mlp.x]
        upper = mlp.second
        w1, w2 = flat[i * _FIELDS + Level._fields.index("w1")], flat[i * _FIELDS + Level._fields.index("w2")]
        flat_grads = [
            *flat_grads,
            _gradient(mlp.w1, w1), mlp.b1, _gradient(mlp.w2, w2), mlp.b2, dweight, dbias,
            None if level.bn_weight is None else dbn_weight,
            None if level.bn_bias is None else dbn_bias.to(level.bn_bias.dtype),
            None, None,
        ]  # fmt: skip
    dx, dw, db = reduce_haar.backward(z_grads, x, weight, bias is not None, grad if residual else None, part.reduce)
    dw = layout.like_weight(dw, weight)
    return [dx, dw, db, None, *flat_grads]


@plan.function
class _Waveblock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, options: _Options, x: Tensor, weight: Tensor, bias: Tensor | None,
        seeds: Tensor | None, *flat: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        if not torch.compiler.is_compiling():  # which does not know it
            ctx.set_materialize_grads(False)  # of statistics
        out, *rest = _forward(options, x, weight, bias, seeds, *flat)
        kept, of = rest[: -options.levels * _STATISTICS], rest[-options.levels * _STATISTICS :]
        ctx.options = options
        ctx.save_for_backward(x, weight, bias, seeds, *flat, *([] if options.recompute == "all" else kept), *of)
        # The mean and the variance of each level's batch. Given ones belong to the caller.
        given = flat[Level._fields.index("mean") :: _FIELDS]
        batch = [t for i in range(0, len(of), _STATISTICS) for t in of[i : i + 2]]
        if any(mean is not None for mean in given):
            batch = [t if given[i // 2] is None else t.detach().clone() for i, t in enumerate(batch)]
        ctx.mark_non_differentiable(*batch)
        return (out, *batch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        return None, *_backward(ctx.options, grad, *ctx.saved_tensors)
