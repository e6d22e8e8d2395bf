"""Modules built on the fused operators."""

from wavemix_kernels.nn.wavemix.block import FusedWaveblock
from wavemix_kernels.nn.wavemlp.patm import FusedPATM

__all__ = ["FusedPATM", "FusedWaveblock"]
