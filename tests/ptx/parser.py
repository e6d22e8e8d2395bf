"""PTX text into kernels: parameters, registers, shared and module variables, and instructions in basic blocks."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

SIZES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16, "16x2": 4}


class Literal(NamedTuple):
    """A number as written: an integer, or the bits of a float of so many bytes."""

    value: int
    float_bytes: int = 0


class Address(NamedTuple):
    base: Operand
    offset: int


class Either(NamedTuple):
    """`%r1|%p1`: a result and the predicate beside it."""

    first: str
    second: str


#: A register or symbol by name; several of them in braces.
Operand: TypeAlias = "str | Literal | Address | Either | tuple[Operand, ...]"


@dataclass(eq=False)
class Instruction:
    text: str
    opcode: str  # without its modifiers
    modifiers: tuple[str, ...]  # types and all others, in order
    rest: str
    guard: str | None = None  # predicate register
    negated: bool = False

    @functools.cached_property
    def operands(self) -> tuple[Operand, ...]:
        return tuple(map(_operand, _split(self.rest)))


class Variable(NamedTuple):
    name: str
    align: int
    size: int  # bytes; 0: as many as the launch asks for
    data: bytes = b""
    at: int = 0  # of a parameter, behind those before


@dataclass
class Kernel:
    """Only the last instruction of a block may branch, and none but the first is jumped to."""

    name: str
    parameters: dict[str, Variable]  # in order
    registers: dict[str, int]  # prefix -> bytes; 0 for predicates
    shared: list[Variable]
    blocks: list[list[Instruction]]
    labels: dict[str, int]  # -> index of a block

    def width(self, register: str) -> int:
        return self.registers[register if register in self.registers else register.rstrip("0123456789")]


_VARIABLE = re.compile(
    r"(?<![\w.])\.(?P<space>param|shared|global|const)\b(?P<words>[^;,)=]*?)\.(?P<kind>[bsuf])(?P<bits>\d+)(?:\s+\.ptr[\s\w.]*?)?"
    r"\s+(?P<name>[\w$%]+)(?:\[(?P<count>\d*)\])?\s*(?:=\s*(?P<data>\{[^}]*\}|[^;]+))?\s*[;,)]"
)
_REGISTERS = re.compile(r"\.reg\s+\.(pred|[bsuf]\d+)\s+([^;]*);")
_LABEL = re.compile(r"([\w$]+):(?!:)")
#: Registers that a launch sets, and their bytes.
SPECIAL = {"%laneid": 4, "%warpid": 4} | {
    f"%{name}.{axis}": 4 for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"
}
#: A block ends behind them.
_ENDS = ("bra", "ret", "exit", "bar", "barrier")


class Module:
    """The kernels of one text, each parsed when it is asked for."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
        text = re.sub(r"^\s*\.(loc|file|version|target|address_size)\b.*$", "", text, flags=re.MULTILINE)
        text = re.split(r"^\s*\.section\b", text, maxsplit=1, flags=re.MULTILINE)[0]
        self._entries, self._parsed, outside, at = {}, {}, [], 0
        for entry in re.finditer(r"\.entry\s+([\w$]+)\s*\(", text):
            end = text.index(")", entry.end())
            opening = text.index("{", end)
            closing = _closing(text, opening)
            outside.append(text[at : entry.start()])
            at = closing + 1
            self._entries[entry[1]] = (text[entry.end() : end + 1], text[opening + 1 : closing])
        outside.append(text[at:])
        found = [(match["space"], _variable(match)) for match in _VARIABLE.finditer("\n".join(outside))]
        self._shared = [variable for space, variable in found if space == "shared"]
        #: .global and .const
        self.variables = [variable for space, variable in found if space in ("global", "const")]

    def names(self) -> list[str]:
        return list(self._entries)

    def kernel(self, name: str) -> Kernel:
        if name not in self._parsed:
            self._parsed[name] = _kernel(name, *self._entries[name], self._shared)
        return self._parsed[name]


def _closing(text: str, opening: int) -> int:
    depth = 0
    for brace in re.compile(r"[{}]").finditer(text, opening):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    raise ValueError(f"PTX: the brace at {opening} is never closed")


def _variable(match: re.Match[str]) -> Variable:
    each = int(match["bits"]) // 8
    size = each * (1 if match["count"] is None else int(match["count"] or 0))
    align = re.search(r"\.align\s+(\d+)", match["words"])
    data = b""
    if match["data"]:
        for word in match["data"].strip("{} \n").split(","):
            number = _operand(word.strip())
            assert isinstance(number, Literal)
            data += (number.value % (1 << 8 * each)).to_bytes(each, "little")
    return Variable(match["name"], int(align[1]) if align else each, size, data.ljust(size, b"\0") if data else b"")


def _kernel(name: str, parameters: str, body: str, shared: list[Variable]) -> Kernel:
    params, at = {}, 0
    for v in map(_variable, _VARIABLE.finditer(parameters)):
        at = -(-at // v.align) * v.align
        params[v.name] = v._replace(at=at)
        at += v.size
    registers = dict(SPECIAL)
    for kind, names in _REGISTERS.findall(body):
        for register in names.split(","):
            registers[re.sub(r"<\d+>", "", register.strip())] = 0 if kind == "pred" else int(kind[1:]) // 8
    own = [_variable(match) for match in _VARIABLE.finditer(body) if match["space"] == "shared"]
    body = re.sub(r"^\s*\.pragma[^;]*;", "", _VARIABLE.sub("", _REGISTERS.sub("", body)), flags=re.MULTILINE)
    blocks, labels = [[]], {}
    for statement in body.split(";"):
        rest = statement.lstrip("{} \t\n").rstrip()
        while label := _LABEL.match(rest):
            if blocks[-1]:
                blocks.append([])
            labels[label[1]] = len(blocks) - 1
            rest = rest[label.end() :].lstrip("{} \t\n")
        if rest:
            blocks[-1].append(made := _instruction(rest))
            if made.opcode in _ENDS:
                blocks.append([])
    return Kernel(name, params, registers, [*shared, *own], blocks, labels)


def _instruction(text: str) -> Instruction:
    text = " ".join(text.split())
    match = re.match(r"(?:@(!?)([\w$%]+)\s+)?([\w.:]+)\s*(.*)$", text)
    assert match is not None, text
    negated, guard, code, rest = match.groups()
    opcode, *modifiers = code.split(".")
    return Instruction(text, opcode, tuple(modifiers), rest, guard, negated == "!")


def _split(text: str) -> list[str]:
    """At commas outside of braces."""
    return [part.strip() for part in re.split(r",(?![^{]*\})", text) if part.strip()]


@functools.cache
def _operand(text: str) -> Operand:
    if text[0] == "{":
        return tuple(_operand(part) for part in _split(text[1:-1]))
    if text[0] == "[":
        base, sign, offset = re.fullmatch(r"\[\s*([\w$%]+)\s*(?:([+-])\s*(-?\w+))?\s*\]", text).groups()
        at = int(offset, 0) if offset else 0
        return Address(_operand(base), -at if sign == "-" else at)
    if "|" in text:
        return Either(*text.split("|"))
    if match := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text):
        return Literal(int(match[2], 16), 4 if match[1] in "fF" else 8)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Literal(int(text.rstrip("U"), 0))
    return text
