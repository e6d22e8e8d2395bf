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
from .sass import IS_PREDICATE, Instruction, Kernel

ABSENT = -1
LOCAL = ("LDL", "STL")
_BANKS = ("LDS", "STS", "LDSM", "STSM", "LDGSTS")
MOST = 2_000_000  # instructions of one thread; beyond, a loop is not understood
_ADDRESS = re.compile(r"\[(?:(U?R\d+|RZ)(\.64|\.U32)?)?(?:\.X(\d+))?(?:\+?(UR\d+))?(?:\+?(-?0x[0-9a-f]+))?\]$")
_Parts = tuple[tuple[str, int, int], ...]
#: Instructions after which another than the next may follow.
ENDS = ("BRA", "CALL", "RET", "EXIT", "BRX", "BRXU", "JMP", "BREAK")


class NotUnderstood(RuntimeError):
    """Machine code that this module cannot follow; the message says where."""


@dataclass
class Trace:
    """One thread's way.

    Attributes:
        path: indices of instructions that ran or were skipped by their guard, in order.
        accesses, shared: (position in the path, address) of global loads and stores, and of accesses to shared memory;
            None: not known; :data:`ABSENT`: its guard kept the thread out.
        guessed: branches that data decide, by address, and how often.
    """

    path: list[int] = field(default_factory=list)
    skipped: set[int] = field(default_factory=set)
    accesses: list[tuple[int, int | None]] = field(default_factory=list)
    shared: list[tuple[int, int | None]] = field(default_factory=list)
    descriptors: list[tuple[int, int]] = field(default_factory=list)
    guessed: Counter[int] = field(default_factory=Counter)


@functools.cache
def _parts_of_address(base: str, operands: tuple[str, ...], shared: bool) -> tuple[_Parts, int] | None:
    """Registers with their sizes and factors, and an offset, whose sum is the address; of a copy the source, or the
    target in shared memory."""
    text = next((t for t in operands[::-1] if "[" in t and not t.startswith("c[")), "")
    if base == "LDGSTS":
        text = operands[0] if shared else next((t for t in operands if t.startswith("desc")), operands[1])
    match = _ADDRESS.search(text)
    if match is None:
        return None
    register, wide, factor, uniform, offset = match.groups()
    size = 8 if wide == ".64" or (register and "desc" in text) else 4
    parts = ((register, size, int(factor or 1)), (uniform, 4 if shared else 8, 1))
    return tuple(part for part in parts if part[0] and part[0] != "RZ"), int(offset or "0", 16)


def address_of(instruction: Instruction, thread: Thread, shared: bool = False) -> int | None:
    """The address of an access to global memory, or to shared memory; None where it is not known."""
    parts = _parts_of_address(instruction.base, instruction.operands, shared)
    if parts is None:
        return None
    values = [None if (v := thread.read(name, size)) is None else v * by for name, size, by in parts[0]]
    return None if None in values else sum(v for v in values if v is not None) + parts[1]


def trace(
    kernel: Kernel, constants: bytes, block: tuple[int, int, int], thread_index: int, most: int | None = None
) -> Trace:
    """The way of one thread of one block.

    Args:
        constants: bank 0 with the parameters in place.
        most: after so many instructions loops are left, which are alike by then, and after twice as many it ends;
            None: at the thread's end.

    Raises:
        NotUnderstood: an instruction that changes the way is not known, or the way does not end.
    """
    thread, made = first_thread(kernel, constants, block, thread_index), Trace()
    code, at = kernel.code, 0
    while most is None or len(made.path) < 2 * most:
        if len(made.path) > MOST:
            raise NotUnderstood(f"{kernel.entry.name}: more than {MOST} instructions, last at {code[at].at:#x}")
        instruction = code[at]
        made.path.append(at)
        if instruction.base not in ENDS:
            execute(instruction, thread, len(made.path) - 1, made)
            at += 1
            continue
        following = after(kernel, instruction, thread, made, most)
        if following is None:
            return made
        at = following
    return made


def first_thread(kernel: Kernel, constants: bytes, block: tuple[int, int, int], index: int) -> Thread:
    """A thread of a block, before its first instruction."""
    names = "XYZ"
    special = {f"SR_CTAID.{names[i]}": block[i] for i in range(3)}
    special |= {"SR_TID.X": index, "SR_TID.Y": 0, "SR_TID.Z": 0, "SR_LANEID": index % 32}
    special |= {"SR_CgaCtaId": 0, "SR_SWINHI": 0, "SR_SWINLO": 0, "SR_VIRTUALSMID": 0}
    return Thread(constants, special, kernel.entry.literals)


def guard_of(instruction: Instruction, thread: Thread) -> bool | None:
    """Whether an instruction runs."""
    name, negated = instruction.guard
    return thread.predicate(("!" if negated else "") + name) if name else True


def after(kernel: Kernel, instruction: Instruction, thread: Thread, made: Trace, most: int | None) -> int | None:
    """The index of the instruction behind one of :data:`ENDS`, which is the last of the path; None: it ends."""
    taken, target = _branch(kernel, instruction, thread, guard_of(instruction, thread), made)
    if most is not None and len(made.path) > most and instruction.guard[0] and (target or 0) > 0:
        taken = taken and target > instruction.at
    if not taken:
        made.skipped.add(len(made.path) - 1)
        return made.path[-1] + 1
    return None if target is None else kernel.index[target]


def execute(instruction: Instruction, thread: Thread, position: int, made: Trace) -> bool | None:
    """One instruction but for :data:`ENDS`, at a position of the path. Returns whether it runs."""
    runs = guard_of(instruction, thread)
    if runs is False:
        made.skipped.add(position)
        if instruction.kind in ("load", "store"):
            made.accesses.append((position, ABSENT))
        if instruction.base in _BANKS:
            made.shared.append((position, ABSENT))
    elif instruction.kind in ("load", "store"):
        address = address_of(instruction, thread)
        if instruction.base == "LDGSTS":
            made.shared.append((position, address_of(instruction, thread, shared=True)))
            last = instruction.operands[-1]  # a predicate there: zeros instead
            if IS_PREDICATE.fullmatch(last) and thread.predicate(last) is False:
                address = ABSENT
        made.accesses.append((position, address))
        for register in instruction.writes:
            thread.values[register] = None
    elif instruction.base == "SYNCS" and "TRYWAIT" in instruction.modifiers:
        for text in instruction.operands[:1]:
            thread.predicates[text] = True  # the barrier has been passed
    elif instruction.base in LOCAL:
        _spill(instruction, thread)
    else:
        if instruction.base in _BANKS and instruction.operands[0] != "RZ":
            made.shared.append((position, address_of(instruction, thread, shared=True)))
        if instruction.base == "UTCHMMA" or instruction.base.startswith("UTC"):
            _describe(instruction, thread, position, made)
        if runs is None:
            forget(instruction, thread)
        else:
            step(instruction, thread)
    return runs


def _spill(instruction: Instruction, thread: Thread) -> None:
    """Registers to local memory, or back."""
    address = address_of(instruction, thread)
    if instruction.base == "STL":
        registers = instruction.reads[1:] or ("RZ",) * (instruction.width // 4)
        if address is not None:
            thread.local |= {address + 4 * i: thread.read(name) for i, name in enumerate(registers)}
        return
    for i, name in enumerate(instruction.writes):
        thread.values[name] = None if address is None else thread.local.get(address + 4 * i)


def forget(instruction: Instruction, thread: Thread) -> None:
    """Nobody knows whether it runs: its results are unknown."""
    for register in instruction.writes:
        thread.values[register] = None
    for text in instruction.operands[:2]:
        if re.fullmatch(r"U?P\d", text):
            thread.predicates[text] = None


def _describe(instruction: Instruction, thread: Thread, position: int, made: Trace) -> None:
    """The shape of a product of sm_100 stands in a register."""
    match = re.search(r"idesc\[(UR\d+)\]", " ".join(instruction.operands))
    value = thread.read(match[1]) if match else None
    if value is not None:
        made.descriptors.append((position, value))


def _branch(
    kernel: Kernel, instruction: Instruction, thread: Thread, runs: bool | None, made: Trace
) -> tuple[bool, int | None]:
    """Whether it is taken, and to which address; none ends the thread."""
    if instruction.base == "BREAK":
        return False, 0
    if instruction.base in ("BRX", "BRXU"):  # to an address of a table, from the instruction behind
        register, offset = instruction.operands[0].split()
        value = thread.read(register)
        if value is None:
            raise NotUnderstood(f"{kernel.entry.name}: jump to an unknown address at {instruction.at:#x}")
        return bool(runs), instruction.at + 16 + value + int(offset, 16)
    if instruction.base == "JMP":
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
