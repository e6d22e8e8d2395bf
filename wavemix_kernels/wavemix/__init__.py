"""Drop-in for the package ``wavemix``: the same names, arguments and checkpoints, on fused kernels."""

from __future__ import annotations

from wavemix_kernels.nn.wavemix.block import FusedWaveblock
from wavemix_kernels.pytorch_wavelets import DWTForward
from wavemix_kernels.wavemix import SemSegment, classification, sisr, sr, v3, wavepaint

__all__ = [
    "DWTForward",
    "Level1Waveblock",
    "Level2Waveblock",
    "Level3Waveblock",
    "Level4Waveblock",
    "SemSegment",
    "classification",
    "sisr",
    "sr",
    "v3",
    "wavepaint",
]


class _Level(FusedWaveblock):
    LEVEL: int

    def __init__(self, *, mult: int = 2, ff_channel: int = 16, final_dim: int = 16, dropout: float = 0.5) -> None:
        super().__init__(level=self.LEVEL, mult=mult, ff_channel=ff_channel, final_dim=final_dim, dropout=dropout)


class Level1Waveblock(_Level):
    """Upstream's block of one DWT level; see :class:`wavemix_kernels.FusedWaveblock`."""

    LEVEL = 1


class Level2Waveblock(_Level):
    """Upstream's block of two DWT levels; see :class:`wavemix_kernels.FusedWaveblock`."""

    LEVEL = 2


class Level3Waveblock(_Level):
    """Upstream's block of three DWT levels; see :class:`wavemix_kernels.FusedWaveblock`."""

    LEVEL = 3


class Level4Waveblock(_Level):
    """Upstream's block of four DWT levels; see :class:`wavemix_kernels.FusedWaveblock`."""

    LEVEL = 4
