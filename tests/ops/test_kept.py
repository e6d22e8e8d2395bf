"""Tensors made of weights and kept from call to call: they are made anew where they have to be."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import wavemix_kernels
from wavemix_kernels import wavemlp
from wavemix_kernels.ops.common import kept as keeping
from wavemix_kernels.ops.common.kept import Kept


def test_captured_graphs_keep_what_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(Tensor):
        is_cuda = True  # type: ignore[assignment]

    capturing = True
    settled: list[Tensor] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(keeping, "settle", settled.append)
    source, kept = torch.ones(2).as_subclass(OnGpu), Kept()

    def folded() -> Tensor:
        return kept.get("kind", [source], lambda: (source * 2,))[0]

    assert folded() is not folded()  # made by a graph, and not there before it runs
    capturing = False
    assert not settled  # which no capture allows
    outside = folded()
    (seen,) = settled
    assert seen is outside
    del seen
    settled.clear()
    capturing = True
    assert folded() is outside
    alive = weakref.ref(outside)
    capturing = False
    source.add_(1)
    assert folded() is not outside
    del outside
    gc.collect()
    assert alive() is not None


def _forms() -> list[Any]:
    """The inference form of each block, with an image for it."""
    blocks = [
        (wavemix_kernels.FusedWaveblock(level=2, ff_channel=8, final_dim=16), 16),
        (wavemix_kernels.FusedPATM(16), 16),
        (wavemlp.WaveBlock(16), 16),
    ]
    return [pytest.param(block, channels, id=type(block).__name__) for block, channels in blocks]


@pytest.mark.parametrize(("block", "channels"), _forms())
def test_autocast_converts_weights_once(block: Any, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    form, x = wavemix_kernels.fuse_for_inference(block.eval()), torch.randn(2, channels, 8, 8)
    made: list[Any] = []
    real = Kept.get

    def get(self: Kept, kind: Any, sources: Any, make: Any) -> Any:
        return real(self, kind, sources, lambda: made.append(kind) or make())

    monkeypatch.setattr(Kept, "get", get)

    def run(module: Any, times: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        made.clear()
        with torch.no_grad(), torch.autocast("cpu", dtype):
            out = module(x)
        assert (len(made) > 0) == (times > 0), made
        with torch.no_grad(), torch.autocast("cpu", dtype):
            fresh = copy.deepcopy(module)(x)  # which keeps nothing yet
        assert torch.equal(out, fresh)
        return out

    before = run(form, 1)
    assert torch.equal(run(form, 0), before)
    run(form, 1, torch.float16)
    run(form, 0)
    with torch.inference_mode():
        run(form, 0)
    for tensor in form.buffers():
        if tensor.is_floating_point():
            tensor.mul_(1.5)
    assert not torch.equal(run(form, 1), before)
    made.clear()
    form(x)  # nothing is converted
    assert not made


def test_what_inference_mode_made_serves_a_gradient() -> None:
    form = wavemix_kernels.fuse_for_inference(wavemix_kernels.FusedWaveblock(final_dim=16).eval())
    x = torch.randn(1, 16, 8, 8)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        form(x)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        form(x).float().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
