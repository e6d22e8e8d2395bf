"""The correctness gate: a provider's results against float64, before any clock is started.

Three kinds of limits, the same for every provider:

- `elementwise`: for linear transforms. A computed sum is off by at most (number of roundings) x (unit roundoff) x
  (the same sum over absolute values), element by element [Higham, Accuracy and Stability, section 3.1].
- `root_mean_square`: for whole blocks, where normalisation amplifies single elements: the error's root mean square
  against that of the tensor.
- `calibrated`: for whole networks, whose hundreds of layers amplify rounding by a factor that nobody can derive: the
  reference in the same arithmetic measures it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Allowed error of one tensor: a tensor bounds each element, a number bounds the error's root mean square.
Limit = torch.Tensor | float

# Permitted over typical error: one roundoff a layer, where roundings are independent.
_ALLOWANCE = 16

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


def root_mean_square(expected: Sequence[torch.Tensor], terms: Sequence[float], depth: float, u: float) -> list[float]:
    """Limits of a block of `depth` rounded layers with unit roundoff `u`."""
    return [_ALLOWANCE * depth * u * size for size in magnitudes(expected, terms)]


def magnitudes(expected: Sequence[torch.Tensor], terms: Sequence[float]) -> list[float]:
    """The size that a tensor's error is relative to: its root mean square.

    A sum that cancels is held to the size that its terms would add up to with random signs: the gradient of a bias
    before a normalisation is zero in exact arithmetic, and rounding noise in every other.
    """
    return [max(rms(tensor), size) for tensor, size in zip(expected, terms, strict=True)]


def summation(count: int) -> float:
    """Roundoffs of a sum of `count` terms with random signs that are added up one by one, in the result.

    Partial sums grow as a random walk does: the k-th has about the size sqrt(k), and the squares of all their roundings
    add up to count^2 / 6, against a result of sqrt(count).
    """
    return math.sqrt(count / 6)


def calibrated(
    expected: Sequence[torch.Tensor], terms: Sequence[float], rounding: Sequence[float], count: int, u: float
) -> list[float]:
    """Limits of a deep network from `rounding`, the reference's root mean square errors in the same arithmetic.

    A provider rounds in other places: it gets the same factor over a typical error as in `root_mean_square`, and no
    less than one layer's limit. It also adds in other orders: the reference adds up blocks, compiled code the `count`
    pixels of a batch one by one, always in float32. Errors behind a normalisation grow in proportion to its mean's.
    """
    factor = _ALLOWANCE + summation(count) * unit_roundoff(torch.float32) / u
    least = root_mean_square(expected, terms, 1, u)
    return [max(factor * error, one) for error, one in zip(rounding, least, strict=True)]


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
            error = rms(difference) / limit if limit > 0 else (0.0 if rms(difference) == 0 else math.inf)
        if error > worst.error:
            wrong = f"{name} is off by {error:.3g} times what rounding explains" if error > 1 else None
            worst = Verdict(error, wrong)
    if len(actual) != len(expected):  # last: a wrong shape, which prevents gradients, says more
        return Verdict(math.inf, f"returned {len(actual)} tensors, expected {len(expected)}")
    return worst


def rms(tensor: torch.Tensor) -> float:
    """Root mean square of the elements; 0 of none."""
    return float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0
