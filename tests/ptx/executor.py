"""Runs one launch of a kernel from its PTX, many blocks at a time, on host memory.

Threads go on together. Of those that stand at different places those run next which others may still follow, so that
branches meet again as soon as they can. A block's barriers, and whatever is `.aligned`, want all of its threads, or a
warp's, there.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import networkx as nx
import numpy as np

from tests.ptx import threads as steps
from tests.ptx.arithmetic import meaning, work
from tests.ptx.memory import UINT, Array, Counts, Fault, Global, Layout, Range, Shared
from tests.ptx.parser import Instruction, Module
from tests.ptx.threads import Operands, Step, Threads, unit_of

#: Threads that run side by side: NumPy's own cost of a call is small beside so many, and their registers fit a cache.
SIDE_BY_SIDE = 4096
_MOST_STEPS = 200_000  # blocks of instructions in one launch: a loop that never ends
_REDZONE = 16
#: Instructions that do not compute.
_STEPS = {
    "ld": steps.load, "st": steps.store, "cp": steps.copy, "ldmatrix": steps.load_matrices, "mma": steps.product,
    "movmatrix": steps.transpose, "shfl": steps.shuffle, "redux": steps.reduce, "bar": steps.barrier,
    "barrier": steps.barrier,
}  # fmt: skip


class Code(NamedTuple):
    """A basic block, ready to run: all but a branch or return at its end."""

    steps: list[tuple[Step, Instruction]]
    end: Instruction | None
    classes: Counter[str]


class Program:
    """A kernel whose instructions are functions of :class:`Threads`."""

    def __init__(self, module: Module, name: str) -> None:
        self.kernel = module.kernel(name)
        self.constants = [np.frombuffer(bytearray(v.data or bytes(v.size)), np.uint8) for v in module.variables]
        self.ranges = [
            Range(0x4000 + i, data.ctypes.data, data.nbytes, 1, writable=False)
            for i, data in enumerate(self.constants)
        ]  # fmt: skip
        symbols = {v.name: r.start for v, r in zip(module.variables, self.ranges, strict=True)}
        symbols |= {v.name: v.at for v in self.kernel.parameters.values()}
        self.gaps, self.static, self.dynamic = [], 0, False
        for variable in sorted(self.kernel.shared, key=lambda v: v.size == 0):  # the dynamic one last
            symbols[variable.name] = at = -(-self.static // 16) * 16
            self.static = at + variable.size
            self.dynamic |= variable.size == 0
            if variable.size:
                self.gaps.append((self.static, -(-self.static // 16) * 16 + _REDZONE))
                self.static += _REDZONE
        every = [made for block in self.kernel.blocks for made in block if "shared" in made.modifiers]
        narrow = (4 if made.opcode in ("ldmatrix", "cp") else np.dtype(unit_of(made)).itemsize for made in every)
        self.cell = min(narrow, default=4)
        self.operands = Operands(self.kernel, symbols)
        self.rank = {block: i for i, block in enumerate(self._order())}
        self.made: dict[int, Code] = {}

    def _order(self) -> Iterator[int]:
        """Blocks such that each comes behind all that lead to it, and a loop's exits behind the whole loop."""
        graph = nx.DiGraph()
        for i, block in enumerate(self.kernel.blocks):
            graph.add_node(i)
            last = block[-1] if block else None
            if last is not None and last.opcode == "bra":
                graph.add_edge(i, self.kernel.labels[last.operands[0]])
            falls = last is None or last.opcode not in ("bra", "ret", "exit") or last.guard is not None
            if falls and i + 1 < len(self.kernel.blocks):
                graph.add_edge(i, i + 1)
        return _in_order(graph, 0)

    def code(self, block: int) -> Code:
        """Made when threads first come there: many blocks are for rare arguments."""
        if block not in self.made:
            body = self.kernel.blocks[block]
            end = body[-1] if body and body[-1].opcode in ("bra", "ret", "exit") else None
            made = [(self._step(one), one) for one in body if one is not end]
            self.made[block] = Code(made, end, Counter(map(work, body)))
        return self.made[block]

    def _step(self, made: Instruction) -> Step:
        code, operands, of = made.opcode, made.operands, self.operands
        if code == "mov" and (tuple in (type(operands[0]), type(operands[1]))):
            step = _pack(of, made)
        elif code in _STEPS:
            step = _STEPS[code](of, made)
        else:
            if (found := meaning(code, made.modifiers)) is None:
                raise NotImplementedError(f"PTX: {made.text}")
            kinds, function = found
            step = _compute(function, [of.read(o, k) for o, k in zip(operands[1:], kinds, strict=True)],
                            of.write(operands[0]))  # fmt: skip
        return step if made.guard is None else _guarded(step, made)


def _in_order(graph: nx.DiGraph, entry: int) -> Iterator[int]:
    """Blocks in order: a loop's head first, then the rest of the loop, without the way back, likewise."""
    parts = nx.condensation(graph)
    for part in nx.topological_sort(parts):
        members = parts.nodes[part]["members"]
        if len(members) == 1:
            yield from members
            continue
        entered = [b for b in sorted(members) if b == entry or any(p not in members for p in graph.predecessors(b))]
        loop = graph.subgraph(members).copy()
        loop.remove_edges_from([*loop.in_edges(entered[0])])
        yield from _in_order(loop, entered[0])


def _compute(function: steps.Function, reads: Sequence[steps.Reader], write: steps.Writer) -> Step:
    if len(reads) == 1:
        (one,) = reads
        return lambda s: write(s, function(one(s)))
    if len(reads) == 2:
        a, b = reads
        return lambda s: write(s, function(a(s), b(s)))
    a, b, c, *more = reads
    return lambda s: write(s, function(a(s), b(s), c(s), *[read(s) for read in more]))


def _pack(of: Operands, made: Instruction) -> Step:
    """Between one register and the registers that make it up."""
    whole = unit_of(made)
    many, one = made.operands if type(made.operands[0]) is tuple else made.operands[::-1]
    each = UINT[np.dtype(whole).itemsize // len(many)]
    if many is made.operands[0]:
        source, writers = of.read(one, whole), [of.write(register) for register in many]

        def unpack(s: Threads) -> None:
            parts = np.ascontiguousarray(source(s).view(each).reshape(-1, len(many)).T)
            for write, part in zip(writers, parts, strict=True):
                write(s, part)

        return unpack
    sources, write = [of.read(o, each) for o in many], of.write(one)

    def pack(s: Threads) -> None:
        write(s, np.stack(np.broadcast_arrays(*(read(s) for read in sources)), 1).view(whole).reshape(-1))

    return pack


def _guarded(step: Step, made: Instruction) -> Step:
    def run(s: Threads) -> None:
        before, everyone = s.mask, s.everyone
        mask = _taking(s, made)
        if mask.any():
            s.enter(mask, everyone and bool(mask.all()))
            step(s)
            s.enter(before, everyone)

    return run


def _taking(s: Threads, made: Instruction) -> Array:
    """The present threads that an instruction's guard lets through."""
    if made.guard is None:
        return s.mask
    taken = s.registers[made.guard]
    return s.mask & (~taken if made.negated else taken)


@functools.lru_cache(maxsize=128)  # a family's CUDA kernels are 96 at most; each takes some megabytes
def program(module: Module, name: str) -> Program:
    return Program(module, name)


def launch(
    module: Module, name: str, grid: Sequence[int], threads: int, dynamic: int, parameters: bytes, memory: Global
) -> Counts:
    """Runs all blocks of a launch; `dynamic` bytes of shared memory beside the kernel's own.

    Raises:
        Fault: for what is wrong or undefined on a GPU, with the instruction.
        NotImplementedError: for an instruction that none of our kernels had so far.
    """
    made, grid = program(module, name), (*grid, 1, 1)[:3]
    counts = Counts(name, int(np.prod(grid)), threads)
    for found in memory.ranges.values():
        found.begin()
    ranges, given = Global([*memory.ranges.values(), *made.ranges]), np.frombuffer(parameters, np.uint8)
    shared_size = made.static + (dynamic if made.dynamic else 0)
    at_once = max(1, SIDE_BY_SIDE // threads)
    with np.errstate(all="ignore"):
        for first in range(0, counts.blocks, at_once):
            blocks = np.arange(first, min(first + at_once, counts.blocks))
            shared = Shared(Layout(len(blocks), threads, shared_size, made.cell, tuple(made.gaps)), counts)
            _run(made, Threads(made.kernel, blocks, grid, threads, given, ranges, shared, counts))
    return counts


def _run(made: Program, s: Threads) -> None:
    at_block: dict[int, Array] = {0: s.all}
    classes: Counter[str] = Counter(s.counts.instructions)
    for _ in range(_MOST_STEPS):
        if not at_block:
            s.counts.instructions = dict(classes)
            return
        now = min(at_block, key=made.rank.__getitem__)
        mask = at_block.pop(now)
        s.enter(mask, not at_block)
        code = made.code(now)
        there = int(mask.reshape(-1, 32).any(1).sum())
        for name, count in code.classes.items():
            classes[name] += count * there
        s.counts.lanes += int(mask.sum()) * code.classes.total()
        for step, instruction in code.steps:
            try:
                step(s)
            except Fault as fault:
                raise Fault(f"{made.kernel.name}: {instruction.text}: {fault}") from None
        _leave(made, s, code.end, now, at_block)
    raise Fault(f"{made.kernel.name}: still running after {_MOST_STEPS} blocks of instructions")


def _leave(made: Program, s: Threads, end: Instruction | None, now: int, at_block: dict[int, Array]) -> None:
    """Where the threads of the mask go."""
    leaving = s.mask & False if end is None else _taking(s, end)
    target = made.kernel.labels[end.operands[0]] if end is not None and end.opcode == "bra" else None
    behind = now + 1 if now + 1 < len(made.kernel.blocks) else None
    for block, going in ((target, leaving), (behind, s.mask & ~leaving)):
        if not going.any():
            continue
        if block is None:
            s.exited = s.exited | going
        else:
            at_block[block] = at_block[block] | going if block in at_block else going
