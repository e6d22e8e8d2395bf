"""Tiles of the transposed convolution's kernels: what runs by default. Free of triton."""

from dataclasses import dataclass
from typing import Literal

from wavemix_kernels.ops.common.triton_launch import cover, pow2_at_least

Kind = Literal["forward", "input", "weight"]
_MULTIPROCESSORS = 132  # of an H100


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
    """Of the tiles of equal parts of `columns`, of `most` or fewer."""
    return cover(_cdiv(columns, _cdiv(columns, most)))


def config_for(
    kernel: Kind, itemsize: int, columns: int, inner: int, rows: int, by_warps: bool = False, precision: str = "ieee"
) -> DeconvConfig:
    """The default for a result of `rows` rows: a deterministic function of its arguments; `inner`: what is summed over.

    Half types: 128 x 192 results on eight warps take 174 (forward) to 240 registers of a thread, so an SM has one such
    block, which its stages keep busy. At the 2048 products a clock of an H100's tensor cores it reads 4096 * (1 / 128 +
    1 / 192) = 53 bytes a clock from L2, of which L2 gives each SM some 32; the 64 x 192 of which an SM has two would
    read 85. Twice the rows would read 37, and spill, as would weights' gradients 256 wide and, with four warps to a
    block and two of them to an SM, the input's 96 or 128 wide.
    `by_warps`: the chip's matrix instructions take both operands from registers, beside which a gradient that is made
    there leaves less room.
    Both gradients in one kernel, at 192 channels: on sm_90, 80, 100 and 120 240, 255, 144 and 252 registers, and 77,
    47, 78 and 47 KiB of shared memory, so that an SM has one block as of each alone (of the input's two, on sm_100 with
    128 registers); in fp32 at 96 channels 136 registers and 15 KiB (sm_90), three blocks where each alone has four.
    fp32 of `precision` "ieee" multiplies on the ordinary units, 16 times slower: small tiles, whose operands take the
    registers. In TF32 the tensor cores make half as many products a clock of twice the bytes: 128 x 96 reads 75 bytes a
    clock (64 x 48: 149) of 196 registers (both gradients), and 128 x 192 spills.
    """
    depth = min(64 // itemsize, max(16, pow2_at_least(inner)))
    if itemsize == 4 and precision == "ieee":
        return DeconvConfig(64, 64, depth, 4, 2)
    tall, widest, stages = 128, 512 // itemsize, 3
    if kernel == "weight":
        tall, widest = min(tall, max(64, pow2_at_least(rows))), min(widest, 96 if by_warps else 192)
    elif _cdiv(rows, tall) * (4 if kernel == "forward" else 1) < _MULTIPROCESSORS:
        tall = 64
    if kernel == "input" and by_warps and itemsize == 2:
        depth, stages = 16, 4
    return DeconvConfig(tall, widest, depth, 4 if tall * sum(widths(columns, widest)) <= 8192 else 8, stages)
