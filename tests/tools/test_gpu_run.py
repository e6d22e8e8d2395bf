"""The run for GPU machines, rehearsed without one: its control flow on stub jobs, and on the real tests."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import exercise, jobs, kernels, parity, plan, requirements, run, sanitizer, timing
from tests.tools.helpers import ROOT
from wavemix_kernels import ops

pytestmark = pytest.mark.prove  # of interest to whoever changes the run, and mostly waiting

GPU = requirements.Gpu("a stub", "90", "2.11")
OPS = {backend: exercise.ops_of(backend) for backend in ("cuda", "triton")}


def job(name: str, code: str = "", **more: Any) -> jobs.Job:
    return jobs.Job(name, [sys.executable, "-c", code], **more)


def stage(name: str, *given: jobs.Job, until: float = 1.0, **more: Any) -> plan.Stage:
    return plan.Stage(name, until, "stub", lambda setting: given, **more)


def present(*absent: str) -> Callable[[], list[requirements.Requirement]]:
    """Everything found but the needs `absent`."""
    return lambda: [requirements.Requirement(need, need, None if need in absent else "1", f"get {need}")
                    for need in requirements.PURPOSES]  # fmt: skip


def go(out: Path, *stages: plan.Stage, minutes: str = "1", absent: Sequence[str] = (), gpu: Any = GPU) -> int:
    return run.main([str(out), minutes], look=present(*absent), find_gpu=lambda: gpu, plan=lambda minutes: [*stages])


def verdicts(out: Path) -> dict[str, dict[str, Any]]:
    """By stage, op and backend."""
    lines = map(json.loads, (out / "verdicts.jsonl").read_text().splitlines())
    return {" ".join(filter(None, (one["stage"], one["backend"], one["op"]))): one for one in lines}


# --- Command line and requirements ---------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("out", "x"), ("out", "0"), ("out", "inf"), ("a", "1", "b")], ids=str)
def test_usage(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(arguments) == run.NOTHING
    assert capsys.readouterr().err.splitlines()[-1].startswith("usage: benchmarks/gpu.sh OUT_DIR")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which the script would do its work")
@pytest.mark.parametrize("pythons", [("python3",), ("python",), ("python", "python3")], ids=str)
def test_script_without_a_gpu(pythons: tuple[str, ...], tmp_path: Path) -> None:
    """By whichever interpreter there is; the list of requirements comes before the refusal."""
    for name in ("bash", "dirname", "env"):
        (tmp_path / name).symlink_to(next(p for p in (Path("/usr/bin", name), Path("/bin", name)) if p.exists()))
    for name in pythons:
        (tmp_path / name).write_text(f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n')
        (tmp_path / name).chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHON"} | {"PATH": str(tmp_path)}
    command = [str(tmp_path / "bash"), str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert "sees no NVIDIA GPU" in done.stderr
    assert "MISSING, for the sanitizers: " in done.stdout
    assert not (tmp_path / "out").exists()


def test_every_requirement_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "_package", lambda *_: None)
    monkeypatch.setattr(requirements, "_program", lambda *_: None)
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda *_: None)
    monkeypatch.setattr(requirements.shutil, "which", lambda *_: None)
    found = requirements.look()
    assert all(one.found is None and one.install for one in found)
    assert {one.need for one in found} == set(requirements.PURPOSES)
    assert requirements.missing(found).keys() == set(requirements.PURPOSES) - {"extras"}
    assert requirements.missing(found)["all"] == "torch >= 2.9 and numpy missing"


def test_versions_too_old_count_as_missing() -> None:
    assert requirements._numbers("2.13.0+cpu") >= requirements._numbers("2.8")
    assert requirements._package("pytest", "999") is None


@pytest.mark.parametrize("absent, gpu, said", [
    (("all",), GPU, "all missing"), ((), "torch 2.11 sees no NVIDIA GPU on this machine", "sees no NVIDIA GPU"),
], ids=["torch", "gpu"])  # fmt: skip
def test_nothing_starts(absent: tuple[str, ...], gpu: Any, said: str, tmp_path: Path, capsys: Any) -> None:
    assert go(tmp_path / "out", stage("one", job("a")), absent=absent, gpu=gpu) == run.NOTHING
    printed = capsys.readouterr()
    assert said in printed.err
    assert ("MISSING, for everything: get all" in printed.out) == bool(absent)
    assert not (tmp_path / "out").exists()


def test_the_folder_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert go(tmp_path / "file" / "below", stage("one", job("a"))) == run.NOTHING
    assert "cannot be written" in capsys.readouterr().err


# --- Stages --------------------------------------------------------------------------------------------------


def test_all_passed_and_packed(tmp_path: Path) -> None:
    for _ in range(2):  # a second run replaces the first, and does not pack its archive
        assert go(tmp_path, stage("one", job("a", "print('well')"), job("b")), stage("two", job("c"))) == run.PASSED
    assert [one["verdict"] for one in verdicts(tmp_path).values()] == ["PASS"] * 2
    assert "all passed: 3 PASS" in (tmp_path / "summary.txt").read_text()
    with tarfile.open(tmp_path / run.ARCHIVE) as archive:
        names = {Path(name).relative_to("gpu-results").as_posix() for name in archive.getnames()}
        assert names == {"a.log", "b.log", "c.log", "parity", "summary.txt", "verdicts.jsonl"}
        assert archive.extractfile("gpu-results/a.log").read() == b"well\n"


def test_a_crash_fails_alone(tmp_path: Path) -> None:
    crash = job("crash", "import os; os.abort()", op="deconv", backend="triton")
    raised = job("raised", "raise ValueError('too wide')", op="haar", backend="cuda")
    assert go(tmp_path, stage("parity", crash, raised, job("fine", op="haar", backend="triton"))) == run.FAILED
    found = verdicts(tmp_path)
    assert {name: one["verdict"] for name, one in found.items()} == {
        "parity triton deconv": "FAIL", "parity cuda haar": "FAIL", "parity triton haar": "PASS"
    }  # fmt: skip
    assert "SIGABRT" in found["parity triton deconv"]["note"]
    assert found["parity cuda haar"]["note"] == "exit status 1: ValueError: too wide"
    assert found["parity cuda haar"]["log"] == "raised.log"
    table = (tmp_path / "summary.txt").read_text().partition("self-tests and parity")[2]
    assert [line.split() for line in table.splitlines()[1:3]] == [["deconv", "FAIL"], ["haar", "FAIL", "PASS"]]


@pytest.mark.parametrize("deaf", [False, True], ids=["interrupted", "killed"])
def test_time_is_no_failure(deaf: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job at its limit, one at its stage's, those never begun; one that ignores the interrupt, with a child."""
    monkeypatch.setattr(jobs, "GRACE_S", 0.5)
    # Its own child outlives it unless it is killed, too: it would hold the log open and write to it.
    over = tmp_path / "over"
    script = f'trap "" INT; until [ -e {over} ]; do sleep 0.1; done; echo late'
    child = f"import subprocess; subprocess.Popen(['sh', '-c', {script!r}])\n"
    ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" if deaf else ""
    sleep = ignore + "print('begun', flush=True); import time; time.sleep(60)"
    first = stage("one", job("limit", child + sleep, seconds=2), job("end", sleep), job("never"), job("nor this"),
                  until=0.06, width=2)  # fmt: skip
    begin = time.monotonic()
    assert go(tmp_path, first, stage("two", job("after"))) == run.INCOMPLETE
    assert time.monotonic() - begin < 20
    lines = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert [(one["stage"], one["verdict"]) for one in lines][-1] == ("two", "PASS")
    assert [one["verdict"] for one in lines if one["log"] in ("limit.log", "end.log")] == ["TIME"] * 2
    assert "incomplete, nothing failed" in (tmp_path / "summary.txt").read_text()
    over.touch()
    time.sleep(0.5)
    assert "late" not in (tmp_path / "limit.log").read_text()


def test_what_never_began_is_skipped(tmp_path: Path) -> None:
    assert go(tmp_path, stage("one", job("a", op="haar"), until=1e-9), stage("two", job("b"))) == run.INCOMPLETE
    assert verdicts(tmp_path)["one haar"]["verdict"] == "SKIP"
    assert "SKIP  one, no time left: a" in (tmp_path / "summary.txt").read_text()


@pytest.mark.parametrize("way", ["key", "term"])
def test_an_interrupt_stops_and_packs(way: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    # A shell starts what runs in the background with SIGINT ignored, and tests inherit that.
    request.addfinalizer(functools.partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    wait = job("wait", "import time; print('begun', flush=True); time.sleep(60)", op="haar", backend="cuda")

    def interrupt() -> None:
        while not (tmp_path / "wait.log").exists() or not (tmp_path / "wait.log").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT if way == "key" else signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    begin = time.monotonic()
    status = go(tmp_path, stage("one", job("bad", "raise SystemExit(1)", op="dwt")), stage("two", wait), stage("three"))
    assert (status, time.monotonic() - begin < 30) == (run.FAILED, True)  # the first had failed
    found = verdicts(tmp_path)
    assert (found["two cuda haar"]["verdict"], found["two cuda haar"]["note"]) == ("TIME", "interrupted")
    assert found["three"]["verdict"] == "SKIP"
    assert (tmp_path / run.ARCHIVE).exists()


@pytest.mark.parametrize("build", ["raise SystemExit(1)", "no nvcc"])
def test_without_a_core_triton_goes_on(build: str, tmp_path: Path) -> None:
    absent = ("nvcc",) if build == "no nvcc" else ()
    core = job("core", build, needs=("nvcc",), backend="cuda")
    proofs = [
        job(name, op="haar", backend=name, needs=(need,)) for name, need in (("cuda", "core"), ("triton", "triton"))
    ]
    status = go(tmp_path, stage("build", core), stage("parity", *proofs), absent=absent)
    found = verdicts(tmp_path)
    assert (status, found["build cuda"]["verdict"]) == ((run.INCOMPLETE, "SKIP") if absent else (run.FAILED, "FAIL"))
    assert (found["parity cuda haar"]["verdict"], found["parity triton haar"]["verdict"]) == ("SKIP", "PASS")
    assert ("nvcc missing" if absent else "the build failed") in found["parity cuda haar"]["note"]


def test_a_stage_that_cannot_be_made_fails_alone(tmp_path: Path) -> None:
    broken = dataclasses.replace(stage("one"), jobs=lambda setting: [][0])
    assert go(tmp_path, broken, stage("two", job("b"))) == run.FAILED
    found = verdicts(tmp_path)
    assert "IndexError" in found["one"]["note"]
    assert found["two"]["verdict"] == "PASS"


def test_jobs_know_their_time_and_this_checkout(tmp_path: Path) -> None:
    tell = jobs.Job("tell", [sys.executable, "-c", "import benchmarks.gpu, os, sys; print(sys.argv[1], os.getcwd())",
                             "{seconds}"], folder=tmp_path)  # fmt: skip
    assert go(tmp_path, stage("one", tell, until=0.5)) == run.PASSED
    seconds, folder = (tmp_path / "tell.log").read_text().split()
    assert 20 < float(seconds) <= 30 * jobs.OWN_SHARE + 1
    assert Path(folder) == tmp_path.resolve()


# --- Budgets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minutes, least", [(1, 3), (3, 3), (7.5, 3), (8, 8), (24, 8), (25, 25), (90, 25)])
def test_budgets(minutes: float, least: int, tmp_path: Path) -> None:
    chosen = plan.budget(minutes)
    assert chosen is plan.BUDGETS[least]
    stages = plan.stages(minutes)
    assert [one.name for one in stages] == list(chosen.shares)
    shares = [one.until for one in stages]
    assert shares == sorted(set(shares))
    assert shares[-1] < 1  # packing
    assert (least == max(plan.BUDGETS)) == (not chosen.left_out)
    assert {f"timing {group.name}" for group in chosen.timings} <= chosen.shares.keys()


@pytest.mark.parametrize("minutes", plan.BUDGETS)
def test_timings_name_cases_and_providers_there_are(minutes: int) -> None:
    from benchmarks.harness.providers import PROVIDERS

    for group in plan.BUDGETS[minutes].timings:
        assert set(group.providers) <= set(PROVIDERS)
        cases = group.cases("cuda")
        assert len(cases) == len(set(cases)) > 0
        for glob in group.globs:
            assert dataclasses.replace(group, globs=[glob]).cases("cuda"), glob
    assert minutes < 8 or [g.name for g in plan.BUDGETS[minutes].timings] == ["haar", "blocks", "models"]


def test_jobs_of_the_real_plan(tmp_path: Path) -> None:
    """Names are unique, programs exist; Triton's self-tests run beside the build, CUDA's parity comes before Triton's
    compilations, and those before Triton's parity."""
    tests = [parity.Test(f"tests/ops/test_haar.py::test[{b}]", "tests/ops/test_haar.py", "haar", b, False)
             for b in ("triton", "auto", "cuda")]  # fmt: skip
    (tmp_path / "parity").mkdir()
    (tmp_path / "parity" / "tests.jsonl").write_text("".join(json.dumps(vars(test)) + "\n" for test in tests))
    setting = plan.Setting(tmp_path, "90")
    made = {one.name: list(one.jobs(setting)) for one in plan.stages(25)}
    every = [job for jobs in made.values() for job in jobs]
    assert len({job.name for job in every}) == len(every)
    core, collect, *triton = made["build"]
    assert core.environment == {"WAVEMIX_KERNELS_CUDA": "1", "WAVEMIX_KERNELS_CUDA_ARCHS": "90"}
    assert (collect.name, [one.op for one in triton]) == ("collect-tests", OPS["triton"])
    assert [one.op for one in made["self-tests"]] == OPS["cuda"]
    kinds = [one.backend + (" compile" if one.name.startswith("compile-") else "") for one in made["parity"]]
    assert kinds == ["cuda", *["triton compile"] * (len(kinds) - 3), "triton", "auto"]
    assert [one.name for one in made["kernels"]] == ["kernels"]
    assert len(made["sanitizers"]) == 4 * sum(map(len, OPS.values()))
    assert [one.about[0] for one in made["sanitizers"]] == sorted(
        (one.about[0] for one in made["sanitizers"]), key=list(sanitizer.KINDS).index
    )


# --- Self-tests and sanitizers -------------------------------------------------------------------------------


def end(tmp_path: Path, said: str, status: int = 0, stopped: str = "") -> jobs.End:
    log = tmp_path / "job.log"
    log.write_text(said)
    return jobs.End(status, 1.0, stopped, False, log)


LINE = '{{"op": "haar", "error": {}, "bound": 1e-6}}\n'


@pytest.mark.parametrize("said, status, stopped, word", [
    (LINE.format(1e-7), 0, "", "PASS"), (LINE.format(1e-5), 1, "", "FAIL"), (LINE.format("NaN"), 1, "", "FAIL"),
    ("", 0, "", "FAIL"), ("Error", 1, "", "FAIL"), ("", -9, "stopped after 90 s", "TIME"),
])  # fmt: skip
def test_reading_a_self_test(said: str, status: int, stopped: str, word: str, tmp_path: Path) -> None:
    ((verdict,), follow) = exercise.read(exercise.job("cuda", "haar"), end(tmp_path, said, status, stopped))
    assert (verdict.verdict, verdict.op, verdict.backend, follow) == (word, "haar", "cuda", [])
    assert (verdict.bound == 1e-6) == said.startswith("{")


def test_a_self_test_for_real(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert exercise.main("cpu", "haar", "batch_norm") == 0
    lines = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert [line["op"] for line in lines] == ["haar"] * 3 + ["batch_norm"] * 3  # in three dtypes
    assert all(0 <= line["error"] <= line["bound"] for line in lines)
    monkeypatch.setattr(ops.load("haar_bands"), "self_test", lambda *_: (1.0, 1e-6))
    assert exercise.main("cpu", "haar_bands", "batch_norm") == 1
    assert len(capsys.readouterr().out.splitlines()) == 1
    monkeypatch.setattr(exercise.wavemix_kernels, "haar_idwt2d", lambda ll, highs, **_: torch.zeros(2, 3, 17, 19))
    with pytest.raises(AssertionError, match="haar on cpu: wrong for shape"):
        exercise.main("cpu", "haar")


SUM = "========= ERROR SUMMARY: 1 error\n"
HEAD = "========= COMPUTE-SANITIZER\n"
INVALID = """\
========= Invalid __global__ write of size 4 bytes
=========     at {}+0x90
=========     by thread (1,0,0) in block (0,0,0)
=========     Access at 0x7f is out of bounds
=========
"""
RACE = "========= Error: Race reported between Write access at {}+0x110 and Read access at {}+0x180\n=========\n"
OUR_CUDA = "void wavemix::haar::(anonymous namespace)::analysis_rows<float, (int)1>(Params)"
THEIRS = "void at::native::reduce_kernel<(int)512, float>(T3)"


@pytest.mark.parametrize("said, status, stopped, word, words", [
    (HEAD + LINE.format(0.0) + SUM, 0, "", "PASS", "memcheck: accesses"),
    (HEAD + INVALID.format(OUR_CUDA) + SUM, 9, "", "FAIL", "1 reports, first: Invalid"),
    (HEAD + INVALID.format("_forward_kernel") + LINE.format(0.0), 9, "", "FAIL", "_forward_kernel+0x90"),
    (HEAD + RACE.format("_map_kernel", "_map_kernel") + LINE.format(0.0), 9, "", "FAIL", "Race reported"),
    (HEAD + INVALID.format(THEIRS) + LINE.format(0.0), 9, "", "PASS", "1 reports about kernels that are not ours"),
    (HEAD + LINE.format(1.0), 1, "", "FAIL", "wrong result of haar"),
    (HEAD, -9, "stopped after 60 s", "TIME", "0 of 1 ops done"),
    (HEAD + INVALID.format(OUR_CUDA), -9, "stopped after 60 s", "FAIL", "1 reports"),
    ("========= Error: unsupported device\n", 255, "", "SKIP", "the tool did not run"),
    (HEAD + "Traceback\nRuntimeError: CUDA error", 1, "", "FAIL", "RuntimeError: CUDA error"),
], ids=range(10))  # fmt: skip
def test_reading_a_sanitizer(said: str, status: int, stopped: str, word: str, words: str, tmp_path: Path) -> None:
    given = next(sanitizer.jobs("cuda", [["haar"]]))
    ((verdict,), _) = sanitizer.read(given, end(tmp_path, said, status, stopped))
    assert verdict.verdict == word, verdict
    assert words in verdict.note


def test_sanitizers_watch_our_kernels_alone() -> None:
    """By name; but initcheck, which must see torch's kernels write."""
    from tests.aot.triton_launches import points

    launched = {point.launch.kernel.fn.__name__ for point in points()}
    assert launched <= set(sanitizer.triton_kernels())
    for source in (ROOT / "csrc" / "cuda").rglob("*.cu"):
        assert f"namespace {sanitizer.NAMESPACE}" in source.read_text()
    assert sanitizer.ours(OUR_CUDA)
    assert not sanitizer.ours(THEIRS)  # though there is a _reduce_kernel
    for backend in ("cuda", "triton"):
        made = {job.name.partition("-")[0]: job.command for job in sanitizer.jobs(backend, [OPS[backend]])}
        assert made.keys() == {"memcheck", "racecheck", "synccheck", "initcheck"}
        names = 1 if backend == "cuda" else len(sanitizer.triton_kernels())
        for kind, command in made.items():
            assert command.count("--kernel-name") == (0 if kind == "initcheck" else names)


# --- Kernels -------------------------------------------------------------------------------------------------


def test_steps_kernel_by_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """On the CPU nothing is launched; a step that raises, and one that there is no time for."""
    haar, block = "haar/J1/nchw/4x64x256x256", "waveblock/L1/nchw/64x192x64x64"
    assert set(kernels.FIRST) <= set(kernels.names())
    given = kernels.job(tmp_path)
    real = kernels.run

    def wrong(step: Any, x: torch.Tensor, **how: Any) -> None:
        if x.ndim == 4 and x.shape[1] == 48:
            raise RuntimeError("CUDA error: misaligned address")
        real(step, x, **how)

    monkeypatch.setattr(kernels, "run", wrong)
    assert kernels.main(str(given.about.out), "60", haar, block) == 1
    said = capsys.readouterr().out
    assert f"failed {block}, training: RuntimeError: CUDA error: misaligned address" in said
    written = json.loads(given.about.out.read_text())
    assert [(row["step"], row["training"]) for row in written["rows"]] == [(haar, True), (haar, False)]
    assert all(row["host_us"] > 0 and row["kernels"] == [] for row in written["rows"])
    ((verdict,), follow) = kernels.read(given, end(tmp_path, said, 1))
    assert (verdict.verdict, follow) == ("FAIL", [])
    assert "2 of 40 steps measured; waveblock/L1" in verdict.note
    assert kernels.main(str(given.about.out), "1e-9", haar) == 0
    ((verdict,), _) = kernels.read(given, end(tmp_path, capsys.readouterr().out))
    assert verdict.verdict == "TIME"
    ((verdict,), follow) = kernels.read(given, end(tmp_path, "Segmentation fault", -11))
    assert (verdict.verdict, "SIGSEGV" in verdict.note, follow) == ("FAIL", True, [])
    first, second, *rest = given.about.wanted
    said = f"begins {first}\nbegins {second}\nfailed {second}, training: RuntimeError: CUDA error"
    (_, (following,)) = kernels.read(given, end(tmp_path, said, 86))
    assert (following.name, following.about.wanted, following.about.out) == ("kernels+1", rest, given.about.out)
    assert kernels.main(str(given.about.out), "60", haar) == 0  # rows of the process before stay
    assert len(json.loads(given.about.out.read_text())["rows"]) == 4


def test_a_trace_becomes_a_step() -> None:
    """Two steps of three launches of two kernels, behind a kernel that empties the cache."""

    def event(ts: float, name: str, dur: float, grid: int = 1, cat: str = "kernel") -> dict[str, Any]:
        return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"grid": [grid, 1, 1]}}

    one = ((0, f"at::{kernels.FLUSH}", 90.0), (5, "b", 3.0, 2), (2, "a", 7.0), (9, "b", 5.0, 2))
    events = [event(100 * i + ts, name, us + i * (name == "b"), *grid) for i in range(2) for ts, name, us, *grid in one]
    a, b = kernels.summed([event(1, "cudaLaunchKernel", 1.0, cat="cuda_runtime"), {"ph": "M"}, *events], 2)
    assert (a["name"], a["launches"], a["us"], a["grid"]) == ("a", 1, 7.0, [1, 1, 1])
    assert (b["name"], b["launches"], b["us"]) == ("b", 2, 2 * 4.5)


# --- Timings -------------------------------------------------------------------------------------------------


def test_reading_timings(tmp_path: Path) -> None:
    """A case at which the process is lost, one that a provider gets wrong, and those that come after."""
    group = timing.Group("haar", ["haar/J1/fp32/*/4x64x256x256/*"], ["reference", "ours"])
    (given,) = timing.jobs(group, tmp_path, "cuda")
    first, second, third, last = group.cases("cuda")

    def ended(rows: list[tuple[str, str, str]], lost: str | None = None, **how: Any) -> Any:
        made = [{"case": case, "provider": name, "status": status, "reason": "why"} for case, name, status in rows]
        (tmp_path / "haar").mkdir(exist_ok=True)
        (tmp_path / "haar" / "results.json").write_text(json.dumps({"rows": made, "lost": lost}))
        ((verdict,), follow) = timing.read(given, end(tmp_path, "Segmentation fault", **how))
        return verdict.verdict, verdict.note, [job.about.cases for job in follow]

    every = [(case, "ours", "ok") for case in (first, second, third, last)]
    assert ended(every) == ("PASS", "4 of 4 cases measured", [])
    word, note, follow = ended(every[:1], status=-11)
    assert (word, follow) == ("FAIL", [[third, last]])
    assert f"{second}: ended by SIGSEGV" in note
    word, note, follow = ended([*every[:1], (second, "ours", "failed")], lost=second, status=86)
    assert (word, follow) == ("FAIL", [[third, last]])
    assert f"ours in {second} failed: why" in note
    word, note, follow = ended([*every[:3], (last, "ours", "skipped")])
    assert (word, note, follow) == ("TIME", f"3 of 4 cases measured, no time for {last}", [])
    word, note, follow = ended(every[:2], status=130, stopped="stopped after 60 s")
    assert (word, follow) == ("TIME", [])
    assert ended([(case, "compile", "failed") for case, *_ in every])[0] == "PASS"  # a rival's
