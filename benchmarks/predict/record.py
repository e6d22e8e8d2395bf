"""The kernels that a GPU would be given, recorded on fake tensors: ours with all they take, PyTorch's by operator.

::

    with recording(capability=(9, 0)) as step:
        model, x = build(), image((64, 3, 224, 224))
        step.clear()
        model(x).sum().backward()
    print(*step.launches, sep="\\n")

Nothing is computed. The fake tensors live on the CPU, where autograd serves every build of torch, and this package is
told that they are on a GPU: its choices, probes and launches are the real ones. A Triton launch is kept where it would
run; a CUDA launch comes from the real host code (:mod:`benchmarks.predict.core`).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from wavemix_kernels import _native, backends
from wavemix_kernels.ops import tuned, verify
from wavemix_kernels.ops.common import chips, kept, triton_launch

from ..harness.traffic import PLANS, bytes_moved, footprint
from . import core, elf
from .chips import CHIPS

_GPU = torch.device("cuda", 0)
_OURS = "wavemix_kernels"
_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_BASE = 1 << 44  # addresses of fake storages: 16-byte aligned, far from zero, different


@dataclass(frozen=True)
class Array:
    """A tensor without storage, as a launch takes it: Triton specialises on it, and its address tells it apart."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    address: int
    bytes: int  # of its elements in memory; a broadcast dimension has one

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class Launch:
    """A kernel as it would be launched, or an operator of PyTorch's.

    Attributes:
        kind: ``"triton"``, ``"cuda"`` or ``"aten"``.
        name: of the kernel (mangled for CUDA) or of the operator (``"aten::mm"``).
        operator: the operator of this package whose implementation launched it; empty outside of any.
        bytes: what it reads and writes at least: each tensor once (`harness/traffic.py` says which rules hold for
            PyTorch's operators).
        arrays: tensors among the arguments of a kernel; an operator's arguments, then its results.
        grid, threads, shared: blocks, threads of a block and bytes of dynamic shared memory; of a Triton kernel the
            compiler decides the last two.
        kernel, args, constants: of a Triton launch: ``kernel[grid](*args, **constants)``.
        parameters: of a CUDA launch: the bytes of its one argument.
    """

    kind: str
    name: str
    operator: str
    bytes: int
    arrays: tuple[Array, ...] = ()
    grid: tuple[int, ...] = ()
    threads: int = 0
    shared: int = 0
    kernel: Any = field(default=None, compare=False)
    args: tuple[Any, ...] = ()
    constants: dict[str, Any] = field(default_factory=dict)
    parameters: bytes = b""


class Step:
    """A recorded step: launches and arrays so far."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.operators: list[str] = []  # of this package, the innermost last
        self._storages: dict[int, tuple[int, Tensor]] = {}  # the tensor keeps its storage's identity from another
        self._spans: list[tuple[int, int, Tensor]] = []
        self._next = _BASE

    def clear(self) -> None:
        self.launches.clear()

    def address(self, tensor: Tensor) -> int:
        """Where a fake tensor would begin: views of one storage lie in one place."""
        storage = tensor.untyped_storage()
        identity = storage._cdata
        if identity not in self._storages:
            self._storages[identity] = (self._next, tensor.detach())
            self._next += (storage.nbytes() + 4095) // 4096 * 4096 + 4096
        return self._storages[identity][0] + tensor.storage_offset() * tensor.element_size()

    def array(self, tensor: Tensor) -> Array:
        strides = tensor.stride() if tensor.layout == torch.strided else ()
        return Array(tensor.dtype, tuple(tensor.shape), tuple(strides), self.address(tensor), footprint(tensor))

    def pointed(self, tensor: Tensor) -> int:
        """:meth:`address`, remembered as one that a compiled kernel was given."""
        address = self.address(tensor)
        self._spans.append((address, address + max(footprint(tensor), 1), tensor.detach()))
        return address

    def arrays_in(self, parameters: bytes) -> tuple[Array, ...]:
        """The tensors whose addresses stand in a kernel's parameters."""
        words = {int.from_bytes(parameters[i : i + 8], "little") for i in range(0, len(parameters) - 7, 8)}
        found: dict[int, Array] = {}
        for start, _, tensor in self._spans:
            if start in words:
                array = self.array(tensor)
                if start not in found or array.bytes > found[start].bytes:
                    found[start] = array
        return tuple(found.values())

    def add(self, launch: Launch) -> None:
        self.launches.append(launch)


def _once(arrays: Sequence[Array]) -> int:
    """Bytes of tensors that differ."""
    return sum({(a.address, a.bytes): a.bytes for a in arrays}.values())


class _Recorder(TorchDispatchMode):
    """PyTorch's operators go into the step, this package's own run their implementation."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") == _GPU:  # this package asks for its inputs' device
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if func.namespace == _OURS:
            self.step.operators.append(func._schema.name.split("::")[1])
            try:
                with self:
                    return func.redispatch(_KEYS, *args, **kwargs)
            finally:
                self.step.operators.pop()
        if func.namespace == "aten" and func._can_decompose():  # below autograd the library's composites arrive whole
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        moved = bytes_moved(func, args, kwargs, result, PLANS["gpu"])
        if moved:
            leaves = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            arrays = tuple(map(self.step.array, leaves))
            described = tuple(tree_map(lambda v: self.step.array(v) if isinstance(v, Tensor) else v, args))
            operator = self.step.operators[0] if self.step.operators else ""
            self.step.add(
                Launch("aten", func._schema.name, operator, moved, arrays, args=described, constants=dict(kwargs))
            )
        return result


def _asked_by_us() -> bool:
    """Whether the caller's caller is a module of this package."""
    name = sys._getframe(2).f_globals.get("__name__", "")
    return name.startswith(_OURS) and not name.startswith(f"{_OURS}.benchmarks")


@contextmanager
def recording(capability: tuple[int, int] = (9, 0)) -> Iterator[Step]:
    """Inside, operations on tensors made inside are recorded as a GPU of this compute capability would be given them.

    Raises:
        tools.Missing: without nvcc, whose output the CUDA launches come from.
        RuntimeError: under TRITON_INTERPRET=1, whose kernels do not compile.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: its kernels do not compile; predict in a process without it")
    step = Step()

    def triton_run(launch: triton_launch.Launch, like: Tensor) -> None:
        if 0 in launch.grid:
            return
        args = tree_map(lambda v: step.array(v) if isinstance(v, Tensor) else v, launch.args)
        arrays = tuple(v for v in tree_leaves(args) if isinstance(v, Array))
        step.add(
            Launch(
                "triton", launch.kernel.fn.__name__, step.operators[0], _once(arrays), arrays, launch.grid,
                32 * launch.constants["num_warps"], 0, launch.kernel, args, launch.constants,
            )
        )  # fmt: skip

    def cuda_launch(name: str, blocks: int, threads: int, shared: int, addresses: list[int]) -> None:
        _, entry = elf.cuda_entry(name, core.PTX)
        parameters = ctypes.string_at(addresses[0], entry.parameters[0][1])
        arrays = step.arrays_in(parameters)
        step.add(
            Launch(
                "cuda", name, step.operators[0], _once(arrays), arrays, (blocks,), threads, shared,
                parameters=parameters,
            )
        )  # fmt: skip

    real_device, real_is_cuda = FakeTensor.device, Tensor.is_cuda
    available = torch.cuda.is_available
    sms = next(chip.sms for chip in CHIPS.values() if chip.arch == 10 * capability[0] + capability[1])
    device = property(lambda self: _GPU if _asked_by_us() else real_device.fget(self))
    is_cuda = property(lambda self: True if _asked_by_us() else real_is_cuda.__get__(self))
    patched: list[tuple[Any, str, Any]] = [
        (triton_launch.Launch, "run", triton_run),
        (FakeTensor, "device", device),
        (FakeTensor, "is_cuda", is_cuda),
        (FakeTensor, "data_ptr", step.pointed),
        (_native, "cuda_core", core.load()),
        (_native, "stream", lambda device: 0),
        (_native, "on", lambda device: nullcontext()),
        (_native, "_multiprocessors", lambda device: sms),
        (chips, "_products_of", chips._products_of.__wrapped__),  # what is kept is another chip's
        (verify, "fault", lambda *_: None),
        (backends, "_has_code_for", lambda device: True),
        (torch.cuda, "is_available", lambda: _asked_by_us() or available()),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (kept, "settle", lambda made: None),
        (torch.cuda, "get_device_capability", lambda device=None: capability),
    ]
    with ExitStack() as stack:
        for owner, name, value in patched:
            bound = (lambda method: lambda self: method(self))(value) if name == "data_ptr" else value
            stack.enter_context(mock.patch.object(owner, name, bound, create=True))
        stack.enter_context(mock.patch.dict(tuned._tables, {_GPU: {}}))  # nothing was measured there
        stack.enter_context(core.launches_to(cuda_launch))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(_Recorder(step))
        yield step


def image(
    shape: Sequence[int], dtype: torch.dtype = torch.bfloat16, channels_last: bool = False, grad: bool = False
) -> Tensor:
    """An input, inside of :func:`recording`."""
    order = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype).to(memory_format=order).requires_grad_(grad)


def launches_of(function: Callable[[], Any], capability: tuple[int, int] = (9, 0)) -> list[Launch]:
    """The launches of ``function``, which makes its own tensors by :func:`image`."""
    with recording(capability) as step:
        function()
    return step.launches
