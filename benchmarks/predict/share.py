"""How much of a chip a kernel is predicted to use, and what of it was followed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .bound import predict
from .chips import Chip
from .kernels import Recorded

#: A tensor that is touched at all, and has a share of the bytes that counts, is touched to this share at least: three
#: blocks are too few to meet kinds of blocks as often as the grid has them.
LEAST_OF_TENSOR, COUNTS = 0.4, 0.05


@dataclass(frozen=True)
class Predicted:
    """A kernel of :mod:`benchmarks.predict.kernels` and its prediction.

    Attributes:
        seconds, bound: see :class:`benchmarks.predict.bound.Prediction`.
        share: of what the chip can do: the larger of its bytes at the speed of a copy and the products that the shape
            needs at tensor peak, over the time. Products that are made twice do not count.
        waste: products made for each one needed; 1 without any.
        covered: bytes that the followed threads move, scaled to the grid, for each byte of the plan.
        misread: tensors that were touched in part, as (shape, share).
    """

    name: str
    seconds: float
    bound: str
    share: float
    waste: float
    covered: float
    misread: tuple[tuple[tuple[int, ...], float], ...] = ()


def predicted(one: Recorded, chip: Chip) -> Predicted:
    """The prediction of one kernel.

    Raises:
        execute.NotUnderstood, tools.Missing: see :func:`benchmarks.predict.bound.predict`.
    """
    found = predict(one.launch, chip)
    dtype = next((a.dtype for a in one.launch.arrays if a.dtype in (torch.float16, torch.bfloat16)), torch.float32)
    ideal = max(found.bounds["memory"], one.flops / chip.tensor_flops[dtype])
    profile = found.profile
    coverage = profile.coverage
    misread = tuple(
        (array.shape, round(coverage[array.address], 2))
        for array in one.launch.arrays
        if array.bytes > COUNTS * one.launch.bytes and coverage.get(array.address, 1.0) < LEAST_OF_TENSOR
    )
    waste = found.flops / one.flops if one.flops else 1.0
    covered = profile.sectors / max(one.launch.bytes, 1)
    return Predicted(one.name, found.seconds, found.bound, ideal / found.seconds, waste, covered, misread)
