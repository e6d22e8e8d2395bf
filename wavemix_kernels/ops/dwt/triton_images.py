"""One level of a wavelet transform of images in Triton, both axes in one pass, and its transpose.

A program takes a few rows of coefficients in a strip of columns. It filters one row of samples after the other along W
and keeps as many of them in registers as the filters along H read; the transpose does the same with rows of
coefficients. Samples are read from memory once, and by the filter's other taps from the first-level cache.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels.ops.common.triton_launch import Launch
from wavemix_kernels.ops.dwt.tiles import ImageConfig, config_for
from wavemix_kernels.ops.dwt.triton_lines import _floor_mod, _source

_SIZES = ("planes", "channels", "height", "width", "count_h", "count_w", "start_h", "start_w")
_STRIDES = (*(f"{name}_{axis}" for name in ("image", "ll") for axis in "ncy"), *(f"high_{axis}" for axis in "ncby"))


@triton.jit
def _origin(planes, channels, down, across, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Batch index, channel, column and validity of a program's items, and its first row. Items are columns of one plane
    after the other: no tile is filled in part but the last."""
    tile = tl.program_id(0)
    tiles = tl.cdiv(down, ROWS)
    item = (tile // tiles).to(tl.int64) * TILE
    first = item // across
    item = (item - first * across).to(tl.int32) + tl.arange(0, TILE)
    plane = first.to(tl.int32) + item // across
    n, c = (plane // channels).to(tl.int64), (plane % channels).to(tl.int64)
    return n, c, item % across, plane < planes, tile % tiles * ROWS


@triton.jit
def _filtered(
    lines, at, size, limit, valid, low_taps, high_taps,
    TAPS: tl.constexpr, MODE: tl.constexpr, FAR: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """A row of samples, at `lines`, by both filters along W: coefficients whose first samples are at `at`. `limit` is
    `size`, or 0 for a row of zeros."""
    low = tl.zeros(valid.shape, REAL)
    high = tl.zeros(valid.shape, REAL)
    for t in tl.static_range(TAPS):
        place = at + t
        if MODE == "zero":
            there = valid & (place >= 0) & (place < limit)
            value = tl.load(lines + place, mask=there, other=0.0).to(REAL)
        else:
            place, sign = _source(place, size, MODE, FAR)
            value = tl.load(lines + place, mask=valid, other=0.0).to(REAL)
            if MODE == "antisymmetric":
                value *= sign.to(REAL)
        low += tl.load(low_taps + t) * value
        high += tl.load(high_taps + t) * value
    return low, high


@triton.jit
def _weighted(values, first: tl.constexpr, taps, TAPS: tl.constexpr):
    """The sum of `values` from number `first` on by a filter."""
    total = values[first] * tl.load(taps)
    for t in tl.static_range(1, TAPS):
        total += values[first + t] * tl.load(taps + t)
    return total


@triton.jit(do_not_specialize=_SIZES + _STRIDES)
def _analysis_kernel(
    image, ll, high, low_w, high_w, low_h, high_h,
    planes: tl.int32, channels: tl.int32, height: tl.int32, width: tl.int32, count_h: tl.int32, count_w: tl.int32,
    start_h: tl.int32, start_w: tl.int32,
    image_n: tl.int64, image_c: tl.int64, image_y: tl.int64,
    ll_n: tl.int64, ll_c: tl.int64, ll_y: tl.int64,
    high_n: tl.int64, high_c: tl.int64, high_b: tl.int64, high_y: tl.int64,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, MODE: tl.constexpr, FAR_H: tl.constexpr, FAR_W: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    REAL: tl.constexpr = low_w.dtype.element_ty
    n, c, col, valid, row = _origin(planes, channels, count_h, count_w, ROWS, TILE)
    plane = image + n * image_n + c * image_c
    to_ll = ll + n * ll_n + c * ll_c + col
    to_high = high + n * high_n + c * high_c + col
    lows = ()
    highs = ()
    for r in tl.static_range(2 * ROWS + TAPS_H - 2):
        y = start_h + 2 * row + r
        limit = tl.where((y >= 0) & (y < height), width, 0)
        if MODE != "zero":
            # Rows of coefficients that the last program has too many of read what the last one reads.
            y, sign = _source(tl.minimum(y, start_h + 2 * count_h + TAPS_H - 3), height, MODE, FAR_H)
        low, other = _filtered(
            plane + y * image_y, start_w + 2 * col, width, limit, valid, low_w, high_w, TAPS_W, MODE, FAR_W, REAL
        )  # fmt: skip
        if MODE == "antisymmetric":
            low *= sign.to(REAL)
            other *= sign.to(REAL)
        lows = lows + (low,)  # noqa: RUF005
        highs = highs + (other,)  # noqa: RUF005
        if r >= TAPS_H - 1 and (r - TAPS_H + 1) % 2 == 0:
            k = row + (r - TAPS_H + 1) // 2
            mask = valid & (col < tl.where(k < count_h, count_w, 0))
            to = to_high + k * high_y
            tl.store(to_ll + k * ll_y, _weighted(lows, r - TAPS_H + 1, low_h, TAPS_H).to(ll.dtype.element_ty), mask=mask)
            tl.store(to, _weighted(lows, r - TAPS_H + 1, high_h, TAPS_H).to(high.dtype.element_ty), mask=mask)
            tl.store(to + high_b, _weighted(highs, r - TAPS_H + 1, low_h, TAPS_H).to(high.dtype.element_ty), mask=mask)
            tl.store(to + 2 * high_b, _weighted(highs, r - TAPS_H + 1, high_h, TAPS_H).to(high.dtype.element_ty), mask=mask)


@triton.jit
def _pairs_of(
    low, high, k, count, limit, valid, low_taps, high_taps,
    TAPS: tl.constexpr, WRAP: tl.constexpr, HIGH: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Even and odd samples along W of a row of coefficients, the pairs `k`. `limit` is `count`, or 0 for no such row."""
    even = tl.zeros(valid.shape, REAL)
    odd = tl.zeros(valid.shape, REAL)
    for j in tl.static_range((TAPS + 1) // 2):
        place = k - j
        if WRAP:
            place = _floor_mod(place, count)
            there = valid
        else:
            there = valid & (place >= 0) & (place < limit)
        value = tl.load(low + place, mask=there, other=0.0).to(REAL)
        even += tl.load(low_taps + 2 * j) * value
        if 2 * j + 1 < TAPS:
            odd += tl.load(low_taps + 2 * j + 1) * value
        if HIGH:
            value = tl.load(high + place, mask=there, other=0.0).to(REAL)
            even += tl.load(high_taps + 2 * j) * value
            if 2 * j + 1 < TAPS:
                odd += tl.load(high_taps + 2 * j + 1) * value
    return even, odd


@triton.jit(do_not_specialize=("down", "across", "first_h", "first_w") + _SIZES + _STRIDES)
def _synthesis_kernel(
    image, ll, high, low_w, high_w, low_h, high_h,
    down: tl.int32, across: tl.int32, first_h: tl.int32, first_w: tl.int32,
    planes: tl.int32, channels: tl.int32, height: tl.int32, width: tl.int32, count_h: tl.int32, count_w: tl.int32,
    start_h: tl.int32, start_w: tl.int32,
    image_n: tl.int64, image_c: tl.int64, image_y: tl.int64,
    ll_n: tl.int64, ll_c: tl.int64, ll_y: tl.int64,
    high_n: tl.int64, high_c: tl.int64, high_b: tl.int64, high_y: tl.int64,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, WRAP: tl.constexpr, HIGH: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Pairs of samples: numbers start_h + 2 k and the next along H, for `down` k from first_h, as many `across` W."""
    REAL: tl.constexpr = low_w.dtype.element_ty
    real: tl.constexpr = image.dtype.element_ty
    STEPS: tl.constexpr = (TAPS_H + 1) // 2
    n, c, col, valid, row = _origin(planes, channels, down, across, ROWS, TILE)
    row += first_h
    col += first_w
    from_ll = ll + n * ll_n + c * ll_c
    from_high = high + n * high_n + c * high_c
    x = start_w + 2 * col[:, None] + tl.arange(0, 2)[None, :]
    to = image + n[:, None] * image_n + c[:, None] * image_c + x
    inside = valid[:, None] & (x >= 0)
    lows_even = ()
    lows_odd = ()
    highs_even = ()
    highs_odd = ()
    for r in tl.static_range(ROWS + STEPS - 1):
        k = row + r - (STEPS - 1)
        limit = tl.where((k >= 0) & (k < count_h), count_w, 0)
        if WRAP:
            k = _floor_mod(k, count_h)
        low = from_ll + k * ll_y
        other = from_high + k * high_y
        even, odd = _pairs_of(
            low, other + high_b, col, count_w, limit, valid, low_w, high_w, TAPS_W, WRAP, HIGH, REAL
        )  # fmt: skip
        lows_even = lows_even + (even,)  # noqa: RUF005
        lows_odd = lows_odd + (odd,)  # noqa: RUF005
        if HIGH:
            even, odd = _pairs_of(
                other, other + 2 * high_b, col, count_w, limit, valid, low_w, high_w, TAPS_W, WRAP, HIGH, REAL
            )  # fmt: skip
            highs_even = highs_even + (even,)  # noqa: RUF005
            highs_odd = highs_odd + (odd,)  # noqa: RUF005
        if r >= STEPS - 1:
            for phase in tl.static_range(2):
                even = tl.zeros((TILE,), REAL)
                odd = tl.zeros((TILE,), REAL)
                for j in tl.static_range(STEPS):
                    if 2 * j + phase < TAPS_H:
                        tap = tl.load(low_h + 2 * j + phase)
                        even += tap * lows_even[r - j]
                        odd += tap * lows_odd[r - j]
                        if HIGH:
                            tap = tl.load(high_h + 2 * j + phase)
                            even += tap * highs_even[r - j]
                            odd += tap * highs_odd[r - j]
                y = start_h + 2 * (row + r - (STEPS - 1)) + phase
                samples = tl.join(even, odd).to(real)
                tl.store(to + y * image_y, samples, mask=inside & (x < tl.where((y >= 0) & (y < height), width, 0)))


def launch(
    analysis: bool, image: Tensor, ll: Tensor, high: Tensor | None, taps: Sequence[Tensor], starts: tuple[int, int],
    mode: str, config: ImageConfig | None = None,
) -> Launch:  # fmt: skip
    """The launch for tensors whose last axis has stride 1.

    Args:
        taps: low and high along W, then along H, on the device, in the type of the arithmetic.
        starts: the samples that the first taps along H and W read for coefficient 0.
        mode: of the analysis none of :data:`~wavemix_kernels.ops.dwt.triton_lines.LINEAR`; the transpose has "zero" and
            "periodization" of even sizes.
    """
    n, c, *size = image.shape
    lengths = taps[2].numel(), taps[0].numel()
    counts = ll.shape[2:]
    scalars = [n * c, c, *size, *counts, *starts, *image.stride()[:3], *ll.stride()[:3]]
    scalars += [0] * 4 if high is None else high.stride()[:4]
    tensors = (image, ll, ll if high is None else high, *taps)
    constants = {"TAPS_H": lengths[0], "TAPS_W": lengths[1], "enable_fp_fusion": True}
    if analysis:
        far = [
            mode != "zero" and max(-start, start + 2 * (count - 1) + length - n) >= n
            for n, count, start, length in zip(size, counts, starts, lengths, strict=True)
        ]
        constants |= {"MODE": mode, "FAR_H": far[0], "FAR_W": far[1]}
        down, across = counts
    else:
        firsts = [-start // 2 for start in starts]
        down, across = ((n - 1 - s) // 2 - f + 1 for n, s, f in zip(size, starts, firsts, strict=True))
        scalars = [down, across, *firsts, *scalars]
        constants |= {"WRAP": mode == "periodization", "HIGH": high is not None}
    config = config or config_for(n * c, down, across, lengths)
    constants |= {"ROWS": config.rows, "TILE": config.tile, "num_warps": config.num_warps}
    grid = (-(-down // config.rows) * -(-n * c * across // config.tile),)
    return Launch(_analysis_kernel if analysis else _synthesis_kernel, grid, (*tensors, *scalars), constants)
