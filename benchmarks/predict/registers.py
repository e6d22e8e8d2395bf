"""Registers, predicates and constants of one thread, and what an operand of machine code reads of them."""

from __future__ import annotations

import functools
import re
from typing import Any

Value = int | None  # None: not known
MASK = 0xFFFFFFFF


def signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


class Thread:
    """Registers and predicates of one thread.

    Attributes:
        constants: bank 0: what a launch writes there, parameters included.
        literals: bank 2: the compiler's own.
        special: values of special registers by name.
        local: words of local memory, by address.
    """

    def __init__(self, constants: bytes, special: dict[str, int], literals: bytes = b"") -> None:
        self.values: dict[str, Value] = {}
        self.predicates: dict[str, bool | None] = {}
        self.local: dict[int, Value] = {}
        self.special, self.banks = special, {0: constants, 2: literals}

    def predicate(self, text: str) -> bool | None:
        negated, name = text.startswith("!"), text.lstrip("!")
        value = True if name in ("PT", "UPT", "") else self.predicates.get(name)
        return None if value is None else value != negated

    def constant(self, offset: int, size: int, bank: int = 0) -> int:
        return int.from_bytes(self.banks[bank][offset : offset + size], "little")

    def read(self, text: str, size: int = 4) -> Value:
        """A source: registers, constant bank or immediate; negated or complemented where it says so."""
        sign, kind, content = _operand(text)
        if kind == "register":
            value = self.register(content, size)
        elif kind == "bank":
            base = 0 if content[0] is None else self.read(content[0])
            value = None if base is None else self.constant(base + content[1], size, content[2])
        else:
            value = content
        if value is None or not sign:
            return value
        whole = 1 << 8 * size
        return whole - value if sign == "-" else value ^ (whole - 1)  # -0 is 2^32: its carry counts

    def register(self, name: tuple[str, str], size: int = 4) -> Value:
        """A register, or with the one behind it a value of 8 bytes. One that nothing was written to is taken as zero:
        compilers gather predicates in the bits of such a register."""
        low = self.values.get(name[0], 0)
        if size == 4 or low is None:
            return low
        high = self.values.get(name[1], 0)
        return None if high is None else high << 32 | low

    def write(self, text: str, value: Value, size: int = 4) -> None:
        _, kind, content = _operand(text)
        if kind != "register":
            return
        if size == 4:
            self.values[content[0]] = None if value is None else value & MASK
            return
        for word, name in enumerate(_run(content[0], size // 4)):
            self.values[name] = None if value is None else value >> 32 * word & MASK


@functools.cache
def _run(name: str, count: int) -> tuple[str, ...]:
    """A register and those behind it."""
    kind, number = name[: name.index("R") + 1], int(name[name.index("R") + 1 :])
    return tuple(f"{kind}{number + i}" for i in range(count))


@functools.cache
def _operand(text: str) -> tuple[str, str, Any]:
    """Sign, kind and content: a register and the next one, (register or None, offset) of the constant bank, or a value.
    Unknown are floating-point immediates, |x| and descriptors."""
    text = text.replace(".reuse", "")
    sign, text = (text[0], text[1:]) if text[0] in "-~" else ("", text)
    if text.startswith("0x"):
        return sign, "value", int(text, 16)
    if match := re.fullmatch(r"(U?R\d+)(?:\.\w+)*", text):
        return sign, "register", _run(match[1], 2)
    if re.fullmatch(r"U?RZ(\.\w+)*|SRZ", text):
        return sign, "value", 0
    if match := re.fullmatch(r"c\[0x([02])\]\[(?:(U?R\w+)(?:\.\w+)?\+?)?(-?0x[0-9a-f]+)?\]", text):
        return sign, "bank", (match[2], int(match[3] or "0", 16), int(match[1]))
    return sign, "value", None
