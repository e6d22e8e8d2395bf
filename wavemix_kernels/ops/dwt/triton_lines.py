"""One level of a wavelet transform along one axis in Triton, and its transpose: any filters, modes and strides.

A tile is places x coefficients. Samples past the ends are sums of samples within; the transpose, which sums over
coefficients for each sample, adds the samples past the ends in the tiles that they come from.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef, assignment"
# (Triton's functions are traced, not called: their arguments have no Python types, and tuples grow.)
import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels.ops.common.triton_launch import Launch, pow2_at_least

#: Modes whose samples past the ends are sums of several, and one that has none.
LINEAR = ("smooth", "antireflect")
_SIZES = ("outer", "inner", "places", "size", "count", "start")
_IMAGE = ("image_o", "image_i", "image_p", "image_s")
_BANDS = ("low_o", "low_i", "low_p", "low_s", "high_o", "high_i", "high_p", "high_s")


@triton.jit
def _floor_mod(a, n):
    """a mod n in 0 ... n - 1, also for negative a."""
    rest = a % n
    return tl.where(rest < 0, rest + n, rest)


@triton.jit
def _source(at, n, MODE: tl.constexpr, FAR: tl.constexpr):
    """The sample at position `at` of a line of n that goes on as MODE says: (its place within, its sign). Not for mode
    "zero". FAR: positions may lie further out than the line is long."""
    sign = tl.where(at < 0, 1, 1)
    if MODE == "constant" or MODE == "smooth":
        place = tl.minimum(tl.maximum(at, 0), n - 1)
    elif MODE == "periodic" or MODE == "periodization":
        period = n + n % 2 if MODE == "periodization" else n
        place = _floor_mod(at, period) if FAR else at + tl.where(at < 0, period, tl.where(at < period, 0, -period))
        place = tl.minimum(place, n - 1)
    else:
        WHOLE: tl.constexpr = MODE == "reflect" or MODE == "antireflect"  # an end is a sample, not between two
        ODD: tl.constexpr = MODE == "antisymmetric" or MODE == "antireflect"
        period = 2 * n - 2 if WHOLE else 2 * n
        if FAR:
            place = _floor_mod(at, period)
            back = place >= n
            place = tl.where(back, period - place if WHOLE else period - 1 - place, place)
        else:
            back = (at < 0) | (at >= n)
            place = tl.where(at < 0, -at if WHOLE else -1 - at, at)
            place = tl.where(at < n, place, period - at if WHOLE else period - 1 - at)
        if ODD:
            sign = tl.where(back, -1, 1)
    return place, sign


@triton.jit
def _slopes(at, n, MODE: tl.constexpr, REAL: tl.constexpr):
    """The other parts of a sample in the modes of LINEAR: the weight of the place that _source has, then two places
    with their weights."""
    if MODE == "smooth":
        off = at - tl.minimum(tl.maximum(at, 0), n - 1)
        far = tl.where(off < 0, -off, off)
        return (1 + far).to(REAL), tl.where(off < 0, 1, n - 2), (-far).to(REAL), far * 0, (far * 0).to(REAL)
    else:
        period = 2 * n - 2
        phase = _floor_mod(at, period)
        rounds = (at - phase) // period
        back = tl.where(phase >= n, 1, 0)
        return (
            (1 - 2 * back).to(REAL), at * 0 + n - 1, (2 * (back + rounds)).to(REAL), at * 0,
            (-2 * rounds).to(REAL),
        )  # fmt: skip


@triton.jit
def _origin(
    outer, inner, places, across, PLACES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Indices on the two outer axes, first place and first of `across` along the line."""
    tile = tl.program_id(0)
    tiles = tl.cdiv(across, TILE)
    k0 = tile % tiles * TILE
    tile = tile // tiles
    rows = tl.cdiv(places, PLACES)
    p0 = tile % rows * PLACES
    tile = tile // rows
    return (tile // inner).to(tl.int64), (tile % inner).to(tl.int64), p0, k0


@triton.jit(do_not_specialize=_SIZES + _IMAGE + _BANDS)
def _analysis_kernel(
    image, low, high, low_taps, high_taps,
    outer: tl.int32, inner: tl.int32, places: tl.int32, size: tl.int32, count: tl.int32, start: tl.int32,
    image_o: tl.int64, image_i: tl.int64, image_p: tl.int64, image_s: tl.int64,
    low_o: tl.int64, low_i: tl.int64, low_p: tl.int64, low_s: tl.int64,
    high_o: tl.int64, high_i: tl.int64, high_p: tl.int64, high_s: tl.int64,
    TAPS: tl.constexpr, MODE: tl.constexpr, FAR: tl.constexpr, ALONG: tl.constexpr,
    PLACES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    REAL: tl.constexpr = low_taps.dtype.element_ty
    o, i, p0, k0 = _origin(outer, inner, places, count, PLACES, TILE)
    place = p0 + tl.arange(0, PLACES)[:, None]
    k = k0 + tl.arange(0, TILE)[None, :]
    lines = image + o * image_o + i * image_i + (place if ALONG == "places" else place * image_p)
    valid = (place < places) & (k < count)
    sums = tl.zeros((PLACES, TILE), REAL)
    differences = tl.zeros((PLACES, TILE), REAL)
    for t in tl.static_range(TAPS):
        at = start + 2 * k + t
        inside = (at >= 0) & (at < size)
        if MODE == "zero":
            value = tl.load(lines + (at if ALONG == "line" else at * image_s), mask=valid & inside, other=0.0).to(REAL)
        else:
            there, sign = _source(at, size, MODE, FAR)
            value = tl.load(lines + (there if ALONG == "line" else there * image_s), mask=valid, other=0.0).to(REAL)
            if MODE == "antisymmetric":
                value *= sign.to(REAL)
            if MODE == "smooth" or MODE == "antireflect":
                weight, second, by_second, third, by_third = _slopes(at, size, MODE, REAL)
                value *= weight
                value += by_second * tl.load(lines + second * image_s, mask=valid & ~inside, other=0.0).to(REAL)
                if MODE == "antireflect":
                    value += by_third * tl.load(lines + third * image_s, mask=valid & ~inside, other=0.0).to(REAL)
        sums += tl.load(low_taps + t) * value
        differences += tl.load(high_taps + t) * value
    at_low = o * low_o + i * low_i + (place if ALONG == "places" else place * low_p)
    at_high = o * high_o + i * high_i + (place if ALONG == "places" else place * high_p)
    tl.store(low + at_low + (k if ALONG == "line" else k * low_s), sums.to(low.dtype.element_ty), mask=valid)
    tl.store(high + at_high + (k if ALONG == "line" else k * high_s), differences.to(high.dtype.element_ty), mask=valid)


@triton.jit
def _sample(
    low_lines, high_lines, low_taps, high_taps, place, places, at, start, count, low_s, high_s,
    TAPS: tl.constexpr, HIGH: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """The sum over coefficients at one position of each line, before any fold."""
    last = (at - start) // 2
    first_tap = (at - start) % 2
    value = tl.zeros(place.shape, REAL)
    for j in tl.static_range((TAPS + 1) // 2):
        k, t = last - j, first_tap + 2 * j
        there = place < tl.where((k >= 0) & (k < count) & (t < TAPS), places, 0)
        value += tl.load(low_taps + t, mask=t < TAPS, other=0.0) * tl.load(
            low_lines + k * low_s, mask=there, other=0.0
        ).to(REAL)  # fmt: skip
        if HIGH:
            value += tl.load(high_taps + t, mask=t < TAPS, other=0.0) * tl.load(
                high_lines + k * high_s, mask=there, other=0.0
            ).to(REAL)  # fmt: skip
    return value


@triton.jit(do_not_specialize=("pairs", "first", "before", "after", *_SIZES, *_IMAGE, *_BANDS))
def _synthesis_kernel(
    image, low, high, low_taps, high_taps,
    pairs: tl.int32, first: tl.int32, before: tl.int32, after: tl.int32,
    outer: tl.int32, inner: tl.int32, places: tl.int32, size: tl.int32, count: tl.int32, start: tl.int32,
    image_o: tl.int64, image_i: tl.int64, image_p: tl.int64, image_s: tl.int64,
    low_o: tl.int64, low_i: tl.int64, low_p: tl.int64, low_s: tl.int64,
    high_o: tl.int64, high_i: tl.int64, high_p: tl.int64, high_s: tl.int64,
    TAPS: tl.constexpr, MODE: tl.constexpr, FAR: tl.constexpr, ALONG: tl.constexpr, HIGH: tl.constexpr,
    PLACES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Samples start + 2k and start + 2k + 1 for k = first ... first + pairs - 1."""
    REAL: tl.constexpr = low_taps.dtype.element_ty
    o, i, p0, k0 = _origin(outer, inner, places, pairs, PLACES, TILE)
    place = p0 + tl.arange(0, PLACES)[:, None]
    valid = place < places
    k = first + k0 + tl.arange(0, TILE)[None, :]
    low_lines = low + o * low_o + i * low_i + (place if ALONG == "places" else place * low_p)
    high_lines = high + o * high_o + i * high_i + (place if ALONG == "places" else place * high_p)
    even = tl.zeros((PLACES, TILE), REAL)
    odd = tl.zeros((PLACES, TILE), REAL)
    for j in tl.static_range((TAPS + 1) // 2):
        there = valid & (k - j >= 0) & (k - j < count)
        along = (k - j) if ALONG == "line" else (k - j) * low_s
        value = tl.load(low_lines + along, mask=there, other=0.0).to(REAL)
        even += tl.load(low_taps + 2 * j) * value
        if 2 * j + 1 < TAPS:
            odd += tl.load(low_taps + 2 * j + 1) * value
        if HIGH:
            along = (k - j) if ALONG == "line" else (k - j) * high_s
            value = tl.load(high_lines + along, mask=there, other=0.0).to(REAL)
            even += tl.load(high_taps + 2 * j) * value
            if 2 * j + 1 < TAPS:
                odd += tl.load(high_taps + 2 * j + 1) * value
    at = start + 2 * k
    if MODE != "zero":
        lowest = start + 2 * (first + k0)
        reach = tl.maximum(before, after) + 2
        if FAR or (lowest < reach) or (lowest + 2 * TILE > size - reach):
            for q in range(before + after):
                past = tl.where(q < before, q - before, size + q - before)
                beyond = _sample(
                    low_lines, high_lines, low_taps, high_taps, place, places, past, start, count, low_s, high_s,
                    TAPS, HIGH, REAL,
                )  # fmt: skip
                source, sign = _source(past, size, MODE, FAR)
                if MODE == "smooth" or MODE == "antireflect":
                    weight, second, by_second, third, by_third = _slopes(past, size, MODE, REAL)
                    even += tl.where(at == second, by_second * beyond, 0.0)
                    odd += tl.where(at + 1 == second, by_second * beyond, 0.0)
                    if MODE == "antireflect":
                        even += tl.where(at == third, by_third * beyond, 0.0)
                        odd += tl.where(at + 1 == third, by_third * beyond, 0.0)
                    beyond *= weight
                elif MODE == "antisymmetric":
                    beyond *= sign.to(REAL)
                even += tl.where(at == source, beyond, 0.0)
                odd += tl.where(at + 1 == source, beyond, 0.0)
    lines = image + o * image_o + i * image_i + (place if ALONG == "places" else place * image_p)
    if ALONG == "line":
        at = start + 2 * (first + k0) + tl.arange(0, 2 * TILE)[None, :]
        samples = tl.reshape(tl.join(even, odd), (PLACES, 2 * TILE))
        tl.store(lines + at, samples.to(image.dtype.element_ty), mask=valid & (at >= 0) & (at < size))
    else:
        tl.store(lines + at * image_s, even.to(image.dtype.element_ty), mask=valid & (at >= 0) & (at < size))
        at += 1
        tl.store(lines + at * image_s, odd.to(image.dtype.element_ty), mask=valid & (at >= 0) & (at < size))


def launch(
    analysis: bool, image: Tensor, low: Tensor, high: Tensor | None, taps: tuple[Tensor, Tensor], start: int, mode: str
) -> Launch:
    """The launch for lines along the last axis of 4-D tensors; `high` may be None for a transpose."""
    size, count, length = image.shape[-1], low.shape[-1], taps[0].numel()
    if mode == "smooth" and size == 1:
        mode = "constant"  # a single sample has no slope
    # Places are the axis with the most of them, unless neighbours in memory are along another one.
    tensors = (image, low) if high is None else (image, low, high)
    axes = sorted(range(3), key=lambda d: (all(t.stride(d) == 1 for t in tensors), image.shape[d]))
    order = (*axes, 3)
    image, low, high = (t if t is None else t.permute(order) for t in (image, low, high))
    along = "strided"
    for name, dim in (("line", 3), ("places", 2)):
        if along == "strided" and all(t.stride(dim) == 1 for t in (image, low, high) if t is not None):
            along = name
    outer, inner, places = image.shape[:3]
    before, after = -start, max(0, start + 2 * (count - 1) + length - size)
    first = before // 2
    pairs = (size - 1 - start) // 2 - first + 1
    across = count if analysis else pairs
    tile = min(4 if along == "places" else 256, pow2_at_least(across))
    rows = min(512 // tile, pow2_at_least(places))
    far = max(before, after) >= size
    scalars = [outer, inner, places, size, count, start, *image.stride(), *low.stride()]
    scalars += low.stride() if high is None else high.stride()
    constants = {
        "TAPS": length, "MODE": mode, "FAR": far and mode != "zero", "ALONG": along, "PLACES": rows, "TILE": tile,
        "num_warps": 4 if rows * tile >= 256 else 1, "enable_fp_fusion": True,
    }  # fmt: skip
    grid = (outer * inner * -(-places // rows) * -(-across // tile),)
    tensors = (image, low, low if high is None else high, *taps)
    if analysis:
        return Launch(_analysis_kernel, grid, (*tensors, *scalars), constants)
    constants["HIGH"] = high is not None
    return Launch(_synthesis_kernel, grid, (*tensors, pairs, first, before, after, *scalars), constants)
