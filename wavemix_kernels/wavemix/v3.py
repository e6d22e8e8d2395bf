"""WaveMix V3: the classifier whose blocks shuffle their hidden layer into pixels."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from wavemix_kernels import checks
from wavemix_kernels.nn.wavemix.shuffle import FusedShuffleWaveblock
from wavemix_kernels.wavemix.classification import WaveMix

__all__ = ["WaveMixV3", "WaveMixV3Block"]


class WaveMixV3Block(FusedShuffleWaveblock):
    """The block of WaveMix V3: (N, final_dim, H, W) -> the same shape, H and W even; the residual is the caller's.

    Reduction and Haar, 1x1 convolution to ``4 * final_dim`` channels, GELU, dropout, PixelShuffle, 3x3 convolution,
    BatchNorm.

    Args:
        mult: 4, which is what PixelShuffle takes.
        ff_channel: without effect, as published.
        final_dim: channels C of input and output, a multiple of 4.
        dropout: probability of dropping a hidden activation.
        level, upsample: 1 and "pixelshuffle", for callers that name them for every block.

    Raises:
        TypeError, ValueError: an argument out of these ranges, or an input that does not fit them.

    Source: the authors' published code, whose parameter names and checkpoints these are.
    """

    def __init__(
        self,
        *,
        mult: int = 4,
        ff_channel: int = 16,
        final_dim: int = 16,
        dropout: float = 0.5,
        level: int = 1,
        upsample: str = "pixelshuffle",
    ) -> None:
        super().__init__(
            mult=mult, ff_channel=ff_channel, final_dim=final_dim, dropout=dropout, second=False, level=level,
            upsample=upsample,
        )  # fmt: skip


class WaveMixV3(WaveMix):
    """Image classifier: (N, 3, H, W) -> logits (N, num_classes). As its script builds it: ``final_dim=144``.

    Args:
        num_classes: number of logits.
        depth: number of blocks.
        mult: 4.
        ff_channel, level: without effect, as published.
        final_dim, dropout: each block's, see :class:`WaveMixV3Block`.
        initial_conv: the stem, "patch" (``classification.WaveMix`` calls it "pachify") or "strided".
        patch_size: side of a patch; has effect with "patch" only.
        stride: of each of the two convolutions; has effect with "strided" only.
        block: the block class; ``functools.partial(wavemix_kernels.reference.ShuffleWaveblock, second=False)`` makes
            the reference model.

    H and W have to reach the blocks as even numbers.

    Raises:
        TypeError, ValueError: an argument out of its range, or an image that does not fit (the message names the
            nearest sizes that do).

    Source: the authors' published code, whose parameter names and checkpoints these are.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        depth: int = 16,
        mult: int = 4,
        ff_channel: int = 192,
        final_dim: int = 192,
        dropout: float = 0.5,
        level: int = 3,
        initial_conv: str = "patch",
        patch_size: int = 4,
        stride: int = 1,
        block: Callable[..., nn.Module] = WaveMixV3Block,
    ) -> None:
        checks.check_choice("initial_conv", initial_conv, ("patch", "strided"))
        super().__init__(
            num_classes=num_classes,
            depth=depth,
            mult=mult,
            ff_channel=ff_channel,
            final_dim=final_dim,
            dropout=dropout,
            level=1,
            initial_conv="patchify" if initial_conv == "patch" else "strided",
            patch_size=patch_size,
            stride=stride,
            upsample="pixelshuffle",
            block=block,
        )
