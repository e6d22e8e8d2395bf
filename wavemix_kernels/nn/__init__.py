"""Modules built on the fused operators."""

from wavemix_kernels.nn.waveblock import FusedWaveblock

__all__ = ["FusedWaveblock"]
