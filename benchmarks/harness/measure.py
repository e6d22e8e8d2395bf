"""Measures one case: every provider checked, its memory taken, then all timed in interleaved rounds."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from wavemix_kernels.clock import Clock, Effort, clock_for, interleave, quantile
from wavemix_kernels.ops.common.precision import products_in

from . import graphs, memory
from .case import Case, Expectation, Setting
from .gate import Verdict, judge, rms
from .machine import matmul_rate
from .providers import COMPILED, Subject, make, oracle
from .rivals import Unavailable


@dataclass
class Row:
    """One provider in one case, as results.json has it. Times in milliseconds, memory in bytes.

    Attributes:
        status: "ok", "wrong" (refused by the gate), "failed" (raised), "unavailable" or "skipped"; only "ok"
            has numbers.
        reason: why not "ok", in one line.
        error: largest error in units of the permitted one.
        speedup: median of the baseline over this median, both from the same rounds.
        baseline: the provider that speed-ups refer to: upstream, or the reference where upstream cannot run.
        gbps: bytes an ideal implementation moves, over the median, in GB/s; for operations and blocks.
        roofline_share: time of the roof (a copy of as many bytes in the same rounds; for matrix products also
            their arithmetic at this machine's measured rate) over the median.
        frames_per_second: images over the median, for whole models.
        peak_bytes: held at most above inputs, parameters and their gradients, by the allocator's own account; the
            result included. None for a CUDA graph, as the next two.
        tracked_peak_bytes: the same counted from operators' results, device-independent; None for compiled code.
        saved_bytes: kept for backward, beside inputs and parameters.
    """

    case: str
    group: str
    provider: str
    status: str
    reason: str | None = None
    error: float | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int = 0
    speedup: float | None = None
    baseline: str | None = None
    ideal_bytes: int | None = None
    flops: int | None = None
    roofline_ms: float | None = None
    gbps: float | None = None
    roofline_share: float | None = None
    frames_per_second: float | None = None
    peak_bytes: int | None = None
    tracked_peak_bytes: int | None = None
    saved_bytes: int | None = None


@dataclass
class Meter:
    """Measures cases on one device.

    Attributes:
        may_compile: asked before each ``torch.compile`` with the seconds that the last one took; False skips it.
        announce: told what is being done, for the progress bar.
    """

    device: torch.device
    effort: Effort
    may_compile: Callable[[float], bool] = lambda seconds: True
    announce: Callable[[str], None] = lambda doing: None
    _clock: Clock | None = None
    _rates: dict[torch.dtype, float] = field(default_factory=dict)
    _last_compile_s: float = 0.0

    def measure(self, case: Case, providers: Sequence[str]) -> Iterator[Row]:
        """Rows of `case`, in the order of `providers`.

        On KeyboardInterrupt the rows that have been timed so far are still given before it goes on.
        """
        with _tf32(case.tensor_cores):
            yield from self._measure(case, providers)

    def _measure(self, case: Case, providers: Sequence[str]) -> Iterator[Row]:
        self.announce("inputs and float64 reference")
        providers = [name for name in providers if case.takes(name)]
        rows = {name: Row(case.name, case.group, name, "failed") for name in providers}
        try:
            task = _Task.of(case, self.device)
        except Unavailable as reason:  # what the case itself is made of is missing
            for row in rows.values():
                row.status, row.reason = "unavailable", str(reason)
            yield from rows.values()
            return
        except Exception as error:  # noqa: BLE001 - without the truth nobody can be timed here; other cases go on
            for row in rows.values():
                row.reason = f"the float64 reference: {_one_line(error)}"
            yield from rows.values()
            return
        steps: dict[str, Callable[[], object]] = {}
        if not set(COMPILED).isdisjoint(providers):
            torch._dynamo.reset()  # else guards of earlier cases are walked at each call
        for name in providers:
            row = rows[name]
            if name in COMPILED and not self.may_compile(self._last_compile_s):
                row.status, row.reason = "skipped", "no time left in this run's limit; ask for --cases with fewer"
                continue
            self.announce(f"{name}: check and memory")
            begin = time.perf_counter()
            try:
                steps[name] = self._admit(case, name, task, row)
            except Unavailable as reason:
                row.status, row.reason = "unavailable", str(reason)
            except _Wrong as wrong:
                row.status, row.reason = "wrong", str(wrong)
            except Exception as error:  # noqa: BLE001 - whatever a rival raises is its result; the row shows it
                row.status, row.reason = "failed", _one_line(error)
            if name in COMPILED:
                self._last_compile_s = time.perf_counter() - begin
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        if not steps:
            yield from rows.values()
            return
        self.announce("timing")
        samples: dict[str, list[float]] = {}
        interrupted: KeyboardInterrupt | None = None
        try:
            self._clock = self._clock or clock_for(self.device)
            effort = self.effort
            if case.image:  # steps of seconds, whose noise is smaller
                effort = dataclasses.replace(effort, fewest=min(effort.fewest, 3))
            interleave({**steps, _COPY: _copy(task.ideal_bytes, self.device)}, self._clock, effort, samples)
        except KeyboardInterrupt as interrupt:
            interrupted = interrupt
        self._evaluate(case, task, rows, steps, samples)
        yield from (row for row in rows.values() if interrupted is None or row.status != "failed" or row.reason)
        if interrupted is not None:
            raise interrupted

    def _admit(self, case: Case, name: str, task: _Task, row: Row) -> Callable[[], object]:
        """Check `name`, take its memory and return its step."""
        exact = make(case, name, Setting(self.device, case.dtype, exact=True), task.inputs)
        verdict = task.judge(case, exact)
        row.error = verdict.error
        if verdict.reason is not None:
            raise _Wrong(verdict.reason)
        timed = exact
        if case.stochastic:
            timed = make(case, name, Setting(self.device, case.dtype), task.inputs)
        inputs = task.inputs
        cotangents: list[Tensor] = []
        if case.backward:
            with timed.scope(), torch.enable_grad():
                shaped = timed.forward(*inputs)
            cotangents = _laid_out_as([_cotangent(out, seed) for seed, out in enumerate(shaped)], shaped)
            del shaped
        step = _step(case, timed, inputs, cotangents)
        if timed.graphed:
            return graphs.captured(step)  # its memory is the graph's own for good: no step has a peak
        step()  # lazy set-up (workspaces, autotuning, compilation) is no part of a step's memory
        with _standing_gradients(timed.parameters.values()) as gradients:
            update = _update(case, timed, inputs, cotangents) if case.backward else step
            known = [*inputs, *timed.standing, *cotangents, *gradients]
            row.peak_bytes = memory.peak_bytes(update, self.device)
            if name not in COMPILED:  # torch.compile refuses to run under a dispatch mode
                row.tracked_peak_bytes = memory.tracked_peak_bytes(update, known)
        if case.backward:
            with timed.scope():
                row.saved_bytes = memory.saved_bytes(lambda: timed.forward(*inputs), known)
        return step

    def _evaluate(
        self,
        case: Case,
        task: _Task,
        rows: dict[str, Row],
        steps: dict[str, Callable[[], object]],
        samples: dict[str, list[float]],
    ) -> None:
        timed = {name: seconds for name, seconds in samples.items() if len(seconds) > 0}
        medians = {name: quantile(seconds, 0.5) for name, seconds in timed.items()}
        baseline = next((name for name in ("upstream", "reference") if name in medians), None)
        roof = medians.get(_COPY)
        if case.tensor_cores and roof is not None:
            roof = max(roof, task.flops / self._rate(case))
        for name in steps:
            if name not in timed:
                continue
            row = rows[name]
            row.status = "ok"
            row.rounds = len(timed[name])
            row.median_ms = medians[name] * 1e3
            row.p20_ms = quantile(timed[name], 0.2) * 1e3
            row.p80_ms = quantile(timed[name], 0.8) * 1e3
            row.ideal_bytes = task.ideal_bytes
            row.flops = task.flops if case.tensor_cores else None
            if case.image:  # the bytes of its image and weights say nothing about its time
                row.frames_per_second = len(task.inputs[0]) / medians[name]
            else:
                row.gbps = task.ideal_bytes / medians[name] / 1e9
            if baseline is not None:
                row.baseline, row.speedup = baseline, medians[baseline] / medians[name]
            if roof is not None:
                row.roofline_ms, row.roofline_share = roof * 1e3, roof / medians[name]

    def _rate(self, case: Case) -> float:
        dtype = case.autocast or case.dtype
        if dtype not in self._rates:
            self._rates[dtype] = matmul_rate(self.device, dtype)
        return self._rates[dtype]


# It takes part in the rounds as the providers do, so the roof is measured under the same conditions.
_COPY = "copy of the ideal number of bytes"


class _Wrong(Exception):
    """Refused by the gate."""


@dataclass
class _Task:
    """Inputs of a case's providers, and the results that the gate expects.

    Attributes:
        inputs: inputs of the timed step.
        judged: inputs of the step that the gate compares: `inputs`, or their first images.
        cotangents, expected, names, limits: belong to `judged`, in float64.
    """

    inputs: list[Tensor]
    judged: list[Tensor]
    cotangents: list[Tensor]
    expected: list[Tensor]
    names: list[str]
    limits: Sequence[Any]
    ideal_bytes: int
    flops: int

    @classmethod
    def of(cls, case: Case, device: torch.device) -> _Task:
        differentiated = case.backward and not case.image
        inputs = [x.to(device, case.dtype).requires_grad_(differentiated) for x in case.inputs()]
        judged = inputs
        if case.judged is not None:
            judged = [x.detach()[: case.judged].requires_grad_(differentiated) for x in inputs]
        wide = [x.detach().double().requires_grad_(differentiated) for x in judged]
        judge_by = oracle(case, device)
        flops = _flops(case, judge_by.module, inputs) if case.tensor_cores and judge_by.module is not None else 0
        bias_terms = _bias_terms(judge_by.module) if case.backward and judge_by.module is not None else {}
        with torch.set_grad_enabled(case.backward):
            outputs = judge_by.forward(*wide)
        names = [f"output {number}" for number in range(len(outputs))]
        expected, cotangents = [output.detach() for output in outputs], []
        parameters = judge_by.parameters
        if case.backward:
            cotangents = [_cotangent(output, seed) for seed, output in enumerate(outputs)]
            names += [f"gradient of input {number}" for number in range(len(wide))] if differentiated else []
            names += [f"gradient of {name}" for name in parameters]
            expected += torch.autograd.grad(outputs, _leaves(case, wide, judge_by), cotangents)
        with torch.no_grad():
            terms = [bias_terms.get(name.removeprefix("gradient of "), 0.0) for name in names]
            exact = Expectation(
                [x.detach() for x in wide], cotangents, expected, terms, parameters=len(parameters) * case.backward
            )
        # Read inputs and parameters, write outputs; backward reads cotangents and writes gradients.
        passes = 2 if case.backward else 1
        images = sum(x.numel() for x in inputs) * (2 if differentiated else 1)
        weights = sum(p.numel() for p in parameters.values()) * passes
        results = sum(out.numel() // len(wide[0]) for out in outputs) * len(inputs[0]) * passes
        moved = (images + weights + results) * torch.empty(0, dtype=case.dtype).element_size()
        task = cls(inputs, judged, cotangents, expected, names, [], moved, flops)
        if case.deep:
            rounded = task.results(case, make(case, "reference", Setting(device, case.dtype, exact=True), judged))
            errors = [rms(ours.to(true) - true) for ours, true in zip(rounded, expected, strict=True)]
            exact = dataclasses.replace(exact, rounding=errors)
        with torch.no_grad():
            task.limits = case.limits(exact, case.roundoff(device))
        return task

    def results(self, case: Case, subject: Subject) -> list[Tensor]:
        """Outputs, and gradients where the outputs have the right shapes to have some."""
        if subject.graphed:
            return graphs.captured(lambda: self._results(case, subject))()
        return self._results(case, subject)

    def _results(self, case: Case, subject: Subject) -> list[Tensor]:
        with subject.scope():
            with torch.set_grad_enabled(case.backward):
                outputs = subject.forward(*self.judged)
            actual = [output.detach() for output in outputs]
            if case.backward and [x.shape for x in outputs] == [x.shape for x in self.cotangents]:
                leaves = _leaves(case, self.judged, subject)
                actual += torch.autograd.grad(outputs, leaves, _laid_out_as(self.cotangents, outputs))
        return actual

    def judge(self, case: Case, subject: Subject) -> Verdict:
        return judge(self.names, self.results(case, subject), self.expected, self.limits)


def _leaves(case: Case, inputs: Sequence[Tensor], subject: Subject) -> list[Tensor]:
    """The tensors whose gradients are asked for."""
    return [*([] if case.image else inputs), *subject.parameters.values()]


def _flops(case: Case, module: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Operations of a step's matrix products and convolutions, which follow from shapes."""
    twin = copy.deepcopy(module).to("meta")
    shapes = [torch.empty_like(x, device="meta", dtype=torch.float64) for x in inputs]
    shapes = [x.requires_grad_(case.backward and not case.image) for x in shapes]
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(case.backward):
        outputs = tree_leaves(twin(*shapes))
        if case.backward:  # its module hooks know backward() alone, not autograd.grad()
            torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])
    return counter.get_total_flops()


def _bias_terms(module: nn.Module) -> dict[str, float]:
    """For each bias, the mean square sum of its gradient's terms over channels, as a root; filled by a backward."""
    sizes: dict[str, float] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def note(gradient: Tensor) -> None:
            channels = gradient.shape[1]
            sizes[name] = float((gradient.square().sum() / channels).sqrt())

        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(note)

        return hook

    for name, part in module.named_modules():
        if isinstance(getattr(part, "bias", None), nn.Parameter):
            part.register_forward_hook(watch(f"{name}.bias".lstrip(".")))
    return sizes


def _cotangent(output: Tensor, seed: int) -> Tensor:
    """Fixed normal values, rounded to bfloat16 so that every dtype holds the same ones."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(output.shape, generator=generator).bfloat16()
    return values.to(output.device, output.dtype)


def _laid_out_as(cotangents: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    """Cotangents in each output's own dtype and strides, as the operation that follows would hand them back."""
    return [torch.empty_like(out).copy_(value) for value, out in zip(cotangents, outputs, strict=True)]


def _step(case: Case, subject: Subject, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Callable[[], object]:
    """The timed step: one forward without autograd, or one forward and its gradients."""
    if not case.backward:

        def forward() -> object:
            with subject.scope(), torch.no_grad():
                return subject.forward(*inputs)

        return forward
    leaves = _leaves(case, inputs, subject)

    def forward_backward() -> object:
        with subject.scope():
            return torch.autograd.grad(subject.forward(*inputs), leaves, cotangents)

    return forward_backward


@contextlib.contextmanager
def _standing_gradients(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients that are there already, as in every step of a training but the first."""
    parameters = list(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    try:
        yield [parameter.grad for parameter in parameters if parameter.grad is not None]
    finally:
        for parameter in parameters:
            parameter.grad = None


def _update(
    case: Case, subject: Subject, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> Callable[[], object]:
    """The step whose memory is taken: parameters' gradients are added to those that stand, an input's is a result."""
    leaves = _leaves(case, inputs, subject)

    def update() -> object:
        with subject.scope():
            torch.autograd.backward(subject.forward(*inputs), cotangents, inputs=leaves)
        results = [x.grad for x in inputs]
        for x in inputs:
            x.grad = None
        return results

    return update


def _copy(ideal_bytes: int, device: torch.device) -> Callable[[], object]:
    """Half the bytes read, half written, into memory that exists already."""
    source = torch.ones(max(1, ideal_bytes // 2), dtype=torch.int8, device=device)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def _tf32(allowed: bool) -> contextlib.AbstractContextManager[None]:
    """TF32 in convolutions where a case allows it: a wavelet's own convolutions must keep float32."""
    return contextlib.nullcontext() if allowed else products_in("ieee")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
