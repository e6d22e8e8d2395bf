"""1x1 convolution and Haar pyramid in plain PyTorch: the specification of their kernels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels.ops.haar.reference import haar_pyramid


def reduce_haar(x: Tensor, weight: Tensor, bias: Tensor | None, levels: int) -> list[Tensor]:
    """1x1 convolution, then :func:`haar_pyramid`."""
    return haar_pyramid(F.conv2d(x, weight, bias), levels)
