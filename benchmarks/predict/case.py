"""A case of :mod:`benchmarks.predict.kernels`, and what their inputs are made by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """An operator at one shape.

    Attributes:
        name: ``backend family what shape``.
        run: calls it on tensors that it makes.
        flops: kernel function -> products that the shape needs, in FLOP.
    """

    name: str
    run: Callable[[], Any]
    flops: Mapping[str, float] = field(default_factory=dict)


def operator(name: str) -> Any:
    return getattr(torch.ops.wavemix_kernels, name)


def vector(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32)


def sized(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
