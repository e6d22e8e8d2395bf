"""The phases' BatchNorms: batch statistics, of thetas or of the image's moments; the affine maps; their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.norm import batch_norm
from wavemix_kernels.ops.patm.weights import Affine, Arguments, PhaseNorm, Weights

Norms = tuple[PhaseNorm, PhaseNorm]
Moments = Callable[[int], tuple[Tensor, Tensor]]


class Statistics(NamedTuple):
    """Statistics of theta_h and theta_w, (2, C) each; ``var`` means nothing for given ones."""

    mean: Tensor
    var: Tensor
    invstd: Tensor


def _statistics(norms: Norms, moments: Moments, eps: tuple[float, float], dtype: torch.dtype) -> Statistics:
    """Given ones, or ``moments(i)``, mean and biased variance over the batch."""
    out: tuple[list[Tensor], ...] = ([], [], [])
    for i, norm in enumerate(norms):
        if norm.mean is None or norm.invstd is None:
            mean, var = moments(i)
            invstd = torch.rsqrt(var + eps[i])
        else:
            mean, var, invstd = norm.mean, norm.mean, norm.invstd
        for values, value in zip(out, (mean, var, invstd), strict=True):
            values.append(value.to(dtype))
    return Statistics(torch.stack(out[0]), torch.stack(out[1]), torch.stack(out[2]))


def of_thetas(norms: Norms, thetas: list[Tensor], eps: tuple[float, float], backend: str) -> Statistics:
    part = choose.for_part(backend, batch_norm.BACKENDS)
    return _statistics(
        norms,
        lambda i: batch_norm.stats(thetas[i], None, None, eps[i], part)[:2],
        eps,
        accumulate_dtype(thetas[0].dtype),
    )


def of_moments(
    norms: Norms, w: Weights, moments: tuple[Tensor, ...], eps: tuple[float, float], dtype: torch.dtype
) -> Statistics:
    """As :func:`of_thetas`, of an image with this mean (C) and covariance (C, C)."""

    def of_theta(i: int) -> tuple[Tensor, Tensor]:
        theta, bias = ((w.theta_h, w.theta_h_bias), (w.theta_w, w.theta_w_bias))[i]
        theta = theta.flatten(1).double()
        mean = theta @ moments[0] if bias is None else torch.addmv(bias.double(), theta, moments[0])
        return mean, (theta @ moments[1] * theta).sum(1).clamp_min_(0.0)

    return _statistics(norms, of_theta, eps, dtype)


def affine(norms: Norms, mean: Tensor, invstd: Tensor) -> Affine:
    (h, w), of = norms, batch_norm.affine
    return Affine(*of(mean[0], invstd[0], h.weight, h.bias), *of(mean[1], invstd[1], w.weight, w.bias))


def line_through(sums: Tensor, scale: Tensor, invstd: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Batch statistics depend on theta, too: its gradient is ``scale d + rise (theta - mean) + offset``, by channel.

    Args:
        sums: (..., 2, C), over ``count`` pixels the sums of d and of ``d (theta - mean)``.
        scale, invstd: (..., C).
    """
    rise = -scale * invstd.square() * sums[..., 1, :] / max(count, 1)
    return rise, -scale * sums[..., 0, :] / max(count, 1)


def gradients(
    arguments: Arguments, sums: Tensor, mean: Tensor, invstd: Tensor, maps: Affine
) -> tuple[list[Tensor | None], list[PhaseNorm]]:
    """Gradients of the thetas' biases and of the BatchNorms, from the sums of d and ``d (theta - mean)`` (2, 2, C); the
    sums are about 0 where statistics are given."""
    biases: list[Tensor | None] = []
    norms: list[PhaseNorm] = []
    of_thetas = (arguments.weights.theta_h_bias, maps.scale_h), (arguments.weights.theta_w_bias, maps.scale_w)
    for i, (norm, (bias, scale)) in enumerate(zip(arguments.norms(), of_thetas, strict=True)):
        d_pre, d_pre_theta = sums[i]
        if not arguments.by_batch():
            d_pre_theta = d_pre_theta - mean[i] * d_pre
        # Batch statistics take a constant out of theta again: its gradient is 0, not the rounding errors of a sum.
        d_bias = torch.zeros_like(d_pre) if arguments.by_batch() else d_pre * scale
        biases.append(None if bias is None else d_bias.to(bias.dtype))
        d_weight = None if norm.weight is None else (d_pre_theta * invstd[i]).to(norm.weight.dtype)
        norms.append(PhaseNorm(d_weight, None if norm.bias is None else d_pre.to(norm.bias.dtype), None, None))
    return biases, norms
