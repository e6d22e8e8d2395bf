"""Layers as public networks write Haar, by their arithmetic, under ``accelerate``."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from wavemix_kernels import accelerate, haar_layers
from wavemix_kernels.haar_layers import HaarLayer


class SquareDWT(nn.Module):
    """MWCNN's order and signs."""

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        a, b, c, d = (x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1))
        return tuple(s / 2 for s in (a + b + c + d, b + d - a - c, c + d - a - b, a + d - b - c))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.parts(x), 1)


class BatchDWT(SquareDWT):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.parts(x), 0)


class SeparateDWT(nn.Module):
    """WaveCNet's: matrices made at every call and left on the module."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self.width = x.shape[-1]
        self.matrix = torch.eye(self.width).unflatten(0, (-1, 2))
        low, high = (self.matrix[:, 0] + self.matrix[:, 1]) / 2**0.5, (self.matrix[:, 0] - self.matrix[:, 1]) / 2**0.5
        rows = torch.eye(x.shape[-2]).unflatten(0, (-1, 2))
        up, down = (rows[:, 0] + rows[:, 1]) / 2**0.5, (rows[:, 0] - rows[:, 1]) / 2**0.5
        return tuple(v @ x @ h.T for v in (up, down) for h in (low, high))


class SeparateIDWT(nn.Module):
    def forward(self, ll: Tensor, right: Tensor, below: Tensor, both: Tensor) -> Tensor:
        out = ll.new_empty(*ll.shape[:2], 2 * ll.shape[2], 2 * ll.shape[3])
        for i, s in enumerate((1, -1)):
            for j, t in enumerate((1, -1)):
                out[:, :, i::2, j::2] = (ll + t * right + s * below + s * t * both) / 2
        return out


class WavePool(nn.Module):
    """WCT2's: a frozen convolution for each band, the two differences with the sign reversed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        signs = ((1.0, 1, 1, 1), (-1, 1, -1, 1), (-1, -1, 1, 1), (1, -1, -1, 1))
        self.bands = nn.ModuleList(nn.Conv2d(channels, channels, 2, 2, groups=channels, bias=False) for _ in signs)
        for band, taps in zip(self.bands, signs, strict=True):
            band.weight = nn.Parameter(torch.tensor(taps).view(1, 1, 2, 2).repeat(channels, 1, 1, 1) / 2, False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(band(x) for band in self.bands)


class WaveUnpool(WavePool):
    def forward(self, ll: Tensor, right: Tensor, below: Tensor, both: Tensor) -> Tensor:
        given, groups = torch.cat((ll, right, below, both), 1), 4 * ll.shape[1]
        apart = F.conv_transpose2d(given, torch.cat([band.weight for band in self.bands]), stride=2, groups=groups)
        return apart.unflatten(1, (4, -1)).sum(1)


class WideWavePool(WavePool):
    """WaveGAN's: each band with a copy of itself beside it."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(band.repeat_interleave(2, 1) for band in super().forward(x))


WavePool.forward.__module__ = "torch_wavelets"  # a common name of such files, which is not PyTorch


class CountingHaar(nn.Module):
    """IRN's: half of the orthonormal one, both directions in one layer, and a log-determinant that others read."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        signs = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
        self.weights = nn.Parameter(signs.view(4, 1, 2, 2).repeat(channels, 1, 1, 1), requires_grad=False)
        self.channels = channels

    def forward(self, x: Tensor, rev: bool = False) -> Tensor:
        self.last_jac = x[0].numel() / 4 * math.log(16.0 if rev else 1 / 16)
        if rev:
            inner = x.unflatten(1, (4, self.channels)).transpose(1, 2).flatten(1, 2)
            return F.conv_transpose2d(inner, self.weights, stride=2, groups=self.channels)
        out = F.conv2d(x, self.weights, stride=2, groups=self.channels) / 4
        return out.unflatten(1, (self.channels, 4)).transpose(1, 2).flatten(1, 2)

    def jacobian(self) -> float:
        return self.last_jac


class HaarVideo(nn.Module):
    """WF-VAE's and Cosmos's: packets of a volume whose first frame is repeated, with a setting from outside."""

    def __init__(self, patch: int, scale: float) -> None:
        super().__init__()
        self.patch, self.scale, self.first = patch, scale, True
        self.register_buffer("taps", torch.tensor([[1.0, 1.0], [1.0, -1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            x = torch.cat([x[:, :, :1]] * (self.patch - 1) + [x], 2)
        cubes = torch.einsum("ad,bh,cw->abcdhw", self.taps, self.taps, self.taps).flatten(0, 2)[:, None] * self.scale
        for _ in range(int(math.log2(self.patch))):
            c = x.shape[1]
            x = F.conv3d(x, cubes.repeat(c, 1, 1, 1, 1), stride=2, groups=c)
            x = x.unflatten(1, (c, 8)).transpose(1, 2).flatten(1, 2)
        return x


class InverseHaarVideo(HaarVideo):
    def forward(self, x: Tensor) -> Tensor:
        cubes = torch.einsum("ad,bh,cw->abcdhw", self.taps, self.taps, self.taps).flatten(0, 2)[:, None] * self.scale
        for _ in range(int(math.log2(self.patch))):
            c = x.shape[1] // 8
            x = x.unflatten(1, (8, c)).transpose(1, 2).flatten(1, 2)
            x = F.conv_transpose3d(x, cubes.repeat(c, 1, 1, 1, 1), stride=2, groups=c)
        return x[:, :, self.patch - 1 :] if self.first else x


class TupleHaar(CountingHaar):
    """FrEIA's: tuples, a log-determinant, arguments that change nothing; the way back scales its input in place."""

    def forward(self, x: Any, c: Any = None, jac: bool = True, rev: bool = False) -> Any:  # type: ignore[override]
        (inner,) = x
        determinant = inner[0].numel() * math.log(0.7) * (-1 if rev else 1)
        if rev:
            inner *= 0.5 / 0.7
            return (F.conv_transpose2d(inner, self.weights, stride=2, groups=self.channels),), determinant
        return (F.conv2d(inner, self.weights, stride=2, groups=self.channels) * 0.35,), determinant


class LineDWT(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x[..., ::2] + x[..., 1::2]) / 2**0.5, (x[..., ::2] - x[..., 1::2]) / 2**0.5


class LineIDWT(nn.Module):
    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return torch.stack((low + high, low - high), -1).flatten(-2) / 2**0.5


class LowDWT(SquareDWT):
    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x)[0]


class ListDWT(SquareDWT):
    """The low band beside the others, twice."""

    def forward(self, x: Tensor) -> Any:
        low, *high = self.parts(x)
        return [low, torch.cat(high, 1), torch.stack(high, 2)]


class PairIDWT(SeparateIDWT):
    def forward(self, low: Tensor, high: Tensor) -> Tensor:  # type: ignore[override]  # two bands
        return super().forward(low, *high.chunk(3, 1)) / 4


def one(*size: int) -> Callable[[], list[Tensor]]:
    return lambda: [torch.randn(size, generator=torch.Generator().manual_seed(1))]


LAYERS = {
    "mwcnn": (SquareDWT, one(2, 5, 6, 10)),
    "diffll": (BatchDWT, one(2, 5, 6, 10)),
    "wavecnet": (SeparateDWT, one(2, 5, 6, 10)),
    "wavecnet_back": (SeparateIDWT, lambda: list(torch.randn(4, 2, 3, 4, 5).unbind())),
    "wct2": (lambda: WavePool(5), one(2, 5, 6, 10)),
    "wct2_back": (lambda: WaveUnpool(5), lambda: list(torch.randn(4, 2, 5, 4, 5).unbind())),
    "irn": (lambda: CountingHaar(5), one(2, 5, 6, 10)),
    "cosmos": (lambda: HaarVideo(4, 0.125), one(1, 2, 5, 8, 12)),
    "wfvae": (lambda: HaarVideo(2, 0.3536), one(1, 3, 5, 8, 12)),
    "wfvae_back": (lambda: InverseHaarVideo(2, 0.3536), one(1, 16, 3, 4, 5)),
    "line": (LineDWT, one(2, 5, 12)),
    "line_back": (LineIDWT, lambda: list(torch.randn(2, 2, 5, 6).unbind())),
    "freia": (lambda: TupleHaar(5), lambda: [tuple(one(2, 5, 6, 10)())]),
    "low": (LowDWT, one(2, 5, 6, 10)),
    "low_and_high": (ListDWT, one(2, 5, 6, 10)),
    "low_and_high_back": (PairIDWT, lambda: [*one(2, 5, 4, 5)(), *one(2, 15, 4, 5)()]),
    "cosmos_back": (lambda: InverseHaarVideo(4, 1.0), one(1, 64, 3, 4, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_served(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, inputs = LAYERS[name]
    layer, given = make(), inputs()
    want = make()(*given)
    keys = list(layer.state_dict())
    report = accelerate(layer)
    assert ([r.path for r in report.replaced], report.left) == ([""], ())
    assert isinstance(layer, HaarLayer)
    assert isinstance(layer, type(make()))
    assert list(layer.state_dict()) == keys
    monkeypatch.setattr(type(make()), "forward", None)  # it is ours that runs
    for module in (layer, copy.deepcopy(layer)):
        torch.testing.assert_close(
            module(*given), want, rtol=0, atol=2e-6 * max(t.abs().max() for t in tree_leaves(given)) * 8
        )
    assert not accelerate(layer).replaced


def test_gradients_are_the_layers() -> None:
    layer, (x,) = HaarVideo(2, 0.3536), one(1, 3, 5, 8, 12)()
    grads = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(layer(leaf).square().sum(), leaf)[0])
        accelerate(layer)
    torch.testing.assert_close(*grads)


def test_outside_state_is_kept() -> None:
    ours, theirs = CountingHaar(3), CountingHaar(3)
    accelerate(ours)
    for x, rev in ((torch.randn(1, 3, 8, 6), False), (torch.randn(1, 12, 4, 3), True)):
        torch.testing.assert_close(ours(x, rev=rev), theirs(x, rev=rev))
        torch.testing.assert_close(ours(x, rev), theirs(x, rev))
        assert ours.jacobian() == pytest.approx(theirs.jacobian(), rel=1e-12)


def test_tuples_determinants_and_inputs_scaled_in_place() -> None:
    ours, theirs = TupleHaar(3), TupleHaar(3)
    accelerate(ours)
    for calls, size in ((({}, {"jac": False}, {"c": None}), (2, 3, 8, 6)), (({"rev": True},), (2, 12, 4, 3))):
        for kwargs in calls:
            got = []
            for layer in (ours, theirs):
                leaf = one(*size)()[0].requires_grad_()
                x = leaf.clone()
                (y,), determinant = layer((x,), **kwargs)
                got.append((y, determinant, x, torch.autograd.grad(y.square().sum(), leaf)[0]))
            torch.testing.assert_close(got[0], got[1], rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="channels"):  # its own code says what it takes
        ours((torch.zeros(1, 6, 4, 4),))
    with pytest.raises(RuntimeError, match="in-place"):
        ours((torch.zeros(1, 12, 4, 4, requires_grad=True),), rev=True)


class GpuDWT(SquareDWT):
    """Moves what it makes to the GPU, where no copy is compared."""

    def forward(self, x: Tensor) -> Tensor:
        half = torch.full((1,), 0.5, device=x.device).cuda()
        return super().forward(x) * 2 * half.to("cuda")


def test_a_layer_that_asks_for_a_gpu_is_compared() -> None:
    layer = GpuDWT()
    assert accelerate(layer).replaced
    torch.testing.assert_close(layer(*one(1, 2, 4, 6)()), SquareDWT()(*one(1, 2, 4, 6)()))


def test_what_was_not_compared_runs_as_it_was() -> None:
    layer, theirs, (x,) = HaarVideo(2, 0.3536), HaarVideo(2, 0.3536), one(1, 3, 5, 8, 12)()
    accelerate(layer)
    layer.first = theirs.first = False  # a setting from outside: streaming
    torch.testing.assert_close(layer(x[:, :, :4]), theirs(x[:, :, :4]), rtol=0, atol=0)
    layer.first = theirs.first = True
    layer.taps.mul_(2)  # other filters
    theirs.taps.mul_(2)
    torch.testing.assert_close(layer(x), theirs(x), rtol=0, atol=0)
    layer.double()
    assert layer(x.double()).dtype == torch.float64
    square = SquareDWT()
    accelerate(square)
    with pytest.raises(RuntimeError):  # it refuses odd sizes, and so it still does
        square(torch.zeros(1, 1, 5, 6))


class Elsewhere(Tensor):
    """A tensor of a device that this machine lacks: nothing computes with it until it is moved to the CPU."""

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.clone()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.einsum:
            raise RuntimeError("no such device here")
        out = super().__torch_function__(function, types, args, kwargs or {})
        return out.as_subclass(Tensor) if function is Tensor.cpu else out


@pytest.mark.parametrize("plain", [False, True])
def test_a_layer_is_compared_wherever_it_lies(plain: bool) -> None:
    layer = HaarVideo(2, 0.3536)
    taps = layer.taps.as_subclass(Elsewhere)
    if plain:  # a tensor that `to` does not move
        del layer.taps
        layer.__dict__["taps"] = taps
    else:
        layer.taps = taps
    state = torch.get_rng_state()
    report = accelerate(layer)
    assert [r.path for r in report.replaced] == [""]
    assert layer.taps is taps
    assert torch.equal(state, torch.get_rng_state())


def test_calls_on_a_gpu_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for one: it has no values to look at."""
    layer, counting = SquareDWT(), CountingHaar(3)
    for module in (layer, counting):
        accelerate(module)
    monkeypatch.setattr(haar_layers, "_DEVICES", ("meta",))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(SquareDWT, "forward", None)  # it is ours that runs
    assert layer(torch.empty(2, 5, 6, 10, device="meta")).shape == (2, 20, 3, 5)
    calls = []
    monkeypatch.setattr(CountingHaar, "forward", lambda self, x: calls.append(x.device.type))
    counting(torch.empty(2, 3, 6, 10, device="meta"))  # filters on another device: its own code says so
    assert calls == ["meta"]


class OtherHaar(SquareDWT):
    """One sign is not Haar's."""

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.parts(x)
        return torch.cat((a, b, c, d + 0.1 * a), 1)


class LearnedHaar(CountingHaar):
    def __init__(self) -> None:
        super().__init__(3)
        self.weights.requires_grad_(True)


class NoisyHaar(SquareDWT):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.training)


@pytest.mark.parametrize(
    "make, reason",
    [(OtherHaar, "computes none of the conventions"),
     (lambda: WideWavePool(3), "computes none of the conventions"), (LearnedHaar, "its filters are trainable"),
     (NoisyHaar, "computes something else")],
)  # fmt: skip
def test_others_are_left_with_a_reason(make: Callable[[], nn.Module], reason: str) -> None:
    layer = make()
    report = accelerate(layer)
    assert not report.replaced
    assert not isinstance(layer, HaarLayer)
    assert reason in report.left[0].reason
