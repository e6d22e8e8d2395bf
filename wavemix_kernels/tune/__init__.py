"""``tune``: measures on this device what a model's calls run fastest on, for backend ``"auto"`` to take.

See :mod:`wavemix_kernels.ops.tuned` for what a table of choices is, and how it is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wavemix_kernels import backends, cache
from wavemix_kernels.clock import Clock
from wavemix_kernels.ops import tuned
from wavemix_kernels.tune.record import Choice, Recorder, Unit
from wavemix_kernels.tune.settle import Predictor, Result, Settler
from wavemix_kernels.warmup import warmup

__all__ = ["Choice", "Report", "Result", "Unit", "tune"]

#: A model of the device, where one is installed; None: every candidate is timed.
PREDICTOR: Predictor | None = None


@dataclass(frozen=True)
class Report:
    """The report of :func:`tune`. Printing it lists the choices.

    Attributes:
        results: one per choice.
        entries: what was kept: device to (name to value).
        saved: whether it is in the user's cache, for later processes.
    """

    results: tuple[Result, ...]
    entries: dict[torch.device, dict[str, Any]]
    saved: bool
    seconds: float

    def __str__(self) -> str:
        if not self.results:
            return "tune: the model calls no operator of wavemix_kernels that has a choice; accelerate(model) first?"
        changed = sum(result.chosen != result.default for result in self.results)
        where = "kept for later processes" if self.saved else "for this process only"
        last = f"tune: {len(self.results)} choices in {self.seconds:.0f} s, {changed} other than the default, {where}"
        return "\n".join([*map(str, self.results), last])


def tune(
    model: nn.Module, *example: Any, train: bool = True, seconds: float = 1.0, save: bool = True,
    progress: Callable[[Result], object] = lambda result: None, clock: Clock | None = None,
) -> Report:  # fmt: skip
    """Times every candidate for each operator that ``model`` calls, and lets backend ``"auto"`` take the fastest.

    Candidates are the backends that serve a call, the tiles of Triton's kernels, and PATM's two forms. Each is checked
    against the reference in float64 before it is timed: on a GPU by events with a cold L2 cache, on a CPU by wall time,
    in interleaved rounds. The default stays unless another is faster beyond noise
    (:data:`wavemix_kernels.tune.settle.GAIN`). Entries serve batches and images of up to twice the size.

    A copy of the model runs on copies of the tensors: parameters, buffers, gradients and torch's random state stay as
    they are. Call it under the same ``torch.autocast`` as the model itself, and with nothing else running.

    Args:
        model: any module with modules of this package.
        example: the arguments of a call.
        train: a training step, else inference.
        seconds: for timing one choice; checks and Triton's compilations come on top.
        save: keep what is found in the user's cache (:mod:`wavemix_kernels.cache`).
        progress: called with each result.
        clock: what measures; default: that of the device.

    Raises:
        TypeError, ValueError: as :func:`wavemix_kernels.warmup`; a backend is asked for by name.
    """
    started = time.perf_counter()
    with tuned.rules_alone():
        recorder = record(model, *example, train=train)
        recorder.gives_way = False
        tuned.forget()  # what did not fit is tried, and named, again
        settler = Settler(recorder, seconds, PREDICTOR, progress, clock)
        settler.settle_all()
    saved = save
    for device, entries in settler.entries.items():
        saved = save and cache.write(device, tuned.SECTION, entries) and saved
        tuned.load(device)
        for value in entries.values():
            tuned.put(device, *tuned.from_entry(value))
    return Report(tuple(settler.results.values()), settler.entries, saved, time.perf_counter() - started)


def record(model: nn.Module, *example: Any, train: bool) -> Recorder:
    """The calls of a model, with those that it would make if a choice outside of all calls fell otherwise."""
    if (name := backends.requested()) != "auto":
        raise ValueError(f"tune: backend {name!r} is asked for ({backends.VARIABLE}, or wavemix_kernels.backend)")
    recorder, explored = Recorder(), set[tuned.Key]()
    with tuned.recording(recorder):
        warmup(model, *example, train=train)
        while fresh := [choice for key, choice in recorder.loose.items() if key not in explored]:
            for choice in fresh:
                explored.add(choice.key)
                for candidate in choice.candidates:
                    if candidate != choice.default:
                        _with(recorder, choice, candidate, lambda: warmup(model, *example, train=train))
    return recorder


def _with(recorder: Recorder, choice: Choice, candidate: Any, function: Callable[[], object]) -> None:
    for device in {unit.device for unit in recorder.units.values()}:
        tuned.put(device, choice.key, [candidate])
    try:
        function()
    finally:
        for device in {unit.device for unit in recorder.units.values()}:
            tuned.put(device, choice.key, None)
