"""A GPU for this process's Python: PyTorch, Triton and this package find one, and whatever is launched returns at once.

Tensors stay on the CPU and say that they are on a GPU. What a user's Python runs through on a GPU runs here: probes,
device guards, plans, Triton's binder and its launcher in C, the CUDA kernels' host code. The replaced parts are the
ones below Python: the driver (stub/driver.c), the CUDA runtime (stub/runtime.cpp) and the functions of PyTorch's CUDA
build that ask them. It cannot be taken back, so it belongs in a process of its own (:mod:`benchmarks.predict.host`).
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo  # it reads Tensor.device while it is imported, and finds the real one now

from .tools import Missing, key, locked, run

_SOURCE = Path(__file__).parent / "stub" / "driver.c"


class _Device(str):
    """The device that tensors name. PyTorch's own functions take it as a string: the device that memory comes from."""

    __slots__ = ()
    type, index = "cuda", 0


GPU = _Device("cpu")


class _Stream:
    def __init__(self, **_: int) -> None:
        self.cuda_stream = 0


def install(capability: tuple[int, int] = (9, 0)) -> None:
    """From here on there is a GPU.

    Raises:
        Missing: Triton, nvcc or a C compiler is not installed.
        RuntimeError: under TRITON_INTERPRET=1, whose kernels are not launched.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: nothing is launched; measure in a process without it")
    _install_driver()
    _install_torch(capability)
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    from wavemix_kernels import _native
    from wavemix_kernels.ops import tuned
    from wavemix_kernels.ops.common import plan

    from . import core

    driver.set_active(CudaDriver())
    _native.cuda_core = core.load()
    classes: Any = torch.Tensor
    classes.device, classes.is_cuda = GPU, True
    tuned._tables[GPU] = {}  # nothing was measured there
    plan.State.on = True  # as where PyTorch is built for GPUs


def _install_driver() -> None:
    try:
        import triton
    except ImportError as error:
        raise Missing("triton is not installed: pip install triton") from error
    headers = Path(triton.__file__).parent / "backends/nvidia/include"
    with locked("driver") as cache:
        folder = cache / f"driver-{key([_SOURCE], triton.__version__)}"
        library = folder / "libcuda.so.1"
        if not library.exists():
            folder.mkdir(exist_ok=True)
            options = ["-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1", f"-I{headers}"]
            run([os.environ.get("CC", "cc"), *options, _SOURCE, "-o", library])
    # Whoever asks for a library of this name later is given the one that is loaded already.
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder.parent / "triton"))


def _install_torch(capability: tuple[int, int]) -> None:
    """The C functions that a CUDA build of PyTorch has, answering at once; what calls them in Python stays."""
    major, minor = capability
    properties = SimpleNamespace(
        major=major, minor=minor, multi_processor_count=132, name="stub", total_memory=80 << 30, warp_size=32
    )
    c: Any = torch._C
    cuda: Any = torch.cuda
    c._cuda_getDeviceCount = lambda: 1
    c._cuda_getDevice = lambda: 0
    c._cuda_setDevice = lambda index: None
    c._cuda_isInBadFork = lambda: False
    c._cuda_getCurrentStream = lambda index: (0, index, 1)
    c._cuda_getCurrentRawStream = lambda index: 0
    c._cuda_isCurrentStreamCapturing = lambda: False
    cuda._initialized, cuda._cached_device_count = True, 1
    cuda._is_in_bad_fork = c._cuda_isInBadFork
    cuda._exchange_device = cuda._maybe_exchange_device = lambda index: index
    cuda._get_device_properties = lambda index: properties
    cuda.Stream = _Stream
    real_index, device = cuda._get_device_index, torch.device("cuda", 0)
    cuda._get_device_index = lambda asked, *rest, **named: real_index(device if asked is GPU else asked, *rest, **named)
