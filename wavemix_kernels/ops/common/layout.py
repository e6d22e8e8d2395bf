"""Memory order of the operators' tensors: asked of inputs, chosen for outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wavemix_kernels import fx
from wavemix_kernels.ops.common.transforms import in_transform


def is_channels_last(x: Tensor) -> bool:
    """Whether channels are innermost in memory (``x`` 4-D); a sliced view counts, a broadcast one does not."""
    _, sc, _, sw = x.stride()
    return x.shape[1] > 1 and 0 < sc < sw


def memory_format(x: Tensor) -> torch.memory_format:
    """The one to ask torch for, to have a result in ``x``'s order."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def ordered_as(out: Tensor, x: Tensor) -> Tensor:
    """``out`` in the memory order of the image ``x``, where tensors have one."""
    if isinstance(x, fx.Proxy):
        return fx.call_function(ordered_as, out, x)
    return out if in_transform() else out.contiguous(memory_format=memory_format(x))


def empty(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """An uninitialised image (4-D) or bands (5-D); channels_last bands lie as N, h, w, C, 3."""
    if not channels_last:
        return like.new_empty(shape)
    n, c, *bands, h, w = shape
    out = like.new_empty([n, h, w, c, *bands])
    return out.permute(0, 3, 4, 1, 2) if bands else out.permute(0, 3, 1, 2)


def laid_out(x: Tensor, channels_last: bool) -> Tensor:
    """``x`` in the memory order of :func:`empty`, so that every backend returns the same strides."""
    if not channels_last:
        return x.contiguous()
    return empty(x, x.shape, True).copy_(x)


def channels_inner(x: Tensor) -> Tensor:
    """``x`` where its channels are contiguous (channels_last, slices of it), else a channels_last copy."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else laid_out(x, True)


def like_weight(gradient: Tensor, weight: Tensor) -> Tensor:
    """``gradient`` with the strides of ``weight``, where they are of the same memory order.

    Strides along axes of length 1 mean nothing, but a channels_last 1x1 weight has other ones than a fresh tensor, and
    DistributedDataParallel compares them all: it warns, and copies into its buckets element by element.
    """
    axes = zip(gradient.shape, gradient.stride(), weight.stride(), strict=True)
    if gradient.stride() != weight.stride() and all(size == 1 or ours == its for size, ours, its in axes):
        return gradient.as_strided(gradient.shape, weight.stride())
    return gradient
