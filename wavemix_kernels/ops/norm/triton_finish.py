"""The last step of batch normalisation's sums in Triton: one small launch for all that follows from partial sums.

Forward: mean and variance, and with them the inverse deviation and the affine map. Backward: the line that makes the
input's gradient, and the parameters' gradients. Each would be some ten operators of PyTorch's on vectors of channels.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels.ops.common.triton_launch import Launch, pow2_at_least

_CHANNELS = 4  # of a program, which adds up all splits at once
_SPLITS = 128  # that one warp has on their way at once


@triton.jit
def _statistics_kernel(
    out, partial, weight, bias, channels, splits, row,
    EPS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, SPLITS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out (5, channels), rows so far apart, from partial (3, splits, channels)."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    split = tl.arange(0, SPLITS)
    at = partial + split[:, None] * channels + channel[None, :]
    mask = (split < splits)[:, None] & inside[None, :]
    count = tl.load(at + 2 * splits * channels, mask=mask, other=0.0)
    part = tl.load(at, mask=mask, other=0.0)
    m2 = tl.load(at + splits * channels, mask=mask, other=0.0)
    total = tl.where(inside, tl.sum(count, 0), 1)
    # Deviations from the first split's mean, which is close to all the others': their sum rounds little.
    near = tl.sum(tl.where((split == 0)[:, None], part, 0.0), 0)
    delta = tl.where(count > 0, part - near[None, :], 0.0)
    shift = tl.sum(delta * count, 0) / total
    rest = delta - shift[None, :]
    mean = near + shift
    var = tl.sum(m2 + rest * rest * count, 0) / total
    invstd = 1.0 / tl.sqrt(var + EPS)
    scale = invstd
    if WEIGHT:
        scale *= tl.load(weight + channel, mask=inside, other=0.0).to(scale.dtype)
    offset = -mean * scale
    if BIAS:
        offset += tl.load(bias + channel, mask=inside, other=0.0).to(scale.dtype)
    tl.store(out + channel, mean, mask=inside)
    tl.store(out + row + channel, var, mask=inside)
    tl.store(out + 2 * row + channel, invstd, mask=inside)
    tl.store(out + 3 * row + channel, scale, mask=inside)
    tl.store(out + 4 * row + channel, offset, mask=inside)


@triton.jit(do_not_specialize=("count",))
def _line_kernel(
    line, of_weight, of_bias, partial, mean, invstd, weight, count: tl.int64, channels, splits,
    WEIGHT: tl.constexpr, BATCH: tl.constexpr, CENTRED: tl.constexpr, SPLITS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """line (3, channels) and the parameters' gradients from partial (2, splits, channels)."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    split = tl.arange(0, SPLITS)
    at = partial + split[:, None] * channels + channel[None, :]
    mask = (split < splits)[:, None] & inside[None, :]
    sum_g = tl.sum(tl.load(at, mask=mask, other=0.0), 0)
    sum_gx = tl.sum(tl.load(at + splits * channels, mask=mask, other=0.0), 0)
    inverse = tl.load(invstd + channel, mask=inside, other=0.0)
    scale = inverse
    if WEIGHT:
        scale *= tl.load(weight + channel, mask=inside, other=0.0).to(scale.dtype)
    rise, offset = tl.zeros_like(scale), tl.zeros_like(scale)
    if BATCH:
        # With xhat = (x - mean) * invstd: dx = scale * (grad - mean(grad) - xhat * mean(grad * xhat)).
        each = 1.0 / count.to(scale.dtype)
        rise = -scale * inverse * sum_gx * each
        offset = -scale * sum_g * each
    if not CENTRED:
        offset -= rise * tl.load(mean + channel, mask=inside, other=0.0)
    tl.store(line + channel, scale, mask=inside)
    tl.store(line + channels + channel, rise, mask=inside)
    tl.store(line + 2 * channels + channel, offset, mask=inside)
    tl.store(of_weight + channel, sum_gx.to(of_weight.dtype.element_ty), mask=inside)
    tl.store(of_bias + channel, sum_g.to(of_bias.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("values", "splits"))
def _image_line_kernel(
    line, partial, invstd, weight, values: tl.int64, images, channels, splits,
    WEIGHT: tl.constexpr, OWN: tl.constexpr, SPLITS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """line (2, images), b and d of one image, from partial (2, splits, images, channels)."""
    image = tl.program_id(0)
    split, channel = tl.arange(0, SPLITS), tl.arange(0, CHANNELS)
    total_g = tl.zeros((SPLITS, CHANNELS), partial.dtype.element_ty)
    total_gx = tl.zeros((SPLITS, CHANNELS), partial.dtype.element_ty)
    for first in range(0, splits, SPLITS):
        for start in range(0, channels, CHANNELS):
            here, mask = first + split, start + channel < channels
            at = partial + ((here * images + image).to(tl.int64) * channels)[:, None] + (start + channel)[None, :]
            both = (here < splits)[:, None] & mask[None, :]
            g = tl.load(at, mask=both, other=0.0)
            gx = tl.load(at + splits.to(tl.int64) * images * channels, mask=both, other=0.0)
            if WEIGHT:
                factor = tl.load(weight + start + channel, mask=mask, other=0.0).to(g.dtype)[None, :]
                g, gx = g * factor, gx * factor
            total_g += g
            total_gx += gx
    inverse = tl.load(invstd + image)
    rise, offset = inverse * 0.0, inverse * 0.0
    if OWN:
        each = inverse / values.to(inverse.dtype)
        offset = -each * tl.sum(tl.sum(total_g, 0), 0)
        rise = -each * inverse * tl.sum(tl.sum(total_gx, 0), 0)
    tl.store(line + image, rise)
    tl.store(line + images + image, offset)


# --------------------------------------------------------------------------------------------------- launch


def _constants(splits: int) -> dict[str, Any]:
    held = pow2_at_least(splits)
    warps = 8 if held > _SPLITS else 1
    return {"SPLITS": held, "CHANNELS": _CHANNELS, "num_warps": warps, "enable_fp_fusion": True}


def statistics_launch(
    partial: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor | None = None
) -> tuple[Launch, Tensor]:
    """A launch and the (5, C) it fills: mean, biased variance, inverse deviation, scale and shift of the affine map.

    Args:
        partial: (3, splits, C), means, sums of squared deviations and counts of the splits.
        weight, bias: (C) of any dtype, contiguous, or None.
        out: what it fills, with contiguous rows; default: a new tensor.
    """
    _, splits, channels = partial.shape
    out = partial.new_empty((5, channels)) if out is None else out
    args = (
        out, partial, out if weight is None else weight, out if bias is None else bias, channels, splits, out.stride(0),
    )  # fmt: skip
    constants = {"EPS": eps, "WEIGHT": weight is not None, "BIAS": bias is not None, **_constants(splits)}
    return Launch(_statistics_kernel, (triton.cdiv(channels, _CHANNELS),), args, constants), out


def statistics(
    partial: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor | None = None
) -> Tensor:
    """See :func:`statistics_launch`."""
    launch, out = statistics_launch(partial, weight, bias, eps, out)
    launch.run(partial)
    return out


def line_launch(
    partial: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, count: int, batch_stats: bool, centred: bool
) -> tuple[Launch, Tensor, Tensor]:
    """A launch and what it fills, (3, C) and (2, C): the line's a, b, d; the gradients of weight and bias, in the
    weight's dtype if there is one.

    Args:
        partial: (2, splits, C), sums of grad and of grad * xhat over the splits.
        mean, invstd: (C), of partial's dtype, contiguous; weight: (C) of any dtype, contiguous, or None.
        count: positions of a channel.
        batch_stats: the statistics are the batch's own, else b and d are zero.
        centred: the line is ``a grad + b (x - mean) + d``, else ``a grad + b x + d``.
    """
    _, splits, channels = partial.shape
    line = partial.new_empty((3, channels))
    dtype = partial.dtype if weight is None else weight.dtype
    gradients = torch.empty((2, channels), dtype=dtype, device=partial.device)
    args = (
        line, *gradients.unbind(0), partial, mean, invstd, mean if weight is None else weight, max(count, 1), channels,
        splits,
    )  # fmt: skip
    constants = {"WEIGHT": weight is not None, "BATCH": batch_stats, "CENTRED": centred, **_constants(splits)}
    return Launch(_line_kernel, (triton.cdiv(channels, _CHANNELS),), args, constants), line, gradients


def line(
    partial: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, count: int, batch_stats: bool, centred: bool
) -> tuple[Tensor, ...]:
    """a, b, d, and the gradients of weight and bias (2, C); see :func:`line_launch`."""
    launch, made, gradients = line_launch(partial, mean, invstd, weight, count, batch_stats, centred)
    launch.run(partial)
    return *made.unbind(0), gradients


def image_line_launch(
    partial: Tensor, invstd: Tensor, weight: Tensor | None, values: int, own: bool
) -> tuple[Launch, Tensor]:
    """A launch and the (2, N) it fills: b and d of the line ``invstd weight grad + b (x - mean) + d`` of each image.

    Args:
        partial: (2, splits, N, C), sums of grad and of grad * xhat over the splits of an image's channels.
        invstd: (N), of partial's dtype, contiguous; weight: (C) of any dtype, contiguous, or None.
        values: of an image.
        own: the statistics are the image's, else b and d are zero.
    """
    _, splits, images, channels = partial.shape
    line = partial.new_empty((2, images))
    args = line, partial, invstd, invstd if weight is None else weight, max(values, 1), images, channels, splits
    rows = min(pow2_at_least(splits), 16)
    across = min(pow2_at_least(channels), 1024 // rows)
    constants = {
        "WEIGHT": weight is not None, "OWN": own, "SPLITS": rows, "CHANNELS": across, "num_warps": 4,
        "enable_fp_fusion": True,
    }  # fmt: skip
    return Launch(_image_line_kernel, (images,), args, constants), line


def image_line(partial: Tensor, invstd: Tensor, weight: Tensor | None, values: int, own: bool) -> tuple[Tensor, ...]:
    """See :func:`image_line_launch`."""
    launch, made = image_line_launch(partial, invstd, weight, values, own)
    launch.run(partial)
    return made.unbind(0)
