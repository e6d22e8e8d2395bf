"""The implementations that ours is measured against, written as a user would have them."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Other packages with the same wavelet transforms, and what they run on.
PEERS = {"ptwt": "PyTorch", "torchwavelets": "PyTorch", "PyWavelets": "C, without gradients"}


class Unavailable(Exception):
    """A provider that this machine cannot run; the message is the reason, in one line."""


def peers(
    wave: str, mode: str, levels: int, backward: bool, dtype: torch.dtype
) -> dict[str, Callable[[object], Callable[[Tensor], list[Tensor]]]]:
    """Makers of the analysis by each of :data:`PEERS`, with a level's bands joined in one tensor, as all others have
    them."""

    def joined(ll: Tensor, *details: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        return [ll, *(torch.stack(bands, 2) for bands in reversed(details))]

    def ptwt(_: object) -> Callable[[Tensor], list[Tensor]]:
        module = _imported("ptwt")
        return lambda x: joined(*module.wavedec2(x, wave, mode=mode, level=levels))

    def torchwavelets(setting: Any) -> Callable[[Tensor], list[Tensor]]:
        transform = _imported("torchwavelets").compat.DWTForward(J=levels, wave=wave, mode=mode)
        transform = transform.to(setting.device, setting.dtype)

        def run(x: Tensor) -> list[Tensor]:
            ll, highs = transform(x)
            return [ll, *highs]

        return run

    def pywavelets(setting: Any) -> Callable[[Tensor], list[Tensor]]:
        if backward or setting.device.type != "cpu" or dtype not in (torch.float32, torch.float64):
            raise Unavailable("PyWavelets has no gradients, no half types and no GPU")
        module = _imported("pywt")

        def run(x: Tensor) -> list[Tensor]:
            ll, *details = module.wavedec2(x.numpy(), wave, mode=mode, level=levels)
            return joined(torch.from_numpy(ll), *(tuple(map(torch.from_numpy, bands)) for bands in details))

        return run

    return {"ptwt": ptwt, "torchwavelets": torchwavelets, "PyWavelets": pywavelets}


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{name} does not import ({error})") from error


def cosmos_patcher(rounds: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """diffusers' ``CosmosPatchEmbed3d`` for patches of ``2**rounds``."""
    module = _imported("diffusers.models.autoencoders.autoencoder_kl_cosmos")
    return module.CosmosPatchEmbed3d(2**rounds).to(device, dtype)


@functools.cache
def upstream_wavelets() -> ModuleType:
    """The installed pytorch_wavelets.

    Raises:
        Unavailable: where it does not import. It needs ``pkg_resources``, which setuptools 81 dropped.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it announces pkg_resources' end at each import
            import pytorch_wavelets
    except ImportError as error:
        cure = ': pip install "setuptools<81"' if error.name == "pkg_resources" else ""
        raise Unavailable(f"pytorch_wavelets does not import ({error}){cure}") from error
    return pytorch_wavelets


def wtconv_transform(channels: int, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """WTConv's ``wt_function`` with wavelet 'db1' (BGU-CS-VIL/WTConv): a grouped convolution with fixed filters."""
    signs = torch.tensor([(1, 1, 1, 1), (1, 1, -1, -1), (1, -1, 1, -1), (1, -1, -1, 1)])
    filters = (signs / 2).reshape(4, 1, 2, 2).repeat(channels, 1, 1, 1).to(device, dtype)

    def transform(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return F.conv2d(x, filters, stride=2, groups=c).reshape(n, c, 4, h // 2, w // 2)

    return transform


class UpstreamWaveblock(nn.Module):
    """A Waveblock in the order of operations of wavemix 0.2.4, around the installed pytorch_wavelets.

    Each level calls a transform of its own, from the full resolution down: 1 + 2 + 3 + 4 = 10 levels of DWT where
    4 would do. Parameter names are upstream's.
    """

    def __init__(
        self, level: int, *, mult: int, ff_channel: int, final_dim: int, dropout: float, upsample: str = "deconv"
    ) -> None:
        super().__init__()
        if upsample != "deconv":
            raise ValueError(f"upsample={upsample!r}: wavemix 0.2.4 has 'deconv' alone")
        wavelets = upstream_wavelets()
        self.level = level
        self.reduction = nn.Conv2d(final_dim, final_dim // 4, 1)
        for number in range(1, level + 1):
            channels_in = final_dim if number == level else final_dim + final_dim // 2
            channels_out = final_dim if number == 1 else final_dim // 2
            feedforward = nn.Sequential(
                nn.Conv2d(channels_in, final_dim * mult, 1),
                nn.GELU(),
                nn.Dropout(dropout),
                nn.Conv2d(final_dim * mult, ff_channel, 1),
                nn.ConvTranspose2d(ff_channel, channels_out, 4, stride=2, padding=1),
                nn.BatchNorm2d(channels_out),
            )
            self.add_module("feedforward" if level == 1 else f"feedforward{number}", feedforward)
        # Upstream's transforms are globals, no submodules: their filters are no part of a checkpoint.
        self._transforms = [wavelets.DWTForward(J=number, wave="db1", mode="zero") for number in range(1, level + 1)]

    # Untyped as nn.Module's own, which changes between torch versions.
    def _apply(self, fn, recurse=True):  # as nn.Module has it
        super()._apply(fn, recurse)
        for transform in self._transforms:
            transform._apply(fn)
        return self

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.reduction(x)
        pyramid = []
        for transform in self._transforms:
            ll, highs = transform(reduced)
            pyramid.append(torch.cat((ll, highs[-1].flatten(1, 2)), dim=1))
        if self.level == 1:
            return self.feedforward(pyramid[0])
        out = self.get_submodule(f"feedforward{self.level}")(pyramid[-1])
        for number in range(self.level - 1, 0, -1):
            joined = torch.cat((pyramid[number - 1], out), dim=1)
            out = self.get_submodule(f"feedforward{number}")(joined)
        return out


class UpstreamPATM(nn.Module):
    """PATM in the order of operations of Efficient-AI-Backbones' ``wavemlp.py``, with its parameter names."""

    def __init__(self, dim: int, qkv_bias: bool = False, *, mode: str = "fc", **_: object) -> None:
        super().__init__()
        self.fc_h = nn.Conv2d(dim, dim, 1, bias=qkv_bias)
        self.fc_w = nn.Conv2d(dim, dim, 1, bias=qkv_bias)
        self.fc_c = nn.Conv2d(dim, dim, 1, bias=qkv_bias)
        self.tfc_h = nn.Conv2d(2 * dim, dim, (1, 7), padding=(0, 3), groups=dim, bias=False)
        self.tfc_w = nn.Conv2d(2 * dim, dim, (7, 1), padding=(3, 0), groups=dim, bias=False)
        self.reweight = nn.Sequential()
        self.reweight.add_module("fc1", nn.Conv2d(dim, dim // 4, 1))
        self.reweight.add_module("act", nn.GELU())
        self.reweight.add_module("fc2", nn.Conv2d(dim // 4, dim * 3, 1))
        self.proj = nn.Conv2d(dim, dim, 1)
        self.theta_h_conv, self.theta_w_conv = (
            nn.Sequential(
                nn.Conv2d(dim, dim, 1) if mode == "fc" else nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False),
                nn.BatchNorm2d(dim),
                nn.ReLU(),
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        n, c, _, _ = x.shape
        theta_h, theta_w = self.theta_h_conv(x), self.theta_w_conv(x)
        x_h, x_w = self.fc_h(x), self.fc_w(x)
        h = self.tfc_h(torch.cat((x_h * torch.cos(theta_h), x_h * torch.sin(theta_h)), dim=1))
        w = self.tfc_w(torch.cat((x_w * torch.cos(theta_w), x_w * torch.sin(theta_w)), dim=1))
        channel = self.fc_c(x)
        a = self.reweight(F.adaptive_avg_pool2d(h + w + channel, 1))
        a = a.reshape(n, c, 3).permute(2, 0, 1).softmax(0)[..., None, None]
        return self.proj(h * a[0] + w * a[1] + channel * a[2])
