"""Results of machine instructions, as far as the way through a kernel depends on them: integers and predicates.

Everything is done modulo 2^32 as the chip does it. A value that came from memory, another thread or floating-point
arithmetic is unknown, None, and so is all that follows from it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from .registers import MASK, Thread, Value, signed
from .sass import IS_PREDICATE, Instruction


def _float_pair(high: str, low: str) -> Value:
    """Two half-precision immediates in one register: how compilers write small constants."""
    try:
        halves = [struct.unpack("<H", struct.pack("<e", float(text)))[0] for text in (low, high)]
    except ValueError:
        return None
    return halves[1] << 16 | halves[0]


def _compare(op: str, a: int, b: int) -> bool:
    return {"LT": a < b, "LE": a <= b, "GT": a > b, "GE": a >= b, "EQ": a == b, "NE": a != b}[op]


def _lut(table: int, values: list[int], bits: int) -> int:
    """A bitwise function of three values by its truth table."""
    a, b, c = values
    whole, found = (1 << bits) - 1, 0
    for row in range(8):
        if table >> row & 1:
            term = whole
            for value, bit in ((a, 4), (b, 2), (c, 1)):
                term &= value if row & bit else ~value
            found |= term
    return found & whole


def _add(instruction: Instruction, thread: Thread) -> None:
    front, (result, *sources), back = instruction.parts
    size = 8 if "64" in instruction.modifiers else 4
    values = [thread.read(text, size) for text in sources]
    values += [_bit(thread, text) for text in back] if "X" in instruction.modifiers else []
    total = _sum(values)
    thread.write(result, total, size)
    for i, text in enumerate(front):
        carry = None if total is None else total >> 8 * size
        thread.predicates[text] = None if carry is None else carry > i


def _bit(thread: Thread, text: str) -> Value:
    value = thread.predicate(text)
    return None if value is None else int(value)


def _sum(values: list[Value]) -> Value:
    return None if any(value is None for value in values) else sum(v for v in values if v is not None)


def _imad(instruction: Instruction, thread: Thread) -> None:
    front, (result, *sources), back = instruction.parts
    modifiers = instruction.modifiers
    wide = modifiers & {"WIDE", "HI"}
    a, b = (thread.read(text) for text in sources[:2])
    c = thread.read(sources[2], 8 if wide else 4) if len(sources) > 2 else 0
    if a == 0 or b == 0:
        a = b = 0
    if a is None or b is None or c is None:
        total: Value = None
    else:
        if wide and "U32" not in modifiers:
            a, b = signed(a & MASK), signed(b & MASK)
        total = a * b + c
        if "X" in modifiers:
            carry = _bit(thread, back[0]) if back else 0
            total = None if carry is None else total + carry
    if total is not None and "HI" in modifiers:
        total >>= 32
    size = 8 if "WIDE" in modifiers else 4
    thread.write(result, total, size)
    for text in front:
        thread.predicates[text] = None if total is None else bool(total >> 8 * size & 1)


def _lea(instruction: Instruction, thread: Thread) -> None:
    front, (result, *sources), back = instruction.parts
    modifiers = instruction.modifiers
    low, base = thread.read(sources[0].lstrip("-")), thread.read(sources[1])
    shift = int(sources[-1], 16) if sources[-1].startswith("0x") else thread.read(sources[-1])
    high: Value = 0
    if "HI" in modifiers:
        upper = None if low is None else MASK * (low >> 31)
        high = upper if "SX32" in modifiers else thread.read(sources[2])
    total: Value = None
    if low is not None and base is not None and high is not None and shift is not None:
        value = (high << 32 | low) << shift
        value = value >> 32 & MASK if "HI" in modifiers else value & MASK
        if sources[0].startswith("-"):
            value = (1 << 32) - value
        carry = _bit(thread, back[0]) if back and "X" in modifiers else 0
        total = None if carry is None else value + base + carry
    thread.write(result, total)
    for text in front:
        thread.predicates[text] = None if total is None else bool(total >> 32)


def _shift(instruction: Instruction, thread: Thread) -> None:
    result, *sources = instruction.operands
    modifiers = instruction.modifiers
    low, amount = thread.read(sources[0]), thread.read(sources[1])
    high = thread.read(sources[2]) if len(sources) > 2 else 0
    wide = bool(modifiers & {"U64", "S64", "HI"})
    if "R" in modifiers and low == 0 and sources[0].endswith("RZ"):
        low = 0
    if low is None or amount is None or high is None:
        return thread.write(result, None)
    value = high << 32 | low
    amount = amount & 63 if "W" in modifiers else min(amount, 64 if wide else 32)
    if "L" in modifiers:
        value <<= amount
        value = value >> 32 if "HI" in modifiers else value
    else:
        bits = 64
        value = (signed(value, bits) if modifiers & {"S32", "S64"} else value) >> amount
        value = value >> 32 if "HI" in modifiers else value
    return thread.write(result, value & MASK)


def _logic(instruction: Instruction, thread: Thread) -> None:
    front, (result, *sources), _ = instruction.parts
    table = int(sources[3], 16)
    values = [thread.read(text) for text in sources[:3]]
    known = [0 if value is None else value & MASK for value in values]
    total: Value = _lut(table, known, 32)
    if any(value is None for value in values):
        flipped = [MASK if value is None else value & MASK for value in values]
        total = total if total == _lut(table, flipped, 32) and values.count(None) == 1 else None
    thread.write(result, total)
    for text in front:
        thread.predicates[text] = None if total is None else total != 0


def _logic_of_predicates(instruction: Instruction, thread: Thread) -> None:
    *operands, first, second = instruction.operands
    sources = operands[-3:]
    values = [thread.predicate(text) for text in sources]
    for text, table in zip(operands[:-3], (first, second), strict=False):
        choices = [[False, True] if value is None else [value] for value in values]
        found = {
            bool(_lut(int(table, 16), [int(a), int(b), int(c)], 1))
            for a in choices[0] for b in choices[1] for c in choices[2]
        }  # fmt: skip
        thread.predicates[text] = found.pop() if len(found) == 1 else None


def _set_predicate(instruction: Instruction, thread: Thread) -> None:
    first, second, a, b, combined, *lower = instruction.operands
    modifiers = instruction.modifiers
    op = next((m for m in ("LT", "LE", "GT", "GE", "EQ", "NE") if m in modifiers), None)
    size = 8 if modifiers & {"U64", "S64"} else 4
    x, y = thread.read(a, size), thread.read(b, size)
    found: bool | None = None
    if x is not None and y is not None and op is not None:
        x, y = x & (1 << 8 * size) - 1, y & (1 << 8 * size) - 1
        if not modifiers & {"U32", "U64"}:
            x, y = signed(x, 8 * size), signed(y, 8 * size)
        if "EX" in modifiers:
            before = thread.predicate(lower[0])
            found = before if x == y else _compare(op, x, y)
        else:
            found = _compare(op, x, y)
    other = thread.predicate(combined)
    for text, value in ((first, found), (second, None if found is None else not found)):
        thread.predicates[text] = _combined(modifiers, value, other)


def _combined(modifiers: frozenset[str], value: bool | None, other: bool | None) -> bool | None:
    if "OR" in modifiers:
        return True if True in (value, other) else None if None in (value, other) else False
    if "XOR" in modifiers:
        return None if value is None or other is None else value != other
    return False if False in (value, other) else None if None in (value, other) else True


def _select(instruction: Instruction, thread: Thread) -> None:
    result, a, b, which = instruction.operands
    size = 8 if "64" in instruction.modifiers else 4
    chosen = thread.predicate(which)
    x, y = thread.read(a, size), thread.read(b, size)
    thread.write(result, (x if x == y else None) if chosen is None else x if chosen else y, size)


def _minimum(instruction: Instruction, thread: Thread) -> None:
    """The minimum of two values, of three, or of a sum and a value; RELU: at least 0."""
    _, (result, *sources), back = instruction.parts
    least = thread.predicate(back[0]) if back else True
    values = [thread.read(text) for text in sources]
    if least is None or None in values:
        return thread.write(result, None)
    known = [value & MASK for value in values if value is not None]
    if "ADD" in instruction.base:
        known = [known[0] + known[1] & MASK, known[2]]
    ordered = sorted(known, key=(lambda v: v) if "U32" in instruction.modifiers else signed)
    found = ordered[0] if least else ordered[-1]
    return thread.write(result, 0 if "RELU" in instruction.modifiers and signed(found) < 0 else found)


def _pack_predicates(instruction: Instruction, thread: Thread) -> None:
    result, _, _, mask = instruction.operands
    values = [thread.predicate(f"P{i}") if int(mask, 16) >> i & 1 else False for i in range(7)]
    packed = None if None in values else sum(int(bool(value)) << i for i, value in enumerate(values))
    thread.write(result, packed)


def _unpack_predicates(instruction: Instruction, thread: Thread) -> None:
    _, source, mask = instruction.operands
    value = thread.read(source)
    for i in range(7):
        if int(mask, 16) >> i & 1:
            thread.predicates[f"P{i}"] = None if value is None else bool(value >> i & 1)


def _move(instruction: Instruction, thread: Thread) -> None:
    size = 8 if "64" in instruction.modifiers else 4
    thread.write(instruction.operands[0], thread.read(instruction.operands[1], size), size)


def _load_constant(instruction: Instruction, thread: Thread) -> None:
    size = {"64": 8, "128": 16}.get(next(iter(instruction.modifiers & {"64", "128"}), ""), 4)
    text = instruction.operands[1]
    if instruction.modifiers & {"U8", "S8", "U16", "S16"}:
        size = 1 if instruction.modifiers & {"U8", "S8"} else 2
        return thread.write(instruction.operands[0], thread.read(text, size))
    return thread.write(instruction.operands[0], thread.read(text, size), max(size, 4))


def _special(instruction: Instruction, thread: Thread) -> None:
    result, source = instruction.operands
    size = 8 if instruction.base == "CS2R" and "32" not in instruction.modifiers else 4
    thread.write(result, 0 if source == "SRZ" else thread.special.get(source), size)


def _extend(instruction: Instruction, thread: Thread) -> None:
    result, source, bits = instruction.operands
    value, count = thread.read(source), thread.read(bits)
    if value is None or count is None:
        return thread.write(result, None)
    value &= (1 << count) - 1
    return thread.write(result, value if "U32" in instruction.modifiers else signed(value, count) & MASK)


def _permute(instruction: Instruction, thread: Thread) -> None:
    result, a, selector, b = instruction.operands
    low, which, high = thread.read(a), thread.read(selector), thread.read(b)
    if low is None or which is None or high is None or len(instruction.modifiers) > 0:
        return thread.write(result, None)
    joined = high << 32 | low
    found = 0
    for i in range(4):
        pick = which >> 4 * i & 15
        byte = joined >> 8 * (pick & 7) & 255
        found |= (255 * (byte >> 7) if pick & 8 else byte) << 8 * i
    return thread.write(result, found)


def _halves(instruction: Instruction, thread: Thread) -> None:
    operands = instruction.operands
    zero = len(operands) == 5 and operands[1].lstrip("-") == "RZ" and operands[2] == "RZ"
    thread.write(operands[0], _float_pair(*operands[3:5]) if zero else None)


def _from_integer(instruction: Instruction, thread: Thread) -> None:
    """Compilers divide by a reciprocal in fp32 and mend the quotient."""
    result, source = instruction.operands[0], instruction.operands[-1]
    wide = bool(instruction.modifiers & {"U64", "S64"})
    value = thread.read(source, 8 if wide else 4)
    if value is None:
        return thread.write(result, None)
    if instruction.modifiers & {"S32", "S64"} or not instruction.modifiers & {"U32", "U64"}:
        value = signed(value & ((1 << 64) - 1 if wide else MASK), 64 if wide else 32)
    rounded = struct.unpack("<I", struct.pack("<f", float(value)))[0]
    if "RP" in instruction.modifiers and struct.unpack("<f", struct.pack("<I", rounded))[0] < value:
        rounded += 1
    return thread.write(result, rounded)


def _to_integer(instruction: Instruction, thread: Thread) -> None:
    value = thread.read(instruction.operands[-1])
    wide = bool(instruction.modifiers & {"U64", "S64"})
    if value is not None:
        (number,) = struct.unpack("<f", struct.pack("<I", value & MASK))
        unsigned = bool(instruction.modifiers & {"U32", "U64"})
        bits = 64 if wide else 32
        least, most = (0, (1 << bits) - 1) if unsigned else (-(1 << bits - 1), (1 << bits - 1) - 1)
        value = 0 if number != number else int(min(max(number, least), most)) & ((1 << bits) - 1)
    thread.write(instruction.operands[0], value, 8 if wide else 4)


def _reciprocal(instruction: Instruction, thread: Thread) -> None:
    value = thread.read(instruction.operands[1])
    if value is None or "RCP" not in instruction.modifiers:
        return thread.write(instruction.operands[0], None)
    (number,) = struct.unpack("<f", struct.pack("<I", value & MASK))
    inverse = 0x7F800000 if number == 0 else struct.unpack("<I", struct.pack("<f", 1 / number))[0]
    return thread.write(instruction.operands[0], inverse)


def _count_bits(instruction: Instruction, thread: Thread) -> None:
    value = thread.read(instruction.operands[-1])
    found: Value = None
    if value is not None:
        value &= MASK
        found = {
            "POPC": value.bit_count(), "UPOPC": value.bit_count(),
            "BREV": int(f"{value:032b}"[::-1], 2), "UBREV": int(f"{value:032b}"[::-1], 2),
        }.get(instruction.base, value.bit_length() - 1 & MASK)  # fmt: skip
        if instruction.base.endswith("FLO") and "SH" in instruction.modifiers:
            found = 31 - (value.bit_length() - 1)
    thread.write(instruction.operands[0], found)


def _absolute(instruction: Instruction, thread: Thread) -> None:
    value = thread.read(instruction.operands[1])
    thread.write(instruction.operands[0], None if value is None else abs(signed(value & MASK)))


def _vote(instruction: Instruction, thread: Thread) -> None:
    """Threads of a warp are taken to agree. Their ballot is not known."""
    front, registers, back = instruction.parts
    *results, source = front + back
    for text in results:
        thread.predicates[text] = thread.predicate(source)
    for text in registers:
        thread.write(text, None)


def _elect(instruction: Instruction, thread: Thread) -> None:
    for text in instruction.operands:
        if IS_PREDICATE.fullmatch(text) and text != "PT":
            thread.predicates[text] = True


ACTIONS: dict[str, Callable[[Instruction, Thread], Any]] = {
    **dict.fromkeys(("IADD3", "VIADD", "IADD", "UIADD3", "UIADD", "UVIADD"), _add),
    **dict.fromkeys(("LEA", "ULEA"), _lea),
    **dict.fromkeys(("SHF", "USHF"), _shift),
    **dict.fromkeys(("LOP3", "ULOP3"), _logic),
    **dict.fromkeys(("PLOP3", "UPLOP3"), _logic_of_predicates),
    **dict.fromkeys(("ISETP", "UISETP"), _set_predicate),
    **dict.fromkeys(("SEL", "USEL"), _select),
    **dict.fromkeys(("IMNMX", "VIMNMX", "VIMNMX3", "VIADDMNMX", "UIMNMX", "UVIMNMX"), _minimum),
    **dict.fromkeys(("MOV", "UMOV", "R2UR"), _move),
    **dict.fromkeys(("LDC", "ULDC", "LDCU"), _load_constant),
    **dict.fromkeys(("S2R", "S2UR", "CS2R", "CS2UR"), _special),
    **dict.fromkeys(("SGXT", "USGXT"), _extend),
    **dict.fromkeys(("PRMT", "UPRMT"), _permute),
    **dict.fromkeys(("I2F", "I2FP", "UI2F", "UI2FP"), _from_integer),
    **dict.fromkeys(("F2I", "UF2I"), _to_integer),
    **dict.fromkeys(("FLO", "UFLO", "POPC", "UPOPC", "BREV", "UBREV"), _count_bits),
    **dict.fromkeys(("IABS", "UIABS"), _absolute),
    "P2R": _pack_predicates, "R2P": _unpack_predicates, "IMAD": _imad, "UIMAD": _imad, "HFMA2": _halves,
    "MUFU": _reciprocal, "ELECT": _elect, "VOTE": _vote, "VOTEU": _vote,
}  # fmt: skip


def step(instruction: Instruction, thread: Thread) -> None:
    """Executes one instruction but for control and memory."""
    action = ACTIONS.get(instruction.base)
    if action is not None:
        action(instruction, thread)
        return
    for text in instruction.operands:  # unknown arithmetic: predicates and registers that it sets
        if not IS_PREDICATE.fullmatch(text):
            break
        thread.predicates[text] = None
    for register in instruction.writes:
        thread.values[register] = None
