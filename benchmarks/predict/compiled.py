"""A recorded launch as a chip gets it: machine code, resources, and the constants that the driver would write."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from . import elf, sass
from .chips import Chip
from .record import Array, Launch
from .tools import CACHE

_FLOATS = {"fp32": "<f", "fp64": "<d", "fp16": "<e"}
_RESERVED = 1024  # bytes of shared memory that the system takes of each block; sm_90 on counts them as static


@dataclass(frozen=True)
class Compiled:
    """A launch on a chip.

    Attributes:
        constants: constant bank 0, parameters included.
        grid: blocks in three dimensions.
        shared: bytes of a block, static and dynamic, without the system's.
    """

    cubin: bytes
    entry: elf.Entry
    constants: bytes
    grid: tuple[int, int, int]
    threads: int
    shared: int

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def kernel(self) -> sass.Kernel:
        """Its machine code."""
        return sass.disassemble(self.cubin)[self.name]

    @property
    def blocks(self) -> int:
        return math.prod(self.grid)

    def resident(self, chip: Chip) -> int:
        """Blocks that a multiprocessor holds; registers are handed out by eights to each thread."""
        registers = max(-(-self.entry.registers // 8) * 8, 16)
        return max(1, min(
            chip.registers // (registers * self.threads), chip.shared_bytes // (self.shared + _RESERVED),
            chip.warps * 32 // self.threads, chip.blocks,
        ))  # fmt: skip


def compiled(launch: Launch, chip: Chip) -> Compiled:
    """Machine code and constants of a launch of kind ``"triton"`` or ``"cuda"``.

    Raises:
        tools.Missing: a compiler is missing.
        ValueError: an operator of PyTorch's.
    """
    if launch.kind == "cuda":
        cubin, entry = elf.cuda_entry(launch.name, chip.arch)
        values = [launch.parameters]
        shared = launch.shared + entry.shared - (_RESERVED if chip.arch >= 90 else 0)
    elif launch.kind == "triton":
        binary = _by_triton(launch, chip)
        cubin = binary.asm["cubin"]
        (entry,) = elf.entries(cubin)
        values, shared = list(_parameters(binary.src.signature, launch)), binary.metadata.shared
    else:
        raise ValueError(f"launch={launch.name!r}: machine code is known of our own kernels only")
    x, y, z = (*launch.grid, 1, 1)[:3]
    constants = bank(entry, values, (launch.threads, 1, 1), (x, y, z), chip.arch)
    return Compiled(cubin, entry, constants, (x, y, z), launch.threads, max(shared, 0))


def _by_triton(launch: Launch, chip: Chip) -> Any:
    """Compiled for a chip that is not here; results are kept under build/predict."""
    from triton import knobs

    knobs.cache.dir = os.environ.get("TRITON_CACHE_DIR") or str(CACHE / "triton")
    with on_chip(chip.arch):
        return launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants)


@contextmanager
def on_chip(arch: int | str, device: Any = None) -> Iterator[None]:
    """Inside, Triton compiles for a chip that is not here, NVIDIA's (80) or AMD's ("gfx942"); what it has compiled it
    knows by the device."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    before = getattr(driver, "_active", None)
    target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
    # The part of a driver that compiling asks for.
    driver.set_active(SimpleNamespace(
        get_current_device=lambda: device or arch, get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
    ))  # fmt: skip
    try:
        yield
    finally:
        driver._active = before


def _parameters(signature: dict[str, Any], launch: Launch) -> Iterator[bytes]:
    """Arguments that are no constants, in the kernel's order, as bytes."""
    names = launch.kernel.arg_names
    given = dict(zip(names, launch.args, strict=False)) | launch.constants
    for name, kind in signature.items():
        yield from _packed(kind, given.get(name))


def _packed(kind: Any, value: Any) -> Iterator[bytes]:
    if isinstance(kind, tuple):
        for one, part in zip(kind, value, strict=True):
            yield from _packed(one, part)
    elif kind == "constexpr":
        return
    elif isinstance(value, Array):
        yield struct.pack("<Q", value.address)
    elif kind in _FLOATS:
        yield struct.pack(_FLOATS[kind], value)
    else:
        size = max(int(kind[1:]) // 8, 1)
        yield int(value).to_bytes(size, "little", signed=int(value) < 0)


def bank(
    entry: elf.Entry, values: list[bytes], block: tuple[int, ...], grid: tuple[int, ...], arch: int
) -> bytes:  # fmt: skip
    bank = bytearray(entry.base + 4096 + 64)
    if not len(values) <= len(entry.parameters) <= len(values) + 2:  # Triton adds two addresses of scratch memory
        raise ValueError(f"{entry.name}: {len(values)} arguments for {len(entry.parameters)} parameters")
    for (offset, size), value in zip(entry.parameters, values, strict=False):
        if size != len(value):
            raise ValueError(f"{entry.name}: an argument of {len(value)} bytes for a parameter of {size}")
        bank[entry.base + offset : entry.base + offset + size] = value
    # Where each architecture's driver writes the sizes of blocks and grid.
    block_at, grid_at = (0x360, 0x370) if arch >= 100 else (0x0, 0xC)
    for start, sizes in ((block_at, block), (grid_at, grid)):
        for i, size in enumerate(sizes):
            bank[start + 4 * i : start + 4 * i + 4] = size.to_bytes(4, "little")
    return bytes(bank)
