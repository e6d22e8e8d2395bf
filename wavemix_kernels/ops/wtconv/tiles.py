"""Tiles of the Triton kernels of WTConv (ops/wtconv/triton.py). Free of triton."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WtconvConfig:
    """`rows` rows of coefficients of `positions` columns (of all images, one after the other) and `channels`
    channels, by `num_warps` warps. Both of the latter are powers of two."""

    rows: int
    positions: int
    channels: int
    num_warps: int


def config_for(kind: str, channels_last: bool, c: int, rows: int) -> WtconvConfig:
    """The default of the kernel `kind`: "low", "level" or "weights". Images in rows go channel by channel, so that
    taps are numbers and no vectors; else a warp's lanes are channels. (docs/develop/tuning.md, WTConv)"""
    most = {"low": 4, "level": 8, "weights": 8}[kind] if not channels_last else 4
    blocks = -(-rows // most)
    deep = -(-rows // blocks)
    if not channels_last:
        return WtconvConfig(deep, 128, 1, 2)
    width = min(32, 1 << max(0, c - 1).bit_length())
    return WtconvConfig(deep, 128 // width, width, 2)
