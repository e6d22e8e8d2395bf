"""How a line of samples goes on past its ends, as a table that kernels read."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from wavemix_kernels.ops.dwt.reference import extend


class Border(NamedTuple):
    """Samples past the ends of a line of n as weighted sums of those within, as csrc/include/wavemix/dwt.h has them.

    Positions -before ... -1 come first, then n ... n + after - 1; number i has the terms begin[i] ... begin[i + 1] - 1.
    """

    before: int
    after: int
    begin: Tensor  # int64, (before + after + 1,)
    sample: Tensor  # int64
    weight: Tensor  # float64


@functools.lru_cache(maxsize=1024)
def border(n: int, before: int, after: int, mode: str) -> Border:
    """The table for `before` and `after` samples; `mode` is a key of `haar.MODES` other than 'per'. Where it is 'zero'
    the table is empty. Raises ValueError as `extend` does."""
    if mode == "zero":
        before = after = 0
    # Borders shorter than the line see its ends alone: a line of the same parity with the same ends says the same.
    end = max(before, after) + 2
    size = min(n, 2 * end + n % 2)
    rows = extend(torch.eye(size, dtype=torch.float64, device="cpu"), -1, before, after, mode)
    terms = torch.cat((rows[:, :before], rows[:, before + size :]), 1).T
    position, sample = terms.nonzero(as_tuple=True)
    begin = torch.zeros(before + after + 1, dtype=torch.int64, device="cpu")
    begin[1:] = torch.bincount(position, minlength=before + after).cumsum(0)
    weight = terms[position, sample]
    return Border(before, after, begin, torch.where(sample < end, sample, sample + n - size), weight)
