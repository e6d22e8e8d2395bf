"""The Waveblock of WaveMix (Jeevan et al., "WaveMix: A Resource-efficient Neural Network for Image Analysis",
arXiv:2205.14375), levels 1 to 4, in plain PyTorch.

On x (N, C, H, W), with r = conv1x1(x; C -> C/4) and Z_l = [LL_l | LH, HL, HH of each channel] of r:
``F_L = FF_L(Z_L)``, ``F_l = FF_l([Z_l | F_{l+1}])``, output ``F_1``, where
``FF(z) = BatchNorm(ConvTranspose(conv1x1(Dropout(GELU(conv1x1(z))))))``. The residual is the model's to add. Other
upsamplings than the transposed convolution take its place in FF.
Parameter names and shapes are upstream's (package ``wavemix`` 0.2.4), so checkpoints load both ways.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wavemix_kernels import checks, fx
from wavemix_kernels.ops.haar import reference as haar

LEVELS = (1, 2, 3, 4)
UPSAMPLES = ("deconv", "bilinear", "nearest", "pixelshuffle")


class Waveblock(nn.Module):
    """One Waveblock: (N, final_dim, H, W) -> the same shape, H and W multiples of ``2**level``.

    Args:
        level: DWT levels, 1 to 4.
        mult: hidden width of each feed-forward part as a multiple of ``final_dim``.
        ff_channel: channels between the second 1x1 convolution and the weights of the upsampling; without effect for
            "bilinear" and "nearest", which have no weights.
        final_dim: channels C of input and output, a multiple of 4.
        dropout: probability of dropping a hidden activation.
        upsample: what doubles the size at the end of each feed-forward part: "deconv" (a 4x4 transposed convolution),
            "bilinear" or "nearest" (the parameter-efficient Lite forms: the second 1x1 convolution gives the part's
            output channels itself) or "pixelshuffle" (PixelShuffle, then a 3x3 convolution; WaveMixSR-V2,
            arXiv:2409.10582; ``ff_channel`` a multiple of 4).

    Raises:
        TypeError, ValueError: an argument out of these ranges, or an input that does not fit them.

    Source: arXiv:2205.14375; package ``wavemix`` 0.2.4.
    """

    def __init__(
        self,
        *,
        level: int = 1,
        mult: int = 2,
        ff_channel: int = 16,
        final_dim: int = 16,
        dropout: float = 0.5,
        upsample: str = "deconv",
    ) -> None:
        super().__init__()
        if not isinstance(level, int) or level not in LEVELS:
            raise ValueError(f"level={level!r}: expected 1, 2, 3 or 4")
        checks.check_positive_int("mult", mult)
        checks.check_positive_int("ff_channel", ff_channel)
        # A quarter of the channels is transformed, into four bands.
        checks.check_multiple("final_dim", checks.check_positive_int("final_dim", final_dim), 4)
        checks.check_probability("dropout", dropout)
        checks.check_choice("upsample", upsample, UPSAMPLES)
        if upsample == "pixelshuffle":
            checks.check_multiple("ff_channel", ff_channel, 4)
        self.level = level
        self.final_dim = final_dim
        self.upsample = upsample
        for i in range(1, level + 1):
            setattr(self, self._feedforward_name(i), self._feedforward(i, mult, ff_channel, dropout))
        self.reduction = nn.Conv2d(final_dim, final_dim // 4, 1)

    def _feedforward_name(self, level: int) -> str:
        return "feedforward" if self.level == 1 else f"feedforward{level}"

    def _feedforward(self, level: int, mult: int, ff_channel: int, dropout: float) -> nn.Sequential:
        dim = self.final_dim
        inputs = dim if level == self.level else dim + dim // 2
        outputs = dim if level == 1 else dim // 2
        weightless = self.upsample in ("bilinear", "nearest")
        return nn.Sequential(
            nn.Conv2d(inputs, dim * mult, 1),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Conv2d(dim * mult, outputs if weightless else ff_channel, 1),
            self._upsampling(ff_channel, outputs),
            nn.BatchNorm2d(outputs),
        )

    def _upsampling(self, inputs: int, outputs: int) -> nn.Module:
        # One child whatever it is made of, so that BatchNorm has the same index in every form.
        if self.upsample == "deconv":
            return nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)
        if self.upsample == "pixelshuffle":
            return nn.Sequential(nn.PixelShuffle(2), nn.Conv2d(inputs // 4, outputs, 3, padding=1))
        return nn.Upsample(scale_factor=2, mode=self.upsample)

    def analyse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One DWT level: (LL, bands)."""
        return haar.analyse_level(x, "zero")

    def check_input(self, x: Tensor) -> None:
        if isinstance(x, fx.Proxy):
            return
        checks.check_tensor("x", x, 4, f"(N, {self.final_dim}, H, W)")
        if x.shape[1] != self.final_dim:
            raise ValueError(f"x: expected {self.final_dim} channels (final_dim), got shape {tuple(x.shape)}")
        for axis, size in (("H", x.shape[2]), ("W", x.shape[3])):
            checks.check_multiple(f"x: {axis}", size, 2**self.level)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        ll = self.reduction(x)
        pyramid = []
        for _ in range(self.level):
            ll, high = self.analyse(ll)
            pyramid.append(torch.cat((ll, high.flatten(1, 2)), 1))
        out: Tensor | None = None
        for level in range(self.level, 0, -1):
            z = pyramid[level - 1]
            out = getattr(self, self._feedforward_name(level))(z if out is None else torch.cat((z, out), 1))
        assert out is not None
        return out

    def extra_repr(self) -> str:
        return f"level={self.level}, upsample={self.upsample!r}"


class ShuffleWaveblock(Waveblock):
    """The level-1 block that ends in PixelShuffle and a 3x3 convolution, its layers side by side as published:
    (N, final_dim, H, W) -> the same shape, H and W even.

    Args:
        mult: hidden width as a multiple of ``final_dim``; 4 without a second convolution.
        ff_channel: channels before PixelShuffle: ``4 * final_dim``, as the 3x3 convolution keeps ``final_dim``; without
            effect where there is no second convolution.
        final_dim: channels C of input and output, a multiple of 4.
        dropout: probability of dropping a hidden activation.
        second: whether a second 1x1 convolution comes before PixelShuffle (WaveMixSR-V2), or the hidden layer itself is
            shuffled (WaveMix V3).
        level, upsample: 1 and "pixelshuffle", for callers that name them for every block.

    Raises:
        TypeError, ValueError: an argument out of these ranges, or an input that does not fit them.

    Source: arXiv:2409.10582 and the authors' published code, whose parameter names these are.
    """

    def __init__(
        self,
        *,
        mult: int = 2,
        ff_channel: int = 16,
        final_dim: int = 16,
        dropout: float = 0.5,
        second: bool,
        level: int = 1,
        upsample: str = "pixelshuffle",
    ) -> None:
        if level != 1:
            raise ValueError(f"level={level!r}: expected 1, the only level of this block")
        checks.check_choice("upsample", upsample, ("pixelshuffle",))
        checks.check_positive_int("final_dim", final_dim)
        if second and ff_channel != 4 * final_dim:
            raise ValueError(f"ff_channel={ff_channel!r}: expected 4 * final_dim = {4 * final_dim}")
        if not second and mult != 4:
            raise ValueError(f"mult={mult!r}: expected 4, as PixelShuffle takes 4 * final_dim channels")
        self.second = second
        super().__init__(
            mult=mult, ff_channel=4 * final_dim, final_dim=final_dim, dropout=dropout, upsample="pixelshuffle"
        )

    def _feedforward(self, level: int, mult: int, ff_channel: int, dropout: float) -> nn.Sequential:
        dim = self.final_dim
        return nn.Sequential(
            nn.Conv2d(dim, dim * mult, 1),
            nn.GELU(),
            nn.Dropout(dropout),
            *([nn.Conv2d(dim * mult, ff_channel, 1)] if self.second else []),
            nn.PixelShuffle(2),
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.BatchNorm2d(dim),
        )

    def extra_repr(self) -> str:
        return f"second={self.second}"


class Expansion(nn.Sequential):
    """(N, channels, h, w) -> (N, outputs, 2^k h, 2^k w), k being ``doublings``, with nothing between its layers.

    Args:
        channels: of the input; each transposed convolution (4x4 taps, stride 2, padding 1) halves them.
        doublings: how many there are, at least 1.
        outputs: channels of the 1x1 convolution behind them.
        widths: channels behind each transposed convolution, where they are not halved.

    Source: package ``wavemix`` 0.2.4, whose parameter names these are.
    """

    def __init__(self, channels: int, doublings: int, outputs: int, *, widths: Sequence[int] | None = None) -> None:
        if widths is not None and len(widths) != doublings:
            raise ValueError(f"widths={widths!r}: expected {doublings} numbers, one for each doubling")
        widths = [channels, *(widths or (channels >> k for k in range(1, doublings + 1)))]
        super().__init__(
            *(nn.ConvTranspose2d(wide, narrow, 4, 2, 1) for wide, narrow in itertools.pairwise(widths)),
            nn.Conv2d(widths[-1], outputs, 1),
        )
