"""accelerate() on upstream's own models: the same results and the same objects, faster modules."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wavemix_kernels as wk
from tests import vendored_wavemlp as vendored
from tests.models.subjects import assert_accelerates, changed, normal, training_step
from wavemix_kernels import pytorch_wavelets as our_wavelets
from wavemix_kernels.accelerate import Report, accelerate

SMALL = {"depth": 2, "mult": 2, "ff_channel": 8, "final_dim": 8, "dropout": 0.0}


def assert_same_step(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """In float32: an output and a buffer to 1e-4 of their largest value, gradients to 1e-5 of the largest of all. A
    bias in front of a BatchNorm has a gradient that cancels, to rounding of another value in either implementation."""
    assert actual.keys() == expected.keys()
    largest = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        bound = 1e-4 * value.abs().max().item() if name == "out" or "running" in name else 1e-5 * largest
        bound = 1e-4 * largest if name.endswith((".4.bias", "_conv.0.bias")) else bound
        assert (actual[name] - value).abs().max().item() <= bound, name


def assert_same_results(model: nn.Module, x: Tensor, *paths: str) -> Report:
    """accelerate() keeps tensors, results and gradients, and replaces what lies at ``paths``, with nothing left."""
    expected = training_step(copy.deepcopy(model), x)
    report = assert_accelerates(model)
    assert tuple(r.path for r in report.replaced) == paths
    assert_same_step(training_step(model, x), expected)
    assert repr(model)
    return report


@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("module", ["classification", "SemSegment", "sisr"])
def test_upstream_models_compute_the_same(original: ModuleType, module: str, level: int) -> None:
    torch.manual_seed(0)
    model = getattr(original, module).WaveMix(**SMALL, level=level)
    x = torch.randn(2, 3, 16, 32) if module == "sisr" else torch.randn(2, 3, 64, 64)
    head = [] if module == "classification" else ["expand"]
    report = assert_same_results(model, x, "layers.0", "layers.1", *head)
    now = "wavemix_kernels.nn.wavemix.block.FusedWaveblock"
    assert {(r.was, r.now) for r in report.replaced[:2]} == {(f"wavemix.Level{level}Waveblock", now)}
    assert all(type(block) is wk.FusedWaveblock for block in model.layers)


def test_hooks_handles_and_modes_stay(original: ModuleType) -> None:
    model = original.sisr.WaveMix(**SMALL | {"dropout": 0.5})
    block = model.layers[0]
    seen: list[str] = []
    loaded_into: list[nn.Module] = []
    kinds = ("forward_pre", "full_backward", "full_backward_pre", "state_dict_pre", "load_state_dict_post")
    handles = [getattr(block, f"register_{kind}_hook")(lambda *_, k=kind: seen.append(k)) for kind in kinds]
    handles += [
        block.register_forward_hook(lambda *_, **__: seen.append("forward"), with_kwargs=True),
        block.feedforward[5].register_forward_hook(lambda *_: seen.append("inner")),
        block.reduction.register_full_backward_hook(lambda *_: seen.append("inner backward")),
        block.register_load_state_dict_pre_hook(lambda module, *_: loaded_into.append(module)),
    ]
    block.feedforward[5].eval()
    block.feedforward[2].eval()
    block.note = "mine"
    everywhere = [block]  # a reference from outside the module tree
    accelerate(model)
    assert everywhere[0] is model.layers[0]
    assert type(everywhere[0]) is wk.FusedWaveblock
    assert block.note == "mine"
    assert [block.training, block.feedforward[5].training, block.feedforward[2].training] == [True, False, False]
    training_step(model, torch.randn(1, 3, 8, 8))
    model.load_state_dict(model.state_dict())
    assert set(seen) == {*kinds, "forward", "inner", "inner backward"}
    assert loaded_into == [block]
    for handle in handles:
        handle.remove()
    seen.clear()
    training_step(model, torch.randn(1, 3, 8, 8))
    assert seen == []


def test_twice_is_once_and_shared_modules_stay_shared(original: ModuleType) -> None:
    block = original.Level2Waveblock()
    model = nn.Sequential(block, nn.Sequential(block), original.Level1Waveblock())
    report = accelerate(model)
    assert [r.path for r in report.replaced] == ["0", "2"]
    assert model[0] is model[1][0]
    again = accelerate(model)
    assert again.replaced == again.left == ()
    assert str(again) == "accelerate: 0 replaced, 0 left"


def test_the_model_itself_may_be_a_block(original: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    block = original.Level1Waveblock()
    assert accelerate(block, verbose=True).model is block
    assert type(block) is wk.FusedWaveblock
    assert capsys.readouterr().out == (
        "accelerate: 1 replaced, 0 left\n"
        "  (the model itself): wavemix.Level1Waveblock -> wavemix_kernels.nn.wavemix.block.FusedWaveblock\n"
    )


def test_copies_and_pickles(original: ModuleType, wavelets: ModuleType) -> None:
    model = nn.Sequential(original.sisr.WaveMix(**SMALL).layers[0], nn.Conv2d(8, 4, 1), wavelets.DWTForward(J=2))
    accelerate(model)
    model.eval()
    x = torch.randn(1, 8, 8, 8)
    expected = model(x)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = (
        copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)
    )  # fmt: skip
    for other in copies:
        assert type(other[0]) is wk.FusedWaveblock
        assert type(other[2]) is our_wavelets.DWTForward
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
        other[0].reduction.weight.data.zero_()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_after_a_change_of_dtype_and_compile(original: ModuleType) -> None:
    torch.manual_seed(0)
    model = original.sisr.WaveMix(**SMALL)
    accelerate(model)
    model.double()  # upstream cannot: its filters stay float32
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    model.eval()
    expected = model(x)
    assert expected.dtype == torch.float64
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-12, atol=1e-12)


# --- Wavelet transforms ----------------------------------------------------------------------------------


class RoundTrip(nn.Module):
    def __init__(self, forth: nn.Module, back: nn.Module) -> None:
        super().__init__()
        self.forth, self.back = forth, back

    def forward(self, x: Tensor) -> Tensor:
        ll, highs = self.forth(x)
        return self.back((ll, [3 * high for high in highs]))


@pytest.mark.parametrize(
    "wave, mode", [("haar", "zero"), ("haar", "symmetric"), ("db1", "periodization"), ("haar", "wavemix's own"),
                   ("db4", "zero")]
)  # fmt: skip
def test_wavelet_modules(wavelets: ModuleType, wave: str, mode: str, request: pytest.FixtureRequest) -> None:
    if mode == "wavemix's own":
        forth, mode = request.getfixturevalue("original").DWTForward(J=2), "zero"
    else:
        forth = wavelets.DWTForward(J=2, wave=wave, mode=mode)
    model = RoundTrip(forth, wavelets.DWTInverse(wave=wave, mode=mode))
    assert_same_results(model, normal(2, 3, 8, 12, dtype=torch.float32), "forth", "back")
    assert (type(model.forth), type(model.back)) == (our_wavelets.DWTForward, our_wavelets.DWTInverse)


# --- What it leaves --------------------------------------------------------------------------------------


def own(kind: type[nn.Module], **methods: Any) -> type[nn.Module]:
    """A class of the same name in a module of somebody's own."""
    return type(kind.__name__, (kind,), {"__module__": "someone"} | methods)


def doubled(kind: type[nn.Module]) -> type[nn.Module]:
    return own(kind, forward=lambda self, x: 2 * kind.forward(self, x))


def broken(kind: type[nn.Module]) -> type[nn.Module]:
    return own(kind, forward=lambda self, x: self.missing(x))


def post_norm(self: nn.Module, x: Tensor) -> Tensor:
    x = x + self.drop_path(self.norm1(self.attn(x)))
    return x + self.drop_path(self.norm2(self.mlp(x)))


def wavelet(get: Any, name: str = "DWTForward", **arguments: Any) -> nn.Module:
    return getattr(get("wavelets"), name)(**{"wave": "haar"} | arguments)


def block(get: Any, path: str = "", /, **attributes: Any) -> nn.Module:
    return changed(get("original").Level1Waveblock(), path, **attributes)


NINE_TAPS = nn.Conv2d(16, 8, (1, 9), padding=(0, 4), groups=8, bias=False)
NORMED = nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 4, 1))
#: Built by a function that gets fixtures by name, and words of the reason.
LEFT: list[tuple[Callable[[Any], nn.Module], str]] = [
    (lambda get: type("DWTInverse", (nn.Module,), {})(), "pytorch_wavelets"),
    (lambda get: changed(wavelet(get), h0_col=nn.Parameter(torch.ones(1, 1, 2, 1))), "buffers"),
    (lambda get: changed(wavelet(get), mode="replicate"), "replicate"),
    (lambda get: changed(wavelet(get, "DWTInverse"), forward=lambda coeffs: coeffs[0]), "instance"),
    (lambda get: block(get, "feedforward", **{"1": nn.ReLU()}), "feedforward.1 is ReLU"),
    (lambda get: block(get, "feedforward", **{"1": nn.GELU(approximate="tanh")}), "feedforward.1 is GELU"),
    (lambda get: block(get, "feedforward.0", dilation=(2, 2)), "feedforward.0 is Conv2d"),
    (lambda get: block(get, reduction=None), "reduction"),
    (lambda get: block(get, "feedforward", **{"3": nn.Conv2d(32, 12, 1)}), "feedforward.4 is ConvTranspose2d"),
    (lambda get: block(get, gamma=nn.Parameter(torch.ones(16))), "gamma"),
    (lambda get: block(get, reduction=copy.deepcopy(NORMED)), "reduction"),
    (lambda get: block(get, "feedforward", **{"5": nn.BatchNorm2d(16, affine=False)}), "feedforward.5.bias"),
    (lambda get: block(get, forward=lambda x: x), "instance"),
    (lambda get: doubled(get("original").Level1Waveblock)(), "computes something else"),
    (lambda get: broken(get("original").Level1Waveblock)(), "could not be run beside ours"),
    (lambda get: doubled(vendored.PATM)(8), "computes something else"),
    (lambda get: own(vendored.WaveBlock, forward=post_norm)(8), "computes something else"),
    (lambda get: changed(vendored.PATM(8), tfc_h=NINE_TAPS), "tfc_h is Conv2d(16, 8, kernel_size=(1, 9)"),
    (lambda get: vendored.Mlp(4, act_layer=nn.ReLU), "act is ReLU()"),
    (lambda get: changed(vendored.Mlp(4), forward=lambda x: x), "instance"),
    (lambda get: changed(vendored.WaveBlock(8), drop_path=nn.Dropout(0.5)), "drop_path is Dropout"),
]


@pytest.mark.parametrize("build, reason", LEFT)
def test_leaves_what_computes_something_else(
    build: Callable[[Any], nn.Module], reason: str, request: pytest.FixtureRequest
) -> None:
    module = build(request.getfixturevalue)
    kind, random_state = type(module), torch.get_rng_state()
    report = accelerate(nn.Sequential(module))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert "0" not in {r.path for r in report.replaced}
    (left,) = report.left
    assert left.path == "0"
    assert reason in left.reason
    assert type(module) is kind
    assert f"  0: {kind.__module__}.{kind.__qualname__} left: {left.reason}" in str(report)


def test_copies_of_upstreams_source_count(original: ModuleType) -> None:
    model = nn.Sequential(own(original.Level1Waveblock)(final_dim=12, dropout=0.0))
    assert_same_results(model, torch.randn(2, 12, 8, 8), "0")


def test_models_without_candidates_are_untouched(wavelets: ModuleType) -> None:
    """A transformer's MLP is of linear layers, and a scattering layer computes its own transform."""
    mlp = type("Mlp", (nn.Module,), {})()
    mlp.fc1, mlp.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), mlp, wavelets.ScatLayer())
    assert accelerate(model) == Report(model, (), ())


def test_batch_norm_and_dropout_stay_the_models_own(original: ModuleType) -> None:
    block = original.Level1Waveblock(dropout=0.25)
    block.feedforward[5] = nn.BatchNorm2d(16, eps=1e-3, momentum=None)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(block, original.Level1Waveblock()))
    model[0].feedforward[5] = nn.BatchNorm2d(16, eps=1e-3, momentum=None)
    norm = model[0].feedforward[5]
    assert len(accelerate(model).replaced) == 2
    assert model[0].feedforward[5] is norm
    assert (norm.eps, norm.momentum, model[0].feedforward[2].p) == (1e-3, None, 0.25)
    assert isinstance(model[1].feedforward[5], nn.SyncBatchNorm)


# --- Wave-MLP --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fc", "depthwise"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda dim: nn.GroupNorm(1, dim)], ids=["batch", "group"])
def test_vendored_wave_mlp(norm: Any, mode: str) -> None:
    torch.manual_seed(0)
    blocks = [vendored.WaveBlock(8, drop_path=rate, norm_layer=norm, mode=mode) for rate in (0.0, 0.5)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, vendored.PATM(8, qkv_bias=True, proj_drop=0.5, mode=mode))
    x, untouched = torch.randn(4, 3, 9, 8), copy.deepcopy(model)
    parts = ("", ".attn", ".attn.reweight", ".mlp")
    paths = [*(f"{i}{part}" for i in (1, 2) for part in parts), "3", "3.reweight"]
    report = assert_same_results(model, x, *paths)
    classes = ["FusedWaveBlock", "FusedPATM", "FusedMlp", "FusedMlp"]
    assert [r.now.rpartition(".")[2] for r in report.replaced] == [*classes, *classes, *classes[1:3]]
    # One function for each residual branch, with the drop path of the model's own.
    assert type(model[2].drop_path) is vendored.DropPath
    assert model[2].attn.why_not_joined() is None
    assert model[2].mlp.why_not_joined() is None
    untouched.load_state_dict(model.state_dict())
    torch.testing.assert_close(wk.fuse_for_inference(model)(x), untouched.eval()(x).detach(), rtol=1e-3, atol=1e-4)
