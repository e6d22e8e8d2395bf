"""Our models as timm's users create them: arguments, features, heads, weights from a file, training and evaluation."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests import golden_models
from tests.tools.helpers import needs_timm, python, why_no_timm
from wavemix_kernels import pretrained, wavemlp
from wavemix_kernels.wavemix import classification

if why_no_timm() is None:
    import timm
    from timm import create_model as create

    from wavemix_kernels import timm_models

pytestmark = needs_timm

DROP_INS = {f"WaveMLP_{size}".lower(): getattr(wavemlp, f"WaveMLP_{size}") for size in ("T_dw", "T", "S", "M", "B")}
WAVE_MLP = list(DROP_INS)
LITE = {
    "wavemix_lite_8_10": 3_566, "wavemix_lite_8_5": 7_156, "wavemix_lite_32_7": 37_058, "wavemix_lite_64_6": 520_106
}  # fmt: skip


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_importing_the_package_does_not_import_timm() -> None:
    assert python("-c", "import sys, wavemix_kernels; raise SystemExit('timm' in sys.modules)").returncode == 0


def test_everything_is_registered_with_its_weights() -> None:
    names = set(timm.list_models(module="timm_models"))
    heads = timm_models._WITH_HEAD
    assert names == {*WAVE_MLP, *LITE, *timm_models._WAVEMIX, *heads, "wavemix_v3_144_16"}
    classifiers = {name for name, entry in pretrained.WEIGHTS.items() if entry.model == "classification.WaveMix"}
    assert {tag for tags in timm_models._WAVEMIX.values() for tag in tags} == classifiers
    published = {name for name in timm.list_pretrained() if name.split(".")[0] in names}
    assert published == {
        *(f"{name}.in1k" for name in WAVE_MLP[:-1]),
        *(f"{name}.{tag}" for name, tags in timm_models._WAVEMIX.items() for tag in tags),
        *(f"{name}.{tag}" for name, tag in heads.items()),
    }
    for name, tags in timm_models._WAVEMIX.items():
        shapes = [{**pretrained.weights(tag).arguments, "num_classes": 0} for tag in tags]
        assert all(shape == shapes[0] for shape in shapes), name


@pytest.mark.parametrize("name", WAVE_MLP)
def test_wave_mlp_has_the_names_and_the_shapes_of_the_drop_in(name: str) -> None:
    with torch.device("meta"):
        ours = create(name)
        original = DROP_INS[name]()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in original.state_dict().items()}
    assert ours.pretrained_cfg["crop_pct"] == original.default_cfg["crop_pct"]
    assert timm.data.resolve_data_config(model=ours)["mean"] == original.default_cfg["mean"]


@pytest.mark.parametrize("name", list(LITE))
def test_lite_models_have_the_published_sizes(name: str) -> None:
    model = create(name).eval()
    assert count(model) == LITE[name]
    channels, height, width = model.pretrained_cfg["input_size"]
    assert model(torch.randn(1, channels, height, width)).shape == (1, 10)


def test_arguments_of_timm_reach_the_models() -> None:
    model = create("wavemlp_t_dw", num_classes=7, in_chans=1, drop_path_rate=0.3, drop_rate=0.1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert model.network[-1][-1].drop_path.drop_prob == pytest.approx(0.3)
    model = create("wavemix_192_16", num_classes=7, in_chans=1, drop_rate=0.1, depth=1)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 7)
    with pytest.raises(TypeError, match="drop_path_rate"):
        create("wavemix_192_16", drop_path_rate=0.1)
    for name in ("wavemlp_t", "wavemix_192_16"):
        with pytest.raises(ValueError, match="global_pool='max'"):
            create(name, global_pool="max")


@pytest.mark.parametrize("name, width", [("wavemlp_t_dw", 512), ("wavemix_lite_32_7", 32)])
def test_heads(name: str, width: int) -> None:
    torch.manual_seed(0)
    model = create(name, num_classes=5).eval()
    x = torch.randn(2, 3, 32, 32)
    features = model.forward_features(x)
    assert features.shape[1] == model.num_features == width
    torch.testing.assert_close(model.forward_head(features), model(x), rtol=0, atol=0)
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.equal(model.get_classifier()(pooled), model(x))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.get_classifier().out_features == model.num_classes == 3
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    assert create(name, num_classes=0).eval()(x).shape == (2, width)


def test_features_of_wave_mlp_are_the_stages_outputs() -> None:
    torch.manual_seed(0)
    model = create("wavemlp_t_dw", features_only=True, out_indices=(1, 3)).eval()
    assert model.feature_info.channels() == [128, 512]
    assert model.feature_info.reduction() == [8, 32]
    x = torch.randn(1, 3, 64, 64)
    found = model(x)
    assert [f.shape[1:] for f in found] == [(128, 8, 8), (512, 2, 2)]
    whole = create("wavemlp_t_dw").eval()
    whole.load_state_dict(model.model.state_dict(), strict=False)
    stages: list[Tensor] = []
    for index in whole.out_indices:
        whole.network[index].register_forward_hook(lambda module, inputs, out: stages.append(out))
    final, every = whole.forward_intermediates(x)
    pairs = [*zip(every, stages, strict=True), (found[0], stages[1]), (found[1], stages[3])]
    assert [torch.equal(a, b) for a, b in pairs] == [True] * 6
    assert torch.equal(final, whole.forward_features(x))
    with pytest.raises(ValueError, match="output_fmt='NHWC'"):
        whole.forward_intermediates(x, output_fmt="NHWC")
    early = whole.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert torch.equal(early[0], stages[0])
    pruned = create("wavemlp_t_dw", features_only=True, out_indices=(0,))
    assert count(pruned) < count(whole) / 10


def test_features_of_wavemix_are_the_last_blocks() -> None:
    model = create("wavemix_lite_64_6", features_only=True).eval()
    assert (model.feature_info.channels(), model.feature_info.reduction()) == ([64], [1])
    assert [tuple(f.shape) for f in model(torch.randn(1, 3, 16, 16))] == [(1, 64, 16, 16)]
    assert create("wavemix_256_16_level4", depth=1).feature_info[0]["reduction"] == 4


def test_weights_from_a_file_as_upstream_saves_them(tmp_path: Path) -> None:
    """Its training script's arguments, thop's counters and DistributedDataParallel's prefix are in these files."""
    torch.manual_seed(0)
    original, path = wavemlp.WaveMLP_T_dw().eval(), tmp_path / "WaveMLP_T_dw.pth.tar"
    state = {f"module.{name}": value for name, value in original.state_dict().items()}
    state |= {"total_ops": torch.zeros(1), "module.norm.total_params": torch.zeros(1)}
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1e-3), "epoch": 299}, path)
    x = torch.randn(1, 3, 32, 32)
    overlay = {"file": str(path)}
    same = create("wavemlp_t_dw", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert torch.equal(same(x), original(x))
    other = create("wavemlp_t_dw", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4, in_chans=1).eval()
    assert torch.equal(other.network[4][1].mlp.fc1.weight, original.network[4][1].mlp.fc1.weight)
    # timm adapts the stem to fewer channels by summing over those it has.
    weight = original.patch_embed.proj.weight
    torch.testing.assert_close(other.patch_embed.proj.weight, weight.sum(1, keepdim=True))
    backbone = create("wavemlp_t_dw", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True).eval()
    assert len(backbone(x)) == 4
    lite = classification.WaveMixLite(final_dim=64, depth=6, upsample="deconv").eval()
    torch.save(lite.state_dict(), path)
    assert torch.equal(create("wavemix_lite_64_6", pretrained=True, pretrained_cfg_overlay=overlay).eval()(x), lite(x))


def test_the_authors_own_file_for_timm(tmp_path: Path) -> None:
    """Its keys have ``head`` where the published weights have ``pool``; these load in any case."""
    golden_models.assert_reproduces("wavemix_timm", timm_models.WaveMixWithHead)
    published = classification.WaveMix(level=1, depth=1).eval()
    torch.save(published.state_dict(), tmp_path / "wavemixlite.pth")
    overlay = {"file": str(tmp_path / "wavemixlite.pth")}
    model = create("wavemix_lite", depth=1, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(x), published(x))
    assert "head.2.weight" in model.state_dict()
    other = create("wavemix_lite", depth=1, num_classes=4, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert other(x).shape == (1, 4)
    assert create("wavemix", depth=1, num_classes=0).eval()(x).shape == (1, 192)


def test_tags_say_how_many_classes_there_are() -> None:
    for tag, classes in (("galaxy10_95.42", 10), ("tinyimagenet_71.69", 200), ("imagenet_75.04", 1000)):
        assert create(f"wavemix_192_16.{tag}", depth=1).num_classes == classes
    assert create("wavemix_v3_144_16", depth=1, num_classes=3)(torch.randn(1, 3, 16, 16)).shape == (1, 3)


def test_models_train_in_timms_way() -> None:
    from timm.optim import create_optimizer_v2

    torch.manual_seed(0)
    model = create("wavemlp_t_dw", num_classes=4, drop_rate=0.2)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    for group in optimizer.param_groups:
        assert all((p.dim() > 1) == (group["weight_decay"] > 0) for p in group["params"])
    x, y, losses = torch.randn(4, 3, 32, 32), torch.arange(4), []
    for _ in range(6):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
