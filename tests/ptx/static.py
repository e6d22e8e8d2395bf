"""Predictions' counts of machine code, beside the executor's counts of the same launches."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.predict import elf
from benchmarks.predict.chips import CHIPS
from benchmarks.predict.compiled import Compiled, bank
from benchmarks.predict.executed import kernel_of, source
from benchmarks.predict.profile import profiled
from benchmarks.predict.record import Array
from benchmarks.predict.tools import program, run
from tests.ptx.memory import Counts

CHIP = CHIPS["a100"]  # the executor runs sm_80
_THREADS, _INSTRUCTIONS = 256, 16384  # of a launch that is compared: the way of every thread is followed
_LONG, _BLOCKS = 1 << 19, 24  # instructions of warps, from which so many blocks stand for all of a launch


@dataclass(frozen=True)
class Executed:
    """A launch that was executed: `ptx` is None for a CUDA kernel, whose machine code predictions have."""

    counts: Counts
    ptx: str | None
    name: str
    grid: Sequence[int]
    shared: int  # bytes beside the kernel's own
    parameters: bytes
    ranges: Sequence[tuple[int, int]]  # address, bytes

    @property
    def rank(self) -> tuple[int, int]:
        """A launch of higher rank says more: of those whose warps go one way, which predictions follow, in most of the
        instructions, by hundredths (data may part them: phases of a thousand turns), the longest of few threads that is
        not too long, else one with fewest."""
        counts, instructions = self.counts, sum(self.counts.instructions.values())
        threads = counts.blocks * counts.threads
        few = threads <= _THREADS and instructions <= _INSTRUCTIONS
        return 100 * counts.lanes // (32 * instructions), instructions if few else -threads


@dataclass
class Largest:
    """The launch to compare for each kernel that was executed in bfloat16."""

    kept: dict[str, Executed] = field(default_factory=dict)

    def add(self, one: Executed) -> None:
        name = one.counts.kernel
        if "bfloat16" not in name:
            return
        name = kernel_of(name) if one.ptx is None else name.split()[0]
        if name not in self.kept or one.rank > self.kept[name].rank:
            self.kept[name] = one

    def compared(self) -> list[dict[str, Any]]:
        return [{"kernel": name, "source": source(name), "compared": compared(one)} for name, one in self.kept.items()]


def compared(one: Executed) -> dict[str, Any]:
    """Counts by name: (in machine code, executed); and how many branches data decide."""
    if one.ptx is None:
        cubin, entry = elf.cuda_entry(one.name, CHIP.arch)
    else:
        cubin = _assembled(one.ptx)
        entry = next(entry for entry in elf.entries(cubin) if entry.name == one.name)
    values = [one.parameters[at : at + size].ljust(size, b"\0") for at, size in entry.parameters]
    x, y, z = (*one.grid, 1, 1)[:3]
    counts = one.counts
    constants = bank(entry, values, (counts.threads, 1, 1), (x, y, z), CHIP.arch)
    made = Compiled(cubin, entry, constants, (x, y, z), counts.threads, one.shared + entry.shared)
    tensors = [Array(torch.uint8, (size,), (1,), at, size) for at, size in one.ranges]
    executed = counts.instructions
    step = -(-made.blocks // _BLOCKS) if sum(executed.values()) >= _LONG else 1
    found = profiled(made, tensors, CHIP, step=step)
    warps = found.blocks * found.warps
    return {
        "tensor": (found.counts["tensor"] * warps, executed.get("tensor", 0)),
        "floating point": ((found.counts["fp32"] + found.counts["fp64"]) * warps, executed.get("FMA", 0)),
        "requests": (found.requests * warps, counts.requests),
        "sectors": (found.asked * warps, counts.sectors),
        "passes": (found.passes * warps, counts.wavefronts),
        "all": (found.instructions * warps, sum(executed.values())),
        "guessed": found.guessed * step,
    }


@functools.lru_cache
def _assembled(ptx: str) -> bytes:
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source, tempfile.NamedTemporaryFile() as made:
        source.write(ptx)
        source.flush()
        run([program("ptxas"), f"--gpu-name=sm_{CHIP.arch}", source.name, "-o", made.name])
        return made.read()
