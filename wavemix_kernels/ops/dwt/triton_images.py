"""One level of a wavelet transform of images in Triton, both axes in one pass, and its transpose.

A program takes a few rows of coefficients in a strip of columns. It filters one row of samples after the other along W
and keeps as many of them in registers as the filters along H read; the transpose does the same with rows of
coefficients. Samples are read from memory once, and by the filter's other taps from the first-level cache.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef, assignment"
# (Triton's functions are traced, not called: their arguments have no Python types, and tuples grow.)
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels.ops.common.triton_launch import Launch
from wavemix_kernels.ops.dwt.tiles import ImageConfig, config_for
from wavemix_kernels.ops.dwt.triton_lines import _source

_SIZES = ("planes", "channels", "height", "width", "count_h", "count_w", "start_h", "start_w")
#: Modes that a line of pairs goes on in as a line of samples does.
_BY_PAIRS = ("zero", "periodic", "periodization", "symmetric", "antisymmetric")
_STRIDES = (*(f"{name}_{axis}" for name in ("image", "ll") for axis in "ncy"), *(f"high_{axis}" for axis in "ncby"))


@triton.jit
def _origin(planes, channels, down, across, GAP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Batch index, channel, column and validity of a program's items, and the first of its rows, which lie GAP apart.
    Items are columns of one plane after the other: no tile is filled in part but the last."""
    tile = tl.program_id(0)
    tiles = GAP * tl.cdiv(tl.cdiv(down, GAP), ROWS)
    item = (tile // tiles).to(tl.int64) * TILE
    first = item // across
    item = (item - first * across).to(tl.int32) + tl.arange(0, TILE)
    plane = first.to(tl.int32) + item // across
    n, c = (plane // channels).to(tl.int64), (plane % channels).to(tl.int64)
    group = tile % tiles
    return n, c, item % across, plane < planes, group // GAP * (GAP * ROWS) + group % GAP


@triton.jit
def _taps(filter, TAPS: tl.constexpr):
    """A filter in registers. Loads behind a store would be made again."""
    taps = (tl.load(filter),)
    for t in tl.static_range(1, TAPS):
        taps = taps + (tl.load(filter + t),)  # noqa: RUF005
    return taps


@triton.jit
def _inside(at, size):
    """Whether places are some of `size`: compared as unsigned numbers, negative ones are past the end too."""
    return at.to(tl.uint32) < size.to(tl.uint32)


@triton.jit
def _load(at, mask):
    """A float32 is a bfloat16 with zeros below: shifted, that takes one instruction, and Triton's conversion two."""
    if at.dtype.element_ty == tl.bfloat16:
        bits = tl.load(at.to(tl.pointer_type(tl.int16)), mask=mask, other=0)
        value = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = tl.load(at, mask=mask, other=0.0)
    return value


@triton.jit
def _pair(at, mask):
    """Two neighbours by one load; see :func:`_load`."""
    if at.dtype.element_ty == tl.bfloat16:
        word = tl.load(at.to(tl.pointer_type(tl.int32)), mask=mask, other=0)
        one = (word << 16).to(tl.float32, bitcast=True)
        two = (word & -65536).to(tl.float32, bitcast=True)
    else:
        one, two = tl.split(tl.load(at[:, None] + tl.arange(0, 2)[None, :], mask=mask[:, None], other=0.0))
    return one, two


@triton.jit
def _samples(
    lines, at, size, there, valid, TAPS: tl.constexpr, STEP: tl.constexpr, MODE: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """The samples of a row that the filters along W read, a tap after the other. Coefficients begin at `at`; a row that
    is not `there` has zeros."""
    read = ()
    if MODE == "zero":
        lines += at
    for t in tl.static_range(TAPS):
        if MODE == "zero":
            value = _load(lines + t * STEP, there & _inside(at + t * STEP, size))
        else:
            place, sign = _source(at + t * STEP, size, MODE, FAR)
            value = _load(lines + place, valid)
            if MODE == "antisymmetric":
                value *= sign.to(value.dtype)
        read = read + (value,)  # noqa: RUF005
    return read


@triton.jit
def _samples_by_pairs(
    lines, at, pairs, there, valid, TAPS: tl.constexpr, SKIP: tl.constexpr, MODE: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """The same from aligned pairs of samples, one load each, on a line of so many `pairs`; all numbers count pairs. A
    line goes on by pairs as it does by samples, and a reflected pair the other way round. SKIP: the first coefficient
    begins with a pair's second sample."""
    REFLECTS: tl.constexpr = MODE == "symmetric" or MODE == "antisymmetric"
    OF_PAIRS: tl.constexpr = "antisymmetric" if REFLECTS else "periodic"  # with a sign where a pair is reflected
    read = ()
    if MODE == "zero":
        lines += 2 * at
    for j in tl.static_range((TAPS + SKIP + 1) // 2):
        if MODE == "zero":
            inside = there & _inside(at + j, pairs)
            from_ = lines + 2 * j
        else:
            place, sign = _source(at + j, pairs, OF_PAIRS, FAR)
            inside = valid
            from_ = lines + 2 * place
        one, two = _pair(from_, inside)
        if REFLECTS:
            back = sign < 0
            one, two = tl.where(back, two, one), tl.where(back, one, two)
        if MODE == "antisymmetric":
            one, two = one * sign.to(one.dtype), two * sign.to(two.dtype)
        if 2 * j >= SKIP:
            read = read + (one,)  # noqa: RUF005
        if 2 * j + 1 < TAPS + SKIP:
            read = read + (two,)  # noqa: RUF005
    return read


@triton.jit
def _sum(read, first: tl.constexpr, taps, BY: tl.constexpr, TAPS: tl.constexpr, like):
    """The sum by a filter of `read` from number `first` on, every BY-th."""
    total = tl.zeros_like(like)
    for t in tl.static_range(TAPS):
        total += taps[t] * read[first + t * BY].to(like.dtype)
    return total


@triton.jit
def _weighted(values, first: tl.constexpr, taps, TAPS: tl.constexpr):
    """The same of neighbours in the type of the arithmetic. It begins with a product and _sum with zeros: one form for
    both is predicted slower, at eight taps by up to a fifth."""
    total = values[first] * taps[0]
    for t in tl.static_range(1, TAPS):
        total += values[first + t] * taps[t]
    return total


@triton.jit(do_not_specialize=_SIZES + _STRIDES)
def _analysis_kernel(
    image, ll, high, low_w, high_w, low_h, high_h,
    planes: tl.int32, channels: tl.int32, height: tl.int32, width: tl.int32, count_h: tl.int32, count_w: tl.int32,
    start_h: tl.int32, start_w: tl.int32,
    image_n: tl.int64, image_c: tl.int64, image_y: tl.int64,
    ll_n: tl.int64, ll_c: tl.int64, ll_y: tl.int64,
    high_n: tl.int64, high_c: tl.int64, high_b: tl.int64, high_y: tl.int64,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, MODE: tl.constexpr, FAR_H: tl.constexpr, FAR_W: tl.constexpr,
    PAIR: tl.constexpr, SKIP: tl.constexpr,
    GAP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """With a PAIR of 2 the strides of the image arrive halved: multiplying by the constant proves pairs aligned."""
    EVERY: tl.constexpr = GAP * STRIDE_H // STEP_H  # rows of samples from one row of coefficients to the next
    n, c, col, valid, row = _origin(planes, channels, count_h, count_w, GAP, ROWS, TILE)
    plane = image + n * (image_n * PAIR) + c * (image_c * PAIR)
    to_ll = ll + n * ll_n + c * ll_c + col
    to_high = high + n * high_n + c * high_c + col
    at = (start_w >> 1) + col if PAIR == 2 else start_w + STRIDE_W * col
    at = tl.where(valid, at, 2**30 // PAIR)
    like = tl.zeros((TILE,), low_w.dtype.element_ty)
    taps_w = (_taps(low_w, TAPS_W), _taps(high_w, TAPS_W))
    taps_h = (_taps(low_h, TAPS_H), _taps(high_h, TAPS_H))
    line = plane + (start_h + STRIDE_H * row) * (image_y * PAIR)
    read = ()
    lows = ()
    highs = ()
    # Loads of the next AHEAD rows come before a store: the compiler moves none past it.
    for ahead in tl.static_range(EVERY * (ROWS - 1) + TAPS_H + AHEAD):
        if ahead < EVERY * (ROWS - 1) + TAPS_H:
            y = start_h + STRIDE_H * row + ahead * STEP_H
            there = _inside(y + tl.zeros_like(at), height)
            if MODE != "zero":
                # Rows of coefficients that the last program has too many of read what the last one reads.
                y = tl.minimum(y, start_h + STRIDE_H * (count_h - 1) + STEP_H * (TAPS_H - 1))
                y, _ = _source(y, height, MODE, FAR_H)
                line = plane + y * (image_y * PAIR)
            if PAIR == 2:
                read = read + _samples_by_pairs(line, at, width // 2, there, valid, TAPS_W, SKIP, MODE, FAR_W)
            else:
                read = read + _samples(line, at, width, there, valid, TAPS_W, STEP_W, MODE, FAR_W)
            line += STEP_H * (image_y * PAIR)
        if ahead >= AHEAD:
            low = _sum(read, (ahead - AHEAD) * TAPS_W, taps_w[0], 1, TAPS_W, like)
            other = _sum(read, (ahead - AHEAD) * TAPS_W, taps_w[1], 1, TAPS_W, like)
            if MODE == "antisymmetric":
                y = start_h + STRIDE_H * row + (ahead - AHEAD) * STEP_H
                y = tl.minimum(y, start_h + STRIDE_H * (count_h - 1) + STEP_H * (TAPS_H - 1))
                _, sign = _source(y, height, MODE, FAR_H)
                low *= sign.to(like.dtype)
                other *= sign.to(like.dtype)
            lows = lows + (low,)  # noqa: RUF005
            highs = highs + (other,)  # noqa: RUF005
            if ahead - AHEAD >= TAPS_H - 1 and (ahead - AHEAD - TAPS_H + 1) % EVERY == 0:
                k = row + (ahead - AHEAD - TAPS_H + 1) // EVERY * GAP
                mask = valid & (col < tl.where(k < count_h, count_w, 0))
                to = to_high + k * high_y
                ll_k = _weighted(lows, ahead - AHEAD - TAPS_H + 1, taps_h[0], TAPS_H)
                lh_k = _weighted(lows, ahead - AHEAD - TAPS_H + 1, taps_h[1], TAPS_H)
                hl_k = _weighted(highs, ahead - AHEAD - TAPS_H + 1, taps_h[0], TAPS_H)
                hh_k = _weighted(highs, ahead - AHEAD - TAPS_H + 1, taps_h[1], TAPS_H)
                tl.store(to_ll + k * ll_y, ll_k.to(ll.dtype.element_ty), mask=mask)
                tl.store(to, lh_k.to(high.dtype.element_ty), mask=mask)
                tl.store(to + high_b, hl_k.to(high.dtype.element_ty), mask=mask)
                tl.store(to + 2 * high_b, hh_k.to(high.dtype.element_ty), mask=mask)


@triton.jit
def _coefficients(
    band, k, count, there, valid, STEPS: tl.constexpr, WRAP: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """The coefficients of a row that the pairs `k` of samples along W are sums of. A row that is not `there` has zeros.
    `band` points to a row's first, or where it does not WRAP to number `k`."""
    read = ()
    for j in tl.static_range(STEPS):
        if WRAP:
            place, _ = _source(k - j, count, "periodic", FAR)
            value = _load(band + place, valid)
        else:
            value = _load(band - j, there & _inside(k - j, count))
        read = read + (value,)  # noqa: RUF005
    return read


@triton.jit
def _phase(read, first: tl.constexpr, taps, STEP: tl.constexpr, PHASE: tl.constexpr, TAPS: tl.constexpr, like):
    """Samples number PHASE of each pair: `read` from number `first` on, every STEP-th, by every second tap."""
    total = tl.zeros_like(like)
    for j in tl.static_range((TAPS + 1 - PHASE) // 2):
        total += taps[2 * j + PHASE] * read[first + j * STEP].to(like.dtype)
    return total


@triton.jit
def _row(
    read, first: tl.constexpr, taps, SKIP: tl.constexpr, TAPS: tl.constexpr, LOADS: tl.constexpr, HIGH: tl.constexpr,
    like,
):  # fmt: skip
    """The two samples of each pair along W: of a band at number `first`, and of the next but one, LOADS values each, by
    the high-pass."""
    one = _phase(read, first + SKIP, taps[0], 1, SKIP, TAPS, like)
    two = _phase(read, first, taps[0], 1, 1 - SKIP, TAPS, like)
    if HIGH:
        one += _phase(read, first + SKIP + 2 * LOADS, taps[1], 1, SKIP, TAPS, like)
        two += _phase(read, first + 2 * LOADS, taps[1], 1, 1 - SKIP, TAPS, like)
    return one, two


@triton.jit(do_not_specialize=("down", "across", "first_h", "first_w", *_SIZES, *_STRIDES))
def _synthesis_kernel(
    image, ll, high, low_w, high_w, low_h, high_h,
    down: tl.int32, across: tl.int32, first_h: tl.int32, first_w: tl.int32,
    planes: tl.int32, channels: tl.int32, height: tl.int32, width: tl.int32, count_h: tl.int32, count_w: tl.int32,
    start_h: tl.int32, start_w: tl.int32,
    image_n: tl.int64, image_c: tl.int64, image_y: tl.int64,
    ll_n: tl.int64, ll_c: tl.int64, ll_y: tl.int64,
    high_n: tl.int64, high_c: tl.int64, high_b: tl.int64, high_y: tl.int64,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, WRAP: tl.constexpr, FAR_H: tl.constexpr, FAR_W: tl.constexpr,
    HIGH: tl.constexpr, PAIR: tl.constexpr, SKIP: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Pairs of samples: numbers start_h + 2 k and the next along H, for `down` k from first_h, as many `across` W.

    With a PAIR of 2 the image's strides arrive halved, which proves pairs aligned. SKIP moves those along W to even
    places: such a pair is the second sample of one k and the first of the next."""
    STEPS_H: tl.constexpr = (TAPS_H + 1) // 2
    LOADS: tl.constexpr = (TAPS_W + 1) // 2 + SKIP
    BANDS: tl.constexpr = 4 if HIGH else 1
    n, c, col, valid, row = _origin(planes, channels, down, across, 1, ROWS, TILE)
    row += first_h
    col += first_w
    x = (start_w + SKIP) // PAIR * PAIR + 2 * col[:, None] + tl.arange(0, 2)[None, :]
    to = image + n[:, None] * (image_n * PAIR) + c[:, None] * (image_c * PAIR) + x
    x = tl.where(valid[:, None], x, -1)
    col = tl.where(valid, col + SKIP, 2**29)
    k = row - (STEPS_H - 1)
    from_ll = ll + n * ll_n + c * ll_c
    from_high = high + n * high_n + c * high_c
    if not WRAP:
        from_ll += k * ll_y + col
        from_high += k * high_y + col
    like = tl.zeros((TILE,), low_w.dtype.element_ty)
    taps_w = (_taps(low_w, TAPS_W), _taps(high_w, TAPS_W))
    taps_h = (_taps(low_h, TAPS_H), _taps(high_h, TAPS_H))
    read = ()
    low0 = ()
    low1 = ()
    high0 = ()
    high1 = ()
    # Loads of the next AHEAD rows come before a store: the compiler moves none past it.
    for ahead in tl.static_range(ROWS + STEPS_H - 1 + AHEAD):
        if ahead < ROWS + STEPS_H - 1:
            there = _inside(k + ahead + tl.zeros_like(col), count_h)
            of_ll, of_high = from_ll, from_high
            if WRAP:
                # Rows that the last program has too many of read what the last one reads.
                place, _ = _source(tl.minimum(k + ahead, first_h + down - 1), count_h, "periodic", FAR_H)
                of_ll += place * ll_y
                of_high += place * high_y
            read = read + _coefficients(of_ll, col, count_w, there, valid, LOADS, WRAP, FAR_W)
            if HIGH:
                for band in tl.static_range(3):
                    read = read + _coefficients(of_high + band * high_b, col, count_w, there, valid, LOADS, WRAP, FAR_W)
            if not WRAP:
                from_ll += ll_y
                from_high += high_y
        if ahead >= AHEAD:
            # From LL and HL what the low-pass along H takes, from LH and HH what the high-pass takes.
            one, two = _row(read, (ahead - AHEAD) * BANDS * LOADS, taps_w, SKIP, TAPS_W, LOADS, HIGH, like)
            low0 = low0 + (one,)  # noqa: RUF005
            low1 = low1 + (two,)  # noqa: RUF005
            if HIGH:
                one, two = _row(read, (4 * (ahead - AHEAD) + 1) * LOADS, taps_w, SKIP, TAPS_W, LOADS, HIGH, like)
                high0 = high0 + (one,)  # noqa: RUF005
                high1 = high1 + (two,)  # noqa: RUF005
            if ahead - AHEAD >= STEPS_H - 1:
                for phase in tl.static_range(2):
                    even = _phase(low0, ahead - AHEAD, taps_h[0], -1, phase, TAPS_H, like)
                    odd = _phase(low1, ahead - AHEAD, taps_h[0], -1, phase, TAPS_H, like)
                    if HIGH:
                        even += _phase(high0, ahead - AHEAD, taps_h[1], -1, phase, TAPS_H, like)
                        odd += _phase(high1, ahead - AHEAD, taps_h[1], -1, phase, TAPS_H, like)
                    y = start_h + 2 * (row + ahead - AHEAD - (STEPS_H - 1)) + phase
                    samples = tl.join(even, odd).to(image.dtype.element_ty)
                    limit = tl.where((y >= 0) & (y < height), width, 0)
                    tl.store(to + y * (image_y * PAIR), samples, mask=x.to(tl.uint32) < limit.to(tl.uint32))


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
    constants: dict[str, Any] = {"TAPS_H": lengths[0], "TAPS_W": lengths[1], "enable_fp_fusion": True}
    aligned = image.data_ptr() % (2 * image.element_size()) == 0
    aligned = aligned and all(number % 2 == 0 for number in (size[1], *image.stride()[:3]))
    pair = 2 if aligned and (not analysis or mode in _BY_PAIRS) else 1
    constants |= {"PAIR": pair, "SKIP": starts[1] % pair}
    scalars[8:11] = (stride // pair for stride in image.stride()[:3])
    if analysis:
        far = [
            mode != "zero" and max(-start, start + 2 * (count - 1) + length - n) >= n
            for n, count, start, length in zip(size, counts, starts, lengths, strict=True)
        ]
        constants |= {"MODE": mode, "FAR_H": far[0], "FAR_W": far[1], "GAP": 1}
        constants |= {"STRIDE_H": 2, "STRIDE_W": 2, "STEP_H": 1, "STEP_W": 1}
        down, across = counts
    else:
        firsts = [-start // 2 for start in starts]
        down, across = ((n - 1 - s) // 2 - f + 1 for n, s, f in zip(size, starts, firsts, strict=True))
        scalars = [down, across, *firsts, *scalars]
        steps = (length // 2 + 1 for length in lengths)
        far = [
            mode == "periodization" and max(step - first, first + number + 1 - n) > n
            for n, first, number, step in zip(counts, firsts, (down, across), steps, strict=True)
        ]
        constants |= {"WRAP": mode == "periodization", "FAR_H": far[0], "FAR_W": far[1], "HIGH": high is not None}
    waits = image.element_size() == 2 or "symmetric" in mode
    config = config or config_for(analysis, n * c, down, across, lengths, waits)
    constants |= {"ROWS": config.rows, "TILE": config.tile, "AHEAD": config.ahead, "num_warps": config.num_warps}
    grid = (-(-down // config.rows) * -(-n * c * across // config.tile),)
    return Launch(_analysis_kernel if analysis else _synthesis_kernel, grid, (*tensors, *scalars), constants)
