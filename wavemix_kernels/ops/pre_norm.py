"""``pre_norm``: the normalisation in front of a residual branch, by channel (BatchNorm) or by image (GroupNorm(1)), and
the sum behind it.

PyTorch's own operations do the arithmetic. What is ours is what stays: the output is an affine map of x and never kept,
but made again for the backward pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from wavemix_kernels import backends
from wavemix_kernels.ops import batch_norm, layout


class Norm(NamedTuple):
    """What normalises, (C) each; ``mean`` and ``var`` None: x's own statistics, by channel or by image."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None


class Kind(NamedTuple):
    """Its constants: eps of the variance, and whether each image is normalised by itself."""

    eps: float
    by_image: bool


class Statistics(NamedTuple):
    """Mean, biased variance and inverse deviation that x was normalised by, fp32 (fp64 for fp64); (C), by image (N)."""

    mean: Tensor
    var: Tensor
    invstd: Tensor


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def statistics(x: Tensor, norm: Norm, kind: Kind, backend: str) -> Statistics:
    wide = batch_norm.statistics_dtype(x.dtype)
    if norm.mean is not None and norm.var is not None:
        mean, var = norm.mean.to(wide, copy=True), norm.var.to(wide, copy=True)
    elif kind.by_image:
        # Two passes, of which the second has nothing to cancel. (On channels_last images PyTorch's group norm takes
        # E[x^2] - E[x]^2 on a CPU; its var_mean is 10 times as slow as this.)
        rows = _channels_last(x).permute(0, 2, 3, 1).flatten(1).to(wide)
        center = rows.mean(1, keepdim=True)
        mean, var = center[:, 0], (rows - center).square_().mean(1)
    else:
        part = backends.for_part(backend, batch_norm.BACKENDS)
        mean, var = torch.ops.wavemix_kernels.batch_norm_stats(x, part)
    return Statistics(mean, var, torch.rsqrt(var + kind.eps))


def normalise(x: Tensor, norm: Norm, kind: Kind, stats: Statistics) -> Tensor:
    """``(x - mean) * invstd * weight + bias`` of an image of any strides: channels_last, rounded once."""
    image = _channels_last(x)
    scale, shift = affine(norm, kind, stats, x.shape[1])
    out = torch.addcmul(shift[..., None, None], image.to(shift.dtype), scale[..., None, None])
    return _channels_last(out.to(x.dtype))


def affine(norm: Norm, kind: Kind, stats: Statistics, channels: int) -> tuple[Tensor, Tensor]:
    """:func:`normalise` as ``x * scale + shift``: (C), by image (N, C)."""
    mean, invstd = stats.mean, stats.invstd
    if kind.by_image:
        mean, invstd = (t[:, None].expand(-1, channels) for t in (mean, invstd))
    scale = invstd if norm.weight is None else invstd * norm.weight
    shift = -mean * scale if norm.bias is None else norm.bias - mean * scale
    return scale.to(mean.dtype), shift.to(mean.dtype)


def backward(
    grad: Tensor, x: Tensor, around: Tensor, norm: Norm, kind: Kind, stats: Statistics
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias from that of :func:`normalise`'s output; ``around``, the gradient that goes
    around the branch, is added to x's."""
    wide = stats.mean.dtype
    weight = norm.weight if norm.weight is None else norm.weight.to(wide)
    if weight is None and x.dtype != wide:
        weight = torch.ones(x.shape[1], dtype=wide, device=x.device)  # says that statistics are wider than x
    image, (n, c, h, w) = _channels_last(x), x.shape
    mask = [True, norm.weight is not None, norm.bias is not None]
    if kind.by_image:
        mean, invstd = stats.mean[:, None], stats.invstd[:, None]
        grads: Any = torch.ops.aten.native_group_norm_backward(grad, image, mean, invstd, weight, n, c, h * w, 1, mask)
    else:
        own = norm.mean is None
        given = (None, None) if own else (stats.mean, stats.var)
        grads = torch.ops.aten.native_batch_norm_backward(
            grad, image, weight, *given, stats.mean, stats.invstd, own, kind.eps, mask
        )
    dx, *of_parameters = grads
    dx = dx.add_(around)
    if layout.is_channels_last(dx) != layout.is_channels_last(x):
        dx = layout.laid_out(dx, layout.is_channels_last(x))
    d_weight, d_bias = (
        None if t is None else d.to(t.dtype) for t, d in zip((norm.weight, norm.bias), of_parameters, strict=True)
    )
    return dx, d_weight, d_bias


def join(x: Tensor, branch: Tensor, path: Tensor | None) -> Tensor:
    """``x + path branch`` in x's dtype and memory format; into ``branch``, which nobody else holds, where it can be."""
    if path is not None:
        branch.mul_(path)
    order = layout.is_channels_last(x)
    if order and x.dtype == branch.dtype and layout.is_channels_last(branch):
        return branch.add_(x)
    out = x + branch
    return out if layout.is_channels_last(out) == order else layout.laid_out(out, order)


def branch_gradient(grad: Tensor, path: Tensor | None, image: Tensor) -> Tensor:
    """Gradient of the branch in :func:`join`: channels_last, in the dtype of the branch's ``image``."""
    scaled = grad if path is None else grad * path
    return _channels_last(scaled.to(image.dtype))
