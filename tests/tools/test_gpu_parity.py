"""Parity on GPU machines: the selection leaves out nothing that we have; processes that are lost or hang."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.gpu import exercise, jobs, parity, plan
from tests.tools.helpers import ROOT
from wavemix_kernels import ops

#: Contracts whose name does not begin with the op's.
CONTRACTS = {"idwt2d": "dwt"}


def folder_of_tests(tmp_path: Path, body: str) -> Path:
    """Tests with the option and the fixture that the selection asks for."""
    (tmp_path / "conftest.py").write_text(
        "import pytest\n"
        "def pytest_addoption(parser): parser.addoption('--device')\n"
        "@pytest.fixture\n"
        "def device(request): return request.config.getoption('--device')\n"
    )
    path = tmp_path / "test_some.py"
    path.write_text(body)
    return path


def through(given: list[parity.Test], folder: Path, seconds: float = 60.0) -> list[jobs.Verdict]:
    """Verdicts of all jobs, those included that go on for others."""
    made: list[jobs.Verdict] = []

    def ended(job: jobs.Job, end: jobs.End) -> list[jobs.Job]:
        verdicts, follow = job.read(job, end)
        made.extend(verdicts)
        return follow

    given_jobs = list(parity.batches(given, folder, "cpu"))
    assert not jobs.side_by_side(given_jobs, 2, time.monotonic() + seconds, folder, ended)
    return made


def found_in(path: Path) -> list[parity.Test]:
    """The selection from one file."""
    listing = path.parent / "tests.jsonl"
    command = parity._pytest("cuda", "--collect-only", "--parity-list", str(listing), "-o", "markers=prove", str(path))
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [dataclasses.replace(test, file=str(path)) for test in parity.listed(path.parent)]


# --- Lost processes ------------------------------------------------------------------------------------------

LOSSES = """
import os, time
import benchmarks.gpu.parity as parity

def test_first(device): pass
def test_wrong(device): assert 1 == 2, "off by one"
def test_sticky(device, monkeypatch):
    parity._device_is_lost = lambda: True
    raise RuntimeError("an illegal memory access was encountered")
def test_after_it(device): pass
def test_crash(device): os.abort()
def test_after_the_crash(device): pass
def test_skipped(device):
    import pytest
    pytest.skip("no room")
def test_last(device): pass
"""


@pytest.mark.prove
def test_an_error_that_stays_and_a_crash_end_no_other_test(tmp_path: Path) -> None:
    path = folder_of_tests(tmp_path, LOSSES)
    first, second, third = through(found_in(path), tmp_path)
    assert [one.verdict for one in (first, second, third)] == ["FAIL", "FAIL", "PASS"]
    assert first.note.startswith("2 failed, 1 passed; test_wrong: ")
    assert "off by one" in first.note
    assert "test_sticky: RuntimeError: an illegal memory access" in first.note
    assert second.note == "1 passed; test_crash: ended by SIGABRT"
    assert third.note == "2 passed, 1 skipped"
    assert (first.op, first.backend, first.log != second.log) == ("some", "auto", True)


@pytest.mark.prove
def test_a_test_that_hangs_is_time_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "LIMIT_S", 2.0)
    body = "import time\ndef test_a(device): pass\ndef test_hangs(device): time.sleep(99)\ndef test_b(device): pass\n"
    path = folder_of_tests(tmp_path, body)
    first, second = through(found_in(path), tmp_path)
    assert first.verdict == "TIME"
    assert first.note.startswith("1 passed; test_hangs hung, see parity/parity-auto-")
    (trace,) = (path for path in tmp_path.glob("*.hung") if path.stat().st_size)
    assert "in test_hangs" in trace.read_text()
    assert (second.verdict, second.note) == ("PASS", "1 passed")


def test_what_cannot_be_collected_fails(tmp_path: Path) -> None:
    path = folder_of_tests(tmp_path, "import no_such_module\n")
    (only,) = through([parity.Test(f"{path}::test_a", str(path), "some", "cuda", False)], tmp_path)
    assert only.verdict == "FAIL"


@pytest.mark.parametrize("over", [True, False])
def test_tests_not_reached(over: bool, tmp_path: Path) -> None:
    """At the end of the stage they are out of time. Else another process takes them up."""
    (job,) = parity.batches([parity.Test(f"f.py::{n}", "f.py", "some", "cuda", False) for n in "abc"], tmp_path, "cpu")
    record = {"test": job.about.ids[0], "outcome": "passed", "message": ""}
    (tmp_path / f"{job.name}.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "job.log").write_text("")
    ((verdict,), follow) = parity.read(job, jobs.End(-9, 9.0, "stopped after 9 s", over, tmp_path / "job.log"))
    if over:
        assert (verdict.verdict, verdict.note, follow) == ("TIME", "1 passed; 2 not reached", [])
    else:
        assert (verdict.verdict, [one.about.ids for one in follow]) == ("PASS", [job.about.ids[1:]])


def test_batches_are_of_one_op_and_backend(tmp_path: Path) -> None:
    many = [parity.Test(f"f.py::t[{i}]", "f.py", op, backend, False)
            for backend in ("cuda", "triton") for op in ("a", "b") for i in range(100)]  # fmt: skip
    made = list(parity.batches(many, tmp_path, "cpu"))
    assert [(one.backend, one.op, len(one.about.ids)) for one in made] == [
        ("cuda", "a", 100), ("cuda", "b", 100),
        *[("triton", op, n) for op in "ab" for n in (25, 25, 25, 25)],
    ]  # fmt: skip
    assert len({one.name for one in made}) == len(made)
    assert {one.needs for one in made} == {("tests", "core"), ("tests", "triton")}


# --- The selection -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> list[parity.Test]:
    """The tests that a GPU would run, collected as it would."""
    folder = tmp_path_factory.mktemp("parity")
    command = parity.collecting(folder, "cuda").command
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return parity.listed(folder)


@pytest.mark.prove
def test_no_op_and_no_file_is_left_out(listed: list[parity.Test]) -> None:
    """Every op's kernels of either kind, and every file whose tests take the device."""
    by_length = sorted(ops.OPS, key=len, reverse=True)
    named = {test.op: [op for op in by_length if CONTRACTS.get(test.op, test.op).startswith(op)] for test in listed}
    proved = {(op, test.backend) for test in listed for op in named[test.op][:1]}
    for backend in ("cuda", "triton"):
        assert {op for op in exercise.ops_of(backend) if (op, backend) not in proved} == set()
    files = {str(path.relative_to(ROOT)) for folder in parity.FOLDERS for path in (ROOT / folder).rglob("test_*.py")
             if path.parent.name not in ("cpu", "cuda") and _takes_a_device(path)}  # fmt: skip
    assert files <= {test.file for test in listed}
    outside = {path for path in (ROOT / "tests").rglob("test_*.py") if _takes_a_device(path)}
    inside = {path for path in outside if any((ROOT / folder) in path.parents for folder in parity.FOLDERS)}
    assert outside - inside == set()
    assert "emulator" not in " ".join(test.file for test in listed)
    assert not any(test.backend == "cpu" for test in listed)


def _takes_a_device(path: Path) -> bool:
    """Whether a test function has the fixture as a parameter, or is one of tests/ops/each.py's."""
    tree = ast.parse(path.read_text())
    takes = any(isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
                and {"device", "backend"} & {argument.arg for argument in node.args.args}
                and not _parametrised(node) for node in ast.walk(tree))  # fmt: skip
    return takes or any(isinstance(node, ast.Attribute) and ast.unparse(node) == "each.case" for node in ast.walk(tree))


def _parametrised(function: ast.FunctionDef) -> bool:
    """Whether its `device` or `backend` is a plain value."""
    given = " ".join(ast.unparse(decorator) for decorator in function.decorator_list)
    return any(f"'{name}" in given or f", {name}" in given for name in ("device", "backend")) and "on(" not in given


@pytest.mark.prove
def test_each_budget_has_both_backends_and_the_largest_all(listed: list[parity.Test]) -> None:
    for minutes, budget in plan.BUDGETS.items():
        chosen = Counter(test.backend for test in plan.select(listed, budget))
        assert chosen["cuda"] > 500
        assert chosen["triton"] > 500
        assert (sum(chosen.values()) == len(listed)) == (minutes == 25)
    order = [test.backend for test in plan.select(listed, plan.BUDGETS[25])]
    assert order == sorted(order, key=plan.BUDGETS[25].backends.index)


def test_selection_of_single_tests(tmp_path: Path) -> None:
    """The CPU's kernels and the emulator's own tests are none of a GPU's; `prove` is slow."""
    body = """
import pytest
@pytest.fixture
def emulated_core(): pass
@pytest.fixture
def core(): pass
def test_no_device(): pass
def test_emulated(device, emulated_core): pass
def test_core(device, core): pass
@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda", "reference"])
def test_backend(device, backend): pass
@pytest.mark.prove
def test_slow(device): pass
"""
    tests = found_in(folder_of_tests(tmp_path, body))
    assert [(test.id.rpartition("::")[2], test.backend, test.slow) for test in tests] == [
        ("test_core", "cuda", False), ("test_backend[triton]", "triton", False), ("test_backend[cuda]", "cuda", False),
        ("test_backend[reference]", "reference", False), ("test_slow", "auto", True),
    ]  # fmt: skip
