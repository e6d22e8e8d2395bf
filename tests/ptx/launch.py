"""Backends "triton" and "cuda" on CPU tensors, every launch run from its PTX."""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.predict.core import PTX, Callback
from tests.ptx import build
from tests.ptx.executor import launch
from tests.ptx.memory import POISON, TAG_BITS, Global, Range
from tests.ptx.parser import Kernel, Module
from tests.ptx.static import Executed, Largest
from wavemix_kernels import backends
from wavemix_kernels.ops.common import layout
from wavemix_kernels.ops.common.triton_launch import Launch

#: Told of each launch: what it executed.
Met = Callable[[Executed], None]


def poison(tensor: Tensor) -> Tensor:
    """Fills memory with what the executor takes for unwritten."""
    storage = tensor.untyped_storage()
    if tensor.dtype.itemsize > 1 and storage.nbytes() > 0:
        held = (ctypes.c_uint16 * (storage.nbytes() // 2)).from_address(storage.data_ptr())
        np.frombuffer(held, np.uint16)[:] = POISON
    return tensor


@contextmanager
def unwritten() -> Iterator[None]:
    """Memory from `empty` counts as unwritten until a kernel, or torch, writes it."""
    patch = pytest.MonkeyPatch()
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty"),
                        (Tensor, "new_empty_strided"), (layout, "empty")):  # fmt: skip
        plain = getattr(owner, name)
        patch.setattr(owner, name, functools.wraps(plain)(lambda *a, _plain=plain, **k: poison(_plain(*a, **k))))
    try:
        yield
    finally:
        patch.undo()


class Storages(Global):
    """The storages of tensors, each with a tag."""

    def __init__(self) -> None:
        super().__init__([])
        self._tags: dict[int, int] = {}  # by address

    def tagged(self, address: int, start: int, size: int, itemsize: int) -> int:
        """An address in the storage at `start`; null stays null."""
        if start == 0:
            return 0
        tag = self._tags.setdefault(start, len(self._tags) + 1)
        if tag not in self.ranges:
            self.ranges[tag] = Range(tag, start, size, itemsize)
        elif itemsize < self.ranges[tag].itemsize:
            self.ranges[tag].grain(itemsize)
        return address + (tag << TAG_BITS)

    def run(self, met: Met, module: Module, name: str, ptx: str | None, known: str, grid: Sequence[int], threads: int,
            shared: int, parameters: bytes) -> None:  # fmt: skip
        """Executes a launch and tells of it under the name that is `known`."""
        counts = launch(module, name, grid, threads, shared, parameters, self)
        counts.kernel = known
        spans = [(found.start, found.end - found.start) for found in self.ranges.values()]
        met(Executed(counts, ptx, name, grid, shared, parameters, spans))


# --- Triton --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _module(ptx: str) -> Module:
    return Module(ptx)


def run_triton(given: Launch, met: Met) -> None:
    """One launch: compiled as on a GPU of that architecture, then executed."""
    if 0 in given.grid:
        return
    binary = given.kernel.warmup(*given.args, grid=given.grid, **given.constants)
    module = _module(binary.asm["ptx"])
    (name,) = module.names()
    values = dict(zip(given.kernel.arg_names, given.args, strict=False)) | given.constants
    storages = Storages()
    passed = _flat([(kind, values[n]) for n, kind in binary.src.signature.items()])
    parameters, threads = _packed(module.kernel(name), passed, storages), 32 * given.constants["num_warps"]
    storages.run(met, module, name, binary.asm["ptx"], kernel_name(given), given.grid, threads, binary.metadata.shared,
                 parameters)  # fmt: skip


def kernel_name(given: Launch) -> str:
    """Names a Triton kernel: its module, its name and the narrowest floating-point type that it is given."""
    dtypes = [t.dtype for t in given.args if isinstance(t, Tensor) and t.is_floating_point()]
    function = given.kernel.fn
    return f"{function.__module__}.{function.__name__} {str(min(dtypes, key=lambda d: d.itemsize))[6:]}"


def _flat(passed: list[tuple[Any, Any]]) -> Iterator[tuple[str, Any]]:
    """(type, value) of what is passed; tuples are taken apart, and constants are in the code."""
    for kind, value in passed:
        if isinstance(kind, tuple):
            yield from _flat(list(zip(kind, value, strict=True)))
        elif kind != "constexpr":
            yield kind, value


def _packed(kernel: Kernel, passed: Iterable[tuple[str, Any]], storages: Storages) -> bytes:
    """In the order of the PTX's parameters; Triton's own scratch pointers behind ours are null."""
    out = bytearray(sum(v.size + 16 for v in kernel.parameters.values()))
    for (kind, value), variable in zip(passed, kernel.parameters.values(), strict=False):
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            value = storages.tagged(value.data_ptr(), storage.data_ptr(), storage.nbytes(), value.dtype.itemsize)
        if kind in ("fp32", "fp64"):
            data = struct.pack("<f" if kind == "fp32" else "<d", value)
        else:
            data = (int(value) % (1 << 8 * variable.size)).to_bytes(variable.size, "little")
        assert len(data) == variable.size, f"{kernel.name}: {variable.name} has {variable.size} bytes, {kind} passed"
        out[variable.at : variable.at + variable.size] = data
    return bytes(out)


@contextmanager
def executed_triton(met: Met) -> Iterator[None]:
    """Serves backend "triton" on CPU tensors."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver

    driver.set_active(SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", PTX, 32),
    ))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, backends.executed_triton(), unwritten():
        patch.setenv("TRITON_CACHE_DIR", str(build.FOLDER / "triton"))
        patch.setattr(CUDABackend, "make_cubin", lambda *args: b"not assembled")
        patch.setattr(Launch, "run", lambda self, like: run_triton(self, met))
        yield


# --- CUDA ----------------------------------------------------------------------------------------------------------


class Core:
    """A module with kernels, whose launches run from PTX. Its functions take addresses of `ranges`, which they get with
    tags; `recorded` says where tensors are."""

    def __init__(self, built: build.Built, met: Met) -> None:
        self._module, self._met = built.module, met
        self._kernels = {
            name: module for text in built.ptx.values() for module in [_module(text)] for name in module.names()
        }
        self._known: dict[int, tuple[int, int]] = {}  # address -> bytes, of an element
        self._storages = Storages()
        self._error: bytes = b""
        self._callback = Callback(self._launch)
        library = ctypes.CDLL(built.module.__file__)
        library.wavemix_on_launch.argtypes = [Callback]
        library.wavemix_on_launch(self._callback)

    def record(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        start, size = storage.data_ptr(), storage.nbytes()
        for other, (length, _) in list(self._known.items()):  # freed meanwhile
            if other < start + size and start < other + length:
                del self._known[other]
        self._known[start] = (size, tensor.dtype.itemsize)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return functools.partial(self._call, value) if callable(value) else value

    def _call(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        self._storages = Storages()
        return function(*map(self._tagged, arguments), **{n: self._tagged(v) for n, v in named.items()})

    def _tagged(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._tagged(v) for v in value]
        if type(value) is int and value > 1 << 32:
            for start, (size, itemsize) in self._known.items():
                if start <= value < start + size:
                    return self._storages.tagged(value, start, size, itemsize)
        return value

    def _launch(self, name: bytes, grid: Any, threads: int, shared: int, arguments: Any) -> int | None:
        try:
            module, text = self._kernels[name.decode()], name.decode()
            parameters = bytearray()
            for variable, argument in zip(module.kernel(text).parameters.values(), arguments, strict=False):
                parameters = parameters.ljust(variable.at, b"\0") + ctypes.string_at(argument, variable.size)
            sizes = tuple(grid[axis] for axis in range(3))
            self._storages.run(self._met, module, text, None, text, sizes, threads, shared, bytes(parameters))
        except Exception as error:  # noqa: BLE001 (an exception cannot pass through the host code; the message can)
            self._error = f"{type(error).__name__}: {error}".encode()
            return ctypes.cast(ctypes.c_char_p(self._error), ctypes.c_void_p).value
        return None


@contextmanager
def recorded(core: Core) -> Iterator[None]:
    """Tells the core of every tensor whose address is asked for."""
    plain = Tensor.data_ptr

    def data_ptr(tensor: Tensor) -> int:
        core.record(tensor)
        return plain(tensor)

    with pytest.MonkeyPatch.context() as patch, unwritten():
        patch.setattr(Tensor, "data_ptr", data_ptr)
        yield


@contextmanager
def executed_cuda(met: Met) -> Iterator[None]:
    """Serves backend "cuda" on CPU tensors."""
    core = Core(build.core(), met)
    with recorded(core), backends.emulated_cuda(core):
        yield


EXECUTED: dict[str, Callable[[Met], AbstractContextManager[None]]] = {"triton": executed_triton, "cuda": executed_cuda}
_LARGEST = Largest()


def recorder(file: str | None) -> Met:
    """Adds a line of JSON for every launch."""

    def met(executed: Executed) -> None:
        _LARGEST.add(executed)
        _write(file, [asdict(executed.counts)])

    return met if file is not None else lambda executed: None


def compare(file: str) -> None:
    """Adds a line of JSON for every kernel: what predictions count of one of its launches, and what was executed."""
    _write(file, _LARGEST.compared())
    gc.freeze()  # pytest collects at its end, which takes seconds with so many objects


def _write(file: str, rows: Iterable[dict[str, Any]]) -> None:
    with open(file, "a") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
