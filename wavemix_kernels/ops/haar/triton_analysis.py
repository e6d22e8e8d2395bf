"""Haar analysis in Triton: all levels in one pass over the image, any strides (tiles: triton_quads.py)."""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels.ops.common.triton_launch import Launch
from wavemix_kernels.ops.haar.tiles import TileConfig
from wavemix_kernels.ops.haar.triton_plan import HIGH, IMAGE, LL, SIZES, check, plan, tile
from wavemix_kernels.ops.haar.triton_quads import (
    _band_vectors,
    _butterfly,
    _concatenate,
    _deal,
    _flat,
    _in_vectors,
    _load_quads,
    _on_axes,
    _samples,
    _size_at,
    _split_planes,
    _split_quads,
    _tile_origin,
    _units,
    _wide,
)


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


@triton.jit(do_not_specialize=SIZES + IMAGE + LL + HIGH)
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


def launch(
    image: Tensor, ll: Tensor, highs: Sequence[Tensor], *, edge: float = 0, lows: Sequence[Tensor] = (),
    config: TileConfig | None = None,
) -> Launch:  # fmt: skip
    """The launch for arguments that :func:`analysis` has checked."""
    config = config or tile("analysis", image, len(highs))
    made = plan(
        image.dtype, tuple(image.shape), image.stride(), None, ll.stride(), tuple(high.stride() for high in highs),
        int(edge), False, config, tuple(low.stride() for low in lows),
    )  # fmt: skip
    # None is a constant: no parameter, no code.
    args = (image, ll, tuple(highs), tuple(lows) or None, made.low_strides, *made.scalars)
    return Launch(_analysis_kernel, made.grid, args, made.constants)


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
        config: a tile other than :func:`wavemix_kernels.ops.haar.tiles.config_for`'s.

    Raises:
        ValueError, TypeError: an argument is out of range or does not fit ``image``.
    """
    check(image, ll, highs, levels, edge, None, lows)
    launch(image, ll, highs, edge=edge, lows=lows, config=config).run(image)
