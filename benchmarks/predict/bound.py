"""The time of a launch: each unit of a chip asked how long it would take alone, and the slowest taken.

The bounds are

- ``memory``: bytes at the speed of a copy;
- ``L2``: sectors at its bandwidth, which is where half-used sectors and what is read again count;
- ``issue``: instructions, four a clock of a multiprocessor;
- ``alu``, ``fma``, ``mufu``, ``fp64``, ``shared``, ``tensor``: instructions of one unit;
- ``latency``: the way of one warp alone, waiting for each load where its value is first used, times the rounds of
  blocks that the chip takes: too few bytes on the way, too few warps, or a last round that is not full.

Work is dealt out by blocks: the multiprocessor with most of them decides. Bounds near each other hold each other up, so
the time is their p-norm. Where many blocks work side by side, or copies run in the background, p is 4, which gives 1.19
times the larger of two equal ones. The phases of one block, with barriers between them, follow each other: p is the
number of blocks there, and one block alone takes the sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from .chips import Chip
from .compiled import compiled
from .executed import name_of, scaled, scales
from .profile import Profile, profile
from .record import Launch

_MOST = 4  # of p
_EVEN = 4  # from so many rounds on blocks end at different times, and half a round is lost instead of a whole one


@dataclass(frozen=True)
class Prediction:
    """The predicted time of one launch.

    Attributes:
        seconds: of the kernel, without the launch (:attr:`benchmarks.predict.chips.Chip.launch`).
        bound: the name of the largest bound.
        share: of what the chip can do: of copy bandwidth or of tensor peak, whichever asks for more time.
        bytes: that device memory moves.
        flops: of tensor cores.
        bounds: seconds by name.
        executed: whether accesses to memory are scaled to what was executed (:mod:`benchmarks.predict.executed`).
    """

    seconds: float
    bound: str
    share: float
    bytes: float
    flops: float
    bounds: dict[str, float]
    profile: Profile
    executed: bool = False


def predict(launch: Launch, chip: Chip) -> Prediction:
    """The time of one launch of kind ``"triton"`` or ``"cuda"``.

    Raises:
        execute.NotUnderstood, tools.Missing, ValueError: see :func:`benchmarks.predict.profile.profile`.
        ValueError: a block takes more shared memory than it may have.
    """
    if (shared := compiled(launch, chip).shared) > (most := chip.shared_of_block):
        raise ValueError(f"{name_of(launch)}: {shared} bytes of shared memory, a block of {chip.name} has {most}")
    scale = scales(name_of(launch))
    return replace(of_profile(scaled(profile(launch, chip), scale), launch, chip), executed=bool(scale))


def of_profile(found: Profile, launch: Launch, chip: Chip) -> Prediction:
    """:func:`predict` from what a launch asks for."""
    warps = found.warps
    blocks = -(-found.blocks // chip.sms)  # of the multiprocessor with most
    dtype = next((a.dtype for a in launch.arrays if a.dtype in (torch.float16, torch.bfloat16)), torch.float32)
    bounds = {"memory": found.dram / chip.copy_bandwidth, "L2": found.sectors / chip.l2_bandwidth}
    clocks = _clocks(found, chip, dtype)
    bounds |= {name: blocks * warps * value / chip.clock for name, value in clocks.items()}
    rounds = found.blocks / (chip.sms * found.resident)
    rounds = float(math.ceil(rounds)) if rounds < _EVEN else rounds + 0.5
    bounds["latency"] = rounds * found.clocks / chip.clock
    p = min(found.resident, _MOST) if found.counts["barrier"] and not found.background else _MOST
    seconds = sum(value**p for value in bounds.values()) ** (1 / p)
    flops = (found.flops + found.warp_flops) * warps * found.blocks
    ideal = max(bounds["memory"], flops / chip.tensor_flops[dtype])
    bound = max(bounds, key=lambda name: bounds[name])
    return Prediction(seconds, bound, ideal / seconds, found.dram, flops, bounds, found)


def _clocks(found: Profile, chip: Chip, dtype: torch.dtype) -> dict[str, float]:
    """Clocks of a multiprocessor that one warp takes of each unit."""
    count = found.counts
    per_clock = chip.sms * chip.clock
    return {
        "issue": found.instructions / 4,
        "alu": 32 * count["alu"] / chip.alu_lanes,
        "fma": max(32 * (count["fp32"] + count["imad"]) / chip.fp32_lanes, 32 * count["imad"] / 64),
        "fp64": 32 * count["fp64"] / chip.fp64_lanes,
        "mufu": 32 * count["mufu"] / chip.mufu_lanes,
        "shared": found.shared_clocks,
        "tensor": found.flops / (chip.tensor_flops[dtype] / per_clock)
        + found.warp_flops / (chip.warp_tensor_flops[dtype] / per_clock),
    }
