"""Situations in which a graph or a derivative is made of standard operators only."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from wavemix_kernels.tracing import constant_result


def standard_wanted() -> str | None:
    """Why standard operators stand for fused ones, or None.

    Fused functions have gradients, but neither batching rules nor tangents, and ONNX knows none of them.
    """
    if in_transform():
        return "torch.func is at work"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is at work"
    return "ONNX takes standard operators" if torch.compiler.is_exporting() and _for_onnx() else None


@constant_result
def in_transform() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp, …) is at work. In it tensors have no memory order."""
    return torch._C._are_functorch_transforms_active()


@constant_result
def _for_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()
