"""One row for each compiled kernel: what it takes of a chip, its instructions, and what it is held to."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.predict.tools import ROOT, Missing, program, run

CACHE = ROOT / "build" / "aot"
#: Keys of what kept the rules.
KEPT = Path(__file__).with_name("kept.json")
MAX_REGISTERS = 255  # of one thread
REGISTER_FILE = 65536  # 32-bit registers of one multiprocessor, on each of these chips
#: Shared memory of one multiprocessor, bytes (CUDA C++ programming guide, compute capabilities).
SHARED_OF_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024, 120: 100 * 1024}
SHARED_OF_SYSTEM = 1024  # of each block; the rest is the most that one block may have
WIDE = r"(LDG|STG|LDGSTS)\b.*\.128"


@dataclass(frozen=True)
class Demands:
    """A kernel is held to these beyond the rules for all. Patterns match an instruction from its beginning."""

    blocks: int = 1  # at least, on one multiprocessor
    warps: int = 1  # at least, on one multiprocessor
    most_local: int = 0  # bytes of a thread, where a reason is given for some
    most_shared: int | None = None  # bytes, where less than the chip has
    accesses: tuple[str, ...] = (WIDE,)  # each occurs
    products: tuple[str, ...] = ()  # each occurs: tensor cores, or the exact multiplication
    never: tuple[str, ...] = ()  # none occurs
    only_wide: bool = False  # no access to global memory below 16 bytes


@dataclass(frozen=True)
class Kernel:
    """A row of the table."""

    name: str
    arch: int
    dtype: str
    threads: int
    registers: int
    shared: int
    local: int  # bytes of each thread: spills, and arrays that are indexed at run time
    instructions: dict[str, int]  # of the machine code; matrix instructions of Triton's PTX beside them
    demands: Demands = field(default_factory=Demands)

    @property
    def blocks(self) -> int:
        """How many fit one multiprocessor; registers are handed out by eights to each thread."""
        by_registers = REGISTER_FILE // (-(-self.registers // 8) * 8 * self.threads)
        return min(by_registers, SHARED_OF_SM[self.arch] // (self.shared + SHARED_OF_SYSTEM))

    def has(self, pattern: str) -> bool:
        return any(re.match(pattern, instruction) for instruction in self.instructions)

    def __str__(self) -> str:
        accesses = {op: n for op, n in self.instructions.items() if re.match(r"(LD|ST)(G|L|GSTS)\b", op)}
        return (
            f"sm_{self.arch:<4} {self.name:72} registers {self.registers:4} shared {self.shared:6} "
            f"local {self.local:4} blocks {self.blocks:2} {accesses}"
        )


def machine_code(binary: Path) -> dict[str, Counter[str]]:
    """kernel (mangled) -> how often each instruction occurs in its SASS."""
    sass = cuobjdump(binary, "-sass")
    functions = re.split(r"\n\s*Function : (\S+)\n", sass)[1:]
    return {
        name: Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", body))
        for name, body in zip(functions[::2], functions[1::2], strict=True)
    }


def cuobjdump(binary: Path, *options: str) -> str:
    try:
        tool = program("cuobjdump")
    except Missing as missing:
        pytest.skip(str(missing))
    return run([tool, *options, binary])


def read(row: dict) -> Kernel:
    demands = {name: tuple(value) if isinstance(value, list) else value for name, value in row["demands"].items()}
    return Kernel(**{**row, "demands": Demands(**demands)})
