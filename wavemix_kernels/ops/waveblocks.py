"""``waveblocks``: Waveblocks in a row, each with its residual, where passes over the image are one from block to block.

A block's last BatchNorm with its residual is applied as the next block's reduction reads the image, and the sums that
BatchNorm's gradient begins with are made as that image's gradient is written
(:mod:`wavemix_kernels.ops.reduce_haar.norm_reduce_haar`). A block by itself (:mod:`wavemix_kernels.ops.waveblock`)
reads the image once more forward, and its gradient backward. What is kept is the same: ``recompute="hidden"``. Where
the average of the last image alone is wanted, it is never written (:mod:`wavemix_kernels.ops.norm.pooled`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wavemix_kernels import backends
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import layout, plan
from wavemix_kernels.ops.common.once import once_differentiable
from wavemix_kernels.ops.deconv import op as deconv
from wavemix_kernels.ops.norm import batch_norm
from wavemix_kernels.ops.norm import pooled as norm_pool
from wavemix_kernels.ops.reduce_haar import norm_reduce_haar
from wavemix_kernels.ops.reduce_haar import op as reduce_haar
from wavemix_kernels.ops.waveblock import (
    FIELDS,
    Block,
    Level,
    Options,
    converted,
    levels_backward,
    levels_forward,
)

_NO_KERNEL = "no kernel joins their passes here"


def why_not_here(x: Tensor, backend: str) -> str | None:
    """The same as :func:`why_not` where x alone says it, in no time."""
    if backend not in ("auto", "cuda") or x.dtype.itemsize != 2 or backends.cuda_why_not(x) is not None:
        return _NO_KERNEL
    return None


def why_not(x: Tensor, blocks: Sequence[Block], backend: str) -> str | None:
    """Why each block runs by itself, or None."""
    if len(blocks) < 2:
        return "there is one block"
    if choose.waveblocks(backend, x.shape[1]) == "apart":
        return f"{x.shape[1]} channels have faster kernels by themselves"
    if any(level.mean is not None for block in blocks for level in block.levels):
        return "a BatchNorm has statistics of its own, not the batch's"
    if any(block.options(True, backend).recompute != "hidden" for block in blocks):
        return "blocks make more than their hidden layers again in backward"
    # One of each shape is asked: it takes longer than a launch.
    reductions = {block.weight.shape: block for block in blocks[1:]}
    for shape, block in reductions.items():
        weight = block.weight if block.parameters is None else x.new_empty(shape)  # as it will be converted
        if not norm_reduce_haar.serves(x, x, weight, backend):
            return _NO_KERNEL
    if x.is_cuda:  # the emulator's images lie on a CPU, whose kernels always do that
        part = choose.for_part(backend, deconv.BACKENDS)
        finest = (block.levels[0].up_weight for block in blocks if block.kind == "deconv")
        if any(deconv.folds(part, channels, x) for channels in {w.shape[0] for w in finest if w is not None}):
            return "the transposed convolution's kernels make their BatchNorm's gradient themselves"
    return None


def waveblocks(
    x: Tensor, blocks: Sequence[Block], backend: str, pooled: bool = False
) -> tuple[Tensor, list[list[Tensor]]]:
    """x through all blocks with their residuals, and of each block's levels the rows of
    :class:`batch_norm.Statistics`.

    Args:
        x: (N, C, H, W), channels_last.
        blocks: of which :func:`why_not` is None.
        pooled: the average over all pixels in place of the image, (N, C, 1, 1).
    """
    options = [block.options(True, backend) for block in blocks]
    x, *zs = _Reduce.apply(options[0], x, blocks[0].weight, blocks[0].bias)
    statistics = []
    for here, block, there, following in zip(options, blocks, options[1:], blocks[1:], strict=False):
        flat = (t for level in block.levels for t in level)
        given = block.seeds, following.weight, following.bias, x, *zs, *flat
        made = _Block.apply(here, there.levels, *given)
        x, zs, stats = made[0], made[1 : there.levels + 1], made[there.levels + 1 :]
        statistics.append(stats)
    last, finest = blocks[-1], blocks[-1].levels[0]
    y, *stats = _Levels.apply(options[-1], last.seeds, *zs, *(t for level in last.levels for t in level))
    statistics.append(stats)
    norm = stats[0], finest.bn_weight, finest.bn_bias
    return (_Pool if pooled else _Apply).apply(options[-1], y, *norm, x), statistics


@plan.function
class _Reduce(torch.autograd.Function):
    """x again, whose gradient is then added in one pass, and its pyramid."""

    @staticmethod
    def forward(ctx: Any, options: Options, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        (weight, bias), _ = converted(options, x.dtype, (weight, bias), ())
        ctx.backend, ctx.has_bias = choose.for_part(options.backend, reduce_haar.BACKENDS), bias is not None
        ctx.options = options
        ctx.save_for_backward(x, weight)
        return x, *reduce_haar.fused(x, weight, bias, options.levels, True, ctx.backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *grads: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        dx, dw, db = reduce_haar.backward(list(grads), x, weight, ctx.has_bias, grad, ctx.backend)
        of_reduction, _ = converted(ctx.options, ctx.options.parameters, (layout.like_weight(dw, weight), db), ())
        return None, dx, *of_reduction


class _Kept(NamedTuple):
    """Tensors that a block's levels keep for their gradients."""

    seeds: Tensor | None
    flat: Sequence[Any]
    ys: Sequence[Tensor]
    zs: Sequence[Tensor]
    us: Sequence[Tensor]
    stats: Sequence[Tensor]

    def tensors(self) -> list[Any]:
        return [self.seeds, *self.flat, *self.ys, *self.zs, *self.us, *self.stats]

    @classmethod
    def of(cls, count: int, ys: int, tensors: Sequence[Any]) -> _Kept:
        """The inverse of :meth:`tensors`, for so many levels and ``ys``."""
        seeds, *rest = tensors
        flat, kept, stats = rest[: count * FIELDS], rest[count * FIELDS : -count], rest[-count:]
        return cls(seeds, flat, kept[:ys], kept[ys : ys + count], kept[ys + count :], stats)


def _through_levels(options: Options, seeds: Tensor | None, rest: Sequence[Any]) -> _Kept:
    zs, flat = list(rest[: options.levels]), rest[options.levels :]
    ys, _, us, stats = levels_forward(options, flat, lambda: zs, seeds, True)
    return _Kept(seeds, flat, ys, zs, us, stats)


def _back_through_levels(options: Options, dy: Tensor, kept: _Kept) -> tuple[list[Tensor], list[Any]]:
    """Gradients of the pyramid and of the parameters, without those of the finest level's BatchNorm. ``kept.ys``: the
    coarser levels'."""
    ys, zs = [dy, *kept.ys], list(kept.zs)
    return levels_backward(options, dy, True, kept.flat, ys, zs, kept.us, kept.stats, kept.seeds, lambda: zs)


@plan.function
class _Block(torch.autograd.Function):
    """From a pyramid and the residual x through the levels, their last BatchNorm and x: the next block's image and
    pyramid, and all levels' statistics. The last block takes two functions: memory peaks in the gradients of its
    levels, and the second one's tensors are freed by then."""

    @staticmethod
    def forward(
        ctx: Any, options: Options, following: int, seeds: Tensor | None, weight: Tensor, bias: Tensor | None,
        x: Tensor, *rest: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        (weight, bias), flat = converted(options, x.dtype, (weight, bias), rest[options.levels :])
        made = _through_levels(options, seeds, (*rest[: options.levels], *flat))
        of = batch_norm.Statistics.of(made.stats[0]).affine()
        image, zs = norm_reduce_haar.forward(made.ys[0], of, x, weight, bias, following, options.backend)
        if not torch.compiler.is_compiling():  # which does not know it
            ctx.set_materialize_grads(False)  # of statistics
        ctx.options, ctx.following, ctx.has_bias = options, following, bias is not None
        ctx.save_for_backward(image, weight, *made.tensors())
        ctx.mark_non_differentiable(*made.stats)
        return image, *zs, *made.stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *grads: Any) -> tuple[Any, ...]:
        if grad is None:  # what comes next makes all of them or none
            return (None,) * len(ctx.needs_input_grad)
        options: Options = ctx.options
        image, weight, *saved = ctx.saved_tensors
        kept = _Kept.of(options.levels, options.levels, saved)
        of_zs = list(grads[: ctx.following])
        of, finest = batch_norm.Statistics.of(kept.stats[0]), Level(*kept.flat[:FIELDS])
        dx, dy, d_norm_weight, d_norm_bias, dw, db = norm_reduce_haar.backward(
            of_zs, grad, image, weight, ctx.has_bias, kept.ys[0], of.mean, of.invstd, finest.bn_weight, options.backend
        )
        kept = kept._replace(ys=kept.ys[1:])
        z_grads, flat_grads = _back_through_levels(options, dy, kept)
        norm = _parameters(finest.bn_weight, finest.bn_bias, d_norm_weight, d_norm_bias)
        at = Level._fields.index("bn_weight")
        flat_grads = [*flat_grads[:at], *norm, *flat_grads[at + 2 :]]
        of_reduction, flat_grads = converted(
            options, options.parameters, (layout.like_weight(dw, weight), db), flat_grads
        )
        return None, None, None, *of_reduction, dx, *z_grads, *flat_grads


@plan.function
class _Levels(torch.autograd.Function):
    """From a pyramid to what the finest level's upsampling gives, and all levels' statistics."""

    @staticmethod
    def forward(ctx: Any, options: Options, seeds: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        zs, flat = rest[: options.levels], rest[options.levels :]
        made = _through_levels(options, seeds, (*zs, *converted(options, zs[0].dtype, (), flat)[1]))
        if not torch.compiler.is_compiling():  # which does not know it
            ctx.set_materialize_grads(False)  # of statistics
        ctx.options = options
        ctx.save_for_backward(*made._replace(ys=made.ys[1:]).tensors())
        ctx.mark_non_differentiable(*made.stats)
        return made.ys[0], *made.stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        options: Options = ctx.options
        kept = _Kept.of(options.levels, options.levels - 1, ctx.saved_tensors)
        z_grads, flat_grads = _back_through_levels(options, grad, kept)
        return None, None, *z_grads, *converted(options, options.parameters, (), flat_grads)[1]


@plan.function
class _Apply(torch.autograd.Function):
    """y's BatchNorm and the residual x."""

    @staticmethod
    def forward(
        ctx: Any, options: Options, y: Tensor, stats: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None,
        x: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.backend = choose.for_part(options.backend, batch_norm.BACKENDS)
        ctx.save_for_backward(y, stats, norm_weight, norm_bias)
        of = batch_norm.Statistics.of(stats)
        return torch.ops.wavemix_kernels.batch_norm_apply(y, of.scale, of.shift, x, True, ctx.backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        y, stats, norm_weight, norm_bias = ctx.saved_tensors
        of = batch_norm.Statistics.of(stats)
        dy, *of_norm = batch_norm.backward(grad, y, of.mean, of.invstd, norm_weight, True, True, ctx.backend)
        return None, dy, None, *_parameters(norm_weight, norm_bias, *of_norm), grad


@plan.function
class _Pool(torch.autograd.Function):
    """The average of y's BatchNorm and the residual x over all pixels."""

    @staticmethod
    def forward(
        ctx: Any, options: Options, y: Tensor, stats: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None,
        x: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.backend = choose.for_part(options.backend, norm_pool.BACKENDS)
        out, means = norm_pool.forward(y, batch_norm.Statistics.of(stats).affine(), x, ctx.backend)
        ctx.save_for_backward(y, means, stats, norm_weight, norm_bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        y, means, stats, norm_weight, norm_bias = ctx.saved_tensors
        of = batch_norm.Statistics.of(stats)
        dx, dy, *of_norm = norm_pool.backward(grad, means, y, of.mean, of.invstd, norm_weight, ctx.backend)
        return None, dy, None, *_parameters(norm_weight, norm_bias, *of_norm), dx


def _parameters(
    weight: Tensor | None, bias: Tensor | None, d_weight: Tensor, d_bias: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of those parameters that a BatchNorm has, in their dtypes."""
    return None if weight is None else d_weight, None if bias is None else d_bias.to(bias.dtype)
