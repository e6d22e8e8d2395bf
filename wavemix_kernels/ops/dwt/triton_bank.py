"""One level of a filter bank of images on any lattice of samples in Triton, both axes in one pass, and its transpose.

The analysis is the kernel of :mod:`.triton_images`; the transpose keeps in registers the sums of those rows of samples
that it has begun. A program's rows lie as far apart as the taps of a dilated filter, so that neighbouring ones share
all but one of the rows that they read.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef, assignment, misc"
# (Triton's functions are traced, not called: their arguments have no Python types, and tuples grow.)
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.common.triton_launch import Launch
from wavemix_kernels.ops.dwt.reference import extend, fold
from wavemix_kernels.ops.dwt.tiles import ImageConfig, bank_config
from wavemix_kernels.ops.dwt.triton_images import _SIZES, _STRIDES, _analysis_kernel, _origin, _sum, _taps
from wavemix_kernels.ops.dwt.triton_lines import LINEAR, _source
from wavemix_kernels.ops.dwt.triton_run import check_sizes


@triton.jit
def _coefficients(
    band, at, count, limit,
    TAPS: tl.constexpr, STRIDE: tl.constexpr, STEP: tl.constexpr, WRAP: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """The coefficients of a row that samples take along W, a tap after the other: those whose tap t reads sample
    `at - STEP * t`, counted from the first coefficient's first. `limit` is `count`, or 0 for a row of zeros."""
    read = ()
    for t in tl.static_range(TAPS):
        from_first = at - t * STEP
        if WRAP:
            k, _ = _source(from_first, count, "periodic", FAR)
            value = tl.load(band + k)
        else:
            k = from_first // STRIDE
            # Compared as unsigned numbers, negative places are past the end too.
            inside = from_first.to(tl.uint32) < (limit * STRIDE).to(tl.uint32)
            if STRIDE > 1:
                inside &= from_first % STRIDE == 0
            value = tl.load(band + k, mask=inside, other=0.0)
        read = read + (value,)  # noqa: RUF005
    return read


@triton.jit
def _row_of_bands(
    from_ll, from_high, from_first, at, height, start_h, count_h, count_w, ll_y, high_b, high_y,
    TAPS_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, STEP_W: tl.constexpr, WRAP: tl.constexpr,
    FAR_H: tl.constexpr, FAR_W: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """What :func:`_coefficients` reads of each band, of the row whose first tap along H reads sample `from_first`."""
    if WRAP:
        # Rows that the last program has too many of read what the last one reads.
        k, _ = _source(tl.minimum(from_first, height - 1 - start_h), count_h, "periodic", FAR_H)
        limit = count_w
    else:
        there = (from_first >= 0) & (from_first < count_h * STRIDE_H) & (from_first % STRIDE_H == 0)
        k = tl.where(there, from_first // STRIDE_H, 0)
        limit = tl.where(there, count_w, 0)
    read = _coefficients(from_ll + k * ll_y, at, count_w, limit, TAPS_W, STRIDE_W, STEP_W, WRAP, FAR_W)
    if HIGH:
        for band in tl.static_range(3):
            line = from_high + band * high_b + k * high_y
            read = read + _coefficients(line, at, count_w, limit, TAPS_W, STRIDE_W, STEP_W, WRAP, FAR_W)
    return read


@triton.jit(do_not_specialize=_SIZES + _STRIDES)
def _transpose_kernel(
    image, ll, high, low_w, high_w, low_h, high_h,
    planes: tl.int32, channels: tl.int32, height: tl.int32, width: tl.int32, count_h: tl.int32, count_w: tl.int32,
    start_h: tl.int32, start_w: tl.int32,
    image_n: tl.int64, image_c: tl.int64, image_y: tl.int64,
    ll_n: tl.int64, ll_c: tl.int64, ll_y: tl.int64,
    high_n: tl.int64, high_c: tl.int64, high_b: tl.int64, high_y: tl.int64,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, WRAP: tl.constexpr, FAR_H: tl.constexpr, FAR_W: tl.constexpr,
    HIGH: tl.constexpr, GAP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    BANDS: tl.constexpr = 4 if HIGH else 1
    n, c, col, valid, row = _origin(planes, channels, height, width, GAP, ROWS, TILE)
    from_ll = ll + tl.where(valid, n * ll_n + c * ll_c, 0)
    from_high = high + tl.where(valid, n * high_n + c * high_c, 0)
    to = image + n * image_n + c * image_c + col
    at = col - start_w if WRAP else tl.where(valid, col - start_w, 2**30)
    like = tl.zeros((TILE,), low_w.dtype.element_ty)
    taps_w = (_taps(low_w, TAPS_W), _taps(high_w, TAPS_W))
    taps_h = (_taps(low_h, TAPS_H), _taps(high_h, TAPS_H))
    sums = ()
    for _reach in tl.static_range(TAPS_H):
        sums = sums + (like,)  # noqa: RUF005
    # A row of coefficients adds to the samples that it reaches, the first of which is complete then. A loop, not
    # unrolled: the compiler would keep the loads of many rows in registers, and few warps would fit. Those of the next
    # AHEAD rows are on their way.
    first = row - start_h - (TAPS_H - 1) * STEP_H
    read = ()
    for ahead in tl.static_range(AHEAD):
        read = read + _row_of_bands(
            from_ll, from_high, first + ahead * STEP_H, at, height, start_h, count_h, count_w, ll_y, high_b,
            high_y, TAPS_W, STRIDE_H, STRIDE_W, STEP_W, WRAP, FAR_H, FAR_W, HIGH,
        )  # fmt: skip
    for step in tl.range(ROWS + TAPS_H - 1, loop_unroll_factor=AHEAD + 1):
        read = read + _row_of_bands(
            from_ll, from_high, first + (step + AHEAD) * STEP_H, at, height, start_h, count_h, count_w, ll_y,
            high_b, high_y, TAPS_W, STRIDE_H, STRIDE_W, STEP_W, WRAP, FAR_H, FAR_W, HIGH,
        )  # fmt: skip
        # From LL and HL what the low-pass along H takes, from LH and HH what the high-pass takes.
        low = _sum(read, 0, taps_w[0], 1, TAPS_W, like)
        high_row = like
        if HIGH:
            low += _sum(read, 2 * TAPS_W, taps_w[1], 1, TAPS_W, like)
            high_row = _sum(read, TAPS_W, taps_w[0], 1, TAPS_W, like)
            high_row += _sum(read, 3 * TAPS_W, taps_w[1], 1, TAPS_W, like)
        reached = ()
        for t in tl.static_range(TAPS_H):
            sample = sums[t] + taps_h[0][t] * low
            if HIGH:
                sample += taps_h[1][t] * high_row
            reached = reached + (sample,)  # noqa: RUF005
        y = row + (step - (TAPS_H - 1)) * GAP
        mask = valid & (col < tl.where((step >= TAPS_H - 1) & (y < height), width, 0))
        tl.store(to + y * image_y, reached[0].to(image.dtype.element_ty), mask=mask)
        sums = ()
        for t in tl.static_range(1, TAPS_H):
            sums = sums + (reached[t],)  # noqa: RUF005
        sums = sums + (like,)  # noqa: RUF005
        later = ()
        for i in tl.static_range(BANDS * TAPS_W, (AHEAD + 1) * BANDS * TAPS_W):
            later = later + (read[i],)  # noqa: RUF005
        read = later


def launch(
    analysis: bool, image: Tensor, ll: Tensor, high: Tensor | None, taps: Sequence[Tensor], h: Sequence[int],
    w: Sequence[int], mode: str, config: ImageConfig | None = None,
) -> Launch:  # fmt: skip
    """The launch for tensors whose last axis has stride 1.

    Args:
        taps: low and high along W, then along H, on the device, in the type of the arithmetic.
        h, w: the lattices.
        mode: of the analysis none of :data:`~wavemix_kernels.ops.dwt.triton_lines.LINEAR`; the transpose has "zero"
            and, with a coefficient for every sample, "periodic".
    """
    n, c, *size = image.shape
    lengths = taps[2].numel(), taps[0].numel()
    (start_h, _, stride_h, step_h), (start_w, _, stride_w, step_w) = h, w
    far = [
        max(-a[0], past(a, length, s)) >= s if analysis else max(-a[0], a[3] * (length - 1)) >= s
        for a, s, length in zip((h, w), size, lengths, strict=True)
    ]
    scalars = [n * c, c, *size, *ll.shape[2:], start_h, start_w, *image.stride()[:3], *ll.stride()[:3]]
    scalars += [0] * 4 if high is None else high.stride()[:4]
    constants: dict[str, Any] = {
        "TAPS_H": lengths[0], "TAPS_W": lengths[1], "STRIDE_H": stride_h, "STRIDE_W": stride_w, "STEP_H": step_h,
        "STEP_W": step_w, "FAR_H": far[0] and mode != "zero", "FAR_W": far[1] and mode != "zero",
        "enable_fp_fusion": True,
    }  # fmt: skip
    if analysis:
        constants |= {"MODE": mode, "GAP": max(1, step_h // stride_h)}
        down, across = ll.shape[2:]
    else:
        constants |= {"WRAP": mode == "periodic", "HIGH": high is not None, "GAP": step_h}
        down, across = size
    config = config or bank_config(analysis, n * c, down, across, lengths)
    constants |= {"ROWS": config.rows, "TILE": config.tile, "AHEAD": config.ahead, "num_warps": config.num_warps}
    gap = constants["GAP"]
    grid = (gap * -(-down // (gap * config.rows)) * -(-n * c * across // config.tile),)
    tensors = (image, ll, ll if high is None else high, *taps)
    return Launch(_analysis_kernel if analysis else _transpose_kernel, grid, (*tensors, *scalars), constants)


def past(lattice: Sequence[int], taps: int, size: int) -> int:
    """How many samples past the end of a line its coefficients read."""
    start, count, stride, step = lattice
    return max(0, start + stride * (count - 1) + step * (taps - 1) + 1 - size)


def run(
    analysis: bool, image: Tensor, ll: Tensor, high: Tensor | None, filters: Sequence[Tensor], h: Sequence[int],
    w: Sequence[int], mode: str,
) -> None:  # fmt: skip
    """Writes the bands from the image, or the transpose the other way. Half types compute in fp32.

    Args:
        image: (N, C, H, W).
        ll, high: (N, C, h, w) and (N, C, 3, h, w); of a transpose `high` may be None.

    Raises:
        ValueError: mode "reflect" or "antireflect" at a size of 1.
    """
    if image.numel() == 0:
        return
    check_sizes(image.shape[2:], mode)
    exact = accumulate_dtype(image.dtype)
    taps = [f.detach().to(exact).flatten().contiguous() for f in filters]
    axes = [(-2, h, taps[2].numel(), image.shape[2]), (-1, w, taps[0].numel(), image.shape[3])]
    if mode == "periodization" and all(size % 2 == 0 for size in image.shape[2:]):
        mode = "periodic"
    ll = ll if ll.stride(-1) == 1 else ll.contiguous()
    high = high if high is None or high.stride(-1) == 1 else high.contiguous()
    from_first = (0, *h[1:]), (0, *w[1:])
    if analysis:
        if mode in LINEAR:  # a sample past the ends is a sum of several: they are written first
            image = image.to(exact)
            for dim, lattice, length, size in axes:
                image = extend(image, dim, -lattice[0], past(lattice, length, size), mode)
            (h, w), mode = from_first, "zero"
        image = image if image.stride(-1) == 1 else image.contiguous()
        launch(True, image, ll, high, taps, h, w, mode).run(image)
        return
    wraps = mode == "periodic" and all(lattice[2] == 1 and lattice[1] == size for _, lattice, _, size in axes)
    if mode == "zero" or wraps:
        launch(False, image, ll, high, taps, h, w, mode).run(image)
        return
    sizes = [size - lattice[0] + past(lattice, length, size) for _, lattice, length, size in axes]
    wide = image.new_empty((*image.shape[:2], *sizes), dtype=exact)
    launch(False, wide, ll, high, taps, *from_first, "zero").run(wide)
    for dim, lattice, _, size in axes:
        wide = fold(wide, dim, -lattice[0], size, mode)
    image.copy_(wide)
