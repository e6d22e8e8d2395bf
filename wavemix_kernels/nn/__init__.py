"""Modules built on the fused operators."""

from wavemix_kernels.nn.patm import FusedPATM
from wavemix_kernels.nn.waveblock import FusedWaveblock

__all__ = ["FusedPATM", "FusedWaveblock"]
