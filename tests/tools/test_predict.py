"""Predictions: the page that is generated, the passes of an ideal compiler, the way from steps to tables."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import cli
from benchmarks.predict import executed, measured, report, rivals, steps, terminal
from benchmarks.predict.cli import _kernels
from benchmarks.predict.device import relocated
from benchmarks.predict.profile import Profile
from benchmarks.predict.record import Array, Launch

BF16 = torch.bfloat16
IMAGE = (4, 8, 16, 16)
BYTES = 2 * math.prod(IMAGE)


def array(place: int, shape: tuple[int, ...] = IMAGE) -> Array:
    """A dense tensor; those of different places do not overlap."""
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return Array(BF16, shape, strides, (1 << 44) + (place << 20), 2 * math.prod(shape))


def aten(name: str, inputs: list[Array], *outputs: Array, rest: tuple[Any, ...] = ()) -> Launch:
    arrays = (*inputs, *outputs)
    return Launch("aten", f"aten::{name}", "", sum(a.bytes for a in arrays), arrays, args=(*inputs, *rest))


def convolution(x: Array, weight: Array, y: Array) -> Launch:
    return aten("convolution", [x, weight], y, rest=(None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1))


def bytes_of(*launches: Launch) -> list[float]:
    return [made.bytes for made in rivals.compiled(launches)]


def test_the_page_is_generated() -> None:
    assert report.PAGE.read_text(encoding="utf-8") == report.page(report.load()), (
        "run: python -m benchmarks predict --write"
    )


def test_pointwise_operators_are_one_pass() -> None:
    x, y, z, out = (array(i) for i in range(4))
    assert bytes_of(aten("mul", [x, y], z), aten("tanh", [z], out)) == [3 * BYTES]


def test_a_product_needs_its_input_in_memory() -> None:
    x, hidden, weight, y, out = array(0), array(1), array(2, (8, 8, 1, 1)), array(3), array(4)
    launches = aten("tanh", [x], hidden), convolution(hidden, weight, y), aten("tanh", [y], out)
    assert bytes_of(*launches) == [2 * BYTES, 2 * BYTES + weight.bytes, 2 * BYTES]


def test_normalisation_is_two_passes() -> None:
    x, y, mean, spread, out = array(0), array(1), array(2, (8,)), array(3, (8,)), array(4)
    norm = aten("native_batch_norm", [x], y, mean, spread, rest=(None, None, None, None, True, 0.1, 1e-5))
    small = mean.bytes + spread.bytes
    assert bytes_of(norm, aten("relu", [y], out)) == [BYTES + small, 2 * BYTES + small]


def test_backward_makes_values_again_and_joins_no_pass_of_forward() -> None:
    x, hidden, weight, y, grad, out = array(0), array(1), array(2, (8, 8, 1, 1)), array(3), array(4), array(5)
    forward = [aten("tanh", [x], hidden), convolution(hidden, weight, y)]
    sine, twice = array(6), array(7)
    backward = [aten("sin", [x], sine), aten("mul", [sine, grad], out), aten("mul", [hidden, out], twice)]
    assert [made.bytes for made in rivals.compiled(forward, backward)][2:] == [4 * BYTES]


def test_the_output_is_written_before_backward_begins() -> None:
    x, y, z, grad, out = (array(i) for i in range(5))
    forward = [aten("tanh", [x], y), aten("mul", [y, x], z)]
    assert [made.bytes for made in rivals.compiled(forward, [aten("mul", [grad, y], out)])] == [2 * BYTES, 3 * BYTES]


@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_a_convolution(transposed: bool) -> None:
    large, small = array(0, (2, 6, 8, 8)), array(1, (2, 4, 4, 4))
    x, y = (small, large) if transposed else (large, small)
    weight = array(2, (4, 6, 2, 2))
    launch = aten("convolution", [x, weight], y, rest=(None, [2, 2], [0, 0], [1, 1], transposed, [0, 0], 1))
    assert rivals.flops(launch) == 2 * 2 * 4 * 4 * 4 * 6 * 2 * 2
    backward = aten(
        "convolution_backward", [y, x, weight], x, weight,
        rest=(None, [2, 2], [0, 0], [1, 1], transposed, [0, 0], 1, [True, True, False]),
    )  # fmt: skip
    assert rivals.flops(backward) == 2 * rivals.flops(launch)


def test_repeated_blocks_are_one_launch_to_predict() -> None:
    x, y = array(3), array(5)
    half = replace(x, shape=(4, 4, 16, 16), address=x.address + 512, bytes=x.bytes // 2)
    words = b"".join(a.address.to_bytes(8, "little") for a in (x, y, half)) + b"\1\0\0\0"

    def at(offset: int, parameters: bytes) -> Launch:
        arrays = tuple(replace(a, address=a.address + offset) for a in (x, y, half))
        return Launch("cuda", "kernel", "op", 1, arrays, args=arrays[:1], parameters=parameters)

    one = relocated(at(0, words))
    moved = b"".join((a.address + (9 << 20)).to_bytes(8, "little") for a in (x, y, half)) + b"\1\0\0\0"
    assert relocated(at(9 << 20, moved)) == one
    first, _, third = one.arrays
    assert third.address - first.address == 512
    assert one.parameters[:8] == first.address.to_bytes(8, "little")
    assert one.parameters[24:] == b"\1\0\0\0"


def test_accesses_are_scaled_to_what_was_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where the sources are others by now, nor where data decide the way."""
    row = {"source": executed.source("phase_statistics"), "guessed": 0} | dict.fromkeys(executed.SCALED, (4, 5))
    rows = {"phase_statistics": row, "reduce_haar": row, "phase_forward": row | {"guessed": 1}}
    monkeypatch.setattr(executed, "records", lambda: rows)
    assert [executed.scales(name) for name in ("reduce_haar", "phase_forward", "patm_mix")] == [{}, {}, {}]
    found = Profile("", 1, 32, 1, requests=4, asked=8, passes=12, shared_clocks=20, loaded={0: 64}, stored={9: 32})
    scaled = executed.scaled(found, executed.scales("phase_statistics"))
    assert (scaled.requests, scaled.asked, scaled.passes, scaled.shared_clocks) == (5, 10, 15, 23)
    assert (scaled.loaded, scaled.stored, found.loaded) == ({0: 80}, {9: 40}, {0: 64})


def test_every_record_names_a_kernel() -> None:
    for kernel in executed.records():
        assert len(executed.source(kernel)) == 16


def test_steps_have_names_of_their_own() -> None:
    names = [step.name for step in steps.steps()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--gpu", "v100"], 2, "invalid choice: 'v100'"),
        (["--case", "nothing*"], 2, "--case 'nothing*': nothing has such a name"),
        (["--kernels", "--case", "cuda haar *"], 2, "--kernels: --case 'cuda haar *' names no step"),
        (["--kernels", "--write"], 2, "--kernels: --write has no place for it"),
        (["--list", "--case", "patm/*"], 0, "patm/fc/nchw/64x64x56x56"),
    ],
)
def test_command_line(arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", *arguments]) == status
    printed = capsys.readouterr()
    said = printed.err if status else printed.out
    assert words in said
    assert len(said.splitlines()) == 1


def test_tables_fit_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    data = report.load()
    monkeypatch.setenv("COLUMNS", "80")
    narrow = terminal.steps(data, "h100", wide=False)
    assert max(map(len, narrow)) <= 80
    whole = terminal.steps(data, "h100", wide=True)
    assert len(whole) == len(narrow)
    monkeypatch.setenv("COLUMNS", str(max(map(len, whole))))
    assert terminal.steps(data, "h100", wide=False) == whole
    line = next(one for one in report.lines(data, "h100") if one.training)
    for lines in (narrow, whole):
        assert re.search(rf"{line.step.title} .*{re.escape(line.bound)}", "\n".join(lines))


@pytest.mark.prove
def test_the_parts_of_a_step_add_up() -> None:
    (step,) = (one for one in steps.steps() if one.name.startswith("haar/J1/nchw"))
    command = [sys.executable, "-m", "benchmarks", "predict", "--kernels", "--case", step.name]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=report.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for part in done.stdout.strip().split("\n\n"):
        title, _, *rows = part.splitlines()
        whole = float(re.search(r"device ([\d.]+) us", title)[1])
        assert sum(float(row.split()[0]) for row in rows) == pytest.approx(whole, abs=0.5 * len(rows) + 0.5)
        assert any("haar" in row for row in rows)


@pytest.mark.prove
def test_a_step_is_predicted_and_timed() -> None:
    environment = {**os.environ, "COLUMNS": "300"}
    del environment["TRITON_INTERPRET"]  # nothing is launched under it
    command = [sys.executable, "-m", "benchmarks", "predict", "--gpu", "a100", "--case", "haar/J1/nchw/*"]
    done = subprocess.run(command, cwd=report.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"A100.*training, predicted", done.stdout)
    assert len(re.findall("Haar, 1 level, nchw", done.stdout)) == 2


def test_measured_kernels_beside_predicted_ones() -> None:
    ours = Launch("cuda", "_ZN7wavemix4haar13analysis_rowsILi4EEEvNS_6ParamsE", "haar_analysis", 0)
    triton = Launch("triton", "_apply_kernel", "batch_norm", 0)
    norm = aten("mul", [array(0), array(1)], array(2))
    seen = [
        {"name": "void wavemix::haar::(anonymous namespace)::analysis_rows<(int)4>(wavemix::Params)", "launches": 2,
         "us": 50.0},
        {"name": "_apply_kernel", "launches": 1, "us": 9.0},
        {"name": "void wavemix::haar::synthesis_rows<float>(wavemix::Params)", "launches": 1, "us": 8.0},
        {"name": "void at::native::(anonymous namespace)::mul<float>(float*)", "launches": 1, "us": 5.0},
        {"name": "Memset (Device)", "launches": 1, "us": 1.0},
    ]  # fmt: skip
    found = measured.pairs([(ours, 2e-5), (ours, 2e-5), (triton, 6e-6), (norm, 4e-6)], seen)
    assert [(pair.name, pair.launches) for pair in found] == [
        ("analysis_rows", (2, 2)), ("_apply_kernel", (1, 1)), ("synthesis_rows", (0, 1)), ("library", (1, 2))
    ]  # fmt: skip
    assert [pair.predicted for pair in found] == pytest.approx([4e-5, 6e-6, 0, 4e-6])
    assert [pair.measured for pair in found] == pytest.approx([5e-5, 9e-6, 8e-6, 6e-6])
    lines = terminal.compared(
        measured.Compared(steps.steps()[0], True, found, 3e-5, 9e-5), measured.CHIPS["h200"], "an H200"
    )
    assert lines[1] == "Haar, 1 level, nchw, training: predicted for H200 SXM, measured on an H200"
    assert lines[3].split() == ["40.0", "50.0", "1.25x", "2", "/", "2", "analysis_rows"]
    assert lines[-3].split()[:3] == ["50.0", "73.0", "1.46x"]


@pytest.mark.parametrize("gpu, capability, chip", [
    ("NVIDIA H200", "9.0", "h200"), ("NVIDIA H100 80GB HBM3", "9.0", "h100"), ("NVIDIA A30", "8.0", "a100"),
])  # fmt: skip
def test_the_chip_that_was_measured(gpu: str, capability: str, chip: str) -> None:
    assert measured.chip_of({"gpu": gpu, "compute_capability": capability}) == chip


def test_files_and_chips_that_cannot_be_compared(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no GPU, compute capability None: not in the table"):
        measured.chip_of({})
    (tmp_path / "other.json").write_text("[]")
    for path in (tmp_path / "none.json", tmp_path / "other.json"):
        assert cli.main(["predict", "--measured", str(path)]) == 2
        assert f"--measured {path}: expected the kernels.json" in capsys.readouterr().err
    assert cli.main(["predict", "--measured", "x", "--write"]) == 2


def test_new_rows_take_the_place_of_a_cases_old_ones():
    one, two = "triton mlp gradients 192|0 to 384 to 192, 64x8x8 pixels", "cuda haar analysis L1 nchw 4x64x256x256"
    old = {f"{one}: _backward_x_kernel": 1, f"{one}: _backward_weight_kernel": 2, two: 3, "triton gone": 4}
    assert list(_kernels(old, {one: 5}).items()) == [(two, 3), (one, 5)]
    assert _kernels(old, {}) == {name: row for name, row in old.items() if name != "triton gone"}
