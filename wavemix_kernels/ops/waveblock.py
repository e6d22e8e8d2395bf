"""``waveblock``: a whole Waveblock as one differentiable function that saves what recomputing would cost too much.

Upstream's autograd keeps every intermediate (four x-sizes at level 1). Here ``recompute="mlp"`` keeps x and the output
of each upsampling; the reduction, the pyramid and the MLPs (a tenth of the arithmetic) are made again.
``recompute="hidden"`` keeps the pyramid and what the MLPs give too, a third of x's size each at most, and makes the
hidden layers alone again; ``"all"`` keeps x alone. No dropout mask is ever kept: it follows from a seed.

At level 1 the reduction and the MLP could be one kernel; by count it would save too little to be done
(docs/develop/tuning.md, one kernel for the reduction and the MLP).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import flops, layout, plan
from wavemix_kernels.ops.common.autograd import again
from wavemix_kernels.ops.common.dtypes import cast_given
from wavemix_kernels.ops.common.once import once_differentiable
from wavemix_kernels.ops.deconv import op as deconv
from wavemix_kernels.ops.deconv import upsample
from wavemix_kernels.ops.mlp import normed
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


FIELDS = len(Level._fields)
#: The first so many fields are a convolution's.
_OF_CONVOLUTIONS = Level._fields.index("bn_weight")


@plan.words
class Options(NamedTuple):
    levels: int
    dropout: tuple[float, ...]
    eps: tuple[float, ...]
    kind: str
    residual: bool
    backend: str
    recompute: str
    parameters: torch.dtype | None  # of the convolutions' weights, where they are to be converted to x's


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


class Block(NamedTuple):
    """A Waveblock's checked arguments.

    Attributes:
        weight, bias: the reduction, (C/4, C, 1, 1) and (C/4).
        levels: one :class:`Level` per DWT level, the finest first; w1 and w2 as the 1x1 convolutions have them,
            (O, I, 1, 1).
        dropout, eps: per level.
        seeds: (levels) int64, where any dropout is above 0.
        kind: the upsampling (:mod:`wavemix_kernels.ops.deconv.upsample`).
        recompute: one of :data:`RECOMPUTE`; ``"auto"`` as :func:`wavemix_kernels.ops.choose.waveblock_recompute` says.
        parameters: the dtype of all convolutions' weights and biases, where it is not x's; they are converted, and
            their gradients are in it.
    """

    weight: Tensor
    bias: Tensor | None
    levels: list[Level]
    dropout: Sequence[float]
    eps: Sequence[float]
    seeds: Tensor | None
    kind: str
    recompute: str
    parameters: torch.dtype | None = None

    def options(self, residual: bool, backend: str) -> Options:
        recompute = self.recompute
        if recompute == "auto":
            recompute = choose.waveblock_recompute(self.weight.device.type)
        return Options(
            len(self.levels), tuple(self.dropout), tuple(self.eps), self.kind, residual, backend, recompute,
            self.parameters,
        )  # fmt: skip


def waveblock(x: Tensor, block: Block, residual: bool, backend: str) -> tuple[Tensor, list[Tensor]]:
    """The Waveblock: output, and per level the rows of :class:`batch_norm.Statistics`.

    Args:
        x: (N, C, H, W); the output takes its memory format.
        residual: add x to the output, in the pass that normalises.
    """
    flat = [t for level in block.levels for t in level]
    options = block.options(residual, backend)
    out, *stats = _Waveblock.apply(options, x, block.weight, block.bias, block.seeds, *flat)
    return out, stats


def converted(
    options: Options, dtype: torch.dtype | None, weights: tuple[Any, ...], flat: Sequence[Any]
) -> tuple[tuple[Any, ...], list[Any]]:
    """Convolutions' weights, a reduction's and those of levels, in the images' dtype, or their gradients in the
    parameters', where these are two: in one launch on a GPU."""
    if options.parameters is None or dtype is None:
        return weights, list(flat)
    places = [i for i in range(len(flat)) if i % FIELDS < _OF_CONVOLUTIONS]
    made = cast_given([*weights, *(flat[i] for i in places)], dtype)
    of_levels = dict(zip(places, made[len(weights) :], strict=True))
    return tuple(made[: len(weights)]), [of_levels.get(i, t) for i, t in enumerate(flat)]


def levels_of(flat: Sequence[Any]) -> list[Level]:
    """The levels, w1 and w2 as matrices (O, I)."""
    levels = [Level(*flat[i : i + FIELDS]) for i in range(0, len(flat), FIELDS)]
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


def levels_forward(
    options: Options, flat: Sequence[Any], pyramid: Callable[[], list[Tensor]], seeds: Tensor | None, keeps: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """From the pyramid on: what each level's upsampling gives, the finest first and before its BatchNorm; the pyramid
    and what upsamplings with weights took, where ``keeps``, else nothing; and each level's statistics, their rows."""
    levels, part, zs = levels_of(flat), _Parts.of(options.backend), pyramid()
    kept = [*zs] if keeps else []
    # Lists are rebound, never written to (torch.compile traces this), and what is done with is dropped at once.
    ys: list[Tensor] = []
    us: list[Tensor] = []
    stats: list[Tensor] = []
    second, second_affine = None, None
    for i in range(options.levels - 1, -1, -1):
        level, z = levels[i], zs[-1]
        zs = zs[:-1]
        arguments = _mlp_arguments(level, z, second, second_affine, options.dropout[i], _seed(seeds, i))
        u = pointwise_mlp.fused(*arguments, part.mlp)
        norm = level.bn_weight, level.bn_bias
        if level.mean is not None and level.invstd is not None:
            second = upsample.forward(options.kind, u, level.up_weight, level.up_bias, part.upsample)
            rows = batch_norm.given_rows(level.mean, level.invstd, *norm)
        elif options.kind == "deconv":
            assert level.up_weight is not None
            made = torch.ops.wavemix_kernels.deconv_stats
            second, rows = made(u, level.up_weight, level.up_bias, *norm, options.eps[i], part.upsample)
        else:
            second = upsample.forward(options.kind, u, level.up_weight, level.up_bias, part.upsample)
            rows = batch_norm.rows(second, *norm, options.eps[i], part.norm)
        ys = [second, *ys]
        us = [u, *us] if keeps and level.up_weight is not None else us
        del z, u, arguments
        stats = [rows, *stats]
        second_affine = batch_norm.Statistics.of(rows).affine()
    return ys, kept, us, stats


def _forward(
    options: Options, x: Tensor, weight: Tensor, bias: Tensor | None, seeds: Tensor | None, *flat: Tensor | None
) -> list[Tensor]:
    """The output, what each level's upsampling gave, the pyramid and what upsamplings with weights took, where these
    are kept, and the rows of each level's :class:`batch_norm.Statistics`."""
    part = _Parts.of(options.backend)
    ys, zs, us, stats = levels_forward(
        options, flat, lambda: reduce_haar.fused(x, weight, bias, options.levels, True, part.reduce), seeds,
        options.recompute == "hidden",
    )  # fmt: skip
    out = torch.ops.wavemix_kernels.batch_norm_apply(
        ys[0],
        *batch_norm.Statistics.of(stats[0]).affine(),
        x if options.residual else None,
        layout.is_channels_last(x),
        part.norm,
    )
    return [out, *ys, *zs, *us, *stats]


def _through_norm(kind: str, part: _Parts, arguments: Sequence[Any], below: Level) -> bool:
    """Whether an MLP's gradients go on through the BatchNorm of the level below, in one operator."""
    x, second, _, _, w1, b1, w2, *_ = arguments
    if below.mean is not None or not normed.serves(x, w1, b1, w2, part.mlp):
        return False
    return kind != "deconv" or not deconv.folds(part.upsample, cast(Tensor, below.up_weight).shape[0], second)


def _mlp_backward_through_norm(
    du: Tensor, arguments: Sequence[Any], below: Level, of: batch_norm.Statistics, backend: str
) -> tuple[pointwise_mlp.Gradients, tuple[Tensor, Tensor]]:
    """The MLP's gradients, ``second`` that of what the level below upsampled, and its BatchNorm's parameters'."""
    x, second, _, _, w1, b1, w2, b2, p, seed = arguments
    norm = normed.Norm.of(of, below.bn_weight, below.bn_bias)
    made = normed.backward(du, x, second, norm, w1, b1, w2, b2, p, seed, backend)
    mlp = pointwise_mlp.Gradients(made.x, made.y, made.w1, made.b1, made.w2, made.b2, None)
    return mlp, (made.norm_weight, made.norm_bias)


def levels_backward(
    options: Options, upper: Tensor, of_y: bool, flat: Sequence[Any], ys: Sequence[Tensor], zs: Sequence[Tensor],
    us: Sequence[Tensor], stats: Sequence[Tensor], seeds: Tensor | None,
    pyramid: Callable[[], list[Tensor]],
) -> tuple[list[Tensor], list[Any]]:  # fmt: skip
    """Gradients of the pyramid and of ``flat``, from that of the block's output.

    Args:
        of_y: ``upper`` is the gradient of what the finest level's upsampling gave; that itself is not read then, and
            its BatchNorm gets no gradient here.
        stats: the rows of each level's statistics.
        ys, us, zs: what :func:`levels_forward` made and took, or nothing: it is made again.
        pyramid: makes the latter.
    """
    kind, dropout = options.kind, options.dropout
    levels, part = levels_of(flat), _Parts.of(options.backend)
    norms = [batch_norm.Statistics.of(rows) for rows in stats]
    before = flops.counted()
    zs = zs or pyramid()
    if not ys:
        for i in range(options.levels - 1, -1, -1):
            second, second_affine = (ys[0], norms[i + 1].affine()) if ys else (None, None)
            arguments = _mlp_arguments(levels[i], zs[i], second, second_affine, dropout[i], _seed(seeds, i))
            us = [pointwise_mlp.fused(*arguments, part.mlp), *us]
            up = levels[i].up_weight, levels[i].up_bias
            ys = [upsample.forward(kind, us[0], *up, part.upsample), *ys]
    flops.forget_since(before)

    # A batch's mean takes the bias before it away; given statistics pass BatchNorm's gradient on.
    taken = [level.up_bias for level in levels if level.mean is None and level.up_bias is not None]
    sizes = [t.numel() for t in taken]
    zeros = list(taken[0].new_zeros(sum(sizes)).split(sizes)) if taken else []
    flat_grads: list[Any] = []
    z_grads: list[Tensor] = []
    gradient: Tensor | None = upper
    given = of_y  # the gradient is that of y itself
    of_norm: tuple[Tensor | None, Tensor | None] = (None, None)  # then, of the parameters of its BatchNorm
    for i, level in enumerate(levels):
        assert gradient is not None
        z, y, zs, ys = zs[0], ys[0], zs[1:], ys[1:]
        batch_stats, norm = level.mean is None, norms[i]
        second, second_affine = (ys[0], norms[i + 1].affine()) if ys else (None, None)
        arguments = _mlp_arguments(level, z, second, second_affine, dropout[i], _seed(seeds, i))
        u, us = us[0] if us else None, us[1:]
        dweight: Tensor | None
        dbn_weight: Tensor | None
        dbn_bias: Tensor | None
        folds = kind == "deconv" and deconv.folds(part.upsample, cast(Tensor, level.up_weight).shape[0], gradient)
        if folds and not given:
            # u made again first, a twentieth of the level's arithmetic, lets one pass over gradient and y make both
            # gradients.
            before = flops.counted()
            u = pointwise_mlp.fused(*arguments, part.mlp) if u is None else u
            flops.forget_since(before)
            du, dweight, dbn_weight, dbn_bias = deconv.norm_backward(
                gradient, y, norm.mean, norm.invstd, level.bn_weight, batch_stats, u, cast(Tensor, level.up_weight),
                part.upsample,
            )  # fmt: skip
            del u, y
            mlp, given, of_norm = pointwise_mlp.backward(du, *arguments, False, part.mlp), False, (None, None)
        else:
            if given:
                dy, (dbn_weight, dbn_bias) = gradient, of_norm
            else:
                dy, dbn_weight, dbn_bias = batch_norm.backward(
                    gradient, y, norm.mean, norm.invstd, level.bn_weight, batch_stats, True, part.norm
                )
            del y
            du = upsample.backward_x(kind, dy, level.up_weight, part.upsample)
            wanted = u is None and level.up_weight is not None
            below = (levels[i + 1], norms[i + 1]) if ys else None
            given = below is not None and not wanted and _through_norm(kind, part, arguments, below[0])
            if given:
                assert below is not None
                mlp, of_norm = _mlp_backward_through_norm(du, arguments, *below, part.mlp)
            else:
                mlp, of_norm = pointwise_mlp.backward(du, *arguments, wanted, part.mlp), (None, None)
            dweight = upsample.backward_weight(kind, dy, mlp.output if wanted else u, level.up_weight, part.upsample)
            del dy, u
        dbias = None
        if level.up_bias is not None and batch_stats:
            dbias, *zeros = zeros
        elif level.up_bias is not None:
            assert dbn_bias is not None  # given gradients are those of a batch's own statistics
            dbias = (dbn_bias * norm.scale).to(level.up_bias.dtype)
        del du, arguments
        z_grads = [*z_grads, mlp.x]
        gradient = mlp.second
        w1, w2 = flat[i * FIELDS + Level._fields.index("w1")], flat[i * FIELDS + Level._fields.index("w2")]
        flat_grads = [
            *flat_grads,
            _gradient(mlp.w1, w1), mlp.b1, _gradient(mlp.w2, w2), mlp.b2, dweight, dbias,
            None if level.bn_weight is None else dbn_weight,
            None if level.bn_bias is None or dbn_bias is None else dbn_bias.to(level.bn_bias.dtype),
            None, None,
        ]  # fmt: skip
    return z_grads, flat_grads


def _backward(
    options: Options, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, seeds: Tensor | None,
    *rest: Any,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the tensors that :func:`_forward` takes. ``rest``: ``flat``, what was kept of that function's
    results, and the statistics."""
    count, part = options.levels, _Parts.of(options.backend)
    flat, rest, stats = rest[: count * FIELDS], rest[count * FIELDS : -count], rest[-count:]
    z_grads, flat_grads = levels_backward(
        options, grad, False, flat, rest[:count], rest[count : 2 * count], rest[2 * count :], stats, seeds,
        lambda: reduce_haar.fused(again(x), weight, bias, count, True, part.reduce),
    )  # fmt: skip
    add = grad if options.residual else None
    dx, dw, db = reduce_haar.backward(z_grads, x, weight, bias is not None, add, part.reduce)
    of_reduction = layout.like_weight(dw, weight), db
    of_reduction, flat_grads = converted(options, options.parameters, of_reduction, flat_grads)
    return [dx, *of_reduction, None, *flat_grads]


@plan.function
class _Waveblock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, options: Options, x: Tensor, weight: Tensor, bias: Tensor | None,
        seeds: Tensor | None, *flat: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        if not torch.compiler.is_compiling():  # which does not know it
            ctx.set_materialize_grads(False)  # of statistics
        (weight, bias), converted_flat = converted(options, x.dtype, (weight, bias), flat)
        out, *rest = _forward(options, x, weight, bias, seeds, *converted_flat)
        kept, stats = rest[: -options.levels], rest[-options.levels :]
        ctx.options = options
        given = x, weight, bias, seeds, *converted_flat
        ctx.save_for_backward(*given, *([] if options.recompute == "all" else kept), *stats)
        ctx.mark_non_differentiable(*stats)
        return (out, *stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        return None, *_backward(ctx.options, grad, *ctx.saved_tensors)
