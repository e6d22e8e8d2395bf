"""Reads a norm module as the fused residual branches take it."""

from __future__ import annotations

from torch import Tensor, nn

from wavemix_kernels.nn.parts import untouched
from wavemix_kernels.nn.parts import update as _update_running
from wavemix_kernels.ops.norm import pre_norm


def is_plain(norm: nn.Module) -> bool:
    """Whether :func:`read` can stand for it: BatchNorm or GroupNorm of one group, and nobody listens."""
    if type(norm) is nn.GroupNorm:
        return norm.num_groups == 1 and untouched(norm)
    return type(norm) is nn.BatchNorm2d and untouched(norm)


def read(norm: nn.Module, x: Tensor) -> tuple[pre_norm.Norm, pre_norm.Kind]:
    """
    Raises:
        ValueError: a batch with one value per channel in training.
    """
    if isinstance(norm, nn.GroupNorm):
        return pre_norm.Norm(norm.weight, norm.bias, None, None), pre_norm.Kind(norm.eps, True)
    assert isinstance(norm, nn.BatchNorm2d)
    if norm.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(f"x: expected more than one value per channel in training, got shape {tuple(x.shape)}")
    frozen = not norm.training and norm.running_mean is not None and norm.running_var is not None
    given = (norm.running_mean, norm.running_var) if frozen else (None, None)
    return pre_norm.Norm(norm.weight, norm.bias, *given), pre_norm.Kind(norm.eps, False)


def update(norm: nn.Module, x: Tensor, mean: Tensor, var: Tensor) -> None:
    """Running statistics, where the norm keeps them."""
    if isinstance(norm, nn.BatchNorm2d) and norm.training and norm.track_running_stats:
        _update_running(norm, mean, var, x.shape[0] * x.shape[2] * x.shape[3])
