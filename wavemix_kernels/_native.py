"""Finds the compiled core, and keeps the reason where there is none."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch  # first: the core then shares torch's OpenMP runtime (same soname, one thread pool)
from torch import Tensor


def _why_missing(error: ImportError) -> str:
    """In the folder of a checkout Python imports the sources, whatever is installed."""
    here = Path(__file__).resolve().parent
    if (here.parent / "setup.py").exists() and not list(here.glob("_core*")):
        return (
            f"{here} holds the sources, without the compiled core; build it there by `pip install -e {here.parent}`, "
            "or run from another folder to import what is installed"
        )
    return f"the compiled core does not load ({error}); reinstall with `pip install wavemix-kernels`"


core: ModuleType | None
core_error: str | None
try:
    from wavemix_kernels import _core as core  # type: ignore[attr-defined,no-redef]

    core_error = None
except ImportError as error:
    core = None
    core_error = _why_missing(error)
    warnings.warn(f"{core_error}. Until then CPU tensors run on plain PyTorch", RuntimeWarning, stacklevel=2)

#: The module with the CUDA launchers and the device type they serve. The tests put the CPU emulation of the
#: same kernels here.
cuda_core: ModuleType | None = core if core is not None and core.HAS_CUDA else None
cuda_device_type = "cuda"

DTYPES: dict[torch.dtype, int] = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


def cpu_reason() -> str | None:
    """Why the C++ kernels are missing, or None."""
    return core_error


def cuda_reason() -> str | None:
    """Why the CUDA C++ kernels are missing, or None."""
    if cuda_core is not None:
        return None
    return core_error or (core.BUILD_NOTE if core is not None else None) or "this install has no CUDA kernels"


def address(tensor: Tensor | None) -> Sequence[int]:
    """A tensor as the core takes it: address and strides in elements; empty for None."""
    return () if tensor is None else (tensor.data_ptr(), *tensor.stride())


def stream(device: torch.device) -> tuple[int, int]:
    """Device index and current stream handle for a launch on ``device``."""
    if device.type != "cuda":
        return 0, 0
    return device.index, torch.cuda.current_stream(device).cuda_stream
