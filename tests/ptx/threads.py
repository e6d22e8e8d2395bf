"""The state of all threads of some blocks, and instructions by which they touch memory or work together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from tests.ptx.arithmetic import F32, F64, U16, U32, U64, from_bf16, numpy_type
from tests.ptx.memory import UINT, Array, Counts, Fault, Global, Shared, count_sectors
from tests.ptx.parser import Address, Either, Instruction, Kernel, Literal, Operand


class Registers(dict[str, Array]):
    """By name: of each thread, or one value for all. One that nothing was written to holds NaN, in every type: compiled
    code may compute with it, as long as it selects the result away."""

    def __init__(self, kernel: Kernel, values: dict[str, Array]) -> None:
        super().__init__(values)
        self.kernel = kernel

    def __missing__(self, name: str) -> Array:
        width = self.kernel.width(name)
        return np.full(width, 0xFF, np.uint8).view(UINT[width]) if width else np.zeros(1, bool)


class Threads:
    """Registers of all threads; `mask` says which of them the present instruction is for."""

    def __init__(
        self, kernel: Kernel, blocks: Array, grid: Sequence[int], threads: int, parameters: Array, memory: Global,
        shared: Shared, counts: Counts,
    ) -> None:  # fmt: skip
        self.counts, self.parameters, self.memory, self.shared = counts, parameters, memory, shared
        self.count, self.per_block = len(blocks) * threads, threads
        each = np.repeat(blocks, threads)
        self.block = each.astype(np.int32) + 1  # no block is zero
        thread = np.tile(np.arange(threads, dtype=U32), len(blocks))
        special = {"%tid.x": thread, "%laneid": thread & U32(31), "%warpid": thread >> U32(5), "%ntid.x": threads}
        special |= {f"%{name}.{axis}": size for axis in "yz" for name, size in (("tid", 0), ("ntid", 1))}
        for axis, size in zip("xyz", grid, strict=True):
            special |= {f"%ctaid.{axis}": each % size, f"%nctaid.{axis}": size}
            each = each // size
        values = {name: np.atleast_1d(np.asarray(value)).astype(U32) for name, value in special.items()}
        self.registers = Registers(kernel, values)
        self.number = np.arange(self.count)
        self.all = np.ones(self.count, bool)
        self.exited = ~self.all
        self.enter(self.all, True)

    def enter(self, mask: Array, everyone: bool) -> None:
        """`everyone`: no other thread's registers are in use."""
        self.mask, self.everyone = mask, everyone
        self._active: Array | None = None

    @property
    def active(self) -> Array:
        """Numbers of the threads in the mask."""
        if self._active is None:
            self._active = self.number if self.mask.all() else np.flatnonzero(self.mask)
        return self._active

    def of_active(self, values: Array) -> Array:
        """One value for each active thread."""
        if len(values) == 1:
            return values.repeat(len(self.active))
        return values if len(self.active) == self.count else values[self.active]

    def of_all(self, values: Array) -> Array:
        """The other way round; a single value stays one."""
        if len(values) in (1, self.count):
            return values
        full = np.zeros(self.count, values.dtype)
        full[self.active] = values
        return full

    def warps(self, values: Array) -> Array:
        return (values if len(values) == self.count else values.repeat(self.count)).reshape(-1, 32)

    def converged(self, what: str) -> None:
        """Every warp takes part with all its threads or none."""
        if not self.everyone or self.exited.any():
            taking = self.warps(self.mask).sum(1)
            if (taking % 32).any():
                raise Fault(f"divergent {what}: {int(taking[taking % 32 != 0][0])} of 32 threads of a warp are there")


#: Reads an operand (one value for each thread, or a single one for all), writes one, and is an instruction.
Reader = Callable[[Threads], Array]
Writer = Callable[[Threads, Array], None]
Step = Callable[[Threads], None]
Function = Callable[..., Array]


class Operands:
    """Operands of a kernel's instructions as functions of :class:`Threads`."""

    def __init__(self, kernel: Kernel, symbols: dict[str, int]) -> None:
        self.kernel, self.symbols = kernel, symbols
        self.read = functools.lru_cache(maxsize=None)(self._read)

    def _read(self, operand: Operand, kind: type) -> Reader:
        size = np.dtype(kind).itemsize
        if isinstance(operand, Literal) and operand.float_bytes:
            bits = np.array([operand.value], UINT[operand.float_bytes])
            same = operand.float_bytes == size
            fixed = bits.view(kind) if same else bits.view(F32 if size == 8 else F64).astype(kind)
            return lambda s: fixed
        if isinstance(operand, Literal) or operand in self.symbols:
            value = operand.value if isinstance(operand, Literal) else self.symbols[operand]
            number = np.array([value % (1 << 8 * size)], UINT[size]).view(kind)
            return lambda s: number
        assert isinstance(operand, str), operand
        width = self.kernel.width(operand)
        if width == size or kind is np.bool_:
            return lambda s: s.registers[operand].view(kind)
        assert width > size, f"{operand} of {width} bytes read as {kind.__name__}"
        return lambda s: s.registers[operand].view(UINT[width]).astype(UINT[size]).view(kind)

    def address(self, operand: Operand, kind: type) -> Reader:
        assert isinstance(operand, Address), operand
        base, offset = self.read(operand.base, kind), np.array([operand.offset], np.int64).astype(kind)
        return (lambda s: base(s) + offset) if operand.offset else base

    def write(self, register: Operand) -> Writer:
        if register == "_":
            return lambda s, value: None
        if isinstance(register, Either):  # `p|q`: the second is the opposite
            first, second = map(self.write, register)
            return lambda s, value: (first(s, value), second(s, ~value))
        width = self.kernel.width(register)
        bits, signed = UINT.get(width, np.bool_), np.dtype(f"i{width or 1}")

        def write(s: Threads, value: Array) -> None:
            if value.itemsize < width:  # signed types extend their sign
                value = value.astype(signed if value.dtype.kind == "i" else bits)
            if not s.everyone:
                value = np.where(s.mask, value.view(bits), s.registers[register].view(bits))
            s.registers[register] = value

        return write


def unit_of(made: Instruction) -> type:
    return numpy_type(next(word for word in reversed(made.modifiers) if numpy_type(word)))


def _spread(operand: Operand) -> Sequence[Operand]:
    """The operands in braces, or the one without."""
    return operand if type(operand) is tuple else [operand]


# --- Loads and stores ----------------------------------------------------------------------------------------------


def _space(made: Instruction) -> tuple[str, type]:
    """The memory space, and the type of its addresses."""
    space = next((word for word in made.modifiers if word in ("shared", "param")), "global")
    return space, U64 if space == "global" else U32


def load(of: Operands, made: Instruction) -> Step:
    (space, pointer), kind = _space(made), unit_of(made)
    address, unit = of.address(made.operands[1], pointer), np.dtype(kind).itemsize
    writers = [of.write(register) for register in _spread(made.operands[0])]
    count = len(writers)

    def run(s: Threads) -> None:
        every = address(s)
        if space == "param":
            at = every if len(every) == 1 else s.of_active(every)
            if (end := int(at.max()) + unit * count) > len(s.parameters):
                raise Fault(f"reads byte {end} of {len(s.parameters)} bytes of parameters")
            words = s.parameters[at.astype(np.int64)[:, None] + np.arange(unit * count)].view(UINT[unit])
        elif space == "shared":
            words = s.shared.load(s.shared.place(every, s.mask, unit * count), unit, count, s.active)
        else:
            count_sectors(s.counts, every, s.mask)
            words = s.memory.load(s.of_active(every), unit, count, s.of_active(s.block))
        for write, word in zip(writers, np.ascontiguousarray(words.T).view(kind), strict=True):
            write(s, s.of_all(word))

    return run


def store(of: Operands, made: Instruction) -> Step:
    (space, pointer), kind = _space(made), unit_of(made)
    if space == "param":  # libdevice's functions, as float64's sine of more than 2**20 or so
        raise NotImplementedError(f"PTX: calls are not executed: {made.text}")
    address, readers = of.address(made.operands[0], pointer), [of.read(o, kind) for o in _spread(made.operands[1])]
    size = np.dtype(kind).itemsize * len(readers)

    def run(s: Threads) -> None:
        every, words = address(s), np.stack([s.of_active(read(s)) for read in readers], 1)
        words = words.view(UINT[words.itemsize])
        if space == "shared":
            s.shared.store(s.shared.place(every, s.mask, size), words, s.active)
        else:
            count_sectors(s.counts, every, s.mask)
            s.memory.store(s.of_active(every), words, s.of_active(s.block))

    return run


def copy(of: Operands, made: Instruction) -> Step:
    """cp.async [shared], [global], bytes{, bytes to read}: the rest is zero; and its groups."""
    if "commit_group" in made.modifiers:
        return lambda s: s.shared.commit(s.active)
    if "wait_group" in made.modifiers or "wait_all" in made.modifiers:
        most = made.operands[0].value if made.operands else None
        return lambda s: s.shared.wait(s.active, most)
    to, source = of.address(made.operands[0], U32), of.address(made.operands[1], U64)
    size, wanted = made.operands[2].value, of.read(made.operands[-1], U32)  # of three, all
    unit = min(size, 8)

    def run(s: Threads) -> None:
        at, bytes_read, words = source(s), wanted(s), np.zeros((len(s.active), size), np.uint8)
        reading = s.mask & (bytes_read > 0)
        if (reading & (bytes_read != size)).any():
            raise NotImplementedError("PTX: cp.async of a part")
        if reading.any():
            count_sectors(s.counts, at, reading)
            got = s.memory.load(s.warps(at).reshape(-1)[reading], unit, size // unit, s.block[reading])
            words[reading[s.active]] = got.view(np.uint8)
        s.shared.copy(s.shared.place(to(s), s.mask, size), words, s.active)

    return run


def load_matrices(of: Operands, made: Instruction) -> Step:
    count, address = int(made.modifiers[3][1:]), of.address(made.operands[1], U32)
    writers = [of.write(register) for register in made.operands[0]]

    def run(s: Threads) -> None:
        s.converged("ldmatrix")
        naming = s.mask & (s.number % 32 < 8 * count)
        place = s.shared.place(address(s), naming, 16)
        matrices = s.shared.load(place, 4, 4, np.flatnonzero(naming)).view(U16).reshape(-1, count, 8, 8)
        if "trans" in made.modifiers:
            matrices = matrices.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(matrices.swapaxes(0, 1)).view(U32).reshape(count, -1)
        for write, word in zip(writers, words, strict=True):
            write(s, s.of_all(word))

    return run


# --- Warps ---------------------------------------------------------------------------------------------------------

#: Types of the operands -> from the bits of registers to values.
_ELEMENTS = {
    "f16": lambda x: x.view(np.float16).astype(F64),
    "bf16": lambda x: from_bf16(x).astype(F64),
    "tf32": lambda x: (x & U32(0xFFFFE000)).view(F32).astype(F64),  # the tensor core reads 19 bits
}


def product(of: Operands, made: Instruction) -> Step:
    """mma.sync of 16 x k by k x 8, fragments as in the PTX ISA (csrc/cuda/common/mma.cuh repeats them); the sum over k
    is exact, and rounded once to float32."""
    shape, types = made.modifiers[2], [word for word in made.modifiers if numpy_type(word)]
    known = {("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "tf32")}
    if (shape, types[1]) not in known or types[0] != "f32" or types[3] != "f32":
        raise NotImplementedError(f"PTX: {made.text}")
    values, halves = _ELEMENTS[types[1]], 1 if types[1] == "tf32" else 2
    k, bits = 8 * halves, U16 if types[1] != "tf32" else U32
    reads = [[of.read(o, F32 if i == 3 else U32) for o in made.operands[i]] for i in (1, 2, 3)]
    writers = [of.write(register) for register in made.operands[0]]

    def run(s: Threads) -> None:
        s.converged("mma.sync")
        a, b, c = ([s.warps(read(s)).reshape(-1, 8, 4) for read in group] for group in reads)
        # warp, columns' part, rows' part, group, member, half -> warp, row, column
        a_bits = np.stack(a, 1).reshape(-1, 2, 2, 8, 4, 1).view(bits)
        left = values(a_bits).transpose(0, 2, 3, 1, 4, 5).reshape(-1, 16, k)
        b_bits = np.stack(b, 1).reshape(-1, 2, 8, 4, 1).view(bits)
        right = values(b_bits).transpose(0, 1, 3, 4, 2).reshape(-1, k, 8)
        out = (left @ right).reshape(-1, 2, 8, 4, 2).transpose(0, 1, 4, 2, 3)  # warp, rows' part, pair, group, member
        for i, write in enumerate(writers):
            write(s, (out[:, i // 2, i % 2] + c[i]).astype(F32).reshape(-1))

    return run


#: The lane that is read, from lane, operand and the bits of a segment.
_SHUFFLES = {
    "bfly": lambda lane, by, segment: lane ^ by, "down": lambda lane, by, segment: lane + by,
    "up": lambda lane, by, segment: lane - by, "idx": lambda lane, by, segment: (lane & segment) | (by & ~segment),
}  # fmt: skip


def shuffle(of: Operands, made: Instruction) -> Step:
    """shfl.sync d|p, a, b, c, members"""
    mode, reads = made.modifiers[1], [of.read(o, U32) for o in made.operands[1:]]
    results = made.operands[0] if isinstance(made.operands[0], Either) else (made.operands[0], "_")
    write, write_inside = map(of.write, results)

    def run(s: Threads) -> None:
        value, (by, clamp, members) = s.warps(reads[0](s)), (read(s).astype(np.int64) for read in reads[1:])
        lane, by = s.number & 31, by & 31
        there = (s.warps(s.mask) << np.arange(32)).sum(1).repeat(32)
        if (s.mask & (members & ~there != 0)).any():
            raise Fault("divergent shfl.sync: not every thread that its mask names is there")
        segment, most = (clamp >> 8) & 31, clamp & 31
        highest, source = (lane & segment) | (most & ~segment), _SHUFFLES[mode](lane, by, segment)
        inside = source >= highest if mode == "up" else source <= highest
        source = np.where(inside, source, lane)
        if (s.mask & (members >> source & 1 == 0)).any():
            raise Fault("shfl.sync reads a lane that is not in its mask")
        write(s, value.reshape(-1)[(s.number & ~31) + source])
        write_inside(s, inside)

    return run


def transpose(of: Operands, made: Instruction) -> Step:
    """movmatrix.sync.trans of 8 x 8 elements of 16 bits, two in a register"""
    read, write = of.read(made.operands[1], U32), of.write(made.operands[0])

    def run(s: Threads) -> None:
        s.converged("movmatrix")
        rows = np.ascontiguousarray(s.warps(read(s))).view(U16).reshape(-1, 8, 8)
        write(s, np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(-1).view(U32))

    return run


def reduce(of: Operands, made: Instruction) -> Step:
    """redux.sync over whole warps"""
    combine = {"max": np.maximum, "min": np.minimum, "add": np.add}[made.modifiers[1]]
    read, write = of.read(made.operands[1], unit_of(made)), of.write(made.operands[0])

    def run(s: Threads) -> None:
        s.converged("redux.sync")
        rows = s.warps(read(s))
        write(s, combine.reduce(rows, axis=1, dtype=rows.dtype).repeat(32))

    return run


def barrier(of: Operands, made: Instruction) -> Step:
    def of_warp(s: Threads) -> None:
        s.converged("bar.warp.sync")
        s.shared.barrier(s.active, of_warp=True)

    def of_block(s: Threads) -> None:
        there = s.mask.reshape(-1, s.per_block).sum(1)
        if (there % s.per_block).any():
            here = int(there[there % s.per_block != 0][0])
            raise Fault(f"divergent barrier: {here} of {s.per_block} threads of a block are there")
        s.shared.barrier(s.active, of_warp=False)

    return of_warp if "warp" in made.modifiers else of_block
