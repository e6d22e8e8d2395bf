"""The run: looks for what it needs, prints its plan, goes through the stages, writes verdicts as they come, packs."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from benchmarks.gpu import requirements
from benchmarks.gpu.jobs import End, Job, Verdict, side_by_side
from benchmarks.gpu.plan import Setting, Stage, budget, cores, stages

USAGE = "benchmarks/gpu.sh OUT_DIR [MINUTES=8] [--rehearse]"
ARCHIVE = "gpu-results.tar.gz"
#: Exit statuses.
PASSED, FAILED, NOTHING, INCOMPLETE = 0, 1, 2, 3
#: The worst verdict of an op and backend counts.
ORDER = ("PASS", "SKIP", "TIME", "FAIL")


def main(
    argv: Sequence[str] | None = None,
    *,
    look: Callable[[], list[requirements.Requirement]] = requirements.look,
    find_gpu: Callable[[], requirements.Gpu | str] = requirements.find_gpu,
    plan: Callable[[float], list[Stage]] = stages,
) -> int:
    """Go through the stages of a budget.

    Args:
        look, find_gpu, plan: the tests put their own here.

    Returns:
        0: all passed. 1: something failed. 2: nothing could start. 3: nothing failed, but something was stopped at its
        time, or left out for want of time or of a tool.
    """
    arguments = _arguments(sys.argv[1:] if argv is None else argv)
    if isinstance(arguments, int):
        return arguments
    found = look()
    print("needs")
    requirements.listing(found, print)
    lacks = requirements.missing(found)
    gpu: requirements.Gpu | str = lacks.get("all", "")
    if not gpu:
        gpu = requirements.Gpu("none: a rehearsal on the CPU", "rehearsal", "") if arguments.rehearse else find_gpu()
    if isinstance(gpu, str):
        print(f"gpu.sh: nothing can start: {gpu} (python: {sys.executable}; PYTHON names another)", file=sys.stderr)
        return NOTHING
    try:
        (arguments.out / "parity").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"gpu.sh: OUT_DIR {arguments.out}: cannot be written ({error.strerror})", file=sys.stderr)
        return NOTHING
    setting = Setting(arguments.out.resolve(), gpu.arch)
    if arguments.rehearse:
        setting = dataclasses.replace(
            setting, device="cpu", backends=("cpu", "triton"), environment={"TRITON_INTERPRET": "1"}
        )
        lacks |= dict.fromkeys(("core", "compute-sanitizer"), "a rehearsal is without a GPU")
    return Run(setting, arguments.minutes, lacks, gpu).through(plan(arguments.minutes))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(NOTHING, f"usage: {USAGE}; {message}\n")


def _arguments(argv: Sequence[str]) -> argparse.Namespace | int:
    """The arguments, or the exit status of a call without a run."""
    parser = _Parser(prog="gpu.sh", usage=USAGE)
    parser.add_argument("out", type=Path)
    parser.add_argument("minutes", type=float, nargs="?", default=8.0)
    parser.add_argument("--rehearse", action="store_true")
    try:
        arguments = parser.parse_args(argv)
        if not 0 < arguments.minutes < float("inf"):
            parser.error(f"MINUTES {arguments.minutes:g}: expected a positive number")
    except SystemExit as ended:
        return int(ended.code or 0)
    return arguments


class Run:
    """One run.

    Attributes:
        lacks: need -> why it is not there; grows when the build fails.
        verdicts: of all jobs so far, by stage.
    """

    def __init__(self, setting: Setting, minutes: float, lacks: dict[str, str], gpu: requirements.Gpu) -> None:
        self.setting, self.minutes, self.lacks, self.gpu = setting, minutes, dict(lacks), gpu
        self.begin = time.monotonic()
        self.verdicts: list[tuple[str, Verdict]] = []
        self._summary = (setting.out / "summary.txt").open("w")
        self._file = (setting.out / "verdicts.jsonl").open("w")
        if "nvcc" in lacks:
            self.lacks.setdefault("core", lacks["nvcc"])

    def through(self, plan: Sequence[Stage]) -> int:
        """All stages, whatever happens, then the archive."""
        self._announce(plan)
        left = list(plan)
        try:
            with _interrupts():
                while left:
                    self._stage(left[0])
                    left.pop(0)
        except KeyboardInterrupt:
            self.say("interrupted")
            for stage in left[1:]:
                self._note(stage.name, Verdict("SKIP", note="interrupted before it"))
        status = self._close()
        self._pack()
        return status

    def say(self, line: str) -> None:
        print(line, flush=True)
        self._summary.write(line + "\n")
        self._summary.flush()

    def _announce(self, plan: Sequence[Stage]) -> None:
        gpu = self.gpu
        self.say(f"GPU {gpu.name}, sm_{gpu.arch}, torch {gpu.torch}; {cores()} cores; {self.minutes:g} minutes")
        begin = 0.0
        for stage in plan:
            self.say(
                f"  {begin * self.minutes:5.1f} to {stage.until * self.minutes:5.1f} min  {stage.name}: {stage.what}"
            )
            begin = stage.until
        for what in budget(self.minutes).left_out:
            self.say(f"  left out   {what}")
        for need, why in self.lacks.items():
            if need in requirements.PURPOSES:
                self.say(f"  left out   {requirements.PURPOSES[need]}: {why}")

    def _stage(self, stage: Stage) -> None:
        deadline = self.begin + 60 * self.minutes * stage.until
        try:
            jobs = list(stage.jobs(self.setting))
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one stage, the others go on
            self._note(stage.name, Verdict("FAIL", note=f"{type(error).__name__}: {error}"))
            return
        able, unable = [], dict[str, list[Job]]()
        for job in jobs:
            why = next((self.lacks[need] for need in job.needs if need in self.lacks), None)
            if why is None:
                able.append(dataclasses.replace(job, environment={**self.setting.environment, **job.environment}))
            else:
                unable.setdefault(why, []).append(job)
        for why, those in unable.items():
            self._skip(stage, those, why)

        def ended(job: Job, end: End) -> list[Job]:
            verdicts, follow = job.read(job, end)
            for verdict in verdicts:
                self._note(stage.name, verdict)
            if job.name == "core" and end.status != 0:
                self.lacks.setdefault("core", "the build was stopped" if end.stopped else "the build failed")
            return follow

        self._skip(stage, side_by_side(able, stage.width or cores(), deadline, self.setting.out, ended), "no time left")

    def _skip(self, stage: Stage, jobs: Sequence[Job], why: str) -> None:
        for job in jobs:
            self._keep(stage.name, Verdict("SKIP", job.op, job.backend, f"{job.name}: {why}"))
        if jobs:
            self.say(f"SKIP  {stage.name}, {why}: {', '.join(job.name for job in jobs)}")

    def _keep(self, stage: str, verdict: Verdict) -> None:
        self.verdicts.append((stage, verdict))
        self._file.write(json.dumps({"stage": stage} | dataclasses.asdict(verdict)) + "\n")
        self._file.flush()

    def _note(self, stage: str, verdict: Verdict) -> None:
        self._keep(stage, verdict)
        number = "" if verdict.bound is None else f"error {verdict.error:.1e}, bound {verdict.bound:.1e}"
        what = " ".join(filter(None, (stage, verdict.backend, verdict.op or verdict.log.removesuffix(".log"))))
        words = "; ".join(filter(None, (number, verdict.note)))
        self.say(f"{verdict.verdict}  {what} ({verdict.seconds:.0f} s): {words}")

    def _close(self) -> int:
        """The table of ops and backends, and the exit status."""
        worst: dict[tuple[str, str], str] = {}
        for stage, verdict in self.verdicts:
            if stage in ("build", "self-tests", "parity") and verdict.op and not verdict.log.startswith("compile-"):
                before = worst.get((verdict.op, verdict.backend), "PASS")
                worst[verdict.op, verdict.backend] = max(before, verdict.verdict, key=ORDER.index)
        ops = sorted({op for op, _ in worst})
        met = {backend for _, backend in worst}
        backends = [*(name for name in self.setting.backends if name in met), *sorted(met - {*self.setting.backends})]
        if ops:
            self.say(f"\n{'self-tests and parity':<24}" + "".join(f"{backend:<11}" for backend in backends))
            for op in ops:
                self.say(f"{op:<24}" + "".join(f"{worst.get((op, backend), ''):<11}" for backend in backends))
        words = [verdict.verdict for _, verdict in self.verdicts]
        counts = ", ".join(f"{words.count(word)} {word}" for word in ORDER if word in words)
        status = FAILED if "FAIL" in words else PASSED if words and set(words) == {"PASS"} else INCOMPLETE
        meaning = {PASSED: "all passed", FAILED: "something failed", INCOMPLETE: "incomplete, nothing failed"}[status]
        self.say(f"\n{meaning}: {counts or 'nothing ran'}, in {(time.monotonic() - self.begin) / 60:.1f} minutes")
        self._summary.close()
        self._file.close()
        return status

    def _pack(self) -> None:
        """Everything but what was packed before."""
        path = self.setting.out / ARCHIVE
        draft = path.with_suffix(".part")
        with tarfile.open(draft, "w:gz") as archive:
            for one in sorted(self.setting.out.iterdir()):
                if one.name not in (path.name, draft.name):
                    archive.add(one, Path("gpu-results") / one.name)
        draft.replace(path)
        print(f"wrote {path}")


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """An end asked for by a signal is an interrupt, after which results are packed."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
