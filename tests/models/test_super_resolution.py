"""WaveMixSR and WaveMixSR-V2 beside values recorded from their published code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import wavemix_kernels as wk
from tests import golden_models
from tests.tolerances import GOLDEN
from wavemix_kernels.reference import Waveblock
from wavemix_kernels.wavemix.sr import WaveMixSR, WaveMixSR_V2, WaveMixSRV2Block


@pytest.mark.parametrize("block", [wk.FusedWaveblock, Waveblock])
@pytest.mark.parametrize("name, model", [("wavemix_sr", WaveMixSR), ("wavemix_sr_v2", WaveMixSR_V2)])
def test_reproduces_the_published_code(name: str, model: Callable[..., nn.Module], block: type[nn.Module]) -> None:
    golden_models.assert_reproduces(name, partial(model, block=block))


def test_the_block_reproduces_the_published_code() -> None:
    with np.load(golden_models.FOLDER / "wavemix_sr_v2_block.npz") as recorded:
        arrays = {key: torch.from_numpy(recorded[key]) for key in recorded.files if key != "config"}
    state = {key.removeprefix("state/"): value for key, value in arrays.items() if key.startswith("state/")}
    block = WaveMixSRV2Block(**golden_models.config("wavemix_sr_v2_block"), dropout=0.0).double()
    assert list(block.state_dict()) == list(state)
    block.load_state_dict(state, strict=True)
    torch.testing.assert_close(block.state_dict(), state, rtol=0, atol=0)

    def compare(got: torch.Tensor, key: str) -> None:
        want = arrays[key]
        # A bias in front of a BatchNorm has no gradient: what is recorded is the rounding of sums of g.
        scale = want.abs().max().item()
        scale = scale if scale > 1e-8 else arrays["g"].abs().sum().item()
        assert (got.detach() - want).abs().max().item() <= GOLDEN * scale, key

    compare(block.eval()(arrays["x"]), "eval/out")
    x = arrays["x"].clone().requires_grad_()
    out = block.train()(x)
    out.backward(arrays["g"])
    compare(out, "train/out")
    assert x.grad is not None
    compare(x.grad, "train/grad_x")
    gradients = [key for key in arrays if key.startswith("train/grad/")]
    for key, parameter in zip(gradients, block.parameters(), strict=True):  # the same order, other names
        assert parameter.grad is not None
        compare(parameter.grad, key)


def test_a_flat_block_takes_both_forms_of_keys_and_keeps_its_own_in_a_copy() -> None:
    flat = WaveMixSRV2Block(ff_channel=32, final_dim=8)
    nested = wk.FusedWaveblock(ff_channel=32, final_dim=8, upsample="pixelshuffle")
    flat.load_state_dict(nested.state_dict(), strict=True)
    for twin in (flat, copy.deepcopy(flat)):
        assert "feedforward.6.running_mean" in twin.state_dict()
        assert torch.equal(twin.state_dict()["feedforward.5.weight"], nested.state_dict()["feedforward.4.1.weight"])


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
