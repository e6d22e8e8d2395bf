"""Machine code as cuobjdump prints it: instructions, their operands, and what unit of a multiprocessor each takes."""

from __future__ import annotations

import functools
import re
import tempfile
from dataclasses import dataclass

from . import elf
from .tools import program, run

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?)(U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE)
IS_PREDICATE = re.compile(r"!?U?P(T|\d)")
#: Their first operand is no result.
_NO_RESULT = {
    *("STG", "STS", "ST", "STL", "RED", "LDGSTS", "R2P", "VOTE", "VOTEU", "PLOP3", "UPLOP3"),
    *("BAR", "BRA", "RET", "EXIT", "CALL", "BRX", "BRXU", "WARPSYNC"),
}
_REGISTER = re.compile(r"(?<![\w.])(U?R)(\d+)((?:\.\w+)*)")

#: Classes of instructions, by the unit they take; what matches none is "other": control and moves of scalar values.
CLASSES = (
    ("tensor", r"HMMA|IMMA|DMMA|HGMMA|IGMMA|UTC\w*MMA"),
    ("load", r"LDG\b|LDGSTS|LD\b|UBLKCP|UTMALDG"),
    ("store", r"STG|ST\b|RED|ATOM|UTMASTG"),
    ("shared", r"LDS|STS|LDSM|STSM|ATOMS|LDT|STT|LDTM|STTM|SHFL|LDL|STL"),
    ("barrier", r"BAR|WARPSYNC|SYNCS|DEPBAR|LDGDEPBAR|MEMBAR|FENCE|WARPGROUP|ARRIVES|ERRBAR|BSYNC|BSSY|NANOSLEEP"),
    ("mufu", r"MUFU|F2I|I2F|F2F|FRND|POPC|FLO|BREV|I2I|F2I"),
    ("fp64", r"D(ADD|MUL|FMA|SETP|MNMX)\b"),
    ("imad", r"IMAD|IDP"),
    ("fp32", r"F(ADD|MUL|FMA)2?\b|HFMA2|HADD2|HMUL2|FFMA32I"),
    ("alu", r"IADD|VIADD|LOP3|SHF|LEA|ISETP|FSETP|SEL|FSEL|PRMT|MOV|IMNMX|FMNMX|VIMNMX|F2FP|PLOP3|SGXT|I2FP|IABS|SHL|"
            r"SHR|BMSK|R2P|P2R|CS2R|HSETP|HMNMX|PSETP|VOTE|R2UR|LOP|FCHK|VABSDIFF|MATCH|S2R|FMNMX3|HSET"),
)  # fmt: skip
_CLASS = [(name, re.compile(rf"(?:{pattern})")) for name, pattern in CLASSES]


def class_of(base: str) -> str:
    """The class of an instruction by its name without modifiers."""
    if base.startswith("U") and not re.match("UTC|UBLK|UTMA", base):
        return "other"  # the scalar unit issues beside the others
    return next((name for name, pattern in _CLASS if pattern.match(base)), "other")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        guard: predicate and whether it is negated; ("", False) always runs.
        op: with modifiers, as printed; `base` and `modifiers` are its parts.
        operands: as printed, from the left.
        kind: of :data:`CLASSES`.
        reads, writes: registers (``"R7"``, ``"UR4"``).
    """

    at: int
    guard: tuple[str, bool]
    op: str
    base: str
    modifiers: frozenset[str]
    operands: tuple[str, ...]
    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @functools.cached_property
    def parts(self) -> tuple[list[str], list[str], list[str]]:
        """Predicates that it sets, result and sources, predicates that it takes."""
        operands, front, back, result = list(self.operands), [], [], []
        if operands and not IS_PREDICATE.fullmatch(operands[0]):
            result = [operands.pop(0)]
        while operands and IS_PREDICATE.fullmatch(operands[0]):
            front.append(operands.pop(0))
        if not result and operands:
            result = [operands.pop(0)]
        while operands and IS_PREDICATE.fullmatch(operands[-1]):
            back.insert(0, operands.pop())
        return front, result + operands, back

    @property
    def width(self) -> int:
        """Bytes that each thread moves, of an access to memory."""
        for size in (256, 128, 64):
            if str(size) in self.modifiers:
                return size // 8
        if self.modifiers & {"U8", "S8"}:
            return 1
        return 2 if self.modifiers & {"U16", "S16"} else 4


@dataclass(frozen=True)
class Kernel:
    """Machine code of one kernel."""

    entry: elf.Entry
    code: tuple[Instruction, ...]

    @functools.cached_property
    def index(self) -> dict[int, int]:
        return {instruction.at: i for i, instruction in enumerate(self.code)}


def _split(operands: str) -> tuple[str, ...]:
    """At commas outside of brackets."""
    parts, depth, part = [], 0, ""
    for letter in operands:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += letter
    return tuple([*parts, part.strip()] if part.strip() else parts)


def _registers(text: str, count: int = 1) -> list[str]:
    """Registers named in an operand; an address or a value of 64 bits takes two."""
    found = []
    for kind, number, suffixes in _REGISTER.findall(text):
        wide = 2 if ".64" in suffixes or ("desc" in text and kind == "R") else count
        found += [f"{kind}{int(number) + i}" for i in range(wide)]
    return found


def _counts(base: str, modifiers: frozenset[str], width: int) -> tuple[int, list[int]]:
    """Registers of the result, and of each source in turn."""
    words = max(1, width // 4)
    if base in ("LDG", "LD", "LDS", "LDL", "LDC", "ULDC", "LDCU"):
        return words, [1]
    if base == "LDSM":
        return 4 if "4" in modifiers else 2 if "2" in modifiers else 1, [1]
    if base in ("STG", "ST", "STS", "STL"):
        return 0, [1, words]
    if base == "HMMA":
        return 4, [2 if "1688" in modifiers else 4, 1 if "1688" in modifiers else 2, 4]
    if base == "HGMMA":
        return 0, [1]
    if base == "IMAD" and "WIDE" in modifiers:
        return 2, [1, 1, 2]
    if base == "IMAD" and "HI" in modifiers:
        return 1, [1, 1, 2]
    if base in ("DADD", "DMUL", "DFMA"):
        return 2, [2, 2, 2]
    if base == "CS2R" and "32" not in modifiers:
        return 2, [1]
    wide = base in ("MOV", "UMOV", "SEL", "IADD", "UIADD3", "IADD3", "R2UR") and "64" in modifiers
    return (2 if wide else 1), [2 if wide else 1]


def _decode(at: str, negated: str, guard: str, op: str, rest: str) -> Instruction:
    base, *parts = op.split(".")
    modifiers = frozenset(parts)
    operands = _split(rest)
    made = Instruction(
        int(at, 16), (guard, negated == "!"), op, base, modifiers, operands, class_of(base), (), ()
    )  # fmt: skip
    results, sources = _counts(base, modifiers, made.width)
    writes: list[str] = []
    reads: list[str] = []
    registers = [text for text in operands if not IS_PREDICATE.fullmatch(text)]
    stores = results == 0 or base in _NO_RESULT or "SETP" in base
    for i, text in enumerate(registers):
        if i == 0 and not stores and re.match(r"U?R", text):
            writes = _registers(text, results)
        else:
            which = i if stores else i - 1
            reads += _registers(text, sources[min(which, len(sources) - 1)])
    return Instruction(
        made.at, made.guard, op, base, modifiers, operands, made.kind, tuple(reads), tuple(writes)
    )  # fmt: skip


def parse(text: str) -> dict[str, tuple[Instruction, ...]]:
    """kernel -> its instructions, from what ``cuobjdump -sass`` prints."""
    functions = re.split(r"\n\s*Function : (\S+)\n", text)[1:]
    return {
        name: tuple(_decode(*found) for found in _LINE.findall(body))
        for name, body in zip(functions[::2], functions[1::2], strict=True)
    }


@functools.lru_cache(maxsize=32)
def disassemble(cubin: bytes) -> dict[str, Kernel]:
    """Every kernel of a cubin by its (mangled) name.

    Raises:
        tools.Missing: no cuobjdump.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = parse(run([program("cuobjdump"), "-sass", file.name]))
    return {entry.name: Kernel(entry, code[entry.name]) for entry in elf.entries(cubin)}
