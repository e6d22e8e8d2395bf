"""Tiles of the Triton kernels of images (ops/dwt/triton_images.py). Free of triton."""

from __future__ import annotations

from dataclasses import dataclass

#: Filters up to so many taps on both axes take one pass: registers hold as many rows.
ONE_PASS = 16


@dataclass(frozen=True)
class ImageConfig:
    """`rows` rows of coefficients (of pairs of rows, in a transpose) of `tile` columns, by `num_warps` warps. Loads of
    `ahead` rows are on their way while one is filtered."""

    rows: int
    tile: int
    ahead: int
    num_warps: int


def config_for(planes: int, down: int, across: int, taps: tuple[int, int]) -> ImageConfig:
    """The default: the more taps, the more rows share those that their filters overlap in; fewer rows while
    multiprocessors would be idle."""
    rows, warps = min(16 if max(taps) > 4 else 8, down), 4
    while rows > 2 and -(-down // rows) * planes * across < 132 * 512:
        rows = (rows + 1) // 2
    return ImageConfig(rows, 32 * warps, 2 if max(taps) > 4 else 32 // max(taps), warps)
