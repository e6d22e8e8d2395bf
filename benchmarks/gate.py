"""The correctness gate: what a provider computed, against float64, before any clock is started.

Two kinds of limits, both derived from the arithmetic and the same for every provider:

- `elementwise`: for linear transforms. A computed sum is off by at most (number of roundings) x (unit roundoff) x
  (the same sum over absolute values), element by element [Higham, Accuracy and Stability, section 3.1].
- `root_mean_square`: for whole blocks, where normalisation amplifies single elements: the error's root mean square
  against that of the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Allowed error of one tensor: a tensor bounds each element, a number bounds the error's root mean square.
Limit = torch.Tensor | float

# Spacing of float16's subnormals, where rounding is absolute; nothing beside values of order one.
_SMALLEST = 2.0**-24


@dataclass(frozen=True)
class Verdict:
    """Outcome of the gate.

    Attributes:
        error: largest error in units of the permitted one; at most 1 for a correct provider.
        reason: None for a correct provider, else what is wrong, in one line.
    """

    error: float
    reason: str | None = None


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def elementwise(magnitudes: Sequence[torch.Tensor], roundings: Sequence[int], u: float) -> list[Limit]:
    """Limits of linear outputs: `roundings[i]` roundings of sums whose absolute values add up to `magnitudes[i]`."""
    return [count * u * size + _SMALLEST for size, count in zip(magnitudes, roundings, strict=True)]


def root_mean_square(expected: Sequence[torch.Tensor], terms: Sequence[float], depth: int, u: float) -> list[Limit]:
    """Limits of a block of `depth` rounded layers with unit roundoff `u`.

    A sum that cancels is held to the size that its terms would add up to with random signs: the gradient of a bias
    before a normalisation is zero in exact arithmetic, and rounding noise in every other.
    """
    sizes = (max(_rms(tensor), size) for tensor, size in zip(expected, terms, strict=True))
    return [16 * depth * u * size for size in sizes]


def judge(
    names: Sequence[str], actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], limits: Sequence[Limit]
) -> Verdict:
    """Compare a provider's tensors with the float64 ones."""
    worst = Verdict(0.0)
    for name, ours, true, limit in zip(names, actual, expected, limits, strict=False):
        if ours.shape != true.shape:
            return Verdict(math.inf, f"{name} has shape {tuple(ours.shape)}, expected {tuple(true.shape)}")
        if not bool(torch.isfinite(ours).all()):
            return Verdict(math.inf, f"{name} has values that are not finite")
        difference = ours.to(true) - true
        if isinstance(limit, torch.Tensor):
            error = float((difference.abs() / limit).max()) if difference.numel() else 0.0
        else:
            error = _rms(difference) / limit if limit > 0 else (0.0 if _rms(difference) == 0 else math.inf)
        if error > worst.error:
            wrong = f"{name} is off by {error:.3g} times what rounding explains" if error > 1 else None
            worst = Verdict(error, wrong)
    if len(actual) != len(expected):  # last, since a wrong shape says more than the gradients it kept from being made
        return Verdict(math.inf, f"returned {len(actual)} tensors, expected {len(expected)}")
    return worst


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0
