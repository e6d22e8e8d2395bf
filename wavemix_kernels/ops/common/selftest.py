"""The self-test of each op: forward and gradients beside the float64 reference, within a second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def pattern(*shape: int, phase: float = 0.0) -> Tensor:
    """Fixed values in [-1, 1] without structure that an indexing mistake could hide behind."""
    count = int(torch.Size(shape).numel())
    return torch.sin(torch.arange(count, dtype=torch.float64) ** 1.5 + phase).reshape(shape)


def against_reference(
    function: Callable[..., Sequence[Tensor]],
    exact: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Largest error of outputs and gradients, each relative to the largest value of its exact tensor."""
    leaves = [t.to(device, dtype).requires_grad_() for t in tensors]
    wide = [t.detach().double().cpu().requires_grad_() for t in leaves]
    want = list(exact(*wide))
    cotangents = [pattern(*t.shape, phase=1.0) for t in want]
    got = list(function(*leaves))
    got += torch.autograd.grad(got, leaves, [c.to(device, dtype) for c in cotangents])
    want += torch.autograd.grad(want, wide, [c.to(dtype).double() for c in cotangents])
    return largest_error(got, want)


def largest_error(got: Sequence[Any], want: Sequence[Any]) -> float:
    """Each error relative to the largest value of its exact tensor."""
    pairs = zip(got, want, strict=True)
    return largest(*(((a.detach().double().cpu() - b).abs().max() / b.abs().max()).item() for a, b in pairs))


def largest(*errors: float) -> float:
    """The largest, or NaN where there is one, which Python's ``max`` may pass over."""
    return torch.tensor(errors, dtype=torch.float64).max().item()


def rounding_bound(terms: int, dtype: torch.dtype) -> float:
    """Relative error of a sum of ``terms`` products, twice over (a forward and a backward pass), in what ``dtype``
    accumulates in. The roundings of stored half types come on top (:func:`half_bound`)."""
    return 2 * terms * (2.0**-53 if dtype == torch.float64 else 2.0**-24)


def run(
    test: Callable[..., tuple[float, float]], backend: str, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """An op's self-test: (error, bound), the bound of a half type by :func:`half_bound`."""
    error, bound = test(backend, device, dtype)
    if dtype.itemsize == 2:
        bound = half_bound(bound, test("reference", device, dtype)[0], dtype)
    return error, bound


def half_bound(bound: float, reference_error: float, dtype: torch.dtype) -> float:
    """The error allowed to a kernel in a half type: as much again as the reference in that type, whose intermediate
    tensors are rounded as often, and one rounding of the result, which the reference may be spared by luck."""
    return bound + 2 * reference_error + torch.finfo(dtype).eps
