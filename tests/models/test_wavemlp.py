"""Wave-MLP's models: sizes and arguments, feature maps, checkpoints, PyTorch's machinery around them."""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.models.subjects import TINY, autocast_step, normal, randomised
from tests.tolerances import UNIT_ROUNDOFF
from wavemix_kernels import wavemlp
from wavemix_kernels.wavemlp import PATM, MyNorm, WaveBlock, WaveNet


class TestModels:
    @pytest.mark.parametrize("size", [(3, 21), (32, 32), (65, 33), (3, 3)], ids=str)
    @pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, MyNorm])
    def test_any_image_size(self, norm_layer: object, size: tuple[int, int]) -> None:
        model = WaveNet(**TINY, num_classes=3, norm_layer=norm_layer).train()
        out = model(normal(4, 3, *size, dtype=torch.float32))
        out.sum().backward()
        assert out.shape == (4, 3)
        assert out.isfinite().all()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())

    def test_arguments_reach_every_block(self) -> None:
        with torch.device("meta"):
            model = WaveNet(**TINY, qkv_bias=True, mode="depthwise")
            block = WaveBlock(8, mlp_ratio=2.5, act_layer=nn.ReLU)
        mixers = [module for module in model.modules() if isinstance(module, PATM)]
        assert len(mixers) == sum(TINY["layers"])
        assert all(m.mode == "depthwise" and None not in (m.fc_h.bias, m.fc_w.bias, m.fc_c.bias) for m in mixers)
        assert isinstance(block.mlp.act, nn.ReLU)
        assert block.mlp.fc1.out_channels == 20

    def test_image_channels(self) -> None:
        model = WaveNet(**TINY, in_chans=1, num_classes=2).eval()
        assert model(torch.zeros(1, 1, 16, 16)).shape == (1, 2)

    def test_group_norm_sees_one_image_at_a_time(self) -> None:
        """GroupNorm models still hold PATM's BatchNorms: independent in evaluation, not in training."""
        model = randomised(WaveNet(**TINY, num_classes=3, norm_layer=MyNorm, ds_use_norm=False).double())
        x = normal(2, 3, 24, 24)
        torch.testing.assert_close(model.eval()(x)[:1], model(x[:1]), rtol=1e-10, atol=1e-10)
        norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
        assert norms
        assert all(".attn.theta_" in name for name in norms)

    def test_without_classes(self) -> None:
        model = WaveNet(**TINY, num_classes=0).eval()
        assert isinstance(model.get_classifier(), nn.Identity)
        assert model(normal(2, 3, 32, 32, dtype=torch.float32)).shape == (2, TINY["embed_dims"][-1])

    def test_reset_classifier(self) -> None:
        model = WaveNet(**TINY, num_classes=3).double().eval()
        x = normal(1, 3, 32, 32)
        model.reset_classifier(7)
        assert model(x).shape == (1, 7)
        assert model.num_classes == 7
        assert model.get_classifier().weight.dtype == torch.float64
        assert (model.get_classifier().bias == 0).all()
        model.reset_classifier(0)
        features = model(x)
        model.reset_classifier(5, global_pool="avg")
        torch.testing.assert_close(model(x), model.head(features))

    def test_head_initialisation(self) -> None:
        torch.manual_seed(0)
        head = WaveNet(**TINY).get_classifier()
        assert head.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert (head.bias == 0).all()

    def test_stages_of_one_width_need_no_transition(self) -> None:
        model = WaveNet([1, 1], embed_dims=[4, 4], mlp_ratios=[2, 2], transitions=[False], fork_feat=True).eval()
        outputs = model(normal(1, 3, 16, 16, dtype=torch.float32))
        assert [tuple(out.shape) for out in outputs] == [(1, 4, 4, 4)] * 2
        assert {"norm0", "norm1"} <= dict(model.named_children()).keys()


class TestDropPath:
    def test_rates_rise_linearly(self) -> None:
        with torch.device("meta"):
            model = wavemlp.WaveMLP_T(drop_path_rate=0.9)
        paths = [module.drop_path for module in model.modules() if isinstance(module, WaveBlock)]
        assert isinstance(paths[0], nn.Identity)
        assert [path.drop_prob for path in paths[1:]] == pytest.approx([0.1 * i for i in range(1, 10)])

    def test_drops_whole_samples_and_keeps_the_mean(self) -> None:
        torch.manual_seed(0)
        drop = wavemlp.DropPath(0.25).train()
        out = drop(torch.ones(4000, 2, 3))
        per_sample = out.flatten(1)
        assert (per_sample == per_sample[:, :1]).all()
        assert set(per_sample[:, 0].tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
        # Four standard deviations of a binomial.
        kept = (per_sample[:, 0] > 0).double().mean().item()
        assert abs(kept - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 4000)

    def test_extremes(self) -> None:
        x = torch.ones(3, 2)
        assert (wavemlp.DropPath(1.0).train()(x) == 0).all()
        assert wavemlp.DropPath(0.0).train()(x) is x
        assert wavemlp.DropPath(0.5).eval()(x) is x

    def test_both_branches_of_a_block(self) -> None:
        block = WaveBlock(8, drop_path=1.0).train()
        x = normal(2, 8, 5, 5, dtype=torch.float32)
        assert torch.equal(block(x), x)
        assert not torch.equal(block.eval()(x), x)

    def test_one_block_has_nothing_to_rise_to(self) -> None:
        model = WaveNet([1], embed_dims=[4], mlp_ratios=[2], num_classes=2, drop_path_rate=0.5)
        assert isinstance(model.network[0][0].drop_path, nn.Identity)


class TestBackbone:
    def test_feature_maps(self) -> None:
        model = WaveNet(**TINY, fork_feat=True).eval()
        outputs = model(normal(2, 3, 64, 48, dtype=torch.float32))
        assert [tuple(out.shape) for out in outputs] == [(2, 4, 16, 12), (2, 6, 8, 6), (2, 8, 4, 3), (2, 8, 2, 2)]
        assert model.out_indices == [0, 2, 4, 6]
        children = dict(model.named_children())
        assert {"norm0", "norm2", "norm4", "norm6"} <= children.keys()
        assert not {"norm", "head"} & children.keys()

    def test_feature_maps_are_the_classifiers(self) -> None:
        """The last map is what the classifier pools, once it has the classifier's norm."""
        classifier = randomised(WaveNet(**TINY, num_classes=0).double()).eval()
        backbone = WaveNet(**TINY, fork_feat=True).double().eval()
        backbone.load_state_dict(classifier.state_dict(), strict=False)
        backbone.norm6.load_state_dict(classifier.norm.state_dict())
        x = normal(2, 3, 32, 32)
        torch.testing.assert_close(backbone(x)[-1].mean((2, 3)), classifier(x), rtol=1e-10, atol=1e-10)

    def test_fork_last3(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FORK_LAST3", "1")
        model = WaveNet(**TINY, fork_feat=True)
        assert isinstance(model.norm0, nn.Identity)
        assert isinstance(model.norm2, nn.BatchNorm2d)
        assert len(model(normal(1, 3, 64, 64, dtype=torch.float32))) == 4


class TestCheckpoints:
    @pytest.mark.parametrize("wrapped", ["plain", "state_dict", "model"])
    def test_round_trip(self, wrapped: str, tmp_path: Path) -> None:
        source, target = randomised(WaveNet(**TINY)), WaveNet(**TINY)
        # Upstream's files have: DistributedDataParallel's prefix, thop's counters, the training script's arguments.
        state = {f"module.{name}": value for name, value in source.state_dict().items()}
        state["module.patch_embed.total_ops"] = state["module.patch_embed.total_params"] = torch.zeros(1)
        content = state if wrapped == "plain" else {wrapped: state, "args": argparse.Namespace(lr=0.1), "epoch": 3}
        torch.save(content, tmp_path / "checkpoint.pth.tar")
        target.init_weights(tmp_path / "checkpoint.pth.tar")
        torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)

    def test_backbone_from_a_classifiers_file(self, tmp_path: Path) -> None:
        source, target = randomised(WaveNet(**TINY)), WaveNet(**TINY, fork_feat=True)
        torch.save(source.state_dict(), tmp_path / "classifier.pth")
        target.init_weights(str(tmp_path / "classifier.pth"))
        for name, value in target.state_dict().items():
            if name.partition(".")[0] in ("patch_embed", "network"):
                assert torch.equal(value, source.state_dict()[name]), name
        assert (target.norm6.weight == 1).all()

    def test_mismatch_raises(self, tmp_path: Path) -> None:
        state = WaveNet(**TINY).state_dict()
        del state["network.0.0.attn.tfc_h.weight"]
        torch.save(state, tmp_path / "short.pth")
        for fork_feat in (False, True):
            with pytest.raises(RuntimeError, match=r"network\.0\.0\.attn\.tfc_h\.weight"):
                WaveNet(**TINY, fork_feat=fork_feat).init_weights(tmp_path / "short.pth")

    def test_nothing_to_load(self) -> None:
        model = WaveNet(**TINY)
        before = copy.deepcopy(model.state_dict())
        model.init_weights()
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)

    def test_pretrained_argument(self, tmp_path: Path) -> None:
        torch.save({"epoch": 3}, tmp_path / "empty.pth")
        with torch.device("meta"), pytest.raises(ValueError, match=r"empty\.pth'.*expected a file with a state dict"):
            wavemlp.WaveMLP_T(pretrained=str(tmp_path / "empty.pth"))


class TestPyTorch:
    def test_token_mixer_by_keyword(self) -> None:
        made: list[dict[str, object]] = []

        def mixer(dim: int, **arguments: object) -> nn.Module:
            made.append({"dim": dim, **arguments})
            return nn.Identity()

        WaveBlock(8, qkv_bias=True, mode="depthwise", token_mixer=mixer)
        assert made == [{"dim": 8, "qkv_bias": True, "mode": "depthwise", "qk_scale": None, "attn_drop": 0.0}]
        model = WaveNet(**TINY, token_mixer=mixer)
        assert not any(isinstance(module, PATM) for module in model.modules())
        assert len(made) == 1 + sum(TINY["layers"])

    def test_channels_last(self, device: str) -> None:
        model = randomised(WaveNet(**TINY, num_classes=3).double()).eval().to(device)
        x = normal(2, 3, 40, 24).to(device)
        expected = model(x)
        actual = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, MyNorm])
    def test_autocast_trains(self, norm_layer: object, device: str) -> None:
        """bf16 autocast: gradients are fp32 and finite, the result stays near fp32's."""
        torch.manual_seed(0)
        model = WaveNet(**TINY, num_classes=3, norm_layer=norm_layer).train().to(device)
        x = normal(8, 3, 64, 64, dtype=torch.float32).to(device)
        exact, out = model(x), autocast_step(model, x, torch.bfloat16)[0]
        assert out.dtype == torch.bfloat16
        # Some forty roundings to bf16 in a row, of independent signs: about the square root of their number.
        assert (out - exact).norm() <= 8 * UNIT_ROUNDOFF[torch.bfloat16] * exact.norm()
