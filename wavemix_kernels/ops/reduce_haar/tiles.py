"""Tiles of the kernels of reduce_haar: what is legal and what runs by default. Free of triton."""

from __future__ import annotations

from dataclasses import dataclass

from wavemix_kernels.ops.common.triton_launch import pow2_at_least
from wavemix_kernels.ops.mlp.tiles import Products


@dataclass(frozen=True)
class ReduceConfig:
    """Quads of pixels, outputs (channels of the reduced image) and input channels that a program works on at a time."""

    quads: int
    outputs: int
    channels: int
    num_warps: int
    num_stages: int


def why_invalid(config: ReduceConfig, levels: int) -> str | None:
    """Why the kernels cannot run this tile, or None if it can."""
    least = max(16, 4 ** (levels - 1))
    if config.quads < least or config.quads & (config.quads - 1):
        return f"quads={config.quads}: {levels} levels need a power of two from {least} on"
    return None


def config_for(itemsize: int, levels: int, outputs: int, channels: int) -> ReduceConfig:
    """The default: a deterministic function of its arguments.

    64 KB of accumulators on eight warps, 64 registers of each thread. All of the usual 16 to 64 outputs in one
    program, so that x is read once: padding 36 or 48 of them to 64 costs arithmetic that memory's time hides.
    Two blocks share a multiprocessor of sm_90 and sm_100; for images of rows, whose addresses take registers too, and
    where matrices multiply by warps it is one, whose loads are two steps ahead.
    """
    quads = max(64, 4 ** (levels - 1))
    across = min(4096 // quads, max(16, pow2_at_least(outputs)))
    depth = min(32 if itemsize == 2 else 16, max(16, pow2_at_least(channels)))
    return ReduceConfig(quads, across, depth, 8 if quads * across > 2048 else 4, 3 if itemsize == 2 else 2)


def backward_config_for(
    itemsize: int, levels: int, outputs: int, channels: int, of_rows: bool, products: Products = "wgmma"
) -> ReduceConfig:
    """The default: a deterministic function of its arguments.

    Half types: 64 quads, wgmma's and tcgen05's own tile, by 64 outputs: the four corners are 64 registers of a thread
    of eight warps. With up to 32 outputs two blocks share a multiprocessor; with 64 one has it alone, and the next
    step's x and finest bands, 56 KB, arrive while it works, three times what the latency of an H100's memory asks for.
    Where matrices multiply by warps, 32 quads leave as many registers and fit 99 KB; so they do on tcgen05 for images
    of rows (`of_rows`), whose addresses take more. Four levels need 64 quads, which leave room for 16 channels there;
    five need 256, which leave none for a step ahead. Programs of the same pixels are neighbours: the bands' gradients
    come from L2 for all but the first of C / 64, or of C / 32 for images of rows and for outputs that are no whole
    16-byte vectors.
    fp32 multiplies on the ordinary units or in TF32, whose operands are registers too: 16 at a time of what a product
    sums over, or as few as the levels' blocks allow.
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
    return ReduceConfig(quads, outputs, across, num_warps, 2 if levels < 5 else 1)
