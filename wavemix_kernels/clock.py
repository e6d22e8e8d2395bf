"""Clocks: interleaved rounds, so that all that is compared meets the same machine, warm or throttled or disturbed."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Step = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: wall time for all that is compared.
        fewest: rounds made whatever they cost.
        most: rounds after which more would change nothing.
    """

    seconds: float
    fewest: int
    most: int


class CpuClock:
    """Wall time. Calls shorter than `SHORTEST_S` are repeated inside one sample to stand clear of the timer's noise."""

    SHORTEST_S = 1e-3

    def repeats(self, step: Step) -> int:
        seconds = self.sample(step, 1)
        return max(1, min(1000, math.ceil(self.SHORTEST_S / max(seconds, 1e-7))))

    def sample(self, step: Step, repeats: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - begin) / repeats


class CudaClock:
    """Device time between two events, the L2 cache filled with other data before each call.

    The flush also covers the launch: while it runs, the CPU has queued what is timed, so that a short kernel's
    time is the kernel's.
    """

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        size = max(64 << 20, 4 * int(getattr(properties, "L2_cache_size", 0)))
        self._flush = torch.empty(size, dtype=torch.int8, device=device)
        self._device = device

    def repeats(self, step: Step) -> int:
        return 1

    def sample(self, step: Step, repeats: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize(self._device)
        return begin.elapsed_time(end) / 1e3


Clock = CpuClock | CudaClock


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def interleave(
    steps: Mapping[str, Step],
    clock: Clock,
    effort: Effort,
    samples: dict[str, list[float]],
    before: Callable[[str], object] = lambda name: None,
) -> None:
    """Time all `steps` in rounds, appending seconds per call to `samples`; `before(name)` goes ahead of each, untimed.

    Each round has a new random order, not a rotated one: whoever always followed the same neighbour would always
    find the caches and the allocator as that one leaves them. The caller owns `samples`, so an interrupted
    measurement keeps what it has.
    """
    names, repeats = list(steps), dict[str, int]()
    for name in names:
        samples[name] = []
        before(name)
        steps[name]()
        repeats[name] = clock.repeats(steps[name])
    order = random.Random(0)
    begin = time.perf_counter()
    for round_number in range(effort.most):
        if round_number >= effort.fewest and time.perf_counter() - begin > effort.seconds:
            break
        for name in order.sample(names, len(names)):
            before(name)
            samples[name].append(clock.sample(steps[name], repeats[name]))


def quantile(values: list[float], share: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
