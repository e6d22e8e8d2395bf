"""Tiles of the Triton Haar kernels: what is legal, what runs by default; and the kernels' limits.

Free of triton, so that a configuration can be inspected, stored or pruned anywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Layout = Literal["rows", "channels", "strided"]
LAYOUTS: tuple[Layout, ...] = ("rows", "channels", "strided")
MAX_LEVELS = 5  # a 32x32 block in one tile; deeper transforms chain
#: Input or output channels of a pointwise MLP: 16 rows of fp32 sums in half the registers of eight warps.
MOST_COLUMNS = 2048

SECTOR = 32  # bytes: the smallest piece of a memory transaction
LINE = 128  # bytes: one cache line, one row of a fully used warp of 4-byte lanes


@dataclass(frozen=True)
class TileConfig:
    """A tile of rows x cols samples in each of `planes` (n, c) planes, worked on by `num_warps` warps."""

    rows: int
    cols: int
    planes: int
    num_warps: int

    @property
    def samples(self) -> int:
        return self.rows * self.cols * self.planes


def why_invalid(config: TileConfig, levels: int, itemsize: int) -> str | None:
    """Why the kernels cannot run this tile, or None if they can."""
    for name in ("rows", "cols", "planes", "num_warps"):
        value = getattr(config, name)
        if value < 1 or value & (value - 1):
            return f"{name}={value} must be a power of two"
    if min(config.rows, config.cols) < 1 << levels:
        return f"rows={config.rows}, cols={config.cols} must hold a whole block of 2**levels={1 << levels}"
    # Half of a thread's 255 registers for samples in the arithmetic's width leaves room for addresses.
    per_thread = config.samples * max(4, itemsize) // (config.num_warps * 32)
    if per_thread > 512:
        return f"{config} keeps {per_thread} bytes of samples a thread, over 512: more warps or a smaller tile"
    return None


def _pow2_at_least(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def _pow2_at_most(value: int) -> int:
    return 1 << (max(1, value).bit_length() - 1)


def _padded(size: int, tile: int) -> int:
    return -(-size // tile) * tile


def config_for(layout: Layout, levels: int, itemsize: int, shape: tuple[int, int, int, int]) -> TileConfig:
    """The default tile for an image of `shape` (n, c, h, w): a deterministic function of its arguments.

    Takes 16 KB, 128 bytes a thread of four warps (eight 16-byte loads: addresses cost the less the more samples
    share them), less while the image would leave multiprocessors idle, and shapes it to pad the edges least.
    """
    n, c, h, w = shape
    block = 1 << levels
    samples = 16384 // itemsize
    while samples > 1024 and n * c * h * w < 512 * samples:  # a few programs for each of some 130 SMs
        samples //= 2
    samples = max(samples, block * block)

    if layout == "channels":
        # One cache line of channels per pixel if there are as many, and if the block leaves room for it.
        planes = min(LINE // itemsize, _pow2_at_most(c), samples // (block * block))
        planes = max(planes, min(SECTOR // 2 // itemsize, _pow2_at_least(n * c)))
        samples = max(samples, planes * block * block)
        shortest = 1
    else:
        planes = 1
        shortest = min(LINE // itemsize, _pow2_at_least(w))
    pixels = max(samples // planes, block * block)
    sides = [
        (rows, pixels // rows)
        for rows in (1 << k for k in range(levels, pixels.bit_length()))
        if pixels // rows >= max(block, shortest)
    ]
    if not sides:  # one block high is still less wide than a cache line
        sides = [(block, max(block, shortest))]
    rows, cols = min(sides, key=lambda s: (_padded(h, s[0]) * _padded(w, s[1]), s[0]))
    rows = min(rows, max(block, _pow2_at_least(h)))
    cols = min(cols, max(block, _pow2_at_least(w)))
    # An image smaller than the tile leaves room for more planes.
    while planes * 2 <= _pow2_at_least(n * c) and rows * cols * planes * 2 <= samples:
        planes *= 2
    num_warps = 4
    while rows * cols * planes * max(4, itemsize) > 256 * 32 * num_warps and num_warps < 16:
        num_warps *= 2
    while num_warps > 1 and rows * cols * planes < 8 * 32 * num_warps:
        num_warps //= 2
    return TileConfig(rows, cols, planes, num_warps)


def search_space(layout: Layout, levels: int, itemsize: int) -> Iterator[TileConfig]:
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
