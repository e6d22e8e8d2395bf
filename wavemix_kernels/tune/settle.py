"""Settles each choice of a recorded call by measuring it on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from wavemix_kernels.clock import Clock, Effort, clock_for, interleave, quantile
from wavemix_kernels.ops import tuned
from wavemix_kernels.ops.common import triton_launch
from wavemix_kernels.tune.judge import Judge
from wavemix_kernels.tune.record import Choice, Recorder, Unit

#: A candidate takes the default's place where it needs at most this share of its time, in three of four rounds of a
#: second run of the two. A round's ratio is what disturbances leave alone, and its upper quartile says how much they
#: do not; one of many equal candidates is the fastest of the first run by luck, which the second takes away.
GAIN = 0.97
_ROUNDS = (5, 50)
_SECOND_ROUNDS = (12, 100)
#: Tiles that a ranking keeps: the best, and those that serve where it does not fit.
_KEPT = 3
#: Candidates that take so many times as long as the best at first glance are not timed in rounds.
_FAR_OFF = 3.0
#: Candidates that a predictor finds so many times slower than its best are not timed.
_HOPELESS = 2.0

#: Predicted seconds of a unit with a candidate, or None: for whoever has a model of the device.
Predictor = Callable[[Unit, Choice, Any], float | None]


@dataclass(frozen=True)
class Result:
    """One choice.

    Attributes:
        call: what was called, with its shapes.
        key: of the choice, as :mod:`wavemix_kernels.ops.tuned` knows it.
        default, chosen: names of backends or forms, or tiles (None: the default tile).
        gain: time of what was chosen over that of the default, median of the second run's rounds; 1 where it stays.
        noise: between the quartiles of those rounds.
        times: seconds of each candidate timed, medians of the first run.
        left_out: why others were not timed.
    """

    call: str
    key: tuned.Key
    default: Any
    chosen: Any
    gain: float
    noise: float
    times: dict[Any, float]
    left_out: dict[Any, str] = field(default_factory=dict)

    def __str__(self) -> str:
        times = ", ".join(f"{name_of(c)} {s * 1e6:.4g} us" for c, s in sorted(self.times.items(), key=lambda i: i[1]))
        kept = "stays" if self.chosen == self.default else f"{1 / self.gain:.2f}x {name_of(self.default)}"
        lines = [f"{self.call}: {self.key[0]}: {name_of(self.chosen)} ({kept}; {times or 'nothing to time'})"]
        return "\n".join([*lines, *(f"    {name_of(c)}: {why}" for c, why in self.left_out.items())])


def name_of(candidate: Any) -> str:
    return "default tile" if candidate is None else str(candidate)


class Settler:
    """Times candidates; the table of :mod:`wavemix_kernels.ops.tuned` holds what is settled so far.

    Args:
        seconds: for one choice, its compilations aside.
        predict: see :data:`Predictor`.
        done: called with each result.
    """

    def __init__(
        self, recorder: Recorder, seconds: float, predict: Predictor | None, done: Callable[[Result], object],
        clock: Clock | None = None,
    ) -> None:  # fmt: skip
        self.results: dict[tuned.Key, Result] = {}
        self.entries: dict[torch.device, dict[str, Any]] = {}
        self._recorder, self._seconds, self._predict, self._done = recorder, seconds, predict, done
        self._clock = clock
        self._known: set[str] = set()

    def settle_all(self) -> None:
        """Every recorded call, and those that appear on the way: composites after what they are made of."""
        while fresh := [name for name in self._recorder.units if name not in self._known]:
            self._known.update(fresh)
            for unit in sorted((self._recorder.units[name] for name in fresh), key=lambda u: bool(u.kwargs)):
                self._settle(unit)

    def _settle(self, unit: Unit) -> None:
        if not self._open(unit):
            return
        arguments = unit.arguments()
        judge = Judge(unit, arguments)
        self._settle_choices(unit, arguments, judge)

    def _open(self, unit: Unit) -> list[Choice]:
        return [choice for key, choice in unit.choices.items() if key not in self.results]

    def _settle_choices(self, unit: Unit, arguments: Any, judge: Judge) -> None:
        while choices := self._open(unit):
            self._settle_choice(unit, choices[0], arguments, judge)

    def _settle_choice(self, unit: Unit, choice: Choice, arguments: Any, judge: Judge) -> None:
        device, key = unit.device, choice.key
        # Choices that come up on the way are settled first, with this one as it stands.
        self.results[key] = Result(unit.title, key, choice.default, choice.default, 1.0, 0.0, {})
        admitted, left_out, spills = [], self._hopeless(unit, choice), None
        for candidate in (choice.default, *(c for c in choice.candidates if c != choice.default)):
            if candidate in left_out:
                continue
            self._put(device, key, candidate)
            reason, spilled = self._try(unit, arguments, judge)
            if reason is not None and self._open(unit):  # it may be its default tile that fails
                self._settle_choices(unit, arguments, judge)
                self._put(device, key, candidate)
                reason, spilled = self._try(unit, arguments, judge)
            if candidate == choice.default:
                spills = spilled if reason is None else None
            elif reason is None and spills is not None and spilled > spills:
                reason = f"it spills {spilled} registers, the default {spills}"
            if reason is not None:
                left_out[candidate] = reason
                continue
            self.settle_all()
            self._settle_choices(unit, arguments, judge)
            admitted.append(candidate)
        result = self._time(unit, choice, admitted, arguments)
        result = dataclasses.replace(result, left_out=left_out)
        del self.results[key]  # in the order in which they are settled
        self.results[key] = result
        self._keep(device, result)
        self._done(result)

    def _hopeless(self, unit: Unit, choice: Choice) -> dict[Any, str]:
        if self._predict is None:
            return {}
        times = {c: t for c in choice.candidates if (t := self._predict(unit, choice, c)) is not None}
        least = min(times.values(), default=0.0)
        return {
            c: f"predicted {t * 1e6:.4g} us, the best {least * 1e6:.4g} us"
            for c, t in times.items()
            if t > _HOPELESS * least and c != choice.default
        }

    def _try(self, unit: Unit, arguments: Any, judge: Judge) -> tuple[str | None, int]:
        """Why not to time what the table says now, or None; and the registers that its kernels spill."""
        kernels: list[Any] = []
        triton_launch.observers.append(kernels.append)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            return self._recorder.run(unit.name, unit.function, args, kwargs)

        try:
            with tuned.recording(self._recorder):
                results = unit.run(arguments, recorded)
            return judge.why_wrong(results), sum(getattr(k, "n_spills", 0) for k in kernels)
        except Exception as error:  # noqa: BLE001 - whatever a compiler raises is the candidate's result
            return f"{type(error).__name__}: {error}".splitlines()[0], 0
        finally:
            triton_launch.observers.remove(kernels.append)

    def _time(self, unit: Unit, choice: Choice, admitted: list[Any], arguments: Any) -> Result:
        default, key = choice.default, choice.key
        unchanged = Result(unit.title, key, default, default, 1.0, 0.0, {})
        if not admitted:
            return unchanged
        times = self._glance(unit, key, admitted, arguments)
        least = min(times.values())
        close = [candidate for candidate in admitted if times[candidate] <= _FAR_OFF * least]
        samples = self._interleave(unit, key, close, arguments, _ROUNDS)
        times |= {candidate: median(values) for candidate, values in samples.items()}
        best = min(admitted, key=times.__getitem__)
        if default not in admitted:  # it is wrong, or does not fit: the best of the others
            return dataclasses.replace(unchanged, chosen=best, times=times)
        if best == default:
            return dataclasses.replace(unchanged, times=times)
        again = self._interleave(unit, key, [default, best], arguments, _SECOND_ROUNDS)
        ratios = [ours / its for ours, its in zip(again[best], again[default], strict=True)]
        noise = quantile(ratios, 0.75) - quantile(ratios, 0.25)
        if quantile(ratios, 0.75) > GAIN:
            return dataclasses.replace(unchanged, noise=noise, times=times)
        return Result(unit.title, key, default, best, median(ratios), noise, times)

    def _glance(self, unit: Unit, key: tuned.Key, candidates: list[Any], arguments: Any) -> dict[Any, float]:
        """The better of two runs each."""
        self._clock = self._clock or clock_for(unit.device)
        times = {}
        for candidate in candidates:
            self._put(unit.device, key, candidate)
            times[candidate] = min(self._clock.sample(lambda: unit.run(arguments), 1) for _ in range(2))
        return times

    def _interleave(
        self, unit: Unit, key: tuned.Key, candidates: list[Any], arguments: Any, rounds: tuple[int, int]
    ) -> dict[Any, list[float]]:
        self._clock = self._clock or clock_for(unit.device)
        samples: dict[str, list[float]] = {}
        names = {str(i): candidate for i, candidate in enumerate(candidates)}
        interleave(
            dict.fromkeys(names, lambda: unit.run(arguments)), self._clock, Effort(self._seconds / 2, *rounds), samples,
            lambda name: self._put(unit.device, key, names[name]),
        )  # fmt: skip
        return {candidate: samples[name] for name, candidate in names.items()}

    def _put(self, device: torch.device, key: tuned.Key, candidate: Any) -> None:
        tuned.put(device, key, None if candidate is None else [candidate])

    def _keep(self, device: torch.device, result: Result) -> None:
        """Winner first; of tiles also those that come next."""
        others = [c for c in sorted(result.times, key=result.times.__getitem__) if c != result.chosen]
        is_tile = not isinstance(result.default, str)
        ranking = [result.chosen, *(others[: _KEPT - 1] if is_tile else ())]
        if None in ranking:  # what comes after the default is the search space's
            ranking = ranking[: ranking.index(None)]
        tuned.put(device, result.key, ranking)
        name, value = tuned.entry(result.key, [_fields(c) for c in ranking], device)
        value["times_us"] = {name_of(c): round(s * 1e6, 2) for c, s in result.times.items()}
        value["gain"] = round(result.gain, 4)
        self.entries.setdefault(device, {})[name] = value


def _fields(candidate: Any) -> Any:
    """The fields as JSON has them."""
    if dataclasses.is_dataclass(candidate) and not isinstance(candidate, type):
        return list(dataclasses.astuple(candidate))
    return [_fields(part) for part in candidate] if isinstance(candidate, tuple) else candidate
