"""Convolutions of an image with nothing between them, as one: a WaveMix model's stem.

The map is linear, so its weights are folded: two or three convolutions of three channels, up to 96 and 192 become one
of three to 192 over 8x8 pixels. No activation between them is made or kept.
At the border the inner convolution's padding is zeros, which is not what the outer one's weights would find there:
outputs whose patch reaches it have weights of their own, folded without the taps outside.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels import log
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common.dtypes import accumulate_dtype


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


def products(convolutions: Sequence[Convolution], n: int, h: int, w: int) -> tuple[int, int]:
    """Multiplications forward for ``n`` images of (h, w): of the folded convolution, folding included, and apart."""
    way = geometry(convolutions)
    apart = 0
    for one in convolutions:
        h, w = one.size(h), one.size(w)
        apart += n * h * w * one.weight.numel()
    inner, outputs = way.inner.weight, convolutions[-1].weight.shape[0]
    folding = outputs * way.k**2 * inner.numel()
    if len(convolutions) == 3:
        folding += convolutions[2].weight.numel() * convolutions[1].weight[0].numel()
    return n * h * w * outputs * way.window**2 * inner.shape[1] + folding, apart


def why_not(x: Tensor, convolutions: Sequence[Convolution]) -> str | None:
    """Why ``convolutions`` of ``x`` do not run as one, or None: they can, and :func:`choose.stem` says so."""
    if not 2 <= len(convolutions) <= 3:
        return f"{len(convolutions)} convolutions follow each other, expected 2 or 3"
    if len(convolutions) == 3 and convolutions[2].padding:
        return f"the third convolution has padding {convolutions[2].padding}, expected 0"
    weight, autocast = convolutions[0].weight, torch.is_autocast_enabled(x.device.type)
    if x.dim() != 4 or x.shape[1] != weight.shape[1] or x.device != weight.device:
        return f"the image is {tuple(x.shape)} on {x.device}, the first weight {tuple(weight.shape)} on {weight.device}"
    if any(one.weight.dtype != x.dtype for one in convolutions) and not autocast:
        return f"the image is {x.dtype}, and a weight is not"
    n, h, w = x.shape[0], x.shape[2], x.shape[3]
    for i, one in enumerate(convolutions):
        h, w = one.size(h), one.size(w)
        if min(h, w) < 1:
            return f"convolution {i} leaves {h}x{w} pixels"
    folded, apart = products(convolutions, n, x.shape[2], x.shape[3])
    if choose.stem(x.device.type, folded, apart) == "apart":
        return f"{folded} products as one, {apart} apart"
    return None


def serves(x: Tensor, convolutions: Sequence[Convolution]) -> bool:
    """Whether ``auto`` runs :func:`folded`; logged once per shape and dtype.

    Not in a traced graph, which serves many sizes and holds the convolutions themselves.
    """
    if torch.compiler.is_compiling():
        return False
    reason = why_not(x, convolutions)
    if log.enabled():
        chosen = "folded" if reason is None else f"apart ({reason})"
        shape = tuple(x.shape)
        name = str(x.dtype).removeprefix("torch.")
        log.once(("stem", x.dtype, shape, chosen), lambda: f"stem {name} {shape}: {chosen}")
    return reason is None


def folded(x: Tensor, convolutions: Sequence[Convolution]) -> Tensor:
    """The convolutions one after the other: x (N, C, H, W) -> (N, O, h, w), channels_last.

    Any floating dtype; weights are folded in fp32 for the half types, and in the parameters' own dtype under autocast.
    Differentiable any number of times, by the library's operators.

    Args:
        convolutions: two, or three of which the last has no padding.
    """
    way = geometry(convolutions)
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = x.dtype
    inner, outer = way.inner, convolutions[1]
    sizes = [(inner.size(n), convolutions[-1].size(outer.size(inner.size(n)))) for n in x.shape[2:]]
    if len(convolutions) == 2:
        sizes = [(inside, outer.size(inside)) for inside, _ in sizes]
    rows, columns = (_parts(outputs, inside, way.stride, way.padding, way.k) for inside, outputs in sizes)
    with torch.autocast(device, enabled=False):
        weights, biases = _fold(convolutions, way, rows, columns)
        weights, biases = weights.to(dtype), biases.to(dtype)
    patches = _patches(x.to(dtype), way, [outputs for _, outputs in sizes])
    made = [
        [
            F.linear(patches[:, a:b, c:d].flatten(3), weights[i, j], biases[i, j])
            for j, (c, d, _, _) in enumerate(columns)
        ]
        for i, (a, b, _, _) in enumerate(rows)
    ]
    return torch.cat([torch.cat(row, 2) for row in made], 1).permute(0, 3, 1, 2)


#: Outputs first to last - 1 along an axis, and the taps first to last - 1 that they find inside.
Part = tuple[int, int, int, int]


@functools.lru_cache(256)
def _parts(outputs: int, size: int, stride: int, padding: int, k: int) -> tuple[Part, ...]:
    parts: list[Part] = []
    for i in range(outputs):
        start = i * stride - padding
        inside = (max(0, -start), max(0, min(k, size - start)))
        if parts and parts[-1][2:] == inside:
            parts[-1] = (parts[-1][0], i + 1, *inside)
        else:
            parts.append((i, i + 1, *inside))
    return tuple(parts)


def _fold(
    convolutions: Sequence[Convolution], way: Geometry, rows: Sequence[Part], columns: Sequence[Part]
) -> tuple[Tensor, Tensor]:
    """Weights (rows, columns, O, window * window * C), as :func:`_patches` are, and biases (rows, columns, O)."""
    wide = accumulate_dtype(way.inner.weight.dtype)
    tensors: list[Any] = [
        (one.weight.to(wide), None if one.bias is None else one.bias.to(wide)) for one in convolutions
    ]
    (first, first_bias), (weight, bias), *rest = tensors
    for (last, last_bias), one in zip(rest, convolutions[1:], strict=False):
        through = 0 if bias is None else last.sum((2, 3)) @ bias
        bias = through if last_bias is None else last_bias + through
        weight = F.conv_transpose2d(last, weight, stride=one.stride)
    o, channels, k, _ = weight.shape
    inside = _inside(rows, k, first)[:, None, :, None] * _inside(columns, k, first)[:, None]
    inside = inside.reshape(-1, k * k)
    taps = (weight.permute(0, 2, 3, 1).reshape(-1, channels) @ first.flatten(1)).view(o, k * k, -1).transpose(1, 2)
    taps = (taps * inside[:, None, None]).flatten(0, 1)
    folded = F.fold(taps, way.window, first.shape[-1], stride=way.inner.stride)
    folded = folded.permute(0, 2, 3, 1).reshape(len(rows), len(columns), o, -1)
    biases = folded.new_zeros(len(inside), o)
    if first_bias is not None:
        biases = inside @ (weight.flatten(2) * first_bias[:, None]).sum(1).t()
    if bias is not None:
        biases = biases + bias
    return folded, biases.view(len(rows), len(columns), o)


def _inside(parts: Sequence[Part], k: int, like: Tensor) -> Tensor:
    """(parts, k): 1 for each tap that is inside, else 0."""
    return torch.tensor([[float(a <= tap < b) for tap in range(k)] for _, _, a, b in parts]).to(like)


def _patches(x: Tensor, way: Geometry, sizes: Sequence[int]) -> Tensor:
    """(N, h, w, window, window * C): a view of the padded image, whose rows of a patch lie together."""
    stride, before = way.stride * way.inner.stride, way.padding * way.inner.stride + way.inner.padding
    after = [(n - 1) * stride + way.window - size - before for n, size in zip(sizes, x.shape[2:], strict=True)]
    image = F.pad(x.permute(0, 2, 3, 1), (0, 0, before, after[1], before, after[0])).contiguous()
    channels = x.shape[1]
    return image.flatten(2).unfold(1, way.window, stride).unfold(2, way.window * channels, stride * channels)
