"""WTConv as a user's repository holds it: the class, attribute and parameter names and shapes of BGU-CS-VIL/WTConv
(MIT; Finder et al., ECCV 2024, arXiv:2407.05848), written from the published structure."""

from __future__ import annotations

from functools import partial

import pywt
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def create_wavelet_filter(
    wave: str, in_size: int, out_size: int, type: torch.dtype = torch.float
) -> tuple[Tensor, Tensor]:
    """Analysis and synthesis filters (4 size, 1, L, L): LL, then high along H, along W and along both."""
    wavelet = pywt.Wavelet(wave)

    def products(low: list[float], high: list[float], size: int) -> Tensor:
        taps = {"l": torch.tensor(low, dtype=type), "h": torch.tensor(high, dtype=type)}
        bands = [torch.outer(taps[rows], taps[columns]) for rows, columns in ("ll", "hl", "lh", "hh")]
        return torch.stack(bands)[:, None].repeat(size, 1, 1, 1)

    analysis = products(wavelet.dec_lo[::-1], wavelet.dec_hi[::-1], in_size)
    return analysis, products(wavelet.rec_lo, wavelet.rec_hi, out_size)


def wavelet_transform(x: Tensor, filters: Tensor) -> Tensor:
    n, c, h, w = x.shape
    padding = (filters.shape[2] // 2 - 1, filters.shape[3] // 2 - 1)
    return F.conv2d(x, filters, stride=2, groups=c, padding=padding).reshape(n, c, 4, h // 2, w // 2)


def inverse_wavelet_transform(x: Tensor, filters: Tensor) -> Tensor:
    c = x.shape[1]
    padding = (filters.shape[2] // 2 - 1, filters.shape[3] // 2 - 1)
    return F.conv_transpose2d(x.flatten(1, 2), filters, stride=2, groups=c, padding=padding)


class ScaleModule(nn.Module):
    def __init__(self, dims: list[int], init_scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full(dims, init_scale))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class WTConv2d(nn.Module):
    """A depthwise convolution plus, per wavelet level, one of the four bands of the LL above, transformed back."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 5, bias: bool = True, wt_levels: int = 1,
        wt_type: str = "db1",
    ) -> None:  # fmt: skip
        super().__init__()
        assert in_channels == out_channels
        self.in_channels, self.wt_levels = in_channels, wt_levels
        analysis, synthesis = create_wavelet_filter(wt_type, in_channels, in_channels)
        self.wt_filter = nn.Parameter(analysis, requires_grad=False)
        self.iwt_filter = nn.Parameter(synthesis, requires_grad=False)
        self.wt_function = partial(wavelet_transform, filters=self.wt_filter)
        self.iwt_function = partial(inverse_wavelet_transform, filters=self.iwt_filter)
        self.base_conv = nn.Conv2d(in_channels, in_channels, kernel_size, padding="same", groups=in_channels, bias=bias)
        self.base_scale = ScaleModule([1, in_channels, 1, 1])
        wide = 4 * in_channels
        self.wavelet_convs = nn.ModuleList(
            nn.Conv2d(wide, wide, kernel_size, padding="same", groups=wide, bias=False) for _ in range(wt_levels)
        )
        self.wavelet_scale = nn.ModuleList(ScaleModule([1, wide, 1, 1], 0.1) for _ in range(wt_levels))

    def forward(self, x: Tensor) -> Tensor:
        ll, kept = x, []
        for conv, scale in zip(self.wavelet_convs, self.wavelet_scale, strict=True):
            height, width = ll.shape[2:]
            if height % 2 or width % 2:
                ll = F.pad(ll, (0, width % 2, 0, height % 2))
            bands = self.wt_function(ll)
            ll = bands[:, :, 0]
            n, c, _, h, w = bands.shape
            kept.append((scale(conv(bands.reshape(n, 4 * c, h, w))).reshape(bands.shape), height, width))
        back: Tensor | float = 0.0
        for bands, height, width in reversed(kept):
            joined = torch.cat(((bands[:, :, 0] + back).unsqueeze(2), bands[:, :, 1:]), 2)
            back = self.iwt_function(joined)[:, :, :height, :width]
        return self.base_scale(self.base_conv(x)) + back
