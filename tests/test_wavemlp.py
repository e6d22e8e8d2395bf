"""Wave-MLP against upstream's recorded values, and PATM against its formula written out with loops."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests import golden_models
from tests.tolerances import UNIT_ROUNDOFF, assert_within
from wavemix_kernels import wavemlp
from wavemix_kernels.nn.wavemlp import reference as wavemlp_reference
from wavemix_kernels.ops.patm import reference as patm_reference
from wavemix_kernels.wavemlp import PATM, MyNorm, WaveBlock, WaveNet

RECORDED = (
    "patm_fc",
    "patm_depthwise",
    "wave_block_fc",
    "wavemlp_tiny_fc",
    "wavemlp_tiny_depthwise",
    "wavemlp_tiny_groupnorm",
)
PARAMETERS = {
    "WaveMLP_T_dw": 15_286_472,
    "WaveMLP_T": 17_193_160,
    "WaveMLP_S": 30_708_040,
    "WaveMLP_M": 44_056_632,
    "WaveMLP_B": 63_586_360,
}
TINY = {"layers": [1, 2, 1, 1], "embed_dims": [4, 6, 8, 8], "mlp_ratios": [2, 2, 2, 2]}


def from_config(kind: str, norm: str = "bn", **kwargs: object) -> nn.Module:
    """The module that a recording's ``config`` describes. Nothing there drops anything: rates are 0 by default."""
    if kind == "patm":
        return PATM(**kwargs)
    if kind == "wave_block":
        return WaveBlock(**kwargs)
    assert kind == "wave_net", kind
    norm_layer = {"bn": nn.BatchNorm2d, "gn": MyNorm}[norm]
    return WaveNet(transitions=[True] * 4, norm_layer=norm_layer, **kwargs)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and running statistic away from its initial value, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2.0, generator=generator)
            elif value.is_floating_point():
                value.copy_(0.5 * torch.randn(value.shape, generator=generator, dtype=torch.float64))
    return module


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", RECORDED)
def test_reproduces_upstream(name: str) -> None:
    kind = golden_models.config(name)["kind"]
    golden_models.assert_reproduces(name, lambda *, dropout, **arguments: from_config(kind, **arguments))


def seven_taps(u: np.ndarray, weight: np.ndarray, axis: int) -> np.ndarray:
    """u (2C, H, W) convolved along ``axis`` in C groups, group g reading channels 2g and 2g+1; weight (C, 2, 7)."""
    groups, length = weight.shape[0], u.shape[axis]
    out = np.zeros((groups, *u.shape[1:]))
    for g in range(groups):
        for k in range(2):
            for tap in range(7):
                for i in range(length):
                    if 0 <= i + tap - 3 < length:
                        at, source = (slice(None),) * (axis - 1) + (i,), (slice(None),) * (axis - 1) + (i + tap - 3,)
                        out[g][at] += weight[g, k, tap] * u[2 * g + k][source]
    return out


def formula(module: PATM, x: np.ndarray) -> np.ndarray:
    """PATM of one image x (C, H, W) in evaluation, from the parameters by name, in NumPy loops."""
    p = {name: value.detach().double().numpy() for name, value in module.state_dict().items()}

    def pointwise(name: str, value: np.ndarray) -> np.ndarray:
        out = np.einsum("oi,i...->o...", p[f"{name}.weight"][:, :, 0, 0], value)
        bias = p.get(f"{name}.bias", np.zeros(len(out)))
        return out + bias.reshape(-1, *(1,) * (value.ndim - 1))

    def phase(name: str) -> np.ndarray:
        if module.mode == "fc":
            theta = pointwise(f"{name}.0", x)
        else:
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
            weight = p[f"{name}.0.weight"][:, 0, :, :, None, None]
            theta = sum(
                weight[:, i, j] * padded[:, i : i + x.shape[1], j : j + x.shape[2]] for i in range(3) for j in range(3)
            )
        norm = {key: p[f"{name}.1.{key}"][:, None, None] for key in ("weight", "bias", "running_mean", "running_var")}
        theta = (theta - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-5) * norm["weight"] + norm["bias"]
        return np.maximum(theta, 0)

    def branch(axis_name: str, taps: np.ndarray, axis: int) -> np.ndarray:
        z, theta = pointwise(f"fc_{axis_name}", x), phase(f"theta_{axis_name}_conv")
        return seven_taps(np.concatenate((z * np.cos(theta), z * np.sin(theta))), taps, axis)

    h = branch("h", p["tfc_h.weight"][:, :, 0, :], 2)
    w = branch("w", p["tfc_w.weight"][:, :, :, 0], 1)
    c = pointwise("fc_c", x)
    hidden = pointwise("reweight.fc1", (h + w + c).mean((1, 2)))
    hidden = hidden * 0.5 * np.array([1 + math.erf(value / math.sqrt(2)) for value in hidden])
    a = np.exp(pointwise("reweight.fc2", hidden)).reshape(-1, 3)
    a = (a / a.sum(1, keepdims=True))[:, :, None, None]
    return pointwise("proj", h * a[:, 0] + w * a[:, 1] + c * a[:, 2])


class TestPATM:
    @pytest.mark.parametrize("mode", wavemlp_reference.MODES)
    @pytest.mark.parametrize("qkv_bias", [False, True])
    # Even and odd channels (a group that reads a cosine and a sine), and images thinner than the taps.
    @pytest.mark.parametrize("dim, size", [(4, (3, 21)), (5, (8, 2)), (7, (1, 1)), (6, (9, 1)), (10, (5, 13))], ids=str)
    def test_matches_the_formula(self, dim: int, size: tuple[int, int], qkv_bias: bool, mode: str) -> None:
        module = randomised(PATM(dim, qkv_bias=qkv_bias, mode=mode).double()).eval()
        x = normal(2, dim, *size)
        expected = torch.from_numpy(np.stack([formula(module, image) for image in x.numpy()]))
        torch.testing.assert_close(module(x).detach(), expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("mode", wavemlp_reference.MODES)
    @pytest.mark.parametrize("dim", [5, 8])
    def test_function_level_specification_composes_to_the_module(self, dim: int, mode: str, training: bool) -> None:
        module = randomised(PATM(dim, mode=mode).double()).train(training)
        x = normal(3, dim, 4, 9)

        def affine(phase: nn.Sequential) -> tuple[Tensor, Tensor, Tensor]:
            conv, norm, _ = phase
            theta = conv(x)
            mean, var = norm.running_mean, norm.running_var
            if training:
                var, mean = torch.var_mean(theta, (0, 2, 3), correction=0)
            scale = norm.weight / (var + norm.eps).sqrt()
            return theta, scale, norm.bias - mean * scale

        with torch.no_grad():
            theta_h, *affine_h = affine(module.theta_h_conv)
            theta_w, *affine_w = affine(module.theta_w_conv)
            c = module.fc_c(x)
            h, w, s = patm_reference.phase_aggregate(
                module.fc_h(x),
                module.fc_w(x),
                c,
                theta_h,
                theta_w,
                *affine_h,
                *affine_w,
                module.tfc_h.weight,
                module.tfc_w.weight,
            )
            torch.testing.assert_close(s, (h + w + c).sum((2, 3)), rtol=1e-12, atol=1e-12)
            a = module.branch_weights(s[..., None, None] / (4 * 9))
            torch.testing.assert_close(a.sum(2), torch.ones_like(s), rtol=1e-12, atol=0)
            out = module.proj(patm_reference.branch_sum(h, w, c, a))
            torch.testing.assert_close(out, module(x), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_phase_aggregate_rounds_each_output_once(self, dtype: torch.dtype) -> None:
        """Phases of hundreds of radians, where a half type's spacing exceeds the period's fraction that matters."""
        dim, size = 6, (5, 11)
        z_h, z_w, c, theta_h, theta_w = (normal(2, dim, *size, seed=i, dtype=dtype) for i in range(5))
        scale_h, scale_w = (
            300 + normal(dim, seed=5, dtype=torch.float32),
            300 + normal(dim, seed=6, dtype=torch.float32),
        )
        shift_h, shift_w = normal(dim, seed=7, dtype=torch.float32), normal(dim, seed=8, dtype=torch.float32)
        taps_h, taps_w = normal(dim, 2, 1, 7, seed=9, dtype=dtype), normal(dim, 2, 7, 1, seed=10, dtype=dtype)
        inputs = (z_h, z_w, c, theta_h, theta_w, scale_h, shift_h, scale_w, shift_w, taps_h, taps_w)
        *got, got_s = patm_reference.phase_aggregate(*inputs)
        *exact, exact_s = patm_reference.phase_aggregate(*(value.double() for value in inputs))
        assert got_s.dtype == torch.float32

        # A phase errs by its own two roundings, which turns z by as much; 14 products and sums follow.
        u = UNIT_ROUNDOFF[torch.float32]
        phase = 2 * u * max(theta.abs().max().item() * 310 for theta in (theta_h, theta_w))
        peak = max(z.abs().max().item() * 14 * taps.abs().max().item() for z, taps in ((z_h, taps_h), (z_w, taps_w)))
        arithmetic = peak * (phase + 17 * u)
        for name, value, want in zip(("h", "w"), got, exact, strict=True):
            assert value.dtype == dtype
            assert_within(value, want, arithmetic + UNIT_ROUNDOFF[dtype] * want.abs(), name)
        pixels = math.prod(size)
        per_pixel = 2 * arithmetic + (pixels + 2) * u * (2 * peak + c.abs().max().item())
        assert_within(got_s, exact_s, torch.full_like(exact_s, pixels * per_pixel), "s")

    def test_dropout(self) -> None:
        module = PATM(8, proj_drop=1.0)
        x = normal(1, 8, 4, 4, dtype=torch.float32)
        assert (module.train()(x) == 0).all()
        assert (module.eval()(x) != 0).any()

        mlp = wavemlp_reference.Mlp(4, 6, 5, drop=0.3)
        dropped: list[int] = []
        mlp.drop.register_forward_hook(lambda _, inputs, __: dropped.append(inputs[0].shape[1]))
        mlp(normal(1, 4, 3, 3, dtype=torch.float32))
        assert dropped == [6, 5]  # the hidden activations and the output
        assert mlp.drop.p == 0.3

    def test_gradients(self) -> None:
        module = randomised(PATM(5).double()).train()
        x = normal(2, 5, 3, 4).requires_grad_()
        assert torch.autograd.gradcheck(module, (x,))

    @pytest.mark.parametrize("dim", [1, 2, 3])
    def test_too_few_channels(self, dim: int) -> None:
        with pytest.raises(ValueError, match=f"dim={dim}: expected at least 4"):
            PATM(dim)

    def test_unknown_mode(self) -> None:
        with pytest.raises(ValueError, match="mode='conv': expected one of 'fc', 'depthwise'"):
            PATM(8, mode="conv")

    def test_wrong_input(self) -> None:
        module = PATM(8)
        with pytest.raises(ValueError, match=r"x: expected 8 channels \(dim\), got shape \(1, 4, 5, 5\)"):
            module(torch.zeros(1, 4, 5, 5))
        with pytest.raises(TypeError, match="x: expected float64, float32, float16 or bfloat16"):
            module(torch.zeros(1, 8, 5, 5, dtype=torch.int64))

    @pytest.mark.parametrize("argument", [{"qk_scale": 0.5}, {"attn_drop": 0.1}], ids=str)
    def test_arguments_without_effect_warn(self, argument: dict[str, float]) -> None:
        (name,) = argument
        with pytest.warns(UserWarning, match=f"{name}=.* has no effect"):
            PATM(8, **argument)


class TestModels:
    @pytest.mark.parametrize("name", PARAMETERS)
    def test_state_dict_and_parameters_are_upstreams(self, name: str) -> None:
        with (golden_models.FOLDER / "wavemlp_state_dicts.json").open() as file:
            upstream = json.load(file)[name]
        with torch.device("meta"):
            model = getattr(wavemlp, name)()
        assert [(key, list(value.shape)) for key, value in model.state_dict().items()] == list(upstream.items())
        assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
        assert model.default_cfg["crop_pct"] == (0.875 if name == "WaveMLP_B" else 0.9)

    @pytest.mark.parametrize("size", [(3, 21), (32, 32), (65, 33), (3, 3)], ids=str)
    @pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, MyNorm])
    def test_any_image_size(self, norm_layer: object, size: tuple[int, int]) -> None:
        model = WaveNet(**TINY, num_classes=3, norm_layer=norm_layer).train()
        out = model(normal(4, 3, *size, dtype=torch.float32))
        out.sum().backward()
        assert out.shape == (4, 3)
        assert out.isfinite().all()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())

    @pytest.mark.parametrize("axis, size", [("H", (2, 8)), ("W", (8, 1))])
    def test_image_smaller_than_a_patch(self, axis: str, size: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match=f"x: {axis}={min(size)} has no room .* expected at least 3"):
            WaveNet(**TINY)(torch.zeros(1, 3, *size))

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
        with pytest.raises(ValueError, match=r"x: expected 1 channels \(in_chans\), got shape \(1, 3, 16, 16\)"):
            model(torch.zeros(1, 3, 16, 16))

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
        with pytest.raises(ValueError, match="global_pool='max': expected one of '', 'avg'"):
            model.reset_classifier(5, global_pool="max")
        with pytest.raises(ValueError, match="num_classes: expected a positive int, got -1"):
            model.reset_classifier(-1)

    def test_head_initialisation(self) -> None:
        torch.manual_seed(0)
        head = WaveNet(**TINY).get_classifier()
        assert head.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert (head.bias == 0).all()

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"embed_dims": [4, 8]}, r"embed_dims=\[4, 8\]: expected one for each of the 4 stages"),
            ({"mlp_ratios": None}, "mlp_ratios=None: expected one for each of the 4 stages"),
            ({"transitions": [True]}, r"transitions=\[True\]: expected one for each of the 4 stages"),
            ({"transitions": [False] * 4}, "patch_size=1: expected 2"),
            ({"drop_path_rate": 1.5}, "drop_path_rate=1.5: expected a probability"),
            ({"num_classes": -2}, "num_classes: expected a positive int, got -2"),
            ({"mode": "dw"}, "mode='dw': expected one of"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, change: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            WaveNet(**(TINY | change))

    @pytest.mark.parametrize("argument", [{"drop_rate": 0.1}, {"attn_drop_rate": 0.1}, {"patch_size": 16}], ids=str)
    def test_arguments_without_effect_warn(self, argument: dict[str, float]) -> None:
        with pytest.warns(UserWarning, match="has no effect"):
            WaveNet(**TINY, **argument)

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

    def test_no_classifier(self) -> None:
        model = WaveNet(**TINY, fork_feat=True)
        with pytest.raises(ValueError, match=r"get_classifier\(\): a model with fork_feat=True has no classifier"):
            model.get_classifier()
        with pytest.raises(ValueError, match=r"reset_classifier\(5\): a model with fork_feat=True has no classifier"):
            model.reset_classifier(5)


class TestCheckpoints:
    @pytest.mark.parametrize("wrapped", ["plain", "state_dict", "model"])
    def test_round_trip(self, wrapped: str, tmp_path: Path) -> None:
        source, target = randomised(WaveNet(**TINY)), WaveNet(**TINY)
        # As upstream's files come: DistributedDataParallel's prefix, thop's counters, the training script's arguments.
        state = {f"module.{name}": value for name, value in source.state_dict().items()}
        state["module.patch_embed.total_ops"] = state["module.patch_embed.total_params"] = torch.zeros(1)
        content = state if wrapped == "plain" else {wrapped: state, "args": argparse.Namespace(lr=0.1), "epoch": 3}
        torch.save(content, tmp_path / "checkpoint.pth.tar")
        target.init_weights(tmp_path / "checkpoint.pth.tar")
        for name, value in target.state_dict().items():
            assert torch.equal(value, source.state_dict()[name]), name

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

    def test_no_state_dict_raises(self, tmp_path: Path) -> None:
        torch.save({"epoch": 3}, tmp_path / "empty.pth")
        with pytest.raises(ValueError, match=r"empty\.pth'.*expected a file with a state dict"):
            WaveNet(**TINY).init_weights(tmp_path / "empty.pth")

    def test_nothing_to_load(self) -> None:
        model = WaveNet(**TINY)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model.init_weights()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_pretrained_argument(self, tmp_path: Path) -> None:
        with torch.device("meta"), pytest.raises(ValueError, match=r"pretrained=True: .* expected the path"):
            wavemlp.WaveMLP_T(pretrained=True)
        torch.save({"epoch": 3}, tmp_path / "empty.pth")
        with torch.device("meta"), pytest.raises(ValueError, match=r"empty\.pth"):
            wavemlp.WaveMLP_T(pretrained=str(tmp_path / "empty.pth"))


class TestPyTorch:
    def test_token_mixer_by_keyword(self) -> None:
        class Doubling(nn.Module):
            def __init__(self, dim: int, **kwargs: object) -> None:
                super().__init__()
                self.arguments = {"dim": dim, **kwargs}

            def forward(self, x: Tensor) -> Tensor:
                return 2 * x

        block = WaveBlock(8, qkv_bias=True, mode="depthwise", token_mixer=Doubling)
        assert block.attn.arguments == {
            "dim": 8,
            "qkv_bias": True,
            "qk_scale": None,
            "attn_drop": 0.0,
            "mode": "depthwise",
        }
        model = WaveNet(**TINY, token_mixer=Doubling)
        assert not any(isinstance(module, PATM) for module in model.modules())
        assert sum(isinstance(module, Doubling) for module in model.modules()) == sum(TINY["layers"])

    def test_channels_last(self, device: str) -> None:
        model = randomised(WaveNet(**TINY, num_classes=3).double()).eval().to(device)
        x = normal(2, 3, 40, 24).to(device)
        expected = model(x)
        actual = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)

    def test_empty_batch(self) -> None:
        model = WaveNet(**TINY, num_classes=3).eval()
        assert model(torch.zeros(0, 3, 32, 32)).shape == (0, 3)

    @pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, MyNorm])
    def test_autocast_trains(self, norm_layer: object, device: str) -> None:
        """bf16 autocast: gradients are fp32 and finite, the result stays near fp32's."""
        torch.manual_seed(0)
        model = WaveNet(**TINY, num_classes=3, norm_layer=norm_layer).train().to(device)
        x = normal(8, 3, 64, 64, dtype=torch.float32).to(device)
        exact = model(x)
        with torch.autocast(device, dtype=torch.bfloat16):
            out = model(x)
        assert out.dtype == torch.bfloat16
        # Some forty roundings to bf16 in a row, of independent signs: about the square root of their number.
        assert (out - exact).norm() <= 8 * UNIT_ROUNDOFF[torch.bfloat16] * exact.norm()
        out.float().square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad.dtype == torch.float32, name
            assert parameter.grad.isfinite().all(), name

    def test_compiles_as_one_graph(self, device: str) -> None:
        """Forward and backward of the whole net, stochastic depth included, without a graph break."""
        torch._dynamo.reset()
        kwargs = {"layers": [1, 1], "embed_dims": [4, 6], "mlp_ratios": [2, 2], "num_classes": 3}
        model = randomised(WaveNet(**kwargs).double()).train().to(device)
        # The graph is what the model decides; generating code for it is Inductor's matter and a minute's work.
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        x = normal(2, 3, 24, 20).to(device)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        results = []
        for run in (model, compiled):
            model.load_state_dict(state)
            model.zero_grad()
            out = run(x)
            out.square().sum().backward()
            results.append([out, *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())])
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)

        dropping = torch.compile(WaveNet(**kwargs, drop_path_rate=0.5).train(), fullgraph=True, backend="aot_eager")
        assert dropping(x.float().cpu()).shape == (2, 3)
