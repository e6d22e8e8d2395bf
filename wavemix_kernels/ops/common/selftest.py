"""The self-test of each op: fp32 forward and gradients beside the float64 reference, within a second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wavemix_kernels.ops.common import precision


def pattern(*shape: int, phase: float = 0.0) -> Tensor:
    """Fixed values in [-1, 1] without structure that an indexing mistake could hide behind."""
    count = int(torch.Size(shape).numel())
    return torch.sin(torch.arange(count, dtype=torch.float64) ** 1.5 + phase).reshape(shape)


def against_reference(
    function: Callable[..., Sequence[Tensor]],
    exact: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Tensor],
    device: torch.device,
) -> float:
    """Largest error of outputs and gradients, each relative to the largest value of its exact tensor. Products keep
    fp32's precision meanwhile."""
    leaves = [t.to(device, torch.float32).requires_grad_() for t in tensors]
    wide = [t.detach().double().cpu().requires_grad_() for t in leaves]
    want = list(exact(*wide))
    cotangents = [pattern(*t.shape, phase=1.0) for t in want]
    with precision.products_in("ieee"):
        got = list(function(*leaves))
        got += torch.autograd.grad(got, leaves, [c.to(device, torch.float32) for c in cotangents])
    want += torch.autograd.grad(want, wide, [c.float().double() for c in cotangents])
    return largest_error(got, want)


def largest_error(got: Sequence[Any], want: Sequence[Any]) -> float:
    """Each error relative to the largest value of its exact tensor."""
    pairs = zip(got, want, strict=True)
    return max(((a.detach().double().cpu() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def rounding_bound(terms: int) -> float:
    """Relative error of an fp32 sum of ``terms`` products, twice over (a forward and a backward pass)."""
    return 2 * terms * 2.0**-24
