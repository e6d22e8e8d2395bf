"""Functions in registers that both passes of PATM's wave kernels use, in Triton: sines, channels in pairs, taps.

Tiles are (lines, channels). Outputs are (lines, pairs, 2); the last axis is the two halves of the output channels, of
cosine and sine parts.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
import triton
import triton.language as tl


@triton.jit
def even_odd(x):
    """(lines, 2 pairs) -> the even and the odd channels, (lines, pairs) each."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def interleave(even, odd):
    """Inverse of even_odd."""
    return tl.reshape(tl.join(even, odd), (even.shape[0], 2 * even.shape[1]))


@triton.jit
def _reduce_near(x):
    """x in [0, 8192] as a multiple of pi/2 and the rest. Three steps are exact enough: csrc/cpu/patm/sincos.h."""
    shifted = x * 0.636619772 + 12582912.0
    n = shifted - 12582912.0
    r = ((x - n * 1.5703125) - n * 4.837512969970703125e-4) - n * 7.54978995489188216e-8
    return r, shifted.to(tl.int32, bitcast=True)


@triton.jit
def _quarter_turns(x):
    """x above 8192 in quarter turns modulo 4, with 62 bits behind the point (Payne and Hanek): its 24 bits times those
    96 bits of 2/pi that leave them. No fp32 number comes closer to a multiple of pi/2 than 2^-29.2 (16367173 * 2^72;
    Muller, Elementary Functions, on range reduction), so 32 bits of the rest are right."""
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
    return mantissa * high + ((mantissa * low) >> 32)


@triton.jit
def _reduce_far(x):
    turns = _quarter_turns(x)
    r = (turns << 2).to(tl.int64, bitcast=True).to(tl.float64) * 8.515303950216386e-20  # pi/2 * 2^-64
    # Infinity and NaN times 0 are NaN.
    return r.to(tl.float32) + x * 0.0, ((turns + 0x2000000000000000) >> 62).to(tl.int32)


@triton.jit
def _sincos_of_chip(phase):
    """By an NVIDIA chip's own functions, behind a reduction to |r| <= pi: csrc/cuda/patm/sincos.cuh has the bound."""
    n = (phase * 0.159154943 + 12582912.0) - 12582912.0
    r = (phase - n * 6.283203125) + n * 1.78178204e-5
    if tl.max(phase.to(tl.int32, bitcast=True)) > 0x46000000:
        # All 64 bits of quarter turns, with a sign, are one turn.
        far = _quarter_turns(phase).to(tl.int64, bitcast=True).to(tl.float64) * 3.4061215800865545e-19  # 2 pi * 2^-64
        r = tl.where(phase <= 8192.0, r, far.to(tl.float32) + phase * 0.0)
    sine = tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [r], tl.float32, is_pure=True, pack=1)
    cosine = tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [r], tl.float32, is_pure=True, pack=1)
    return sine, cosine


@triton.jit
def sincos(pre, OF_CHIP: tl.constexpr):
    """Sine and cosine of ReLU(pre), which has no upper bound; a NaN stays one. fp32: within 1.32 * 2^-24, OF_CHIP
    13.9 * 2^-24.

    Written out, as the library's two functions each reduce their argument and branch for every channel of a thread.
    """
    phase = tl.where(pre < 0, 0.0, pre)
    if OF_CHIP:
        sine, cosine = _sincos_of_chip(phase)
    elif pre.dtype == tl.float64:
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
def tap(row, mask, NUMBER: tl.constexpr):
    return tl.load(row + NUMBER, mask=mask, other=0.0)[None, :, :]


@triton.jit
def store_halves(out_cos, out_sin, value, mask):
    cosine, sine = tl.split(value.to(out_cos.dtype.element_ty))
    tl.store(out_cos, cosine, mask=mask)
    tl.store(out_sin, sine, mask=mask)


@triton.jit
def within(mask, i, begin, end):
    """`mask` where begin <= i < end, else nothing. (A scalar condition would do, but for Triton's interpreter.)"""
    at = tl.zeros(mask.shape, tl.int32) + i
    return mask & (at >= begin) & (at < end)


@triton.jit
def gradient(at, j, step, pairs, length, mask, factor, term, REAL: tl.constexpr):
    """That of the outputs of pixel j, zero outside the image."""
    inside = within(mask, j, 0, length)
    cosine = tl.load(at + j * step, mask=inside, other=0.0)
    sine = tl.load(at + (j * step + pairs), mask=inside, other=0.0)
    return tl.where(inside[:, :, None], tl.join(cosine, sine).to(REAL) * factor + term, 0.0)


@triton.jit
def position(unit, line_blocks, segments, segment, length, LINES: tl.constexpr):
    """Image, lines, first pixel and end of a unit of work; segments of one line come one after the other."""
    part = unit // segments
    begin = (unit - part * segments) * segment
    image = part // line_blocks
    line = (part - image * line_blocks) * LINES + tl.arange(0, LINES)
    return image.to(tl.int64), line.to(tl.int64), begin, tl.minimum(begin + segment, length)
