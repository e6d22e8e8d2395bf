"""The phases' BatchNorms: batch statistics, of thetas or of the image's moments; the affine maps; their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common.dtypes import accumulate_dtype, cast_together
from wavemix_kernels.ops.common.library import Library
from wavemix_kernels.ops.norm import batch_norm
from wavemix_kernels.ops.patm.weights import Affine, Arguments, PhaseNorm, Weights

Norms = tuple[PhaseNorm, PhaseNorm]
Moments = Callable[[int], tuple[Tensor, Tensor]]


class Statistics(NamedTuple):
    """Statistics of theta_h and theta_w, and the affine maps that normalise by them, (2, C) each; ``var`` means nothing
    for given ones."""

    mean: Tensor
    var: Tensor
    invstd: Tensor
    scale: Tensor
    shift: Tensor

    def maps(self) -> Affine:
        return Affine(self.scale[0], self.shift[0], self.scale[1], self.shift[1])


_library = Library()
_library.define(
    "phase_statistics(Tensor theta_h, Tensor theta_w, Tensor? weight_h, Tensor? bias_h, Tensor? weight_w, "
    "Tensor? bias_w, float eps_h, float eps_w, str backend) -> Tensor"
)


def _of_batch(
    theta_h: Tensor, theta_w: Tensor, weight_h: Tensor | None, bias_h: Tensor | None, weight_w: Tensor | None,
    bias_w: Tensor | None, eps_h: float, eps_w: float, backend: str,
) -> Tensor:  # fmt: skip
    out = _of_batch_fake(theta_h)
    run = choose.select("batch_norm_stats", batch_norm.BACKENDS, backend, theta_h).functions["stats"]
    for i, (theta, weight, bias, eps) in enumerate(
        ((theta_h, weight_h, bias_h, eps_h), (theta_w, weight_w, bias_w, eps_w))
    ):
        run(theta, *batch_norm.contiguous(weight, bias), eps, out[:, i])
    return out


def _of_batch_fake(theta_h: Tensor, *_: Any) -> Tensor:
    return theta_h.new_empty((len(Statistics._fields), 2, theta_h.shape[1]), dtype=accumulate_dtype(theta_h.dtype))


_library.impl("phase_statistics", _of_batch, "CompositeExplicitAutograd")
torch.library.register_fake("wavemix_kernels::phase_statistics", _of_batch_fake, lib=_library)


def _one_by_one(norms: Norms, moments: Moments, eps: tuple[float, float], dtype: torch.dtype) -> Statistics:
    """Mean and biased variance over the batch: given ones, or those of ``moments(i)``."""
    rows = []
    for i, norm in enumerate(norms):
        if norm.mean is None or norm.invstd is None:
            mean, var = moments(i)
            invstd = torch.rsqrt(var + eps[i])
        else:
            mean, var, invstd = norm.mean, norm.mean, norm.invstd
        mean, var, invstd = (t.to(dtype) for t in (mean, var, invstd))
        rows.append((mean, var, invstd, *batch_norm.affine(mean, invstd, norm.weight, norm.bias)))
    return Statistics(*(torch.stack(pair) for pair in zip(*rows, strict=True)))


def of_thetas(norms: Norms, thetas: list[Tensor], eps: tuple[float, float], backend: str) -> Statistics:
    norm_h, norm_w = norms
    if (given := norm_h.mean) is not None:
        return _one_by_one(norms, lambda _: (given, given), eps, accumulate_dtype(thetas[0].dtype))
    made = torch.ops.wavemix_kernels.phase_statistics(
        *thetas, norm_h.weight, norm_h.bias, norm_w.weight, norm_w.bias, *eps,
        choose.for_part(backend, batch_norm.BACKENDS),
    )  # fmt: skip
    return Statistics(*made.unbind(0))


#: Of a phase: the convolution's weight (C, C, 1, 1) and bias, the norm's weight and bias.
Phase = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def of_moments(
    norms: Norms, w: Weights, moments: tuple[Tensor, ...], eps: tuple[float, float], backend: str
) -> Statistics:
    """The same as :func:`of_thetas`, for an image with this mean (C) and covariance (C, C) in float64. ``backend``: of
    :mod:`wavemix_kernels.ops.patm.whole`."""
    norm_h, norm_w = norms
    if (given := norm_h.mean) is not None:
        return _one_by_one(norms, lambda _: (given, given), eps, accumulate_dtype(w.theta_h.dtype))
    made = torch.ops.wavemix_kernels.patm_statistics(
        *moments, w.theta_h, w.theta_h_bias, norm_h.weight, norm_h.bias,
        w.theta_w, w.theta_w_bias, norm_w.weight, norm_w.bias, *eps, backend,
    )  # fmt: skip
    return Statistics(*made.unbind(0))


def of_moments_standard(
    mean: Tensor, covariance: Tensor, phases: tuple[Phase, Phase], eps: tuple[float, float]
) -> Tensor:
    """:class:`Statistics` (5, 2, C) of :func:`of_moments` by PyTorch's operators."""

    def of_theta(i: int) -> tuple[Tensor, Tensor]:
        theta, bias = phases[i][0].flatten(1).double(), phases[i][1]
        of_mean = theta @ mean if bias is None else torch.addmv(bias.double(), theta, mean)
        return of_mean, (theta @ covariance * theta).sum(1).clamp_min_(0.0)

    norms = PhaseNorm(*phases[0][2:], None, None), PhaseNorm(*phases[1][2:], None, None)
    return torch.stack(_one_by_one(norms, of_theta, eps, accumulate_dtype(phases[0][0].dtype)))


def line_through(sums: Tensor, scale: Tensor, invstd: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Batch statistics depend on theta, too: its gradient is ``scale d + rise (theta - mean) + offset``, by channel.

    Args:
        sums: (..., 2, C), over ``count`` pixels the sums of d and of ``d (theta - mean)``.
        scale, invstd: (..., C).
    """
    offset, rise = ((scale * (-1 / max(count, 1)))[..., None, :] * sums).unbind(-2)
    return rise * invstd.square(), offset


def through_moments(
    sums: Tensor, count: int, w: Weights, maps: Affine, invstd: Tensor, image_mean: Tensor, covariance: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The part of the gradients of the thetas' weights, (2, C, C), that comes through :func:`line_through`, and that of
    the image's as a matrix and a vector: ``matrix image + vector``. Theta is a convolution of the image, so its
    weights' gradient gets a product with the image's covariance."""
    wide = sums.dtype
    scale = torch.stack((maps.scale_h, maps.scale_w)).to(wide)
    rise, offset = line_through(sums, scale, invstd.to(wide), count)
    theta = torch.stack((w.theta_h, w.theta_w)).to(wide).flatten(2)
    image_mean, covariance = image_mean.to(wide), covariance.to(wide)
    tilted = rise[..., None] * theta
    d_theta = max(count, 1) * (tilted @ covariance + offset[..., None] * image_mean)
    matrix = theta.flatten(0, 1).t() @ tilted.flatten(0, 1)
    return d_theta, (matrix, offset.flatten() @ theta.flatten(0, 1) - matrix @ image_mean)


def gradients(arguments: Arguments, sums: Tensor, of: Statistics) -> tuple[list[Tensor | None], list[PhaseNorm]]:
    """Gradients of the thetas' biases and of the BatchNorms, from the sums of d and ``d (theta - mean)`` (2, 2, C); the
    sums are about 0 where statistics are given."""
    d_pre, d_pre_theta = sums.unbind(1)
    w, norms = arguments.weights, arguments.norms()
    thetas = w.theta_h_bias, w.theta_w_bias
    if arguments.by_batch():
        # Batch statistics take a constant out of theta again: its gradient is 0, not the rounding errors of a sum.
        like = next((t for t in thetas if t is not None), d_pre)
        of_thetas = like.new_zeros(d_pre.shape)
    else:
        d_pre_theta = d_pre_theta - of.mean * d_pre
        of_thetas = d_pre * of.scale
    weights, biases = [norm.weight for norm in norms], [norm.bias for norm in norms]
    d_thetas, d_weights, d_biases = _like((of_thetas, thetas), (d_pre_theta * of.invstd, weights), (d_pre, biases))
    return d_thetas, [PhaseNorm(*pair, None, None) for pair in zip(d_weights, d_biases, strict=True)]


def _like(*pairs: tuple[Tensor, Sequence[Tensor | None]]) -> list[list[Tensor | None]]:
    """The rows of each pair in the parameters' dtypes, None for missing ones."""
    wanted = [(row, t) for rows, parameters in pairs for row, t in zip(rows.unbind(0), parameters, strict=True)]
    given = [(row, t) for row, t in wanted if t is not None]
    made = iter(cast_together([row for row, _ in given], [t.dtype for _, t in given]))
    return [[None if t is None else next(made) for t in parameters] for _, parameters in pairs]
