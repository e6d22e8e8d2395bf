"""A launch to compile for a chip, on tensors without storage: what :mod:`tests.aot.triton_launches` lists."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tests.aot.table import Demands
from wavemix_kernels.ops.common.triton_launch import Launch

HALF = torch.float16
LAST = torch.channels_last


class Point(NamedTuple):
    """A launch to compile, the chip, and what the result is held to."""

    name: str
    arch: int
    dtype: torch.dtype
    launch: Launch
    demands: Demands


def meta(*shape: int, dtype: torch.dtype = torch.float32, last: bool = False) -> Tensor:
    t = torch.empty(shape, dtype=dtype, device="meta")
    return t.to(memory_format=LAST) if last else t
