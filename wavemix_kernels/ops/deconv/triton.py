"""The Waveblock's transposed convolution (4x4 taps, stride 2, padding 1) in Triton, as implicit matrix products.

Along one axis output 2i + p is made of inputs i + p - 1 + t with taps 3 - p - 2t, t = 0, 1: four sub-pixel
convolutions of 2x2 taps, one for each parity (p, q) of an output pixel. A program makes one parity of a run of pixels;
the four parities of a run are neighbours in the grid, so what they read of the input comes from L2 after the first
touch. Statistics are partial results of fixed parts combined in a fixed order: the same in every run.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels import _native
from wavemix_kernels.ops import tuned
from wavemix_kernels.ops.common.chips import BY_WARPS, products_of
from wavemix_kernels.ops.common.precision import input_precision
from wavemix_kernels.ops.common.triton_launch import Launch
from wavemix_kernels.ops.deconv.tiles import DeconvConfig, Kind, config_for, search_space, widths
from wavemix_kernels.ops.norm import triton_finish as finish

_GROUPS = 128  # of partial statistics, which triton_finish takes


@triton.jit
def _places(start, pixels, h, w, ROWS: tl.constexpr):
    """Image, row and column of ROWS pixels from number `start` on, and which of them exist."""
    image = start // (h * w)  # the one 64-bit division: within the image 32 bits do
    number = (start - image * (h * w)).to(tl.int32) + tl.arange(0, ROWS)
    inside = number % (h * w)
    row = inside // w
    return image + (number // (h * w)).to(tl.int64), row, inside - row * w, start + tl.arange(0, ROWS) < pixels


@triton.jit
def _matrix(at, step, row, rows, col, cols):
    """A tile of a row-major matrix, zero outside."""
    return tl.load(
        at + row[:, None] * step + col[None, :], mask=(row < rows)[:, None] & (col < cols)[None, :], other=0.0
    )


# ----------------------------------------------------------------------------------------------------- forward
#
# A result's columns are held in two tiles, of W0 and W1 (launch.cover); a width of 0: no tile, and what Triton wants a
# value for is never used.

FREE = ("pixels", "h", "w")  # one binary for all of them


@triton.jit
def _finish(
    acc, at, bias, mean, m2, count, valid, col, o, BIAS: tl.constexpr, STATS: tl.constexpr
):  # fmt: skip
    """Stores rows of y; and of each channel's rounded values, as a BatchNorm sees them, the mean, the sum of squared
    deviations from it and the count."""
    if BIAS:
        acc += tl.load(bias + col, mask=col < o, other=0.0).to(tl.float32)[None, :]
    value = acc.to(at.dtype.element_ty)
    tl.store(at + col[None, :], value, mask=valid[:, None] & (col < o)[None, :])
    if STATS:
        seen = tl.where(valid[:, None], value.to(tl.float32), 0.0)
        here = tl.sum(valid.to(tl.float32), 0)
        centre = tl.sum(seen, 0) / here
        deviation = tl.where(valid[:, None], seen - centre[None, :], 0.0)
        tl.store(mean + col, centre, mask=col < o)
        tl.store(m2 + col, tl.sum(deviation * deviation, 0), mask=col < o)
        tl.store(count + col, tl.zeros((col.shape[0],), tl.float32) + here, mask=col < o)


@triton.jit(do_not_specialize=FREE)
def _forward_kernel(
    y, mean, m2, count, u, weight, bias,
    pixels: tl.int64, h, w, f, o, y_n: tl.int64, y_h: tl.int64, y_w: tl.int64, u_n: tl.int64, u_h: tl.int64,
    u_w: tl.int64,
    BIAS: tl.constexpr, STATS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, W0: tl.constexpr,
    W1: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """weight: (4, 4, f, o)."""
    COLUMNS: tl.constexpr = W0 + W1
    OTHER: tl.constexpr = W1 if W1 > 0 else 16
    parity = tl.program_id(0) % 4
    p, q = parity // 2, parity % 2
    blocks = tl.cdiv(o, COLUMNS)
    block = tl.program_id(0) // 4 // blocks
    first = (tl.program_id(0) // 4 % blocks) * COLUMNS
    image, row, col, valid = _places(block.to(tl.int64) * ROWS, pixels, h, w, ROWS)
    pixel = u + image * u_n + row * u_h + col * u_w
    out0 = first + tl.arange(0, W0)
    out1 = first + W0 + tl.arange(0, OTHER)
    acc0 = tl.zeros((ROWS, W0), tl.float32)
    acc1 = tl.zeros((ROWS, OTHER), tl.float32)
    for step in tl.range(0, 4 * tl.cdiv(f, DEPTH), num_stages=STAGES):
        s, t = step % 4 // 2, step % 2  # a pixel's four neighbours one after the other: mostly the same cache lines
        channel = step // 4 * DEPTH + tl.arange(0, DEPTH)
        down, along = p - 1 + s, q - 1 + t
        there = valid & (row + down >= 0) & (row + down < h) & (col + along >= 0) & (col + along < w)
        at = pixel[:, None] + (down * u_h + along * u_w) + channel[None, :]
        tile = tl.load(at, mask=there[:, None] & (channel < f)[None, :], other=0.0)
        tap = weight + ((3 - p - 2 * s) * 4 + 3 - q - 2 * t) * f * o
        acc0 = tl.dot(tile, _matrix(tap, o, channel, f, out0, o), acc0, input_precision=PRECISION)
        if W1 > 0:
            acc1 = tl.dot(tile, _matrix(tap, o, channel, f, out1, o), acc1, input_precision=PRECISION)
    at = y + image * y_n + (2 * row + p) * y_h + (2 * col + q) * y_w
    part = (block.to(tl.int64) * 4 + parity) * o
    _finish(acc0, at[:, None], bias, mean + part, m2 + part, count + part, valid, out0, o, BIAS, STATS)
    if W1 > 0:
        _finish(acc1, at[:, None], bias, mean + part, m2 + part, count + part, valid, out1, o, BIAS, STATS)


@triton.jit
def _merge_kernel(
    out_mean, out_m2, out_count, mean, m2, count, parts, channels, each, PARTS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Statistics of `each` parts from those of one by Chan's formula, as deviations from what was seen before."""
    group = tl.program_id(1)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    centre = tl.zeros((CHANNELS,), tl.float32)
    squares = tl.zeros((CHANNELS,), tl.float32)
    total = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, each, PARTS):
        part = group * each + start + tl.arange(0, PARTS)
        at = part.to(tl.int64)[:, None] * channels + channel[None, :]
        mask = ((start + tl.arange(0, PARTS) < each) & (part < parts))[:, None] & (channel < channels)[None, :]
        weight = tl.load(count + at, mask=mask, other=0.0)
        delta = tl.where(mask, tl.load(mean + at, mask=mask, other=0.0) - centre[None, :], 0.0)
        here = tl.sum(weight, 0)
        share = 1.0 / tl.maximum(here, 1.0)  # a count is 0 or at least 1
        shift = tl.sum(delta * weight, 0) * share
        rest = delta - shift[None, :]
        both = tl.maximum(total + here, 1.0)
        squares += tl.sum(tl.load(m2 + at, mask=mask, other=0.0) + rest * rest * weight, 0)
        squares += shift * shift * (total * (here / both))
        centre += shift * (here / both)
        total += here
    at = group.to(tl.int64) * channels + channel
    tl.store(out_mean + at, centre, mask=channel < channels)
    tl.store(out_m2 + at, squares, mask=channel < channels)
    tl.store(out_count + at, total, mask=channel < channels)


# --------------------------------------------------------------------------------------------------- launch


def _strides(image: Tensor) -> tuple[int, int, int]:
    """Strides of n, h and w; channels are innermost."""
    return image.stride(0), image.stride(2), image.stride(3)


def _sizes(u: Tensor, o: int) -> tuple[int, ...]:
    """pixels, h, w, f, o"""
    n, f, h, w = u.shape
    if h * w >= 2**30:
        raise ValueError(f"u: an image of {h} x {w} pixels; the kernels count fewer than 2**30 of them in one")
    return n * h * w, h, w, f, o


def _config(kernel: Kind, image: Tensor, columns: int, inner: int, rows: int) -> DeconvConfig:
    found: DeconvConfig | None = tuned.tile(
        f"deconv {kernel} tile", DeconvConfig, lambda: search_space(image.itemsize), image, extra=(columns,)
    )
    return found or _default(kernel, image, columns, inner, rows)


def _default(kernel: Kind, image: Tensor, columns: int, inner: int, rows: int) -> DeconvConfig:
    by_warps = products_of(image.device) in BY_WARPS
    count = _native.multiprocessors(image.device)
    return config_for(kernel, image.dtype.itemsize, columns, inner, rows, by_warps, input_precision(), count)


def _constants(config: DeconvConfig, columns: int) -> tuple[int, dict[str, Any]]:
    """And the blocks of columns."""
    w0, w1 = widths(columns, config.columns)
    return triton.cdiv(columns, w0 + w1), {
        "ROWS": config.rows, "DEPTH": config.depth, "W0": w0, "W1": w1, "STAGES": config.num_stages,
        "PRECISION": input_precision(), "num_warps": config.num_warps, "enable_fp_fusion": True,
    }  # fmt: skip


def forward_launch(
    y: Tensor, u: Tensor, weight: Tensor, bias: Tensor | None, stats: bool, config: DeconvConfig | None = None
) -> tuple[Launch, Tensor]:
    """A launch and, where `stats`, the (3, parts, O) partial means, squared deviations and counts it fills."""
    o = weight.shape[1]
    sizes = _sizes(u, o)
    config = config or _config("forward", u, o, u.shape[1], sizes[0])
    blocks, constants = _constants(config, o)
    runs = triton.cdiv(sizes[0], config.rows)
    partial = u.new_empty((3, 4 * runs if stats else 0, o), dtype=torch.float32)
    args = (
        y, *partial.unbind(0), u, weight.permute(2, 3, 0, 1).contiguous(), weight if bias is None else bias, *sizes,
        *_strides(y), *_strides(u),
    )  # fmt: skip
    grid = (4 * runs * blocks,)
    return Launch(_forward_kernel, grid, args, {**constants, "BIAS": bias is not None, "STATS": stats}), partial


def merge_launch(partial: Tensor) -> tuple[Launch, Tensor]:
    """A launch and the (3, groups, O) statistics of groups of parts it fills."""
    _, parts, channels = partial.shape
    each = triton.cdiv(parts, _GROUPS)
    out = partial.new_empty((3, triton.cdiv(parts, each), channels))
    args = (*out.unbind(0), *partial.unbind(0), parts, channels, each)
    across = 32  # a cache line
    constants = {"PARTS": 32, "CHANNELS": across, "num_warps": 4, "enable_fp_fusion": True}
    return Launch(_merge_kernel, (triton.cdiv(channels, across), out.shape[1]), args, constants), out


def forward(y: Tensor, u: Tensor, weight: Tensor, bias: Tensor | None, config: DeconvConfig | None = None) -> None:
    """Writes conv_transpose2d(u, weight, bias, stride=2, padding=1) into y.

    Args:
        y: (N, O, 2H, 2W), u: (N, F, H, W), fp32, fp16 or bf16, channels contiguous, any other strides.
        weight: (F, O, 4, 4), bias: (O) contiguous or None, of the same dtype.
        config: a tile other than :func:`config_for`'s.

    Raises:
        ValueError: an image has 2**30 pixels or more.
    """
    forward_launch(y, u, weight, bias, False, config)[0].run(u)


def forward_stats(
    y: Tensor, u: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    eps: float, config: DeconvConfig | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """:func:`forward`, and of y's (rounded) values what :func:`triton_finish.statistics_launch` makes for a BatchNorm
    of these parameters; NaN where there are no values."""
    launch, partial = forward_launch(y, u, weight, bias, True, config)
    launch.run(u)
    if partial.shape[1] > _GROUPS:
        launch, partial = merge_launch(partial)
        launch.run(u)
    return finish.statistics(partial, norm_weight, norm_bias, eps)
