"""The benchmark harness: its command line, the gate, what it writes, and memory counts of programs with known ones."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # `benchmarks` lies beside `tests`; last, so that an installed package stays first

from benchmarks import cases, cli  # noqa: E402 - after the path is set
from benchmarks.cases import haar as cases_haar  # noqa: E402 - after the path is set
from benchmarks.cases import wavemix as cases_wavemix  # noqa: E402 - after the path is set
from benchmarks.cases import wavemlp as cases_wavemlp  # noqa: E402 - after the path is set
from benchmarks.harness import (  # noqa: E402 - after the path is set
    case,
    clock,
    gate,
    machine,
    measure,
    memory,
    photographs,
    providers,
    rivals,
    traffic,
)

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


def tiny(backward: bool = True) -> case.Case:
    return cases_haar.haar_case(1, torch.float32, "nchw", SIZE, backward, quick=True)


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
    names = [case.name for case in cases.registry()]
    assert len(set(names)) == len(names)


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
        [tiny(False), tiny(True), cases_wavemix.waveblock_case(1, "nchw", (2, 8, 16, 16), True, quick=True)],
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
def test_extra_cases_run_by_all_or_by_name_and_are_named_as_left_out(tmp_path, brief, capsys):
    extra = dataclasses.replace(tiny(), name="haar/extra/forward+backward", quick=False, extra=True)
    given = [tiny(False), extra]
    arguments = ["--device", "cpu", "--providers", "auto", "--limit", "1e-9", "--out", str(tmp_path)]

    def ran(*more: str) -> list[str]:
        assert cli.main([*arguments, *more], given) == 0
        return [row["case"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]]

    assert ran() == [tiny(False).name]
    assert "left out of this run: 1 of haar; --list names them, --all or --cases runs them" in capsys.readouterr().out
    assert ran("--quick") == [tiny(False).name]
    assert ran("--all") == ran("--cases", "haar/*") == ran("--quick", "--all") == [tiny(False).name, extra.name]
    capsys.readouterr()
    assert ran("--cases", extra.name) == [extra.name]
    assert "left out" not in capsys.readouterr().out


@needs_extras
def test_wrong_provider_gets_no_number(tmp_path, brief, capsys):
    def swapped(setting: case.Setting) -> case.Forward:
        right = tiny().makers["reference"](setting)

        def forward(x: Tensor) -> tuple[Tensor, list[Tensor]]:
            ll, (high,) = right(x)
            return ll, [high[:, :, [1, 0, 2]]]

        return forward

    def broken(setting: case.Setting) -> case.Forward:
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


def tiny_model(training: bool, **options: Any) -> case.Case:
    def model(**arguments: Any) -> nn.Module:
        from wavemix_kernels.wavemix.classification import WaveMixLite

        return WaveMixLite(final_dim=8, depth=2, upsample="deconv", **arguments)

    return cases_wavemix.model_case("tiny", model, True, (6, 3, 16, 16), training, **options)


@pytest.mark.parametrize(
    "of",
    [
        tiny_model(True),
        tiny_model(False),
        tiny_model(True, autocast=torch.bfloat16, judged=4),
        cases_wavemlp.patm_case("fc", (2, 8, 5, 9), True),
        cases_wavemlp.patm_case("depthwise", (2, 8, 5, 9), True),
        cases_wavemlp.patm_case("fc", (4, 8, 5, 9), True, autocast=torch.bfloat16, judged=2),
        cases_wavemlp.model_case("wavemlp", "T_dw", (2, 3, 64, 64), True),
        cases_wavemlp.model_case("wavemlp", "S", (1, 3, 32, 32), False),
    ],
    ids=lambda of: of.name,
)
@needs_extras
def test_blocks_and_models_pass_their_gate(of):
    meter = measure.Meter(torch.device("cpu"), clock.Effort(0.0, 1, 1))
    names = ["upstream", "reference", "auto"]
    if of.group == "wavemix" and of.autocast is not None:
        names.remove("upstream")  # the backward of pytorch_wavelets' transforms fails under autocast
    for row in meter.measure(of, names):
        assert row.status == "ok", (row.provider, row.reason)
        assert 0 < row.error <= 1
        assert row.flops > 0
        assert (row.saved_bytes is None) != of.backward
        if of.image:
            assert row.gbps is None
            assert row.frames_per_second == pytest.approx(of.inputs()[0].shape[0] / row.median_ms * 1e3)
        else:
            assert row.frames_per_second is None


@needs_extras
def test_a_gate_of_the_first_images_says_the_same_of_the_step():
    whole = cases_wavemlp.patm_case("fc", (4, 8, 5, 9), True)
    tasks = [measure._Task.of(dataclasses.replace(whole, judged=n), torch.device("cpu")) for n in (None, 2)]
    assert [task.judged[0].shape[0] for task in tasks] == [4, 2]
    assert [task.inputs[0].shape[0] for task in tasks] == [4, 4]
    assert tasks[0].flops == tasks[1].flops > 0
    assert tasks[0].ideal_bytes == tasks[1].ideal_bytes > 0


def test_wrong_parameters_of_a_model_are_refused():
    right = tiny_model(True)

    def unscaled(setting: case.Setting) -> case.Forward:
        model = right.makers["ours"](setting)
        with torch.no_grad():
            model.layers[0].feedforward[5].weight.mul_(1.001)
        return model

    wrong = dataclasses.replace(right, makers=right.makers | {"ours": unscaled})
    meter = measure.Meter(torch.device("cpu"), clock.Effort(0.0, 1, 1))
    (row,) = meter.measure(wrong, ["auto"])
    assert row.status == "wrong"


@pytest.mark.parametrize("mode", ["fc", "depthwise"])
def test_upstream_patm_is_the_reference(mode):
    from wavemix_kernels.reference import PATM

    torch.manual_seed(0)
    reference, upstream = PATM(8, True, mode=mode).double(), rivals.UpstreamPATM(8, True, mode=mode).double()
    upstream.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(2, 8, 5, 9, dtype=torch.float64)
    expected, actual = ([module(x), *module.parameters()] for module in (reference, upstream))
    (expected[0] ** 2).sum().backward()
    (actual[0] ** 2).sum().backward()
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-12, atol=1e-12)
    for name, parameter in reference.named_parameters():
        other = upstream.get_parameter(name)
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-10, atol=1e-10)


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


def test_calibrated_limit_follows_the_reference_and_the_order_of_sums():
    values, fp32, bf16 = [torch.ones(4, dtype=torch.float64)] * 2, 2.0**-24, 2.0**-8
    assert gate.calibrated(values, [0.0, 0.0], [1e-3, 0.0], 0, fp32) == [16e-3, 16 * fp32]
    assert gate.calibrated(values, [0.0, 0.0], [1e-3, 0.0], 600, fp32) == pytest.approx([26e-3, 16 * fp32])
    # Half types are summed in float32: nothing to speak of beside their own rounding.
    assert gate.calibrated(values[:1], [0.0], [1.0], 600, bf16) == pytest.approx([16.0], rel=1e-4)


def test_a_sum_one_by_one_rounds_as_derived():
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(600, 2000, generator=generator)
    total = torch.zeros(2000)
    for row in terms:
        total += row
    exact = terms.double().sum(0)
    roundoffs = gate.rms(total - exact) / gate.rms(exact) / gate.unit_roundoff(torch.float32)
    # A rounding is less than half a unit in the last place: a third of it on the average of a number's binade.
    assert 0.2 < roundoffs / gate.summation(600) < 1


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


class Scales(nn.Module):
    """Two parameters of one MiB, whose gradients are all that its backward makes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(mebibyte())
        self.b = nn.Parameter(mebibyte())

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.a).sum() + (x * self.b).sum()


def test_peak_leaves_out_standing_gradients_of_parameters():
    module, x, cotangent = Scales(), torch.ones(1), [torch.ones(())]
    of = dataclasses.replace(tiny(), image=True)
    given = providers.subject(module, of, torch.device("cpu"), contextlib.nullcontext)
    alone = memory.tracked_peak_bytes(measure._step(of, given, [x], cotangent), [x, *given.standing])
    with measure._standing_gradients(given.parameters.values()) as gradients:
        update = measure._update(of, given, [x], cotangent)
        beside = memory.tracked_peak_bytes(update, [x, *given.standing, *gradients])
        assert module.a.grad.sum() == MIB // 4
    assert module.a.grad is None
    assert 2 * MIB <= alone < 2.1 * MIB  # both gradients are results
    assert MIB <= beside < 1.1 * MIB  # each is added to the one that stands, then freed


# --- Traffic -------------------------------------------------------------------------------------------------


def moved(function: Callable[..., object], *tensors: Tensor, plan: str = "cpu") -> int:
    counted: dict[str, int] = {}
    with traffic.Counter(counted, traffic.PLANS[plan]):
        function(*tensors)
    return sum(counted.values())


def test_traffic_of_known_operators():
    x, y = mebibyte(), mebibyte()
    assert moved(torch.add, x, y) == 3 * MIB
    assert moved(lambda x: x.add_(1), x) == 2 * MIB
    assert moved(lambda x, y: x.copy_(y), x, y) == 2 * MIB
    assert moved(lambda x: x.zero_(), x) == MIB
    assert moved(lambda x: x.view(2, -1)[:, ::2].t().detach(), x) == 0
    assert moved(torch.empty_like, x) == 0
    assert moved(torch.zeros_like, x) == MIB
    assert moved(lambda x: x.expand(8, -1).clone(), x) == 9 * MIB  # a broadcast reads what there is
    assert moved(lambda x: x.sum(), x) == MIB + 4
    assert moved(lambda x, y: torch.cat([x, y]), x, y) == 4 * MIB
    assert moved(lambda x: x.chunk(4)[0] * 2, x) == MIB // 2


@pytest.mark.parametrize("mask", [(True, True, False), (True, False, False), (False, True, True)], ids=str)
def test_traffic_of_a_convolutions_backward_follows_what_is_asked_for(mask):
    x, weight, grad = torch.zeros(2, 8, 16, 16), torch.zeros(4, 8, 1, 1), torch.zeros(2, 4, 16, 16)

    def backward() -> object:
        return torch.ops.aten.convolution_backward(
            grad, x, weight, [4], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, list(mask)
        )

    need_x, need_weight, need_bias = mask
    read = grad.nbytes + need_x * weight.nbytes + need_weight * x.nbytes
    assert moved(backward) == read + need_x * x.nbytes + need_weight * weight.nbytes + need_bias * 16


def test_traffic_of_our_operators_is_that_of_their_kernels():
    from wavemix_kernels.ops.mlp import op as pointwise_mlp
    from wavemix_kernels.ops.norm import batch_norm

    with FakeTensorMode():
        x, second, grad, mean = (torch.zeros(shape) for shape in ((2, 8, 4, 4), (2, 4, 4, 4), (2, 8, 4, 4), (8,)))
        image, half = traffic.footprint(x), traffic.footprint(second)
        norm = moved(lambda: batch_norm.backward(grad, x, mean, mean, None, True, False, "auto"))
        assert norm == 5 * image + 4 * 32  # two passes over grad and x, dx, four vectors
        w1, b1, w2, b2 = (torch.zeros(shape) for shape in ((16, 12), (16,), (8, 16), (8,)))
        weights = 4 * (16 * 12 + 16 + 8 * 16 + 8)
        arguments = grad, x, second, None, None, w1, b1, w2, b2, 0.0, None
        once = (image + image + half) + weights + image + half + weights  # read; the gradients of x, second and weights
        assert moved(lambda: pointwise_mlp.backward(*arguments, False, "auto")) == once
        # Two kernels read grad, x and second.
        mlp = once + image + image + half
        assert moved(lambda: pointwise_mlp.backward(*arguments, False, "auto"), plan="gpu") == mlp
        assert moved(lambda: pointwise_mlp.backward(*arguments, True, "auto"), plan="gpu") == mlp + image  # the output


def test_traffic_of_the_upsamplings_gradients():
    from wavemix_kernels.ops.deconv import op as deconv

    def last(*shape: int) -> Tensor:
        return torch.zeros(shape).to(memory_format=torch.channels_last)

    with FakeTensorMode():
        u, y, grad = last(64, 40, 8, 8), last(64, 36, 16, 16), last(64, 36, 16, 16)
        weight, mean = torch.zeros(40, 36, 4, 4), torch.zeros(36)
        gradients = moved(lambda: deconv.norm_backward(grad, y, mean, mean, None, True, u, weight, "auto"))
        wide, narrow = traffic.footprint(y), traffic.footprint(u)
        small = 20 * traffic.footprint(mean) + 2 * traffic.footprint(weight)
        # grad and y for BatchNorm's sums and again for both gradients; u, and its own.
        assert 0 <= gradients - (4 * wide + 2 * narrow) < small


# Hand counts of upstream's operations, in sizes of the input.
@pytest.mark.parametrize(
    "name, forward, backward",
    [
        ("Waveblock L1, C=192", 13.5, 17.0),
        ("Waveblock L3, C=192", 21.4, 29.4),
        ("Waveblock L4, C=192", 23.6, 34.5),
        ("PATM fc, C=64", 73, 143),
    ],
)
@needs_extras
def test_upstreams_traffic_is_that_of_a_hand_count(name, forward, backward):
    assert traffic.count(name, "upstream").totals == pytest.approx((forward, backward), rel=0.07)


def over(plan: str, name: str, at: int, reason: str) -> Any:
    return pytest.param(plan, name, at, marks=pytest.mark.xfail(strict=True, reason=reason))


@pytest.mark.parametrize(
    "plan, name, at",
    [
        ("cpu", "Waveblock L1, C=192", 0),
        ("cpu", "Waveblock L1, C=192", 1),
        ("cpu", "Waveblock L3, C=192", 0),
        ("cpu", "Waveblock L3, C=192", 1),
        ("cpu", "Waveblock L4, C=192", 0),
        ("cpu", "Waveblock L4, C=192", 1),
        ("cpu", "PATM fc, C=64", 0),
        ("cpu", "PATM fc, C=64", 1),
        over("gpu", "Waveblock L1, C=192", 0, "the statistics' own pass over the upsampling's output"),
        over("gpu", "Waveblock L1, C=192", 1, "batch norm in passes of its own, the MLP's inputs read twice"),
        over("gpu", "Waveblock L3, C=192", 0, "as level 1"),
        over("gpu", "Waveblock L3, C=192", 1, "as level 1"),
        over("gpu", "Waveblock L4, C=192", 0, "as level 1"),
        over("gpu", "Waveblock L4, C=192", 1, "as level 1"),
        ("triton", "Waveblock L1, C=192", 0),
        ("triton", "Waveblock L1, C=192", 1),
        ("triton", "Waveblock L3, C=192", 0),
        ("triton", "Waveblock L3, C=192", 1),
        ("triton", "Waveblock L4, C=192", 0),
        ("triton", "Waveblock L4, C=192", 1),
        over("gpu", "PATM fc, C=64", 0, "22.02: 9 convolutions, 7 phase_aggregate, 4 branch_sum, 2 statistics"),
        over("gpu", "PATM fc, C=64", 1, "50.06: 20 convolutions, 17 phase_aggregate_backward, 7 phases made again"),
    ],
)
def test_traffic_stays_within_the_budget(plan, name, at):
    budget = traffic.BUDGETS[name]
    assert traffic.count(name, plan).totals[at] <= (budget.forward, budget.backward)[at]


def test_traffic_around_the_mixers_of_a_wave_block():
    """Each branch: x read for statistics; read and normalised, twice; x, branch and sum; and the norm's gradient, which
    reads two images for its sums, then three, and writes one."""
    from wavemix_kernels.wavemlp import MyNorm, WaveBlock

    made = traffic.traffic(
        lambda: WaveBlock(64, norm_layer=MyNorm), (32, 64, 28, 28), traffic.PLANS["gpu"], channels_last=True
    )
    forward, backward = (
        {name.removeprefix("wavemix_kernels::pre_norm_"): count for name, count in one.items() if "pre_norm" in name}
        for one in (made.forward, made.backward)
    )
    assert forward == pytest.approx({"stats": 2 * 1, "apply": 2 * 2, "join": 2 * 3}, rel=0.01)
    assert backward == pytest.approx({"apply": 2 * 2, "backward": 2 * 6}, rel=0.01)


def test_traffic_prints_a_table(capsys):
    assert cli.main(["traffic"]) == 0
    printed = capsys.readouterr().out
    for name in traffic.BUDGETS:
        assert name in printed
    for operator in ("wavemix_kernels::pointwise_mlp_backward", "aten::convolution", "budget", "upstream"):
        assert operator in printed


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
