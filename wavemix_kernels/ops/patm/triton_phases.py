"""One wave branch of PATM in Triton: BatchNorm's affine map, ReLU, sine and cosine, 7 taps along W or H, and its sums.

A program owns some lines of one image and some channels, and walks along the lines: what 7 taps reach lies in
registers, so no wave is made twice but for the 3 pixels beyond each end of a segment. Channels 2g and 2g+1 are
neighbours in one thread, so the outputs g and C/2 + g, which read them both, need no exchange.
Sums are partial sums of fixed parts added in a fixed order: results are the same in every run.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels.ops.common.triton_launch import Launch, pow2_at_least

_PROGRAMS = 1584  # of one warp each: twelve for each multiprocessor of an H100, which is what registers leave room for
_SHORTEST = 32  # pixels of a segment: the 6 beyond its ends, read twice, stay below a fifth


@dataclass(frozen=True)
class PhaseConfig:
    """A tile of lines x channels, a power of two each, at least two channels."""

    lines: int
    channels: int
    num_warps: int = 1


def config_for(backward: bool, itemsize: int, lines: int, channels: int) -> PhaseConfig:
    """The default: one warp, which needs no barriers and leaves enough programs of small images.

    A thread has four channels forward, two backward and in fp64. A pair of them takes 42 registers for taps and
    window, 70 with the gradients of the taps, so eight channels (16 bytes of a half type) would not fit: accesses are
    of 16 bytes in fp32 forward, else of 8 or 4, and a warp's make whole sectors. fp64 is for checks and may spill.
    """
    values, widest = (64, 32) if backward or itemsize == 8 else (128, 64)
    all_channels = max(2, pow2_at_least(channels))
    deep = min(values // min(widest, all_channels), pow2_at_least(lines))
    return PhaseConfig(deep, min(values // deep, all_channels))


def search_space(backward: bool) -> Iterator[PhaseConfig]:
    """Tiles worth timing."""
    values = 64 if backward else 128
    for num_warps in (1, 4):
        for channels in (16, 32, 64):
            yield PhaseConfig(values * num_warps // channels, channels, num_warps)


# ------------------------------------------------------------------------------------------------ in registers
#
# Tiles are (lines, channels); of the outputs (lines, pairs, 2), the last axis being the two halves of the output
# channels: cosine and sine parts.


@triton.jit
def _even_odd(x):
    """(lines, 2 pairs) -> the even and the odd channels, (lines, pairs) each."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _interleave(even, odd):
    """Inverse of _even_odd."""
    return tl.reshape(tl.join(even, odd), (even.shape[0], 2 * even.shape[1]))


@triton.jit
def _reduce_near(x):
    """x in [0, 8192] as a multiple of pi/2 and the rest: csrc/cpu/patm/sincos.h says why three steps are enough."""
    shifted = x * 0.636619772 + 12582912.0
    n = shifted - 12582912.0
    r = ((x - n * 1.5703125) - n * 4.837512969970703125e-4) - n * 7.54978995489188216e-8
    return r, shifted.to(tl.int32, bitcast=True)


@triton.jit
def _reduce_far(x):
    """x above 8192 (Payne and Hanek): its 24 bits times those 96 bits of 2/pi that leave quarter turns modulo 4 and 62
    bits behind the point. No fp32 number comes closer to a multiple of pi/2 than 2^-29.2 (16367173 * 2^72; Muller,
    Elementary Functions, on range reduction), so 32 bits of the rest are right."""
    bits = x.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x800000).to(tl.uint64)
    place = (bits >> 23) - 120  # of 2/pi's first bit wanted, counted from 32 zeros before its own first
    word = place >> 5
    # Two words from there on, and the two after them.
    high = tl.where(word == 0, 0x00000000A2F9836E, 0xA2F9836E4E441529)
    high = tl.where(word < 2, high, tl.where(word == 2, 0x4E441529FC2757D1, 0xFC2757D1F534DDC0))
    high = tl.where(word < 4, high, 0xF534DDC0DB629599).to(tl.uint64)
    low = tl.where(word == 0, 0x4E441529FC2757D1, 0xFC2757D1F534DDC0)
    low = tl.where(word < 2, low, tl.where(word == 2, 0xF534DDC0DB629599, 0xDB6295993C439041))
    low = tl.where(word < 4, low, 0x3C439041FE5163AB).to(tl.uint64)
    shift = (place & 31).to(tl.uint64)
    high = (high << shift) | ((low >> 1) >> (63 - shift))
    low = (low << shift) >> 32
    turns = mantissa * high + ((mantissa * low) >> 32)
    r = (turns << 2).to(tl.int64, bitcast=True).to(tl.float64) * 8.515303950216386e-20  # pi/2 * 2^-64
    # Infinity and NaN times 0 are NaN.
    return r.to(tl.float32) + x * 0.0, ((turns + 0x2000000000000000) >> 62).to(tl.int32)


@triton.jit
def _sincos(pre):
    """Sine and cosine of ReLU(pre), which has no upper bound; a NaN stays one. fp32: within 1.32 * 2^-24.

    Written out, as the library's two functions each reduce their argument and branch for every channel of a thread.
    """
    phase = tl.where(pre < 0, 0.0, pre)
    if pre.dtype == tl.float64:
        sine = tl.sin(phase)
        cosine = tl.cos(phase)
    else:
        r, quadrant = _reduce_near(phase)
        # Not negative, so bits compare as the phases do: 0x46000000 are those of 8192, and NaN's are larger.
        if tl.max(phase.to(tl.int32, bitcast=True)) > 0x46000000:
            far_r, far_quadrant = _reduce_far(phase)
            r = tl.where(phase <= 8192.0, r, far_r)
            quadrant = tl.where(phase <= 8192.0, quadrant, far_quadrant)
        s = r * r
        sin_r = r + r * s * ((-1.9515295891e-4 * s + 8.3321608736e-3) * s - 1.6666654611e-1)
        q = (2.443315711809948e-5 * s - 1.388731625493765e-3) * s + 4.166664568298827e-2
        cos_r = 1.0 - (0.5 * s - s * s * q)
        swap = (quadrant & 1) != 0
        sine = tl.where(swap, cos_r, sin_r).to(tl.int32, bitcast=True) ^ ((quadrant & 2) << 30)
        cosine = tl.where(swap, sin_r, cos_r).to(tl.int32, bitcast=True) ^ (((quadrant + 1) & 2) << 30)
        sine = sine.to(tl.float32, bitcast=True)
        cosine = cosine.to(tl.float32, bitcast=True)
    return sine, cosine


@triton.jit
def _tap(row, mask, NUMBER: tl.constexpr):
    return tl.load(row + NUMBER, mask=mask, other=0.0)[None, :, :]


@triton.jit
def _store_halves(out_cos, out_sin, value, mask):
    cosine, sine = tl.split(value.to(out_cos.dtype.element_ty))
    tl.store(out_cos, cosine, mask=mask)
    tl.store(out_sin, sine, mask=mask)


@triton.jit
def _within(mask, i, begin, end):
    """`mask` where begin <= i < end, else nothing. (A scalar condition would do, but for Triton's interpreter.)"""
    at = tl.zeros(mask.shape, tl.int32) + i
    return mask & (at >= begin) & (at < end)


@triton.jit
def _gradient(at, j, step, pairs, length, mask, factor, term, REAL: tl.constexpr):
    """That of the outputs of pixel j, zero outside the image."""
    inside = _within(mask, j, 0, length)
    cosine = tl.load(at + j * step, mask=inside, other=0.0)
    sine = tl.load(at + (j * step + pairs), mask=inside, other=0.0)
    return tl.where(inside[:, :, None], tl.join(cosine, sine).to(REAL) * factor + term, 0.0)


@triton.jit
def _position(unit, line_blocks, segments, segment, length, LINES: tl.constexpr):
    """Image, lines, first pixel and end of a unit of work; segments of one line come one after the other."""
    part = unit // segments
    begin = (unit - part * segments) * segment
    image = part // line_blocks
    line = (part - image * line_blocks) * LINES + tl.arange(0, LINES)
    return image.to(tl.int64), line.to(tl.int64), begin, tl.minimum(begin + segment, length)


# -------------------------------------------------------------------------------------------------- kernels
#
# Strides arrive divided by ALIGN: multiplying by the constant inside the kernel is what proves vectors aligned to the
# compiler without specialising on any value. `_a` is along the convolved axis, `_l` from line to line.

_SIZES = ("channels", "length", "lines", "line_blocks", "segment", "segments")
_FORWARD_STRIDES = tuple(f"{t}_{d}" for t in ("z", "theta", "also", "out") for d in "nla")
_BACKWARD_STRIDES = tuple(f"{t}_{d}" for t in ("grad", "z", "theta", "d_z", "d_theta", "d_c") for d in "nla")


@triton.jit(do_not_specialize=("images", *_SIZES, *_FORWARD_STRIDES))
def _forward_kernel(
    out, partial, z, theta, also, scale, shift, taps,
    images: tl.int64, channels, length, lines, line_blocks, segment, segments,
    z_n: tl.int64, z_l: tl.int64, z_a: tl.int64, theta_n: tl.int64, theta_l: tl.int64, theta_a: tl.int64,
    also_n: tl.int64, also_l: tl.int64, also_a: tl.int64, out_n: tl.int64, out_l: tl.int64, out_a: tl.int64,
    ALSO: tl.constexpr, ALIGN: tl.constexpr, LINES: tl.constexpr, CHANNELS: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """`partial` (parts, images, C) gets the sums of the outputs, and after those parts the sums of `also`."""
    channels *= ALIGN
    blocks = tl.cdiv(channels, CHANNELS)
    unit = tl.program_id(0) // blocks
    block = tl.program_id(0) - unit * blocks
    image, line, begin, end = _position(unit, line_blocks, segments, segment, length, LINES)
    pairs = channels // 2
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    pair = block * (CHANNELS // 2) + tl.arange(0, CHANNELS // 2)
    in_channels = channel < channels
    mask = (line < lines)[:, None] & in_channels[None, :]
    out_mask = (line < lines)[:, None] & (pair < pairs)[None, :]
    z += image * (z_n * ALIGN) + (line * (z_l * ALIGN))[:, None] + channel[None, :]
    theta += image * (theta_n * ALIGN) + (line * (theta_l * ALIGN))[:, None] + channel[None, :]
    also += image * (also_n * ALIGN) + (line * (also_l * ALIGN))[:, None] + channel[None, :]
    out_cos = out + image * (out_n * ALIGN) + (line * (out_l * ALIGN))[:, None] + pair[None, :]
    out_sin = out_cos + pairs
    z_a *= ALIGN
    theta_a *= ALIGN
    also_a *= ALIGN
    out_a *= ALIGN
    rise = tl.load(scale + channel, mask=in_channels, other=0.0)[None, :]
    offset = tl.load(shift + channel, mask=in_channels, other=0.0)[None, :]
    output = pair[:, None] + (tl.arange(0, 2) * pairs)[None, :]
    exists = (pair < pairs)[:, None] & (tl.arange(0, 2) < 2)[None, :]
    row = taps + output * 14
    even0 = _tap(row, exists, 0)
    even1 = _tap(row, exists, 1)
    even2 = _tap(row, exists, 2)
    even3 = _tap(row, exists, 3)
    even4 = _tap(row, exists, 4)
    even5 = _tap(row, exists, 5)
    even6 = _tap(row, exists, 6)
    odd0 = _tap(row, exists, 7)
    odd1 = _tap(row, exists, 8)
    odd2 = _tap(row, exists, 9)
    odd3 = _tap(row, exists, 10)
    odd4 = _tap(row, exists, 11)
    odd5 = _tap(row, exists, 12)
    odd6 = _tap(row, exists, 13)
    # acc0 is the output 3 pixels behind the wave at work, which completes it; acc5 lies 2 ahead.
    acc0 = tl.zeros((LINES, CHANNELS // 2, 2), REAL)
    acc1 = tl.zeros((LINES, CHANNELS // 2, 2), REAL)
    acc2 = tl.zeros((LINES, CHANNELS // 2, 2), REAL)
    acc3 = tl.zeros((LINES, CHANNELS // 2, 2), REAL)
    acc4 = tl.zeros((LINES, CHANNELS // 2, 2), REAL)
    acc5 = tl.zeros((LINES, CHANNELS // 2, 2), REAL)
    total = tl.zeros((LINES, CHANNELS // 2, 2), REAL)
    total_also = tl.zeros((LINES, CHANNELS), REAL)
    start = tl.maximum(begin - 3, 0)
    stop = tl.minimum(end + 3, length)
    z_next = tl.load(z + start * z_a, mask=mask, other=0.0)
    theta_next = tl.load(theta + start * theta_a, mask=mask, other=0.0)
    for i in range(start, stop):
        pre = theta_next.to(REAL) * rise + offset
        amplitude = z_next.to(REAL)
        # The next pixel is under way while this one is at work.
        more = _within(mask, i + 1, start, stop)
        z_next = tl.load(z + (i + 1) * z_a, mask=more, other=0.0)
        theta_next = tl.load(theta + (i + 1) * theta_a, mask=more, other=0.0)
        if ALSO:
            here = _within(mask, i, begin, end)
            total_also += tl.load(also + i * also_a, mask=here, other=0.0).to(REAL)
        sine, cosine = _sincos(pre)
        cos_even, cos_odd = _even_odd(amplitude * cosine)
        sin_even, sin_odd = _even_odd(amplitude * sine)
        even = tl.join(cos_even, sin_even)
        odd = tl.join(cos_odd, sin_odd)
        done = acc0 + even6 * even + odd6 * odd
        acc0 = acc1 + even5 * even + odd5 * odd
        acc1 = acc2 + even4 * even + odd4 * odd
        acc2 = acc3 + even3 * even + odd3 * odd
        acc3 = acc4 + even2 * even + odd2 * odd
        acc4 = acc5 + even1 * even + odd1 * odd
        acc5 = even0 * even + odd0 * odd
        if i - 3 >= begin:
            _store_halves(out_cos + (i - 3) * out_a, out_sin + (i - 3) * out_a, done, out_mask)
            total += done
    # Where the line ends nothing more comes in.
    for j in range(stop - 3, end):
        if j >= begin:
            _store_halves(out_cos + j * out_a, out_sin + j * out_a, acc0, out_mask)
            total += acc0
        acc0 = acc1
        acc1 = acc2
        acc2 = acc3
        acc3 = acc4
        acc4 = acc5
    part = unit - image * (line_blocks * segments)
    at = partial + (part * images + image) * channels
    tl.store(at + output, tl.sum(total, 0), mask=exists)
    if ALSO:
        at += images * channels * (line_blocks * segments)
        tl.store(at + channel, tl.sum(total_also, 0), mask=in_channels)


@triton.jit
def _store_tap(row, mask, value, NUMBER: tl.constexpr):
    tl.store(row + NUMBER, tl.sum(value, 0), mask=mask)


@triton.jit(do_not_specialize=("units", "splits", *_SIZES, *_BACKWARD_STRIDES))
def _backward_kernel(
    d_z, d_theta, d_c, partial_taps, partial_sums, grad, a, a_c, b, z, theta, scale, shift, center, taps,
    units, splits, channels, length, lines, line_blocks, segment, segments,
    grad_n: tl.int64, grad_l: tl.int64, grad_a: tl.int64, z_n: tl.int64, z_l: tl.int64, z_a: tl.int64,
    theta_n: tl.int64, theta_l: tl.int64, theta_a: tl.int64, d_z_n: tl.int64, d_z_l: tl.int64, d_z_a: tl.int64,
    d_theta_n: tl.int64, d_theta_l: tl.int64, d_theta_a: tl.int64, d_c_n: tl.int64, d_c_l: tl.int64, d_c_a: tl.int64,
    WEIGHTED: tl.constexpr, THIRD: tl.constexpr, CENTERED: tl.constexpr, ALIGN: tl.constexpr,
    LINES: tl.constexpr, CHANNELS: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """d = grad * a + b is the gradient of the outputs. The window is of d, so that amplitudes and phases are met once.

    `partial_taps` (splits, C, 2, 7), `partial_sums` (splits, 2, C).
    """
    channels *= ALIGN
    blocks = tl.cdiv(channels, CHANNELS)
    split = tl.program_id(0) // blocks
    block = tl.program_id(0) - split * blocks
    pairs = channels // 2
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    pair = block * (CHANNELS // 2) + tl.arange(0, CHANNELS // 2)
    in_channels = channel < channels
    rise = tl.load(scale + channel, mask=in_channels, other=0.0)[None, :]
    offset = tl.load(shift + channel, mask=in_channels, other=0.0)[None, :]
    output = pair[:, None] + (tl.arange(0, 2) * pairs)[None, :]
    exists = (pair < pairs)[:, None] & (tl.arange(0, 2) < 2)[None, :]
    row = taps + output * 14
    even0 = _tap(row, exists, 0)
    even1 = _tap(row, exists, 1)
    even2 = _tap(row, exists, 2)
    even3 = _tap(row, exists, 3)
    even4 = _tap(row, exists, 4)
    even5 = _tap(row, exists, 5)
    even6 = _tap(row, exists, 6)
    odd0 = _tap(row, exists, 7)
    odd1 = _tap(row, exists, 8)
    odd2 = _tap(row, exists, 9)
    odd3 = _tap(row, exists, 10)
    odd4 = _tap(row, exists, 11)
    odd5 = _tap(row, exists, 12)
    odd6 = _tap(row, exists, 13)
    zero = tl.zeros((LINES, CHANNELS // 2, 2), REAL)
    d_even0 = zero
    d_even1 = zero
    d_even2 = zero
    d_even3 = zero
    d_even4 = zero
    d_even5 = zero
    d_even6 = zero
    d_odd0 = zero
    d_odd1 = zero
    d_odd2 = zero
    d_odd3 = zero
    d_odd4 = zero
    d_odd5 = zero
    d_odd6 = zero
    sum_pre = tl.zeros((LINES, CHANNELS), REAL)
    sum_pre_theta = tl.zeros((LINES, CHANNELS), REAL)
    middle = tl.zeros((1, CHANNELS), REAL)
    if CENTERED:
        middle = tl.load(center + channel, mask=in_channels, other=0.0)[None, :]
    for unit in range(split, units, splits):
        image, line, begin, end = _position(unit, line_blocks, segments, segment, length, LINES)
        mask = (line < lines)[:, None] & in_channels[None, :]
        out_mask = (line < lines)[:, None] & (pair < pairs)[None, :]
        z_at = z + image * (z_n * ALIGN) + (line * (z_l * ALIGN))[:, None] + channel[None, :]
        theta_at = theta + image * (theta_n * ALIGN) + (line * (theta_l * ALIGN))[:, None] + channel[None, :]
        d_z_at = d_z + image * (d_z_n * ALIGN) + (line * (d_z_l * ALIGN))[:, None] + channel[None, :]
        d_theta_at = d_theta + image * (d_theta_n * ALIGN) + (line * (d_theta_l * ALIGN))[:, None] + channel[None, :]
        line_at = grad + image * (grad_n * ALIGN) + (line * (grad_l * ALIGN))[:, None]
        pair_at = line_at + pair[None, :]
        term = tl.load(b + image * channels + output, mask=exists, other=0.0)[None, :, :]
        factor = tl.full((1, CHANNELS // 2, 2), 1.0, REAL)
        if WEIGHTED:
            factor = tl.load(a + image * channels + output, mask=exists, other=0.0)[None, :, :]
        step = grad_a * ALIGN
        # d0 ... d6: 3 pixels behind the one at work to 3 ahead; zero outside the image.
        d0 = _gradient(pair_at, begin - 3, step, pairs, length, out_mask, factor, term, REAL)
        d1 = _gradient(pair_at, begin - 2, step, pairs, length, out_mask, factor, term, REAL)
        d2 = _gradient(pair_at, begin - 1, step, pairs, length, out_mask, factor, term, REAL)
        d3 = _gradient(pair_at, begin, step, pairs, length, out_mask, factor, term, REAL)
        d4 = _gradient(pair_at, begin + 1, step, pairs, length, out_mask, factor, term, REAL)
        d5 = _gradient(pair_at, begin + 2, step, pairs, length, out_mask, factor, term, REAL)
        for i in range(begin, end):
            d6 = _gradient(pair_at, i + 3, step, pairs, length, out_mask, factor, term, REAL)
            amplitude = tl.load(z_at + i * (z_a * ALIGN), mask=mask, other=0.0).to(REAL)
            value = tl.load(theta_at + i * (theta_a * ALIGN), mask=mask, other=0.0).to(REAL)
            pre = value * rise + offset
            sine, cosine = _sincos(pre)
            cos_even, cos_odd = _even_odd(amplitude * cosine)
            sin_even, sin_odd = _even_odd(amplitude * sine)
            even = tl.join(cos_even, sin_even)
            odd = tl.join(cos_odd, sin_odd)
            d_even0 += d6 * even
            d_even1 += d5 * even
            d_even2 += d4 * even
            d_even3 += d3 * even
            d_even4 += d2 * even
            d_even5 += d1 * even
            d_even6 += d0 * even
            d_odd0 += d6 * odd
            d_odd1 += d5 * odd
            d_odd2 += d4 * odd
            d_odd3 += d3 * odd
            d_odd4 += d2 * odd
            d_odd5 += d1 * odd
            d_odd6 += d0 * odd
            even = d6 * even0 + d5 * even1 + d4 * even2 + d3 * even3 + d2 * even4 + d1 * even5 + d0 * even6
            odd = d6 * odd0 + d5 * odd1 + d4 * odd2 + d3 * odd3 + d2 * odd4 + d1 * odd5 + d0 * odd6
            real_even, imaginary_even = tl.split(even)
            real_odd, imaginary_odd = tl.split(odd)
            real = _interleave(real_even, real_odd)
            imaginary = _interleave(imaginary_even, imaginary_odd)
            d_pre = tl.where(pre <= 0, 0.0, amplitude * (imaginary * cosine - real * sine))
            sum_pre += d_pre
            sum_pre_theta += d_pre * (value - middle)
            amplitude = real * cosine + imaginary * sine
            tl.store(d_z_at + i * (d_z_a * ALIGN), amplitude.to(d_z.dtype.element_ty), mask=mask)
            tl.store(d_theta_at + i * (d_theta_a * ALIGN), (d_pre * rise).to(d_theta.dtype.element_ty), mask=mask)
            d0 = d1
            d1 = d2
            d2 = d3
            d3 = d4
            d4 = d5
            d5 = d6
        if THIRD:
            # The same pixels once more, from cache: in the loop above, registers would not suffice.
            factor = tl.load(a_c + image * channels + channel, mask=in_channels, other=0.0)[None, :]
            term = tl.load(b + image * channels + channel, mask=in_channels, other=0.0)[None, :]
            natural_at = line_at + channel[None, :]
            d_c_at = d_c + image * (d_c_n * ALIGN) + (line * (d_c_l * ALIGN))[:, None] + channel[None, :]
            for i in range(begin, end):
                g = tl.load(natural_at + i * step, mask=mask, other=0.0).to(REAL) * factor + term
                tl.store(d_c_at + i * (d_c_a * ALIGN), g.to(d_c.dtype.element_ty), mask=mask)
    row = partial_taps + split.to(tl.int64) * (channels * 14) + output * 14
    _store_tap(row, exists, d_even0, 0)
    _store_tap(row, exists, d_even1, 1)
    _store_tap(row, exists, d_even2, 2)
    _store_tap(row, exists, d_even3, 3)
    _store_tap(row, exists, d_even4, 4)
    _store_tap(row, exists, d_even5, 5)
    _store_tap(row, exists, d_even6, 6)
    _store_tap(row, exists, d_odd0, 7)
    _store_tap(row, exists, d_odd1, 8)
    _store_tap(row, exists, d_odd2, 9)
    _store_tap(row, exists, d_odd3, 10)
    _store_tap(row, exists, d_odd4, 11)
    _store_tap(row, exists, d_odd5, 12)
    _store_tap(row, exists, d_odd6, 13)
    at = partial_sums + split.to(tl.int64) * (channels * 2) + channel
    tl.store(at, tl.sum(sum_pre, 0), mask=in_channels)
    tl.store(at + channels, tl.sum(sum_pre_theta, 0), mask=in_channels)


# --------------------------------------------------------------------------------------------------- launch


class Branch(NamedTuple):
    """One branch's inputs: images (N, C, H, W) with contiguous channels; scale, shift (C) and taps (C, 2, 1, 7) or
    (C, 2, 7, 1), contiguous, fp32 (fp64 for fp64). C is even."""

    z: Tensor
    theta: Tensor
    scale: Tensor
    shift: Tensor
    taps: Tensor

    @property
    def axis(self) -> int:
        """What the taps lie along."""
        return 2 if self.taps.shape[3] == 1 else 3


class Plan(NamedTuple):
    """How a pass is cut: a unit is a segment of some lines of an image."""

    config: PhaseConfig
    blocks: int  # of channels
    sizes: dict[str, int]
    units: int
    strides: dict[str, int]
    constants: dict[str, Any]


def _plan(branch: Branch, tensors: dict[str, Tensor], backward: bool, config: PhaseConfig | None) -> Plan:
    n, c, *plane = branch.z.shape
    length, lines = plane[branch.axis - 2], plane[3 - branch.axis]
    config = config or config_for(backward, branch.z.dtype.itemsize, lines, c)
    blocks, line_blocks = triton.cdiv(c, config.channels), triton.cdiv(lines, config.lines)
    wanted = triton.cdiv(_PROGRAMS, max(1, n * blocks * line_blocks))
    segment = max(1, triton.cdiv(length, max(1, min(wanted, length // _SHORTEST))))
    segments = triton.cdiv(length, segment)
    axes = {"n": 0, "l": 5 - branch.axis, "a": branch.axis}
    strides = {f"{name}_{d}": t.stride(axis) for name, t in tensors.items() for d, axis in axes.items()}
    align = 4 if c % 4 == 0 and all(stride % 4 == 0 for stride in strides.values()) else 1
    constants = {
        "ALIGN": align, "LINES": config.lines, "CHANNELS": config.channels, "num_warps": config.num_warps,
        "REAL": tl.float64 if branch.z.dtype == torch.float64 else tl.float32, "enable_fp_fusion": True,
    }  # fmt: skip
    sizes = {"channels": c // align, "length": length, "lines": lines, "line_blocks": line_blocks, "segment": segment,
             "segments": segments}  # fmt: skip
    strides = {name: stride // align for name, stride in strides.items()}
    return Plan(config, blocks, sizes, n * line_blocks * segments, strides, constants)


def _launch(kernel: Any, programs: int, given: dict[str, Any], constants: dict[str, Any]) -> Launch:
    """By the names of the kernel's own arguments."""
    return Launch(kernel, (programs,), tuple(given[name] for name in kernel.arg_names if name in given), constants)


def forward_launch(
    out: Tensor, branch: Branch, also: Tensor | None = None, config: PhaseConfig | None = None
) -> tuple[Launch, Tensor]:
    """A launch and the (parts, N, C) partial sums it fills."""
    third = branch.z if also is None else also
    images = {"z": branch.z, "theta": branch.theta, "also": third, "out": out}
    plan = _plan(branch, images, False, config)
    n, c = branch.z.shape[:2]
    parts = plan.sizes["line_blocks"] * plan.sizes["segments"]
    partial = branch.scale.new_empty((parts if also is None else 2 * parts, n, c))
    given = {**branch._asdict(), **images, "partial": partial, "images": n, **plan.sizes, **plan.strides}
    launch = _launch(_forward_kernel, plan.units * plan.blocks, given, {**plan.constants, "ALSO": also is not None})
    return launch, partial


def forward(out: Tensor, branch: Branch, also: Tensor | None = None, config: PhaseConfig | None = None) -> Tensor:
    """Writes the branch into `out` (N, C, H, W; contiguous channels).

    Returns (parts, N, C), to be added up: the sums over H and W of the branch before it is rounded, and of `also`.
    """
    launch, partial = forward_launch(out, branch, also, config)
    launch.run(out)
    return partial


class Cotangent(NamedTuple):
    """The gradient of a branch's outputs, ``grad * a + b``; that of the third branch is ``grad * a_c + b``."""

    grad: Tensor
    a: Tensor | None
    b: Tensor
    a_c: Tensor | None
    center: Tensor | None


def backward_launch(
    d_z: Tensor, d_theta: Tensor, d_c: Tensor | None, cotangent: Cotangent, branch: Branch,
    config: PhaseConfig | None = None,
) -> tuple[Launch, Tensor, Tensor]:  # fmt: skip
    """A launch and the partial sums it fills: (splits, C, 2, 7) of the taps' gradients, (splits, 2, C)."""
    grad, a, b, a_c, center = cotangent
    images = {"grad": grad, "z": branch.z, "theta": branch.theta, "d_z": d_z, "d_theta": d_theta,
              "d_c": d_z if d_c is None else d_c}  # fmt: skip
    plan = _plan(branch, images, True, config)
    # As few units each as make enough programs, and the same number each.
    each = max(1, plan.units * plan.blocks // _PROGRAMS)
    splits = triton.cdiv(plan.units, each)
    c = branch.z.shape[1]
    partial_taps = b.new_empty((splits, c, 2, 7))
    partial_sums = b.new_empty((splits, 2, c))
    given = {
        **branch._asdict(), **images, "partial_taps": partial_taps, "partial_sums": partial_sums,
        "a": b if a is None else a, "b": b, "a_c": b if a_c is None else a_c, "center": b if center is None else center,
        "units": plan.units, "splits": splits, **plan.sizes, **plan.strides,
    }  # fmt: skip
    constants = {
        **plan.constants, "WEIGHTED": a is not None, "THIRD": d_c is not None, "CENTERED": center is not None
    }  # fmt: skip
    return _launch(_backward_kernel, splits * plan.blocks, given, constants), partial_taps, partial_sums


def backward(
    d_z: Tensor, d_theta: Tensor, d_c: Tensor | None, cotangent: Cotangent, branch: Branch,
    config: PhaseConfig | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Writes the gradients of z, theta (through a constant affine map) and, where there is one, of the third branch.

    Returns those of the taps, and (2, C) the sums of d and of ``d * (theta - center)``, with d the gradient of the
    phase before ReLU.
    """
    launch, taps, sums = backward_launch(d_z, d_theta, d_c, cotangent, branch, config)
    launch.run(d_z)
    return taps.sum(0).view(branch.taps.shape), sums.sum(0)
