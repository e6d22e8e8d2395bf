"""1x1 convolution and all Haar levels of a Waveblock in one op."""

from wavemix_kernels.ops.reduce_haar.op import reduce_haar

__all__ = ["reduce_haar"]
