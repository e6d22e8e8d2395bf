"""Tiles of the kernels of reduce_haar: what is legal and what runs by default. Free of triton."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from wavemix_kernels.ops.common.chips import BY_WARPS, Products
from wavemix_kernels.ops.common.triton_launch import pow2_at_least


@dataclass(frozen=True)
class ReduceConfig:
    """Quads of pixels, outputs (channels of the reduced image) and input channels that a program works on at a time."""

    quads: int
    outputs: int
    channels: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class NarrowConfig:
    """Quads of pixels that a program of :mod:`.triton_narrow` works on at a time."""

    quads: int
    num_warps: int
    num_stages: int


def narrow_config_for(channels: int, backward: bool, products: Products = "wgmma") -> NarrowConfig:
    """The default: 8 KB of x at a time, in backward a quarter where matrices multiply by warps, whose operands are
    registers. (docs/develop/tuning.md, Triton: reduce_haar of narrow images)"""
    if backward and products in BY_WARPS:
        return NarrowConfig(32, 4 if channels <= 16 else 8, 2)
    if backward:
        return NarrowConfig(128, 4, 3) if channels <= 16 else NarrowConfig(64, 8, 2)
    return NarrowConfig(128 if channels <= 16 else 64, 4, 1)


#: Channels of images that :mod:`.triton_narrow` serves, and the most columns of its product.
NARROW_CHANNELS, NARROW_COLUMNS = (8, 16, 32), 32


def is_narrow(itemsize: int, levels: int, outputs: int, channels: int) -> bool:
    """Whether :mod:`.triton_narrow` serves dense channels_last images."""
    return itemsize == 2 and levels == 1 and channels in NARROW_CHANNELS and 4 * outputs <= NARROW_COLUMNS


def why_invalid(config: ReduceConfig, levels: int) -> str | None:
    """Why the kernels cannot run this tile, or None if it can."""
    least = max(16, 4 ** (levels - 1))
    if config.quads < least or config.quads & (config.quads - 1):
        return f"quads={config.quads}: {levels} levels need a power of two from {least} on"
    return None


def config_for(itemsize: int, levels: int, outputs: int, channels: int, products: Products = "wgmma") -> ReduceConfig:
    """The default: a deterministic function of its arguments.

    64 KB of accumulators on eight warps; all of the usual 16 to 64 outputs in one program, so that x is read once.
    (docs/develop/tuning.md, Triton tiles)
    """
    quads = max(64, 4 ** (levels - 1))
    across = min(4096 // quads, max(16, pow2_at_least(outputs)))
    depth = min(32 if itemsize == 2 else 16, max(16, pow2_at_least(channels)))
    stages = 3 if itemsize == 2 else 2
    if products == "mfma" and levels == 5:
        stages = 1  # 64 KB of shared memory hold no second one
    return ReduceConfig(quads, across, depth, 8 if quads * across > 2048 else 4, stages)


def backward_config_for(
    itemsize: int, levels: int, outputs: int, channels: int, of_rows: bool, products: Products = "wgmma"
) -> ReduceConfig:
    """The default: a deterministic function of its arguments.

    Half types: 64 quads by 64 outputs; 32 quads where matrices multiply by warps and, on tcgen05, for images of rows
    (`of_rows`), whose addresses take registers. fp32: 16 at a time of what a product sums over, or as few as the
    levels' blocks allow. (docs/develop/tuning.md, Triton tiles)
    """
    least = max(16, 4 ** (levels - 1))
    if itemsize == 4:
        across = min(max(16, 1024 // least), 64, max(16, pow2_at_least(channels)))
        return ReduceConfig(least, 16, across, 4 if levels == 1 else 8, 2)
    in_groups = products == "wgmma" or (products == "tcgen05" and not of_rows)
    quads = max(64 if in_groups else 32, least)
    widest = min(64, 4096 // quads) if in_groups or levels < 4 else 16
    across = max(16, min(widest // 2 if outputs % 8 or of_rows else widest, pow2_at_least(channels)))
    outputs = max(16, min(64, 4096 // quads, pow2_at_least(outputs)))
    num_warps = 8 if quads * max(outputs, across) > (2048 if in_groups else 1024) else 4
    alone = products == "wgmma" and not of_rows and outputs > 32  # on its multiprocessor, with room for a third stage
    stages = 1 if levels == 5 else 3 if alone else 2
    return ReduceConfig(quads, outputs, across, num_warps, stages)


def search_space(itemsize: int, levels: int) -> Iterator[ReduceConfig]:
    """Tiles worth timing."""
    for quads, outputs in itertools.product((64, 128, 256), (16, 32, 64)):
        config = ReduceConfig(quads, outputs, 32, 8, 3 if itemsize == 2 else 2)
        if quads * outputs <= 4096 and why_invalid(config, levels) is None:
            yield config


def backward_search_space(itemsize: int, levels: int) -> Iterator[ReduceConfig]:
    """Tiles worth timing."""
    most, chunks = 8192 if itemsize == 2 else 1024, ((16, 16), (16, 64), (32, 32), (64, 64), (64, 128))
    for quads, (outputs, channels) in itertools.product((16, 64, 256), chunks):
        config = ReduceConfig(quads, outputs, channels, 8, 2)
        if quads * max(outputs, channels) <= most and why_invalid(config, levels) is None:
            yield config
