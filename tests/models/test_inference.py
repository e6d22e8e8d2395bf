"""Inference forms: what they fold and what they leave (values: tests/models/test_every_model.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import wavemix_kernels as wk
from tests.models.subjects import BATCH, GROUP, HEADS, TINY, WAVEBLOCKS, Subject, normal, operators, randomised
from tests.tolerances import UNIT_ROUNDOFF
from wavemix_kernels.nn.wavemix.expansion import FusedExpansion, InferenceExpansion
from wavemix_kernels.wavemix.classification import WaveMix
from wavemix_kernels.wavemlp import WaveBlock, WaveNet


@pytest.mark.parametrize(
    "norm_layer, mode, fork_feat",
    [(BATCH, "fc", False), (BATCH, "depthwise", True), (GROUP, "fc", True), (GROUP, "depthwise", False)],
)
def test_wave_net_folds_its_norms(norm_layer: Callable[..., nn.Module], mode: str, fork_feat: bool) -> None:
    kwargs = {"mode": mode, "norm_layer": norm_layer, "fork_feat": fork_feat, "drop_path_rate": 0.5}
    model = randomised(WaveNet(**TINY, num_classes=3, **kwargs).double()).eval()
    fused = model.fuse_for_inference()
    x = normal(2, 3, 40, 33)
    for actual, expected in zip(fused(x), model(x), strict=True):
        torch.testing.assert_close(actual, expected.detach(), rtol=1e-10, atol=1e-10)
        assert not actual.requires_grad
    # Norms of feature maps cannot fold, nor can norms in front of a convolution with zeros around.
    left = 0 if norm_layer is GROUP else 4 * fork_feat + sum(TINY["layers"]) * (mode == "depthwise")
    assert sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) == left
    assert not any(p.requires_grad for p in fused.parameters())


@pytest.mark.parametrize("subject", WAVEBLOCKS.values(), ids=WAVEBLOCKS.keys())
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_waveblock_with_its_residual(subject: Subject, backend: str) -> None:
    block = subject.pair()[0].eval()
    fused = block.fuse_for_inference()
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.Dropout)) for m in fused.modules())
    assert not list(fused.parameters())
    for order in ("nchw", "channels_last"):
        # An image whose gradient is wanted, as attribution methods do, gets it; the residual's part included.
        leaves = [subject.x(order).requires_grad_() for _ in range(2)]
        with wk.backend(backend):
            out, want = fused(leaves[0], residual=True), block(leaves[1], residual=True)
        torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
        assert out.stride() == leaves[0].stride()
        grads = [torch.autograd.grad(y, leaf, leaf.detach()) for y, leaf in zip((out, want), leaves, strict=True)]
        torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)
    # Folding rounds each weight once more: single precision stays within the block's own rounding.
    with torch.no_grad():
        want = fused(subject.x())
        got = block.float().fuse_for_inference()(subject.x().float())
    assert (got - want).norm() <= 16 * (6 * block.level + 1) * UNIT_ROUNDOFF[torch.float32] * want.norm()


def test_moves_and_converts() -> None:
    block = WaveBlock(8).eval().fuse_for_inference()
    x = normal(2, 8, 5, 6, dtype=torch.float32)
    exact = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x).dtype == torch.float32  # the sum, as everywhere
    got = block.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    # Ten roundings in a row at most.
    assert (got - exact).norm() <= 10 * UNIT_ROUNDOFF[torch.bfloat16] * exact.norm()


def test_a_model_in_its_inference_form() -> None:
    """It was in training; it compiles; its state dict is one that another such model loads."""
    arguments = {"num_classes": 5, "depth": 2, "final_dim": 16, "ff_channel": 16, "level": 2}
    model = randomised(WaveMix(**arguments).double()).eval()
    image = normal(2, 3, 32, 32)
    with torch.no_grad():
        want = model(image)
        model.train()
        assert wk.fuse_for_inference(model) is model
        assert not model.training
        scale = want.abs().max().item()
        torch.testing.assert_close(model(image), want, rtol=1e-12, atol=1e-12 * scale)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(image), want, rtol=1e-12, atol=1e-12 * scale)
    again = wk.fuse_for_inference(WaveMix(**arguments).double())
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(image), model(image))


# --- The head of the models that give images -------------------------------------------------------------


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
