"""The tuner on the CPU, with kernels that run and a clock that says what the test wants: wavemix_kernels/tune."""

from __future__ import annotations

import copy
import json
import logging
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import wavemix_kernels as wk
from wavemix_kernels import cache, log
from wavemix_kernels.backends import Backend
from wavemix_kernels.ops import choose, tuned
from wavemix_kernels.ops.haar import op as haar
from wavemix_kernels.ops.patm import op as patm
from wavemix_kernels.tune import Report, cli, settle, tune

CPU = torch.device("cpu")
X = torch.randn(2, 8, 12, 10)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's cache folder, and a process that has read nothing."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    new_process()
    yield tmp_path / "cache"
    monkeypatch.undo()
    new_process()


def new_process() -> None:
    cache.forget()
    tuned.forget()


class Transform(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return wk.haar_dwt2d(x, 2)[0]


class Clock:
    """Seconds by the backend that runs, times what ``noise`` draws."""

    def __init__(self, noise: float = 0.0, **seconds: float) -> None:
        self.seconds, self.noise, self.random = seconds, noise, random.Random(1)
        self.ran = ""

    def repeats(self, step: Callable[[], object]) -> int:
        return 1

    def sample(self, step: Callable[[], object], repeats: int) -> float:
        step()
        return self.seconds[self.ran] * (1 + self.noise * (2 * self.random.random() - 1))


def tune_transform(monkeypatch: pytest.MonkeyPatch, clock: Clock, **options: Any) -> Report:
    """Haar's analysis alone, with a clock that sees which backend runs."""

    def noted(name: str, backend: Backend) -> Backend:
        def why_not(*tensors: torch.Tensor) -> str | None:
            return backend.why_not(*tensors)

        functions = {
            key: lambda *args, function=function: (setattr(clock, "ran", name), function(*args))[1]
            for key, function in backend.functions.items()
        }
        return Backend(why_not, functions)

    for name in ("cpu",):
        monkeypatch.setitem(haar.BACKENDS, name, noted(name, haar.BACKENDS[name]))
    analysis = haar.reference.analysis
    monkeypatch.setattr(
        haar.reference, "analysis", lambda *args: (setattr(clock, "ran", "reference"), analysis(*args))[1]
    )
    return tune(Transform(), X, train=False, clock=clock, **options)


def taken(x: torch.Tensor = X, name: str = "auto") -> str:
    return choose.pick("haar_dwt2d", haar.BACKENDS, name, x)


# --- Which candidate is chosen -----------------------------------------------------------------------------


@pytest.mark.parametrize("seconds, noise, chosen", [
    ({"cpu": 1.0, "reference": 0.5}, 0.0, "reference"),
    ({"cpu": 1.0, "reference": 0.5}, 0.2, "reference"),  # far beyond the noise
    ({"cpu": 1.0, "reference": 0.98}, 0.0, "cpu"),  # not worth a change
    ({"cpu": 1.0, "reference": 0.95}, 0.0, "reference"),
    ({"cpu": 1.0, "reference": 0.95}, 0.2, "cpu"),  # within the noise
    ({"cpu": 1.0, "reference": 1.0}, 0.2, "cpu"),
    ({"cpu": 1.0, "reference": 2.0}, 0.2, "cpu"),
])  # fmt: skip
def test_a_candidate_beats_the_default_by_more_than_the_noise(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], noise: float, chosen: str
) -> None:
    report = tune_transform(monkeypatch, Clock(noise, **seconds))
    (result,) = report.results
    assert (result.default, result.chosen, set(result.times)) == ("cpu", chosen, {"cpu", "reference"})
    assert taken() == chosen
    if chosen == "reference":
        assert result.gain == pytest.approx(seconds["reference"] / seconds["cpu"], rel=noise + 1e-6)


@pytest.mark.parametrize("wrong, why", [
    (lambda function, *args: None, "result 0 is off by nan"),  # writes nothing
    (lambda function, image, ll, *rest: (function(image, ll, *rest), ll[0, 0, 0].zero_()), "result 0 is off by"),
    (lambda function, *args: (_ for _ in ()).throw(RuntimeError("no kernel\nimage")), "RuntimeError: no kernel"),
])  # fmt: skip
def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch, wrong: Any, why: str) -> None:
    right = haar.BACKENDS["cpu"].functions
    planted = {**right, "analysis": lambda *args: wrong(right["analysis"], *args)}
    monkeypatch.setitem(haar.BACKENDS, "cpu", Backend(haar.BACKENDS["cpu"].why_not, planted))
    if "no kernel" in why:  # the run that is recorded takes it too
        monkeypatch.setattr(sys.modules["wavemix_kernels.tune"], "warmup", recorded_by_hand)
    (result,) = tune(Transform(), X, train=False, seconds=0.0).results
    assert result.left_out["cpu"].startswith(why)
    assert (result.chosen, taken()) == ("reference", "reference")


def recorded_by_hand(model: nn.Module, *example: Any, train: bool) -> None:
    with pytest.raises(RuntimeError, match="no kernel"):
        model(*example)


def test_what_is_predicted_to_be_hopeless_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"cpu": 1e-3, "reference": 3e-3}
    module = sys.modules["wavemix_kernels.tune"]
    monkeypatch.setattr(module, "PREDICTOR", lambda unit, choice, candidate: seconds[candidate])
    (result,) = tune_transform(monkeypatch, Clock(cpu=1.0, reference=0.1)).results
    assert result.left_out == {"reference": "predicted 3000 us, the best 1000 us"}
    assert result.chosen == "cpu"


# --- What a table does -------------------------------------------------------------------------------------


def test_an_entry_serves_sizes_up_to_the_next_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    tune_transform(monkeypatch, Clock(cpu=1.0, reference=0.5))  # 240 pixels
    for images, want in ((1, "cpu"), (2, "reference"), (3, "cpu")):
        assert taken(torch.ones(images, 8, 12, 10)) == want
    assert taken(torch.ones(1, 8, 10, 14)) == "reference"
    for other in (X.double(), torch.ones(2, 9, 12, 10), X.contiguous(memory_format=torch.channels_last)):
        assert taken(other) == "cpu"


def test_the_log_says_what_was_measured(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    tune_transform(monkeypatch, Clock(cpu=1.0, reference=0.5))
    caplog.set_level(logging.INFO, logger="wavemix_kernels")
    monkeypatch.setattr(log, "_seen", set())
    Transform()(X)
    assert "haar_dwt2d float32 (2, 8, 12, 10): reference (measured on this device; cuda: " in caplog.text


def test_a_backend_asked_for_by_name_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    tune_transform(monkeypatch, Clock(cpu=1.0, reference=0.5))
    assert taken(name="cpu") == "cpu"
    with wk.backend("cpu"), pytest.raises(ValueError, match="tune: backend 'cpu' is asked for"):
        tune(Transform(), X)


def test_without_a_table_the_rule_is_passed_on() -> None:
    rule = ("cpu", "reference")
    assert tuned.order("haar_dwt2d", rule, haar.BACKENDS, (X,)) is rule


def test_a_table_may_not_fit_what_is_installed() -> None:
    tuned.put(CPU, tuned.key_of("haar_dwt2d", (X,)), ["another"])
    assert taken() == "cpu"


def test_patm_takes_the_measured_form() -> None:
    x, mixer = torch.randn(2, 8, 6, 5), wk.FusedPATM(8).eval()
    want = mixer(x)
    assert patm.runs_whole(x, "auto", False)
    key = tuned.key_of("patm", (x,), (True,))
    tuned.put(CPU, key, ["parts"])
    assert not patm.runs_whole(x, "auto", False)
    assert patm.runs_whole(x, "cpu", False)
    with torch.no_grad():
        assert patm.runs_whole(x, "auto", False)  # measured for training alone
    torch.testing.assert_close(mixer(x), want)
    tuned.put(CPU, key, ["nonsense"])
    assert patm.runs_whole(x, "auto", False)


def test_compiled_graphs_ask_when_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = wk.FusedWaveblock(level=1, final_dim=8, ff_channel=8, dropout=0.0), torch.randn(2, 8, 8, 8)
    want = block(x)
    tune(block, x, train=False, seconds=0.0)
    for table in tuned._tables.values():
        for key in table:
            table[key] = ["reference"]
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want)


# --- What tuning leaves alone ------------------------------------------------------------------------------


def test_nothing_of_the_model_changes() -> None:
    block, x = wk.FusedWaveblock(level=2, final_dim=8, ff_channel=8), torch.randn(2, 8, 8, 8, requires_grad=True)
    block(x).sum().backward()
    before = [copy.deepcopy(t) for t in (block.state_dict(), [p.grad for p in block.parameters()], x.grad)]
    torch.manual_seed(5)
    drawn = torch.get_rng_state()
    report = tune(block.eval(), x, train=True, seconds=0.0)
    assert {"reduce_haar", "pointwise_mlp_backward", "deconv_norm_backward"} <= {r.key[0] for r in report.results}
    after = [block.state_dict(), [p.grad for p in block.parameters()], x.grad]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not block.training
    assert tuned._State.recorder is None
    assert not tuned._State.watching


def test_a_training_step_settles_both_forms_of_patm_and_what_they_are_made_of() -> None:
    results = {r.key[0]: r for r in tune(wk.FusedPATM(8), torch.randn(2, 8, 6, 5), seconds=0.0).results}
    assert {"patm", "phase_aggregate", "branch_sum_backward"} <= set(results)
    assert set(results["patm"].times) == {"whole", "parts"}
    assert list(results)[-1] == "patm"  # by then its parts are at their best


# --- Files -------------------------------------------------------------------------------------------------

ASK = """
import torch
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.haar import op
print(choose.pick("haar_dwt2d", op.BACKENDS, "auto", torch.ones(2, 8, 12, 10)))
"""


def fresh_process(program: str) -> subprocess.CompletedProcess[str]:
    program = f"import torch; torch.set_num_threads({torch.get_num_threads()})\n{program}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)


def test_a_new_process_takes_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fresh_process(ASK).stdout == "cpu\n"
    assert tune_transform(monkeypatch, Clock(cpu=1.0, reference=0.5)).saved
    assert fresh_process(ASK).stdout == "reference\n"


def test_entries_of_another_number_of_threads_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    tune_transform(monkeypatch, Clock(cpu=1.0, reference=0.5))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        new_process()
        assert taken() == "cpu"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("content", ["{", "[1]", '{"format": "another program\'s"}'])
def test_a_foreign_file_is_passed_over(folder: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir()
    (folder / "devices.json").write_text(content)
    assert taken() == taken() == "cpu"
    assert len([r for r in caplog.records if r.name == "wavemix_kernels" and r.levelno == logging.WARNING]) == 1


@pytest.mark.parametrize("entry", [1, {}, {"key": 3, "ranking": []}, {"key": ["haar_dwt2d", "torch.nothing"]}])
def test_a_damaged_entry_is_left_out(
    monkeypatch: pytest.MonkeyPatch, entry: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tune_transform(monkeypatch, Clock(cpu=1.0, reference=0.5))
    cache.write(CPU, tuned.SECTION, {"damaged": entry})
    new_process()
    assert taken() == "reference"
    assert "tuned: left out 'damaged'" in caplog.text


def test_without_a_folder_to_write_to_the_process_has_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(cache.VARIABLE, "/dev/null/nowhere")
    report = tune_transform(monkeypatch, Clock(cpu=1.0, reference=0.5))
    assert not report.saved
    assert "for this process only" in str(report)
    assert taken() == "reference"
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1


def test_a_shipped_table_serves_until_the_user_has_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = tune_transform(monkeypatch, Clock(cpu=1.0, reference=0.5), save=False)
    new_process()
    assert taken() == "cpu"
    cli.export(report, tmp_path / "cpu.json")
    assert json.loads((tmp_path / "cpu.json").read_text())["architecture"] == "cpu"
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path)
    new_process()
    assert taken() == "reference"
    tune_transform(monkeypatch, Clock(cpu=1.0, reference=2.0))
    new_process()
    assert taken() == "cpu"


@pytest.mark.prove
def test_two_processes_tune_at_once(folder: Path) -> None:
    program = (
        "import sys, torch, wavemix_kernels as wk; torch.set_num_threads(1)\n"
        "c = int(sys.argv[1]); wk.tune(wk.FusedPATM(c), torch.randn(2, c, 6, 5), seconds=0.05)"
    )
    running = [subprocess.Popen([sys.executable, "-c", program, str(c)]) for c in (8, 12)]
    assert [process.wait() for process in running] == [0, 0]
    channels = {entry["key"][3] for entry in cache.read(CPU, tuned.SECTION).values() if entry["key"][0] == "branch_sum"}
    assert channels == {8, 12}


# --- The command -------------------------------------------------------------------------------------------

LITE = "wavemix.classification.WaveMixLite(depth=1, final_dim=8)"


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [LITE, "--shape", "2,3,16,16"]
    assert cli.main([*given, "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert "no predictor is installed" in listed
    assert "reduce_haar float32 (2, 8, 16, 16), (2, 8, 1, 1): reduce_haar\n    cpu (default)\n    reference\n" in listed
    assert not folder.exists()
    assert cli.main([*given, "--seconds", "0", "--inference", "--export", str(tmp_path / "t.json")]) == 0
    printed = capsys.readouterr().out
    assert "reduce_haar float32 (2, 8, 16, 16), (2, 8, 1, 1): reduce_haar: " in printed
    assert "kept for later processes" in printed
    assert "backward" not in printed
    entries = json.loads((tmp_path / "t.json").read_text())["entries"]
    assert entries == cache.read(CPU, tuned.SECTION)


def test_a_model_without_a_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["torch.nn:Conv2d(3, 4, 1)", "--shape", "1,3,4,4"]) == 1
    assert "accelerate(model) first?" in capsys.readouterr().out


def test_the_command_on_every_operator(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--ops", "--shape", "1,8,16,16", "--dtype", "float64", "--dry-run"]) == 0
    listed = capsys.readouterr().out
    for op in ("haar_dwt2d", "haar_idwt2d", "reduce_haar", "deconv_stats", "patm", "channel_mlp_backward"):
        assert f": {op}\n" in listed


@pytest.mark.parametrize("arguments, message", [
    ([], "give a MODEL or --ops"),
    ([LITE, "--ops"], "give a MODEL or --ops"),
    (["wavemlp.Nothing"], "MODEL='wavemlp.Nothing': module 'wavemix_kernels.wavemlp' has no attribute 'Nothing'"),
    (["torch:arange(4)"], "expected a torch.nn.Module, got Tensor"),
    (["torch.nn:Linear(__import__)"], "MODEL='torch.nn:Linear(__import__)': "),
    (["--ops", "--shape", "1,2"], "--shape='1,2': expected N,C,H,W"),
])  # fmt: skip
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert message in capsys.readouterr().err


def test_the_gain_asked_for_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "develop" / "tuning.md").read_text()
    assert f"{settle.GAIN:g}" in text
