"""The Haar transform: analysis and synthesis, the bands in one tensor, the Waveblock's pyramid."""

from wavemix_kernels.ops.haar.op import haar_dwt2d, haar_idwt2d
from wavemix_kernels.ops.haar.pyramid import haar_pyramid

__all__ = ["haar_dwt2d", "haar_idwt2d", "haar_pyramid"]
