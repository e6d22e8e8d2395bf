"""The stages of a run and their budgets, as data."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu import parity, timing
from benchmarks.gpu.jobs import Job
from benchmarks.gpu.timing import Group


@dataclass(frozen=True)
class Setting:
    """Where a run works.

    Attributes:
        arch: the device's, as nvcc has it: "90".
        device: "cuda", or "cpu" in a rehearsal.
        backends: under proof, in this order.
        environment: of every job.
    """

    out: Path
    arch: str
    device: str = "cuda"
    backends: Sequence[str] = ("cuda", "triton")
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Jobs that run side by side.

    Attributes:
        until: share of the whole time at which it is stopped. What an earlier stage leaves of its time is its too.
        what: a line for the plan that is printed.
        jobs: made when it begins.
        width: most processes at a time; None for as many as cores.
    """

    name: str
    until: float
    what: str
    jobs: Callable[[Setting], Iterable[Job]]
    width: int | None = None


@dataclass(frozen=True)
class Budget:
    """How a run of about so many minutes spends them.

    Attributes:
        shares: stage -> its `until`; a stage that is not here is left out.
        backends: of the parity tests, beside those under proof.
        slow: the tests marked `prove` too: every tile of every Triton kernel.
        timings: groups of cases, each a stage ``timing NAME``.
        one_by_one: a process per op under the sanitizers, else one for all ops.
        left_out: what a larger budget has, in words.
    """

    shares: dict[str, float]
    backends: Sequence[str]
    slow: bool
    timings: Sequence[Group]
    one_by_one: bool
    left_out: Sequence[str]


# --- Timings -------------------------------------------------------------------------------------------------

_EAGER = ("upstream", "reference", "ours", "ours+graph")
# Tuned matrix products take minutes: eight of them have none.
_SOON = ("upstream", "reference", "reduce-overhead", "ours", "ours+graph")
_COMPILED = ("upstream", "reference", "compile", "reduce-overhead", "ours", "ours+graph", "ours+compile")
_EACH = ("triton", "cuda")
_WIDE = "waveblock/L{}/bf16-autocast/{}/64x192x64x64/*"
_HEADLINE = ("haar/J1/fp32/nchw/4x64x256x256/*", "haar/J4/fp32/nchw/4x64x256x256/*")
_BLOCKS = (_WIDE.format(1, "channels_last"), "patm/fc/bf16-autocast/nchw/128x64x56x56/*",
           _WIDE.format(3, "channels_last"))  # fmt: skip
_MODELS = ("wavemix/lite-8-5/bf16-autocast/*", "wavemlp/T_dw/bf16-autocast/*",
           "wavemix/classification-192-16-L3/bf16-autocast/*")  # fmt: skip

BUDGETS: dict[int, Budget] = {
    3: Budget(
        {"build": 0.55, "self-tests": 0.65, "parity": 0.87, "timing haar": 0.98},
        ("cuda", "triton"), False, (Group("haar", _HEADLINE, (*_EAGER, *_EACH)),), False,
        ("parity of whole models and of what the library serves", "every tile of the Triton kernels",
         "kernel by kernel, the predicted steps", "timings of blocks and models, and of torch.compile",
         "memcheck, racecheck, synccheck and initcheck"),
    ),
    8: Budget(
        {"build": 0.25, "self-tests": 0.3, "parity": 0.55, "kernels": 0.67, "timing haar": 0.72,
         "timing blocks": 0.84, "timing models": 0.91, "sanitizers": 0.98},
        ("cuda", "triton", "auto"), False,
        (Group("haar", (*_HEADLINE, "haar/J[14]/bf16/*/4x64x256x256/*"), (*_SOON, *_EACH)),
         Group("blocks", _BLOCKS, (*_SOON, *_EACH)),
         Group("models", _MODELS, _EAGER)), False,
        ("parity of the reference on this device", "every tile of the Triton kernels",
         "timings of other sizes, and by torch.compile with tuned products; of models by torch.compile"),
    ),
    25: Budget(
        {"build": 0.13, "self-tests": 0.15, "parity": 0.37, "kernels": 0.42, "timing haar": 0.49,
         "timing blocks": 0.65, "timing models": 0.84, "sanitizers": 0.98},
        ("cuda", "triton", "auto", "reference"), True,
        (Group("haar", (*_HEADLINE, "haar/*"), (*_COMPILED, *_EACH)),
         Group("blocks", (*_BLOCKS, "waveblock/L4/*/64x192x64x64/*", "waveblock/*/64x192x64x64/*", "patm/*/128x*"),
               (*_COMPILED, *_EACH)),
         Group("models", (*_MODELS, "wavemlp/S/*", "wavemix/*/bf16-autocast/*", "wavemlp-frames/*"), _COMPILED)), True,
        (),
    ),
}  # fmt: skip


def budget(minutes: float) -> Budget:
    """The largest that `minutes` fill; the smallest, more hurried, for fewer."""
    return BUDGETS[max((least for least in BUDGETS if least <= minutes), default=min(BUDGETS))]


# --- Stages --------------------------------------------------------------------------------------------------


def stages(minutes: float) -> list[Stage]:
    """Most important first. The build, which waits for a few files, has Triton's self-tests beside it."""
    chosen = budget(minutes)
    made = [
        ("build", "the core for this GPU alone; beside it each op's self-test by Triton", _build),
        ("self-tests", "each op by CUDA, a process each", _self_tests),
        ("parity", f"tests of {', '.join(chosen.backends)}, processes apart; beside them the timings' Triton compiles",
         _parity(chosen)),
        ("kernels", "the predicted steps, kernel by kernel", _kernels),
        *((f"timing {group.name}", f"{', '.join(group.providers)}", _timing(group)) for group in chosen.timings),
        ("sanitizers", "memcheck, racecheck, synccheck, initcheck over the self-tests, our kernels alone",
         _sanitizers(chosen)),
    ]  # fmt: skip
    return [
        Stage(name, chosen.shares[name], what, jobs, 1 if name.startswith(("kernels", "timing")) else None)
        for name, what, jobs in made
        if name in chosen.shares
    ]


def _build(setting: Setting) -> list[Job]:
    """In place by setup.py, run from elsewhere: an old setuptools cannot read our pyproject.toml."""
    cuda = setting.device == "cuda"
    folder = parity.ROOT / "build" / f"gpu-{setting.arch}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(parity.ROOT / "setup.py"), "build_ext", "--build-lib", str(parity.ROOT)]
    command += ["--build-temp", str(folder)]
    environment = {"WAVEMIX_KERNELS_CUDA": str(int(cuda)), "WAVEMIX_KERNELS_CUDA_ARCHS": setting.arch}
    needs = ("nvcc",) if cuda else ()
    build = Job("core", command, backend=setting.backends[0], needs=needs, environment=environment, folder=folder)
    tests = parity.collecting(setting.out / "parity", setting.device)
    return [build, tests, *_self_tests_of("triton", setting)]


def _self_tests(setting: Setting) -> list[Job]:
    return [job for backend in setting.backends if backend != "triton" for job in _self_tests_of(backend, setting)]


def _self_tests_of(backend: str, setting: Setting) -> list[Job]:
    from benchmarks.gpu import exercise

    return [exercise.job(backend, name) for name in exercise.ops_of(backend)] if backend in setting.backends else []


def _parity(chosen: Budget) -> Callable[[Setting], list[Job]]:
    def jobs(setting: Setting) -> list[Job]:
        from benchmarks.gpu import kernels, warm

        folder = setting.out / "parity"
        tests = select(parity.listed(folder), chosen)
        found = list(parity.batches(tests, folder, setting.device))
        compiled: list[Job] = []
        if setting.device == "cuda":
            steps = kernels.names() if "kernels" in chosen.shares else []
            cases = [name for group in chosen.timings for name in group.cases(setting.device)]
            compiled = [*map(kernels.warm, steps), *map(warm.job, dict.fromkeys(cases))]
        first = sum(job.backend == "cuda" for job in found)
        return [*found[:first], *compiled, *found[first:]]

    return jobs


def select(tests: Iterable[parity.Test], chosen: Budget) -> list[parity.Test]:
    """A budget's tests: backend by backend, the slow ones last."""
    kept = [test for test in tests if test.backend in chosen.backends and (chosen.slow or not test.slow)]
    return sorted(kept, key=lambda test: (chosen.backends.index(test.backend), test.slow))


def _kernels(setting: Setting) -> list[Job]:
    from benchmarks.gpu import kernels

    return [kernels.job(setting.out)]


def _timing(group: Group) -> Callable[[Setting], list[Job]]:
    def jobs(setting: Setting) -> list[Job]:
        return timing.jobs(group, setting.out / "timing", setting.device)

    return jobs


def _sanitizers(chosen: Budget) -> Callable[[Setting], list[Job]]:
    def jobs(setting: Setting) -> list[Job]:
        from benchmarks.gpu import exercise, sanitizer

        found: list[list[Job]] = []
        for backend in setting.backends:
            names = exercise.ops_of(backend)
            found.append(list(sanitizer.jobs(backend, [[name] for name in names] if chosen.one_by_one else [names])))
        order = list(sanitizer.KINDS)
        return sorted((job for jobs in found for job in jobs), key=lambda job: order.index(job.about[0]))

    return jobs


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))
