"""Backends "triton" and "cuda" on CPU tensors, every launch run from its PTX."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.aot.table import ROOT
from tests.ptx.executor import launch
from tests.ptx.memory import POISON, TAG_BITS, Counts, Global, Range
from tests.ptx.parser import Kernel, Module
from wavemix_kernels import backends
from wavemix_kernels.ops.common import layout
from wavemix_kernels.ops.common.triton_launch import Launch

FOLDER = ROOT / "build" / "ptx"
ARCH = 80  # its instructions run on every later chip
#: Told of each launch: the kernel as the compile tables call it, and what it executed.
Met = Callable[[str, Counts], None]


def poison(tensor: Tensor) -> Tensor:
    """Fills memory with what the executor takes for unwritten."""
    if tensor.dtype.itemsize > 1 and tensor.numel():
        tensor.untyped_storage().copy_(
            torch.tensor([POISON], dtype=torch.uint16).repeat(tensor.untyped_storage().nbytes() // 2).untyped_storage()
        )
    return tensor


@contextmanager
def unwritten() -> Iterator[None]:
    """What `empty` returns counts as unwritten until a kernel, or torch, writes it."""
    patch = pytest.MonkeyPatch()
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty"),
                        (Tensor, "new_empty_strided"), (layout, "empty")):  # fmt: skip
        plain = getattr(owner, name)
        patch.setattr(owner, name, functools.wraps(plain)(lambda *a, _plain=plain, **k: poison(_plain(*a, **k))))
    try:
        yield
    finally:
        patch.undo()


class Ranges:
    """The storages of tensors, each with a tag."""

    def __init__(self) -> None:
        self.by_pointer: dict[int, Range] = {}

    def address(self, tensor: Tensor) -> int:
        storage, itemsize = tensor.untyped_storage(), tensor.dtype.itemsize
        pointer = storage.data_ptr()
        if pointer == 0:
            return 0
        found = self.by_pointer.get(pointer)
        if found is None:
            found = Range(len(self.by_pointer) + 1, pointer, storage.nbytes(), itemsize)
            self.by_pointer[pointer] = found
        elif itemsize < found.itemsize:
            found.grain(itemsize)
        return tensor.data_ptr() + (found.start >> TAG_BITS << TAG_BITS)

    def memory(self) -> Global:
        return Global(list(self.by_pointer.values()))


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
    ranges = Ranges()
    passed = [(kind, values[n]) for n, kind in binary.src.signature.items() if kind != "constexpr"]
    parameters = _packed(module.kernel(name), passed, ranges)
    threads = 32 * given.constants["num_warps"]
    counts = launch(module, name, given.grid, threads, binary.metadata.shared, parameters, ranges.memory())
    met(f"{given.kernel.fn.__module__}.{name}", counts)


def _packed(kernel: Kernel, passed: list[tuple[str, Any]], ranges: Ranges) -> bytes:
    """In the order of the PTX's parameters; Triton's own scratch pointers behind ours are null."""
    out = bytearray(sum(v.size + 16 for v in kernel.parameters.values()))
    for (kind, value), variable in zip(passed, kernel.parameters.values(), strict=False):
        if isinstance(value, Tensor):
            value = ranges.address(value)
        if kind in ("fp32", "fp64"):
            data = struct.pack("<f" if kind == "fp32" else "<d", value)
        else:
            data = (int(value) % (1 << 8 * variable.size)).to_bytes(variable.size, "little")
        assert len(data) == variable.size, f"{kernel.name}: {variable.name} has {variable.size} bytes, {kind} passed"
        at = kernel.parameter_offsets[variable.name]
        out[at : at + variable.size] = data
    return bytes(out)


@contextmanager
def executed_triton(met: Met) -> Iterator[None]:
    """Serves backend "triton" on CPU tensors."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver

    driver.set_active(SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", ARCH, 32),
    ))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, backends.executed_triton(), unwritten():
        patch.setenv("TRITON_CACHE_DIR", str(FOLDER / "triton"))
        patch.setattr(CUDABackend, "make_cubin", lambda *args: b"not assembled")
        patch.setattr(Launch, "run", lambda self, like: run_triton(self, met))
        yield
