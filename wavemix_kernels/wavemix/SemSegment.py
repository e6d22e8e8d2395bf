"""Drop-in for ``wavemix.SemSegment``: the WaveMix model for semantic segmentation."""

from collections.abc import Callable

from torch import Tensor, nn

from wavemix_kernels import checks
from wavemix_kernels.nn.wavemix.block import FusedWaveblock
from wavemix_kernels.nn.wavemix.expansion import FusedExpansion
from wavemix_kernels.nn.wavemix.reference import Expansion
from wavemix_kernels.ops.common import layout
from wavemix_kernels.wavemix import classification
from wavemix_kernels.wavemix.backbone import Backbone, strided_stem

__all__ = ["CityscapesWaveMix", "WaveMix"]


class WaveMix(Backbone):
    """Semantic segmentation: (N, 3, H, W) -> a logit per class and pixel (N, num_classes, H, W).

    Args:
        num_classes: number of classes.
        depth: number of Waveblocks.
        mult, ff_channel, final_dim, dropout, level, upsample: each block's, see
            :class:`wavemix_kernels.FusedWaveblock`.
        stride: of each of the stem's two convolutions. The head always enlarges four times, which undoes stride 2;
            with stride 1 the output is four times the image's size, as upstream has it.
        block: the block class; :class:`wavemix_kernels.reference.Waveblock` makes the reference model.

    H and W have to reach the blocks as multiples of ``2**level``; multiples of ``stride**2 * 2**level`` do.

    Raises:
        TypeError, ValueError: an argument out of its range, or an image that does not fit (the message names the
            nearest sizes that do).

    Source: arXiv:2205.14375; package ``wavemix`` 0.2.4, whose parameter names and checkpoints these are.
    """

    def __init__(
        self,
        *,
        num_classes: int = 20,
        depth: int = 16,
        mult: int = 2,
        ff_channel: int = 256,
        final_dim: int = 256,
        dropout: float = 0.0,
        level: int = 4,
        stride: int = 2,
        upsample: str = "deconv",
        block: Callable[..., nn.Module] = FusedWaveblock,
    ) -> None:
        super().__init__(
            depth=depth,
            mult=mult,
            ff_channel=ff_channel,
            final_dim=final_dim,
            dropout=dropout,
            level=level,
            upsample=upsample,
            block=block,
        )
        checks.check_positive_int("num_classes", num_classes)
        self.expand = self.expansion(final_dim, 2, num_classes)
        self.conv = strided_stem(3, final_dim, stride)

    def forward(self, img: Tensor) -> Tensor:
        return layout.ordered_as(self.expand(self.features(img)), img)


class CityscapesWaveMix(classification.WaveMix):
    """Semantic segmentation by the classifier with another head: (N, 3, H, W) -> (N, num_classes, H, W).

    The authors' script for Cityscapes puts two transposed convolutions and a 1x1 convolution in the place of ``pool``,
    so the classifier's weights are its backbone's.

    Args:
        num_classes: number of classes.
        depth, mult, ff_channel, final_dim, dropout, level, block: as
            :class:`wavemix_kernels.wavemix.classification.WaveMix` has them, with patches of side 4.

    H and W are multiples of ``4 * 2**level``.

    Raises:
        TypeError, ValueError: an argument out of its range, or an image that does not fit.

    Source: arXiv:2205.14375 and the authors' published script, whose parameter names and checkpoints these are.
    """

    def __init__(
        self,
        *,
        num_classes: int = 20,
        depth: int = 16,
        mult: int = 2,
        ff_channel: int = 192,
        final_dim: int = 192,
        dropout: float = 0.5,
        level: int = 3,
        block: Callable[..., nn.Module] = FusedWaveblock,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            depth=depth,
            mult=mult,
            ff_channel=ff_channel,
            final_dim=final_dim,
            dropout=dropout,
            level=level,
            block=block,
        )
        kind = FusedExpansion if isinstance(self.layers[0], FusedWaveblock) else Expansion
        self.pool = kind(final_dim, 2, num_classes, widths=(128, 64))

    def forward(self, img: Tensor) -> Tensor:
        return layout.ordered_as(super().forward(img), img)
