"""Haar synthesis in Triton: all levels in one pass over the bands, any strides (tiles: triton_quads.py)."""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels.ops.common.triton_launch import Launch
from wavemix_kernels.ops.haar.tiles import TileConfig
from wavemix_kernels.ops.haar.triton_plan import ADD, HIGH, IMAGE, LL, SIZES, check, plan, tile
from wavemix_kernels.ops.haar.triton_quads import (
    _band_vectors,
    _butterfly,
    _flat,
    _halves,
    _in_vectors,
    _join_quads,
    _load_quads,
    _merge,
    _on_axes,
    _samples,
    _size_at,
    _split_planes,
    _tile_origin,
    _units,
    _wide,
)


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
def _fold_quads(a, b, c, d, plane, row, col, height, width, EDGE: tl.constexpr, LAYOUT: tl.constexpr):
    """Adjoint of _extend_quads: virtual values return to the last sample."""
    if EDGE != 0:
        no_below, no_right, _ = _on_axes(2 * row + 1 == height, 2 * col + 1 == width, plane[2], LAYOUT)
        a = tl.where(no_below, a + c * EDGE, a)
        b = tl.where(no_below, b + d * EDGE, b)
        a = tl.where(no_right, a + b * EDGE, a)
        c = tl.where(no_right, c + d * EDGE, c)
    return a, b, c, d


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


@triton.jit(do_not_specialize=SIZES + IMAGE + ADD + LL + HIGH)
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


def launch(
    image: Tensor, ll: Tensor, highs: Sequence[Tensor | None], *, edge: float = 0, add: Tensor | None = None,
    lows: Sequence[Tensor] = (), config: TileConfig | None = None,
) -> Launch:  # fmt: skip
    """The launch for arguments that :func:`synthesis` has checked."""
    config = config or tile("synthesis", image, len(highs))
    made = plan(
        image.dtype, tuple(image.shape), image.stride(), None if add is None else add.stride(), ll.stride(),
        tuple(None if high is None else high.stride() for high in highs), int(edge), True, config,
        tuple(low.stride() for low in lows),
    )  # fmt: skip
    bands = tuple(ll if high is None else high for high in highs)  # HIGHS keeps the kernel off the stand-in
    # None is a constant: no parameter, no code.
    kept = (tuple(lows) or None, made.low_strides)
    args = (image, image if add is None else add, ll, bands, *kept, *made.scalars)
    return Launch(_synthesis_kernel, made.grid, args, made.constants)


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
    check(image, ll, highs, levels, edge, add, lows)
    launch(image, ll, highs, edge=edge, add=add, lows=lows, config=config).run(image)
