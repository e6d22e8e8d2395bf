"""Convolutions as one product of copied patches, differentiable by the library's operators: a CPU's way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels.ops.common.dtypes import accumulate_dtype, without_autocast
from wavemix_kernels.ops.common.kept import Kept
from wavemix_kernels.ops.stem import folding
from wavemix_kernels.ops.stem.geometry import Convolution, Geometry, dtype_of, geometry, places


def folded(x: Tensor, convolutions: Sequence[Convolution], kept: Kept | None = None) -> Tensor:
    """The convolutions one after the other: x (N, C, H, W) -> (N, O, h, w), channels_last.

    Any floating dtype; weights are folded in fp32 for the half types, and in the parameters' own dtype under autocast.
    Differentiable any number of times, by the library's operators.

    Args:
        convolutions: two, or three of which the last has no padding.
        kept: where folded weights of earlier calls are, for calls without gradient.
    """
    way, dtype = geometry(convolutions), dtype_of(x)
    sizes, rows, columns = places(x.shape[2:], convolutions, way)

    def fold() -> tuple[Tensor, Tensor]:
        with without_autocast(x):
            taps, bias = folding.taps_of(convolutions, accumulate_dtype(way.inner.weight.dtype))
            weights, biases = (t.to(dtype) for t in folding.of_parts(taps, bias, way, rows, columns))
        weights = weights.permute(0, 1, 3, 4, 2).reshape(len(rows), len(columns), weights.shape[1], -1)
        return weights, biases.view(len(rows), len(columns), -1)

    parameters = [t for one in convolutions for t in (one.weight, one.bias) if t is not None]
    if kept is None or (torch.is_grad_enabled() and any(t.requires_grad for t in parameters)):
        weights, biases = fold()
    else:
        kind = tuple(x.shape[2:]), dtype, *((one.stride, one.padding) for one in convolutions)
        weights, biases = kept.get(kind, parameters, fold)
    patches = _patches(x.to(dtype), way, sizes)
    made = [
        [
            F.linear(patches[:, a:b, c:d].flatten(3), weights[i, j], biases[i, j])
            for j, (c, d, _, _) in enumerate(columns)
        ]
        for i, (a, b, _, _) in enumerate(rows)
    ]
    return torch.cat([torch.cat(row, 2) for row in made], 1).permute(0, 3, 1, 2)


def _patches(x: Tensor, way: Geometry, sizes: Sequence[int]) -> Tensor:
    """(N, h, w, window, window * C): a view of the padded image, whose rows of a patch lie together."""
    stride, before = way.stride * way.inner.stride, way.padding * way.inner.stride + way.inner.padding
    after = [(n - 1) * stride + way.window - size - before for n, size in zip(sizes, x.shape[2:], strict=True)]
    image = F.pad(x.permute(0, 2, 3, 1), (0, 0, before, after[1], before, after[0])).contiguous()
    channels = x.shape[1]
    return image.flatten(2).unfold(1, way.window, stride).unfold(2, way.window * channels, stride * channels)
