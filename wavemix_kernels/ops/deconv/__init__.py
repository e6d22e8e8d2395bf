"""The Waveblock's transposed convolution, 4x4 taps and stride 2, and its other upsamplings."""

from wavemix_kernels.ops.deconv.op import deconv

__all__ = ["deconv"]
