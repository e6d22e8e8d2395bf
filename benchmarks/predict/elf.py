"""Reads a cubin: each kernel's parameters, registers and shared memory."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from pathlib import Path

from . import core

# Attributes of section .nv.info.<kernel>, format and number as NVIDIA's tools print them by name.
_KPARAM_INFO, _PARAM_CBANK, _REGCOUNT = 0x17, 0x0A, 0x2F


@dataclass(frozen=True)
class Entry:
    """A kernel of a cubin.

    Attributes:
        base: offset of the parameters in constant bank 0.
        parameters: (offset from the base, bytes) of each parameter, in order.
        registers: of a thread.
        shared: bytes of static shared memory of a block.
        local: bytes of a thread's stack frame, spills among them.
        literals: constant bank 2: the compiler's own numbers and tables.
    """

    name: str
    base: int
    parameters: tuple[tuple[int, int], ...]
    registers: int
    shared: int
    local: int
    literals: bytes = b""


def _sections(code: bytes) -> dict[str, tuple[bytes, int, int]]:
    """name -> (contents, size, info)."""
    (at,) = struct.unpack_from("<Q", code, 0x28)
    size, count, names = struct.unpack_from("<HHH", code, 0x3A)
    headers = [struct.unpack_from("<IIQQQQII", code, at + i * size) for i in range(count)]
    strings = headers[names]
    table = code[strings[4] : strings[4] + strings[5]]
    found = {}
    for name, kind, _, _, offset, length, _, info in headers:
        contents = b"" if kind == 8 else code[offset : offset + length]  # NOBITS: only a size
        found[table[name : table.index(b"\0", name)].decode()] = (contents, length, info)
    return found


def _attributes(section: bytes) -> list[tuple[int, bytes]]:
    """(number, value) of one .nv.info section: a byte of format (4: with a length), a byte of number, a value."""
    at, found = 0, []
    while at + 4 <= len(section):
        form, number, value = struct.unpack_from("<BBH", section, at)
        at += 4
        if form == 4:
            found.append((number, section[at : at + value]))
            at += value
        else:
            found.append((number, struct.pack("<H", value)))
    return found


def entries(cubin: bytes) -> list[Entry]:
    """Every kernel of a cubin."""
    sections = _sections(cubin)
    symbols = _symbol_names(sections)
    registers, frames = {}, {}
    for number, value in _attributes(sections[".nv.info"][0]):
        if number in (_REGCOUNT, 0x12):  # 0x12: minimum stack size; both are (symbol, value)
            symbol, amount = struct.unpack("<II", value)
            (registers if number == _REGCOUNT else frames)[symbols[symbol]] = amount
    found = []
    for name in (section[6:] for section in sections if section.startswith(".text.")):
        base, parameters = 0, {}
        for number, value in _attributes(sections[f".nv.info.{name}"][0]):
            if number == _KPARAM_INFO:
                _, ordinal, offset, flags = struct.unpack("<IHHI", value)
                parameters[ordinal] = (offset, flags >> 18)
            elif number == _PARAM_CBANK:
                _, base, _ = struct.unpack("<IHH", value)
        _, shared, _ = sections.get(f".nv.shared.{name}", (b"", 0, 0))
        literals, _, _ = sections.get(f".nv.constant2.{name}", (b"", 0, 0))
        ordered = tuple(parameters[i] for i in sorted(parameters))
        found.append(Entry(name, base, ordered, registers.get(name, 0), shared, frames.get(name, 0), literals))
    return found


def _symbol_names(sections: dict[str, tuple[bytes, int, int]]) -> list[str]:
    table, strings = sections[".symtab"][0], sections[".strtab"][0]
    starts = [struct.unpack_from("<I", table, at)[0] for at in range(0, len(table), 24)]
    return [strings[start : strings.index(b"\0", start)].decode() for start in starts]


@functools.cache
def _cuda_entries(source: Path, arch: int) -> tuple[bytes, dict[str, Entry]]:
    cubin = core.cubin(source, arch).read_bytes()
    return cubin, {entry.name: entry for entry in entries(cubin)}


def cuda_entry(kernel: str, arch: int) -> tuple[bytes, Entry]:
    """The cubin for a chip that has a CUDA kernel of the package, by its mangled name, and what it says of it.

    Raises:
        tools.Missing, RuntimeError: see :func:`benchmarks.predict.core.build`.
    """
    cubin, found = _cuda_entries(core.source_of(kernel), arch)
    return cubin, found[kernel]
