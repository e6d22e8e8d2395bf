"""Predictions beside measurements of a GPU, kernel by kernel (:mod:`benchmarks.gpu.kernels`)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .chips import CHIPS, Chip
from .device import known, record
from .kernels import function_of
from .record import Launch
from .steps import Step

#: All that is not ours.
LIBRARY = "library"


@dataclass(frozen=True)
class Pair:
    """A kernel of ours, all its launches of a step together, or everything of the library's.

    Attributes:
        predicted, measured: seconds, without what lies between launches.
        launches: predicted, measured. The library's differ: an operator can be several kernels.
    """

    name: str
    predicted: float
    measured: float
    launches: tuple[float, float]


@dataclass(frozen=True)
class Compared:
    """A step.

    Attributes:
        host, whole: seconds that were measured: of the host until all is queued, and of the step.
    """

    step: Step
    training: bool
    pairs: list[Pair]
    host: float
    whole: float


def load(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Environment and rows of a file.

    Raises:
        ValueError: it is not one of :mod:`benchmarks.gpu.kernels`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["environment"], content["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--measured {path}: expected the kernels.json of benchmarks/gpu.sh ({error!r})") from error


def chip_of(facts: dict[str, Any]) -> str:
    """The chip that was measured, by its name, else the first of its compute capability.

    Raises:
        ValueError: none is in the table of chips.
    """
    gpu, capability = facts.get("gpu") or "", str(facts.get("compute_capability"))
    same = [name for name, chip in CHIPS.items() if ".".join(map(str, chip.capability)) == capability]
    named = [name for name in same if name.upper() in gpu.upper()]
    if not same:
        raise ValueError(f"--measured: {gpu or 'no GPU'}, compute capability {capability}: not in the table of chips")
    return (named or same)[0]


def compare(step: Step, row: dict[str, Any], chip: Chip) -> Compared:
    """The prediction for the step of a row beside it.

    Raises:
        execute.NotUnderstood, tools.Missing: see :func:`benchmarks.predict.bound.predict`.
    """
    forward, backward = record(step, "ours", row["training"], chip)
    launches = [(one, known(one, chip).seconds) for one in (*forward, *backward)]
    return Compared(step, row["training"], pairs(launches, row["kernels"]), row["host_us"] / 1e6, row["step_us"] / 1e6)


def pairs(predicted: Iterable[tuple[Launch, float]], measured: Sequence[dict[str, Any]]) -> list[Pair]:
    """Ours by function, the library's together; what took longest first."""
    expected: dict[str, list[float]] = {}
    for launch, seconds in predicted:
        expected.setdefault(LIBRARY if launch.kind == "aten" else function_of(launch), []).append(seconds)
    found: dict[str, list[tuple[float, float]]] = {}
    for kernel in measured:
        name = function(kernel["name"])
        if name not in expected and not _OURS.match(kernel["name"]):
            name = LIBRARY
        found.setdefault(name, []).append((kernel["launches"], kernel["us"] / 1e6))
    made = [
        Pair(
            name,
            math.fsum(expected.get(name, [])),
            math.fsum(seconds for _, seconds in found.get(name, [])),
            (len(expected.get(name, [])), sum(count for count, _ in found.get(name, []))),
        )
        for name in {**expected, **found}
    ]
    return sorted(made, key=lambda pair: -max(pair.predicted, pair.measured))


#: A CUDA kernel of ours as the profiler names it.
_OURS = re.compile(r"(void )?wavemix::")


def function(demangled: str) -> str:
    """A kernel's name in the source: without its return type, namespaces, template and other arguments."""
    plain = demangled.replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", plain.removeprefix("void "), maxsplit=1)[0].rpartition("::")[2].strip()
