"""Tiles of the pointwise MLP's kernels: what runs by default. Free of triton."""

from dataclasses import dataclass, replace
from typing import Literal

from wavemix_kernels.ops.common.chips import BY_WARPS, Products
from wavemix_kernels.ops.common.triton_launch import cover, pow2_at_least
from wavemix_kernels.ops.haar.tiles import MOST_COLUMNS

Kind = Literal["forward", "input", "hidden", "weight", "together"]
#: Columns of all operands together, in tiles of 64 or more, of which a block of eight warps holds 32 rows' fp32 sums:
#: 64 registers of each thread, and as many again for what a step loads.
_MOST_HELD = 512
#: Columns of all operands together of which shared memory holds 128 pixels beside the weights of three steps of 32
#: hidden units; of two.
_MOST_AHEAD, _MOST_BESIDE = 480, 576
#: Inputs and results up to which four warps hold the sums of 128 rows, beside a layer of 16 units.
_MOST_SLIM = 32
#: Bytes of shared memory of a block on sm_90 and sm_100.
_SHARED = 227 * 1024
#: Rows of pixels for each multiprocessor up to which tiles have 16 rows, 32 on chips that multiply by warps, and 64 on
#: the others: a program's steps wait for one another, and more programs wait side by side.
_SCARCE, _FEWER, _FEW = 16, 32, 64
#: Columns of inputs and results that 64 rows have beside three steps of 64 hidden units.
_BESIDE_FEW = 480
#: Inputs, hidden units and results up to which a program of four warps holds the gradients of all weights: twice as
#: many spill on chips that multiply by warps.
_MOST_TOGETHER = 16


@dataclass(frozen=True)
class MlpConfig:
    """Rows of pixels and hidden units at work at a time, and input channels: 0 for all of them, held on the chip."""

    rows: int
    hidden: int
    channels: int
    num_warps: int
    num_stages: int


def config_for(
    kernel: Kind, itemsize: int, a: int, b: int, k: int, o: int, products: Products = "wgmma", tf32: bool = False,
    little_shared: bool = False, each: int = 128,
) -> MlpConfig:  # fmt: skip
    """The default for inputs of a + b columns, k hidden units and o results: a deterministic function of its arguments.
    ``each``: rows of pixels for each multiprocessor.

    Half types: a warp has 16 rows of the hidden layer at least, since two products follow each other in it: 64 rows on
    four warps, or 128 on eight where weights are read again too often; as many hidden units as registers leave room
    for. fp32 multiplies on the ordinary units: 16 x 16 tiles of the hidden layer on eight warps.
    (docs/develop/tuning.md, Triton tiles)

    Raises:
        ValueError: more columns than the smallest tile can accumulate.
    """
    columns = a + b
    if max(columns, o) > MOST_COLUMNS:
        raise ValueError(
            f"{columns} input and {o} output channels: at most {MOST_COLUMNS}; backend 'reference' takes any"
        )
    if itemsize == 4:
        return MlpConfig(16, 32 if kernel == "weight" and 144 < columns <= 288 and not tf32 else 16, 16, 8, 2)
    found = (
        _by_mfma(kernel, a, b, o) if products == "mfma" else _of_half(kernel, a, b, o, products, little_shared, each)
    )
    # Units that do not exist cost as much as others: the exponential and the dropout mask of each.
    found = replace(found, hidden=min(found.hidden, max(16, pow2_at_least(k))))
    # A warp has 32 rows of few sums: half as many threads load a row's weights.
    slim = kernel == "forward" and found.hidden == 16 and max(a + b, o) <= _MOST_SLIM
    return replace(found, num_warps=min(found.num_warps, 4)) if slim else found


def _of_half(
    kernel: Kind, a: int, b: int, o: int, products: Products, little_shared: bool, each: int
) -> MlpConfig:  # fmt: skip
    columns, together = a + b, held((a, b, o), 16)
    if kernel == "weight" and little_shared and b:
        return MlpConfig(32, 32, 0, 4, 2)
    if kernel == "weight":
        return MlpConfig(64 if together <= 160 and products not in BY_WARPS else 32, 64, 0, 4, 2)
    widest = max(columns, o)
    if kernel == "hidden":
        if products in BY_WARPS:
            return MlpConfig(64, 32, 0, 4, 2)
        return MlpConfig(128, 32 if together <= _MOST_BESIDE else 16, 0, 8, 3 if together <= _MOST_AHEAD else 2)
    if kernel == "forward" and each <= _FEW and (found := _of_few(a, b, o, products, little_shared, each)):
        return found
    if little_shared:
        return MlpConfig(64, 32, 0, 4, 3 if kernel == "input" else 2)
    if kernel == "input":
        if products in BY_WARPS:
            return MlpConfig(64, 32 if widest <= 128 else 16, 0, 4, 2)
        if widest <= 128:
            return MlpConfig(64, 64, 0, 4, 2)
        return MlpConfig(128, 32, 0, 8, 2) if widest <= 192 else MlpConfig(128, 16, 0, 8, 3)
    if products in BY_WARPS:
        return MlpConfig(64, 64 if widest <= 128 else 32, 0, 4, 2)
    hidden, inputs = 64 if columns <= 288 and o <= 192 else 32, held((a, b), 16)
    ahead = 2 * (128 * inputs + 3 * hidden * (inputs + held((o,), 16)))  # bytes of three steps, beside the pixels
    return MlpConfig(128, hidden, 0, 8, 3 if ahead <= _SHARED else 2)


def _of_few(a: int, b: int, o: int, products: Products, little_shared: bool, each: int) -> MlpConfig | None:
    """Forward, of few pixels; None: the tile of many."""
    if each <= _SCARCE:
        return MlpConfig(16, 32 if little_shared else 64, 0, 4, 3)
    if little_shared:
        return None
    if products in BY_WARPS:
        return MlpConfig(32, 64, 0, 4, 2) if each <= _FEWER else None
    if held((a, b, o), 32) > _BESIDE_FEW:
        return None
    return MlpConfig(64, 32 if products == "wgmma" and o >= 192 and a + b <= 256 else 64, 0, 4, 3)


def _by_mfma(kernel: Kind, a: int, b: int, o: int) -> MlpConfig:
    """32 rows, or hidden units for the weights' gradients, on eight of NVIDIA's warps: 64 KB of shared memory."""
    if kernel == "weight":
        return MlpConfig(32, 32, 0, 4, 2)
    return MlpConfig(32, 32 if held((a, b, o), 64) <= _MOST_HELD else 16, 0, 8, 2)


def runs_together(itemsize: int, a: int, b: int, k: int, o: int) -> bool:
    """Whether one kernel makes all gradients: registers hold all weights' sums."""
    return itemsize == 2 and b == 0 and max(a, k, o) <= _MOST_TOGETHER


def together_config_for() -> MlpConfig:
    """The default where :func:`runs_together`. (docs/develop/tuning.md, Triton tiles)"""
    return MlpConfig(64, _MOST_TOGETHER, 0, 4, 2)


def narrowest(kernel: Kind, itemsize: int, config: MlpConfig) -> int:
    """The least width of a tile of columns (launch.cover).

    Tiles lower than 64 multiply by warps, which Triton lays out along the longer side of a result. Products that share
    an operand and whose results lie along different sides repeat one another: 16 columns beside 128 cost 1500 spills.
    """
    height = config.hidden if kernel == "weight" else config.rows
    return 2 * height if itemsize == 2 and height < 64 and kernel != "together" else 16


def held(widths: tuple[int, ...], least: int) -> int:
    """Columns of the tiles of all operands."""
    return sum(sum(cover(width, least)) for width in widths)


def weights_together(itemsize: int, a: int, b: int, o: int, config: MlpConfig) -> tuple[tuple[str, ...], ...]:
    """Gradients that a launch accumulates together: all where they fit the registers, else one, with the hidden layer
    made again for the next."""
    parts = ("x", "second", "w2") if b else ("x", "w2")
    registers = held((a, b, o), narrowest("weight", itemsize, config)) * config.hidden // (32 * config.num_warps)
    return (parts,) if registers <= (80 if config.channels else 128) else tuple((part,) for part in parts)


def search_space(itemsize: int) -> list[MlpConfig]:
    """Tiles worth timing."""
    if itemsize == 4:
        return [MlpConfig(16, 16, 16, 4, 2), MlpConfig(32, 16, 16, 8, 2)]
    tiles = ((64, 64, 4), (64, 32, 4), (64, 16, 4), (128, 64, 8), (128, 32, 8), (32, 64, 4), (32, 32, 8))
    return [MlpConfig(rows, hidden, 0, num_warps, 2) for rows, hidden, num_warps in tiles]
