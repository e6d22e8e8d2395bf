"""The four ways a Waveblock doubles the size, with the halves of their gradients that its backward pass asks for.

The transposed convolution is an op of its own (:mod:`wavemix_kernels.ops.deconv.op`); the others are the library's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels.ops.common import convolutions
from wavemix_kernels.ops.deconv import op as deconv


def forward(kind: str, u: Tensor, weight: Tensor | None, bias: Tensor | None, backend: str) -> Tensor:
    """(N, F, h, w) -> (N, O, 2h, 2w) by ``"deconv"`` (on ``backend``), ``"pixelshuffle"``, ``"bilinear"`` or
    ``"nearest"``."""
    if kind == "deconv":
        assert weight is not None
        return deconv.fused(u, weight, bias, backend)
    return standard(kind, u, weight, bias)


def standard(kind: str, u: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The same by standard operators only."""
    if kind == "deconv":
        assert weight is not None
        return F.conv_transpose2d(u, weight, bias, deconv.STRIDE, deconv.PADDING)
    if kind == "pixelshuffle":
        assert weight is not None
        return convolutions.conv2d(F.pixel_shuffle(u, 2), weight, bias, padding=1)
    return F.interpolate(u, scale_factor=2, mode=kind)


def backward_x(kind: str, dy: Tensor, weight: Tensor | None, backend: str) -> Tensor:
    """Gradient of ``u``, which itself is not needed."""
    if kind == "deconv":
        assert weight is not None
        return deconv.backward_x(dy, weight, backend)
    if kind == "pixelshuffle":
        assert weight is not None
        of_shuffled = convolutions.conv_transpose2d(dy, weight, padding=1)
        n, c, h, w = of_shuffled.shape
        # PyTorch leaves the shape of an empty batch as it is.
        return F.pixel_unshuffle(of_shuffled, 2).view(n, 4 * c, h // 2, w // 2)
    n, c, h, w = dy.shape
    if kind == "bilinear":
        return torch.ops.aten.upsample_bilinear2d_backward(dy, [h, w], [n, c, h // 2, w // 2], False, 2.0, 2.0)
    return torch.ops.aten.upsample_nearest2d_backward(dy, [h, w], [n, c, h // 2, w // 2], 2.0, 2.0)


def backward_weight(kind: str, dy: Tensor, u: Tensor | None, weight: Tensor | None, backend: str) -> Tensor | None:
    """Gradient of the weight, None where there is none, which wants no ``u``."""
    if weight is None:
        return None
    assert u is not None
    if kind == "deconv":
        return deconv.backward_weight(dy, u, weight, False, backend)[0]
    return convolutions.backward(dy, F.pixel_shuffle(u, 2), weight, [False, True, False], padding=1)[1]
