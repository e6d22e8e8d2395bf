"""Quads of real bands as the dual-tree transform's complex numbers, and back, in Triton: one pass, a quad to a lane."""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef, assignment, misc"
# (Triton's functions are traced, not called: their arguments have no Python types, and tuples grow.)
import math
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels.ops.common.triton_launch import Launch

_TILE = 256
_NUMBERS = (
    "quads", "channels", "height", "width", "band_n", "band_c", "band_b", "band_y", "band_x", "low_n", "low_c", "low_y",
    "low_x", "z_n", "z_c", "z_o", "z_y", "z_x", "z_p",
)  # fmt: skip


@triton.jit
def _origin(quads, channels, height, width, TILE: tl.constexpr):
    """Sample, channel, row and column of quads, and which of them exist."""
    quad = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = quad // width
    plane = row // height
    n = plane // channels
    c, y, x = plane - n * channels, row - plane * height, quad - row * width
    return n.to(tl.int64), c.to(tl.int64), y.to(tl.int64), x.to(tl.int64), quad < quads


@triton.jit
def _of_band(p0, p1, p2, p3, BAND: tl.constexpr, TREES: tl.constexpr):
    """Where a, b, c, d of a band lie: a high-pass of the second tree comes first."""
    if TREES and BAND == 1:
        a, b, c, d = p2, p3, p0, p1
    elif TREES and BAND == 2:
        a, b, c, d = p1, p0, p3, p2
    elif TREES and BAND == 3:
        a, b, c, d = p3, p2, p1, p0
    else:
        a, b, c, d = p0, p1, p2, p3
    return a, b, c, d


@triton.jit
def _load_pair(first, second, mask, ACCUMULATE: tl.constexpr, SIDE_BY_SIDE: tl.constexpr):
    """Values at two places, which follow each other in memory where SIDE_BY_SIDE."""
    if SIDE_BY_SIDE:
        both = tl.load(first[:, None] + tl.arange(0, 2)[None, :], mask=mask[:, None])
        one, other = tl.split(both)
    else:
        one, other = tl.load(first, mask=mask), tl.load(second, mask=mask)
    return one.to(ACCUMULATE), other.to(ACCUMULATE)


@triton.jit
def _store_pair(first, second, one, other, mask, SIDE_BY_SIDE: tl.constexpr):
    if SIDE_BY_SIDE:
        both = tl.join(one, other).to(first.dtype.element_ty)
        tl.store(first[:, None] + tl.arange(0, 2)[None, :], both, mask=mask[:, None])
    else:
        tl.store(first, one.to(first.dtype.element_ty), mask=mask)
        tl.store(second, other.to(first.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_NUMBERS)
def _to_kernel(
    low, z, p0, p1, p2, p3, quads: tl.int32, channels: tl.int32, height: tl.int32, width: tl.int32,
    band_n: tl.int64, band_c: tl.int64, band_b: tl.int64, band_y: tl.int64, band_x: tl.int64,
    low_n: tl.int64, low_c: tl.int64, low_y: tl.int64, low_x: tl.int64,
    z_n: tl.int64, z_c: tl.int64, z_o: tl.int64, z_y: tl.int64, z_x: tl.int64, z_p: tl.int64,
    ACCUMULATE: tl.constexpr, ROOT_HALF: tl.constexpr, TREES: tl.constexpr, BANDS_PAIRED: tl.constexpr,
    LOW_PAIRED: tl.constexpr, Z_PAIRED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    n, c, y, x, valid = _origin(quads, channels, height, width, TILE)
    at = n * band_n + c * band_c + y * band_y + x * band_x
    upper = low + (n * low_n + c * low_c + 2 * y * low_y + 2 * x * low_x)
    lower = upper + low_y
    to = z + (n * z_n + c * z_c + y * z_y + x * z_x)
    read = ()  # all at first: the compiler moves no load past a store
    for band in tl.static_range(4):
        a_at, b_at, c_at, d_at = _of_band(p0, p1, p2, p3, band, TREES)
        a, b = _load_pair(a_at + at, b_at + at, valid, ACCUMULATE, BANDS_PAIRED)
        e, f = _load_pair(c_at + at, d_at + at, valid, ACCUMULATE, BANDS_PAIRED)
        read = read + (a, b, e, f)  # noqa: RUF005
        at += band_b
    _store_pair(upper, upper + low_x, read[0], read[1], valid, LOW_PAIRED)
    _store_pair(lower, lower + low_x, read[2], read[3], valid, LOW_PAIRED)
    for band in tl.static_range(1, 4):  # of 15, 45, ... 165 degrees numbers 0 and 5, 2 and 3, 1 and 4
        a, b, e, f = read[4 * band], read[4 * band + 1], read[4 * band + 2], read[4 * band + 3]
        one = to + 2 * (band - 1) % 3 * z_o
        other = to + (5 - 2 * (band - 1) % 3) * z_o
        _store_pair(one, one + z_p, (a - f) * ROOT_HALF, (b + e) * ROOT_HALF, valid, Z_PAIRED)
        _store_pair(other, other + z_p, (a + f) * ROOT_HALF, (b - e) * ROOT_HALF, valid, Z_PAIRED)


@triton.jit(do_not_specialize=_NUMBERS)
def _from_kernel(
    low, z, p0, p1, p2, p3, quads: tl.int32, channels: tl.int32, height: tl.int32, width: tl.int32,
    band_n: tl.int64, band_c: tl.int64, band_b: tl.int64, band_y: tl.int64, band_x: tl.int64,
    low_n: tl.int64, low_c: tl.int64, low_y: tl.int64, low_x: tl.int64,
    z_n: tl.int64, z_c: tl.int64, z_o: tl.int64, z_y: tl.int64, z_x: tl.int64, z_p: tl.int64,
    ACCUMULATE: tl.constexpr, ROOT_HALF: tl.constexpr, TREES: tl.constexpr, BANDS_PAIRED: tl.constexpr,
    LOW_PAIRED: tl.constexpr, Z_PAIRED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    n, c, y, x, valid = _origin(quads, channels, height, width, TILE)
    at = n * band_n + c * band_c + y * band_y + x * band_x
    upper = low + (n * low_n + c * low_c + 2 * y * low_y + 2 * x * low_x)
    lower = upper + low_y
    source = z + (n * z_n + c * z_c + y * z_y + x * z_x)
    a, b = _load_pair(upper, upper + low_x, valid, ACCUMULATE, LOW_PAIRED)
    e, f = _load_pair(lower, lower + low_x, valid, ACCUMULATE, LOW_PAIRED)
    quad = (a, b, e, f)  # all bands' at first: the compiler moves no load past a store
    for band in tl.static_range(1, 4):  # of 15, 45, ... 165 degrees numbers 0 and 5, 2 and 3, 1 and 4
        one_at = source + 2 * (band - 1) % 3 * z_o
        other_at = source + (5 - 2 * (band - 1) % 3) * z_o
        one, one_i = _load_pair(one_at, one_at + z_p, valid, ACCUMULATE, Z_PAIRED)
        other, other_i = _load_pair(other_at, other_at + z_p, valid, ACCUMULATE, Z_PAIRED)
        a, b = (one + other) * ROOT_HALF, (one_i + other_i) * ROOT_HALF
        e, f = (one_i - other_i) * ROOT_HALF, (other - one) * ROOT_HALF
        quad = quad + (a, b, e, f)  # noqa: RUF005
    for band in tl.static_range(4):
        a_to, b_to, c_to, d_to = _of_band(p0, p1, p2, p3, band, TREES)
        _store_pair(a_to + at, b_to + at, quad[4 * band], quad[4 * band + 1], valid, BANDS_PAIRED)
        _store_pair(c_to + at, d_to + at, quad[4 * band + 2], quad[4 * band + 3], valid, BANDS_PAIRED)
        at += band_b


def launch(back: bool, corners: Sequence[Tensor], low: Tensor, z: Tensor, trees: bool) -> Launch:
    """The launch for corners of equal strides; tensors as :mod:`.quads` has them."""
    first = corners[0]
    n, c, _, h, w = first.shape
    quads = n * c * h * w
    constants: dict[str, Any] = {
        "ACCUMULATE": tl.float64 if low.dtype.itemsize == 8 else tl.float32, "ROOT_HALF": math.sqrt(0.5),
        "TREES": trees, "BANDS_PAIRED": not trees and first.stride(4) == 2,
        "LOW_PAIRED": low.stride(3) == 1, "Z_PAIRED": z.stride(5) == 1, "TILE": _TILE, "num_warps": 4,
        "enable_fp_fusion": True,
    }  # fmt: skip
    args = (low, z, *corners, quads, c, h, w, *first.stride(), *low.stride(), *z.stride())
    return Launch(_from_kernel if back else _to_kernel, (-(-quads // _TILE),), args, constants)


def run(back: bool, corners: Sequence[Tensor], low: Tensor, z: Tensor, trees: bool) -> None:
    """Writes low and z from the corners, or, `back`, the corners from them. Half types compute in fp32."""
    if low.numel() == 0:
        return
    if low.numel() >= 2**33:
        raise ValueError(f"low: {low.numel()} samples; the kernels count fewer than 2**33 of them in one call")
    if len({corner.stride() for corner in corners}) > 1:  # never of a result, whose corners are new
        corners = [corner.contiguous() for corner in corners]
    launch(back, corners, low, z, trees).run(low)
