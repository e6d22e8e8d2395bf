"""Whether a candidate computes right, before it is timed: against the reference in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wavemix_kernels.tune.record import Unit

#: Allowed over what the reference errs in the same arithmetic: a candidate rounds in other places, and as often.
_ALLOWANCE = 16


class Judge:
    """Knows the exact results of a unit's arguments, and how far the reference is off in their own dtype."""

    def __init__(self, unit: Unit, arguments: object) -> None:
        self._exact = unit.run(unit.on("reference", arguments, torch.float64))
        rounded = unit.run(unit.on("reference", arguments))
        self._limits = [_limit(got, exact) for got, exact in zip(rounded, self._exact, strict=True)]

    def why_wrong(self, results: Sequence[Tensor]) -> str | None:
        """The fault of results, or None."""
        if len(results) != len(self._exact):
            return f"it returns {len(results)} tensors, expected {len(self._exact)}"
        for i, (got, exact, limit) in enumerate(zip(results, self._exact, self._limits, strict=True)):
            if got.shape != exact.shape:
                return f"result {i} has shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
            error = _rms(got.double() - exact)
            if not error <= limit:
                return f"result {i} is off by {error:.1e} (root mean square), where rounding explains {limit:.1e}"
        return None


def _limit(rounded: Tensor, exact: Tensor) -> float:
    size, unit_roundoff = _rms(exact), torch.finfo(rounded.dtype).eps / 2
    # A sum of many terms one by one errs by the square root of a sixth of their number: the root mean square of a
    # random walk's roundings. The reference may add up in blocks. No result sums more values than 2**20 without them.
    summation = math.sqrt(2**20 / 6) * (2.0**-53 if rounded.dtype == torch.float64 else 2.0**-24)
    return _ALLOWANCE * max(_rms(rounded.double() - exact), unit_roundoff * size) + summation * size


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt()) if values.numel() else 0.0
