"""Memory order of the operators' tensors: asked of inputs, chosen for outputs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether channels are innermost in memory (``x`` 4-D); a sliced view counts, a broadcast one does not."""
    _, sc, _, sw = x.stride()
    return x.shape[1] > 1 and 0 < sc < sw


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
