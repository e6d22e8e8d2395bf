"""The benchmarks' measurements: the gate in front of every number, memory of known programs, clocks and traffic."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import cli
from benchmarks.cases import transforms as cases_transforms
from benchmarks.cases import wavemix as cases_wavemix
from benchmarks.cases import wavemlp as cases_wavemlp
from benchmarks.harness import case, gate, machine, measure, memory, photographs, providers, traffic
from tests.tools.helpers import needs
from tests.tools.test_benchmarks_cli import needs_extras, tiny
from wavemix_kernels import clock
from wavemix_kernels.ops.deconv import op as deconv
from wavemix_kernels.ops.mlp import op as pointwise_mlp
from wavemix_kernels.ops.norm import batch_norm
from wavemix_kernels.wavemix.classification import WaveMixLite
from wavemix_kernels.wavemlp import MyNorm, WaveBlock

MIB = 2**20
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here compares a time with the roof, and a large product in bfloat16 takes seconds."""
    monkeypatch.setitem(machine.MATMUL_SIDE, "cpu", 64)


def meter(**options: Any) -> measure.Meter:
    return measure.Meter(CPU, clock.Effort(0.0, 1, 1), **options)


# --- Gate ----------------------------------------------------------------------------------------------------


def tiny_model(training: bool, **options: Any) -> case.Case:
    def model(**arguments: Any) -> nn.Module:
        return WaveMixLite(final_dim=8, depth=2, upsample="deconv", **arguments)

    return cases_wavemix.model_case("tiny", model, True, (6, 3, 16, 16), training, **options)


TRANSFORMS = [
    cases_transforms.transform_case(*row[:-1], (2, 3, 128) if len(row[-1]) == 3 else (1, 2, 32, 32), backward=True)
    for row in cases_transforms._PLAN
]
PATM_FC, SLOW = cases_wavemlp.patm_case("fc", (4, 8, 5, 9), True), pytest.mark.prove


@pytest.mark.parametrize("of", [
    tiny_model(True), tiny_model(False), tiny_model(True, autocast=torch.bfloat16, judged=4),
    PATM_FC, cases_wavemlp.patm_case("depthwise", (2, 8, 5, 9), True),
    cases_wavemlp.patm_case("fc", (4, 8, 5, 9), True, autocast=torch.bfloat16, judged=2),
    *TRANSFORMS,
    pytest.param(cases_wavemlp.model_case("wavemlp", "T_dw", (2, 3, 64, 64), True), marks=SLOW),
    pytest.param(cases_wavemlp.model_case("wavemlp", "S", (1, 3, 32, 32), False), marks=SLOW),
], ids=lambda of: of.name)  # fmt: skip
@needs_extras
def test_blocks_and_models_pass_their_gate(of):
    names = ["upstream", "reference", "ours"]
    if of.group == "wavemix" and of.autocast is not None:
        names.remove("upstream")  # the backward of pytorch_wavelets' transforms fails under autocast
    for row in meter().measure(of, names):
        assert row.status == "ok", (row.provider, row.reason)
        assert 0 < row.error <= 1
        assert row.flops > 0 if of.tensor_cores else row.flops is None
        assert (row.saved_bytes is None) != of.backward
        frames = of.inputs()[0].shape[0] / row.median_ms * 1e3 if of.image else None
        assert row.frames_per_second == (frames and pytest.approx(frames))
        assert row.gbps is None or not of.image


@needs_extras
def test_a_gate_of_the_first_images_says_the_same_of_the_step():
    whole, first = (measure._Task.of(dataclasses.replace(PATM_FC, judged=n), CPU) for n in (None, 2))
    assert [task.judged[0].shape[0] for task in (whole, first)] == [4, 2]
    assert [task.inputs[0].shape[0] for task in (whole, first)] == [4, 4]
    assert whole.flops == first.flops > 0
    assert whole.ideal_bytes == first.ideal_bytes > 0


def test_wrong_parameters_of_a_model_are_refused():
    right = tiny_model(True)

    def unscaled(setting: case.Setting) -> case.Forward:
        model = right.makers["ours"](setting)
        with torch.no_grad():
            model.layers[0].feedforward[5].weight.mul_(1.001)
        return model

    (row,) = meter().measure(dataclasses.replace(right, makers=right.makers | {"ours": unscaled}), ["ours"])
    assert row.status == "wrong"


def test_past_the_limit_nothing_is_compiled():
    found = meter(may_compile=lambda seconds: False).measure(tiny(False), ["reference", "compile"])
    assert {row.provider: row.status for row in found} == {"reference": "ok", "compile": "skipped"}


def test_ours_compiled_is_judged_as_the_others_are():
    rows = meter().measure(tiny(False), ["reference", "ours+compile", "ours+graph", "reduce-overhead"])
    found = {row.provider: row for row in rows}
    assert found["ours+compile"].status == "ok"
    assert 0 <= found["ours+compile"].error <= 1
    for name in ("ours+graph", "reduce-overhead"):
        assert (found[name].status, found[name].reason) == ("unavailable", "CUDA graphs need a GPU")


@pytest.mark.parametrize("right", [True, False])
def test_a_graph_is_judged_by_its_replays(right, monkeypatch):
    """By a stand-in whose replays are right, or a tenth off."""
    captures = []

    def captured(step):
        captures.append(step)
        return step if right else lambda: [value * 1.1 for value in step()]

    monkeypatch.setattr(measure.graphs, "captured", captured)
    monkeypatch.setattr(providers.graphs, "why_not", lambda device: None)
    (row,) = meter().measure(tiny_model(True), ["ours+graph"])
    assert (row.status, row.peak_bytes, row.saved_bytes) == ("ok" if right else "wrong", None, None), row.reason
    assert len(captures) == (2 if right else 1)  # the exact twin's for the gate, and the timed step's


def test_gate_admits_rounding_and_refuses_more():
    exact = torch.linspace(1, 2, 100, dtype=torch.float64)
    rounded = exact.to(torch.bfloat16)
    limits = gate.elementwise([exact], [1], gate.unit_roundoff(torch.bfloat16))
    assert gate.judge(["y"], [rounded], [exact], limits).reason is None
    rounded[7] += 0.02  # more than one spacing of bfloat16 between 1 and 2, 1/128
    assert "y is off by" in gate.judge(["y"], [rounded], [exact], limits).reason
    one = torch.ones(3, dtype=torch.float64)
    for names, made, said in [
        ("y", torch.ones(4), "shape"), ("yz", torch.ones(3), "1 tensors, expected 2"), ("y", one * math.nan, "finite")
    ]:  # fmt: skip
        assert said in gate.judge(list(names), [made], [one] * len(names), [1.0] * len(names)).reason


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
    terms = torch.randn(600, 2000, generator=torch.Generator().manual_seed(0))
    total = functools.reduce(torch.add, terms)
    exact = terms.double().sum(0)
    roundoffs = gate.rms(total - exact) / gate.rms(exact) / gate.unit_roundoff(torch.float32)
    # A rounding is less than half a unit in the last place: a third of it on the average of a number's binade.
    assert 0.2 < roundoffs / gate.summation(600) < 1


# --- Memory --------------------------------------------------------------------------------------------------


def mebibyte() -> Tensor:
    return torch.zeros(MIB // 4)


def test_tracker_counts_live_storages_once():
    x = mebibyte()
    with memory.LiveBytes([x]) as live:
        y = x + 1
        assert live.live == MIB
        view = y[::2].reshape(-1, 2)  # a view shares its storage; x's own is known
        x.add_(1)
        assert live.live == MIB
        z = y * 2
        del y
        assert live.live == live.peak == 2 * MIB  # the view keeps it
        del view
        assert live.live == MIB
        z.resize_(3 * MIB // 4)
        assert live.live == live.peak == 3 * MIB
        del z
        assert (live.live, live.peak) == (0, 3 * MIB)


def test_peak_of_a_known_program_by_both_observers():
    x = mebibyte()

    def chain() -> Tensor:
        """Holds two intermediates at once and returns a third: three storages of x's size at the peak."""
        first, second = x + 1, x * 2
        return first * second

    assert memory.tracked_peak_bytes(chain, [x]) == memory.peak_bytes(chain, CPU) == 3 * MIB


def test_allocator_log_sees_inside_operators():
    scores = torch.zeros(64, 1024)
    # logsumexp's C++ makes an exp of the whole input; its result has 64 elements.
    assert memory.tracked_peak_bytes(lambda: scores.logsumexp(1), [scores]) < 4096
    assert memory.peak_bytes(lambda: scores.logsumexp(1), CPU) >= scores.nbytes


def test_saved_bytes_leave_out_inputs_and_parameters():
    x, weight = mebibyte().requires_grad_(), mebibyte().requires_grad_()
    assert memory.saved_bytes(lambda: x * weight, [x, weight]) == 0
    # exp keeps its result, sin its argument: one storage, saved twice.
    assert memory.saved_bytes(lambda: x.exp().sin(), [x]) == MIB
    linear = nn.Linear(256, 1024, bias=False)
    rows = torch.zeros(256, 256, requires_grad=True)
    assert memory.saved_bytes(lambda: linear(rows).relu(), [rows, *linear.parameters()]) == 256 * 1024 * 4


class Scales(nn.Module):
    """Two parameters of one MiB, whose gradients are all that its backward makes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(mebibyte()), nn.Parameter(mebibyte())

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.a).sum() + (x * self.b).sum()


def test_peak_leaves_out_standing_gradients_of_parameters():
    module, x, cotangent = Scales(), torch.ones(1), [torch.ones(())]
    of = dataclasses.replace(tiny(), image=True)
    given = providers.subject(module, of, CPU, contextlib.nullcontext)
    alone = memory.tracked_peak_bytes(measure._step(of, given, [x], cotangent), [x, *given.standing])
    with measure._standing_gradients(given.parameters.values()) as gradients:
        update = measure._update(of, given, [x], cotangent)
        beside = memory.tracked_peak_bytes(update, [x, *given.standing, *gradients])
        assert module.a.grad.sum() == MIB // 4
    assert module.a.grad is None
    assert 2 * MIB <= alone < 2.1 * MIB  # both gradients are results
    assert MIB <= beside < 1.1 * MIB  # each is added to the one that stands, then freed


# --- Inputs and clocks ---------------------------------------------------------------------------------------


@needs_extras
def test_photographs_are_reproducible_and_real():
    crops, maps = photographs.crops(9, 40, 600, seed=1), photographs.feature_maps(2, 16, 32, 48)
    assert (crops.shape, maps.shape) == ((9, 3, 40, 600), (2, 16, 32, 48))  # wider than chelsea: mirrored
    assert torch.equal(crops, photographs.crops(9, 40, 600, seed=1))
    assert not torch.equal(crops, photographs.crops(9, 40, 600, seed=2))
    assert 0 <= crops.min() <= crops.max() <= 1
    assert crops.flatten(1).std(1).min() > 0.01  # no crop is flat
    torch.testing.assert_close(maps.mean((0, 2, 3)), torch.zeros(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(maps.std((0, 2, 3), unbiased=False), torch.ones(16), atol=1e-4, rtol=0)


def test_noise_takes_the_place_of_photographs(monkeypatch):
    """Reproducible, in range, and smooth as photographs are."""
    monkeypatch.setattr(photographs, "_folder", lambda: None)
    crops = photographs.crops(9, 40, 600)
    assert torch.equal(crops, photographs.crops(9, 40, 600))
    assert not torch.equal(crops[0], crops[1])
    assert (crops.shape, 0 <= crops.min() < crops.max() <= 1) == ((9, 3, 40, 600), True)
    steps = (crops[..., 1:] - crops[..., :-1]).std() / crops.std()
    assert 0.05 < steps < 0.7  # of white noise: 1.4


def test_rounds_are_interleaved_and_their_order_changes(monkeypatch):
    order, samples = [], {}
    steps = {name: functools.partial(order.append, name) for name in "abc"}
    monkeypatch.setattr(clock.CpuClock, "repeats", lambda self, step: 1)
    clock.interleave(steps, clock.CpuClock(), clock.Effort(seconds=0.0, fewest=20, most=50), samples)
    rounds = ["".join(order[i : i + 3]) for i in range(3, len(order), 3)]  # the first three warm up
    assert {len(rounds), *map(len, samples.values())} == {20}
    assert all(sorted(one) == list("abc") for one in rounds)
    assert len(set(rounds)) > 3


def test_copy_bandwidth_is_that_of_a_copy():
    gbps = machine.copy_bandwidth(CPU, size=1 << 20)
    assert gbps.keys() == {"reused", "fresh"}
    assert all(0.01 < value < 1e5 for value in gbps.values())


def test_quantiles_interpolate():
    assert clock.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert clock.quantile([1.0, 2.0], 0.2) == pytest.approx(1.2)
    assert clock.quantile([5.0], 0.8) == 5.0


def test_parameters_go_by_name_whatever_their_order():
    subjects = []
    for names in ("ab", "ba"):
        block = nn.Module()
        for name in names:
            block.register_parameter(name, nn.Parameter(torch.zeros(1)))
        subjects.append(providers.subject(block, tiny(), CPU, None))
    assert [list(subject.parameters) for subject in subjects] == [["a", "b"], ["a", "b"]]


# --- Memory traffic: known operators, our kernels, upstream by hand, and the budgets ---------------------


def moved(function: Callable[..., object], *tensors: Tensor, plan: str = "cpu") -> int:
    counted: dict[str, int] = {}
    with traffic.Counter(counted, traffic.PLANS[plan]):
        function(*tensors)
    return sum(counted.values())


def test_known_operators():
    x, y = torch.zeros(MIB // 4), torch.zeros(MIB // 4)
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
def test_a_convolutions_backward_follows_what_is_asked_for(mask):
    x, weight, grad = torch.zeros(2, 8, 16, 16), torch.zeros(4, 8, 1, 1), torch.zeros(2, 4, 16, 16)
    rest = [4], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, list(mask)
    need_x, need_weight, need_bias = mask
    read = grad.nbytes + need_x * weight.nbytes + need_weight * x.nbytes
    written = need_x * x.nbytes + need_weight * weight.nbytes + need_bias * 16
    assert moved(lambda: torch.ops.aten.convolution_backward(grad, x, weight, *rest)) == read + written


def test_our_operators_move_what_their_kernels_do():
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


def test_the_upsamplings_gradients():
    with FakeTensorMode():
        shapes = (64, 40, 8, 8), (64, 36, 16, 16), (64, 36, 16, 16)
        u, y, grad = (torch.zeros(shape).to(memory_format=torch.channels_last) for shape in shapes)
        weight, mean = torch.zeros(40, 36, 4, 4), torch.zeros(36)
        gradients = moved(lambda: deconv.norm_backward(grad, y, mean, mean, None, True, u, weight, "auto"))
        wide, narrow = traffic.footprint(y), traffic.footprint(u)
        small = 20 * traffic.footprint(mean) + 2 * traffic.footprint(weight)
        # grad and y for BatchNorm's sums and again for both gradients; u, and its own.
        assert 0 <= gradients - (4 * wide + 2 * narrow) < small


@pytest.mark.parametrize("name, forward, backward", [  # by hand, in sizes of the input
    ("Waveblock L1, C=192", 13.5, 17.0), ("Waveblock L3, C=192", 21.4, 29.4), ("Waveblock L4, C=192", 23.6, 34.5),
    ("PATM fc, C=64", 73, 143),
])  # fmt: skip
@needs("bench", ["pytorch_wavelets"])
def test_upstream_moves_what_a_hand_count_says(name, forward, backward):
    assert traffic.count(name, "upstream").totals == pytest.approx((forward, backward), rel=0.07)


BLOCKS = [f"Waveblock L{level}, C=192" for level in (1, 3, 4)]
MIXER = "PATM fc, C=64"
#: Traffic over its budget, and why.
OVER = {
    **{(block, 0): "the statistics' own pass over the upsampling's output" for block in BLOCKS},
    **{(block, 1): "batch norm in passes of its own, the MLP's inputs read twice" for block in BLOCKS},
}


@pytest.mark.parametrize("at", [0, 1], ids=["forward", "backward"])
@pytest.mark.parametrize("plan, name", [
    ("cpu", MIXER), ("gpu", MIXER), *((plan, block) for plan in ("cpu", "gpu", "triton") for block in BLOCKS)
])  # fmt: skip
def test_traffic_stays_within_the_budget(plan, name, at, request):
    if plan == "gpu" and (name, at) in OVER:
        request.applymarker(pytest.mark.xfail(strict=True, reason=OVER[name, at]))
    budget = traffic.BUDGETS[name]
    assert traffic.count(name, plan).totals[at] <= (budget.forward, budget.backward)[at]


def test_traffic_around_the_mixers_of_a_wave_block():
    """Each branch, PATM by parts: x read for statistics; read and normalised, twice; x, branch and sum; and the norm's
    gradient, which reads two images for its sums, then three, and writes one."""
    build, plan = (lambda: WaveBlock(160, norm_layer=MyNorm)), traffic.PLANS["gpu"]
    made = traffic.traffic(build, (32, 160, 28, 28), plan, channels_last=True)
    forward, backward = (
        {name.removeprefix("wavemix_kernels::pre_norm_"): count for name, count in one.items() if "pre_norm" in name}
        for one in (made.forward, made.backward)
    )
    assert forward == pytest.approx({"stats": 2 * 1, "apply": 2 * 2, "join": 2 * 3}, rel=0.01)
    assert backward == pytest.approx({"apply": 2 * 2, "backward": 2 * 6}, rel=0.01)


def test_the_command_prints_a_table(capsys):
    assert cli.main(["traffic"]) == 0
    printed = capsys.readouterr().out
    wanted = ("wavemix_kernels::pointwise_mlp_backward", "wavemix_kernels::patm_whole", "budget", "upstream")
    assert not [word for word in (*traffic.BUDGETS, *wanted) if word not in printed]
