"""The smooth magnitude of complex coefficients."""

from typing import Any

import torch
from torch import Tensor

from wavemix_kernels.pytorch_wavelets.dtcwt.levels import plain_wanted
from wavemix_kernels.pytorch_wavelets.dwt.lowlevel import int_to_mode, mode_to_int

__all__ = ["SmoothMagFn", "int_to_mode", "mode_to_int", "smooth_magnitude"]


class SmoothMagFn:
    """`apply(x, y, b)` returns sqrt(x^2 + y^2 + b^2) - b."""

    @staticmethod
    def apply(x: Tensor, y: Tensor, b: float) -> Tensor:
        return smooth_magnitude(torch.stack((x, y)), b, colour=False)


def smooth_magnitude(z: Tensor, bias: float, colour: bool) -> Tensor:
    """sqrt(|z|^2 + bias^2) - bias of real and imaginary parts z (2, N, 6, C, h, w), with |z|^2 summed over the channels
    where `colour`: (N, 6, C or 1, h, w). Its gradient is not a number where z and bias are 0."""
    if plain_wanted():
        return _magnitude(z, bias, colour) - bias
    r: Tensor = _SmoothMagnitude.apply(z, bias, colour)
    return r


class _SmoothMagnitude(torch.autograd.Function):
    """Keeps z and the result alone for the backward."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, bias: float, colour: bool) -> Tensor:
        out = _magnitude(z, bias, colour).sub_(bias)
        ctx.save_for_backward(z, out)
        ctx.bias = bias
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        z, out = ctx.saved_tensors
        return z * (grad / (out + ctx.bias)), None, None


def _magnitude(z: Tensor, bias: float, colour: bool) -> Tensor:
    squares = torch.addcmul(z[0].square(), z[1], z[1])
    if colour:
        squares = squares.sum(2, keepdim=True)
    return (squares + bias**2).sqrt()
