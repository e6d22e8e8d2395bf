"""Runs one launch of a kernel from its PTX, many blocks at a time, on host memory.

Threads go on together. Of those that stand at different places those run next which others may still follow, so that
branches meet again as soon as they can. A block's barriers, and whatever is `.aligned`, want all of its threads, or a
warp's, there.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import networkx as nx
import numpy as np

from tests.ptx import threads as warps
from tests.ptx.arithmetic import U32, U64, meaning, numpy_type, work
from tests.ptx.memory import UINT, Array, Counts, Fault, Global, Range, Shared
from tests.ptx.parser import Address, Either, Instruction, Module, Operand
from tests.ptx.threads import Reader, Threads, reader

#: Threads that run side by side: NumPy's own cost of a call is small beside so many, and their registers fit a cache.
SIDE_BY_SIDE = 2048
_MOST_STEPS = 200_000  # blocks of instructions in one launch: a loop that never ends
_REDZONE = 16
Step = Callable[[Threads], None]


class Code(NamedTuple):
    """A basic block, ready to run: all but a branch, return or barrier at its end."""

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
        self.gaps, self.static, self.dynamic, at = [], 0, False, 0
        for variable in sorted(self.kernel.shared, key=lambda v: v.size == 0):  # the dynamic one last
            at = -(-at // 16) * 16
            symbols[variable.name] = at
            at += variable.size
            self.dynamic |= variable.size == 0
            if variable.size:
                self.gaps.append((at, -(-at // 16) * 16 + _REDZONE))
                at += _REDZONE
        self.static = at
        self.symbols = symbols | self.kernel.parameter_offsets
        every = [made for block in self.kernel.blocks for made in block.instructions]
        self.cell = min((_narrowest(made) for made in every if "shared" in made.modifiers), default=4)
        self.readers: dict[tuple[Operand, type], Reader] = {}
        self.rank = {block: i for i, block in enumerate(self._order())}
        self.made: dict[int, Code] = {}

    def _order(self) -> list[int]:
        """Blocks such that each comes behind all that lead to it, and a loop's exits behind the whole loop."""
        graph = nx.DiGraph()
        for i, block in enumerate(self.kernel.blocks):
            graph.add_node(i)
            last = block.instructions[-1] if block.instructions else None
            if last is not None and last.opcode == "bra":
                graph.add_edge(i, self.kernel.labels[last.operands[0]])
            falls = last is None or last.opcode not in ("bra", "ret", "exit") or last.guard is not None
            if falls and i + 1 < len(self.kernel.blocks):
                graph.add_edge(i, i + 1)
        return list(_in_order(graph, 0))

    def code(self, block: int) -> Code:
        """Made when threads first come there: many blocks are for rare arguments."""
        if block not in self.made:
            instructions = self.kernel.blocks[block].instructions
            ends = instructions and instructions[-1].opcode in ("bra", "ret", "exit")
            body = instructions[:-1] if ends else instructions
            steps = [(self._step(made), made) for made in body]
            self.made[block] = Code(steps, instructions[-1] if ends else None, Counter(map(work, instructions)))
        return self.made[block]

    def _read(self, operand: Operand, kind: type) -> Reader:
        if (operand, kind) not in self.readers:
            self.readers[operand, kind] = reader(self.kernel, operand, kind, self.symbols)
        return self.readers[operand, kind]

    def _address(self, operand: Operand, kind: type) -> Reader:
        assert isinstance(operand, Address), operand
        base, offset = self._read(operand.base, kind), np.array([operand.offset], np.int64).astype(kind)
        return (lambda s: base(s) + offset) if operand.offset else base

    def _step(self, made: Instruction) -> Step:
        step = self._plain(made)
        return step if made.guard is None else _guarded(step, made.guard, made.negated)

    def _plain(self, made: Instruction) -> Step:
        code, operands, words = made.opcode, made.operands, made.modifiers
        space = next((word for word in words if word in ("global", "shared", "param", "const")), "global")
        if code == "mov" and (tuple in (type(operands[0]), type(operands[1]))):
            return self._pack(made)
        if code == "st" and space == "param":  # libdevice's functions, as float64's sine of more than 2**20 or so
            raise NotImplementedError(f"PTX: calls are not executed: {made.text}")
        if code in ("ld", "st"):
            address = self._address(operands[code == "ld"], U32 if space == "shared" else U64)
            if code == "ld":
                return warps.load(made, address, space)
            kind = warps.unit_of(made)
            return warps.store(made, address, [self._read(o, kind) for o in warps.spread(operands[1])], space)
        if code == "mma":
            kinds = [numpy_type("f32") if i == 3 else U32 for i in range(4)]
            groups = [[self._read(o, kinds[i]) for o in operands[i]] for i in (1, 2, 3)]
            return warps.product(made, groups)
        if code == "ldmatrix":
            return warps.load_matrices(made, self._address(operands[1], U32))
        if code == "shfl":
            return warps.shuffle(made, [self._read(o, U32) for o in operands[1:]])
        if code == "redux":
            return warps.reduce(made, self._read(operands[1], warps.unit_of(made)))
        if code == "cp":
            return self._copy(made)
        if code in ("bar", "barrier"):
            return _barrier(made)
        if (found := meaning(code, words)) is None:
            raise NotImplementedError(f"PTX: {made.text}")
        kinds, _, function = found
        return _compute(function, [self._read(o, k) for o, k in zip(operands[1:], kinds, strict=True)], operands[0])

    def _pack(self, made: Instruction) -> Step:
        """Between one register and the registers that make it up."""
        whole = warps.unit_of(made)
        many, one = (made.operands[i] for i in ((0, 1) if type(made.operands[0]) is tuple else (1, 0)))
        each = UINT[np.dtype(whole).itemsize // len(many)]
        if many is made.operands[0]:
            source = self._read(one, whole)

            def unpack(s: Threads) -> None:
                parts = source(s).view(each).reshape(-1, len(many))
                for i, register in enumerate(many):
                    s.put(register, np.ascontiguousarray(parts[:, i]))

            return unpack
        sources = [self._read(o, each) for o in many]

        def pack(s: Threads) -> None:
            parts = np.broadcast_arrays(*(read(s) for read in sources))
            s.put(one, np.stack(parts, 1).view(UINT[np.dtype(whole).itemsize]).reshape(-1))

        return pack

    def _copy(self, made: Instruction) -> Step:
        if "commit_group" in made.modifiers:

            def commit(s: Threads) -> None:
                s.shared.groups[s.active] += 1

            return commit
        if "wait_group" in made.modifiers or "wait_all" in made.modifiers:
            most = made.operands[0].value if made.operands else None
            return lambda s: s.shared.wait(s.active, most)
        readers = [self._address(made.operands[0], U32), self._address(made.operands[1], U64)]
        return warps.copy(made, readers + [self._read(o, U32) for o in made.operands[3:]])


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


def _narrowest(made: Instruction) -> int:
    return 4 if made.opcode in ("ldmatrix", "cp") else np.dtype(warps.unit_of(made)).itemsize


def _compute(function: Callable[..., Array], readers: Sequence[Reader], destination: Operand) -> Step:
    if isinstance(destination, Either):  # `p|q`: the second is the opposite
        first, second = destination

        def both(s: Threads) -> None:
            result = function(*(read(s) for read in readers))
            s.put(first, result)
            s.put(second, ~result)

        return both
    if len(readers) == 1:
        (one,) = readers
        return lambda s: s.put(destination, function(one(s)))
    if len(readers) == 2:
        a, b = readers
        return lambda s: s.put(destination, function(a(s), b(s)))
    return lambda s: s.put(destination, function(*[read(s) for read in readers]))


def _guarded(step: Step, guard: str, negated: bool) -> Step:
    def run(s: Threads) -> None:
        before, everyone = s.mask, s.everyone
        taken = s.registers[guard]
        mask = before & (~taken if negated else taken)
        if not mask.any():
            return
        s.enter(mask, everyone and bool(mask.all()))
        step(s)
        s.enter(before, everyone)

    return run


def _barrier(made: Instruction) -> Step:
    def of_warp(s: Threads) -> None:
        s.converged("bar.warp.sync")
        s.shared.barrier(s.active, of_warp=True)

    def of_block(s: Threads) -> None:
        there = s.mask.reshape(-1, s.per_block).sum(1)
        if ((there != 0) & (there != s.per_block)).any():
            here = int(there[(there != 0) & (there != s.per_block)][0])
            raise Fault(f"divergent barrier: {here} of {s.per_block} threads of a block are there")
        s.shared.barrier(s.active, of_warp=False)

    return of_warp if "warp" in made.modifiers else of_block


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
    made = program(module, name)
    grid = (*grid, 1, 1)[:3]
    counts = Counts(name, int(np.prod(grid)), threads)
    for found in memory.ranges.values():
        found.begin()
    ranges = Global([*memory.ranges.values(), *made.ranges])
    parameter_bytes = np.frombuffer(parameters, np.uint8)
    shared_size = made.static + (dynamic if made.dynamic else 0)
    at_once = max(1, SIDE_BY_SIDE // threads)
    with np.errstate(all="ignore"):
        for first in range(0, counts.blocks, at_once):
            blocks = np.arange(first, min(first + at_once, counts.blocks))
            shared = Shared(len(blocks), shared_size, made.cell, made.gaps, threads)
            special = _special(blocks, grid, threads)
            _run(made, Threads(made.kernel, blocks, threads, special, parameter_bytes, ranges, shared, counts))
    return counts


def _special(blocks: Array, grid: Sequence[int], threads: int) -> dict[str, Array]:
    lane = np.tile(np.arange(threads, dtype=U32), len(blocks))
    each = np.repeat(blocks, threads)
    values = {"%tid.x": lane, "%laneid": lane & U32(31), "%warpid": lane >> U32(5), "%ntid.x": threads}
    for axis, size in zip("xyz", grid, strict=True):
        values |= {f"%ctaid.{axis}": each % size, f"%nctaid.{axis}": size}
        each = each // size
    for axis in "yz":
        values |= {f"%tid.{axis}": 0, f"%ntid.{axis}": 1}
    return {name: np.atleast_1d(np.asarray(value)).astype(U32) for name, value in values.items()}


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
    mask, staying = s.mask, s.mask & False
    if end is None:
        staying, leaving = mask, staying
    elif end.guard is None:
        leaving = mask
    else:
        taken = s.registers[end.guard]
        leaving = mask & (~taken if end.negated else taken)
        staying = mask & ~leaving
    if leaving.any():
        assert end is not None
        if end.opcode == "bra":
            target = made.kernel.labels[end.operands[0]]
            at_block[target] = at_block[target] | leaving if target in at_block else leaving
        else:
            s.exited = s.exited | leaving
    if staying.any():
        if now + 1 >= len(made.kernel.blocks):
            s.exited = s.exited | staying
        else:
            at_block[now + 1] = at_block[now + 1] | staying if now + 1 in at_block else staying
