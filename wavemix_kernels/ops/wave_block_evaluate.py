"""A WaveBlock of Wave-MLP in evaluation, both residual branches in one plan, without gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import plan
from wavemix_kernels.ops.common.dtypes import without_autocast
from wavemix_kernels.ops.mlp import channel as channel_mlp
from wavemix_kernels.ops.norm import pre_norm
from wavemix_kernels.ops.patm import evaluate as patm


@plan.words
class Options(NamedTuple):
    """
    Attributes:
        norms: in front of PATM and of the MLP; None: none, or folded into the weights.
        dtypes: of PATM's and the MLP's weights, and so of what is between norm and sum.
        backend: not ``"reference"``.
    """

    norms: tuple[pre_norm.Kind | None, pre_norm.Kind | None]
    dtypes: tuple[torch.dtype, torch.dtype]
    backend: str


def evaluate(
    options: Options, x: Tensor, norms: tuple[pre_norm.Norm, pre_norm.Norm], folded: patm.Folded,
    weights: channel_mlp.Weights,
) -> Tensor:  # fmt: skip
    """``x + PATM(norm(x))``, and of that ``x + MLP(norm(x))``: (N, C, H, W) -> the same shape, dtype and memory format,
    of checked arguments."""
    with without_autocast(x):
        out: Tensor = _by_plan(options, x, *norms[0], *norms[1], *folded, *weights)
    return out


def _evaluate(options: Options, x: Tensor, *tensors: Any) -> Tensor:
    fields = len(pre_norm.Norm._fields)
    of_norms, rest = (tensors[:fields], tensors[fields : 2 * fields]), tensors[2 * fields :]
    folded, weights = patm.Folded(*rest[: len(patm.Folded._fields)]), rest[len(patm.Folded._fields) :]
    backend = options.backend
    image = _normalised(options, 0, x, pre_norm.Norm(*of_norms[0]))
    x = pre_norm.join(x, patm.evaluate(image, folded, backend), None, backend)
    image = _normalised(options, 1, x, pre_norm.Norm(*of_norms[1])).contiguous(memory_format=torch.channels_last)
    out = channel_mlp.fused(image, *weights, choose.for_part(backend, channel_mlp.BACKENDS))
    return pre_norm.join(x, out, None, backend)


def _normalised(options: Options, which: int, x: Tensor, norm: pre_norm.Norm) -> Tensor:
    kind, dtype, backend = options.norms[which], options.dtypes[which], options.backend
    if kind is None:
        return x.to(dtype)
    return pre_norm.normalise(x, norm, kind, pre_norm.statistics(x, norm, kind, backend), backend, dtype)


_by_plan = plan.planned("wave_block_evaluate", _evaluate)
