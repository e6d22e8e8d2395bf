"""Tiles of the transposed convolution's kernels: what runs by default. Free of triton."""

import itertools
from dataclasses import dataclass
from typing import Literal

from wavemix_kernels import _native
from wavemix_kernels.ops.common.chips import BY_WARPS, Products
from wavemix_kernels.ops.common.triton_launch import cover, pow2_at_least

Kind = Literal["forward", "input", "weight"]


@dataclass(frozen=True)
class DeconvConfig:
    """Rows of a result by `depth` of the products' inner dimension at a time; `columns`: the most held in registers.

    Rows are pixels, or for the weight's gradient pairs of a tap and an input channel; depth is in channels, or there
    in pixels.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def widths(columns: int, most: int) -> tuple[int, int]:
    """Widths of the tiles that hold equal parts of `columns`, each `most` or fewer."""
    return cover(_cdiv(columns, _cdiv(columns, most)))


def config_for(
    kernel: Kind,
    itemsize: int,
    columns: int,
    inner: int,
    rows: int,
    products: Products = "wgmma",
    precision: str = "ieee",
    multiprocessors: int = _native.MULTIPROCESSORS,
) -> DeconvConfig:
    """The default for a result of `rows` rows: a deterministic function of its arguments; `inner`: what is summed over.

    Half types: 256 x 192 results forward by "wgmma", 256 x 96 by "mma", else 128 x 192, on eight warps, one block for a
    multiprocessor. fp32 of `precision` "ieee" multiplies on the ordinary units: small
    tiles, whose operands take the registers. (docs/develop/tuning.md, Triton tiles: transposed convolution)
    """
    by_warps = products in BY_WARPS
    depth = min(64 // itemsize, max(16, pow2_at_least(inner)))
    if itemsize == 4 and precision == "ieee":
        return DeconvConfig(64, 64, depth, 4, 2)
    tall, widest, stages = 128, 512 // itemsize, 3
    if kernel == "weight":
        tall, widest = min(tall, max(64, pow2_at_least(rows))), min(widest, 96 if by_warps else 192)
    elif kernel == "forward" and itemsize == 2 and products in ("mma", "wgmma"):
        tall, widest, stages = (256, 128, 3) if by_warps else (256, 192, 4)
    programs = _cdiv(columns, widest) * (4 if kernel == "forward" else 1)
    while kernel != "weight" and tall > 64 and _cdiv(rows, tall) * programs < multiprocessors:
        tall //= 2
    if kernel == "input" and by_warps and itemsize == 2:
        depth, stages = 16, 4
    return DeconvConfig(tall, widest, depth, 4 if tall * sum(widths(columns, widest)) <= 8192 else 8, stages)


def search_space(itemsize: int) -> list[DeconvConfig]:
    """Tiles worth timing; gradients in those of 256 rows spill, and may be faster all the same."""
    if itemsize == 4:
        return [DeconvConfig(rows, 64, 16, num_warps, 2) for rows in (32, 64) for num_warps in (4, 8)]
    shapes = ((64, 256, 4), (128, 128, 4), (128, 256, 8), (256, 192, 8), (256, 192, 16))
    tiles = itertools.product(shapes, ((32, 3), (32, 4), (64, 3)))
    return [DeconvConfig(rows, columns, depth, warps, stages) for (rows, columns, warps), (depth, stages) in tiles]
