"""``waveblocks``: Waveblocks in a row, each with its residual, where passes over the image are one from block to block.

A block's last BatchNorm with its residual is applied as the next block's reduction reads the image, and the sums that
BatchNorm's gradient begins with are made as that image's gradient is written
(:mod:`wavemix_kernels.ops.reduce_haar.norm_reduce_haar`). A block by itself (:mod:`wavemix_kernels.ops.waveblock`)
reads the image once more forward, and its gradient backward. What is kept is the same: ``recompute="hidden"``. Where
the average of the last image alone is wanted, it is never written (:mod:`wavemix_kernels.ops.norm.pooled`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    Options,
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
    reductions = {block.weight.shape: block.weight for block in blocks[1:]}
    if not all(norm_reduce_haar.serves(x, x, weight, backend) for weight in reductions.values()):
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
    first = blocks[0]
    x, *zs = _Reduce.apply(first.options(True, backend), x, first.weight, first.bias)
    statistics = []
    for i, block in enumerate(blocks):
        options, finest = block.options(True, backend), block.levels[0]
        flat = (t for level in block.levels for t in level)
        y, *stats = _Levels.apply(options, block.seeds, *zs, *flat)
        statistics.append(stats)
        norm = stats[0], finest.bn_weight, finest.bn_bias
        if i + 1 < len(blocks):
            following = blocks[i + 1]
            x, *zs = _Join.apply(following.options(True, backend), y, *norm, x, following.weight, following.bias)
        else:
            x = (_Pool if pooled else _Apply).apply(options, y, *norm, x)
    return x, statistics


@plan.function
class _Reduce(torch.autograd.Function):
    """x again, whose gradient is then added in one pass, and its pyramid."""

    @staticmethod
    def forward(ctx: Any, options: Options, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        ctx.backend, ctx.has_bias = choose.for_part(options.backend, reduce_haar.BACKENDS), bias is not None
        ctx.save_for_backward(x, weight)
        return x, *reduce_haar.fused(x, weight, bias, options.levels, True, ctx.backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *grads: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        dx, dw, db = reduce_haar.backward(list(grads), x, weight, ctx.has_bias, grad, ctx.backend)
        return None, dx, layout.like_weight(dw, weight), db


@plan.function
class _Levels(torch.autograd.Function):
    """From a pyramid to what the finest level's upsampling gives, and all levels' statistics."""

    @staticmethod
    def forward(ctx: Any, options: Options, seeds: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        zs, flat = rest[: options.levels], rest[options.levels :]
        ys, _, us, stats = levels_forward(options, flat, lambda: list(zs), seeds, True)
        if not torch.compiler.is_compiling():  # which does not know it
            ctx.set_materialize_grads(False)  # of statistics
        ctx.options = options
        ctx.save_for_backward(seeds, *flat, *ys[1:], *zs, *us, *stats)
        ctx.mark_non_differentiable(*stats)
        return ys[0], *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        options: Options = ctx.options
        seeds, *rest = ctx.saved_tensors
        count, own = options.levels, options.levels * FIELDS
        flat, kept, stats = rest[:own], rest[own:-count], rest[-count:]
        ys, zs, us = [grad, *kept[: count - 1]], kept[count - 1 : 2 * count - 1], kept[2 * count - 1 :]
        z_grads, flat_grads = levels_backward(
            options, grad, True, flat, ys, zs, us, stats, seeds, lambda: list(zs)
        )
        return None, None, *z_grads, *flat_grads


@plan.function
class _Join(torch.autograd.Function):
    """y's BatchNorm and the residual x, and the pyramid of that."""

    @staticmethod
    def forward(
        ctx: Any, options: Options, y: Tensor, stats: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None,
        x: Tensor, weight: Tensor, bias: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        of = batch_norm.Statistics.of(stats).affine()
        image, zs = norm_reduce_haar.forward(y, of, x, weight, bias, options.levels, options.backend)
        ctx.backend, ctx.has_bias = options.backend, bias is not None
        ctx.save_for_backward(image, weight, y, stats, norm_weight, norm_bias)
        return image, *zs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *grads: Tensor) -> tuple[Any, ...]:
        image, weight, y, stats, norm_weight, norm_bias = ctx.saved_tensors
        of = batch_norm.Statistics.of(stats)
        dx, dy, d_norm_weight, d_norm_bias, dw, db = norm_reduce_haar.backward(
            list(grads), grad, image, weight, ctx.has_bias, y, of.mean, of.invstd, norm_weight, ctx.backend
        )
        of_norm = _parameters(norm_weight, norm_bias, d_norm_weight, d_norm_bias)
        return None, dy, None, *of_norm, dx, layout.like_weight(dw, weight), db


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
