"""accelerate() on upstream's own models: the same results and the same objects, faster modules."""

from __future__ import annotations

import copy
import io
import pickle
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wavemix_kernels as wk
from tests import vendored_wavemlp as vendored
from tests.models.subjects import training_step
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


@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("module", ["classification", "SemSegment", "sisr"])
def test_upstream_models_compute_the_same(original: ModuleType, module: str, level: int) -> None:
    torch.manual_seed(0)
    model = getattr(original, module).WaveMix(**SMALL, level=level)
    x = torch.randn(2, 3, 16, 32) if module == "sisr" else torch.randn(2, 3, 64, 64)
    untouched = copy.deepcopy(model)
    expected = training_step(untouched, x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    tensors = {id(t) for t in [*model.parameters(), *model.buffers()]}
    random_state = torch.get_rng_state()

    report = accelerate(model)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert [(r.path, r.was, r.now) for r in report.replaced] == [
        (f"layers.{i}", f"wavemix.Level{level}Waveblock", "wavemix_kernels.nn.wavemix.block.FusedWaveblock")
        for i in (0, 1)
    ]
    assert report.left == ()
    assert report.model is model
    assert all(type(block) is wk.FusedWaveblock for block in model.layers)
    assert {id(t) for t in [*model.parameters(), *model.buffers()]} == tensors
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert_same_step(training_step(model, x), expected)
    assert repr(model.layers[0])


def test_optimizers_go_on(original: ModuleType) -> None:
    torch.manual_seed(0)
    model = original.sisr.WaveMix(**SMALL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(2, 3, 8, 8)
    training_step(model, x)
    optimizer.step()
    before = model.layers[0].reduction.weight.clone()
    accelerate(model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    training_step(model, x)
    optimizer.step()
    assert not torch.equal(model.layers[0].reduction.weight, before)
    assert all(p in optimizer.state for p in model.parameters())


def test_hooks_handles_and_modes_stay(original: ModuleType) -> None:
    model = original.sisr.WaveMix(**SMALL | {"dropout": 0.5})
    block = model.layers[0]
    seen: list[str] = []
    loaded_into: list[nn.Module] = []
    handles = [
        block.register_forward_pre_hook(lambda *_: seen.append("pre")),
        block.register_forward_hook(lambda *_, **__: seen.append("forward"), with_kwargs=True),
        block.register_full_backward_hook(lambda *_: seen.append("backward")),
        block.register_full_backward_pre_hook(lambda *_: seen.append("backward pre")),
        block.feedforward[5].register_forward_hook(lambda *_: seen.append("inner")),
        block.reduction.register_full_backward_hook(lambda *_: seen.append("inner backward")),
        block.register_state_dict_pre_hook(lambda *_: seen.append("state dict pre")),
        block.register_load_state_dict_pre_hook(lambda module, *_: loaded_into.append(module)),
        block.register_load_state_dict_post_hook(lambda *_: seen.append("load post")),
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
    assert set(seen) == {
        "pre", "forward", "backward", "backward pre", "inner", "inner backward", "state dict pre", "load post"
    }  # fmt: skip
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
    torch.manual_seed(0)
    block = original.Level1Waveblock(dropout=0.0)
    x = torch.randn(2, 16, 8, 8)
    expected = training_step(copy.deepcopy(block), x)
    report = accelerate(block, verbose=True)
    assert report.model is block
    assert_same_step(training_step(block, x), expected)
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


@pytest.mark.parametrize("mode", ["zero", "symmetric", "periodization"])
def test_wavelet_modules(wavelets: ModuleType, mode: str) -> None:
    class RoundTrip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.forth = wavelets.DWTForward(J=2, wave="haar", mode=mode)
            self.back = wavelets.DWTInverse(wave="db1", mode=mode)

        def forward(self, x: Tensor) -> Tensor:
            ll, highs = self.forth(x)
            return self.back((ll, [3 * high for high in highs]))

    torch.manual_seed(0)
    model = RoundTrip()
    x = torch.randn(2, 3, 8, 12)
    expected = training_step(model, x)
    state = model.state_dict()
    buffers = {id(b) for b in model.buffers()}
    report = accelerate(model)
    assert [(r.path, r.now) for r in report.replaced] == [
        ("forth", "wavemix_kernels.pytorch_wavelets.DWTForward"),
        ("back", "wavemix_kernels.pytorch_wavelets.DWTInverse"),
    ]
    assert {id(b) for b in model.buffers()} == buffers
    assert list(model.state_dict()) == list(state)
    assert_same_step(training_step(model, x), expected)
    model.load_state_dict(state, strict=True)
    assert accelerate(model).replaced == ()


def test_wavemixs_own_dwt(original: ModuleType) -> None:
    dwt = original.DWTForward(J=3)
    x = torch.randn(1, 2, 16, 16)
    ll, highs = dwt(x)
    accelerate(dwt)
    assert type(dwt) is our_wavelets.DWTForward
    torch.testing.assert_close(dwt(x), (ll, highs), rtol=1e-5, atol=1e-5)


def test_wavelets_it_leaves(wavelets: ModuleType) -> None:
    class DWTInverse(nn.Module):
        pass

    learned = wavelets.DWTForward(wave="haar")
    learned.h0_col = nn.Parameter(learned.__dict__["_buffers"].pop("h0_col"))
    replicate = wavelets.DWTForward(wave="haar", mode="zero")
    replicate.mode = "replicate"
    patched = wavelets.DWTInverse(wave="haar")
    patched.forward = lambda coeffs: coeffs[0]
    model = nn.ModuleDict(
        {
            "long": wavelets.DWTForward(wave="db2"),
            "stranger": DWTInverse(),
            "learned": learned,
            "replicate": replicate,
            "patched": patched,
            "scattering": wavelets.ScatLayer(),
        }
    )
    kinds = [type(m) for m in model.values()]
    report = accelerate(model)
    assert report.replaced == ()
    reasons = {entry.path: entry.reason for entry in report.left}
    assert reasons.keys() == {"long", "stranger", "learned", "replicate", "patched"}
    assert reasons["long"] == "its filters are not Haar's"
    assert "pytorch_wavelets" in reasons["stranger"]
    assert "buffers" in reasons["learned"]
    assert "replicate" in reasons["replicate"]
    assert "instance" in reasons["patched"]
    assert [type(m) for m in model.values()] == kinds
    assert "long: pytorch_wavelets.dwt.transform2d.DWTForward left: its filters are not Haar's" in str(report)


# --- Other blocks ----------------------------------------------------------------------------------------


def test_copies_of_upstreams_source_count_if_they_compute_the_same(original: ModuleType) -> None:
    same = type("Level1Waveblock", (original.Level1Waveblock,), {"__module__": "someone"})

    def doubled(self: nn.Module, x: Tensor) -> Tensor:
        return 2 * original.Level1Waveblock.forward(self, x)

    other = type("Level1Waveblock", (original.Level1Waveblock,), {"__module__": "someone", "forward": doubled})

    def positional(self: nn.Module, dim: int) -> None:
        original.Level1Waveblock.__init__(self, final_dim=dim)

    unbuildable = type(
        "Level1Waveblock", (original.Level1Waveblock,), {"__module__": "someone", "__init__": positional}
    )
    model = nn.Sequential(same(final_dim=12), other(), unbuildable(16))
    random_state = torch.get_rng_state()
    report = accelerate(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [r.path for r in report.replaced] == ["0"]
    assert [entry.path for entry in report.left] == ["1", "2"]
    assert "computes something else" in report.left[0].reason
    assert "could not be run beside ours" in report.left[1].reason


def spoil(block: nn.Module, how: str) -> None:
    if how == "relu":
        block.feedforward[1] = nn.ReLU()
    elif how == "gelu":
        block.feedforward[1] = nn.GELU(approximate="tanh")
    elif how == "dilated":
        block.feedforward[0].dilation = (2, 2)
    elif how == "missing":
        del block.reduction
    elif how == "wider":
        block.feedforward[3] = nn.Conv2d(32, 12, 1)
    elif how == "extra":
        block.gamma = nn.Parameter(torch.ones(16))
    elif how == "weight_norm":
        nn.utils.parametrizations.weight_norm(block.reduction)
    elif how == "affineless":
        block.feedforward[5] = nn.BatchNorm2d(16, affine=False)
    else:
        block.forward = lambda x: x


@pytest.mark.parametrize(
    "how, named",
    [
        ("relu", "feedforward.1 is ReLU"), ("gelu", "feedforward.1 is GELU"), ("dilated", "feedforward.0 is Conv2d"),
        ("missing", "reduction"), ("wider", "feedforward.4 is ConvTranspose2d"), ("extra", "gamma"),
        ("weight_norm", "reduction"), ("affineless", "feedforward.5.bias"), ("forward", "instance"),
    ],
)  # fmt: skip
def test_leaves_blocks_that_were_changed(original: ModuleType, how: str, named: str) -> None:
    model = nn.Sequential(original.Level1Waveblock())
    spoil(model[0], how)
    report = accelerate(model)
    assert report.replaced == ()
    assert named in report.left[0].reason
    assert type(model[0]) is original.Level1Waveblock


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


def test_rejects_what_is_no_module() -> None:
    for value in (None, torch.ones(1), [nn.Linear(1, 1)]):
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module"):
            accelerate(value)  # type: ignore[arg-type] - the wrong type is the point


def test_models_without_candidates_are_untouched() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    assert accelerate(model) == Report(model, (), ())


# --- Wave-MLP --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fc", "depthwise"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda dim: nn.GroupNorm(1, dim)], ids=["batch", "group"])
def test_vendored_wave_mlp(norm: Any, mode: str) -> None:
    torch.manual_seed(0)
    blocks = [vendored.WaveBlock(8, drop_path=rate, norm_layer=norm, mode=mode) for rate in (0.0, 0.5)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, vendored.PATM(8, qkv_bias=True, proj_drop=0.5, mode=mode))
    x = torch.randn(4, 3, 9, 8)

    untouched = copy.deepcopy(model)
    expected = training_step(untouched, x)
    tensors = {id(t) for t in [*model.parameters(), *model.buffers()]}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    report = accelerate(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert report.left == ()
    assert {r.path: r.now.rpartition(".")[2] for r in report.replaced if r.path.startswith(("2", "3"))} == {
        "2": "FusedWaveBlock", "2.attn": "FusedPATM", "2.attn.reweight": "FusedMlp", "2.mlp": "FusedMlp",
        "3": "FusedPATM", "3.reweight": "FusedMlp",
    }  # fmt: skip
    assert {id(t) for t in [*model.parameters(), *model.buffers()]} == tensors
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    # One function for each residual branch, with the drop path of the model's own.
    assert type(model[2].drop_path) is vendored.DropPath
    assert model[2].attn.why_not_joined() is None
    assert model[2].mlp.why_not_joined() is None
    assert_same_step(training_step(model, x), expected)
    assert accelerate(model).replaced == accelerate(model).left == ()
    torch.testing.assert_close(wk.fuse_for_inference(model)(x), untouched.eval()(x).detach(), rtol=1e-3, atol=1e-4)


def test_hooks_of_a_wave_block_stay() -> None:
    block = vendored.WaveBlock(8)
    seen: list[str] = []
    block.register_forward_hook(lambda *_: seen.append("block"))
    handle = block.attn.fc_h.register_forward_hook(lambda *_: seen.append("part"))
    block.norm2.eval()
    accelerate(block)
    assert [block.training, block.norm2.training] == [True, False]
    block(torch.randn(2, 8, 4, 4))
    assert seen == ["part", "block"]
    handle.remove()
    block(torch.randn(2, 8, 4, 4))
    assert seen == ["part", "block", "block"]


def test_wave_mlp_modules_it_leaves() -> None:
    def doubled(self: nn.Module, x: Tensor) -> Tensor:
        return 2 * vendored.PATM.forward(self, x)

    def post_norm(self: nn.Module, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.norm1(self.attn(x)))
        return x + self.drop_path(self.norm2(self.mlp(x)))

    class TransformerMlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)

    TransformerMlp.__name__ = "Mlp"
    other = type("PATM", (vendored.PATM,), {"forward": doubled})
    block = type("WaveBlock", (vendored.WaveBlock,), {"forward": post_norm})
    wide = vendored.PATM(8)
    wide.tfc_h = nn.Conv2d(16, 8, (1, 9), padding=(0, 4), groups=8, bias=False)
    patched = vendored.Mlp(4)
    patched.forward = lambda x: x
    droppy = vendored.WaveBlock(8)
    droppy.drop_path = nn.Dropout(0.5)
    model = nn.ModuleDict(
        {
            "other": other(8), "block": block(8), "wide": wide, "relu": vendored.Mlp(4, act_layer=nn.ReLU),
            "patched": patched, "droppy": droppy, "transformer": TransformerMlp(),
        }
    )  # fmt: skip
    report = accelerate(model)
    reasons = {entry.path: entry.reason for entry in report.left}
    assert reasons.keys() == {"other", "block", "wide", "relu", "patched", "droppy"}
    assert "computes something else" in reasons["other"]
    assert "computes something else" in reasons["block"]
    assert "tfc_h is Conv2d(16, 8, kernel_size=(1, 9)" in reasons["wide"]
    assert "act is ReLU()" in reasons["relu"]
    assert "instance" in reasons["patched"]
    assert "drop_path is Dropout" in reasons["droppy"]
    assert {type(model[name]) for name in reasons} == {type(m) for n, m in model.items() if n != "transformer"}
