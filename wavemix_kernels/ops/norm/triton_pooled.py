"""BatchNorm, residual and the average over all pixels in Triton: one read of each image.

A program has an image's pixels of some channels, and sums kept for each place of a tile, as in
:mod:`triton_batch_norm`. Backward, an image's gradient is one number a channel: the sums of BatchNorm's gradient are
sums over images, of averages that forward made.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
import torch
import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels import _native
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.common.triton_launch import Launch, pow2_at_least
from wavemix_kernels.ops.common.triton_words import multiple, unit_of

_VALUES = 2048  # of a tile, on eight warps
_WIDEST, _NARROWEST = 64, 16  # channels of a tile: a cache line of the half types, a sector
_AT_ONCE = 4  # tiles of both images whose loads are in flight together
_CHANNELS, _HELD = 8, 4096  # backward: channels of a program, and values of its tile


@triton.jit(do_not_specialize=("positions",))
def _pool_kernel(
    out, means, y, x, scale, shift, positions: tl.int64, channels,
    y_n: tl.int64, y_p, y_c, x_n: tl.int64, x_p, x_c,
    AT_ONCE: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, UNIT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """The average of y of each image and channel, and that of y * scale + shift + x."""
    number = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    in_channels = channel < multiple(channels, UNIT)
    place = tl.arange(0, AT_ONCE).to(tl.int64)[:, None] * POSITIONS + tl.arange(0, POSITIONS)[None, :]
    of_y = (channel.to(tl.int64) * y_c)[None, None, :]
    of_x = (channel.to(tl.int64) * x_c)[None, None, :]
    sum_y = tl.zeros((POSITIONS, CHANNELS), REAL)
    sum_x = tl.zeros((POSITIONS, CHANNELS), REAL)
    for first in range(0, positions, AT_ONCE * POSITIONS):
        position = first + place
        mask = (position < positions)[:, :, None] & in_channels[None, None, :]
        at = number * y_n + (position * multiple(y_p, UNIT))[:, :, None] + of_y
        value_y = tl.load(y + at, mask=mask, other=0.0)
        at = number * x_n + (position * multiple(x_p, UNIT))[:, :, None] + of_x
        value_x = tl.load(x + at, mask=mask, other=0.0)
        sum_y += tl.sum(value_y.to(REAL), 0)
        sum_x += tl.sum(value_x.to(REAL), 0)
    count = tl.maximum(positions, 1).to(REAL)
    mean = tl.sum(sum_y, 0) / count
    factor = tl.load(scale + channel, mask=in_channels, other=0.0)
    offset = tl.load(shift + channel, mask=in_channels, other=0.0)
    value = mean * factor + offset + tl.sum(sum_x, 0) / count
    at = number * channels + channel
    tl.store(means + at, mean, mask=in_channels)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=in_channels)


@triton.jit(do_not_specialize=("images", "positions"))
def _pool_line_kernel(
    each, line, of_weight, of_bias, grad, means, mean, invstd, weight, images, positions: tl.int64, channels,
    WEIGHT: tl.constexpr, IMAGES: tl.constexpr, CHANNELS: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """From the averages' gradient: that of each of an image's values, the line of
    :func:`triton_finish.line_launch`, and the parameters' gradients."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    centre = tl.load(mean + channel, mask=inside, other=0.0)
    inverse = tl.load(invstd + channel, mask=inside, other=0.0)
    share = 1.0 / tl.maximum(positions, 1).to(REAL)
    sum_g = tl.zeros((IMAGES, CHANNELS), REAL)
    sum_gx = tl.zeros((IMAGES, CHANNELS), REAL)
    for first in range(0, images, IMAGES):
        image = first + tl.arange(0, IMAGES)
        at = image.to(tl.int64)[:, None] * channels + channel[None, :]
        mask = (image < images)[:, None] & inside[None, :]
        g = tl.load(grad + at, mask=mask, other=0.0).to(REAL)
        seen = tl.load(means + at, mask=mask, other=0.0)
        tl.store(each + at, (g * share).to(each.dtype.element_ty), mask=mask)
        sum_g += g
        sum_gx += g * (seen - centre[None, :])
    total_g, total_gx = tl.sum(sum_g, 0), tl.sum(sum_gx, 0) * inverse
    scale = inverse
    if WEIGHT:
        scale *= tl.load(weight + channel, mask=inside, other=0.0).to(REAL)
    part = share / tl.maximum(images, 1).to(REAL)
    rise = -scale * inverse * total_gx * part
    tl.store(line + channel, scale, mask=inside)
    tl.store(line + channels + channel, rise, mask=inside)
    tl.store(line + 2 * channels + channel, -scale * total_g * part - rise * centre, mask=inside)
    tl.store(of_weight + channel, total_gx.to(of_weight.dtype.element_ty), mask=inside)
    tl.store(of_bias + channel, total_g.to(of_bias.dtype.element_ty), mask=inside)


# --------------------------------------------------------------------------------------------------- launch


def _real(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def pool_launch(y: Tensor, scale: Tensor, shift: Tensor, x: Tensor) -> tuple[Launch, Tensor, Tensor]:
    """A launch and what it fills: averages of ``y * scale + shift + x`` over each image, (N, C, 1, 1) of x's dtype, and
    of y, (N, C) in fp32 (fp64 for fp64).

    Args:
        y, x: (N, C, H, W) of one dtype, rows of an image one after the other.
        scale, shift: (C), fp32 (fp64 for fp64), contiguous.
    """
    n, c, h, w = y.shape
    out, means = x.new_empty((n, c, 1, 1)), x.new_empty((n, c), dtype=accumulate_dtype(x.dtype))
    across, programs = _WIDEST, _native.multiprocessors(x.device)
    while across > _NARROWEST and n * triton.cdiv(c, across) < 2 * programs:
        across //= 2
    across = min(across, pow2_at_least(c))
    positions = min(_VALUES // across, pow2_at_least(h * w))
    strides = [(t.stride(0), t.stride(3), t.stride(1)) for t in (y, x)]
    args = (out, means, y, x, scale, shift, h * w, c, *strides[0], *strides[1])
    constants = {
        "AT_ONCE": _AT_ONCE, "CHANNELS": across, "POSITIONS": positions,
        "UNIT": unit_of(c, *(position for _, position, _ in strides)), "REAL": _real(x.dtype), "num_warps": 8,
        "enable_fp_fusion": True,
    }  # fmt: skip
    return Launch(_pool_kernel, (triton.cdiv(c, across), n), args, constants), out, means


def pool(y: Tensor, scale: Tensor, shift: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`pool_launch`."""
    launch, out, means = pool_launch(y, scale, shift, x)
    launch.run(x)
    return out, means


def line_launch(
    grad: Tensor, means: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, positions: int
) -> tuple[Launch, Tensor, Tensor, Tensor]:
    """A launch and what it fills: the gradient of each of an image's values, (N, C, 1, 1); (3, C), the line's a, b and
    d; and the gradients of weight and bias (2, C), in the weight's dtype if there is one.

    Args:
        grad: of the averages, (N, C, 1, 1), contiguous.
        means: of y, what :func:`pool_launch` fills.
        mean, invstd: (C), the batch's, of means' dtype, contiguous; weight: (C) of any dtype, contiguous, or None.
        positions: of an image.
    """
    n, c = means.shape
    each, line = torch.empty_like(grad), means.new_empty((3, c))
    gradients = means.new_empty((2, c), dtype=means.dtype if weight is None else weight.dtype)
    args = (
        each, line, *gradients.unbind(0), grad, means, mean, invstd, mean if weight is None else weight, n, positions,
        c,
    )  # fmt: skip
    constants = {
        "WEIGHT": weight is not None, "IMAGES": min(pow2_at_least(max(n, 1)), _HELD // _CHANNELS),
        "CHANNELS": _CHANNELS, "REAL": _real(means.dtype), "num_warps": 8, "enable_fp_fusion": True,
    }  # fmt: skip
    return Launch(_pool_line_kernel, (triton.cdiv(c, _CHANNELS),), args, constants), each, line, gradients


def line(
    grad: Tensor, means: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, positions: int
) -> tuple[Tensor, ...]:
    """The gradient of each value, a, b, d, and the gradients of weight and bias; see :func:`line_launch`."""
    launch, each, made, gradients = line_launch(grad, means, mean, invstd, weight, positions)
    launch.run(grad)
    return each, *made.unbind(0), gradients
