"""The benchmark harness from outside: command line, what it writes, how it ends."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import cases, cli
from benchmarks.cases import haar, wavemix
from benchmarks.harness import case, measure, rivals
from tests.tools.helpers import PNG, ROOT, needs
from wavemix_kernels import clock

needs_extras = needs("bench", cli.EXTRAS)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fewest rounds there may be, and no deadline that a busy machine could miss."""
    monkeypatch.setattr(cli, "QUICK", clock.Effort(seconds=0.0, fewest=3, most=3))
    monkeypatch.setattr(cli, "QUICK_LIMIT_S", 1e6)
    monkeypatch.setattr(cli, "copy_bandwidth", lambda device: {"reused": 1.0, "fresh": 1.0})


def tiny(backward: bool = True) -> case.Case:
    return haar.haar_case(1, torch.float32, "nchw", (2, 4, 16, 16), backward, quick=True)


def run(folder: Path, given: list[case.Case], *more: str) -> int:
    return cli.main(["--device", "cpu", "--quick", "--out", str(folder), *more], given)


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


# --- Command line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, given, exists", [
    ("--cases nothing/*", "nothing/*", "haar/J1/fp32/nchw/4x64x256x256/forward"),
    ("--cases=", "''", "haar/J1/fp32/nchw/4x64x256x256/forward"),
    ("--providers ours,warp", "ours,warp", "upstream"),
    ("--providers ,", "','", "upstream"),
    ("--device tpu", "tpu", "cuda"),
    ("--limit 0", "0", "positive"),
    ("--limit soon", "soon", "float"),
    ("--fast", "--fast", "unrecognized"),
])  # fmt: skip
def test_bad_arguments_get_one_line_and_status_2(arguments, given, exists, refused):
    said = refused(cli.main, arguments.split())
    assert given in said
    assert exists in said


def test_what_cannot_be_served_is_refused(tmp_path, refused):
    if not torch.cuda.is_available():
        assert "sees no GPU" in refused(cli.main, ["--device", "cuda"])
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(cli.main, ["--out", str(tmp_path / "file" / "below")])


def test_list_names_every_case_of_the_device_once(capsys):
    assert cli.main(["--list", "--device", "cpu"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.partition("\nproviders")[0].splitlines() if line]
    assert listed == [case.name for case in cases.registry() if "cpu" in case.devices]
    names = [case.name for case in cases.registry()]
    assert len(set(names)) == len(names)


# --- End to end ----------------------------------------------------------------------------------------------


@needs_extras
def test_tiny_run_writes_json_pictures_and_report(tmp_path, brief, capsys):
    given = [tiny(False), tiny(True), wavemix.waveblock_case(1, "nchw", (2, 8, 16, 16), True, quick=True)]
    assert run(tmp_path, given, "--providers", "reference,ours,triton") == 0, capsys.readouterr().out
    found = results(tmp_path)
    assert found["complete"] is True
    facts = found["environment"]
    assert {"date", "python", "packages", "commit", "cpu", "cores", "threads", "device"} <= facts.keys()
    assert facts["packages"]["torch"] == torch.__version__
    assert found["machine"]["copy_gbps"].keys() == {"reused", "fresh"}
    rows = {(row["case"], row["provider"]): row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) == 9
    fields = {field.name for field in dataclasses.fields(measure.Row)}
    for (_, provider), row in rows.items():
        assert row.keys() == fields
        if provider == "triton":
            assert (row["status"], row["median_ms"]) == ("unavailable", None)
            assert "interprets" in row["reason"]
            continue
        assert row["status"] == "ok", row["reason"]
        assert row["baseline"] == "reference"  # upstream was not asked for
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert 0 <= row["error"] <= 1
        assert row["rounds"] >= 3
    image = 4 * 2 * 4 * 16 * 16
    ours, trained = rows[tiny(False).name, "ours"], rows[tiny(True).name, "ours"]
    assert ours["ideal_bytes"] == 2 * image  # x read, the pyramid written
    assert ours["peak_bytes"] == image  # and nothing but the pyramid allocated
    assert (trained["ideal_bytes"], trained["saved_bytes"]) == (4 * image, 0)  # the transform is linear
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 4
    assert "prefers-color-scheme: dark" in page
    assert "src='http" not in page
    for name in ("speed-haar", "memory-haar"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)
    # Published results name no paths or hosts.
    for text in (json.dumps(found), page):
        assert str(ROOT) not in text
        assert str(tmp_path) not in text
    said = [value for part in ("environment", "machine", "options") for value in found[part].values()]
    assert os.uname().nodename not in said


def test_without_extras_results_are_the_same_but_pictures(tmp_path, brief, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name in cli.EXTRAS else find(name, *of))
    assert run(tmp_path, [tiny()], "--providers", "reference,ours,ours+graph") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == (
        "rich and matplotlib and scikit-image missing: no progress bar, no pictures, inputs are made up "
        "(pip install rich matplotlib scikit-image)"
    )
    assert [line.split()[0] for line in printed[1:6]] == [tiny().name, "provider", "reference", "ours", "ours+graph"]
    found = results(tmp_path)
    assert found["environment"]["inputs"] == "noise with the spectrum of photographs"
    assert [row["status"] for row in found["rows"]] == ["ok", "ok", "unavailable"]
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.html"}


@pytest.mark.parametrize("extras", [False, pytest.param(True, marks=needs_extras)])
def test_a_case_whose_package_is_missing_is_one_line(extras, tmp_path, brief, monkeypatch, capsys):
    """Filters by name need PyWavelets: without it their case says so once, and the run succeeds."""
    if not extras:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in cli.EXTRAS else find(name))
    missing = dataclasses.replace(tiny(), name="haar/missing/forward+backward")
    too = dataclasses.replace(missing, name="haar/missing/forward")
    real = measure._Task.of

    def of(case: Any, device: Any) -> Any:
        if case.name in (missing.name, too.name):
            raise rivals.Unavailable("pywt is missing")
        return real(case, device)

    monkeypatch.setattr(measure._Task, "of", of)
    assert run(tmp_path, [missing, too, tiny()], "--providers", "reference,ours") == 0
    printed = capsys.readouterr().out
    assert printed.count("pywt is missing") == 1
    assert f"{too.name}: unavailable, as above" in printed
    assert " ".join(printed.split()).count("reference, ours unavailable: pywt is missing") == 1
    assert [row["status"] for row in results(tmp_path)["rows"]] == ["unavailable"] * 4 + ["ok"] * 2


@needs_extras
def test_a_lost_gpu_ends_the_run(tmp_path, brief, monkeypatch, capsys):
    """Results before it are kept; the next process is told where to go on."""
    second, measured = dataclasses.replace(tiny(), name="haar/second/forward+backward"), []
    monkeypatch.setattr(cli, "device_is_lost", lambda device: len(measured) == 2)
    measure_one = measure.Meter.measure

    def counted(self, case, providers):
        measured.append(case.name)
        yield from measure_one(self, case, providers)
        if len(measured) == 2:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(measure.Meter, "measure", counted)
    assert run(tmp_path, [tiny(), second, tiny(False)], "--providers", "ours") == cli.LOST
    found = results(tmp_path)
    assert (found["complete"], found["lost"]) == (False, second.name)
    assert [row["case"] for row in found["rows"]] == [tiny().name, second.name]
    assert f"an error stays in the GPU since {second.name}" in capsys.readouterr().out


@needs_extras
def test_extra_cases_run_by_all_or_by_name_and_are_named_as_left_out(tmp_path, brief, capsys):
    extra = dataclasses.replace(tiny(), name="haar/extra/forward+backward", quick=False, extra=True)
    given = [tiny(False), extra]
    arguments = ["--device", "cpu", "--providers", "ours", "--limit", "1e-9", "--out", str(tmp_path)]

    def ran(*more: str) -> list[str]:
        """Past the limit, which they say, cases are skipped: a run takes no time."""
        assert cli.main([*arguments, *more], given) == 0
        rows = results(tmp_path)["rows"]
        assert all(row["status"] == "skipped" and "--limit" in row["reason"] for row in rows)
        return [row["case"] for row in rows]

    assert ran() == [tiny(False).name]
    printed = capsys.readouterr().out
    assert tiny(False).name in printed
    assert "left out of this run: 1 of haar; --list names them, --all or --cases runs them" in printed
    assert ran("--quick") == [tiny(False).name]
    assert ran("--all") == ran("--cases", "haar/*") == ran("--quick", "--all") == [tiny(False).name, extra.name]
    capsys.readouterr()
    assert ran("--cases", extra.name) == [extra.name]
    assert "left out" not in capsys.readouterr().out


@needs_extras
def test_wrong_provider_gets_no_number(tmp_path, brief, capsys):
    def swapped(setting: case.Setting) -> case.Forward:
        right = tiny().makers["reference"](setting)
        return lambda x: (right(x)[0], [right(x)[1][0][:, :, [1, 0, 2]]])

    def broken(setting: case.Setting) -> case.Forward:
        def forward(x: Tensor) -> None:
            raise NotImplementedError("no kernel for\nthis")

        return forward

    given = dataclasses.replace(tiny(False), makers=tiny().makers | {"ours": swapped, "upstream": broken})
    assert run(tmp_path, [given], "--providers", "upstream,reference,ours") == 1  # ours is wrong
    rows = {row["provider"]: row for row in results(tmp_path)["rows"]}
    wanted = {"ours": "wrong", "upstream": "failed", "reference": "ok"}
    assert {name: row["status"] for name, row in rows.items()} == wanted
    assert "output 1 is off by" in rows["ours"]["reason"]
    assert (rows["ours"]["error"] > 1, rows["ours"]["median_ms"]) == (True, None)
    assert rows["upstream"]["reason"] == "NotImplementedError: no kernel for this"
    assert "wrong: output 1" in capsys.readouterr().out


@needs_extras
def test_interrupt_keeps_what_was_measured(tmp_path, brief, monkeypatch, capsys):
    samples, sample = iter(range(10**6)), clock.CpuClock.sample

    def interrupted(self, step, repeats):
        if next(samples) == 20:
            raise KeyboardInterrupt
        return sample(self, step, repeats)

    second = dataclasses.replace(tiny(), name="haar/second/forward+backward")
    monkeypatch.setattr(clock.CpuClock, "sample", interrupted)
    monkeypatch.setattr(cli, "QUICK", clock.Effort(seconds=0.0, fewest=4, most=4))
    # 3 takers (2 providers and the copy): 3 samples to calibrate and 12 to measure the first case, 3 to calibrate the
    # second, which is then cut off in its first round.
    assert run(tmp_path, [tiny(), second], "--providers", "reference,ours") == 130
    found = results(tmp_path)
    assert found["complete"] is False
    assert [row["rounds"] for row in found["rows"] if row["case"] == tiny().name] == [4, 4]
    cut = [row for row in found["rows"] if row["case"] == second.name]
    assert all(row["status"] == "ok" and row["rounds"] == 1 for row in cut)
    assert "interrupted" in (tmp_path / "report.html").read_text()
    assert "interrupted" in capsys.readouterr().out


@needs_extras
def test_past_the_limit_cases_are_skipped_and_say_so(tmp_path, brief, capsys):
    assert run(tmp_path, [tiny()], "--limit", "1e-9", "--providers", "ours") == 0
    (row,) = results(tmp_path)["rows"]
    assert row["status"] == "skipped"
    assert "--limit" in row["reason"]
    assert tiny().name in capsys.readouterr().out
