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

_CHANNELS = 4  # of a program, a warp, which adds up all splits at once


@triton.jit
def _statistics_kernel(
    out, partial, weight, bias, channels, splits,
    EPS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, SPLITS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out (5, channels) from partial (3, splits, channels)."""
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
    tl.store(out + channels + channel, var, mask=inside)
    tl.store(out + 2 * channels + channel, invstd, mask=inside)
    tl.store(out + 3 * channels + channel, scale, mask=inside)
    tl.store(out + 4 * channels + channel, offset, mask=inside)


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


# --------------------------------------------------------------------------------------------------- launch


def _constants(splits: int) -> dict[str, Any]:
    return {"SPLITS": pow2_at_least(splits), "CHANNELS": _CHANNELS, "num_warps": 1, "enable_fp_fusion": True}


def statistics_launch(partial: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Launch, Tensor]:
    """A launch and the (5, C) it fills: mean, biased variance, inverse deviation, scale and shift of the affine map.

    Args:
        partial: (3, splits, C), means, sums of squared deviations and counts of the splits.
        weight, bias: (C) of any dtype, contiguous, or None.
    """
    _, splits, channels = partial.shape
    out = partial.new_empty((5, channels))
    args = (out, partial, out if weight is None else weight, out if bias is None else bias, channels, splits)
    constants = {"EPS": eps, "WEIGHT": weight is not None, "BIAS": bias is not None, **_constants(splits)}
    return Launch(_statistics_kernel, (triton.cdiv(channels, _CHANNELS),), args, constants), out


def statistics(partial: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """See :func:`statistics_launch`."""
    launch, out = statistics_launch(partial, weight, bias, eps)
    launch.run(partial)
    return out.unbind(0)


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
    """a, b, d and the gradients of weight and bias; see :func:`line_launch`."""
    launch, made, gradients = line_launch(partial, mean, invstd, weight, count, batch_stats, centred)
    launch.run(partial)
    return *made.unbind(0), *gradients.unbind(0)
