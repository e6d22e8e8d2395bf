"""The way of a warp through machine code: which instructions run, how often, and the addresses that they touch.

Control flow of these kernels follows from parameters, block and thread, not from data, so integers and predicates are
enough (:mod:`benchmarks.predict.arithmetic`). Where data decide (the slow path of a sine, a wait for a barrier) the
shorter way is taken: a jump forward is made, one backward is not.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass, field

from .arithmetic import step
from .registers import Thread
from .sass import Instruction, Kernel

MOST = 2_000_000  # instructions of one thread; beyond, a loop is not understood
_ADDRESS = re.compile(r"\[(?:(U?R\d+|RZ)(\.64|\.U32)?)?(?:\.X\d+)?(?:\+?(UR\d+))?(?:\+?(-?0x[0-9a-f]+))?\]$")
_ENDS = ("BRA", "CALL", "RET", "EXIT", "BRX", "JMP", "BREAK")


class NotUnderstood(RuntimeError):
    """Machine code that this module cannot follow; the message says where."""


@dataclass
class Trace:
    """One thread's way.

    Attributes:
        path: indices of instructions that ran or were skipped by their guard, in order.
        accesses: (position in the path, address) of global loads and stores that ran; None: not known.
        guessed: branches that data decide, by address, and how often.
    """

    path: list[int] = field(default_factory=list)
    skipped: set[int] = field(default_factory=set)
    accesses: list[tuple[int, int | None]] = field(default_factory=list)
    descriptors: list[tuple[int, int]] = field(default_factory=list)
    guessed: Counter[int] = field(default_factory=Counter)


@functools.cache
def _parts_of_address(base: str, operands: tuple[str, ...]) -> tuple[tuple[tuple[str, int], ...], int] | None:
    """Registers with their sizes, and an offset, whose sum is the address."""
    text = next((t for t in operands[::-1] if "[" in t and not t.startswith("c[")), "")
    if base == "LDGSTS":
        text = next((t for t in operands if t.startswith("desc")), operands[1])
    match = _ADDRESS.search(text)
    if match is None:
        return None
    register, wide, uniform, offset = match.groups()
    size = 8 if wide == ".64" or (register and "desc" in text) else 4
    named = [(name, bytes_) for name, bytes_ in ((register, size), (uniform, 8)) if name and name != "RZ"]
    return tuple(named), int(offset or "0", 16)


def _address(instruction: Instruction, thread: Thread) -> int | None:
    parts = _parts_of_address(instruction.base, instruction.operands)
    if parts is None:
        return None
    values = [thread.read(name, size) for name, size in parts[0]]
    return None if None in values else sum(v for v in values if v is not None) + parts[1]


def trace(
    kernel: Kernel, constants: bytes, block: tuple[int, int, int], thread_index: int, most: int | None = None
) -> Trace:
    """The way of one thread of one block.

    Args:
        constants: bank 0 with the parameters in place.
        most: end after so many instructions; None: at the thread's end.

    Raises:
        NotUnderstood: an instruction that changes the way is not known, or the way does not end.
    """
    names = "XYZ"
    special = {f"SR_CTAID.{names[i]}": block[i] for i in range(3)}
    special |= {"SR_TID.X": thread_index, "SR_TID.Y": 0, "SR_TID.Z": 0, "SR_LANEID": thread_index % 32}
    special |= {"SR_CgaCtaId": 0, "SR_SWINHI": 0, "SR_SWINLO": 0, "SR_VIRTUALSMID": 0}
    thread, made = Thread(constants, special), Trace()
    code, at = kernel.code, 0
    while most is None or len(made.path) < most:
        if len(made.path) > MOST:
            raise NotUnderstood(f"{kernel.entry.name}: more than {MOST} instructions, last at {code[at].at:#x}")
        instruction = code[at]
        made.path.append(at)
        guard, negated = instruction.guard
        runs = thread.predicate(("!" if negated else "") + guard) if guard else True
        if instruction.base in _ENDS:
            taken, target = _branch(kernel, instruction, thread, runs, made)
            if not taken:
                made.skipped.add(len(made.path) - 1)
            if target is None and taken:
                return made
            at = kernel.index[target] if taken and target is not None else at + 1
            continue
        if runs is False:
            made.skipped.add(len(made.path) - 1)
        elif instruction.kind in ("load", "store"):
            made.accesses.append((len(made.path) - 1, _address(instruction, thread)))
            for register in instruction.writes:
                thread.values[register] = None
        elif instruction.base == "SYNCS" and "TRYWAIT" in instruction.modifiers:
            for text in instruction.operands[:1]:
                thread.predicates[text] = True  # the barrier has been passed
        else:
            if instruction.base == "UTCHMMA" or instruction.base.startswith("UTC"):
                _describe(instruction, thread, made)
            if runs is None:
                _forget(instruction, thread)
            else:
                step(instruction, thread)
        at += 1
    return made


def _forget(instruction: Instruction, thread: Thread) -> None:
    for register in instruction.writes:
        thread.values[register] = None
    for text in instruction.operands[:2]:
        if re.fullmatch(r"U?P\d", text):
            thread.predicates[text] = None


def _describe(instruction: Instruction, thread: Thread, made: Trace) -> None:
    """The shape of a product of sm_100 stands in a register."""
    match = re.search(r"idesc\[(UR\d+)\]", " ".join(instruction.operands))
    value = thread.read(match[1]) if match else None
    if value is not None:
        made.descriptors.append((len(made.path) - 1, value))


def _branch(
    kernel: Kernel, instruction: Instruction, thread: Thread, runs: bool | None, made: Trace
) -> tuple[bool, int | None]:
    """Whether it is taken, and to which address; none ends the thread."""
    if instruction.base in ("BRX", "JMP", "BREAK"):
        if instruction.base == "BREAK":
            return False, 0
        raise NotUnderstood(f"{kernel.entry.name}: {instruction.op} at {instruction.at:#x}")
    if instruction.modifiers & {"DIV", "CONV"}:
        return False, 0
    for text in instruction.operands:
        if re.fullmatch(r"!?U?P(T|\d)", text):
            value = thread.predicate(text)
            runs = False if runs is False or value is False else None if None in (runs, value) else True
    if instruction.base == "EXIT":
        if runs is None:
            made.guessed[instruction.at] += 1
        return bool(runs), None
    if instruction.base == "RET":
        register = instruction.operands[0].split()[0]
        target = thread.read(register)
        if target is None:
            raise NotUnderstood(f"{kernel.entry.name}: return to an unknown address at {instruction.at:#x}")
        return bool(runs), target
    numbers = [text for text in instruction.operands if text.startswith("0x")]
    if not numbers:
        raise NotUnderstood(f"{kernel.entry.name}: {instruction.op} {instruction.operands} at {instruction.at:#x}")
    target = int(numbers[-1], 16)
    if runs is None:
        made.guessed[instruction.at] += 1
        runs = target > instruction.at
    return runs, target
