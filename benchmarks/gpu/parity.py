"""The test-suite on a GPU: which tests concern it, run in processes of their own, one record per test as it ends.

A pytest plugin (``-p benchmarks.gpu.parity``), and what starts it and reads its records. A process takes some tests of
one op and backend. After a crash, an error that stays in the device, or a test that hangs, another takes up the rest.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.jobs import End, Job, Verdict, verdict

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("tests/ops", "tests/kernels", "tests/models")
#: Seconds after which a test counts as hanging; Triton's compilations take some.
LIMIT_S = 120.0
#: Tests a process takes: starting one takes seconds. Triton compiles for most of its tests.
MOST = {"triton": 25}
MOST_ELSE = 150
#: Exit status of a process whose device is lost.
LOST = 86


@dataclass(frozen=True)
class Test:
    """A test that runs on the device.

    Attributes:
        op: the contract's name, or the file's.
        backend: "auto" where the test does not say.
        slow: marked `prove`.
    """

    id: str
    file: str
    op: str
    backend: str
    slow: bool


# --- Plugin --------------------------------------------------------------------------------------------------


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--parity-list", help="write the tests that concern the device here")
    parser.addoption("--parity-only", help="run the tests named in this file")
    parser.addoption("--parity-records", help="append a line per test here")
    parser.addoption("--parity-limit", type=float, default=LIMIT_S, help="seconds after which a test hangs")


def pytest_configure(config: Any) -> None:
    if path := config.getoption("--parity-records"):
        config.pluginmanager.register(_Recorder(Path(path), config.getoption("--parity-limit")))


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    if path := config.getoption("--parity-list"):
        found = [test for item in items if (test := _concerning(item)) is not None]
        Path(path).write_text("".join(json.dumps(vars(test)) + "\n" for test in found))
    if path := config.getoption("--parity-only"):
        wanted = json.loads(Path(path).read_text())
        items[:] = [item for item in items if item.nodeid in set(wanted)]
        items.sort(key=lambda item: wanted.index(item.nodeid))


def _concerning(item: Any) -> Test | None:
    """A test with tensors on the device, but for the CPU's kernels and the emulator's own tests."""
    if "device" not in item.fixturenames or "emulated_core" in item.fixturenames:
        return None
    given = item.callspec.params if hasattr(item, "callspec") else {}
    family = item.path.stem.removeprefix("test_")
    backend = given.get("backend") or ("cuda" if "core" in item.fixturenames else None)
    if backend is None:
        backend = "triton" if item.path.parent.name == "triton" else "auto"
    if backend == "cpu":
        return None
    op = getattr(given.get("contract"), "name", family)
    return Test(item.nodeid, item.nodeid.split("::")[0], op, backend, item.get_closest_marker("prove") is not None)


class _Recorder:
    """Writes a line when a test begins and one when it ends. At a test that hangs the process ends, and where it hung
    is in a file beside the lines."""

    def __init__(self, path: Path, limit: float) -> None:
        self._file, self._hung, self._limit = path.open("a", buffering=1), _hung(path).open("w"), limit
        self._worst = ("passed", "")
        self._begin = 0.0

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._worst, self._begin = ("passed", ""), time.monotonic()
        faulthandler.dump_traceback_later(self._limit, exit=True, file=self._hung)
        self._write(test=nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._worst = ("failed", _last_words(report))
        elif report.skipped and self._worst[0] == "passed":
            self._worst = ("skipped", str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else ""))
        if report.when == "teardown":
            faulthandler.cancel_dump_traceback_later()
            outcome, words = self._worst
            seconds = round(time.monotonic() - self._begin, 3)
            self._write(test=report.nodeid, outcome=outcome, seconds=seconds, message=words[:1000])
            if outcome == "failed" and _device_is_lost():
                os._exit(LOST)  # an orderly end would hang or abort in destructors

    def _write(self, **facts: Any) -> None:
        self._file.write(json.dumps(facts) + "\n")


def _hung(records: Path) -> Path:
    return records.with_suffix(".hung")


def _last_words(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join((crash.message if crash is not None else str(report.longrepr)).split())


def _device_is_lost() -> bool:
    import torch

    from wavemix_kernels.ops.verify import device_is_lost

    return torch.cuda.is_initialized() and device_is_lost(torch.device("cuda"))


# --- Jobs ----------------------------------------------------------------------------------------------------


def collecting(folder: Path, device: str) -> Job:
    """The job that lists the tests."""
    more = ("--collect-only", "--parity-list", str(folder / "tests.jsonl"))
    return Job("collect-tests", _pytest(device, *more, *FOLDERS), needs=("tests",))


def _pytest(device: str, *more: str) -> list[str]:
    """Without the cache of last failures, which several processes would write at once."""
    plugin = ("-p", "no:cacheprovider", "-p", "benchmarks.gpu.parity")
    return [sys.executable, "-m", "pytest", "-q", "--rootdir", str(ROOT), *plugin, "--device", device, *more]


def listed(folder: Path) -> list[Test]:
    """The tests that :func:`collecting` found."""
    path = folder / "tests.jsonl"
    return [Test(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def batches(tests: Sequence[Test], folder: Path, device: str) -> Iterator[Job]:
    """Jobs of the tests of a file, op and backend, in the order in which `tests` first names them."""
    groups: dict[tuple[str, str, str], list[Test]] = defaultdict(list)
    for test in tests:
        groups[test.file, test.op, test.backend].append(test)
    for (file, op, backend), group in groups.items():
        most = MOST.get(backend, MOST_ELSE)
        for number, first in enumerate(range(0, len(group), most)):
            name = f"parity-{backend}-{Path(file).stem.removeprefix('test_')}-{op}-{number}"
            yield _batch(name, file, op, backend, [test.id for test in group[first : first + most]], folder, device)


def _batch(name: str, file: str, op: str, backend: str, ids: list[str], folder: Path, device: str) -> Job:
    only, records = folder / f"{name}.only.json", folder / f"{name}.jsonl"
    only.write_text(json.dumps(ids))
    records.unlink(missing_ok=True)
    options = ("--parity-only", str(only), "--parity-records", str(records), "--parity-limit", str(LIMIT_S))
    command = _pytest(device, *options, file)
    needs = ("tests", {"cuda": "core", "triton": "triton"}.get(backend, "all"))
    about = _About(file, ids, folder, device)
    return Job(name, command, op, backend, needs, {"OMP_NUM_THREADS": "1"}, read=read, about=about)


@dataclass(frozen=True)
class _About:
    file: str
    ids: list[str]
    folder: Path
    device: str
    again: int = 0


def read(job: Job, end: End) -> tuple[list[Verdict], list[Job]]:
    """The verdict on a job's tests, and the job that takes up those it did not reach."""
    about: _About = job.about
    path = about.folder / f"{job.name}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {line["test"]: line for line in lines if "outcome" in line}
    begun = [line["test"] for line in lines if line["test"] not in done]
    left = [one for one in about.ids if one not in done and one not in begun]
    failed = [f"{_short(test)}: {line['message']}" for test, line in done.items() if line["outcome"] == "failed"]
    timed: list[str] = []
    if _hung(path).exists() and _hung(path).stat().st_size:
        timed = [f"{_short(test)} hung, see parity/{_hung(path).name}" for test in begun]
    elif end.stopped:
        timed = [f"{_short(test)} was running" for test in begun]
    else:
        failed += [f"{_short(test)}: {end.crash}" for test in begun]
        if left and not begun and not done:  # nothing would begin in another process either
            return [verdict(job, end, "FAIL", end.crash)], []
    follow = []
    if left and not end.over and (begun or done):
        number = about.again + 1
        name = f"{job.name.split('+')[0]}+{number}"
        again = _batch(name, about.file, job.op, job.backend, left, about.folder, about.device)
        follow, left = [replace(again, about=replace(again.about, again=number))], []
    if left:
        timed.append(f"{len(left)} not reached")
    counts = Counter(line["outcome"] for line in done.values())
    note = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())) or "none ended"
    word = "FAIL" if failed else "TIME" if timed else "PASS" if counts["passed"] else "SKIP"
    if word == "SKIP":
        failed = [next((f"{line['message']}" for line in done.values()), "no test")]
    return [verdict(job, end, word, "; ".join([note, *failed[:3], *timed]))], follow


def _short(test: str) -> str:
    return test.rpartition("::")[2]
