"""Reads a norm module as the fused residual branches take it."""

from __future__ import annotations

from torch import Tensor, nn

from wavemix_kernels.nn.parts import affine_parameters, is_frozen, why_not_plain
from wavemix_kernels.ops.norm import pre_norm


def why_not(name: str, norm: nn.Module) -> str | None:
    """Why :func:`read` cannot stand for ``norm``, or None: neither BatchNorm2d nor GroupNorm of one group, or a hook or
    parametrization would be left out."""
    if type(norm) is nn.GroupNorm:
        if norm.num_groups != 1:
            return f"{name} is a GroupNorm of {norm.num_groups} groups, expected 1"
        return why_not_plain(name, norm)
    return why_not_plain(name, norm, nn.BatchNorm2d)


def read(norm: nn.Module, x: Tensor) -> tuple[pre_norm.Norm, pre_norm.Kind]:
    """
    Raises:
        ValueError: a batch with one value per channel in training.
    """
    if isinstance(norm, nn.GroupNorm):
        return pre_norm.Norm(*affine_parameters(norm), None, None), pre_norm.Kind(norm.eps, True)
    assert isinstance(norm, nn.BatchNorm2d)
    if norm.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(f"x: expected more than one value per channel in training, got shape {tuple(x.shape)}")
    given = (norm.running_mean, norm.running_var) if is_frozen(norm) else (None, None)
    return pre_norm.Norm(*affine_parameters(norm), *given), pre_norm.Kind(norm.eps, False)
