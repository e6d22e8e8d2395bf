"""Tiles worth timing, per kernel: what a tuner would try, and what the tests compile and run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from wavemix_kernels.ops.deconv.tiles import DeconvConfig
from wavemix_kernels.ops.haar.tiles import LINE, SECTOR, Layout, TileConfig, why_invalid
from wavemix_kernels.ops.mlp.tiles import MlpConfig
from wavemix_kernels.ops.norm.triton_batch_norm import NormConfig
from wavemix_kernels.ops.patm.triton_branches import SumConfig
from wavemix_kernels.ops.patm.triton_phases import PhaseConfig
from wavemix_kernels.ops.reduce_haar import tiles as reduce_tiles
from wavemix_kernels.ops.reduce_haar.tiles import ReduceConfig


def haar(layout: Layout, levels: int, itemsize: int) -> Iterator[TileConfig]:
    """All tiles worth timing: innermost runs about a cache line long, 64 or 128 bytes of samples a thread.

    Eight warps only where a block of that many channels does not fit four.
    """
    block = 1 << levels
    runs = (LINE, LINE // 2, LINE // 4, LINE // 8) if layout == "channels" else (2 * LINE, LINE)
    for run_bytes in runs:
        run = run_bytes // itemsize
        is_large = layout == "channels" and block * block * run_bytes > 16384
        for tile_bytes, num_warps in ((32768, 8),) if is_large else ((16384, 4), (8192, 4)):
            samples = tile_bytes // itemsize
            cols = max(run, block)
            rows = TileConfig(samples // cols, cols, 1, num_warps)
            config = TileConfig(block, samples // (run * block), run, num_warps) if layout == "channels" else rows
            if _is_worthwhile(config, layout, levels, itemsize):
                yield config


def _is_worthwhile(config: TileConfig, layout: Layout, levels: int, itemsize: int) -> bool:
    """Whether a tile is legal and touches whole sectors."""
    if why_invalid(config, levels, itemsize) is not None:
        return False
    if layout != "channels":
        return config.cols * itemsize >= LINE
    # A deep channels-last tile is 2**levels wide and high, which leaves room for few channels. Half a sector per
    # pixel is accepted there: the program next to it, running at the same time, finds the other half in L2.
    shortest = {4: SECTOR, 5: SECTOR // 2}.get(levels, 2 * SECTOR)
    return config.planes * itemsize >= shortest


def reduce_haar(itemsize: int, levels: int) -> Iterator[ReduceConfig]:
    for quads, outputs in itertools.product((64, 128, 256), (16, 32, 64)):
        config = ReduceConfig(quads, outputs, 32, 8, 3 if itemsize == 2 else 2)
        if quads * outputs <= 4096 and reduce_tiles.why_invalid(config, levels) is None:
            yield config


def reduce_haar_backward(itemsize: int, levels: int) -> Iterator[ReduceConfig]:
    most, chunks = 8192 if itemsize == 2 else 1024, ((16, 16), (16, 64), (32, 32), (64, 64), (64, 128))
    for quads, (outputs, channels) in itertools.product((16, 64, 256), chunks):
        config = ReduceConfig(quads, outputs, channels, 8, 2)
        if quads * max(outputs, channels) <= most and reduce_tiles.why_invalid(config, levels) is None:
            yield config


def mlp(itemsize: int) -> list[MlpConfig]:
    if itemsize == 4:
        return [MlpConfig(16, 16, 16, 4, 2), MlpConfig(32, 16, 16, 8, 2)]
    tiles = ((64, 32, 4), (64, 16, 4), (128, 32, 8), (32, 32, 8), (16, 64, 4), (32, 64, 4))
    return [MlpConfig(rows, hidden, 0, num_warps, 2) for rows, hidden, num_warps in tiles]


def deconv(itemsize: int) -> list[DeconvConfig]:
    """Configurations worth timing; those of 256 rows spill, and may be faster all the same."""
    if itemsize == 4:
        return [DeconvConfig(rows, 64, 16, num_warps, 2) for rows in (32, 64) for num_warps in (4, 8)]
    tiles = itertools.product(((64, 256, 4), (128, 128, 4), (128, 256, 8), (256, 256, 16)), ((32, 3), (32, 4), (64, 3)))
    return [DeconvConfig(rows, columns, depth, warps, stages) for (rows, columns, warps), (depth, stages) in tiles]


def batch_norm() -> list[NormConfig]:
    tiles = ((1, 1024), (2, 1024), (4, 512), (16, 64), (32, 64), (64, 32), (128, 16))
    return [NormConfig(channels, positions, 4) for channels, positions in tiles]


def phase_aggregate(backward: bool) -> list[PhaseConfig]:
    values = 64 if backward else 128
    return [PhaseConfig(values * warps // channels, channels, warps) for warps in (1, 4) for channels in (16, 32, 64)]


def branch_sum() -> list[SumConfig]:
    return [SumConfig(2048 // channels, channels) for channels in (16, 32, 64, 128)]
