"""accelerate() on what people's repositories hold: whatever looks like one of ours is in its report."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wavemix_kernels as wk
from tests import vendored_wavemlp
from tests.models.subjects import changed, normal, randomised
from wavemix_kernels import pytorch_wavelets as our_wavelets
from wavemix_kernels import reference, wtconv
from wavemix_kernels.accelerate import Report

vendored_wtconv = pytest.importorskip("tests.vendored_wtconv", reason="WTConv makes its filters by PyWavelets")
vendored_wavelets = pytest.importorskip("pytorch_wavelets", exc_type=ImportError)


def assert_keeps_values(model: nn.Module, x: Tensor, *paths: str) -> Report:
    """accelerate() replaces what lies at these paths, leaves nothing and keeps values and gradients."""
    leaf, given = x.clone().requires_grad_(), x.clone().requires_grad_()
    before = copy.deepcopy(model)
    report = wk.accelerate(model)
    assert tuple(r.path for r in report.replaced) == paths, str(report)
    assert report.left == ()
    results = []
    for run, of in ((before, leaf), (model, given)):
        torch.manual_seed(0)
        out = run(of)
        out.sum().backward()
        results.append((out, of.grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert wk.accelerate(model).replaced == ()
    return report


# --- WTConv since November 2024: two functions of a module -----------------------------------------------------

wavelet = ModuleType("someone.util.wavelet")


def wavelet_2d_transform(x: Tensor, filters: Tensor) -> Tensor:
    return vendored_wtconv.wavelet_transform(x, filters)


def inverse_2d_wavelet_transform(x: Tensor, filters: Tensor) -> Tensor:
    return vendored_wtconv.inverse_wavelet_transform(x, filters)


@pytest.fixture(autouse=True)
def _functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate() exchanges them for the whole process."""
    for function in (wavelet_2d_transform, inverse_2d_wavelet_transform):
        monkeypatch.setattr(wavelet, function.__name__, function, raising=False)
        monkeypatch.setitem(globals(), function.__name__, function)


class Filters(nn.Module):
    def __init__(self, channels: int, wave: str = "db1") -> None:
        super().__init__()
        analysis, synthesis = vendored_wtconv.create_wavelet_filter(wave, channels, channels)
        self.wt_filter = nn.Parameter(analysis, requires_grad=False)
        self.iwt_filter = nn.Parameter(synthesis, requires_grad=False)


class Today(Filters):
    def forward(self, x: Tensor) -> Tensor:
        bands = wavelet.wavelet_2d_transform(x, self.wt_filter)
        return wavelet.inverse_2d_wavelet_transform(bands * torch.arange(1.0, 5.0).reshape(4, 1, 1), self.iwt_filter)


class ByName(Filters):
    def forward(self, x: Tensor) -> Tensor:
        return inverse_2d_wavelet_transform(wavelet_2d_transform(x, self.wt_filter).abs(), self.iwt_filter)


@pytest.mark.parametrize("kind", [Today, ByName])
def test_wtconv_of_today(kind: type[Filters], monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(kind(4))
    report = assert_keeps_values(model, normal(2, 4, 6, 8, dtype=torch.float32), "0")
    assert "wavelet_2d_transform" in report.replaced[0].now
    assert "for all that call them" in report.replaced[0].now
    calls: list[str] = []
    bands = wtconv.haar_bands
    monkeypatch.setattr(wtconv, "haar_bands", lambda x: (calls.append("haar"), bands(x))[1])
    x = normal(1, 4, 6, 8, dtype=torch.float32)
    another = kind(4)
    expected = another(x)
    assert calls == ["haar"]
    another.wt_filter.requires_grad_()
    another(x).sum().backward()
    assert another.wt_filter.grad is not None
    another.wt_filter.requires_grad_(False)
    torch.testing.assert_close(another(x), expected)
    assert calls == ["haar"] * 2
    with torch.no_grad():
        another.wt_filter.mul_(-1)
    another(x)
    assert calls == ["haar"] * 2
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


class OneFunction(Filters):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(wavelet.wavelet_2d_transform(x, self.wt_filter).flatten(1, 2), self.iwt_filter)


@pytest.mark.parametrize("build, reason", [
    (lambda: Today(4, "db2"), "wt_filter have shape (16, 1, 4, 4)"),
    (lambda: OneFunction(4), "no functions beside its class"),
])  # fmt: skip
def test_wtconv_of_today_is_left(build: Callable[[], nn.Module], reason: str) -> None:
    report = wk.accelerate(nn.Sequential(build()))
    assert report.replaced == ()
    (left,) = report.left
    assert reason in left.reason


# --- Transforms that are no submodules ---------------------------------------------------------------------------

analysis = vendored_wavelets.DWTForward(J=1, wave="haar")


def transformed(x: Tensor) -> Tensor:
    ll, (high,) = analysis(x)
    return torch.cat((ll, high.flatten(1, 2)), 1)


class Around(nn.Module):
    """Its transform is a global variable, as in loss functions and in WaveMix's own scripts."""

    def forward(self, x: Tensor) -> Tensor:
        return transformed(x)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transforms = [vendored_wavelets.DWTForward(J=1), vendored_wavelets.DWTForward(J=2)]
        self.by_name = {"haar": vendored_wavelets.DWTForward(J=1, wave="haar")}

    def forward(self, x: Tensor) -> Tensor:
        return self.transforms[0](x)[0] + self.by_name["haar"](x)[0]


def test_a_transform_is_a_global_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "analysis", vendored_wavelets.DWTForward(J=1, wave="haar"))
    assert_keeps_values(nn.Sequential(Around()), normal(2, 4, 6, 8, dtype=torch.float32), f"{__name__}.analysis")
    assert type(analysis) is our_wavelets.DWTForward


def test_transforms_are_in_a_list_and_a_dict() -> None:
    model = nn.Sequential(Listed())
    paths = ("0.transforms[0]", "0.transforms[1]", "0.by_name['haar']")
    assert_keeps_values(model, normal(2, 4, 6, 8, dtype=torch.float32), *paths)


def own(kind: type[nn.Module], name: str, **methods: Any) -> type[nn.Module]:
    return type(name, (kind,), {"__module__": "another_project.models.wavemix_kernels"} | methods)


class OnlyLow(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.transform = kind(J=2, mode="symmetric")

    def forward(self, x: Tensor) -> Tensor:
        return self.transform(x)[0]


def test_pytorch_wavelets_is_vendored() -> None:
    kind = own(vendored_wavelets.DWTForward, "HaarTransform")
    assert_keeps_values(OnlyLow(kind), normal(2, 4, 8, 12, dtype=torch.float32), "transform")


# --- Blocks under other names, by other authors ------------------------------------------------------------------


class MLP(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 4, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(channels // 4, 3 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TokenMixing(vendored_wavemlp.UpstreamPATM):
    """Another author's: no dropout anywhere, and ``dim`` alone."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.reweight = MLP(dim)


class Binarised(TokenMixing):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sign())


def test_a_patm_of_another_author() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 1), TokenMixing(8)))
    keys = list(model.state_dict())
    assert_keeps_values(model, normal(4, 3, 6, 7, dtype=torch.float32), "1", "1.reweight")
    assert type(model[1]) is wk.FusedPATM
    assert model[1].why_not_fused() is None
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("level", [1, 3])
def test_a_block_of_another_name_with_another_constructor(level: int) -> None:
    def build(self: Any, width: int) -> None:
        reference.Waveblock.__init__(self, level=level, final_dim=width, ff_channel=8, dropout=0.0)

    model = nn.Sequential(own(reference.Waveblock, "TokenMixer", __init__=build)(8))
    assert_keeps_values(model, normal(2, 8, 16, 24, dtype=torch.float32), "0")
    assert type(model[0]) is wk.FusedWaveblock


SCALED = own(vendored_wavelets.DWTForward, "HaarTransform", forward=lambda self, x: (x, []))


@pytest.mark.parametrize("build, reason", [
    (lambda: Binarised(8), "computes something else"),
    (lambda: changed(TokenMixing(8), proj=nn.Conv2d(8, 8, 3, padding=1)), "proj is Conv2d"),
    (lambda: own(reference.Waveblock, "Mixer", forward=lambda self, x: x)(), "computes something else"),
    (lambda: SCALED(), "computes something else"),
    (lambda: own(reference.Mlp, "Ffn",
                 forward=lambda self, x: self.fc2(self.fc1(x)))(8), "computes something else"),
])  # fmt: skip
def test_one_that_computes_something_else_is_left(build: Callable[[], nn.Module], reason: str) -> None:
    module = build()
    kind = type(module)
    report = wk.accelerate(nn.Sequential(module))
    assert [left.path for left in report.left][:1] == ["0"]
    assert reason in report.left[0].reason, report.left[0].reason
    assert type(module) is kind


def test_a_counter_of_operations_was_here() -> None:
    """thop leaves buffers on every module."""
    model = nn.Sequential(own(reference.Waveblock, "Block")(), vendored_wavemlp.PATM(8), vendored_wavelets.DWTForward())
    for module in model.modules():
        module.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
        module.register_buffer("total_params", torch.zeros(1, dtype=torch.float64))
    report = wk.accelerate(model)
    assert [r.path for r in report.replaced] == ["0", "1", "1.reweight", "2"], str(report)
    assert model[0](torch.randn(1, 16, 8, 8)).shape == (1, 16, 8, 8)


def test_judging_touches_no_hook_no_statistic_and_no_random_number() -> None:
    called: list[str] = []
    model = nn.Sequential(TokenMixing(8))
    model[0].register_forward_hook(lambda *_: called.append("hook"))
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    wk.accelerate(model)
    assert called == []
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model(torch.randn(2, 8, 4, 4))
    assert called == ["hook"]


def test_common_modules_are_not_in_the_report() -> None:
    """A squeeze-and-excitation has fc1 and fc2 of 1x1 too, a transformer's block norm1, attn, norm2 and mlp."""
    excite: Any = nn.Module()
    excite.fc1, excite.fc2, excite.gate = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1), nn.Sigmoid()
    block: Any = nn.Module()
    block.norm1, block.attn, block.norm2 = nn.LayerNorm(8), nn.MultiheadAttention(8, 2), nn.LayerNorm(8)
    block.mlp = nn.Sequential(nn.Linear(8, 8))
    report = wk.accelerate(nn.Sequential(excite, block))
    assert report.replaced == report.left == ()
