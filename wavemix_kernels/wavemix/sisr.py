"""Drop-in for ``wavemix.sisr``: the WaveMix model for single-image super-resolution."""

from collections.abc import Callable

from torch import Tensor, nn

from wavemix_kernels.nn.wavemix.block import FusedWaveblock
from wavemix_kernels.ops.common import layout
from wavemix_kernels.wavemix.backbone import Backbone, strided_stem

__all__ = ["WaveMix"]


class WaveMix(Backbone):
    """Twofold super-resolution: (N, 3, H, W) -> (N, 3, 2H, 2W), H and W multiples of ``2**level``.

    Args:
        depth: number of Waveblocks.
        mult, ff_channel, final_dim, dropout, level, upsample: each block's, see
            :class:`wavemix_kernels.FusedWaveblock`.
        block: the block class; :class:`wavemix_kernels.reference.Waveblock` makes the reference model.

    Raises:
        TypeError, ValueError: an argument out of its range, or an image that does not fit (the message names the
            nearest sizes that do).

    Source: arXiv:2205.14375; package ``wavemix`` 0.2.4, whose parameter names and checkpoints these are.
    """

    def __init__(
        self,
        *,
        depth: int = 4,
        mult: int = 2,
        ff_channel: int = 144,
        final_dim: int = 144,
        dropout: float = 0.0,
        level: int = 1,
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
        self.expand = self.expansion(final_dim, 1, 3)
        self.conv = strided_stem(3, final_dim, 1)

    def forward(self, img: Tensor) -> Tensor:
        return layout.ordered_as(self.expand(self.features(img)), img)
