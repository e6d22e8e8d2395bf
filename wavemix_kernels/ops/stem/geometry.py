"""What convolutions that follow each other look at: windows, strides, and the parts of an image whose outputs find the
same taps inside."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Convolution(NamedTuple):
    """weight (O, C, k, k) and bias (O) or None, over zeros around the image."""

    weight: Tensor
    bias: Tensor | None
    stride: int
    padding: int

    def size(self, n: int) -> int:
        """Outputs along an axis of ``n`` pixels."""
        return (n + 2 * self.padding - self.weight.shape[-1]) // self.stride + 1


class Geometry(NamedTuple):
    """Outer convolution over the inner one's outputs, and both over the image, which has the stride and padding of
    their product."""

    inner: Convolution
    k: int
    stride: int
    padding: int

    @property
    def window(self) -> int:
        return (self.k - 1) * self.inner.stride + self.inner.weight.shape[-1]


def geometry(convolutions: Sequence[Convolution]) -> Geometry:
    inner, *outer = convolutions
    k, stride = 1, 1
    for one in outer:
        k, stride = k + (one.weight.shape[-1] - 1) * stride, stride * one.stride
    return Geometry(inner, k, stride, outer[0].padding)


#: Outputs first to last - 1 along an axis, and the taps first to last - 1 that they find inside.
Part = tuple[int, int, int, int]


def places(
    size: Sequence[int], convolutions: Sequence[Convolution], way: Geometry
) -> tuple[list[int], tuple[Part, ...], tuple[Part, ...]]:
    """For an image of (H, W) pixels the outputs' rows and columns, and the parts of both."""
    inside = [way.inner.size(n) for n in size]
    outputs = [functools.reduce(lambda n, one: one.size(n), convolutions[1:], n) for n in inside]
    parts = [parts_of(*sizes, way.stride, way.padding, way.k) for sizes in zip(outputs, inside, strict=True)]
    return outputs, parts[0], parts[1]


@functools.lru_cache(256)
def parts_of(outputs: int, size: int, stride: int, padding: int, k: int) -> tuple[Part, ...]:
    parts: list[Part] = []
    for i in range(outputs):
        start = i * stride - padding
        inside = (max(0, -start), max(0, min(k, size - start)))
        if parts and parts[-1][2:] == inside:
            parts[-1] = (parts[-1][0], i + 1, *inside)
        else:
            parts.append((i, i + 1, *inside))
    return tuple(parts)


def dtype_of(x: Tensor) -> torch.dtype:
    """The dtype that a convolution of x has, autocast or not."""
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else x.dtype
