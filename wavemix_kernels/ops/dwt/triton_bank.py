"""One level of a filter bank of images on any lattice of samples in Triton, both axes in one pass, and its transpose.

The analysis is the kernel of :mod:`.triton_images`; the transpose keeps in registers the sums of those rows of samples
that it has begun. A program's rows lie as far apart as the taps of a dilated filter, so that neighbouring ones share
all but one of the rows that they read.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef, assignment, misc"
# (Triton's functions are traced, not called: their arguments have no Python types, and tuples grow.)
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.common.triton_launch import Launch
from wavemix_kernels.ops.dwt.reference import extend, fold
from wavemix_kernels.ops.dwt.tiles import ImageConfig, bank_config
from wavemix_kernels.ops.dwt.triton_images import _SIZES, _STRIDES, _analysis_kernel, _origin, _sum
from wavemix_kernels.ops.dwt.triton_lines import LINEAR, _source
from wavemix_kernels.ops.dwt.triton_run import check_sizes


@triton.jit
def _coefficients(
    band, at, count, limit, TAPS: tl.constexpr, STEP: tl.constexpr, WRAP: tl.constexpr, FAR: tl.constexpr
):
    """The coefficients of a row that samples take along W, a tap after the other: those whose tap t reads sample
    `at - STEP * t`, counted from the first coefficient's first. `limit` is `count`, or 0 for a row of zeros."""
    read = ()
    for t in tl.static_range(TAPS):
        k = at - t * STEP
        if WRAP:
            k, _ = _source(k, count, "periodic", FAR)
            value = tl.load(band + k)
        else:  # compared as unsigned numbers, negative places are past the end too
            value = tl.load(band + k, mask=k.to(tl.uint32) < limit.to(tl.uint32), other=0.0)
        read = read + (value,)  # noqa: RUF005
    return read


@triton.jit
def _row_of_bands(
    from_ll, from_high, k, at, rows, start_h, count_h, count_w, ll_y, high_b, high_y,
    TAPS_W: tl.constexpr, STEP_W: tl.constexpr, WRAP: tl.constexpr, FAR_H: tl.constexpr, FAR_W: tl.constexpr,
    HIGH: tl.constexpr,
):  # fmt: skip
    """Row k of each band, one after the other, as :func:`_coefficients` reads it."""
    if WRAP:
        # Rows that the last program has too many of read what the last one reads.
        k, _ = _source(tl.minimum(k, rows - 1 - start_h), count_h, "periodic", FAR_H)
        limit = count_w
    else:
        there = (k >= 0) & (k < count_h)
        k = tl.where(there, k, 0)
        limit = tl.where(there, count_w, 0)
    read = _coefficients(from_ll + k * ll_y, at, count_w, limit, TAPS_W, STEP_W, WRAP, FAR_W)
    if HIGH:
        for band in tl.static_range(3):
            line = from_high + band * high_b + k * high_y
            read = read + _coefficients(line, at, count_w, limit, TAPS_W, STEP_W, WRAP, FAR_W)
    return read


@triton.jit
def _phase(start, size, phase, PHASES: tl.constexpr):
    """Every PHASES-th tap from number `phase` on reaches some samples: the first of them, how many there are, and which
    of them is the first coefficient's first."""
    if PHASES == 1:
        return start * 0, size, start
    first = (start + phase + (1 << 20)) % 2
    return first, (size - first + 1) // 2, (start + phase - first) // 2


@triton.jit
def _every(filter, phase, TAPS: tl.constexpr, PHASES: tl.constexpr, ALL: tl.constexpr):
    """Every PHASES-th of ALL taps in registers, with zeros behind."""
    taps = ()
    for t in tl.static_range(TAPS):
        if PHASES == 1:
            tap = tl.load(filter + t)
        else:
            tap = tl.load(filter + phase + t * PHASES, mask=phase + t * PHASES < ALL, other=0.0)
        taps = taps + (tap,)  # noqa: RUF005
    return taps


@triton.jit(do_not_specialize=_SIZES + _STRIDES)  # but for image_x, which mostly is 1
def _transpose_kernel(
    image, ll, high, low_w, high_w, low_h, high_h,
    planes: tl.int32, channels: tl.int32, height: tl.int32, width: tl.int32, count_h: tl.int32, count_w: tl.int32,
    start_h: tl.int32, start_w: tl.int32,
    image_n: tl.int64, image_c: tl.int64, image_y: tl.int64,
    ll_n: tl.int64, ll_c: tl.int64, ll_y: tl.int64,
    high_n: tl.int64, high_c: tl.int64, high_b: tl.int64, high_y: tl.int64, image_x,
    ALL_H: tl.constexpr, ALL_W: tl.constexpr, PHASES_H: tl.constexpr, PHASES_W: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, WRAP: tl.constexpr, FAR_H: tl.constexpr, FAR_W: tl.constexpr,
    HIGH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    BANDS: tl.constexpr = 4 if HIGH else 1
    TAPS_H: tl.constexpr = (ALL_H + PHASES_H - 1) // PHASES_H
    TAPS_W: tl.constexpr = (ALL_W + PHASES_W - 1) // PHASES_W
    phase_h, phase_w = tl.program_id(1) // PHASES_W, tl.program_id(1) % PHASES_W
    y0, rows, start_h = _phase(start_h, height, phase_h, PHASES_H)
    x0, columns, start_w = _phase(start_w, width, phase_w, PHASES_W)
    n, c, col, valid, row = _origin(planes, channels, rows, tl.maximum(columns, 1), STEP_H, ROWS, TILE)
    from_ll = ll + tl.where(valid, n * ll_n + c * ll_c, 0)
    from_high = high + tl.where(valid, n * high_n + c * high_c, 0)
    to = image + n * image_n + c * image_c + y0 * image_y + (x0 + PHASES_W * col) * image_x
    at = col - start_w if WRAP else tl.where(valid, col - start_w, 2**30)
    like = tl.zeros((TILE,), low_w.dtype.element_ty)
    taps_w = _every(low_w, phase_w, TAPS_W, PHASES_W, ALL_W), _every(high_w, phase_w, TAPS_W, PHASES_W, ALL_W)
    taps_h = _every(low_h, phase_h, TAPS_H, PHASES_H, ALL_H), _every(high_h, phase_h, TAPS_H, PHASES_H, ALL_H)
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
            from_ll, from_high, first + ahead * STEP_H, at, rows, start_h, count_h, count_w, ll_y, high_b,
            high_y, TAPS_W, STEP_W, WRAP, FAR_H, FAR_W, HIGH,
        )  # fmt: skip
    for step in tl.range(ROWS + TAPS_H - 1, loop_unroll_factor=AHEAD + 1):
        read = read + _row_of_bands(
            from_ll, from_high, first + (step + AHEAD) * STEP_H, at, rows, start_h, count_h, count_w, ll_y,
            high_b, high_y, TAPS_W, STEP_W, WRAP, FAR_H, FAR_W, HIGH,
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
        y = row + (step - (TAPS_H - 1)) * STEP_H
        mask = valid & (col < tl.where((step >= TAPS_H - 1) & (y < rows), columns, 0))
        tl.store(to + PHASES_H * y * image_y, reached[0].to(image.dtype.element_ty), mask=mask)
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
    """The launch for tensors whose last axis has stride 1, but for a transpose's image.

    Args:
        taps: low and high along W, then along H, on the device, in the type of the arithmetic.
        h, w: the lattices.
        mode: of the analysis none of :data:`~wavemix_kernels.ops.dwt.triton_lines.LINEAR`; the transpose has "zero"
            and, with a coefficient for every sample, "periodic". It has a stride of 1, or of 2 with a step of 1.
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
    if not analysis:
        scalars.append(image.stride(3))
    phases = (1, 1) if analysis else (stride_h, stride_w)
    constants: dict[str, Any] = {
        "STEP_H": step_h, "STEP_W": step_w, "FAR_H": far[0] and mode != "zero", "FAR_W": far[1] and mode != "zero",
        "enable_fp_fusion": True,
    }  # fmt: skip
    if analysis:
        gap = max(1, step_h // stride_h)
        constants |= {"TAPS_H": lengths[0], "TAPS_W": lengths[1], "STRIDE_H": stride_h, "STRIDE_W": stride_w}
        constants |= {"MODE": mode, "GAP": gap, "PAIR": 1, "SKIP": 0}
        down, across = ll.shape[2:]
    else:
        gap = step_h
        constants |= {"ALL_H": lengths[0], "ALL_W": lengths[1], "PHASES_H": phases[0], "PHASES_W": phases[1]}
        constants |= {"WRAP": mode == "periodic", "HIGH": high is not None}
        down, across = (-(-s // each) for s, each in zip(size, phases, strict=True))
    taps_of_each = -(-lengths[0] // phases[0]), -(-lengths[1] // phases[1])
    config = config or bank_config(analysis, n * c * math.prod(phases), down, across, taps_of_each)
    constants |= {"ROWS": config.rows, "TILE": config.tile, "AHEAD": config.ahead, "num_warps": config.num_warps}
    grid = (gap * -(-down // (gap * config.rows)) * -(-n * c * across // config.tile), math.prod(phases))
    tensors = (image, ll, ll if high is None else high, *taps)
    return Launch(_analysis_kernel if analysis else _transpose_kernel, grid, (*tensors, *scalars), constants)


def past(lattice: Sequence[int], taps: int, size: int) -> int:
    """How many samples past the end of a line its coefficients read."""
    start, count, stride, step = lattice
    return max(0, start + stride * (count - 1) + step * (taps - 1) + 1 - size)


def analyse(image: Tensor, bands: Sequence[Tensor], banks: Sequence[Any], mode: str) -> None:
    """Writes the bands (N, C, 4, h, w) of each bank (filters, lattices along H and W) of image (N, C, H, W). Half types
    compute in fp32.

    Raises:
        ValueError: mode "reflect" or "antireflect" at a size of 1.
    """
    if image.numel() == 0:
        return
    check_sizes(image.shape[2:], mode)
    exact = accumulate_dtype(image.dtype)
    for out, (filters, h, w) in zip(bands, banks, strict=True):
        x, taps, way = image, _flat(filters, exact), _periodic(image, mode)
        if way in LINEAR:  # a sample past the ends is a sum of several: they are written first
            x = x.to(exact)
            for dim, lattice, length, size in _axes(image, taps, h, w):
                x = extend(x, dim, -lattice[0], past(lattice, length, size), way)
            (h, w), way = ((0, *h[1:]), (0, *w[1:])), "zero"
        x = x if x.stride(-1) == 1 else x.contiguous()
        launch(True, x, out[:, :, 0], out[:, :, 1:], taps, h, w, way).run(image)


def synthesise(
    image: Tensor, ll: Sequence[Tensor], high: Sequence[Tensor | None], banks: Sequence[Any], mode: str
) -> None:
    """The transpose of :func:`analyse`: writes the sum of all banks', of bands (N, C, h, w) and (N, C, 3, h, w) or
    None. Raises as it."""
    if image.numel() == 0:
        return
    check_sizes(image.shape[2:], mode)
    exact = accumulate_dtype(image.dtype)
    parts = [
        _Part(_by_rows(one), None if other is None else _by_rows(other), _flat(filters, exact), h, w)
        for one, other, (filters, h, w) in zip(ll, high, banks, strict=True)
    ]
    way = _periodic(image, mode)
    if len(parts) == 1:
        axes = _axes(image, parts[0].taps, parts[0].h, parts[0].w)
        wraps = way == "periodic" and all(lattice[2] == 1 and lattice[1] == size for _, lattice, _, size in axes)
        if way == "zero" or wraps:
            _transpose(image, parts[0], way)
            return
    reach = [[(-a[0], past(a, length, size)) for _, a, length, size in _axes(image, p.taps, p.h, p.w)] for p in parts]
    (before_h, after_h), (before_w, after_w) = (
        tuple(max(of_axis[axis][end] for of_axis in reach) for end in (0, 1)) for axis in (0, 1)
    )
    height, width = image.shape[2:]
    wide = image.new_empty((*image.shape[:2], before_h + height + after_h, before_w + width + after_w), dtype=exact)
    moved = [p._replace(h=(before_h + p.h[0], *p.h[1:]), w=(before_w + p.w[0], *p.w[1:])) for p in parts]
    if not _weave(wide, moved):
        for i, one in enumerate(moved):
            part = torch.empty_like(wide) if i else wide
            _transpose(part, one, "zero")
            if i:
                wide += part
    wide = fold(wide, -2, before_h, height, way)
    image.copy_(fold(wide, -1, before_w, width, way))


class _Part(NamedTuple):
    """A bank of a transpose and its coefficients, as :func:`launch` takes them."""

    ll: Tensor
    high: Tensor | None
    taps: list[Tensor]
    h: Sequence[int]
    w: Sequence[int]


def _weave(wide: Tensor, parts: Sequence[_Part]) -> bool:
    """Writes samples that each belong to one part alone, such as those of the two trees along each axis; False where
    they do not."""
    apart = _apart(parts[0])
    first = {(p.h[0] % apart[0], p.w[0] % apart[1]) for p in parts}
    if any(_apart(p) != apart for p in parts) or not len(first) == len(parts) == math.prod(apart):
        return False
    for part in parts:
        _launch_on_own(wide, part, "zero")
    return True


def _transpose(image: Tensor, part: _Part, mode: str) -> None:
    """Writes one part's samples, and zeros between them."""
    if _apart(part) != (1, 1):
        image.zero_()
    _launch_on_own(image, part, mode)


def _launch_on_own(image: Tensor, part: _Part, mode: str) -> None:
    """Writes the samples that the part reaches, an image of their own, and no others."""
    apart = _apart(part)
    own = image[:, :, part.h[0] % apart[0] :: apart[0], part.w[0] % apart[1] :: apart[1]]
    h, w = (
        (start // d, count, stride // d, step // d)
        for (start, count, stride, step), d in zip((part.h, part.w), apart, strict=True)
    )
    if own.numel() > 0:
        launch(False, own, *part._replace(h=h, w=w), mode).run(image)


def _apart(part: _Part) -> tuple[int, int]:
    """How far the samples that a part reaches lie from each other."""
    return math.gcd(*part.h[2:]), math.gcd(*part.w[2:])


def _flat(filters: Sequence[Tensor], exact: torch.dtype) -> list[Tensor]:
    return [f.detach().to(exact).flatten().contiguous() for f in filters]


def _by_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _periodic(image: Tensor, mode: str) -> str:
    """The mode, with the simpler name of "periodization" at even sizes."""
    return "periodic" if mode == "periodization" and all(size % 2 == 0 for size in image.shape[2:]) else mode


def _axes(image: Tensor, taps: Sequence[Tensor], h: Sequence[int], w: Sequence[int]) -> list[Any]:
    """Axis, lattice, taps and size."""
    return [(-2, h, taps[2].numel(), image.shape[2]), (-1, w, taps[0].numel(), image.shape[3])]
