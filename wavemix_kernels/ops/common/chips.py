"""Properties of a GPU that tiles depend on. Free of triton."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch

#: Units that multiply half types: by warps, out of registers (sm_80, sm_120; AMD's "mfma"), or by groups of them, out
#: of shared memory into registers (sm_90) or into a memory of its own (sm_100).
Products = Literal["mma", "wgmma", "tcgen05", "mfma"]
#: Those that take both operands from registers.
BY_WARPS: tuple[Products, ...] = ("mma", "mfma")
ROCM = torch.version.hip is not None


def products_of(device: torch.device) -> Products:
    """The unit of ``device``; an H100's where there is no GPU to ask."""
    return _products_of(device) if device.type == "cuda" else "wgmma"


@functools.cache
def _products_of(device: torch.device) -> Products:
    if ROCM:
        return "mfma"
    return {9: "wgmma", 10: "tcgen05"}.get(torch.cuda.get_device_capability(device)[0], "mma")  # type: ignore[return-value]


def little_shared(device: torch.device) -> bool:
    """Whether a block has 99 KB of shared memory: consumers' chips (sm_86, sm_89, sm_120); sm_80 has 163."""
    return device.type == "cuda" and _capability(device) in LITTLE_SHARED


#: Compute capabilities of :func:`little_shared`.
LITTLE_SHARED = ((8, 6), (8, 9), (12, 0), (12, 1))


#: Bytes of shared memory that a block takes besides its own; a multiprocessor has as many more than a block may have.
SHARED_OF_SYSTEM = 1024


def shared_of_block(device: torch.device) -> int:
    """Bytes of shared memory that a block may have; an H100's where there is no GPU to ask."""
    if little_shared(device):
        return 99 * 1024
    return (163 if device.type == "cuda" and _capability(device)[0] == 8 else 227) * 1024


def _capability(device: torch.device) -> tuple[int, int]:
    return (0, 0) if ROCM else torch.cuda.get_device_capability(device)


def for_chip(constants: dict[str, Any], rocm: bool = ROCM) -> dict[str, Any]:
    """A launch's constants with as many threads on AMD's chips, whose warps have 64 threads instead of 32, and without
    NVIDIA's instructions (`OF_CHIP`)."""
    if not rocm:
        return constants
    return (
        constants
        | {"num_warps": max(1, constants["num_warps"] // 2)}
        | dict.fromkeys({"OF_CHIP"} & constants.keys(), False)
    )
