"""The Waveblock's transposed convolution (4x4 taps, stride 2, padding 1) in Triton, as implicit matrix products.

Along one axis output 2i + p is made of inputs i + p - 1 + t with taps 3 - p - 2t, t = 0, 1: four sub-pixel
convolutions of 2x2 taps, one for each parity (p, q) of an output pixel. A program makes one parity of a patch of
pixels, whose sides are powers of two: what its threads hold of places are constants and one offset each. The four taps
of a pixel follow each other, and read mostly what the first-level cache has. The four parities of a patch are
neighbours in the grid, so what they read of the input comes from L2 after the first touch. Statistics are partial
results of fixed parts combined in a fixed order: the same in every run.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels import _native
from wavemix_kernels.ops import tuned
from wavemix_kernels.ops.common.chips import products_of
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

FREE = ("images", "pixels", "h", "w")  # one binary for all of them


@triton.jit
def _begin(residual, rows, valid, col, o, RESIDUAL: tl.constexpr, FULL: tl.constexpr):
    """The sums' initial values: zero, or an image's pixels, whose registers are free again before the loop."""
    acc = tl.zeros((valid.shape[0], col.shape[0]), tl.float32)
    if RESIDUAL:
        if FULL:
            acc += tl.load(residual + (rows[:, None] + col[None, :])).to(tl.float32)
        else:
            there = valid[:, None] & (col < o)[None, :]
            acc += tl.load(residual + (rows[:, None] + col[None, :]), mask=there, other=0.0).to(tl.float32)
    return acc


@triton.jit
def _finish(
    acc, at, rows, bias, mean, m2, count, valid, col, o, BIAS: tl.constexpr, STATS: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    """Stores rows of y; and of each channel's rounded values, as a BatchNorm sees them, the mean, the sum of squared
    deviations from it and the count."""
    if BIAS:
        acc += tl.load(bias + col, mask=col < o, other=0.0).to(tl.float32)[None, :]
    value = acc.to(at.dtype.element_ty)
    if FULL:
        tl.store(at + (rows[:, None] + col[None, :]), value)
    else:
        tl.store(at + (rows[:, None] + col[None, :]), value, mask=valid[:, None] & (col < o)[None, :])
    if STATS:
        seen = value.to(tl.float32)
        if FULL:
            here = 1.0 * valid.shape[0]
            centre = tl.sum(seen, 0) / here
            deviation = seen - centre[None, :]
        else:
            seen = tl.where(valid[:, None], seen, 0.0)
            here = tl.sum(valid.to(tl.float32), 0)
            centre = tl.sum(seen, 0) / here
            deviation = tl.where(valid[:, None], seen - centre[None, :], 0.0)
        tl.store(mean + col, centre, mask=col < o)
        tl.store(m2 + col, tl.sum(deviation * deviation, 0), mask=col < o)
        tl.store(count + col, tl.zeros((col.shape[0],), tl.float32) + here, mask=col < o)


@triton.jit(do_not_specialize=FREE)
def _forward_kernel(
    y, mean, m2, count, u, weight, bias, residual,
    images, h, w, f, o, weight_tap, weight_f, y_n: tl.int64, y_h: tl.int64, y_w: tl.int64, u_n: tl.int64,
    u_h: tl.int64, u_w: tl.int64, r_n: tl.int64, r_h: tl.int64, r_w: tl.int64,
    BIAS: tl.constexpr, STATS: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, DOWN: tl.constexpr,
    ACROSS: tl.constexpr, DEPTH: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, WHOLE: tl.constexpr,
    FULL: tl.constexpr, FAR: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """weight: 16 taps of (f, o), o contiguous. WHOLE: channels fill the tiles; FULL: pixels too; FAR: a patch's offsets
    take 64 bits."""
    COLUMNS: tl.constexpr = W0 + W1
    OTHER: tl.constexpr = W1 if W1 > 0 else 16
    OFFSET: tl.constexpr = tl.int64 if FAR else tl.int32
    parity = tl.program_id(0) % 4
    p, q = parity // 2, parity % 2
    blocks = tl.cdiv(o, COLUMNS)
    patch = tl.program_id(0) // 4 // blocks
    first = (tl.program_id(0) // 4 % blocks) * COLUMNS
    wide, high = tl.cdiv(w, ACROSS), tl.cdiv(h, DOWN)
    image0 = (patch // (wide * high) * (ROWS // (DOWN * ACROSS))).to(tl.int64)
    row0, col0 = patch // wide % high * DOWN, patch % wide * ACROSS
    item = tl.arange(0, ROWS)
    image, row, col = item // (DOWN * ACROSS), item // ACROSS % DOWN, item % ACROSS
    valid = (image0 + image < images) & (row0 + row < h) & (col0 + col < w)
    # A pixel of this parity takes four neighbours; bit 2s + t: there is one.
    top, left = row0 + row + (p - 1), col0 + col + (q - 1)
    there = (top >= 0).to(tl.int32) * 3 + (top + 1 < h).to(tl.int32) * 12
    there &= (left >= 0).to(tl.int32) * 5 + (left + 1 < w).to(tl.int32) * 10
    there = tl.where(valid, there, 0)
    inner = tl.arange(0, DEPTH)
    start = u + image0 * u_n + (row0 + p - 1) * u_h + (col0 + q - 1) * u_w
    tiled = (image * u_n.to(OFFSET) + row * u_h.to(OFFSET) + col * u_w.to(OFFSET))[:, None] + inner[None, :]
    out0 = first + tl.arange(0, W0)
    out1 = first + W0 + tl.arange(0, OTHER)
    at0 = (inner * weight_f)[:, None] + out0[None, :]
    at1 = (inner * weight_f)[:, None] + out1[None, :]
    other = residual + image0 * r_n + (2 * row0 + p) * r_h + (2 * col0 + q) * r_w
    pixel = image * r_n.to(OFFSET) + 2 * row * r_h.to(OFFSET) + 2 * col * r_w.to(OFFSET)
    acc0 = _begin(other, pixel, valid, out0, o, RESIDUAL, FULL)
    acc1 = tl.zeros((ROWS, OTHER), tl.float32)
    if W1 > 0:
        acc1 = _begin(other, pixel, valid, out1, o, RESIDUAL, FULL)
    for step in tl.range(0, 4 * tl.cdiv(f, DEPTH), num_stages=STAGES):
        s, t = step % 4 // 2, step % 2  # a pixel's four neighbours one after the other: mostly the same cache lines
        channel = step // 4 * DEPTH
        taken = ((there >> (step % 4)) & 1) != 0
        at = (start + (s * u_h + t * u_w + channel)) + tiled
        tap = weight + ((3 - p - 2 * s) * 4 + 3 - q - 2 * t) * weight_tap + channel * weight_f
        if WHOLE:
            tile = tl.load(at, mask=taken[:, None], other=0.0, cache_modifier=".ca")
            tile0 = tl.load(tap + at0)
        else:
            known = channel + inner < f
            tile = tl.load(at, mask=taken[:, None] & known[None, :], other=0.0, cache_modifier=".ca")
            tile0 = tl.load(tap + at0, mask=known[:, None] & (out0 < o)[None, :], other=0.0)
        acc0 = tl.dot(tile, tile0, acc0, input_precision=PRECISION)
        if W1 > 0:
            if WHOLE:
                tile1 = tl.load(tap + at1)
            else:
                tile1 = tl.load(tap + at1, mask=known[:, None] & (out1 < o)[None, :], other=0.0)
            acc1 = tl.dot(tile, tile1, acc1, input_precision=PRECISION)
    at = y + image0 * y_n + (2 * row0 + p) * y_h + (2 * col0 + q) * y_w
    pixel = image * y_n.to(OFFSET) + 2 * row * y_h.to(OFFSET) + 2 * col * y_w.to(OFFSET)
    part = (patch.to(tl.int64) * 4 + parity) * o
    _finish(acc0, at, pixel, bias, mean + part, m2 + part, count + part, valid, out0, o, BIAS, STATS, FULL)
    if W1 > 0:
        _finish(acc1, at, pixel, bias, mean + part, m2 + part, count + part, valid, out1, o, BIAS, STATS, FULL)


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


def _by_taps(weight: Tensor) -> Tensor:
    """(4, 4, F, O), O contiguous, taps evenly apart: no copy of a weight in channels_last."""
    taps = weight.permute(2, 3, 0, 1)
    return taps if taps.stride(3) == 1 and taps.stride(0) == 4 * taps.stride(1) else taps.contiguous()


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
    products, count = products_of(image.device), _native.multiprocessors(image.device)
    return config_for(kernel, image.dtype.itemsize, columns, inner, rows, products, input_precision(), count)


def _constants(config: DeconvConfig, columns: int) -> tuple[int, dict[str, Any]]:
    """And the blocks of columns."""
    w0, w1 = widths(columns, config.columns)
    return triton.cdiv(columns, w0 + w1), {
        "ROWS": config.rows, "DEPTH": config.depth, "W0": w0, "W1": w1, "STAGES": config.num_stages,
        "PRECISION": input_precision(), "num_warps": config.num_warps, "enable_fp_fusion": True,
    }  # fmt: skip


def _box(rows: int, n: int, h: int, w: int) -> tuple[int, int, int]:
    """Images, rows and columns of a patch of `rows` pixels: of those that cover the batch with the fewest, the one of
    the fewest images, then the widest."""
    sides = [1 << k for k in range(rows.bit_length())]
    boxes = [(rows // (down * across), down, across) for across in sides for down in sides if down * across <= rows]
    return min(boxes, key=lambda box: (_patches(box, n, h, w), box[0], -box[2]))


def _patches(box: tuple[int, int, int], n: int, h: int, w: int) -> int:
    return math.prod(triton.cdiv(size, side) for size, side in zip((n, h, w), box, strict=True))


def forward_launch(
    y: Tensor, u: Tensor, weight: Tensor, bias: Tensor | None, stats: bool, config: DeconvConfig | None = None,
    residual: Tensor | None = None,
) -> tuple[Launch, Tensor]:  # fmt: skip
    """A launch and, where `stats`, the (3, parts, O) partial means, squared deviations and counts it fills."""
    n, f, h, w = u.shape
    o = weight.shape[1]
    config = config or _config("forward", u, o, f, _sizes(u, o)[0])
    blocks, constants = _constants(config, o)
    each, down, across = box = _box(config.rows, n, h, w)
    patches = _patches(box, n, h, w)
    partial = u.new_empty((3, 4 * patches if stats else 0, o), dtype=torch.float32)
    other, taps = y if residual is None else residual, _by_taps(weight)
    args = (
        y, *partial.unbind(0), u, taps, weight if bias is None else bias, other, n, h, w, f, o, taps.stride(1),
        taps.stride(2), *_strides(y), *_strides(u), *_strides(other),
    )  # fmt: skip
    whole = f % config.depth == 0 and o == blocks * (constants["W0"] + constants["W1"])
    reach = max(
        each * s_n + size * (down * s_h + across * s_w)
        for size, (s_n, s_h, s_w) in ((2, _strides(y)), (1, _strides(u)), (2, _strides(other)))
    )
    constants |= {
        "BIAS": bias is not None, "STATS": stats, "RESIDUAL": residual is not None, "DOWN": down, "ACROSS": across,
        "WHOLE": whole, "FULL": whole and n % each == h % down == w % across == 0, "FAR": reach >= 2**31,
    }  # fmt: skip
    return Launch(_forward_kernel, (4 * patches * blocks,), args, constants), partial


def merge_launch(partial: Tensor) -> tuple[Launch, Tensor]:
    """A launch and the (3, groups, O) statistics of groups of parts it fills."""
    _, parts, channels = partial.shape
    each = triton.cdiv(parts, _GROUPS)
    out = partial.new_empty((3, triton.cdiv(parts, each), channels))
    args = (*out.unbind(0), *partial.unbind(0), parts, channels, each)
    across = 32  # a cache line
    constants = {"PARTS": 32, "CHANNELS": across, "num_warps": 4, "enable_fp_fusion": True}
    return Launch(_merge_kernel, (triton.cdiv(channels, across), out.shape[1]), args, constants), out


def forward(
    y: Tensor, u: Tensor, weight: Tensor, bias: Tensor | None, config: DeconvConfig | None = None,
    residual: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes conv_transpose2d(u, weight, bias, stride=2, padding=1) into y, plus `residual`, added before rounding.

    Args:
        y: (N, O, 2H, 2W), u: (N, F, H, W), fp32, fp16 or bf16, channels contiguous, any other strides.
        weight: (F, O, 4, 4), bias: (O) contiguous or None, of the same dtype.
        residual: as y, or None.
        config: a tile other than :func:`config_for`'s.

    Raises:
        ValueError: an image has 2**30 pixels or more.
    """
    forward_launch(y, u, weight, bias, False, config, residual)[0].run(u)


def forward_stats(
    y: Tensor, u: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    eps: float, config: DeconvConfig | None = None,
) -> Tensor:  # fmt: skip
    """:func:`forward`, and of y's (rounded) values what :func:`triton_finish.statistics_launch` makes for a BatchNorm
    of these parameters; NaN where there are no values."""
    launch, partial = forward_launch(y, u, weight, bias, True, config)
    launch.run(u)
    if partial.shape[1] > _GROUPS:
        launch, partial = merge_launch(partial)
        launch.run(u)
    return finish.statistics(partial, norm_weight, norm_bias, eps)
