"""WaveMixSR and WaveMixSR-V2: super-resolution of the luminance by Waveblocks, of the colours by interpolation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wavemix_kernels import checks, fx
from wavemix_kernels.nn.wavemix.block import FusedWaveblock
from wavemix_kernels.nn.wavemix.reference import ShuffleWaveblock, Waveblock
from wavemix_kernels.nn.wavemix.shuffle import FusedShuffleWaveblock
from wavemix_kernels.ops.common import layout
from wavemix_kernels.wavemix.backbone import through

__all__ = ["WaveMixSR", "WaveMixSRV2Block", "WaveMixSR_V2"]


class WaveMixSR(nn.Module):
    """Twofold super-resolution in YCbCr: (N, 3, H, W) -> (N, 3, 2H, 2W), any H and W.

    Channel 0 is the luminance: bicubic interpolation, two 3x3 convolutions, the blocks with residuals, a 3x3 and a 1x1
    convolution. Channels 1 and 2 are interpolated alone.

    Args:
        depth: number of level-1 blocks.
        mult, ff_channel, final_dim, dropout: each block's, see :class:`wavemix_kernels.FusedWaveblock`.
        interpolation: "bicubic", or "bilinear" as some of the published training scripts have it.
        block: the block class; :class:`wavemix_kernels.reference.Waveblock` makes the reference model.

    Raises:
        TypeError, ValueError: an argument out of its range, or an image of other than three channels.

    Source: Jeevan et al., WaveMixSR (WACV 2024); parameter names and checkpoints are those of its published code.
    """

    def __init__(
        self,
        *,
        depth: int,
        mult: int = 1,
        ff_channel: int = 16,
        final_dim: int = 16,
        dropout: float = 0.3,
        interpolation: str = "bicubic",
        block: Callable[..., nn.Module] = FusedWaveblock,
    ) -> None:
        super().__init__()
        checks.check_choice("interpolation", interpolation, ("bicubic", "bilinear"))
        self.layers = nn.ModuleList(
            block(level=1, mult=mult, ff_channel=ff_channel, final_dim=final_dim, dropout=dropout, upsample="deconv")
            for _ in range(checks.check_positive_int("depth", depth))
        )
        self._ends(final_dim, interpolation)

    def _ends(self, final_dim: int, interpolation: str = "bicubic") -> None:
        half = final_dim // 2
        self.final = nn.Sequential(nn.Conv2d(final_dim, half, 3, padding=1), nn.Conv2d(half, 1, 1))
        self.path1 = nn.Sequential(
            nn.Upsample(scale_factor=2, mode=interpolation),
            nn.Conv2d(1, half, 3, padding=1),
            nn.Conv2d(half, final_dim, 3, padding=1),
        )
        self.path2 = nn.Sequential(nn.Upsample(scale_factor=2, mode=interpolation))

    def forward(self, img: Tensor) -> Tensor:
        if not isinstance(img, fx.Proxy):
            checks.check_tensor("img", img, 4, "(N, 3, H, W)")
            if img.shape[1] != 3:
                raise ValueError(f"img: expected 3 channels (Y, Cb, Cr), got shape {tuple(img.shape)}")
        y = through(self.layers, self.path1(img[:, :1]))
        out = torch.cat((self.final(y), self.path2(img[:, 1:])), 1)
        return out if isinstance(img, fx.Proxy) else layout.ordered_as(out, img)


class _Stage(WaveMixSR):
    """One doubling of :class:`WaveMixSR_V2`."""

    def __init__(self, blocks: list[nn.Module], final_dim: int) -> None:
        nn.Module.__init__(self)
        self.layers = nn.ModuleList(blocks)
        self._ends(final_dim)


class WaveMixSR_V2(nn.Module):
    """Super-resolution in YCbCr by doublings: (N, 3, H, W) -> (N, 3, 2^k H, 2^k W) with k = ``sr / 2``, any H and W.

    ``sr=2`` doubles and ``sr=4`` quadruples; the published code makes ``sr=8`` four doublings, and so does this.

    Args:
        sr: twice the number of doublings, an even number.
        blocks: level-1 blocks in each doubling.
        mult, final_dim, dropout: each block's, see :class:`wavemix_kernels.FusedWaveblock`.
        upsample: ``"deconv"``, the block that the published file names (with ``ff_channel=16``), or
            ``"pixelshuffle"``, the paper's :class:`WaveMixSRV2Block`.
        block: the block class; :class:`wavemix_kernels.reference.Waveblock` makes the reference model.

    Raises:
        TypeError, ValueError: an argument out of its range, or an image of other than three channels.

    Source: Jeevan et al., arXiv:2409.10582; parameter names and checkpoints are those of its published code.
    """

    def __init__(
        self,
        *,
        sr: int = 2,
        blocks: int = 2,
        mult: int = 1,
        final_dim: int = 16,
        dropout: float = 0.3,
        upsample: str = "deconv",
        block: Callable[..., nn.Module] = FusedWaveblock,
    ) -> None:
        super().__init__()
        checks.check_multiple("sr", checks.check_positive_int("sr", sr), 2)
        checks.check_positive_int("blocks", blocks)
        options: dict[str, Any] = {"mult": mult, "final_dim": final_dim, "dropout": dropout}
        if checks.check_choice("upsample", upsample, ("deconv", "pixelshuffle")) == "pixelshuffle":
            options["ff_channel"] = 4 * final_dim
            if block is FusedWaveblock or block is Waveblock:
                block = WaveMixSRV2Block if block is FusedWaveblock else partial(ShuffleWaveblock, second=True)
        else:
            options |= {"level": 1, "upsample": upsample, "ff_channel": 16}
        self.SR_blocks = nn.ModuleList(
            _Stage([block(**options) for _ in range(blocks)], final_dim) for _ in range(sr // 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.SR_blocks:
            x = stage(x)
        return x


class WaveMixSRV2Block(FusedShuffleWaveblock):
    """The block of WaveMixSR-V2: level 1, PixelShuffle and a 3x3 convolution in place of the transposed one.

    (N, final_dim, H, W) -> the same shape, H and W even; the residual is the caller's to add.

    Args:
        mult: hidden width as a multiple of ``final_dim``.
        ff_channel: channels before PixelShuffle, ``4 * final_dim``: the published convolution takes no other number.
        final_dim: channels C of input and output, a multiple of 4.
        dropout: probability of dropping a hidden activation.

    Raises:
        TypeError, ValueError: an argument out of these ranges, or an input that does not fit them.

    Source: arXiv:2409.10582; parameter names and checkpoints are those of its published code.
    """

    def __init__(self, *, mult: int = 2, ff_channel: int = 16, final_dim: int = 16, dropout: float = 0.5) -> None:
        super().__init__(mult=mult, ff_channel=ff_channel, final_dim=final_dim, dropout=dropout, second=True)
