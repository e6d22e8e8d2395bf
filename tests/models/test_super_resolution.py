"""WaveMixSR and WaveMixSR-V2 beside values recorded from their published code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

import wavemix_kernels as wk
from tests import golden_models
from wavemix_kernels.reference import ShuffleWaveblock, Waveblock
from wavemix_kernels.wavemix.sr import WaveMixSR, WaveMixSR_V2, WaveMixSRV2Block


@pytest.mark.parametrize("block", [wk.FusedWaveblock, Waveblock])
@pytest.mark.parametrize("name, model", [("wavemix_sr", WaveMixSR), ("wavemix_sr_v2", WaveMixSR_V2)])
def test_reproduces_the_published_code(name: str, model: Callable[..., nn.Module], block: type[nn.Module]) -> None:
    golden_models.assert_reproduces(name, partial(model, block=block))


@pytest.mark.parametrize("block", [WaveMixSRV2Block, partial(ShuffleWaveblock, second=True)])
def test_the_block_reproduces_the_published_code(block: Callable[..., nn.Module]) -> None:
    golden_models.assert_reproduces("wavemix_sr_v2_block", block)


@pytest.mark.parametrize(
    "model, arguments, parameters",
    [
        (WaveMixSR, {"depth": 4, "ff_channel": 144}, 1_704_385),
        (WaveMixSR_V2, {}, 319_065),
        (WaveMixSR_V2, {"upsample": "pixelshuffle"}, 780_985),
    ],
)
def test_parameters_are_as_many_as_the_published_code_has(
    model: Callable[..., nn.Module], arguments: dict[str, int], parameters: int
) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in model(final_dim=144, **arguments).parameters()) == parameters


@pytest.mark.parametrize("form", [wk.fuse_for_inference, wk.export_form])
def test_inference_forms_give_the_same_image(form: Callable[[nn.Module], nn.Module]) -> None:
    model = WaveMixSR_V2(sr=4, blocks=1, final_dim=8, upsample="pixelshuffle").double().eval()
    x = torch.randn(1, 3, 5, 7, dtype=torch.float64)
    want = model(x)
    assert want.shape == (1, 3, 20, 28)
    torch.testing.assert_close(form(copy.deepcopy(model))(x), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: WaveMixSR_V2(sr=3), r"sr"),
        (lambda: WaveMixSRV2Block(final_dim=8), r"ff_channel=16: expected 4 \* final_dim = 32"),
        (lambda: WaveMixSR(depth=1)(torch.ones(1, 1, 4, 4)), r"expected 3 channels \(Y, Cb, Cr\), got shape \(1, 1"),
    ],
)
def test_what_does_not_fit_is_named(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
