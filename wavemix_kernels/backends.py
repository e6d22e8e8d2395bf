"""The backend switch, and the capability probes that dispatch and error messages share.

Every op has a table ``{backend name: Backend}``. A backend's ``why_not`` is asked the same question by
:func:`wavemix_kernels.ops.choose.pick` (may this call run here?), by the error it raises and by
``python -m wavemix_kernels doctor``. The order of backends is :mod:`wavemix_kernels.ops.choose`'s.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from wavemix_kernels import _native, _startup

NAMES = ("auto", "cuda", "triton", "cpu", "reference")
VARIABLE = "WAVEMIX_KERNELS_BACKEND"

F = TypeVar("F", bound=Callable[..., Any])


class _State:
    initial: str = "auto"
    triton_on_cpu: bool = False


class _Choices(threading.local):
    """The :class:`backend` blocks that this thread is in, in the order of their beginning. torch.compile guards on what
    ``__init__`` makes, and not on a default that the class holds."""

    def __init__(self) -> None:
        self.blocks: tuple[backend, ...] = ()


_choices = _Choices()


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}={name!r}: expected one of {', '.join(map(repr, NAMES))}")
    return name


try:
    _State.initial = _checked(os.environ.get(VARIABLE) or "auto", VARIABLE)
except ValueError as error:
    raise _startup.stop(error) from None


class backend:
    """Chooses the backend of every op called inside: ``with backend("cpu"): ...``, or the decorator
    ``@backend("cpu")``.

    Args:
        name: ``"auto"`` (the fastest that serves the call), ``"cuda"``, ``"triton"``, ``"cpu"`` or
            ``"reference"``. Anything but ``"auto"`` raises where that backend cannot serve a call.

    The choice made in the forward pass holds for its backward pass, wherever that runs. Blocks of other threads see
    nothing of it: what a thread pool or activation checkpointing runs later is decorated, ``backend("cpu")(model)``.
    Blocks that overlap, as generators and coroutines can, end one by one; the one begun last counts. The variable
    ``WAVEMIX_KERNELS_BACKEND`` says what holds outside.

    Raises:
        ValueError: for an unknown name. Inside: for a call that the named backend cannot serve.
        RuntimeError: inside, where the named backend is not installed. Both messages say why. At its end, where a block
            began on another thread.
    """

    def __init__(self, name: str) -> None:
        self.name = _checked(name, "backend")

    def __enter__(self) -> None:
        _choices.blocks = (*_choices.blocks, self)

    def __exit__(self, *exc: object) -> None:
        blocks = _choices.blocks
        for i in range(len(blocks) - 1, -1, -1):
            if blocks[i] is self:
                _choices.blocks = blocks[:i] + blocks[i + 1 :]
                return
        raise RuntimeError(f"backend({self.name!r}): its block began on another thread; end it there")

    def __call__(self, function: F) -> F:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with backend(self.name):
                return function(*args, **kwargs)

        return wrapper  # type: ignore[return-value]


def requested(override: str | None = None) -> str:
    """The backend asked for: the call's own ``backend=`` argument, else this thread's choice."""
    if override is not None:
        return _checked(override, "backend")
    blocks = _choices.blocks
    return blocks[-1].name if blocks else _State.initial


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        why_not: given the tensors of a call, the reason this backend cannot serve it, or None. Called with no
            tensors it answers for the installation alone.
        functions: the op's directions by name (``"analysis"``, ``"synthesis"`` …).
        dtype, example: of an image that it serves, for those who ask whether it works at all.
    """

    why_not: Callable[..., str | None]
    functions: Mapping[str, Callable[..., Any]]
    dtype: torch.dtype = torch.float32
    example: tuple[int, ...] = (1, 4, 2, 2)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{tuple(tensor.shape)} on {tensor.device}"


def cpu_why_not(*tensors: Tensor) -> str | None:
    """Probe of the C++ kernels: the core is there, tensors on the CPU, a dtype they have."""
    if (reason := _native.cpu_reason()) is not None:
        return reason
    for t in tensors:
        if t.device.type != "cpu":
            return f"it takes CPU tensors, got {_describe(t)}"
        if t.dtype not in _native.DTYPES:
            return f"it has no kernels for {_describe(t)}"
    return None


def cuda_why_not(*tensors: Tensor) -> str | None:
    """Probe of the CUDA C++ kernels: built, a device there, tensors on it, a dtype they have."""
    if (reason := _native.cuda_reason()) is not None:
        return reason
    on_gpu = bool(tensors) and tensors[0].is_cuda  # then torch need not be asked, which costs more than all the rest
    if _native.cuda_device_type == "cuda" and not on_gpu and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    for t in tensors:
        if t.device.type != _native.cuda_device_type:
            return f"it takes {_native.cuda_device_type} tensors, got {_describe(t)}"
        if t.dtype not in _native.DTYPES:
            return f"it has no kernels for {_describe(t)}"
        if _native.cuda_device_type == "cuda" and not _has_code_for(t.device):
            major, minor = torch.cuda.get_device_capability(t.device)
            return f"built for sm_{_native.cuda_core.CUDA_ARCHS}, the device is sm_{major}{minor}"  # type: ignore[union-attr]
    return None


@functools.cache
def _has_code_for(device: torch.device) -> bool:
    archs: str = _native.cuda_core.CUDA_ARCHS  # type: ignore[union-attr]
    capability = torch.cuda.get_device_capability(device)
    return any(runs_on(arch, capability) for arch in archs.split())


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture as CMake names them (90, 90-real, 90-virtual, 90a, 100f) runs on a device.

    Machine code runs on its own major version from its minor upwards, PTX on anything as new, since the driver compiles
    it; without a suffix both are built. What "a" allows runs on that device alone, what "f" allows within its family.
    """
    number, kind = re.fullmatch(r"(\d+[af]?)(-real|-virtual)?", arch).groups()  # type: ignore[union-attr]
    built_for = divmod(int(number.rstrip("af")), 10)
    if number.endswith("a"):
        return built_for == capability
    if number.endswith("f") or kind == "-real":
        return built_for[0] == capability[0] and built_for <= capability
    return built_for <= capability


@functools.cache
def triton_reason() -> str | None:
    """Why Triton's kernels are missing, or None."""
    try:
        import triton
    except ImportError as error:
        return f"Triton does not import ({error}); install with `pip install triton`"
    if tuple(int(v) for v in triton.__version__.split(".")[:2]) < (3, 5):
        return f"Triton {triton.__version__} is too old: 3.5 or newer is needed"
    return None


def triton_interpreted() -> bool:
    """Whether Triton's interpreter is on (TRITON_INTERPRET=1): its kernels then take CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_why_not(*tensors: Tensor) -> str | None:
    """Probe of the Triton kernels: Triton there, a GPU it serves (or its interpreter), a dtype they have."""
    if (reason := triton_reason()) is not None:
        return reason
    on_cpu = triton_interpreted() or _State.triton_on_cpu
    devices = ("cpu", "cuda") if on_cpu else ("cuda",)
    on_gpu = bool(tensors) and tensors[0].is_cuda
    if not on_gpu and not on_cpu and not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    for t in tensors:
        if t.device.type not in devices:
            return f"it takes {' or '.join(devices)} tensors, got {_describe(t)}"
        if t.dtype not in _native.DTYPES:
            return f"it has no kernels for {_describe(t)}"
    return None


def triton_products_why_not(*tensors: Tensor) -> str | None:
    """Probe of the Triton kernels with matrix products."""
    if (reason := triton_why_not(*tensors)) is not None:
        return reason
    for t in tensors:
        if t.dtype == torch.float64:
            return "its matrix products accumulate in float32, got float64"
        if t.dtype == torch.bfloat16 and triton_interpreted():
            return "Triton's interpreter multiplies the raw bits of bfloat16; a GPU or another dtype is needed"
    return None


def reference_why_not(*tensors: Tensor) -> str | None:
    """Probe of the reference: any device, any real floating dtype."""
    for t in tensors:
        if not t.dtype.is_floating_point:
            return f"it takes real floating-point tensors, got {_describe(t)}"
    return None


@contextmanager
def emulated_cuda(core: Any) -> Iterator[None]:
    """Serves backend ``"cuda"`` on CPU tensors by ``core``, the host build of the same .cu sources (for tests)."""
    previous = _native.cuda_core, _native.cuda_device_type
    _native.cuda_core, _native.cuda_device_type = core, "cpu"
    try:
        yield
    finally:
        _native.cuda_core, _native.cuda_device_type = previous


@contextmanager
def executed_triton() -> Iterator[None]:
    """Serves backend ``"triton"`` on CPU tensors, for tests that replace ``Launch.run``
    (wavemix_kernels/ops/common/triton_launch.py)."""
    previous, _State.triton_on_cpu = _State.triton_on_cpu, True
    try:
        yield
    finally:
        _State.triton_on_cpu = previous
