"""``warmup``: what a model's first call would wait for, beforehand, without a trace in the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wavemix_kernels as wk
from tests.models.subjects import TINY
from wavemix_kernels import cache, ops
from wavemix_kernels.ops import verify
from wavemix_kernels.warmup import Ran
from wavemix_kernels.wavemix.classification import WaveMix
from wavemix_kernels.wavemlp import WaveNet

CPU, FP32 = torch.device("cpu"), torch.float32


def wavemix() -> nn.Module:
    return WaveMix(num_classes=3, depth=1, final_dim=8, ff_channel=8, dropout=0.5)


def wavemlp() -> nn.Module:
    return WaveNet(**TINY, num_classes=3, drop_path_rate=0.5)


MODELS = pytest.mark.parametrize("make", [wavemix, wavemlp])


@pytest.fixture
def tested(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> list[tuple[Any, ...]]:
    """The self-tests run, on a CPU that has to prove its kernels."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    cache.forget()
    monkeypatch.setattr(verify, "DEVICES", {"cpu"})
    monkeypatch.setattr(verify, "MODE", "")
    ran: list[tuple[Any, ...]] = []
    examine = verify.examine
    monkeypatch.setattr(verify, "examine", lambda *call: (ran.append(call), examine(*call))[1])
    return ran


def step(model: nn.Module, x: Tensor) -> None:
    model(x)[0].sum().backward()


@MODELS
def test_afterwards_nothing_is_left_to_verify(
    make: Callable[[], nn.Module], tested: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = make(), torch.randn(2, 3, 32, 32)
    report = wk.warmup(model, x, train=True)
    assert tested
    assert {call[0] for call in tested} <= set(ops.OPS)
    assert not report.refused
    monkeypatch.setattr(verify, "_capturing", lambda device: True)  # now nothing can be
    step(model, x)


@MODELS
@pytest.mark.parametrize("train", [False, True])
def test_the_model_and_the_random_state_stay(make: Callable[[], nn.Module], train: bool) -> None:
    model, x = make().train(not train), torch.randn(2, 3, 32, 32, requires_grad=True)
    step(model, x)
    hooks: list[Any] = []
    weight = next(model.parameters())
    weight.register_post_accumulate_grad_hook(hooks.append)
    twin, grads = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in (*model.parameters(), x)]
    random = torch.get_rng_state()
    wk.warmup(model, x, train=train)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training is not train
    assert not hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin[name]), name
    for p, grad in zip((*model.parameters(), x), grads, strict=True):
        assert torch.equal(p.grad, grad)


def test_the_report_names_what_ran() -> None:
    inference, training = (wk.warmup(wavemix(), torch.randn(2, 3, 32, 32), train=train) for train in (False, True))
    assert Ran("reduce_haar", "cpu", FP32, CPU) in inference.ran
    assert Ran("pointwise_mlp_backward", "cpu", FP32, CPU) in training.ran
    assert not any("backward" in r.op for r in inference.ran)
    assert str(inference).startswith("warmup: forward in ")
    assert str(training).startswith("warmup: forward and backward in ")
    assert "\n  cpu on cpu, float32: reduce_haar, " in str(training)
    with wk.backend("reference"):
        report = wk.warmup(wavemix(), torch.randn(2, 3, 32, 32))
    assert {r.backend for r in report.ran} == {"reference"}
    assert "no operator of wavemix_kernels was called" in str(wk.warmup(nn.ReLU(), torch.ones(1)))


def test_the_report_names_what_is_refused(tested: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = ops.load("pointwise_mlp")
    monkeypatch.setattr(mlp, "self_test", lambda backend, device, dtype: (1.0, 1e-6))
    with pytest.warns(RuntimeWarning, match="pointwise_mlp, backend 'cpu'"):
        report = wk.warmup(wavemix(), torch.randn(2, 3, 32, 32))
    assert Ran("pointwise_mlp", "reference", FP32, CPU) in report.ran
    assert Ran("reduce_haar", "cpu", FP32, CPU) in report.ran
    (fault,) = report.refused
    assert f"\n  refused: {fault}" in str(report)


def test_arguments_in_containers_are_copied() -> None:
    class Model(nn.Module):
        def forward(self, inputs: dict[str, list[Tensor]]) -> dict[str, Tensor]:
            return {"out": wk.haar_dwt2d(inputs["x"][0].mul_(2))[0]}

    x = torch.ones(1, 1, 4, 4)
    wk.warmup(Model(), {"x": [x]})
    assert torch.equal(x, torch.ones(1, 1, 4, 4))


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got function"):
        wk.warmup(lambda x: x, torch.ones(1))
    with pytest.raises(ValueError, match="train=True, but no output of the model has a gradient"):
        wk.warmup(nn.ReLU(), torch.ones(1), train=True)


def test_a_capture_is_no_time_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="warmup: a CUDA graph is being captured; call it before"):
        wk.warmup(nn.ReLU(), torch.ones(1))
