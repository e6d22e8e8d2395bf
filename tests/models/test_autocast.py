"""Steps under autocast: backward passes that are called while it is on, and half types that a CPU does not multiply."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tests.models.subjects import normal
from wavemix_kernels import FusedPATM, FusedWaveblock, checks
from wavemix_kernels.nn.wavemix.shuffle import FusedShuffleWaveblock
from wavemix_kernels.nn.wavemlp.block import FusedWaveBlock
from wavemix_kernels.ops.common import dtypes
from wavemix_kernels.ops.deconv import deconv


class Deconv(nn.ConvTranspose2d):
    def forward(self, x: Tensor) -> Tensor:
        return deconv(x, self.weight, self.bias)


MODULES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "waveblock": (lambda: FusedWaveblock(level=2, final_dim=16, ff_channel=16, dropout=0.0), 16),
    "shuffle": (lambda: FusedShuffleWaveblock(final_dim=16, ff_channel=64, second=True, dropout=0.0), 16),
    "patm, whole": (lambda: FusedPATM(16), 16),
    "patm, parts": (lambda: FusedPATM(136), 136),
    "patm, depthwise": (lambda: FusedPATM(16, mode="depthwise"), 16),
    "wave-mlp block": (lambda: FusedWaveBlock(16, mlp_ratio=2), 16),
    "deconv": (lambda: Deconv(48, 48, 4, 2, 1), 48),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backward_inside_of_autocast_is_that_outside(name: str, dtype: torch.dtype) -> None:
    make, channels = MODULES[name]
    torch.manual_seed(0)
    module, found = make(), []
    for inside in (False, True):
        x = normal(2, channels, 8, 8, dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", dtype):
            loss = module(x).float().square().sum()
            if inside:
                found.append(torch.autograd.grad(loss, [x, *module.parameters()]))
        if not inside:
            found.append(torch.autograd.grad(loss, [x, *module.parameters()]))
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODULES)
def test_weights_are_converted_inside_as_outside(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Operators convert their weights, and give gradients in the parameters' dtype: the values of conversions by
    PyTorch. Weights of several dtypes are converted by that."""
    make, channels = MODULES[name]
    torch.manual_seed(0)
    module = make()
    x = normal(2, channels, 8, 8, dtype=torch.float32).requires_grad_()

    def step() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            out = module(x)
        return [out, *torch.autograd.grad(out.float().square().sum(), [x, *module.parameters()])]

    inside, asked = step(), list[Any]()
    monkeypatch.setattr(checks, "autocast_inside", lambda *args: asked.append(args))
    outside = step()
    assert len(asked) == {"waveblock": 1, "wave-mlp block": 2}.get(name, name.startswith("patm"))
    for got, want in zip(inside, outside, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    monkeypatch.undo()
    first = next(m for m in module.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d))
    first.to(torch.bfloat16)
    assert [t.dtype for t in step()[2:]] == [p.dtype for p in module.parameters()]


@pytest.mark.parametrize("name", MODULES)
def test_half_types_that_a_cpu_does_not_multiply_reach_the_library_in_float32(name: str) -> None:
    """On every CPU, as if it had no products of bfloat16; forward and backward, inside of operators too."""
    known = set(dtypes.MULTIPLIED)
    dtypes.MULTIPLIED.clear()
    try:
        make, channels = MODULES[name]
        module, x = make(), normal(2, channels, 8, 8, dtype=torch.float32).requires_grad_()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            with torch.autocast("cpu", torch.bfloat16):
                loss = module(x).float().square().sum()
            loss.backward()
    finally:
        dtypes.MULTIPLIED.update(known)
    found = [*_convolutions(seen.profiler.kineto_results.experimental_event_tree())]
    assert torch.bfloat16 not in found, found


def _convolutions(events: Iterable[Any]) -> Iterator[torch.dtype]:
    """The dtype of every image that the library convolves."""
    for event in events:
        if event.name in ("aten::convolution", "aten::convolution_backward"):
            yield event.extra_fields.inputs[0].dtype
        yield from _convolutions(event.children)
