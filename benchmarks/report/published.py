"""The committed runs under benchmarks/results/, and which of them speaks for a case."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..harness.measure import Row

FOLDER = Path(__file__).resolve().parents[1] / "results"

_KERNELS = {"amx": "AVX-512 and AMX", "avx512": "AVX-512", "avx2": "AVX2", "baseline": "SSE2"}


@dataclasses.dataclass(frozen=True)
class Run:
    """One file.

    Attributes:
        number: its place among all runs, oldest first, from 1.
        cases: case -> provider -> row, of the rows that were timed.
    """

    number: int
    name: str
    environment: dict[str, Any]
    cases: dict[str, dict[str, Row]]

    @property
    def kernels(self) -> str:
        """The instruction set that ours ran by."""
        return _KERNELS.get(self.environment["cpu_kernels"], "none")

    @property
    def machine(self) -> str:
        """Runs of one machine are compared with each other."""
        return self.place if self.environment["device"] == "cuda" else f"{self.environment['cpu']}, {self.place}"

    @property
    def place(self) -> str:
        """The machine in a word: a GPU, or the kernels of a CPU."""
        facts = self.environment
        return facts["gpu"] if facts["device"] == "cuda" else self.kernels + (", memory kept" if self.kept else "")

    @property
    def kept(self) -> bool:
        """Whether the allocator kept large blocks (docs/use/benchmarks.md, fresh memory)."""
        return _kept(self.environment)

    @property
    def commit(self) -> str:
        """Shortened; "-modified" stays."""
        return re.sub(r"^([0-9a-f]{10})[0-9a-f]*", r"\1", self.environment["commit"])


@dataclasses.dataclass(frozen=True)
class Result:
    """A case on one machine.

    Attributes:
        run: the latest that timed upstream beside ours, or the reference, where none did.
        compiled: the latest that timed torch.compile beside ours, if any did.
        earlier: runs of the case that a later one replaces.
    """

    case: str
    run: Run
    compiled: Run | None
    earlier: tuple[Run, ...]

    @property
    def group(self) -> str:
        return self.case.partition("/")[0]

    @property
    def upstream(self) -> Row:
        """Or the reference, where :attr:`upstream_fails`."""
        return self.run.cases[self.case]["reference" if self.upstream_fails else "upstream"]

    @property
    def upstream_fails(self) -> bool:
        return "upstream" not in self.run.cases[self.case]

    @property
    def ours(self) -> Row:
        return self.run.cases[self.case]["ours"]

    @property
    def compile(self) -> Row | None:
        return self.compiled.cases[self.case]["compile"] if self.compiled else None

    @property
    def over_upstream(self) -> float:
        return _ratio(self.upstream, self.ours)

    @property
    def over_compile(self) -> float | None:
        """Both sides from one run, which may be an earlier one than :attr:`run`."""
        if self.compiled is None:
            return None
        rows = self.compiled.cases[self.case]
        return _ratio(rows["compile"], rows["ours"])


def _kept(facts: dict[str, Any]) -> bool:
    return facts.get("settings", {}).get("MALLOC_MMAP_MAX_") == "0"


def _ratio(theirs: Row, ours: Row) -> float:
    assert theirs.median_ms
    assert ours.median_ms
    return theirs.median_ms / ours.median_ms


def runs(folder: Path = FOLDER) -> list[Run]:
    """Every committed run, oldest first."""
    read = [(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]
    read.sort(key=lambda item: item[1]["environment"]["date"])
    return [Run(number, name, data["environment"], _cases(data)) for number, (name, data) in enumerate(read, 1)]


def take(files: Sequence[Path], folder: Path = FOLDER) -> list[Path]:
    """Copies results.json files to `folder`, named after device, kernels and date, and deletes the runs that do not
    speak for any case any more; returns those."""
    for file in files:
        data = json.loads(file.read_text(encoding="utf-8"))
        facts = data["environment"]
        device = re.sub(r"\W+", "-", facts.get("gpu") or facts.get("cpu_kernels") or "").strip("-").lower()
        date = re.sub(r"\D", "", facts["date"])[:12]
        kept = "-kept" if _kept(facts) else ""
        shutil.copyfile(file, folder / f"{facts['device']}-{device}{kept}-{date}.json")
    speaking = set()
    for group in by_machine(runs(folder)).values():
        for result in results(group):
            speaking |= {result.run.name, *([result.compiled.name] if result.compiled else [])}
    silent = [path for path in sorted(folder.glob("*.json")) if path.stem not in speaking]
    for path in silent:
        path.unlink()
    return silent


def _cases(data: dict[str, Any]) -> dict[str, dict[str, Row]]:
    cases: dict[str, dict[str, Row]] = {}
    for fields in data["rows"]:
        if fields["status"] == "ok":
            row = Row(**fields)
            cases.setdefault(row.case, {})[row.provider] = row
    return cases


def results(among: Sequence[Run]) -> list[Result]:
    """One result for each case that `among`, runs of one machine, timed beside another; in natural order of names."""
    found = []
    for case in sorted({case for run in among for case in run.cases}, key=_natural):
        mine = [run for run in among if "ours" in run.cases.get(case, {})]
        beside = [run for run in mine if "upstream" in run.cases[case]]
        beside = beside or [run for run in mine if "reference" in run.cases[case]]
        compiled = [run for run in mine if "compile" in run.cases[case]]
        if beside:
            speaking = {beside[-1].number, compiled[-1].number if compiled else 0}
            earlier = tuple(run for run in mine if run.number not in speaking)
            found.append(Result(case, beside[-1], compiled[-1] if compiled else None, earlier))
    return found


def by_machine(among: Sequence[Run]) -> dict[str, list[Run]]:
    machines: dict[str, list[Run]] = {}
    for run in among:
        machines.setdefault(run.machine, []).append(run)
    return machines


def latest(case: str, among: Sequence[Run]) -> Result:
    """The result of the latest run of a case with the allocator as it is, whichever machine it ran on."""
    groups = by_machine([run for run in among if not run.kept]).values()
    found = [result for group in groups for result in results(group) if result.case == case]
    return max(found, key=lambda result: result.run.number)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]
