"""Axes, alignment, tile and arguments of a launch of ops/haar/triton_blocks.py. Free of triton."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from wavemix_kernels.ops.haar.reference import edge_of, half_up
from wavemix_kernels.ops.haar.tiles import LINE

MAX_RANK = 4
_AXIS = ("size", "count", "image", "bands", "source")
#: Names of the kernel's runtime integers, in their order.
INTEGERS = (
    *("rows", "front", "band", "col_size", "col_count", "col_image", "col_bands", "col_source"),
    *(f"{name}{i}" for i in range(MAX_RANK) for name in _AXIS),
)


@dataclass(frozen=True)
class BlocksConfig:
    """A tile of rows x cols coefficients of each band, worked on by `num_warps` warps."""

    rows: int
    cols: int
    num_warps: int


@dataclass(frozen=True)
class Axis:
    """An axis as a launch sees it: `bit` of its place in a block, or -1 where it is not transformed."""

    size: int
    count: int
    image: int  # strides
    bands: int
    source: int = 0  # of the missing sample, times `edge`
    edge: int = 0
    bit: int = -1
    front: bool = False


def config_for(rows: int, cols: int, count: int, itemsize: int, run: int) -> BlocksConfig:
    """The default tile: 128 bytes of samples a thread of four warps, and fewer where an image has little; columns so
    that the edge pads least. `count` bands; `run` coefficients are a vector."""
    each = max(run, 128 // (itemsize * count))
    warps = 4
    while each > run and rows * cols < 512 * 32 * warps * each:
        each //= 2
    while warps > 1 and rows * cols < 256 * 32 * warps * each:
        warps //= 2
    tile = 32 * warps * each
    most = min(tile, 1 << max(0, cols - 1).bit_length())
    least = min(most, LINE // itemsize)
    widths = [1 << k for k in range(least.bit_length() - 1, most.bit_length())]
    width = min(widths, key=lambda w: (-(-cols // w) * w, -w))
    return BlocksConfig(max(1, min(tile // width, 1 << max(0, rows - 1).bit_length())), width, warps)


def _innermost(shape: Sequence[int], strides: Sequence[int], front: int) -> int:
    """The axis of columns: the innermost in memory, but not one with frames in front."""
    places = [i for i in range(5) if shape[i] > 1 and not (front and i == 2)]
    return min(places, key=lambda i: (strides[i] == 0, strides[i], -i), default=4)


def _merged(axes: list[Axis]) -> list[Axis]:
    """Neighbours that are not transformed as one axis, where strides allow it: each axis costs a division a row."""
    out: list[Axis] = []
    for axis in axes:
        if out and out[-1].bit < 0 and axis.bit < 0:
            whole, n = out[-1], axis.count
            if whole.image == n * axis.image and whole.bands == n * axis.bands:
                out[-1] = Axis(whole.count * n, whole.count * n, axis.image, axis.bands)
                continue
        out.append(axis)
    return out


@functools.lru_cache(maxsize=4096)
def plan(
    analysis: bool, dtype: torch.dtype, shape: tuple[int, ...], image_strides: tuple[int, ...],
    bands_strides: tuple[int, ...], axes: tuple[int, ...], pattern: tuple[int, ...], weight: tuple[float, ...],
    mode: str, front: int, repeat: bool, config: BlocksConfig | None = None,
) -> tuple[tuple[int], tuple[int, ...], dict[str, Any]]:  # fmt: skip
    """(grid, the kernel's integers, its constants); cached, since a model launches few shapes often.

    Raises:
        ValueError: more than 2^31 - 1 rows.
    """
    count, band, itemsize = 2 ** len(axes), bands_strides[2], dtype.itemsize
    of_bands = (*bands_strides[:2], *bands_strides[3:])
    inner = _innermost(shape, image_strides, front)
    order = [a for a in axes if a != inner] + [a for a in axes if a == inner]
    paired = inner in axes

    def axis(i: int) -> Axis:
        n, before = shape[i], front if i == 2 else 0
        if i not in axes:
            return Axis(n, n, image_strides[i], of_bands[i])
        edge, source = edge_of(mode, n + before), 0
        if edge.last or edge.before:
            source = n - 1 if edge.last else max(n - 2, 0)
        factor = int(edge.last or edge.before or edge.first) if (n + before) % 2 else 0
        bit = len(axes) - 1 - order.index(i) - int(paired)
        return Axis(n, half_up(n + before), image_strides[i], of_bands[i], source, factor, bit, before > 0)

    outer = sorted((i for i in range(5) if i != inner), key=lambda i: -image_strides[i])
    row_axes = _merged([axis(i) for i in outer if i in axes or shape[i] != 1]) or [Axis(1, 1, 0, 0)]
    col = axis(inner)
    rows = math.prod(a.count for a in row_axes)
    if rows >= 2**31:
        raise ValueError(f"image.shape={shape}: {rows} rows, Triton's kernel takes less than 2^31")

    vector, double = 16 // itemsize, 2 if paired else 1
    contiguous = col.image == 1 or col.size == 1
    form = "strided"
    if col.bands == 1 or col.count == 1:
        form = "rows"
    elif band == 1 and col.bands == count:
        form = "interleaved"
    # Powers of two that divide the columns' sizes, and with them the strides of all rows.
    size_units, count_units = math.gcd(double * vector, col.size), math.gcd(vector, col.count)
    image_units = math.gcd(size_units, *(a.image for a in row_axes))
    bands_units = math.gcd(vector, *(a.bands for a in row_axes))
    if form == "interleaved":
        bands_units = math.gcd(bands_units, col.count * count)
    else:
        bands_units = math.gcd(bands_units, band, col.count if form == "rows" else 0)
    run = min(vector, image_units) if contiguous else 1

    config = config or config_for(rows, col.count, count, itemsize, run)
    scalars = [rows, front, band // bands_units, col.size // size_units]
    scalars += [col.count // count_units, col.image, col.bands, col.source]
    for a in (*row_axes, *[Axis(1, 1, 0, 0)] * (MAX_RANK - len(row_axes))):
        scalars += [a.size, a.count, a.image // image_units, a.bands // bands_units, a.source]
    places = [len(axes) - 1 - order.index(a) for a in axes]  # the kernel's bit of each axis
    bits = tuple(sum((p >> len(axes) - 1 - i & 1) << place for i, place in enumerate(places)) for p in pattern)
    constants: dict[str, Any] = {
        "ANALYSIS": analysis, "ORDER": bits, "WEIGHT": weight, "RANK": len(row_axes),
        "BITS": tuple(a.bit for a in row_axes), "EDGES": tuple(a.edge for a in row_axes),
        "FRONT": next((i for i, a in enumerate(row_axes) if a.front), -1), "REPEAT": repeat,
        "SIGNED": any(a.edge < 0 for a in row_axes),
        "PAIRED": paired, "EDGE": col.edge if paired else 0, "IMAGE_UNITS": image_units, "BANDS_UNITS": bands_units,
        "SIZE_UNITS": size_units, "COUNT_UNITS": count_units, "VECTOR": min(run, config.cols),
        "CONTIGUOUS": contiguous, "FORM": form, "COUNT": count,
        "ROWS": config.rows, "COLS": config.cols, "num_warps": config.num_warps, "enable_fp_fusion": False,
    }  # fmt: skip
    return (-(-rows // config.rows) * -(-col.count // config.cols),), tuple(scalars), constants
