"""Processes side by side, each stopped at its time, so that whatever one does cannot end the others."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: Seconds between the interrupt, on which a process writes what it has, and the kill.
GRACE_S = 10.0
#: Share of a job's time that ``{seconds}`` in its command stands for: the rest is for what was begun by then.
OWN_SHARE = 0.85
_PAUSE_S = 0.02


@dataclass(frozen=True)
class Verdict:
    """The outcome of a job for an op on a backend.

    Attributes:
        verdict: "PASS"; "FAIL": a wrong result, an exception or a crash; "TIME": stopped before it ended, which says
            nothing against it; "SKIP": never begun.
        op, backend: what was proved, empty for a job about something else.
        error, bound: largest relative error and what rounding explains, where the job knows them.
        log: name of the file in OUT_DIR with the job's output.
    """

    verdict: str
    op: str = ""
    backend: str = ""
    note: str = ""
    error: float | None = None
    bound: float | None = None
    seconds: float = 0.0
    log: str = ""


@dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
        name: unique in a run; names its log.
        command: with ``{seconds}`` where it is to be told how long it may begin something new.
        needs: what has to be there, in words of `requirements`, or ``"core"``, the build.
        seconds: its own limit inside its stage's.
        read: verdicts of the job that has ended, and jobs that go on where it could not.
        about: whatever `read` wants to know.
        folder: where it runs.
    """

    name: str
    command: Sequence[str]
    op: str = ""
    backend: str = ""
    needs: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float = float("inf")
    read: Callable[[Job, End], tuple[list[Verdict], list[Job]]] = lambda job, end: ([by_status(job, end)], [])
    about: Any = None
    folder: Path = ROOT


@dataclass(frozen=True)
class End:
    """How a job ended.

    Attributes:
        status: exit status, negative for a signal.
        stopped: why it was stopped, in words; empty where it ended by itself.
        over: the stage is at its end, too: nothing may go on.
    """

    status: int
    seconds: float
    stopped: str
    over: bool
    log: Path

    @property
    def said(self) -> str:
        """Everything it printed."""
        return self.log.read_text(errors="replace")

    @property
    def last_line(self) -> str:
        lines = [line.strip() for line in self.said.splitlines() if line.strip()]
        return lines[-1][:300] if lines else "no output"

    @property
    def crash(self) -> str:
        """Its end in words, for one that was not stopped."""
        if self.status < 0:
            return f"ended by {signal.Signals(-self.status).name}"
        return f"exit status {self.status}: {self.last_line}"


def by_status(job: Job, end: End) -> Verdict:
    """PASS for status 0, TIME where it was stopped."""
    if end.stopped:
        return verdict(job, end, "TIME", end.stopped)
    return verdict(job, end, "PASS", end.last_line) if end.status == 0 else verdict(job, end, "FAIL", end.crash)


def verdict(job: Job, end: End, word: str, note: str, **more: Any) -> Verdict:
    facts = {"op": job.op, "backend": job.backend, "seconds": round(end.seconds, 1), "log": end.log.name}
    return Verdict(word, note=note, **(facts | more))


def search_path() -> str:
    """PATH with the interpreter's folder first: cmake and ninja lie there, even where its environment is not active."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _modules() -> str:
    """PYTHONPATH with this checkout first."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


class _Process:
    def __init__(self, job: Job, folder: Path, deadline: float) -> None:
        self.job, self.begin = job, time.monotonic()
        self.limit = min(self.begin + job.seconds, deadline)
        self.stopped, self._killed_at = "", float("inf")
        self.log = folder / (re.sub(r"[^\w.-]+", "-", job.name) + ".log")
        seconds = f"{max(1.0, OWN_SHARE * (self.limit - self.begin)):.0f}"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [part.replace("{seconds}", seconds) for part in job.command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                # A wrong kernel is to show, not to give way to the next backend.
                env={**os.environ, "WAVEMIX_KERNELS_VERIFY": "0", "PATH": search_path(), "PYTHONPATH": _modules(),
                     **job.environment},
                cwd=job.folder, start_new_session=True,
            )  # fmt: skip

    def ended(self) -> bool:
        now = time.monotonic()
        if self._process.poll() is not None:
            return True
        if now > self._killed_at:
            self.kill()
        elif now > self.limit and not self.stopped:
            self.stop(f"stopped after {now - self.begin:.0f} s")
        return False

    def stop(self, why: str) -> None:
        self.stopped, self._killed_at = why, time.monotonic() + GRACE_S
        self._signal(signal.SIGINT)

    def kill(self) -> None:
        """With all that it started: compilers' workers would live on."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):  # gone already
            return

    def end(self, over: bool) -> End:
        self.kill()
        seconds = time.monotonic() - self.begin
        return End(self._process.wait(), seconds, self.stopped, over, self.log)


def side_by_side(
    jobs: Sequence[Job], width: int, deadline: float, folder: Path, ended: Callable[[Job, End], list[Job]]
) -> list[Job]:
    """Run `jobs` in their order, at most `width` at a time.

    Args:
        deadline: on ``time.monotonic``; what runs then is stopped.
        folder: gets a log for each.
        ended: told of each end; the jobs it returns come next.

    Returns:
        Those that were never begun.

    Raises:
        KeyboardInterrupt: after all were stopped and `ended` was told.
    """
    waiting, running = deque(jobs), list[_Process]()

    def gather(over: bool) -> None:
        for process in [process for process in running if process.ended()]:
            running.remove(process)
            waiting.extendleft(reversed(ended(process.job, process.end(over))))

    try:
        while running or (waiting and time.monotonic() < deadline):
            while waiting and len(running) < width and time.monotonic() < deadline:
                running.append(_Process(waiting.popleft(), folder, deadline))
            gather(over=time.monotonic() >= deadline)
            time.sleep(_PAUSE_S)
    except KeyboardInterrupt:
        for process in running:
            process.stop("interrupted")
        while running:
            gather(over=True)
            time.sleep(_PAUSE_S)
        raise
    finally:
        for process in running:  # a second interrupt
            process.kill()
    return list(waiting)
