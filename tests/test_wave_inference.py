"""Wave-MLP's inference forms against the models that they are made of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import wavemix_kernels as wk
from tests.test_wave_block import modes, norms
from tests.test_wavemlp import TINY, normal, randomised
from tests.tolerances import UNIT_ROUNDOFF
from wavemix_kernels.nn.wavemlp import reference as patm
from wavemix_kernels.ops.common import layout
from wavemix_kernels.wavemlp import PATM, MyNorm, WaveBlock, WaveNet


class TestInference:
    @norms
    @modes
    @pytest.mark.parametrize("fork_feat", [False, True])
    def test_models(self, fork_feat: bool, mode: str, norm_layer: object) -> None:
        kwargs = {"mode": mode, "norm_layer": norm_layer, "fork_feat": fork_feat, "drop_path_rate": 0.5}
        model = randomised(WaveNet(**TINY, num_classes=3, **kwargs).double()).eval()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        fused = model.fuse_for_inference()
        x = normal(2, 3, 40, 33)
        for actual, expected in zip(fused(x), model(x), strict=True):
            torch.testing.assert_close(actual, expected.detach(), rtol=1e-10, atol=1e-10)
            assert not actual.requires_grad
        # What cannot fold: norms of feature maps, and norms in front of a convolution with zeros around.
        left = 0 if norm_layer is MyNorm else 4 * fork_feat + sum(TINY["layers"]) * (mode == "depthwise")
        assert sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) == left
        assert not any(p.requires_grad for p in fused.parameters())
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name

    def test_the_function_for_any_model(self) -> None:
        model = nn.Sequential(randomised(WaveBlock(8).double()), randomised(PATM(8).double())).eval()
        x = normal(2, 8, 5, 6)
        expected = model(x).detach()
        assert wk.fuse_for_inference(model) is model
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
        out = model(x.contiguous(memory_format=torch.channels_last))
        assert layout.is_channels_last(out)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)

    def test_moves_and_converts(self) -> None:
        block = WaveBlock(8).eval().fuse_for_inference()
        x = normal(2, 8, 5, 6, dtype=torch.float32)
        exact = block(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert block(x).dtype == torch.float32  # the sum, as everywhere
        got = block.bfloat16()(x.bfloat16())
        assert got.dtype == torch.bfloat16
        # Ten roundings in a row at most.
        assert (got - exact).norm() <= 10 * UNIT_ROUNDOFF[torch.bfloat16] * exact.norm()

    def test_what_has_no_inference_form(self) -> None:
        hooked, other, untracked = WaveBlock(8), WaveBlock(8, token_mixer=patm.PATM), WaveBlock(8)
        hooked.mlp.fc1.register_forward_hook(lambda *_: None)
        untracked.attn.theta_h_conv[1] = nn.BatchNorm2d(8, track_running_stats=False)
        for block, message in (
            (hooked, "mlp: fc1 has hooks, which folded weights cannot stand for"),
            (other, "attn is a PATM, expected FusedPATM"),
            (untracked, r"theta_h_conv\.1: track_running_stats=False"),
        ):
            with pytest.raises(ValueError, match=message):
                block.fuse_for_inference()
        model = WaveNet(**TINY)
        model.network[2][1].attn.fc_h.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match=r"network\.2\.1: .* fc_h has hooks, which joined weights"):
            model.fuse_for_inference()
