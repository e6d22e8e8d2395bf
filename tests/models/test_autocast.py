"""Backward passes that are called while autocast is on, as loops do that keep the whole step inside of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.models.subjects import normal
from wavemix_kernels import FusedPATM, FusedWaveblock
from wavemix_kernels.nn.wavemix.shuffle import FusedShuffleWaveblock
from wavemix_kernels.nn.wavemlp.block import FusedWaveBlock
from wavemix_kernels.ops.deconv import deconv


class Deconv(nn.ConvTranspose2d):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
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
