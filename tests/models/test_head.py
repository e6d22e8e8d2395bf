"""The head of the models that give images: fused, folded for inference, with layers that somebody changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import wavemix_kernels as wk
from tests.models.subjects import HEADS, normal, operators
from wavemix_kernels.nn.wavemix.expansion import FusedExpansion, InferenceExpansion
from wavemix_kernels.reference import Expansion, Waveblock
from wavemix_kernels.wavemix import SemSegment, sisr

SMALL = {"depth": 1, "ff_channel": 8, "final_dim": 64}


@pytest.mark.parametrize("arguments, kept", [((64, 2, 5), 2), ((8, 1, 3), 1), ((12, 1, 40), 2)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_inference_folds_what_is_less_work(arguments: tuple[int, int, int], kept: int, with_bias: bool) -> None:
    """The last two layers become one, unless the 1x1 convolution widens: exact up to rounding, borders included."""
    fused, _ = HEADS[f"head {arguments}"].pair()
    if not with_bias:
        for layer in fused:
            layer.register_parameter("bias", None)
    form = wk.fuse_for_inference(fused)
    assert isinstance(form, InferenceExpansion)
    assert form.count == kept
    assert not list(form.parameters())
    x = normal(2, arguments[0], 3, 4)
    want = fused(x)
    torch.testing.assert_close(form(x), want, rtol=1e-12, atol=1e-12 * want.abs().max().item())
    assert not operators(wk.export_form(fused), x)


def test_a_layer_that_was_changed_runs_as_it_is() -> None:
    """Hooks are called, a new head of another kind is used, and neither is folded away."""
    fused = FusedExpansion(16, 1, 3)
    x, called = torch.randn(1, 16, 4, 4), []
    handle = fused[0].register_forward_hook(lambda *_: called.append(True))
    assert fused.fuse_for_inference() is fused
    fused(x)
    assert called == [True]
    handle.remove()
    assert fused.fuse_for_inference() is not fused
    pointwise = fused[1]
    fused[1] = nn.Conv2d(8, 3, 1, stride=2, padding=1)  # 1x1, but not of every pixel
    assert fused.fuse_for_inference() is fused
    fused[1] = pointwise
    handle = fused.register_forward_hook(lambda *_: None)
    assert fused.fuse_for_inference() is fused
    handle.remove()
    fused[1] = nn.Sequential(nn.GELU(), nn.Conv2d(8, 7, 3, padding=1))
    assert fused.fuse_for_inference() is fused
    assert fused(x).shape == (1, 7, 8, 8)
    fused[0] = nn.ConvTranspose2d(16, 8, 2, 2)  # a transposed convolution that is not the operator's
    assert fused(x).shape == (1, 7, 8, 8)


@pytest.mark.parametrize("model", [SemSegment.WaveMix, sisr.WaveMix])
def test_models_take_the_head_of_their_blocks(model: type[nn.Module]) -> None:
    """A reference model has the standard one, until it is accelerated; results come in the images' memory format."""
    torch.manual_seed(0)
    fused, reference = model(**SMALL), model(**SMALL, block=Waveblock)
    assert type(fused.expand) is FusedExpansion
    assert type(reference.expand) is Expansion
    reference.load_state_dict(fused.state_dict(), strict=True)
    image = torch.randn(2, 3, 64, 64)
    for x in (image, image.contiguous(memory_format=torch.channels_last)):
        got, expected = fused.eval()(x), reference.eval()(x)
        assert got.stride() == expected.stride()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    report = wk.accelerate(reference)
    assert type(reference.expand) is FusedExpansion
    assert "expand" in {replaced.path for replaced in report.replaced}
    with torch.inference_mode():
        torch.testing.assert_close(wk.fuse_for_inference(reference)(image), expected, rtol=1e-4, atol=1e-4)
