"""Batch normalisation in Triton: statistics, the affine passes and their sums, over any mix of memory layouts.

A tile is some channels by a run of positions. What the layouts of a launch's tensors have in common decides the run:
the whole batch where all are channels_last, an image where one is not. So no position is ever divided into rows and
columns, and each tensor's own innermost dimension is read in vectors (Triton exchanges between two that differ).
Sums are kept for each place of a tile, in registers, and added up across threads once, at a program's end. Partial sums
are added in a fixed order: results are the same in every run.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels import _native
from wavemix_kernels.ops import tuned
from wavemix_kernels.ops.common import chips
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.common.triton_gelu import gelu
from wavemix_kernels.ops.common.triton_launch import Launch, pow2_at_least
from wavemix_kernels.ops.common.triton_words import multiple, unit_of
from wavemix_kernels.ops.norm import triton_finish as finish

_PROGRAMS = 2  # for each multiprocessor, of 8 warps
_MAX_SPLITS = 256  # partial sums of a channel, which one warp adds up (triton_finish)
_AT_ONCE = 4  # tiles whose loads are in flight together


@dataclass(frozen=True)
class NormConfig:
    """A tile of channels x positions, a power of two each."""

    channels: int
    positions: int
    num_warps: int


def config_for(channels: int, run: int, innermost: Sequence[bool], num_warps: int = 4) -> NormConfig:
    """The default tile of 2048 values; `innermost`: for each tensor, whether channels are contiguous in it."""
    if all(innermost):
        across = 64
    elif any(innermost):
        across = 32  # an exchange: half a cache line of the half types on either side
    else:
        across = 2
    positions = min(2048 // min(across, pow2_at_least(channels)), pow2_at_least(run))
    return NormConfig(min(2048 // positions, pow2_at_least(channels)), positions, num_warps)


def search_space() -> list[NormConfig]:
    """Tiles worth timing."""
    tiles = ((1, 1024), (2, 1024), (4, 512), (16, 64), (32, 64), (64, 32), (128, 16))
    return [NormConfig(channels, positions, 4) for channels, positions in tiles]


class Geometry(NamedTuple):
    """Positions as outer1 x outer0 runs of `run` positions, and each tensor's strides over them."""

    outer0: int
    run: int
    runs: int
    channels: int
    strides: tuple[tuple[int, int, int, int], ...]  # of outer1, outer0, position, channel


def geometry(tensors: Sequence[Tensor]) -> Geometry:
    """Merges N, H and W as far as the layouts of all tensors allow."""
    n, c, h, w = tensors[0].shape
    dims = [(size, [t.stride(axis) for t in tensors]) for axis, size in ((0, n), (2, h), (3, w)) if size != 1]
    merged: list[tuple[int, list[int]]] = []
    for size, strides in dims:
        if merged and all(outer == size * inner for outer, inner in zip(merged[-1][1], strides, strict=True)):
            merged[-1] = (merged[-1][0] * size, strides)
        else:
            merged.append((size, strides))
    while len(merged) < 3:
        merged.insert(0, (1, [0] * len(tensors)))
    (outer1, s1), (outer0, s0), (run, s) = merged
    each = tuple((s1[i], s0[i], s[i], t.stride(1)) for i, t in enumerate(tensors))
    return Geometry(outer0, run, outer1 * outer0, c, each)


# -------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _offsets(tile, run, outer0, strides, channel, POSITIONS: tl.constexpr, UNIT: tl.constexpr = 1):
    """The place of tile number `tile` of some channels: offsets (positions, channels), and which positions exist."""
    per_run = tl.cdiv(run, POSITIONS)
    outer = tile // per_run
    position = (tile - outer * per_run) * POSITIONS + tl.arange(0, POSITIONS)
    s1, s0, s_p, s_c = strides
    s_p = multiple(s_p, UNIT)
    start = (outer // outer0) * s1 + (outer % outer0) * s0
    return start + (position * s_p)[:, None] + (channel * s_c)[None, :], position < run


@triton.jit
def _places(tile, tiles, run, outer0, ONE_RUN: tl.constexpr, POSITIONS: tl.constexpr):
    """The outer indices of several tiles (tiles, 1, 1), their positions (tiles, positions, 1), and which exist. Tiles
    are counted in 32 bits: divisions of 64 would take longer than the tiles' loads."""
    if ONE_RUN:
        outer1, outer0_at, local = tl.zeros_like(tile), tl.zeros_like(tile), tile
    else:
        per_run = tl.cdiv(run, POSITIONS).to(tl.int32)
        outer = tile // per_run
        local = tile - outer * per_run
        outer1 = outer // outer0
        outer0_at = outer - outer1 * outer0
    position = local.to(tl.int64)[:, None] * POSITIONS + tl.arange(0, POSITIONS)[None, :]
    valid = (position < run) & (tile < tiles)[:, None]
    return outer1.to(tl.int64)[:, None, None], outer0_at.to(tl.int64)[:, None, None], position[:, :, None], valid


@triton.jit
def _at(places, strides, channel, UNIT: tl.constexpr):
    """Offsets (tiles, positions, channels)."""
    outer1, outer0, position = places
    s1, s0, s_p, s_c = strides
    s_p = multiple(s_p, UNIT)
    return outer1 * s1 + outer0 * s0 + position * s_p + (channel.to(tl.int64) * s_c)[None, None, :]


@triton.jit(do_not_specialize=("tiles", "outer0"))
def _stats_kernel(
    partial_mean, partial_m2, partial_count, x, tiles, run: tl.int64, outer0, channels, splits,
    x_1: tl.int64, x_0: tl.int64, x_p, x_c, GELU: tl.constexpr,
    ONE_RUN: tl.constexpr, AT_ONCE: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, UNIT: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    """Mean, sum of squared deviations and count of each split's values, by Chan's formula from one place's few values
    at a time: their own mean is taken off before squaring, so nothing cancels where |mean| is far above the deviation.
    GELU: of GELU(x).
    """
    split = tl.program_id(1)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    in_channels = channel < multiple(channels, UNIT)
    mean = tl.zeros((POSITIONS, CHANNELS), REAL)
    m2 = tl.zeros((POSITIONS, CHANNELS), REAL)
    count = tl.zeros((POSITIONS,), REAL)
    for first in range(split, tiles, splits * AT_ONCE):
        tile = first + tl.arange(0, AT_ONCE) * splits
        outer1, outer0_at, position, valid = _places(tile, tiles, run, outer0, ONE_RUN, POSITIONS)
        mask = valid[:, :, None] & in_channels[None, None, :]
        at = _at((outer1, outer0_at, position), (x_1, x_0, x_p, x_c), channel, UNIT)
        value = tl.load(x + at, mask=mask, other=0.0).to(REAL)
        if GELU:
            value, _ = gelu(value)
        here = tl.sum(valid.to(REAL), 0)
        total = count + here
        mean_here = tl.sum(value, 0) * (1.0 / tl.maximum(here, 1.0))[:, None]
        deviation = tl.where(mask, value - mean_here[None, :, :], 0.0)
        share = here / tl.maximum(total, 1.0)
        delta = mean_here - mean
        mean += delta * share[:, None]
        m2 += tl.sum(deviation * deviation, 0) + delta * delta * (count * share)[:, None]
        count = total
    # The places' results as one: deviations from a mean that is rounded, corrected by their own mean.
    values = tl.sum(count, 0)
    total = tl.maximum(values, 1.0)  # an empty batch has none
    near = tl.sum(mean * (count / total)[:, None], 0)
    delta = mean - near[None, :]
    shift = tl.sum(delta * count[:, None], 0) / total
    rest = delta - shift[None, :]
    at = split.to(tl.int64) * channels + channel
    tl.store(partial_mean + at, near + shift, mask=in_channels)
    tl.store(partial_m2 + at, tl.sum(m2 + rest * rest * count[:, None], 0), mask=in_channels)
    tl.store(partial_count + at, tl.zeros((CHANNELS,), REAL) + values, mask=in_channels)


@triton.jit(do_not_specialize=("tiles", "outer0"))
def _reduce_kernel(
    partial_g, partial_gx, grad, x, mean, invstd, tiles, run: tl.int64, outer0, channels, splits,
    grad_1: tl.int64, grad_0: tl.int64, grad_p, grad_c, x_1: tl.int64, x_0: tl.int64, x_p, x_c, GELU: tl.constexpr,
    ONE_RUN: tl.constexpr, AT_ONCE: tl.constexpr, AHEAD: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
    UNIT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Each split's sums of grad and of grad * xhat; GELU: of what GELU(x) is normalised to."""
    split = tl.program_id(1)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    in_channels = channel < multiple(channels, UNIT)
    centre = tl.load(mean + channel, mask=in_channels, other=0.0)
    sum_g = tl.zeros((POSITIONS, CHANNELS), REAL)
    sum_gx = tl.zeros((POSITIONS, CHANNELS), REAL)
    for first in tl.range(split, tiles, splits * AT_ONCE, num_stages=AHEAD):
        tile = first + tl.arange(0, AT_ONCE) * splits
        outer1, outer0_at, position, valid = _places(tile, tiles, run, outer0, ONE_RUN, POSITIONS)
        mask = valid[:, :, None] & in_channels[None, None, :]
        at = _at((outer1, outer0_at, position), (grad_1, grad_0, grad_p, grad_c), channel, UNIT)
        g = tl.load(grad + at, mask=mask, other=0.0)
        at = _at((outer1, outer0_at, position), (x_1, x_0, x_p, x_c), channel, UNIT)
        value = tl.load(x + at, mask=mask, other=0.0).to(REAL)
        g = g.to(REAL)
        if GELU:
            value, _ = gelu(value)
        sum_g += tl.sum(g, 0)
        # g is 0 beyond the batch, so the product is too.
        sum_gx += tl.sum(g * (value - centre[None, None, :]), 0)
    # Last, for the registers. An empty batch has no deviation, and sums of zero.
    scale = tl.load(invstd + channel, mask=channel < channels * tl.minimum(tiles, 1), other=0.0)
    at = split.to(tl.int64) * channels + channel
    tl.store(partial_g + at, tl.sum(sum_g, 0), mask=in_channels)
    tl.store(partial_gx + at, tl.sum(sum_gx, 0) * scale, mask=in_channels)


@triton.jit(do_not_specialize=("tiles", "outer0"))
def _affine_kernel(
    out, x, other, a, b, d, tiles: tl.int64, run: tl.int64, outer0: tl.int64, channels,
    out_1: tl.int64, out_0: tl.int64, out_p, out_c, x_1: tl.int64, x_0: tl.int64, x_p, x_c,
    other_1: tl.int64, other_0: tl.int64, other_p, other_c,
    OTHER: tl.constexpr,  # "none"; "added" as it is; "scaled" by b
    GELU: tl.constexpr,  # of x; of a scaled `other`, by whose slope the whole is multiplied then
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, UNIT: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    """out = a * x + d, plus `other`."""
    tile = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(channels, CHANNELS)
    channel = (tile % blocks).to(tl.int32) * CHANNELS + tl.arange(0, CHANNELS)
    tile = tile // blocks
    in_channels = channel < multiple(channels, UNIT)
    at, valid = _offsets(tile, run, outer0, (x_1, x_0, x_p, x_c), channel.to(tl.int64), POSITIONS, UNIT)
    mask = valid[:, None] & in_channels[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(REAL)
    if GELU and OTHER != "scaled":
        value, _ = gelu(value)
    value *= tl.load(a + channel, mask=in_channels, other=0.0)[None, :]
    value += tl.load(d + channel, mask=in_channels, other=0.0)[None, :]
    if OTHER != "none":
        at, valid = _offsets(
            tile, run, outer0, (other_1, other_0, other_p, other_c), channel.to(tl.int64), POSITIONS, UNIT
        )
        term = tl.load(other + at, mask=mask, other=0.0).to(REAL)
        if GELU and OTHER == "scaled":
            term, slope = gelu(term)
        if OTHER == "scaled":
            term *= tl.load(b + channel, mask=in_channels, other=0.0)[None, :]
        value += term
        if GELU and OTHER == "scaled":
            value *= slope
    at, valid = _offsets(tile, run, outer0, (out_1, out_0, out_p, out_c), channel.to(tl.int64), POSITIONS, UNIT)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------------------- launch


class _Plan(NamedTuple):
    config: NormConfig
    tiles: int
    channel_blocks: int
    splits: int
    scalars: tuple[int, ...]  # tiles, run, outer0, channels
    strides: tuple[int, ...]
    constants: dict[str, object]


def _plan(tensors: Sequence[Tensor], config: NormConfig | None, sums: bool = False) -> _Plan:
    made = geometry(tensors)
    innermost = [s[3] == 1 for s in made.strides]
    config = config or tuned.tile("batch_norm tile", NormConfig, search_space, *tensors, extra=(*innermost, sums))
    config = config or config_for(made.channels, made.run, innermost, 8 if sums else 4)
    tiles = made.runs * triton.cdiv(made.run, config.positions)
    blocks = triton.cdiv(made.channels, config.channels)
    programs = _PROGRAMS * _native.multiprocessors(tensors[0].device)
    splits = max(1, min(_MAX_SPLITS, programs // max(blocks, 1), tiles))
    unit = unit_of(made.channels, *(position for _, _, position, _ in made.strides))
    constants = {
        "CHANNELS": config.channels, "POSITIONS": config.positions, "UNIT": unit,
        "REAL": tl.float64 if tensors[0].dtype == torch.float64 else tl.float32,
        "num_warps": config.num_warps, "enable_fp_fusion": True,
    }  # fmt: skip
    if sums:
        constants |= {"ONE_RUN": made.runs == 1, "AT_ONCE": _AT_ONCE}
    return _Plan(
        config, tiles, blocks, splits, (tiles, made.run, made.outer0, made.channels),
        tuple(stride for strides in made.strides for stride in strides), constants,
    )  # fmt: skip


def stats_launch(x: Tensor, config: NormConfig | None = None, gelu: bool = False) -> tuple[Launch, Tensor]:
    """A launch and the (3, splits, C) partial means, squared deviations and counts it fills, of x or of GELU(x)."""
    plan = _plan([x], config, sums=True)
    partial = x.new_empty((3, plan.splits, x.shape[1]), dtype=accumulate_dtype(x.dtype))
    args = (*partial.unbind(0), x, *plan.scalars, plan.splits, *plan.strides)
    constants = {**plan.constants, "GELU": gelu}
    return Launch(_stats_kernel, (plan.channel_blocks, plan.splits), args, constants), partial


def stats(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor | None = None,
    config: NormConfig | None = None, gelu: bool = False,
) -> Tensor:  # fmt: skip
    """Mean, biased variance, inverse deviation, scale and shift of each channel of x (N, C, H, W), or of GELU(x), as
    rows (5, C), in fp32 (fp64 for fp64); see :func:`triton_finish.statistics_launch`."""
    launch, partial = stats_launch(x, config, gelu)
    launch.run(x)
    return finish.statistics(partial, weight, bias, eps, out)


def _rounds_ahead(config: NormConfig, *images: Tensor) -> int:
    """Rounds of tiles that are on their way at once. With one, loads wait for the sums of those before; two go through
    64 KB of shared memory, by rows of 64 bytes or more. (docs/develop/tuning.md, Triton: BatchNorm)"""
    wide = config.channels >= 32 and all(t.itemsize == 2 and t.stride(1) == 1 for t in images)
    return 2 if wide and not chips.little_shared(images[0].device) else 1


def reduce_launch(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, config: NormConfig | None = None, gelu: bool = False
) -> tuple[Launch, Tensor]:
    """A launch and the (2, splits, C) partial sums it fills; `gelu`: GELU(x) is what was normalised."""
    plan = _plan([grad, x], config, sums=True)
    partial = mean.new_empty((2, plan.splits, x.shape[1]))
    args = (*partial.unbind(0), grad, x, mean, invstd, *plan.scalars, plan.splits, *plan.strides)
    if gelu and x.itemsize > 2:
        plan.constants["AT_ONCE"] = _AT_ONCE // 2  # for the registers
    constants = {**plan.constants, "GELU": gelu, "AHEAD": _rounds_ahead(plan.config, grad, x)}
    return Launch(_reduce_kernel, (plan.channel_blocks, plan.splits), args, constants), partial


def line(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, batch_stats: bool, centred: bool,
    config: NormConfig | None = None, gelu: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """a, b and d of the line that makes the gradient of x, or of GELU(x), and the gradients of weight and bias (2, C);
    see :func:`triton_finish.line_launch`."""
    launch, partial = reduce_launch(grad, x, mean, invstd, config, gelu)
    launch.run(x)
    return finish.line(partial, mean, invstd, weight, x[:, :1].numel(), batch_stats, centred)


def affine_launch(
    out: Tensor, x: Tensor, a: Tensor, d: Tensor, other: Tensor | None = None, b: Tensor | None = None,
    config: NormConfig | None = None, gelu: bool = False,
) -> Launch:  # fmt: skip
    """See :func:`affine`."""
    plan = _plan([out, x, x if other is None else other], config)
    pointers = out, x, x if other is None else other, a, a if b is None else b, d
    constants = {**plan.constants, "OTHER": "none" if other is None else "added" if b is None else "scaled"}
    constants["GELU"] = gelu
    return Launch(
        _affine_kernel, (plan.tiles * plan.channel_blocks,), (*pointers, *plan.scalars, *plan.strides), constants
    )


def affine(
    out: Tensor, x: Tensor, a: Tensor, d: Tensor, other: Tensor | None = None, b: Tensor | None = None,
    config: NormConfig | None = None, gelu: bool = False,
) -> None:  # fmt: skip
    """out = a * x + d per channel, plus `other` (times `b` where given); images of one shape, any strides each.

    `gelu`: GELU(x) in x's place; with b, GELU(other) in its place, and the whole times GELU's derivative there.
    """
    affine_launch(out, x, a, d, other, b, config, gelu).run(x)
