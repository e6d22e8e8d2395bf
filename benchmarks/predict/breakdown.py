"""The kernels of one step of ours, largest first: where a step's time goes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from .chips import Chip
from .device import Known, known, record
from .kernels import function_of
from .record import Launch
from .steps import Step


@dataclass(frozen=True)
class Part:
    """One kernel of ours at one size, or all calls of one operator of PyTorch's.

    Attributes:
        name: ``kind operator: kernel, largest tensor``, or the operator of PyTorch's.
        launches: of the step.
        seconds: of all of them, without what lies between launches.
        share: of what the chip can do, see :class:`benchmarks.predict.bound.Prediction`; the mean by time.
        bound: that holds for most of the time.
        counts: how sectors and bank conflicts are known: "executed" (:mod:`benchmarks.predict.executed`), "static" from
            the machine code alone, or "" of a library's kernel.
    """

    name: str
    launches: int
    seconds: float
    share: float
    bound: str
    counts: str


def parts(step: Step, training: bool, chip: Chip) -> list[Part]:
    """Everything that a step of ours launches on a chip, the longest first.

    Raises:
        execute.NotUnderstood, tools.Missing: see :func:`benchmarks.predict.bound.predict`.
    """
    found: dict[str, list[Known]] = {}
    for launches in record(step, "ours", training, chip):
        for one in launches:
            found.setdefault(_name(one), []).append(known(one, chip))
    return sorted((_part(name, ones) for name, ones in found.items()), key=lambda part: -part.seconds)


def _name(launch: Launch) -> str:
    if launch.kind == "aten":
        return launch.name
    largest = max(launch.arrays, key=lambda array: array.bytes, default=None)
    shape = "x".join(map(str, largest.shape)) if largest else ""
    return f"{launch.kind} {launch.operator}: {function_of(launch).strip('_')}, {shape}"


def _part(name: str, ones: list[Known]) -> Part:
    seconds = math.fsum(one.seconds for one in ones)
    bounds: Counter[str] = Counter()
    for one in ones:
        bounds[one.bound] += one.seconds  # type: ignore[assignment]  # a Counter's values are ints by its type, any number in fact
    share = math.fsum(one.share * one.seconds for one in ones) / seconds
    counts = "" if name.startswith("aten") else "executed" if all(one.executed for one in ones) else "static"
    return Part(name, len(ones), seconds, share, max(bounds, key=lambda bound: bounds[bound]), counts)
