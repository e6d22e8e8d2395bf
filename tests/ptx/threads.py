"""The state of all threads of some blocks, and instructions by which the threads of a warp work together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tests.ptx.arithmetic import F32, F64, U16, U32, from_bf16, is_type, numpy_type
from tests.ptx.memory import UINT, Array, Counts, Fault, Global, Shared, count_sectors, count_wavefronts
from tests.ptx.parser import Either, Instruction, Kernel, Literal, Operand

#: Reads an operand: one value for each thread, or a single one for all.
Reader = Callable[["Threads"], Array]


class Registers(dict[str, Array]):
    """By name. One that nothing was written to holds NaN, in every type: compiled code may compute with it, as long as
    it selects the result away."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __missing__(self, name: str) -> Array:
        width = self.kernel.width(name)
        return np.full(width, 0xFF, np.uint8).view(UINT[width]) if width else np.zeros(1, bool)


class Threads:
    """Registers are arrays of all threads; `mask` says which of them the present instruction is for."""

    def __init__(
        self, kernel: Kernel, blocks: Array, threads: int, special: dict[str, Array], parameters: Array,
        memory: Global, shared: Shared, counts: Counts,
    ) -> None:  # fmt: skip
        self.kernel, self.counts = kernel, counts
        self.count = len(blocks) * threads
        self.per_block = threads
        self.block = np.repeat(blocks.astype(np.int32) + 1, threads)  # no block is zero
        self.special, self.parameters = special, parameters
        self.memory, self.shared = memory, shared
        self.registers = Registers(kernel)
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
            self._active = np.flatnonzero(self.mask)
        return self._active

    def put(self, register: str, value: Array) -> None:
        if register == "_":
            return
        width = self.kernel.width(register)
        if width:
            if value.itemsize < width:  # signed types extend their sign
                value = value.astype(np.dtype(f"{'i' if value.dtype.kind == 'i' else 'u'}{width}"))
            value = value.view(UINT[width])
        if not self.everyone:
            value = np.where(self.mask, value, self.registers[register])
        self.registers[register] = value

    def put_active(self, register: str, values: Array) -> None:
        """One value for each active thread."""
        if len(values) == self.count:
            self.put(register, values)
            return
        full = np.zeros(self.count, values.dtype)
        full[self.active] = values
        self.put(register, full)

    def whole(self, values: Array) -> Array:
        return np.broadcast_to(values, self.count)

    def converged(self, what: str) -> None:
        """Every warp takes part with all its threads or none."""
        warps = self.mask.reshape(-1, 32)
        if not self.everyone or self.exited.any():
            taking = warps.sum(1)
            if ((taking != 0) & (taking != 32)).any():
                raise Fault(f"divergent {what}: {int(taking[taking % 32 != 0][0])} of 32 threads of a warp are there")


def reader(kernel: Kernel, operand: Operand, kind: type, symbols: dict[str, int]) -> Reader:
    size = np.dtype(kind).itemsize
    if isinstance(operand, Literal):
        if operand.float_bytes:
            bits = np.array([operand.value], UINT[operand.float_bytes])
            fixed = (
                bits.view(kind) if operand.float_bytes == size else bits.view(F32 if size == 8 else F64).astype(kind)
            )
        elif kind is np.bool_:
            fixed = np.array([operand.value != 0])
        else:
            fixed = np.array([operand.value % (1 << 8 * size)], np.uint64).astype(UINT[size]).view(kind)
        return lambda s: fixed
    assert isinstance(operand, str), operand
    if operand in symbols:
        address = np.array([symbols[operand]], np.uint64).astype(UINT[size]).view(kind)
        return lambda s: address
    if operand.split(".")[0] in ("%tid", "%ntid", "%ctaid", "%nctaid", "%laneid", "%warpid"):
        return lambda s: s.special[operand].astype(UINT[size], copy=False).view(kind)
    width = kernel.width(operand)
    if width == size or kind is np.bool_:
        return lambda s: s.registers[operand].view(kind)
    assert width > size, f"{operand} of {width} bytes read as {kind.__name__}"
    return lambda s: s.registers[operand].astype(UINT[size]).view(kind)


# --- Matrix products -----------------------------------------------------------------------------------------------

#: Types of the operands -> from the bits of registers to values.
_ELEMENTS = {
    "f16": lambda x: x.view(np.float16).astype(F64),
    "bf16": lambda x: from_bf16(x).astype(F64),
    "tf32": lambda x: (x & U32(0xFFFFE000)).view(F32).astype(F64),  # the tensor core reads 19 bits
}


def product(made: Instruction, readers: Sequence[Sequence[Reader]]) -> Callable[[Threads], None]:
    """mma.sync of 16 x k by k x 8, fragments as in the PTX ISA (csrc/cuda/common/mma.cuh repeats them); the sum over k
    is exact, and rounded once to float32."""
    shape, types = made.modifiers[2], [word for word in made.modifiers if is_type(word)]
    known = {("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "tf32")}
    if (shape, types[1]) not in known or types[0] != "f32" or types[3] != "f32":
        raise NotImplementedError(f"PTX: {made.text}")
    values, halves = _ELEMENTS[types[1]], 1 if types[1] == "tf32" else 2
    k = 8 * halves

    def run(s: Threads) -> None:
        s.converged("mma.sync")
        a, b, c = ([s.whole(read(s)).reshape(-1, 8, 4) for read in group] for group in readers)
        # warp, columns' part, rows' part, group, member, half -> warp, row, column
        a_bits = np.stack(a, 1).reshape(-1, 2, 2, 8, 4, 1).view(U16 if halves == 2 else U32)
        left = values(a_bits).transpose(0, 2, 3, 1, 4, 5).reshape(-1, 16, k)
        b_bits = np.stack(b, 1).reshape(-1, 2, 8, 4, 1).view(U16 if halves == 2 else U32)
        right = values(b_bits).transpose(0, 1, 3, 4, 2).reshape(-1, k, 8)
        out = (left @ right).reshape(-1, 2, 8, 4, 2).transpose(0, 1, 4, 2, 3)  # warp, rows' part, pair, group, member
        for i, register in enumerate(made.operands[0]):
            d = out[:, i // 2, i % 2] + c[i]
            s.put(register, d.astype(F32).reshape(-1))

    return run


def load_matrices(made: Instruction, address: Reader) -> Callable[[Threads], None]:
    count = int(next(word for word in made.modifiers if word in ("x1", "x2", "x4"))[1:])
    transposed = "trans" in made.modifiers

    def run(s: Threads) -> None:
        s.converged("ldmatrix")
        warps = np.flatnonzero(s.mask.reshape(-1, 32).any(1))
        rows = (warps[:, None] * 32 + np.arange(8 * count)).reshape(-1)
        every = s.whole(address(s))
        count_wavefronts(s.counts, every, 16, s.mask & (np.arange(s.count) % 32 < 8 * count))
        words = s.shared.load(every[rows], 4, 4, rows)
        matrices = words.view(U16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.transpose(0, 1, 3, 2))
        out = np.ascontiguousarray(matrices).view(U32).reshape(-1, count, 32)
        for i, register in enumerate(made.operands[0]):
            s.put_active(register, out[:, i].reshape(-1))

    return run


def shuffle(made: Instruction, readers: Sequence[Reader]) -> Callable[[Threads], None]:
    """shfl.sync d|p, a, b, c, members"""
    mode, destination = made.modifiers[1], made.operands[0]

    def run(s: Threads) -> None:
        value, operand, clamp, members = (s.whole(read(s)) for read in readers)
        lane = np.arange(s.count, dtype=np.int64) & 31
        there = s.mask.reshape(-1, 32)
        active = (there << np.arange(32)).sum(1).repeat(32)
        missing = s.mask & ((members & ~active.astype(U32)) != 0)
        if missing.any():
            raise Fault("divergent shfl.sync: not every thread that its mask names is there")
        segment, most = ((clamp >> U32(8)) & U32(31)).astype(np.int64), (clamp & U32(31)).astype(np.int64)
        highest = (lane & segment) | (most & ~segment)
        by = (operand & U32(31)).astype(np.int64)
        source = {
            "bfly": lane ^ by, "down": lane + by, "up": lane - by, "idx": (lane & segment) | (by & ~segment),
        }[mode]  # fmt: skip
        inside = source >= highest if mode == "up" else source <= highest
        source = np.where(inside, source, lane)
        if (s.mask & ((members >> source.astype(U32)) & U32(1) == 0)).any():
            raise Fault("shfl.sync reads a lane that is not in its mask")
        result = value[(np.arange(s.count) & ~31) + source]
        if isinstance(destination, Either):
            s.put(destination.first, result)
            s.put(destination.second, inside)
        else:
            s.put(destination, result)

    return run


def reduce(made: Instruction, value: Reader) -> Callable[[Threads], None]:
    """redux.sync over whole warps"""
    combine = {
        "max": np.maximum, "min": np.minimum, "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[made.modifiers[1]]  # fmt: skip

    def run(s: Threads) -> None:
        s.converged("redux.sync")
        rows = s.whole(value(s)).reshape(-1, 32)
        s.put(made.operands[0], combine.reduce(rows, axis=1, dtype=rows.dtype).repeat(32))

    return run


# --- Loads and stores ----------------------------------------------------------------------------------------------


def spread(operand: Operand) -> list[Operand]:
    """The operands in braces, or the one without."""
    return list(operand) if type(operand) is tuple else [operand]


def unit_of(made: Instruction) -> type:
    return numpy_type(next(word for word in reversed(made.modifiers) if is_type(word)))


def load(made: Instruction, address: Reader, space: str) -> Callable[[Threads], None]:
    kind = unit_of(made)
    unit, registers = np.dtype(kind).itemsize, spread(made.operands[0])
    size = unit * len(registers)

    def run(s: Threads) -> None:
        threads, every = s.active, s.whole(address(s))
        at = every[threads]
        if space == "param":
            if int(at.max()) + size > len(s.parameters):
                raise Fault(f"reads byte {int(at.max()) + size} of {len(s.parameters)} bytes of parameters")
            words = s.parameters[at.astype(np.int64)[:, None] + np.arange(size)].view(UINT[unit])
        elif space == "shared":
            count_wavefronts(s.counts, every, size, s.mask)
            words = s.shared.load(at, unit, len(registers), threads)
        else:
            count_sectors(s.counts, every, s.mask)
            words = s.memory.load(at, unit, len(registers), s.block[threads])
        for i, register in enumerate(registers):
            s.put_active(register, np.ascontiguousarray(words[:, i]).view(kind))

    return run


def store(made: Instruction, address: Reader, values: Sequence[Reader], space: str) -> Callable[[Threads], None]:
    size = np.dtype(unit_of(made)).itemsize * len(values)

    def run(s: Threads) -> None:
        threads, every = s.active, s.whole(address(s))
        words = np.stack([s.whole(read(s))[threads] for read in values], 1)
        words = words.view(UINT[words.itemsize])
        if space == "shared":
            count_wavefronts(s.counts, every, size, s.mask)
            s.shared.store(every[threads], words, threads)
        else:
            count_sectors(s.counts, every, s.mask)
            s.memory.store(every[threads], words, s.block[threads])

    return run


def copy(made: Instruction, readers: Sequence[Reader]) -> Callable[[Threads], None]:
    """cp.async [shared], [global], bytes{, bytes to read}: the rest is zero."""
    size = made.operands[2].value

    def run(s: Threads) -> None:
        threads, source = s.active, s.whole(readers[1](s))
        words = np.zeros((len(threads), size), np.uint8)
        wanted = s.whole(readers[2](s) if len(readers) > 2 else np.array([size], U32))
        reading = s.mask & (wanted > 0)
        if not np.isin(wanted[threads], (0, size)).all():
            raise NotImplementedError("PTX: cp.async of a part")
        if reading.any():
            count_sectors(s.counts, source, reading)
            unit = min(size, 8)
            got = s.memory.load(source[reading], unit, size // unit, s.block[reading])
            words[reading[threads]] = got.view(np.uint8)
        target = s.whole(readers[0](s))
        count_wavefronts(s.counts, target, size, s.mask)
        s.shared.copy(target[threads], words, threads)

    return run
