"""Tiles of the Triton kernels of images (ops/dwt/triton_images.py, triton_bank.py). Free of triton."""

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


def config_for(
    analysis: bool, planes: int, down: int, across: int, taps: tuple[int, int], waits: bool = False
) -> ImageConfig:
    """The default. The more rows, the more of them share those that their filters overlap in; small blocks leave none
    idle. Beyond 4 taps registers hold few loads ahead, of which a transpose has four times as many in a row. An
    analysis has twice as many where it `waits` longer: loads bring half the bytes, or places are reflected first."""
    most, tile, ahead = 8, 128, 32 // max(taps)
    if max(taps) > 4:
        most, tile, ahead = 16, 64, 1 if max(taps) > 8 and not analysis else 4 if analysis and waits else 2
    rows = min(most, down)
    while rows > 2 and -(-down // rows) * planes * across < 132 * 512:
        rows = (rows + 1) // 2
    return ImageConfig(rows, tile, ahead, tile // 32)


def bank_config(analysis: bool, planes: int, down: int, across: int, taps: tuple[int, int]) -> ImageConfig:
    """The same for a filter bank. Its transpose reads a filter's length of all four bands for each row, so that long
    filters leave registers for fewer loads ahead; it loops over rows, and the more there are, the more share those that
    the filters along H overlap in."""
    most, ahead = (8, 2) if analysis else (32, 2 if max(taps) <= 8 else 1 if max(taps) <= 12 else 0)
    rows = min(most, down)
    while rows > 2 and -(-down // rows) * planes * across < 132 * 512:
        rows = (rows + 1) // 2
    return ImageConfig(rows, 128, ahead, 4)
