"""Layers of video networks, by their arithmetic, under ``accelerate``: images frame by frame, a first frame apart from
the others, and an autoencoder between Cosmos' two patchers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.clients.test_haar_layers import HaarVideo, InverseHaarVideo
from wavemix_kernels import accelerate
from wavemix_kernels.haar_layers import HaarLayer


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def signs(axes: int) -> Tensor:
    """(2^axes, 2, ..., 2): the sum, then differences, the last axis first."""
    one = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    rule = {2: "ad,be->abde", 3: "ad,be,cf->abcdef"}[axes]
    return torch.einsum(rule, *[one] * axes).flatten(0, axes - 1)


def split(x: Tensor, taps: Tensor) -> Tensor:
    """All channels of a band together."""
    for axis, n in enumerate(x.shape[2:], 2):  # an odd size reflects its last sample but one
        x = torch.cat((x, x.narrow(axis, n - 2, 1)), axis) if n % 2 else x
    conv = nn.functional.conv2d if taps.dim() == 3 else nn.functional.conv3d
    c = x.shape[1]
    bands = conv(x, taps[:, None].repeat(c, *[1] * taps.dim()).to(x.dtype), stride=2, groups=c)
    return bands.unflatten(1, (c, len(taps))).transpose(1, 2).flatten(1, 2)


def join(bands: Tensor, taps: Tensor) -> Tensor:
    conv = nn.functional.conv_transpose2d if taps.dim() == 3 else nn.functional.conv_transpose3d
    c = bands.shape[1] // len(taps)
    inside = bands.unflatten(1, (len(taps), c)).transpose(1, 2).flatten(1, 2)
    return conv(inside, taps[:, None].repeat(c, *[1] * taps.dim()).to(bands.dtype), stride=2, groups=c)


class FramesDWT(nn.Module):
    """WF-VAE's 2-D layer: a video's frames are images of the batch."""

    transform = staticmethod(split)
    images = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("taps", signs(2)[[0, 2, 1, 3]] / 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            return self.transform(x, self.taps) if self.images else x
        frames = x.transpose(1, 2)
        return self.transform(frames.flatten(0, 1), self.taps).unflatten(0, frames.shape[:2]).transpose(1, 2)


class FramesIDWT(FramesDWT):
    transform = staticmethod(join)


class OnlyFramesDWT(FramesDWT):
    """Open-Sora-Plan's, which returns images as they are."""

    images = False


class FirstFrameDWT(nn.Module):
    """LeanVAE's: where the number of frames is odd, the first is an image."""

    def parts(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        t = x.shape[2]
        return x[:, :, :1] if t % 2 else None, x[:, :, t % 2 :] if t > 1 else None

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        one, more = self.parts(x)
        image = None if one is None else split(one.squeeze(2), signs(2)[[0, 2, 1, 3]]).unsqueeze(2)
        return image, None if more is None else split(more, signs(3))


class FirstFrameIDWT(nn.Module):
    def forward(self, pair: tuple[Tensor | None, Tensor | None]) -> Tensor:
        one, more = pair
        image = None if one is None else join(one.squeeze(2), signs(2)[[0, 2, 1, 3]]) / 4
        video = None if more is None else join(more, signs(3)) / 8
        if image is None or video is None:
            return video if image is None else image
        return torch.cat((image.unsqueeze(2), video), 2)


class OtherFirstFrameDWT(FirstFrameDWT):
    """The bands of the first frame have another scale than Haar's ever have."""

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        image, video = super().forward(x)
        return None if image is None else image * 0.9, video


IMAGE, VIDEO = (2, 12, 1, 4, 5), (2, 24, 3, 4, 5)
LAYERS: dict[str, tuple[type[nn.Module], list[Any]]] = {
    "wfvae": (FramesDWT, [(2, 3, 3, 8, 10), (2, 3, 8, 10)]),
    "wfvae_back": (FramesIDWT, [(2, 12, 3, 4, 5), (2, 12, 4, 5)]),
    "open_sora": (OnlyFramesDWT, [(2, 3, 3, 8, 10)]),
    "leanvae": (FirstFrameDWT, [(2, 3, t, 8 + odd, 10) for t, odd in ((7, 0), (6, 1), (1, 0), (3, 1))]),
    "leanvae_back": (FirstFrameIDWT, [((IMAGE, VIDEO),), ((None, VIDEO),), ((IMAGE, None),)]),
}


def made(shape: Any) -> Any:
    if shape is None or isinstance(shape[0], int):
        return None if shape is None else randn(*shape, seed=len(shape)).requires_grad_()
    return tuple(map(made, shape))


def tensors(value: Any) -> list[Tensor]:
    held = value if isinstance(value, tuple) else (value,)
    return [t for part in held for t in (tensors(part) if isinstance(part, tuple) else [part]) if t is not None]


@pytest.mark.parametrize("name", LAYERS)
def test_video_layers_are_served(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, shapes = LAYERS[name]
    ours, theirs = kind(), kind()
    report = accelerate(ours)
    assert ([r.path for r in report.replaced], report.left) == ([""], ())
    assert isinstance(ours, HaarLayer)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    plain = kind.forward
    for shape in shapes:
        given = (made(shape),) if isinstance(shape[0], int) else made(shape)
        got = {}
        for layer, own in ((theirs, plain), (ours, None)):
            monkeypatch.setattr(kind, "forward", own)  # it is ours that runs
            out = layer(*given)
            got[layer] = [out, torch.autograd.grad([t.sin().sum() for t in tensors(out)], tensors(given))]
        torch.testing.assert_close(*got.values(), rtol=0, atol=1e-4, msg=lambda text, shape=shape: f"{shape}: {text}")
    monkeypatch.setattr(kind, "forward", None)
    if name == "leanvae_back":  # its model names the argument
        torch.testing.assert_close(copy.deepcopy(ours)(pair=given[0]), out)


def test_calls_that_were_not_compared_run_as_they_were() -> None:
    frames, only, pair = FramesDWT(), OnlyFramesDWT(), FirstFrameIDWT()
    for layer in (frames, only, pair):
        accelerate(layer)
    x = randn(1, 3, 8, 8)
    assert only(x) is x
    frames.taps.mul_(2)
    torch.testing.assert_close(frames(x[:, :, None]), frames(x)[:, :, None], rtol=0, atol=0)
    with pytest.raises(RuntimeError):  # sizes that do not belong together
        pair((randn(1, 4, 1, 4, 4), randn(1, 8, 2, 4, 5)))
    with pytest.raises(TypeError):
        pair(randn(1, 4, 1, 4, 4), None)


@pytest.mark.parametrize("frames", [1, 4, 5])
def test_another_first_frame_stays_what_it_was(frames: int) -> None:
    layer, x = OtherFirstFrameDWT(), randn(1, 3, frames, 8, 8)
    want = layer(x)
    accelerate(layer)
    torch.testing.assert_close(tensors(layer(x)), tensors(want))


class Autoencoder(nn.Module):
    """Cosmos' patchers around layers of its own kind, by their arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.unpatch = HaarVideo(4, 0.125), InverseHaarVideo(4, 1.0)
        self.inner = nn.Sequential(nn.Conv3d(192, 16, 1), nn.SiLU(), nn.Conv3d(16, 4, 1))
        self.outer = nn.Sequential(nn.Conv3d(4, 16, 1), nn.SiLU(), nn.Conv3d(16, 192, 1))

    def encode(self, x: Tensor) -> Tensor:
        return self.inner(self.patch(x))

    def decode(self, z: Tensor) -> Tensor:
        return self.unpatch(self.outer(z))


def stand_in() -> tuple[nn.Module, Callable[..., Tensor], Callable[..., Tensor], tuple[str, str]]:
    model = Autoencoder()
    return model, Autoencoder.encode, Autoencoder.decode, ("patch", "unpatch")


def published() -> tuple[nn.Module, Callable[..., Tensor], Callable[..., Tensor], tuple[str, str]]:
    diffusers = pytest.importorskip("diffusers", reason="diffusers, whose AutoencoderKLCosmos this runs, is missing")
    model = diffusers.AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8, 8), decode_block_out_channels=(8, 8),
        attention_resolutions=(), resolution=16, num_layers=1, patch_size=4, spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )  # fmt: skip

    def encode(model: Any, x: Tensor) -> Tensor:
        return model.encode(x).latent_dist.mode()

    def decode(model: Any, z: Tensor) -> Tensor:
        return model.decode(z).sample

    return model, encode, decode, ("encoder.patch_embed", "decoder.unpatch_embed")


@pytest.mark.parametrize("make", [stand_in, pytest.param(published, marks=pytest.mark.prove)])
def test_cosmos_autoencoder_is_served_end_to_end(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, encode, decode, patchers = make()
    theirs = model.double()
    ours = copy.deepcopy(theirs)
    assert tuple(r.path for r in accelerate(ours).replaced) == patchers
    assert list(ours.state_dict()) == list(theirs.state_dict())
    results = []
    for each in (theirs, ours):
        if each is ours:
            for path in patchers:
                monkeypatch.setattr(type(theirs.get_submodule(path)), "forward", None)  # it is ours that runs
        x = randn(1, 3, 9, 16, 16).double().requires_grad_()
        z = encode(each, x)
        y = decode(each, z)
        assert y.shape == x.shape
        results.append((z, y, *torch.autograd.grad(y.sin().sum(), [x, *each.parameters()])))
    for want, got in zip(*results, strict=True):  # the published filters are rounded to float32
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * max(1.0, want.abs().max().item()))
