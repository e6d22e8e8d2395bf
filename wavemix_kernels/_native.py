"""Finds the compiled core, and keeps the reason where there is none."""

from __future__ import annotations

import contextlib
import functools
import shlex
import threading
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # first: the core then shares torch's OpenMP runtime (same soname, one thread pool)
from torch import Tensor

from wavemix_kernels import _startup
from wavemix_kernels.tracing import constant_result


def _why_missing(error: ImportError) -> str:
    """In the folder of a checkout Python imports the sources, whatever is installed."""
    here = Path(__file__).resolve().parent
    if (left_out := here / "_core_left_out.txt").exists():  # setup.py's
        return left_out.read_text(encoding="utf-8").strip()
    if (here.parent / "setup.py").exists() and not list(here.glob("_core*")):
        return (
            f"{here} holds the sources, without the compiled core; build it there by "
            f"`pip install -e {shlex.quote(str(here.parent))}`, or run from another folder to import what is installed"
        )
    return f"the compiled core does not load ({error}); reinstall the package"


core: ModuleType | None
core_error: str | None
try:
    from wavemix_kernels import _core as core  # type: ignore[attr-defined,no-redef]

    if not hasattr(core, "CPU_ISAS"):
        raise ImportError(f"{getattr(core, '__file__', None)} was built from older sources")
    core_error = None
except ImportError as error:
    core = None
    core_error = _why_missing(error)
    warnings.warn(f"{core_error}. Until then CPU tensors run on plain PyTorch", RuntimeWarning, stacklevel=2)

#: The command that builds the package anew, from its sources.
AGAIN = "pip install --force-reinstall --no-deps ."
#: The instruction set of the CPU's kernels, or why the core has none that run here.
cpu_isa: str | None = None
cpu_error: str | None = None
if core is not None and set(core.CPU_ISAS) & set(core.CPU_ISAS_HERE):
    try:
        cpu_isa = core.cpu_isa()  # reads WAVEMIX_KERNELS_CPU_ISA
    except RuntimeError as error:
        raise _startup.stop(ValueError(str(error))) from None
elif core is not None:
    cpu_error = (
        f"the CPU kernels were built for {', '.join(core.CPU_ISAS)}, which this CPU lacks (it has "
        f"{', '.join(core.CPU_ISAS_HERE)}): build here by `{AGAIN}`, or for every CPU with WAVEMIX_KERNELS_CPU_ISAS=all"
    )
    warnings.warn(f"{cpu_error}. Until then CPU tensors run on plain PyTorch", RuntimeWarning, stacklevel=2)

#: The module with the CUDA launchers and the device type they serve. The tests put the CPU emulation of the
#: same kernels here.
cuda_core: ModuleType | None = core if core is not None and core.HAS_CUDA else None
cuda_device_type = "cuda"

DTYPES: dict[torch.dtype, int] = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


def by_matrix_units(dtype: torch.dtype) -> bool:
    """Whether a CPU's kernels multiply this dtype by matrix units (csrc/cpu/common/matrix_units.h)."""
    return cpu_isa == "amx" and dtype == torch.bfloat16


def cpu_reason() -> str | None:
    """Why the C++ kernels cannot run here, or None."""
    return core_error or cpu_error


@constant_result
def cuda_reason() -> str | None:
    """Why the CUDA C++ kernels cannot run here, or None."""
    if cuda_core is None:
        return core_error or (core.BUILD_NOTE if core is not None else None) or "this install has no CUDA kernels"
    return _driver_reason(cuda_core)


@functools.cache
def _driver_reason(with_cuda: ModuleType) -> str | None:
    """CUDA's minor versions are compatible, its major versions are not. Without a driver torch sees no device."""
    built, driver = with_cuda.CUDA_VERSION // 1000, with_cuda.cuda_driver_version() // 1000
    if not 0 < driver < built:
        return None
    return (
        f"the NVIDIA driver serves CUDA {driver}, these kernels were built with CUDA {built}; "
        f"update the driver or build with CUDA {driver}"
    )


#: Recorders, which write launches down for a plan (:mod:`wavemix_kernels.ops.common.recorder`), by thread.
recorders: dict[int, Any] = {}


def recorder() -> Any:
    """That of this thread, or None."""
    return recorders.get(threading.get_ident()) if recorders else None


def pointer(tensor: Tensor | None) -> int:
    """Address of a tensor as the core takes it; 0 for None."""
    if tensor is None:
        return 0
    return tensor.data_ptr() if not recorders or (of := recorder()) is None else of.address(tensor)


def address(tensor: Tensor | None) -> Sequence[int]:
    """Address and strides in elements; empty for None."""
    return () if tensor is None else (pointer(tensor), *tensor.stride())


def stream(device: torch.device) -> int:
    """Handle of torch's current stream on ``device``, for a launch."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def launch(name: str, device: torch.device, *args: Any, **more: Any) -> None:
    """Calls a function of the CUDA kernels on ``device``; the current stream follows ``args``.

    Args:
        args, more: with :func:`pointer` and :func:`address` for tensors.
    """
    function = getattr(cuda_core, name)
    with on(device):
        function(*args, stream(device), **more)
    if (of := recorder()) is not None:
        of.called(function, args, more)


#: Multiprocessors of an H100, for grids that no device runs: those of the emulator, of Triton's interpreter and of
#: tensors without storage.
MULTIPROCESSORS = 132


def multiprocessors(device: torch.device) -> int:
    """How many ``device`` has: grids and the order of their sums depend on it."""
    return _multiprocessors(device) if device.type == "cuda" else MULTIPROCESSORS


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` current for a launch. Going back is torch's business: it leaves a GPU alone that nothing has
    used yet, where switching to it would make a context there."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
