"""Layout, alignment, tile and arguments of a Haar launch in Triton. Free of triton."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wavemix_kernels.ops import tuned
from wavemix_kernels.ops.haar.tiles import MAX_LEVELS, Layout, TileConfig, config_for, search_space, why_invalid

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
EDGES = (0, 1, -1)
_MAX_CHANNELS = 2**29  # 3 * channels plus a tile stays within int32, the type of indices inside a tile

#: Names of the kernels' runtime integers, in their order.
SIZES = ("planes", "channels", "height", "width")
IMAGE = ("image_n", "image_c", "image_h", "image_w")
ADD = ("add_n", "add_c", "add_h", "add_w")
LL = ("ll_n", "ll_c", "ll_h", "ll_w")
HIGH = tuple(f"high{level}_{axis}" for level in range(1, MAX_LEVELS + 1) for axis in "ncbhw")

_Strides = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """All of a launch that follows from shapes and strides; the tensors come on top."""

    layout: Layout
    align: int
    config: TileConfig
    grid: tuple[int]
    scalars: tuple[int, ...]  # the kernel's runtime integers, in its order
    constants: dict[str, Any]
    low_strides: tuple[_Strides, ...] | None


def band_shape(shape: Sequence[int], level: int) -> tuple[int, int, int, int, int]:
    n, c, h, w = shape
    return n, c, 3, -(-h >> level), -(-w >> level)


def _layout_of(width: int, tensors: Sequence[tuple[_Strides, Sequence[int]]]) -> Layout:
    """The innermost dimension that all tensors, given as (strides, sizes), agree on. A dimension of size 1 fits
    anything; one that is broadcast (stride 0) does not."""

    def has(strides: _Strides, sizes: Sequence[int], axis: int, stride: int) -> bool:
        return sizes[axis] == 1 or strides[axis] == stride

    def channels_inner(strides: _Strides, sizes: Sequence[int]) -> bool:
        if len(sizes) == 4:
            return has(strides, sizes, 1, 1)
        return has(strides, sizes, 1, 3) and strides[2] == 1

    rows = all(has(strides, sizes, -1, 1) for strides, sizes in tensors)
    channels = all(channels_inner(strides, sizes) for strides, sizes in tensors)
    if rows and (width > 1 or not channels):
        return "rows"
    return "channels" if channels else "strided"


def tile(direction: str, image: Tensor, levels: int) -> TileConfig | None:
    """The one measured on this device, or None."""
    layout: Layout = "channels" if image.shape[1] > 1 and image.stride(1) == 1 else "rows"
    found: TileConfig | None = tuned.tile(
        f"haar {direction} tile", TileConfig, lambda: search_space(layout, levels, image.itemsize), image,
        extra=(levels,),
    )  # fmt: skip
    return found


@functools.lru_cache(maxsize=4096)
def plan(
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    image_strides: _Strides,
    add_strides: _Strides | None,
    ll_strides: _Strides,
    high_strides: tuple[_Strides | None, ...],
    edge: int,
    synthesis: bool,
    config: TileConfig | None = None,
    low_strides: tuple[_Strides, ...] = (),
) -> Plan:
    """Layout, alignment, tile and arguments of one launch; cached, since a model launches few shapes often."""
    n, c, h, w = shape
    levels = len(high_strides)
    vector = 16 // dtype.itemsize

    def normal(strides: _Strides, sizes: Sequence[int]) -> _Strides:
        return tuple(0 if size == 1 else stride for stride, size in zip(strides, sizes, strict=True))

    image = normal(image_strides, shape)
    add = normal(add_strides, shape) if add_strides is not None else None
    *_, h_ll, w_ll = band_shape(shape, levels)
    ll = normal(ll_strides, (n, c, h_ll, w_ll))
    highs = [normal(s, band_shape(shape, i)) if s is not None else None for i, s in enumerate(high_strides, 1)]
    by_level = [(0, image), (levels, ll), *((i, s) for i, s in enumerate(highs, 1) if s is not None)]
    by_level += [(0, add)] if add is not None else []
    lows = [normal(s, (n, c, *band_shape(shape, i)[3:])) for i, s in enumerate(low_strides, 1)]
    by_level += enumerate(lows, 1)
    sizes = {4: lambda level: (n, c, *band_shape(shape, level)[3:]), 5: lambda level: band_shape(shape, level)}
    layout = _layout_of(w, [(s, sizes[len(s)](level)) for level, s in by_level])

    align = 1
    if layout == "rows":
        # Level l is read and written in vectors too, so the image's alignment may count for 2**l of them.
        most = vector << levels
        align = min(math.gcd(w, most), *(math.gcd(most, *s[:-1]) << level for level, s in by_level))
    elif layout == "channels":
        align = math.gcd(vector, c, *(stride for _, s in by_level for stride in (s[0], *s[-2:])))

    config = config or config_for(layout, levels, dtype.itemsize, shape)
    if (reason := why_invalid(config, levels, dtype.itemsize)) is not None:
        raise ValueError(f"config: {reason}")
    tiles = -(-n * c // config.planes), -(-h // config.rows), -(-w // config.cols)

    def scaled(strides: _Strides, level: int) -> _Strides:
        units = max(align >> level, 1) if layout == "rows" else align
        # The innermost stride is a constant of the layout: only "strided" (units 1) and other axes use theirs.
        return tuple(stride // units for stride in strides)

    units_c, units_w = (align if layout == name else 1 for name in ("channels", "rows"))
    scalars = [n * c // units_c, c // units_c, h, w // units_w, *scaled(image, 0)]
    if synthesis:
        scalars += scaled(add, 0) if add is not None else (0,) * 4
    scalars += scaled(ll, levels)
    for level in range(1, MAX_LEVELS + 1):
        high = highs[level - 1] if level <= levels else None
        scalars += scaled(high, level) if high is not None else (0,) * 5

    run = min(vector, align, config.planes if layout == "channels" else config.cols // 2)
    has_odd_size = (h | w) % (1 << levels) != 0
    constants: dict[str, Any] = {
        "LEVELS": levels, "EDGE": edge if has_odd_size else 0, "LAYOUT": layout, "ALIGN": align,
        "VECTOR": run, "DOUBLINGS": run.bit_length() - 1 if layout == "channels" else 0,
        "ROWS": config.rows, "COLS": config.cols, "PLANES": config.planes, "num_warps": config.num_warps,
        "enable_fp_fusion": False,  # nothing here to fuse; Triton 3.9 warns if left to choose
    }  # fmt: skip
    if synthesis:
        constants["HIGHS"] = sum(1 << i for i, s in enumerate(highs) if s is not None)
        constants["ADD"] = int(add is not None)
    scaled_lows = tuple(scaled(s, level) for level, s in enumerate(lows, 1)) or None
    return Plan(layout, align, config, (math.prod(tiles),), tuple(scalars), constants, scaled_lows)


def check(
    image: Tensor, ll: Tensor, highs: Sequence[Tensor | None], levels: int, edge: float, add: Tensor | None,
    lows: Sequence[Tensor],
) -> None:  # fmt: skip
    if not 1 <= levels <= MAX_LEVELS:
        raise ValueError(f"levels={levels}: one launch takes 1 to {MAX_LEVELS}; chain launches for more")
    if edge not in EDGES:
        raise ValueError(f"edge={edge}: must be one of {EDGES}")
    if image.dtype not in DTYPES:
        raise TypeError(f"image.dtype={image.dtype}: must be one of {DTYPES}")
    if image.ndim != 4:
        raise ValueError(f"image.shape={tuple(image.shape)}: must be (n, c, h, w)")
    if image.shape[1] > _MAX_CHANNELS:
        raise ValueError(f"image.shape={tuple(image.shape)}: more than {_MAX_CHANNELS} channels")
    if len(highs) != levels:
        raise ValueError(f"highs: {len(highs)} levels of bands for levels={levels}")
    if len(lows) not in (0, levels - 1):
        raise ValueError(f"lows: {len(lows)} for levels={levels}: must be none or the {levels - 1} above the last")
    n, c, _, *low = band_shape(image.shape, levels)
    expected = [("ll", ll, (n, c, *low)), ("add", add, tuple(image.shape))]
    expected += [(f"highs[{i}]", high, band_shape(image.shape, i + 1)) for i, high in enumerate(highs)]
    expected += [(f"lows[{i}]", low, (n, c, *band_shape(image.shape, i + 1)[3:])) for i, low in enumerate(lows)]
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if tensor.shape != shape:
            given, whole = tuple(tensor.shape), tuple(image.shape)
            raise ValueError(f"{name}.shape={given}: must be {shape} for image.shape={whole}")
        if tensor.dtype != image.dtype or tensor.device != image.device:
            raise TypeError(
                f"{name} is {tensor.dtype} on {tensor.device}: must match image, {image.dtype} on {image.device}"
            )
