"""PyTorch's convolutions of two dimensions and their gradients, in a type that the device multiplies
(:func:`wavemix_kernels.ops.choose.convolution`). Below autograd or inside of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common.dtypes import MULTIPLIED


def widens(x: Tensor) -> bool:
    """Whether convolutions of ``x`` go by float32 and round their results once."""
    return choose.convolution(x.device.type, x.dtype, x.dtype in MULTIPLIED) == "float32"


def wide(*tensors: Tensor | None) -> list[Any]:
    """The tensors in float32."""
    return [None if t is None else t.float() for t in tensors]


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: int = 0, groups: int = 1) -> Tensor:
    """The same as :func:`torch.nn.functional.conv2d`, tensors of one dtype."""
    if widens(x):
        return _convolution(wide(x, weight, bias), padding, False, groups).to(x.dtype)
    return F.conv2d(x, weight, bias, padding=padding, groups=groups)


def conv_transpose2d(x: Tensor, weight: Tensor, padding: int = 0) -> Tensor:
    """The same as :func:`torch.nn.functional.conv_transpose2d`, tensors of one dtype."""
    if widens(x):
        return _convolution(wide(x, weight, None), padding, True, 1).to(x.dtype)
    return F.conv_transpose2d(x, weight, padding=padding)


def _convolution(given: Sequence[Any], padding: int, transposed: bool, groups: int) -> Tensor:
    """The operator behind both functions: autocast, which would undo the cast, does not know it."""
    return torch.ops.aten.convolution(*given, [1, 1], [padding] * 2, [1, 1], transposed, [0, 0], groups)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Sequence[bool], padding: int = 0, groups: int = 1
) -> tuple[Any, ...]:
    """Gradients of x, of the weight and of a bias, None where ``mask`` is false, of :func:`conv2d` with stride 1."""
    given = wide(grad, x, weight) if (widened := widens(x)) else [grad, x, weight]
    made = torch.ops.aten.convolution_backward(
        *given, [weight.shape[0]] if mask[2] else None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], groups, mask
    )
    return tuple(None if t is None else t.to(x.dtype) for t in made) if widened else made
