"""WTConv: depthwise convolutions of the Haar bands of an image, level by level."""

from wavemix_kernels.ops.wtconv.op import wtconv

__all__ = ["wtconv"]
