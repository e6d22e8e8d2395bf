"""Haar analysis and synthesis in Triton: all levels in one pass over the image, any strides.

One program owns a tile of rows x cols samples in some (n, c) planes. Level 1, three quarters of the
traffic, is thread-local: samples of a quad come from separate loads that share one register layout (row-major
synthesis alone regroups its rows before storing them). LL stays in registers; the coarser levels, a quarter of
the samples at most, change hands through shared memory.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels.ops.haar.tiles import MAX_LEVELS, Layout, TileConfig, config_for, search_space, why_invalid

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
EDGES = (0, 1, -1)
_MAX_CHANNELS = 2**29  # 3 * channels plus a tile stays within int32, the type of indices inside a tile

# ------------------------------------------------------------------------------------------------ addresses
#
# LAYOUT says which dimension has stride 1: "rows" (w), "channels" (c; the bands then have c stride 3 and band
# stride 1), "strided" (nothing known). Tiles put it last: [plane, row, col] or, "channels", [row, col, plane].
# ALIGN, a power of two, divides every other stride and that dimension's size; in "rows" it is the image's, and
# level l has ALIGN >> l. Sizes and strides arrive divided by it: multiplying by the constant inside the kernel
# is what proves vectors aligned to the compiler, without specialising on any value, so that one binary serves
# all shapes of one alignment. VECTOR is the length of a 16-byte (or shorter, aligned) vector. Tiles stay
# three-dimensional with vectors inside the last axis: that alone fixes how lanes lie along memory.


@triton.jit
def _units(ALIGN: tl.constexpr, LEVEL: tl.constexpr, LAYOUT: tl.constexpr):
    """What level LEVEL's strides were divided by."""
    if LAYOUT != "rows":
        return ALIGN
    else:
        return (ALIGN >> LEVEL) if (ALIGN >> LEVEL) > 0 else 1


@triton.jit
def _size_at(size, ALIGN: tl.constexpr, LEVEL: tl.constexpr):
    """ceil(size * ALIGN / 2**LEVEL), visibly a multiple of ALIGN >> LEVEL."""
    if (ALIGN >> LEVEL) > 0:
        return size * (ALIGN >> LEVEL)
    else:
        return (size * ALIGN + ((1 << LEVEL) - 1)) >> LEVEL


@triton.jit
def _tile_origin(
    planes, height, width, ROWS: tl.constexpr, COLS: tl.constexpr, PLANES: tl.constexpr, LAYOUT: tl.constexpr
):
    """First row, column and plane of this program; neighbours in memory run at the same time."""
    tile = tl.program_id(0).to(tl.int64)
    tiles_w = tl.cdiv(width, COLS)
    if LAYOUT == "channels":
        tiles_p = tl.cdiv(planes, PLANES)
        plane = tile % tiles_p
        col = tile // tiles_p % tiles_w
        row = tile // tiles_p // tiles_w
    else:
        tiles_h = tl.cdiv(height, ROWS)
        col = tile % tiles_w
        row = tile // tiles_w % tiles_h
        plane = tile // tiles_w // tiles_h
    return row * ROWS, col * COLS, plane * PLANES


@triton.jit
def _split_planes(first, planes, channels, COUNT: tl.constexpr, GROUP: tl.constexpr):
    """Batch index, channel and validity of planes first, first + 1, ..., or rather of the first in each GROUP.

    A tile may straddle images; a group cannot.
    """
    batch = first // channels
    lane = tl.arange(0, COUNT) // GROUP * GROUP
    channel = (first - batch * channels).to(tl.int32) + lane
    count = channels.to(tl.int32)
    return batch + channel // count, channel % count, first + lane < planes


@triton.jit
def _on_axes(row, col, plane, LAYOUT: tl.constexpr):
    """Three vectors, each along its axis of a tile."""
    if LAYOUT == "channels":
        return row[:, None, None], col[None, :, None], plane[None, None, :]
    else:
        return row[None, :, None], col[None, None, :], plane[:, None, None]


@triton.jit
def _samples(
    base, plane, row, col, height, width, strides,
    UNITS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Pointers and mask of a tile; in "channels" `channel` is the offset along c."""
    batch, channel, valid = plane
    s_n, s_c, s_h, s_w = strides
    start = batch * s_n * UNITS + (channel if LAYOUT == "channels" else channel * s_c * UNITS)
    along = col if LAYOUT == "rows" else col * s_w * UNITS
    down, along, start = _on_axes(row * s_h * UNITS, along, start, LAYOUT)
    in_rows, in_cols, in_planes = _on_axes(row < height, col < width, valid, LAYOUT)
    return base + (start + down + along), in_planes & in_rows & in_cols


@triton.jit
def _wide(strides):
    """Strides that came in a tuple, where no annotation makes them int64."""
    one = tl.full((), 1, tl.int64)
    return strides[0] * one, strides[1] * one, strides[2] * one, strides[3] * one


# -------------------------------------------------------------------------------------- values in registers


@triton.jit
def _butterfly(a, b, c, d):
    """Orthonormal and symmetric: (a, b, c, d) -> (LL, LH, HL, HH), and back."""
    p = a + b
    q = a - b
    r = c + d
    s = c - d
    return (p + r) * 0.5, (p - r) * 0.5, (q + s) * 0.5, (q - s) * 0.5


@triton.jit
def _split_quads(x, LAYOUT: tl.constexpr):
    """A tile of samples -> a, b, c, d, tiles of half the rows and columns."""
    if LAYOUT == "channels":
        quads = tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1] // 2, 2, x.shape[2]))
        quads = tl.permute(quads, (0, 2, 4, 3, 1))
    else:
        quads = tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2))
        quads = tl.permute(quads, (0, 1, 3, 4, 2))
    upper, lower = tl.split(quads)
    a, b = tl.split(upper)
    c, d = tl.split(lower)
    return a, b, c, d


@triton.jit
def _join_quads(a, b, c, d, LAYOUT: tl.constexpr):
    """Inverse of _split_quads."""
    quads = tl.join(tl.join(a, b), tl.join(c, d))
    if LAYOUT == "channels":
        shape: tl.constexpr = (2 * a.shape[0], 2 * a.shape[1], a.shape[2])
        return tl.reshape(tl.permute(quads, (0, 4, 1, 3, 2)), shape)
    else:
        shape: tl.constexpr = (a.shape[0], 2 * a.shape[1], 2 * a.shape[2])
        return tl.reshape(tl.permute(quads, (0, 1, 4, 2, 3)), shape)


@triton.jit
def _in_vectors(x, VECTOR: tl.constexpr):
    return tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // VECTOR, VECTOR))


@triton.jit
def _flat(x):
    return tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] * x.shape[3]))


@triton.jit
def _concatenate(x, y):
    """[..., g, m] twice -> [..., g, 2m], vector by vector."""
    pairs = tl.permute(tl.join(x, y), (0, 1, 2, 4, 3))
    return tl.reshape(pairs, (x.shape[0], x.shape[1], x.shape[2], 2 * x.shape[3]))


@triton.jit
def _halves(x):
    """Inverse of _concatenate."""
    pairs = tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2], 2, x.shape[3] // 2))
    return tl.split(tl.permute(pairs, (0, 1, 2, 4, 3)))


@triton.jit
def _merge(x, y):
    """[..., g, m] twice -> [..., 2g, m], their vectors in turn."""
    pairs = tl.permute(tl.join(x, y), (0, 1, 2, 4, 3))
    return tl.reshape(pairs, (x.shape[0], x.shape[1], 2 * x.shape[2], x.shape[3]))


@triton.jit
def _deal(x):
    """Inverse of _merge: the even and the odd vectors."""
    pairs = tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 2, 2, x.shape[3]))
    return tl.split(tl.permute(pairs, (0, 1, 2, 4, 3)))


@triton.jit
def _interleave(x, y, z, DOUBLINGS: tl.constexpr):
    """Channels-last bands in memory's order x0 y0 z0 x1 y1 z1 ..., cut into three vectors a group of channels.

    Each step doubles the vectors: two neighbouring groups U V W | u v w are the three vectors
    (U V) (W u) (v w). The channels of a group lie in one thread, so all of it only renames registers.
    """
    if DOUBLINGS > 0:
        x = _in_vectors(x, 1)
        y = _in_vectors(y, 1)
        z = _in_vectors(z, 1)
        for _ in tl.static_range(DOUBLINGS):
            x0, x1 = _deal(x)
            y0, y1 = _deal(y)
            z0, z1 = _deal(z)
            x = _concatenate(x0, y0)
            y = _concatenate(z0, x1)
            z = _concatenate(y1, z1)
        x = _flat(x)
        y = _flat(y)
        z = _flat(z)
    return x, y, z


@triton.jit
def _deinterleave(x, y, z, DOUBLINGS: tl.constexpr):
    """Inverse of _interleave."""
    if DOUBLINGS > 0:
        x = _in_vectors(x, 1 << DOUBLINGS)
        y = _in_vectors(y, 1 << DOUBLINGS)
        z = _in_vectors(z, 1 << DOUBLINGS)
        for _ in tl.static_range(DOUBLINGS):
            x0, y0 = _halves(x)
            z0, x1 = _halves(y)
            y1, z1 = _halves(z)
            x = _merge(x0, x1)
            y = _merge(y0, y1)
            z = _merge(z0, z1)
        x = _flat(x)
        y = _flat(y)
        z = _flat(z)
    return x, y, z


@triton.jit
def _extend_quads(a, b, c, d, plane, row, col, height, width, EDGE: tl.constexpr, LAYOUT: tl.constexpr):
    """Virtual samples of an odd size: EDGE times the last one (0 already stands there)."""
    if EDGE != 0:
        no_below, no_right, _ = _on_axes(2 * row + 1 == height, 2 * col + 1 == width, plane[2], LAYOUT)
        b = tl.where(no_right, a * EDGE, b)
        d = tl.where(no_right, c * EDGE, d)
        c = tl.where(no_below, a * EDGE, c)
        d = tl.where(no_below, b * EDGE, d)
    return a, b, c, d


@triton.jit
def _fold_quads(a, b, c, d, plane, row, col, height, width, EDGE: tl.constexpr, LAYOUT: tl.constexpr):
    """Adjoint of _extend_quads: virtual values return to the last sample."""
    if EDGE != 0:
        no_below, no_right, _ = _on_axes(2 * row + 1 == height, 2 * col + 1 == width, plane[2], LAYOUT)
        a = tl.where(no_below, a + c * EDGE, a)
        b = tl.where(no_below, b + d * EDGE, b)
        a = tl.where(no_right, a + b * EDGE, a)
        c = tl.where(no_right, c + d * EDGE, c)
    return a, b, c, d


# -------------------------------------------------------------------------------------------- tiles in memory


@triton.jit
def _load_pairs(
    image, plane, row, x0, height, width, strides,
    COLS: tl.constexpr, VECTOR: tl.constexpr, ALIGN: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Even and odd columns of image rows `row`, from column x0 on, zero outside.

    In "rows" a thread takes two vectors next to each other and deals them out, so that the vectors of
    coefficients it owns are whole; the second load finds its half sectors in L1.
    """
    if LAYOUT == "rows":
        run: tl.constexpr = VECTOR
        step = VECTOR
    else:
        run: tl.constexpr = 1
        step = strides[3] * ALIGN
    col = x0 + tl.arange(0, COLS // 2) // run * (2 * run) + tl.arange(0, COLS // 2) % run
    at, mask = _samples(image, plane, row, col, height, width, strides, ALIGN, LAYOUT)
    first = tl.load(at, mask=mask, other=0.0)
    _, mask = _samples(image, plane, row, col + run, height, width, strides, ALIGN, LAYOUT)
    second = tl.load(at + step, mask=mask, other=0.0)
    if run == 1:
        return first, second
    else:
        even0, odd0 = _deal(_in_vectors(first, 1))
        even1, odd1 = _deal(_in_vectors(second, 1))
        even = _concatenate(_in_vectors(_flat(even0), run // 2), _in_vectors(_flat(even1), run // 2))
        odd = _concatenate(_in_vectors(_flat(odd0), run // 2), _in_vectors(_flat(odd1), run // 2))
        return _flat(even), _flat(odd)


@triton.jit
def _load_quads(
    image, plane, row, x0, height, width, strides,
    COLS: tl.constexpr, VECTOR: tl.constexpr, ALIGN: tl.constexpr, LAYOUT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Quads a, b, c, d of the image from column x0 on, zero outside; `row` counts quads."""
    a, b = _load_pairs(image, plane, 2 * row, x0, height, width, strides, COLS, VECTOR, ALIGN, LAYOUT)
    c, d = _load_pairs(image, plane, 2 * row + 1, x0, height, width, strides, COLS, VECTOR, ALIGN, LAYOUT)
    return a.to(REAL), b.to(REAL), c.to(REAL), d.to(REAL)


@triton.jit
def _store_pairs(
    image, even, odd, plane, row, x0, height, width, strides,
    COLS: tl.constexpr, ALIGN: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Counterpart of _load_pairs; in "rows" whole rows, since no L1 would gather half sectors on their way out."""
    even = even.to(image.dtype.element_ty)
    odd = odd.to(image.dtype.element_ty)
    if LAYOUT == "channels":
        col = x0 + 2 * tl.arange(0, COLS // 2)
        at, mask = _samples(image, plane, row, col, height, width, strides, ALIGN, LAYOUT)
        tl.store(at, even, mask=mask)
        at, mask = _samples(image, plane, row, col + 1, height, width, strides, ALIGN, LAYOUT)
        tl.store(at, odd, mask=mask)
    else:
        col = x0 + tl.arange(0, COLS)
        at, mask = _samples(image, plane, row, col, height, width, strides, ALIGN, LAYOUT)
        tl.store(at, _flat(tl.join(even, odd)), mask=mask)


@triton.jit
def _band_vectors(
    high, plane, row, col, height, width, strides,
    GROUP: tl.constexpr, UNITS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Pointers and mask of the first of three vectors, and the step to the next; `plane` is by groups.

    GROUP > 1, only in "channels", means the vectors of _interleave; otherwise the three are LH, HL and HH.
    """
    batch, channel, valid = plane
    s_n, s_c, s_b, s_h, s_w = strides
    if LAYOUT == "channels":
        channel = channel * 3 + tl.arange(0, channel.shape[0]) % GROUP
        step = GROUP
    else:
        step = s_b * UNITS
    plane = (batch, channel, valid)
    at, mask = _samples(high, plane, row, col, height, width, (s_n, s_c, s_h, s_w), UNITS, LAYOUT)
    return at, mask, step


@triton.jit
def _load_bands(
    high, plane, row, col, height, width, strides,
    DOUBLINGS: tl.constexpr, UNITS: tl.constexpr, LAYOUT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """LH, HL, HH, zero outside."""
    at, mask, step = _band_vectors(high, plane, row, col, height, width, strides, 1 << DOUBLINGS, UNITS, LAYOUT)
    x = tl.load(at, mask=mask, other=0.0)
    y = tl.load(at + step, mask=mask, other=0.0)
    z = tl.load(at + 2 * step, mask=mask, other=0.0)
    lh, hl, hh = _deinterleave(x, y, z, DOUBLINGS)
    return lh.to(REAL), hl.to(REAL), hh.to(REAL)


@triton.jit
def _store_bands(
    high, lh, hl, hh, plane, row, col, height, width, strides,
    DOUBLINGS: tl.constexpr, UNITS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Counterpart of _load_bands."""
    real: tl.constexpr = high.dtype.element_ty
    x, y, z = _interleave(lh.to(real), hl.to(real), hh.to(real), DOUBLINGS)
    at, mask, step = _band_vectors(high, plane, row, col, height, width, strides, 1 << DOUBLINGS, UNITS, LAYOUT)
    tl.store(at, x, mask=mask)
    tl.store(at + step, y, mask=mask)
    tl.store(at + 2 * step, z, mask=mask)


# -------------------------------------------------------------------------------------------------- kernels

_SIZES = ("planes", "channels", "height", "width")
_IMAGE = ("image_n", "image_c", "image_h", "image_w")
_ADD = ("add_n", "add_c", "add_h", "add_w")
_LL = ("ll_n", "ll_c", "ll_h", "ll_w")
_HIGH = tuple(f"high{level}_{axis}" for level in range(1, MAX_LEVELS + 1) for axis in "ncbhw")


@triton.jit(do_not_specialize=_SIZES + _IMAGE + _LL + _HIGH)
def _analysis_kernel(
    image, ll, highs, lows, low_strides,
    planes: tl.int64, channels: tl.int64, height: tl.int64, width: tl.int64,
    image_n: tl.int64, image_c: tl.int64, image_h: tl.int64, image_w: tl.int64,
    ll_n: tl.int64, ll_c: tl.int64, ll_h: tl.int64, ll_w: tl.int64,
    high1_n: tl.int64, high1_c: tl.int64, high1_b: tl.int64, high1_h: tl.int64, high1_w: tl.int64,
    high2_n: tl.int64, high2_c: tl.int64, high2_b: tl.int64, high2_h: tl.int64, high2_w: tl.int64,
    high3_n: tl.int64, high3_c: tl.int64, high3_b: tl.int64, high3_h: tl.int64, high3_w: tl.int64,
    high4_n: tl.int64, high4_c: tl.int64, high4_b: tl.int64, high4_h: tl.int64, high4_w: tl.int64,
    high5_n: tl.int64, high5_c: tl.int64, high5_b: tl.int64, high5_h: tl.int64, high5_w: tl.int64,
    LEVELS: tl.constexpr, EDGE: tl.constexpr, LAYOUT: tl.constexpr, ALIGN: tl.constexpr, VECTOR: tl.constexpr,
    DOUBLINGS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    high_strides = (
        (high1_n, high1_c, high1_b, high1_h, high1_w),
        (high2_n, high2_c, high2_b, high2_h, high2_w),
        (high3_n, high3_c, high3_b, high3_h, high3_w),
        (high4_n, high4_c, high4_b, high4_h, high4_w),
        (high5_n, high5_c, high5_b, high5_h, high5_w),
    )
    REAL: tl.constexpr = tl.float64 if image.dtype.element_ty == tl.float64 else tl.float32
    ALIGN_C: tl.constexpr = ALIGN if LAYOUT == "channels" else 1
    ALIGN_W: tl.constexpr = ALIGN if LAYOUT == "rows" else 1
    planes = planes * ALIGN_C
    channels = channels * ALIGN_C
    y0, x0, p0 = _tile_origin(planes, height, width * ALIGN_W, ROWS, COLS, PLANES, LAYOUT)
    plane = _split_planes(p0, planes, channels, PLANES, 1)
    group = _split_planes(p0, planes, channels, PLANES, 1 << DOUBLINGS)

    row = (y0 >> 1) + tl.arange(0, ROWS // 2)
    col = (x0 >> 1) + tl.arange(0, COLS // 2)
    a, b, c, d = _load_quads(
        image, plane, row, x0, height, width * ALIGN_W, (image_n, image_c, image_h, image_w),
        COLS, VECTOR, ALIGN, LAYOUT, REAL,
    )  # fmt: skip
    for level in tl.static_range(1, LEVELS + 1):
        if level > 1:
            row = (y0 >> level) + tl.arange(0, ROWS >> level)
            col = (x0 >> level) + tl.arange(0, COLS >> level)
            a, b, c, d = _split_quads(low, LAYOUT)  # noqa: F821 (the loop is unrolled)
        a, b, c, d = _extend_quads(
            a, b, c, d, plane, row, col,
            _size_at(height, 1, level - 1), _size_at(width, ALIGN_W, level - 1), EDGE, LAYOUT,
        )  # fmt: skip
        low, lh, hl, hh = _butterfly(a, b, c, d)
        _store_bands(
            highs[level - 1], lh, hl, hh, group, row, col,
            _size_at(height, 1, level), _size_at(width, ALIGN_W, level), high_strides[level - 1],
            DOUBLINGS, _units(ALIGN, level, LAYOUT), LAYOUT,
        )  # fmt: skip
        if lows is not None and level < LEVELS:
            at, mask = _samples(
                lows[level - 1], plane, row, col, _size_at(height, 1, level), _size_at(width, ALIGN_W, level),
                _wide(low_strides[level - 1]), _units(ALIGN, level, LAYOUT), LAYOUT,
            )  # fmt: skip
            tl.store(at, low.to(ll.dtype.element_ty), mask=mask)
    at, mask = _samples(
        ll, plane, row, col, _size_at(height, 1, LEVELS), _size_at(width, ALIGN_W, LEVELS),
        (ll_n, ll_c, ll_h, ll_w), _units(ALIGN, LEVELS, LAYOUT), LAYOUT,
    )  # fmt: skip
    tl.store(at, low.to(ll.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES + _IMAGE + _ADD + _LL + _HIGH)
def _synthesis_kernel(
    image, add, ll, highs, lows, low_strides,
    planes: tl.int64, channels: tl.int64, height: tl.int64, width: tl.int64,
    image_n: tl.int64, image_c: tl.int64, image_h: tl.int64, image_w: tl.int64,
    add_n: tl.int64, add_c: tl.int64, add_h: tl.int64, add_w: tl.int64,
    ll_n: tl.int64, ll_c: tl.int64, ll_h: tl.int64, ll_w: tl.int64,
    high1_n: tl.int64, high1_c: tl.int64, high1_b: tl.int64, high1_h: tl.int64, high1_w: tl.int64,
    high2_n: tl.int64, high2_c: tl.int64, high2_b: tl.int64, high2_h: tl.int64, high2_w: tl.int64,
    high3_n: tl.int64, high3_c: tl.int64, high3_b: tl.int64, high3_h: tl.int64, high3_w: tl.int64,
    high4_n: tl.int64, high4_c: tl.int64, high4_b: tl.int64, high4_h: tl.int64, high4_w: tl.int64,
    high5_n: tl.int64, high5_c: tl.int64, high5_b: tl.int64, high5_h: tl.int64, high5_w: tl.int64,
    HIGHS: tl.constexpr, ADD: tl.constexpr,
    LEVELS: tl.constexpr, EDGE: tl.constexpr, LAYOUT: tl.constexpr, ALIGN: tl.constexpr, VECTOR: tl.constexpr,
    DOUBLINGS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    high_strides = (
        (high1_n, high1_c, high1_b, high1_h, high1_w),
        (high2_n, high2_c, high2_b, high2_h, high2_w),
        (high3_n, high3_c, high3_b, high3_h, high3_w),
        (high4_n, high4_c, high4_b, high4_h, high4_w),
        (high5_n, high5_c, high5_b, high5_h, high5_w),
    )
    REAL: tl.constexpr = tl.float64 if image.dtype.element_ty == tl.float64 else tl.float32
    ALIGN_C: tl.constexpr = ALIGN if LAYOUT == "channels" else 1
    ALIGN_W: tl.constexpr = ALIGN if LAYOUT == "rows" else 1
    planes = planes * ALIGN_C
    channels = channels * ALIGN_C
    y0, x0, p0 = _tile_origin(planes, height, width * ALIGN_W, ROWS, COLS, PLANES, LAYOUT)
    plane = _split_planes(p0, planes, channels, PLANES, 1)
    group = _split_planes(p0, planes, channels, PLANES, 1 << DOUBLINGS)

    row = (y0 >> LEVELS) + tl.arange(0, ROWS >> LEVELS)
    col = (x0 >> LEVELS) + tl.arange(0, COLS >> LEVELS)
    at, mask = _samples(
        ll, plane, row, col, _size_at(height, 1, LEVELS), _size_at(width, ALIGN_W, LEVELS),
        (ll_n, ll_c, ll_h, ll_w), _units(ALIGN, LEVELS, LAYOUT), LAYOUT,
    )  # fmt: skip
    low = tl.load(at, mask=mask, other=0.0).to(REAL)
    for level in tl.static_range(LEVELS, 0, -1):
        if level < LEVELS:
            low = _join_quads(a, b, c, d, LAYOUT)  # noqa: F821 (the loop is unrolled)
            row = (y0 >> level) + tl.arange(0, ROWS >> level)
            col = (x0 >> level) + tl.arange(0, COLS >> level)
            if lows is not None:
                at, mask = _samples(
                    lows[level - 1], plane, row, col, _size_at(height, 1, level), _size_at(width, ALIGN_W, level),
                    _wide(low_strides[level - 1]), _units(ALIGN, level, LAYOUT), LAYOUT,
                )  # fmt: skip
                low += tl.load(at, mask=mask, other=0.0).to(REAL)
        if (HIGHS >> (level - 1)) & 1:
            lh, hl, hh = _load_bands(
                highs[level - 1], group, row, col,
                _size_at(height, 1, level), _size_at(width, ALIGN_W, level), high_strides[level - 1],
                DOUBLINGS, _units(ALIGN, level, LAYOUT), LAYOUT, REAL,
            )  # fmt: skip
            a, b, c, d = _butterfly(low, lh, hl, hh)
        else:
            a = low * 0.5
            b = a
            c = a
            d = a
        a, b, c, d = _fold_quads(
            a, b, c, d, plane, row, col,
            _size_at(height, 1, level - 1), _size_at(width, ALIGN_W, level - 1), EDGE, LAYOUT,
        )  # fmt: skip
    if ADD:
        e, f, g, h = _load_quads(
            add, plane, row, x0, height, width * ALIGN_W, (add_n, add_c, add_h, add_w),
            COLS, VECTOR, ALIGN, LAYOUT, REAL,
        )  # fmt: skip
        a, b, c, d = a + e, b + f, c + g, d + h
    strides = (image_n, image_c, image_h, image_w)
    _store_pairs(image, a, b, plane, 2 * row, x0, height, width * ALIGN_W, strides, COLS, ALIGN, LAYOUT)
    _store_pairs(image, c, d, plane, 2 * row + 1, x0, height, width * ALIGN_W, strides, COLS, ALIGN, LAYOUT)


# --------------------------------------------------------------------------------------------------- launch

_Strides = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """All of a launch that follows from shapes and strides; the tensors come on top."""

    layout: Layout
    align: int
    config: TileConfig
    grid: tuple[int]
    scalars: tuple[int, ...]  # the kernel's runtime integers, in its order
    constants: dict[str, Any]
    low_strides: tuple[_Strides, ...] | None


def band_shape(shape: Sequence[int], level: int) -> tuple[int, int, int, int, int]:
    n, c, h, w = shape
    return n, c, 3, -(-h >> level), -(-w >> level)


def _layout_of(width: int, tensors: Sequence[tuple[_Strides, Sequence[int]]]) -> Layout:
    """The innermost dimension that all tensors, given as (strides, sizes), agree on. A dimension of size 1 fits
    anything; one that is broadcast (stride 0) does not."""

    def has(strides: _Strides, sizes: Sequence[int], axis: int, stride: int) -> bool:
        return sizes[axis] == 1 or strides[axis] == stride

    def channels_inner(strides: _Strides, sizes: Sequence[int]) -> bool:
        if len(sizes) == 4:
            return has(strides, sizes, 1, 1)
        return has(strides, sizes, 1, 3) and strides[2] == 1

    rows = all(has(strides, sizes, -1, 1) for strides, sizes in tensors)
    channels = all(channels_inner(strides, sizes) for strides, sizes in tensors)
    if rows and (width > 1 or not channels):
        return "rows"
    return "channels" if channels else "strided"


@functools.lru_cache(maxsize=4096)
def plan(
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    image_strides: _Strides,
    add_strides: _Strides | None,
    ll_strides: _Strides,
    high_strides: tuple[_Strides | None, ...],
    edge: int,
    synthesis: bool,
    config: TileConfig | None = None,
    low_strides: tuple[_Strides, ...] = (),
) -> Plan:
    """Layout, alignment, tile and arguments of one launch; cached, since a model launches few shapes often."""
    n, c, h, w = shape
    levels = len(high_strides)
    vector = 16 // dtype.itemsize

    def normal(strides: _Strides, sizes: Sequence[int]) -> _Strides:
        return tuple(0 if size == 1 else stride for stride, size in zip(strides, sizes, strict=True))

    image = normal(image_strides, shape)
    add = normal(add_strides, shape) if add_strides is not None else None
    *_, h_ll, w_ll = band_shape(shape, levels)
    ll = normal(ll_strides, (n, c, h_ll, w_ll))
    highs = [normal(s, band_shape(shape, i)) if s is not None else None for i, s in enumerate(high_strides, 1)]
    by_level = [(0, image), (levels, ll), *((i, s) for i, s in enumerate(highs, 1) if s is not None)]
    by_level += [(0, add)] if add is not None else []
    lows = [normal(s, (n, c, *band_shape(shape, i)[3:])) for i, s in enumerate(low_strides, 1)]
    by_level += enumerate(lows, 1)
    sizes = {4: lambda level: (n, c, *band_shape(shape, level)[3:]), 5: lambda level: band_shape(shape, level)}
    layout = _layout_of(w, [(s, sizes[len(s)](level)) for level, s in by_level])

    align = 1
    if layout == "rows":
        # Level l is read and written in vectors too, so the image's alignment may count for 2**l of them.
        most = vector << levels
        align = min(math.gcd(w, most), *(math.gcd(most, *s[:-1]) << level for level, s in by_level))
    elif layout == "channels":
        align = math.gcd(vector, c, *(stride for _, s in by_level for stride in (s[0], *s[-2:])))

    config = config or config_for(layout, levels, dtype.itemsize, shape)
    if (reason := why_invalid(config, levels, dtype.itemsize)) is not None:
        raise ValueError(f"config: {reason}")
    tiles = -(-n * c // config.planes), -(-h // config.rows), -(-w // config.cols)

    def scaled(strides: _Strides, level: int) -> _Strides:
        units = max(align >> level, 1) if layout == "rows" else align
        # The innermost stride is a constant of the layout: only "strided" (units 1) and other axes use theirs.
        return tuple(stride // units for stride in strides)

    units_c, units_w = (align if layout == name else 1 for name in ("channels", "rows"))
    scalars = [n * c // units_c, c // units_c, h, w // units_w, *scaled(image, 0)]
    if synthesis:
        scalars += scaled(add, 0) if add is not None else (0,) * 4
    scalars += scaled(ll, levels)
    for level in range(1, MAX_LEVELS + 1):
        high = highs[level - 1] if level <= levels else None
        scalars += scaled(high, level) if high is not None else (0,) * 5

    run = min(vector, align, config.planes if layout == "channels" else config.cols // 2)
    has_odd_size = (h | w) % (1 << levels) != 0
    constants: dict[str, Any] = {
        "LEVELS": levels, "EDGE": edge if has_odd_size else 0, "LAYOUT": layout, "ALIGN": align,
        "VECTOR": run, "DOUBLINGS": run.bit_length() - 1 if layout == "channels" else 0,
        "ROWS": config.rows, "COLS": config.cols, "PLANES": config.planes, "num_warps": config.num_warps,
        "enable_fp_fusion": False,  # nothing here to fuse; Triton 3.9 warns if left to choose
    }  # fmt: skip
    if synthesis:
        constants["HIGHS"] = sum(1 << i for i, s in enumerate(highs) if s is not None)
        constants["ADD"] = int(add is not None)
    scaled_lows = tuple(scaled(s, level) for level, s in enumerate(lows, 1)) or None
    return Plan(layout, align, config, (math.prod(tiles),), tuple(scalars), constants, scaled_lows)


def _check(
    image: Tensor, ll: Tensor, highs: Sequence[Tensor | None], levels: int, edge: float, add: Tensor | None,
    lows: Sequence[Tensor],
) -> None:  # fmt: skip
    if not 1 <= levels <= MAX_LEVELS:
        raise ValueError(f"levels={levels}: one launch takes 1 to {MAX_LEVELS}; chain launches for more")
    if edge not in EDGES:
        raise ValueError(f"edge={edge}: must be one of {EDGES}")
    if image.dtype not in DTYPES:
        raise TypeError(f"image.dtype={image.dtype}: must be one of {DTYPES}")
    if image.ndim != 4:
        raise ValueError(f"image.shape={tuple(image.shape)}: must be (n, c, h, w)")
    if image.shape[1] > _MAX_CHANNELS:
        raise ValueError(f"image.shape={tuple(image.shape)}: more than {_MAX_CHANNELS} channels")
    if len(highs) != levels:
        raise ValueError(f"highs: {len(highs)} levels of bands for levels={levels}")
    if len(lows) not in (0, levels - 1):
        raise ValueError(f"lows: {len(lows)} for levels={levels}: must be none or the {levels - 1} above the last")
    n, c, _, *low = band_shape(image.shape, levels)
    expected = [("ll", ll, (n, c, *low)), ("add", add, tuple(image.shape))]
    expected += [(f"highs[{i}]", high, band_shape(image.shape, i + 1)) for i, high in enumerate(highs)]
    expected += [(f"lows[{i}]", low, (n, c, *band_shape(image.shape, i + 1)[3:])) for i, low in enumerate(lows)]
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if tensor.shape != shape:
            given, whole = tuple(tensor.shape), tuple(image.shape)
            raise ValueError(f"{name}.shape={given}: must be {shape} for image.shape={whole}")
        if tensor.dtype != image.dtype or tensor.device != image.device:
            raise TypeError(
                f"{name} is {tensor.dtype} on {tensor.device}: must match image, {image.dtype} on {image.device}"
            )


def prepare(
    image: Tensor,
    ll: Tensor,
    highs: Sequence[Tensor | None],
    *,
    levels: int,
    edge: float = 0,
    add: Tensor | None = None,
    synthesis: bool = False,
    config: TileConfig | None = None,
    lows: Sequence[Tensor] = (),
) -> tuple[Any, tuple[int], tuple[object, ...], dict[str, Any]]:
    """(kernel, grid, args, constants) of a launch: ``kernel[grid](*args, **constants)`` runs it."""
    made = plan(
        image.dtype, tuple(image.shape), image.stride(), add.stride() if add is not None else None, ll.stride(),
        tuple(high.stride() if high is not None else None for high in highs), int(edge), synthesis, config,
        tuple(low.stride() for low in lows),
    )  # fmt: skip
    bands = tuple(high if high is not None else ll for high in highs)  # HIGHS keeps the kernel off the stand-in
    kept = (tuple(lows) or None, made.low_strides)  # None is a constant: no parameter, no code
    if synthesis:
        args = (image, add if add is not None else image, ll, bands, *kept, *made.scalars)
        return _synthesis_kernel, made.grid, args, made.constants
    return _analysis_kernel, made.grid, (image, ll, bands, *kept, *made.scalars), made.constants


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def analysis(
    image: Tensor,
    ll: Tensor,
    highs: Sequence[Tensor],
    *,
    levels: int,
    edge: float = 0,
    lows: Sequence[Tensor] = (),
    config: TileConfig | None = None,
) -> None:
    """Writes the Haar pyramid of ``image`` into preallocated ``ll`` and ``highs``.

    Args:
        image: (n, c, h, w), fp64, fp32, fp16 or bf16, any strides. The half types compute in fp32.
        ll: (n, c, h_L, w_L) with h_L = ceil(h / 2**levels), same dtype and device, any strides.
        highs: ``levels`` tensors (n, c, 3, h_l, w_l), finest first; bands LH, HL, HH.
        levels: 1 to 5.
        edge: 0, 1 or -1: the missing sample of an odd size is ``edge`` times the last one.
        lows: the LL of the levels above the last, (n, c, h_l, w_l) each, finest first, to be kept as well; or empty.
        config: a tile other than :func:`~.config.config_for`'s, such as :func:`tune` finds.

    Raises:
        ValueError, TypeError: an argument is out of range or does not fit ``image``.
    """
    _check(image, ll, highs, levels, edge, None, lows)
    if image.numel() == 0:
        return
    kernel, grid, args, constants = prepare(image, ll, highs, levels=levels, edge=edge, config=config, lows=lows)
    with _on_device(image):
        kernel[grid](*args, **constants)


def synthesis(
    image: Tensor,
    ll: Tensor,
    highs: Sequence[Tensor | None],
    *,
    levels: int,
    edge: float = 0,
    add: Tensor | None = None,
    lows: Sequence[Tensor] = (),
    config: TileConfig | None = None,
) -> None:
    """Writes the adjoint of :func:`analysis` (for ``edge=0`` also its inverse), plus ``add``, into ``image``.

    Arguments and errors as in :func:`analysis`. ``highs`` may hold None for a level of zeros; ``add`` is shaped
    like ``image``, with any strides, and is added before the one rounding. ``add`` may be ``image`` itself.
    ``lows`` are added to the LL that synthesis makes on its way.
    """
    _check(image, ll, highs, levels, edge, add, lows)
    if image.numel() == 0:
        return
    kernel, grid, args, constants = prepare(
        image, ll, highs, levels=levels, edge=edge, add=add, synthesis=True, config=config, lows=lows
    )
    with _on_device(image):
        kernel[grid](*args, **constants)


def tune(
    transform: Callable[..., None],
    image: Tensor,
    ll: Tensor,
    highs: Sequence[Tensor],
    *,
    levels: int,
    edge: float = 0,
    **options: Tensor | None,
) -> list[tuple[TileConfig, float]]:
    """Times ``transform`` (:func:`analysis` or :func:`synthesis`) over the search space on the tensors' GPU.

    Returns:
        (config, milliseconds) pairs, fastest first; ``config=`` of either function takes the first.

    Raises:
        RuntimeError: the tensors are not on a GPU, where times would mean nothing.
    """
    if not image.is_cuda:
        raise RuntimeError(f"image.device={image.device}: tuning times kernels on a GPU")
    _, _, _, constants = prepare(image, ll, highs, levels=levels, edge=edge, synthesis=transform is synthesis)
    n, c, h, w = image.shape
    layout, itemsize = constants["LAYOUT"], image.dtype.itemsize
    candidates = {config_for(layout, levels, itemsize, (n, c, h, w)), *search_space(layout, levels, itemsize)}
    times = []
    for config in candidates:
        run = functools.partial(transform, image, ll, highs, levels=levels, edge=edge, config=config, **options)
        with _on_device(image):
            times.append((config, triton.testing.do_bench(run, return_mode="median")))
    return sorted(times, key=lambda timing: timing[1])
