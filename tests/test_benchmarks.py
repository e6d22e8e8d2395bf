"""The benchmark harness: its command line, the gate, what it writes, and memory counts of programs with known ones."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # `benchmarks` lies beside `tests`; last, so that an installed package stays first

from benchmarks import cases, cli, clock, gate, machine, measure, memory, photographs, providers  # noqa: E402

SIZE = (2, 4, 16, 16)
MIB = 2**20

needs_extras = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in cli.EXTRAS),
    reason='the packages of wavemix-kernels[bench] are not installed: pip install "wavemix-kernels[bench]"',
)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few rounds as there may be, and no deadline that a busy machine could miss."""
    monkeypatch.setattr(cli, "QUICK", clock.Effort(seconds=0.0, fewest=3, most=3))
    monkeypatch.setattr(cli, "QUICK_LIMIT_S", 1e6)
    monkeypatch.setattr(cli, "copy_bandwidth", lambda device: {"reused": 1.0, "fresh": 1.0})


def tiny(backward: bool = True) -> cases.Case:
    return cases.haar_case(1, torch.float32, "nchw", SIZE, backward, quick=True)


# --- Command line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, given, exists",
    [
        (["--cases", "nothing/*"], "nothing/*", "haar/J1/fp32/nchw/4x64x256x256/forward"),
        (["--cases", ""], "''", "haar/J1/fp32/nchw/4x64x256x256/forward"),
        (["--providers", "auto,warp"], "auto,warp", "upstream"),
        (["--providers", ","], "','", "upstream"),
        (["--device", "tpu"], "tpu", "cuda"),
        (["--limit", "0"], "0", "positive"),
        (["--limit", "soon"], "soon", "float"),
        (["--fast"], "--fast", "unrecognized"),
    ],
    ids=str,
)
def test_bad_arguments_get_one_line_and_status_2(arguments, given, exists, capsys):
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert given in printed.err
    assert exists in printed.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so --device cuda is served")
def test_cuda_without_a_gpu_is_refused(capsys):
    assert cli.main(["--device", "cuda"]) == 2
    assert "sees no GPU" in capsys.readouterr().err


def test_unwritable_folder_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["--out", str(tmp_path / "file" / "below")], [tiny()]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_list_names_every_case_of_the_device_once(capsys):
    assert cli.main(["--list", "--device", "cpu"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.partition("\nproviders")[0].splitlines() if line]
    assert listed == [case.name for case in cases.registry() if "cpu" in case.devices]
    assert len(set(listed)) == len(listed)


def test_missing_extra_says_what_to_install(monkeypatch, tmp_path, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else find(name))
    assert cli.main(["--out", str(tmp_path)], [tiny()]) == 2
    printed = capsys.readouterr().err
    assert 'rich missing: pip install "wavemix-kernels[bench]"' in printed
    assert printed.count("\n") == 1


# --- End to end ----------------------------------------------------------------------------------------------


@needs_extras
def test_tiny_run_writes_json_pictures_and_report(tmp_path, brief, capsys):
    status = cli.main(
        ["--device", "cpu", "--quick", "--providers", "reference,auto,triton", "--out", str(tmp_path)],
        [tiny(False), tiny(True), cases.waveblock_case(1, "nchw", (2, 8, 16, 16), True, quick=True)],
    )
    assert status == 0, capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["complete"] is True
    facts = results["environment"]
    assert {"date", "python", "packages", "commit", "cpu", "cores", "threads", "device"} <= facts.keys()
    assert facts["packages"]["torch"] == torch.__version__
    assert results["machine"]["copy_gbps"].keys() == {"reused", "fresh"}
    rows = {(row["case"], row["provider"]): row for row in results["rows"]}
    assert len(rows) == len(results["rows"]) == 9
    fields = {field.name for field in dataclasses.fields(measure.Row)}
    for (_, provider), row in rows.items():
        assert row.keys() == fields
        if provider == "triton":
            assert row["status"] == "unavailable"
            assert "interprets" in row["reason"]
            assert row["median_ms"] is None
            continue
        assert row["status"] == "ok", row["reason"]
        assert row["baseline"] == "reference"  # upstream was not asked for
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert 0 <= row["error"] <= 1
        assert row["rounds"] >= 3
    image = 4 * 2 * 4 * 16 * 16
    ours = rows[tiny(False).name, "auto"]
    assert ours["ideal_bytes"] == 2 * image  # x read, the pyramid written
    assert ours["peak_bytes"] == image  # and nothing but the pyramid allocated
    assert rows[tiny(True).name, "auto"]["ideal_bytes"] == 4 * image
    assert rows[tiny(True).name, "auto"]["saved_bytes"] == 0  # the transform is linear
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 4
    assert "prefers-color-scheme: dark" in page
    assert "src='http" not in page
    for name in ("speed-haar", "memory-haar"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    # Whoever publishes results publishes no paths or host names.
    for text in (json.dumps(results), page):
        assert str(ROOT) not in text
        assert str(tmp_path) not in text
    said = [value for part in ("environment", "machine", "options") for value in results[part].values()]
    assert os.uname().nodename not in said


@needs_extras
def test_wrong_provider_gets_no_number(tmp_path, brief, capsys):
    def swapped(setting: cases.Setting) -> cases.Forward:
        right = tiny().makers["reference"](setting)

        def forward(x: Tensor) -> tuple[Tensor, list[Tensor]]:
            ll, (high,) = right(x)
            return ll, [high[:, :, [1, 0, 2]]]

        return forward

    def broken(setting: cases.Setting) -> cases.Forward:
        def forward(x: Tensor) -> None:
            raise NotImplementedError("no kernel for\nthis")

        return forward

    case = dataclasses.replace(tiny(False), makers=tiny().makers | {"ours": swapped, "upstream": broken})
    arguments = ["--device", "cpu", "--quick", "--out", str(tmp_path)]
    status = cli.main([*arguments, "--providers", "upstream,reference,auto"], [case])
    assert status == 1  # ours is wrong
    rows = {row["provider"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert rows["auto"]["status"] == "wrong"
    assert "output 1 is off by" in rows["auto"]["reason"]
    assert rows["auto"]["error"] > 1
    assert rows["auto"]["median_ms"] is None
    assert rows["upstream"]["status"] == "failed"
    assert rows["upstream"]["reason"] == "NotImplementedError: no kernel for this"
    assert rows["reference"]["status"] == "ok"
    assert "wrong: output 1" in capsys.readouterr().out


@needs_extras
def test_interrupt_keeps_what_was_measured(tmp_path, brief, monkeypatch, capsys):
    samples = iter(range(10**6))
    sample = clock.CpuClock.sample

    def interrupted(self, step, repeats):
        if next(samples) == 20:
            raise KeyboardInterrupt
        return sample(self, step, repeats)

    second = dataclasses.replace(tiny(), name="haar/second/forward+backward")
    with monkeypatch.context() as patch:
        patch.setattr(clock.CpuClock, "sample", interrupted)
        patch.setattr(cli, "QUICK", clock.Effort(seconds=0.0, fewest=4, most=4))
        # 3 takers (2 providers and the copy): 3 samples to calibrate and 12 to measure the first case, 3 to calibrate
        # the second, which is then cut off in its first round.
        status = cli.main(
            ["--device", "cpu", "--quick", "--providers", "reference,auto", "--out", str(tmp_path)], [tiny(), second]
        )
    assert status == 130
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["complete"] is False
    first = [row for row in results["rows"] if row["case"] == tiny().name]
    assert [row["rounds"] for row in first] == [4, 4]
    cut = [row for row in results["rows"] if row["case"] == second.name]
    assert all(row["status"] == "ok" and row["rounds"] == 1 for row in cut)
    assert "interrupted" in (tmp_path / "report.html").read_text()
    assert "interrupted" in capsys.readouterr().out


def test_past_the_limit_nothing_is_compiled():
    meter = measure.Meter(torch.device("cpu"), clock.Effort(0.0, 1, 1), may_compile=lambda seconds: False)
    rows = {row.provider: row for row in meter.measure(tiny(False), ["reference", "compile"])}
    assert rows["reference"].status == "ok"
    assert rows["compile"].status == "skipped"


@needs_extras
def test_past_the_limit_cases_are_skipped_and_say_so(tmp_path, brief, capsys):
    arguments = ["--device", "cpu", "--quick", "--limit", "1e-9", "--providers", "auto", "--out", str(tmp_path)]
    assert cli.main(arguments, [tiny()]) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["status"] == "skipped"
    assert "--limit" in row["reason"]
    assert tiny().name in capsys.readouterr().out


# --- Gate ----------------------------------------------------------------------------------------------------


def test_gate_admits_rounding_and_refuses_more():
    exact = torch.linspace(1, 2, 100, dtype=torch.float64)
    rounded = exact.to(torch.bfloat16)
    limits = gate.elementwise([exact], [1], gate.unit_roundoff(torch.bfloat16))
    assert gate.judge(["y"], [rounded], [exact], limits).reason is None
    off = rounded.clone()
    off[7] += 0.02  # more than one spacing of bfloat16 between 1 and 2, 1/128
    assert "y is off by" in gate.judge(["y"], [off], [exact], limits).reason


def test_gate_refuses_shapes_counts_and_nan():
    exact = torch.ones(3, dtype=torch.float64)
    assert "shape" in gate.judge(["y"], [torch.ones(4)], [exact], [1.0]).reason
    assert "1 tensors, expected 2" in gate.judge(["y", "z"], [torch.ones(3)], [exact, exact], [1.0, 1.0]).reason
    assert "finite" in gate.judge(["y"], [torch.full((3,), float("nan"))], [exact], [1.0]).reason


def test_root_mean_square_limit_of_a_cancelling_sum_is_that_of_its_terms():
    zero, other = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    assert gate.root_mean_square([zero, other], [2.0, 0.0], depth=1, u=2.0**-24) == [32 * 2.0**-24, 16 * 2.0**-24]


# --- Memory --------------------------------------------------------------------------------------------------


def mebibyte(count: int = 1) -> Tensor:
    return torch.zeros(count * MIB // 4)


def test_tracker_counts_live_storages_once():
    x = mebibyte()
    with memory.LiveBytes([x]) as live:
        y = x + 1
        assert live.live == MIB
        view = y[::2].reshape(-1, 2)  # a view shares its storage; x's own is known
        x.add_(1)
        assert live.live == MIB
        z = y * 2
        assert live.live == live.peak == 2 * MIB
        del y
        assert live.live == 2 * MIB  # the view keeps it
        del view
        assert live.live == MIB
        z.resize_(3 * MIB // 4)
        assert live.live == live.peak == 3 * MIB
        del z
        assert live.live == 0
    assert live.peak == 3 * MIB


def chain(x: Tensor) -> Tensor:
    """Holds two intermediates at once and returns a third: three storages of x's size at the peak."""
    first = x + 1
    second = x * 2
    return first * second


def test_peak_of_a_known_program_by_both_observers():
    x = mebibyte()
    assert memory.tracked_peak_bytes(lambda: chain(x), [x]) == 3 * MIB
    assert memory.peak_bytes(lambda: chain(x), torch.device("cpu")) == 3 * MIB


def test_allocator_log_sees_inside_operators():
    scores = torch.zeros(64, 1024)

    def topmost() -> Tensor:
        return scores.logsumexp(1)

    # logsumexp's C++ makes an exp of the whole input; its result has 64 elements.
    assert memory.tracked_peak_bytes(topmost, [scores]) < 4096
    assert memory.peak_bytes(topmost, torch.device("cpu")) >= scores.nbytes


def test_saved_bytes_leave_out_inputs_and_parameters():
    x = mebibyte().requires_grad_()
    weight = mebibyte().requires_grad_()
    assert memory.saved_bytes(lambda: x * weight, [x, weight]) == 0
    # exp keeps its result, sin its argument: one storage, saved twice.
    assert memory.saved_bytes(lambda: x.exp().sin(), [x]) == MIB
    linear = nn.Linear(256, 1024, bias=False)
    rows = torch.zeros(256, 256, requires_grad=True)
    known = [rows, *linear.parameters()]
    assert memory.saved_bytes(lambda: linear(rows).relu(), known) == 256 * 1024 * 4


# --- Inputs and clocks ---------------------------------------------------------------------------------------


@needs_extras
def test_photographs_are_reproducible_and_real():
    crops = photographs.crops(9, 40, 600, seed=1)  # wider than chelsea: mirrored
    assert crops.shape == (9, 3, 40, 600)
    assert torch.equal(crops, photographs.crops(9, 40, 600, seed=1))
    assert not torch.equal(crops, photographs.crops(9, 40, 600, seed=2))
    assert crops.min() >= 0
    assert crops.max() <= 1
    assert crops.flatten(1).std(1).min() > 0.01  # no crop is flat
    maps = photographs.feature_maps(2, 16, 32, 48)
    assert maps.shape == (2, 16, 32, 48)
    torch.testing.assert_close(maps.mean((0, 2, 3)), torch.zeros(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(maps.std((0, 2, 3), unbiased=False), torch.ones(16), atol=1e-4, rtol=0)


def test_rounds_are_interleaved_and_their_order_changes():
    order: list[str] = []
    steps = {name: (lambda name=name: order.append(name)) for name in "abc"}
    samples: dict[str, list[float]] = {}

    class Once(clock.CpuClock):
        def repeats(self, step):
            return 1

    clock.interleave(steps, Once(), clock.Effort(seconds=0.0, fewest=20, most=50), samples)
    rounds = ["".join(order[i : i + 3]) for i in range(3, len(order), 3)]  # the first three warm up
    assert len(rounds) == 20
    assert all(sorted(one) == list("abc") for one in rounds)
    assert len(set(rounds)) > 3
    assert {len(values) for values in samples.values()} == {20}


def test_copy_bandwidth_is_that_of_a_copy():
    gbps = machine.copy_bandwidth(torch.device("cpu"), size=1 << 20)
    assert gbps.keys() == {"reused", "fresh"}
    assert all(0.01 < value < 1e5 for value in gbps.values())


def test_quantiles_interpolate():
    assert clock.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert clock.quantile([1.0, 2.0], 0.2) == pytest.approx(1.2)
    assert clock.quantile([5.0], 0.8) == 5.0


def test_parameters_go_by_name_whatever_their_order():
    class Block(nn.Module):
        def __init__(self, names: str) -> None:
            super().__init__()
            for name in names:
                self.register_parameter(name, nn.Parameter(torch.zeros(1)))

    case, device = tiny(), torch.device("cpu")
    subjects = [providers.subject(Block(names), case, device, None) for names in ("ab", "ba")]
    assert [list(subject.parameters) for subject in subjects] == [["a", "b"], ["a", "b"]]


# --- The script for GPU machines -----------------------------------------------------------------------------


def script(*arguments: str, python: str = sys.executable, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHON": python},
    )


@pytest.mark.parametrize("arguments", [(), ("out", "x"), ("out", "0"), ("a", "1", "b")], ids=str)
def test_gpu_script_usage(arguments):
    done = script(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which the script would do its work")
def test_gpu_script_without_a_gpu(tmp_path):
    done = script(str(tmp_path / "out"))
    assert done.returncode == 2
    assert "sees no NVIDIA GPU" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("failing", ["", "pytest", "pip"])
def test_gpu_script_stages_and_status(tmp_path, failing):
    """The script's own logic, with an interpreter that only records what it is asked to do."""
    fake = tmp_path / "python"
    fake.write_text(
        "#!/usr/bin/env bash\n"
        f'echo "$WAVEMIX_KERNELS_CUDA $WAVEMIX_KERNELS_CUDA_ARCHS $*" >> {tmp_path}/calls\n'
        "[[ $1 == -c ]] && { echo 90; exit 0; }\n"
        f'[[ $2 == "{failing}" ]] && {{ echo "it broke"; exit 1; }}\n'
        "echo done\n"
    )
    fake.chmod(0o755)
    done = script(str(tmp_path / "out"), "5", python=str(fake))
    summary = (tmp_path / "out" / "summary.txt").read_text()
    calls = (tmp_path / "calls").read_text()
    assert done.returncode == (1 if failing else 0), done.stderr
    assert "1 90 -m pip install --no-build-isolation --no-deps" in calls
    assert calls.index("-m pip") < calls.index("-m pytest") < calls.index("-m benchmarks --device cuda")
    if failing == "pytest":
        assert "FAIL  parity-haar" in summary
        assert "it broke" in summary
    if failing == "pip":
        assert "FAIL  build" in summary
        assert "\n0 90 -m pip" in calls  # again, without the CUDA kernels
        assert "exercise cuda" not in calls
    assert "PASS  exercise-triton" in summary
    assert (tmp_path / "out" / "benchmarks.log").read_text() == "done\n"
