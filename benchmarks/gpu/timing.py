"""The benchmarks as jobs: a process for each group of cases, another for the rest where one is lost."""

from __future__ import annotations

import fnmatch
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.jobs import End, Job, Verdict, verdict


@dataclass(frozen=True)
class Group:
    """Cases by the globs of their names, in the order of the globs, and who takes part."""

    name: str
    globs: Sequence[str]
    providers: Sequence[str]

    def cases(self, device: str) -> list[str]:
        """Names of its cases on a device."""
        from benchmarks.cases import registry

        here = [case.name for case in registry() if device in case.devices]
        return list(dict.fromkeys(n for glob in self.globs for n in here if fnmatch.fnmatchcase(n, glob)))


@dataclass(frozen=True)
class _About:
    cases: list[str]
    providers: Sequence[str]
    folder: Path
    device: str
    again: int = 0


def jobs(group: Group, folder: Path, device: str) -> list[Job]:
    """One for the group, or none where it has no case on this device."""
    cases = group.cases(device)
    return [_job(group.name, _About(cases, group.providers, folder, device))] if cases else []


def _job(group: str, about: _About) -> Job:
    command = [sys.executable, "-m", "benchmarks", "--device", about.device, "--out", str(_out(group, about))]
    command += ["--limit", "{seconds}", "--cases", ",".join(about.cases), "--providers", ",".join(about.providers)]
    name = f"timing-{group}" + (f"+{about.again}" if about.again else "")
    return Job(name, command, group, read=read, about=about)


def _out(group: str, about: _About) -> Path:
    return about.folder / (group + (f"+{about.again}" if about.again else ""))


def read(job: Job, end: End) -> tuple[list[Verdict], list[Job]]:
    """The verdicts of a run. A case that lost the process is a failure, and another process takes the next ones."""
    from benchmarks.harness.providers import OURS

    about: _About = job.about
    path = _out(job.op, about) / "results.json"
    text = path.read_text() if path.exists() else ""
    content = json.loads(text) if text else {"rows": [], "lost": None}
    rows = content["rows"]
    measured = {row["case"] for row in rows if row["status"] == "ok"}
    seen = {row["case"] for row in rows}
    left = [case for case in about.cases if case not in seen]
    late = sorted({row["case"] for row in rows if row["status"] == "skipped"} - measured)
    bad = [f"{row['provider']} in {row['case']} {row['status']}: {row['reason']}"
           for row in rows if row["provider"] in OURS and row["status"] in ("wrong", "failed")]  # fmt: skip
    follow = []
    if not end.stopped and (left or end.status not in (0, 1)):  # a run that comes to its end has a row for every case
        if content["lost"] is None:
            bad.append(f"{left.pop(0) if left else 'at the end'}: {end.crash}")
        if left and seen and not end.over:
            again = _About(left, about.providers, about.folder, about.device, about.again + 1)
            follow, left = [_job(job.op, again)], []
    late += left
    word = "FAIL" if bad else "TIME" if late else "PASS"
    note = f"{len(measured)} of {len(about.cases)} cases measured"
    if late:
        note += f", no time for {', '.join(late)}"
    return [verdict(job, end, word, "; ".join([note, *bad[:5]]))], follow
