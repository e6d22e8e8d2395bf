"""One wave branch of PATM in Triton: BatchNorm's affine map, ReLU, sine and cosine, 7 taps along W or H, and its sums.

A program owns some lines of one image and some channels, and walks along the lines: what 7 taps reach lies in
registers, so no wave is made twice but for the 3 pixels beyond each end of a segment. Channels 2g and 2g+1 are
neighbours in one thread, so the outputs g and C/2 + g, which read them both, need no exchange.
Sums are partial sums of fixed parts added in a fixed order: results are the same in every run.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels import _native
from wavemix_kernels.backends import triton_interpreted
from wavemix_kernels.ops import tuned
from wavemix_kernels.ops.common.triton_launch import Launch, pow2_at_least
from wavemix_kernels.ops.patm.triton_waves import even_odd, position, sincos, store_halves, tap, within
from wavemix_kernels.ops.patm.waves import Branch

PROGRAMS = 12  # of one warp each, for each multiprocessor: registers leave room for so many
_STAGES = tl.constexpr(4)  # one pixel at work, the loads of three on their way to shared memory
_SHORTEST = 32  # pixels of a segment: the 6 beyond its ends, read twice, stay below a fifth


@dataclass(frozen=True)
class PhaseConfig:
    """A tile of lines x channels, a power of two each, at least two channels."""

    lines: int
    channels: int
    num_warps: int = 1


def config_for(backward: bool, itemsize: int, lines: int, channels: int) -> PhaseConfig:
    """The default: one warp, with as many channels in a thread as its registers hold (docs/develop/tuning.md, PATM,
    tiles of the wave kernels in Triton). fp64 is for checks and may spill."""
    values, widest = (64, 32) if backward or itemsize == 8 else (128, 64)
    all_channels = max(2, pow2_at_least(channels))
    deep = min(values // min(widest, all_channels), pow2_at_least(lines))
    return PhaseConfig(deep, min(values // deep, all_channels))


def search_space(backward: bool) -> list[PhaseConfig]:
    """Tiles worth timing."""
    values = 64 if backward else 128
    return [PhaseConfig(values * warps // channels, channels, warps) for warps in (1, 4) for channels in (16, 32, 64)]


class Plan(NamedTuple):
    """How a pass is cut: a unit is a segment of some lines of an image."""

    config: PhaseConfig
    blocks: int  # of channels
    sizes: dict[str, int]
    units: int
    programs: int  # that fill the device
    strides: dict[str, int]
    constants: dict[str, Any]


def make_plan(branch: Branch, tensors: dict[str, Tensor], backward: bool, config: PhaseConfig | None) -> Plan:
    n, c, *plane = branch.z.shape
    length, lines = plane[branch.axis - 2], plane[3 - branch.axis]
    config = config or tuned.tile(
        "phases tile", PhaseConfig, lambda: search_space(backward), branch.z, extra=(backward, branch.axis)
    )
    config = config or config_for(backward, branch.z.dtype.itemsize, lines, c)
    blocks, line_blocks = triton.cdiv(c, config.channels), triton.cdiv(lines, config.lines)
    programs = PROGRAMS * _native.multiprocessors(branch.z.device)
    wanted = triton.cdiv(programs, max(1, n * blocks * line_blocks))
    segment = max(1, triton.cdiv(length, max(1, min(wanted, length // _SHORTEST))))
    segments = triton.cdiv(length, segment)
    axes = {"n": 0, "l": 5 - branch.axis, "a": branch.axis}
    strides = {f"{name}_{d}": t.stride(axis) for name, t in tensors.items() for d, axis in axes.items()}
    align = 4 if c % 4 == 0 and all(stride % 4 == 0 for stride in strides.values()) else 1
    constants = {
        "ALIGN": align, "LINES": config.lines, "CHANNELS": config.channels, "num_warps": config.num_warps,
        "REAL": tl.float64 if branch.z.dtype == torch.float64 else tl.float32, "enable_fp_fusion": True,
        # The interpreter has no assembly; AMD's chips lose it in `for_chip`.
        "OF_CHIP": branch.z.dtype.itemsize == 2 and not triton_interpreted(),
    }  # fmt: skip
    sizes = {"channels": c // align, "length": length, "lines": lines, "line_blocks": line_blocks, "segment": segment,
             "segments": segments}  # fmt: skip
    strides = {name: stride // align for name, stride in strides.items()}
    return Plan(config, blocks, sizes, n * line_blocks * segments, programs, strides, constants)


def launch_by_name(kernel: Any, programs: int, given: dict[str, Any], constants: dict[str, Any]) -> Launch:
    """By the names of the kernel's own arguments."""
    return Launch(kernel, (programs,), tuple(given[name] for name in kernel.arg_names if name in given), constants)


# --- Forward -----------------------------------------------------------------------------------------------
#
# Strides arrive divided by ALIGN: multiplying by the constant inside the kernel is what proves vectors aligned to the
# compiler without specialising on any value. `_a` is along the convolved axis, `_l` from line to line.

SIZES = ("channels", "length", "lines", "line_blocks", "segment", "segments")
_FORWARD_STRIDES = tuple(f"{t}_{d}" for t in ("z", "theta", "also", "out") for d in "nla")


@triton.jit(do_not_specialize=("images", *SIZES, *_FORWARD_STRIDES))
def _forward_kernel(
    out, partial, z, theta, also, scale, shift, taps,
    images: tl.int64, channels, length, lines, line_blocks, segment, segments,
    z_n: tl.int64, z_l: tl.int64, z_a: tl.int64, theta_n: tl.int64, theta_l: tl.int64, theta_a: tl.int64,
    also_n: tl.int64, also_l: tl.int64, also_a: tl.int64, out_n: tl.int64, out_l: tl.int64, out_a: tl.int64,
    ALSO: tl.constexpr, ALIGN: tl.constexpr, LINES: tl.constexpr, CHANNELS: tl.constexpr, REAL: tl.constexpr,
    OF_CHIP: tl.constexpr,
):  # fmt: skip
    """`partial` (parts, images, C) gets the sums of the outputs, and after those parts the sums of `also`."""
    channels *= ALIGN
    blocks = tl.cdiv(channels, CHANNELS)
    unit = tl.program_id(0) // blocks
    block = tl.program_id(0) - unit * blocks
    image, line, begin, end = position(unit, line_blocks, segments, segment, length, LINES)
    pairs = channels // 2
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    pair = block * (CHANNELS // 2) + tl.arange(0, CHANNELS // 2)
    in_channels = channel < channels
    mask = (line < lines)[:, None] & in_channels[None, :]
    out_mask = (line < lines)[:, None] & (pair < pairs)[None, :]
    z += image * (z_n * ALIGN) + (line * (z_l * ALIGN))[:, None] + channel[None, :]
    theta += image * (theta_n * ALIGN) + (line * (theta_l * ALIGN))[:, None] + channel[None, :]
    also += image * (also_n * ALIGN) + (line * (also_l * ALIGN))[:, None] + channel[None, :]
    out_cos = out + image * (out_n * ALIGN) + (line * (out_l * ALIGN))[:, None] + pair[None, :]
    out_sin = out_cos + pairs
    z_a *= ALIGN
    theta_a *= ALIGN
    also_a *= ALIGN
    out_a *= ALIGN
    rise = tl.load(scale + channel, mask=in_channels, other=0.0)[None, :]
    offset = tl.load(shift + channel, mask=in_channels, other=0.0)[None, :]
    output = pair[:, None] + (tl.arange(0, 2) * pairs)[None, :]
    exists = (pair < pairs)[:, None] & (tl.arange(0, 2) < 2)[None, :]
    row = taps + output * 14
    even0 = tap(row, exists, 0)
    even1 = tap(row, exists, 1)
    even2 = tap(row, exists, 2)
    even3 = tap(row, exists, 3)
    even4 = tap(row, exists, 4)
    even5 = tap(row, exists, 5)
    even6 = tap(row, exists, 6)
    odd0 = tap(row, exists, 7)
    odd1 = tap(row, exists, 8)
    odd2 = tap(row, exists, 9)
    odd3 = tap(row, exists, 10)
    odd4 = tap(row, exists, 11)
    odd5 = tap(row, exists, 12)
    odd6 = tap(row, exists, 13)
    # acc0 is the output 3 pixels behind the wave at work, which completes it; acc5 lies 2 ahead.
    acc0 = tl.zeros((LINES, CHANNELS // 2, 2), REAL)
    acc1 = tl.zeros((LINES, CHANNELS // 2, 2), REAL)
    acc2 = tl.zeros((LINES, CHANNELS // 2, 2), REAL)
    acc3 = tl.zeros((LINES, CHANNELS // 2, 2), REAL)
    acc4 = tl.zeros((LINES, CHANNELS // 2, 2), REAL)
    acc5 = tl.zeros((LINES, CHANNELS // 2, 2), REAL)
    total = tl.zeros((LINES, CHANNELS // 2, 2), REAL)
    total_also = tl.zeros((LINES, CHANNELS), REAL)
    start = tl.maximum(begin - 3, 0)
    stop = tl.minimum(end + 3, length)
    for i in tl.range(start, stop, num_stages=_STAGES):
        amplitude = tl.load(z + i * z_a, mask=mask, other=0.0).to(REAL)
        pre = tl.load(theta + i * theta_a, mask=mask, other=0.0).to(REAL) * rise + offset
        if ALSO:
            here = within(mask, i, begin, end)
            total_also += tl.load(also + i * also_a, mask=here, other=0.0).to(REAL)
        sine, cosine = sincos(pre, OF_CHIP)
        cos_even, cos_odd = even_odd(amplitude * cosine)
        sin_even, sin_odd = even_odd(amplitude * sine)
        even = tl.join(cos_even, sin_even)
        odd = tl.join(cos_odd, sin_odd)
        done = acc0 + even6 * even + odd6 * odd
        acc0 = acc1 + even5 * even + odd5 * odd
        acc1 = acc2 + even4 * even + odd4 * odd
        acc2 = acc3 + even3 * even + odd3 * odd
        acc3 = acc4 + even2 * even + odd2 * odd
        acc4 = acc5 + even1 * even + odd1 * odd
        acc5 = even0 * even + odd0 * odd
        if i - 3 >= begin:
            store_halves(out_cos + (i - 3) * out_a, out_sin + (i - 3) * out_a, done, out_mask)
            total += done
    # Beyond the end of the line nothing comes in.
    for j in range(stop - 3, end):
        if j >= begin:
            store_halves(out_cos + j * out_a, out_sin + j * out_a, acc0, out_mask)
            total += acc0
        acc0 = acc1
        acc1 = acc2
        acc2 = acc3
        acc3 = acc4
        acc4 = acc5
    part = unit - image * (line_blocks * segments)
    at = partial + (part * images + image) * channels
    tl.store(at + output, tl.sum(total, 0), mask=exists)
    if ALSO:
        at += images * channels * (line_blocks * segments)
        tl.store(at + channel, tl.sum(total_also, 0), mask=in_channels)


def forward_launch(
    out: Tensor, branch: Branch, also: Tensor | None = None, config: PhaseConfig | None = None
) -> tuple[Launch, Tensor]:
    """A launch and the (parts, N, C) partial sums it fills."""
    third = branch.z if also is None else also
    images = {"z": branch.z, "theta": branch.theta, "also": third, "out": out}
    plan = make_plan(branch, images, False, config)
    n, c = branch.z.shape[:2]
    parts = plan.sizes["line_blocks"] * plan.sizes["segments"]
    partial = branch.scale.new_empty((parts if also is None else 2 * parts, n, c))
    given = {**branch._asdict(), **images, "partial": partial, "images": n, **plan.sizes, **plan.strides}
    launch = launch_by_name(
        _forward_kernel, plan.units * plan.blocks, given, {**plan.constants, "ALSO": also is not None}
    )
    return launch, partial


def forward(out: Tensor, branch: Branch, also: Tensor | None = None, config: PhaseConfig | None = None) -> Tensor:
    """Writes the branch into `out` (N, C, H, W; contiguous channels).

    Returns (parts, N, C), to be added up: the sums over H and W of the branch before it is rounded, and of `also`.
    """
    launch, partial = forward_launch(out, branch, also, config)
    launch.run(out)
    return partial
