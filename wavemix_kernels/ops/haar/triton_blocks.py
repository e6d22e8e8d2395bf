"""One level of Haar along one, two or three axes in Triton, from and to any strides.

A tile is rows x columns of coefficients. Columns go along the axis that is innermost in memory, whether it is
transformed or not; a row is a place on all other axes. Each corner of a row's blocks is a load of its own, so that
sums and differences are between registers of one thread. Bands that lie side by side in memory are joined to one store.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef, assignment"
# (Triton's functions are traced, not called: their arguments have no Python types, and tuples grow.)
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels.ops.common.triton_launch import Launch
from wavemix_kernels.ops.haar.blocks_plan import INTEGERS, BlocksConfig, plan
from wavemix_kernels.ops.haar.triton_quads import _dealt, _flat


@triton.jit
def _places(row, axes, RANK: tl.constexpr):
    """The place of each row on each axis, the last one fastest."""
    places = ()
    for i in tl.static_range(RANK):
        if i < RANK - 1:
            count = axes[RANK - 1 - i][1]
            places = (row % count,) + places  # noqa: RUF005 (no starred expressions in kernels)
            row = row // count
        else:
            places = (row,) + places  # noqa: RUF005
    return places


@triton.jit
def _corner(
    places, axes, valid, front,
    CORNER: tl.constexpr, BITS: tl.constexpr, EDGES: tl.constexpr, FRONT: tl.constexpr, REPEAT: tl.constexpr,
    RANK: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Offsets in the image of one corner of each row's blocks, whether there are samples, and their sign."""
    at = places[0].to(tl.int64) * 0
    sign = tl.where(valid, 1.0, 1.0)
    for axis in tl.static_range(RANK):
        place = places[axis]
        size, _, stride, _, source = axes[axis]
        if BITS[axis] >= 0:
            place = 2 * place + ((CORNER >> BITS[axis]) & 1)
            if axis == FRONT:
                place -= front
                if REPEAT:
                    place = tl.maximum(place, 0)
                else:
                    valid &= place >= 0
            if EDGES[axis] == 0:
                valid &= place < size
            else:
                if EDGES[axis] < 0:
                    sign = tl.where(place < size, sign, -sign)
                place = tl.where(place < size, place, source)
        at += place * stride * UNITS
    return at, valid, sign


@triton.jit
def _bands_at(places, axes, RANK: tl.constexpr, UNITS: tl.constexpr):
    at = places[0].to(tl.int64) * 0
    for axis in tl.static_range(RANK):
        at += places[axis] * axes[axis][3] * UNITS
    return at


@triton.jit
def _along(at, valid, col, size, stride, CONTIGUOUS: tl.constexpr):
    """Offsets and mask of rows at `at`, in the columns `col` of `size`."""
    if not CONTIGUOUS:
        col = col * stride
    return at[None, :, None] + col[None, None, :], valid[None, :, None]


@triton.jit
def _load(
    image, at, valid, col0, size, stride, source,
    COLS: tl.constexpr, VECTOR: tl.constexpr, PAIRED: tl.constexpr, EDGE: tl.constexpr, CONTIGUOUS: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    """The samples of a corner: of the even and of the odd columns where these are transformed (else of all, twice). A
    thread takes two vectors next to each other and deals them out, so that its coefficients are a whole vector."""
    lane = tl.arange(0, COLS)
    if not PAIRED:
        col = col0 + lane
        offset, mask = _along(at, valid, col, size, stride, CONTIGUOUS)
        both = tl.load(image + offset, mask=mask & (col < size)[None, None, :], other=0.0).to(REAL)
        return both, both
    else:
        RUN: tl.constexpr = VECTOR if CONTIGUOUS else 1
        col = 2 * col0 + lane // RUN * (2 * RUN) + lane % RUN
        offset, mask = _along(at, valid, col, size, stride, CONTIGUOUS)
        first = tl.load(image + offset, mask=mask & (col < size)[None, None, :], other=0.0)
        step = RUN if CONTIGUOUS else stride
        second = tl.load(image + offset + step, mask=mask & (col + RUN < size)[None, None, :], other=0.0)
        even, odd = _dealt(first, second, RUN)
        odd = odd.to(REAL)
        if EDGE != 0:
            last = 2 * (col0 + lane) + 1 == size
            offset, mask = _along(at, valid, tl.zeros_like(lane) + source, size, stride, CONTIGUOUS)
            missing = tl.load(image + offset, mask=mask & last[None, None, :], other=0.0)
            odd = tl.where(last[None, None, :], missing.to(REAL) * EDGE, odd)
        return even.to(REAL), odd


@triton.jit
def _butterflies(values, COUNT: tl.constexpr):
    """Sums and differences along each axis: value i is that of the axes with a bit in i; its own transpose."""
    BITS: tl.constexpr = 3 if COUNT == 8 else COUNT // 2
    for bit in tl.static_range(BITS):
        made = ()
        for i in tl.static_range(COUNT):
            if (i >> bit) & 1:
                made = made + (values[i ^ (1 << bit)] - values[i],)  # noqa: RUF005
            else:
                made = made + (values[i] + values[i ^ (1 << bit)],)  # noqa: RUF005
        values = made
    return values


@triton.jit
def _joined(values, COUNT: tl.constexpr):
    """All bands of each column next to each other."""
    if COUNT == 2:
        joined = tl.join(values[0], values[1])
    elif COUNT == 4:
        joined = tl.join(tl.join(values[0], values[2]), tl.join(values[1], values[3]))
    else:
        even = tl.join(tl.join(values[0], values[4]), tl.join(values[2], values[6]))
        odd = tl.join(tl.join(values[1], values[5]), tl.join(values[3], values[7]))
        joined = tl.join(even, odd)
    return tl.reshape(joined, (1, values[0].shape[1], values[0].shape[2] * COUNT))


@triton.jit
def _apart(x, COUNT: tl.constexpr):
    """Inverse of _joined."""
    ROWS: tl.constexpr = x.shape[1]
    COLS: tl.constexpr = x.shape[2] // COUNT
    if COUNT == 2:
        return tl.split(tl.reshape(x, (1, ROWS, COLS, 2)))
    elif COUNT == 4:
        even, odd = tl.split(tl.reshape(x, (1, ROWS, COLS, 2, 2)))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        return a, b, c, d
    else:
        even, odd = tl.split(tl.reshape(x, (1, ROWS, COLS, 2, 2, 2)))
        even0, even1 = tl.split(even)
        odd0, odd1 = tl.split(odd)
        a, e = tl.split(even0)
        c, g = tl.split(even1)
        b, f = tl.split(odd0)
        d, h = tl.split(odd1)
        return a, b, c, d, e, f, g, h


@triton.jit(do_not_specialize=INTEGERS)
def _blocks_kernel(
    image, bands,
    rows: tl.int32, front: tl.int32, band: tl.int64,
    col_size: tl.int32, col_count: tl.int32, col_image: tl.int64, col_bands: tl.int64, col_source: tl.int32,
    size0: tl.int32, count0: tl.int32, image0: tl.int64, bands0: tl.int64, source0: tl.int32,
    size1: tl.int32, count1: tl.int32, image1: tl.int64, bands1: tl.int64, source1: tl.int32,
    size2: tl.int32, count2: tl.int32, image2: tl.int64, bands2: tl.int64, source2: tl.int32,
    size3: tl.int32, count3: tl.int32, image3: tl.int64, bands3: tl.int64, source3: tl.int32,
    ANALYSIS: tl.constexpr, ORDER: tl.constexpr, WEIGHT: tl.constexpr, RANK: tl.constexpr, BITS: tl.constexpr,
    EDGES: tl.constexpr, FRONT: tl.constexpr, REPEAT: tl.constexpr, SIGNED: tl.constexpr,
    PAIRED: tl.constexpr, EDGE: tl.constexpr,
    IMAGE_UNITS: tl.constexpr, BANDS_UNITS: tl.constexpr, SIZE_UNITS: tl.constexpr, COUNT_UNITS: tl.constexpr,
    VECTOR: tl.constexpr, CONTIGUOUS: tl.constexpr, FORM: tl.constexpr, COUNT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    REAL: tl.constexpr = tl.float64 if image.dtype.element_ty == tl.float64 else tl.float32
    CORNERS: tl.constexpr = COUNT // 2 if PAIRED else COUNT
    axes = (
        (size0, count0, image0, bands0, source0),
        (size1, count1, image1, bands1, source1),
        (size2, count2, image2, bands2, source2),
        (size3, count3, image3, bands3, source3),
    )
    # Multiplied by what divides them, which proves to the compiler that vectors are aligned.
    size = col_size * SIZE_UNITS
    count = col_count * COUNT_UNITS
    tile = tl.program_id(0)
    across = tl.cdiv(count, COLS)
    col0 = tile % across * COLS
    row = tile // across * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    places = _places(row, axes, RANK)
    at_bands = _bands_at(places, axes, RANK, BANDS_UNITS)

    if ANALYSIS:
        values = ()
        for corner in tl.static_range(CORNERS):
            at, there, sign = _corner(
                places, axes, valid, front, corner, BITS, EDGES, FRONT, REPEAT, RANK, IMAGE_UNITS
            )  # fmt: skip
            even, odd = _load(
                image, at, there, col0, size, col_image, col_source, COLS, VECTOR, PAIRED, EDGE, CONTIGUOUS, REAL
            )  # fmt: skip
            if SIGNED:
                even *= sign[None, :, None]
                odd *= sign[None, :, None]
            values = values + ((even, odd) if PAIRED else (even,))
        values = _butterflies(values, COUNT)
        made = ()
        for k in tl.static_range(COUNT):
            made = made + ((values[ORDER[k]] * WEIGHT[k]).to(bands.dtype.element_ty),)  # noqa: RUF005
        if FORM == "interleaved":
            col = col0 * COUNT + tl.arange(0, COLS * COUNT)
            offset, mask = _along(at_bands, valid, col, count, col_bands, True)
            tl.store(bands + offset, _joined(made, COUNT), mask=mask & (col < count * COUNT)[None, None, :])
        else:
            col = col0 + tl.arange(0, COLS)
            offset, mask = _along(at_bands, valid, col, count, col_bands, FORM == "rows")
            mask &= (col < count)[None, None, :]
            for k in tl.static_range(COUNT):
                tl.store(bands + (k * band * BANDS_UNITS + offset), made[k], mask=mask)
    else:
        if FORM == "interleaved":
            col = col0 * COUNT + tl.arange(0, COLS * COUNT)
            offset, mask = _along(at_bands, valid, col, count, col_bands, True)
            given = _apart(tl.load(bands + offset, mask=mask & (col < count * COUNT)[None, None, :], other=0.0), COUNT)
        else:
            col = col0 + tl.arange(0, COLS)
            offset, mask = _along(at_bands, valid, col, count, col_bands, FORM == "rows")
            mask &= (col < count)[None, None, :]
            given = ()
            for k in tl.static_range(COUNT):
                given = given + (tl.load(bands + (k * band * BANDS_UNITS + offset), mask=mask, other=0.0),)  # noqa: RUF005
        values = ()
        for i in tl.static_range(COUNT):
            for k in tl.static_range(COUNT):
                if ORDER[k] == i:
                    values = values + (given[k].to(REAL) * WEIGHT[k],)  # noqa: RUF005
        values = _butterflies(values, COUNT)
        for corner in tl.static_range(CORNERS):
            at, there, _ = _corner(
                places, axes, valid, front, corner, BITS, EDGES, FRONT, REPEAT, RANK, IMAGE_UNITS
            )  # fmt: skip
            if PAIRED:
                col = 2 * col0 + tl.arange(0, 2 * COLS)
                samples = _flat(tl.join(values[2 * corner], values[2 * corner + 1]))
            else:
                col = col0 + tl.arange(0, COLS)
                samples = values[corner]
            offset, mask = _along(at, there, col, size, col_image, CONTIGUOUS)
            tl.store(image + offset, samples.to(image.dtype.element_ty), mask=mask & (col < size)[None, None, :])


def launch(
    analysis: bool, image: Tensor, bands: Tensor, axes: Sequence[int], pattern: Sequence[int], weight: Sequence[float],
    mode: str, front: int, repeat: bool, config: BlocksConfig | None = None,
) -> Launch:  # fmt: skip
    """The launch for arguments as :func:`run` takes them."""
    grid, scalars, constants = plan(
        analysis, image.dtype, tuple(image.shape), image.stride(), bands.stride(), tuple(axes), tuple(pattern),
        tuple(map(float, weight)), mode, front, repeat, config,
    )  # fmt: skip
    return Launch(_blocks_kernel, grid, (image, bands, *scalars), constants)


def run(
    analysis: bool, image: Tensor, bands: Tensor, axes: Sequence[int], pattern: Sequence[int], weight: Sequence[float],
    mode: str, front: int, repeat: bool,
) -> None:  # fmt: skip
    """Writes ``bands`` (n, c, 2^axes, d, h, w) from ``image`` (n, c, d, h, w), or the transpose the other way, as
    :func:`wavemix_kernels.ops.haar.blocks.split` and ``join`` define them; the transpose crops (mode "zero").

    Args:
        image, bands: of one dtype, fp64, fp32, fp16 or bf16, any strides. The half types compute in fp32.
        mode: one whose missing sample is plus or minus one sample.

    Raises:
        ValueError: more than 2^31 - 1 rows.
    """
    launch(analysis, image, bands, axes, pattern, weight, mode, front, repeat).run(image)
