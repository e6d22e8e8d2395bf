"""Global and shared memory that check every access: bounds, alignment, values that nobody wrote, and races."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
#: Addresses hold the number of their range above the 47 bits of a host address, so that none reaches another's.
TAG_BITS = 48
POINTER = (1 << TAG_BITS) - 1
#: Every two bytes of memory that nobody has written: a NaN in each type that no arithmetic makes.
POISON = 0xFFA5
UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_MANY = -1


class Fault(AssertionError):
    """A step that a GPU would have done wrong, or undefined."""


@dataclass
class Counts:
    """The counts of one launch.

    Attributes:
        instructions: executed by warps, of each class of instructions; `lanes` by threads, 32 times as many if none
            waits for others of its warp.
        sectors: pieces of 32 bytes that `requests` (loads and stores of global memory, by warps) touched.
        wavefronts: passes over the banks of shared memory that `shared_requests` took; `conflict_free` is the least.
    """

    kernel: str
    blocks: int
    threads: int
    instructions: dict[str, int] = field(default_factory=dict)
    lanes: int = 0
    requests: int = 0
    sectors: int = 0
    shared_requests: int = 0
    wavefronts: int = 0
    conflict_free: int = 0


class Range:
    """Host memory that a kernel may access, and which block of the launch touched what.

    `itemsize` is that of its elements: the grain of all checks.
    """

    def __init__(self, tag: int, pointer: int, size: int, itemsize: int, writable: bool = True) -> None:
        before = pointer % 16
        self.start = (tag << TAG_BITS) + pointer
        self.end = self.start + size
        self.origin = self.start - before
        self.writable = writable
        held = -(-(before + size) // 16) * 16
        self.bytes = np.frombuffer((ctypes.c_uint8 * held).from_address(pointer - before), np.uint8)
        self.grain(itemsize)

    def grain(self, itemsize: int) -> None:
        self.itemsize = itemsize
        self.poison = (
            np.full(max(1, itemsize // 2), POISON, np.uint16).view(UINT[itemsize])[0] if itemsize > 1 else None
        )
        self.begin()

    def begin(self) -> None:
        """Forgets the accesses of the launch before. Zero is no block; pages are made when touched."""
        cells = len(self.bytes) // self.itemsize
        self.writer, self.reader = np.zeros(cells, np.int32), np.zeros(cells, np.int32)

    def view(self, size: int) -> Array:
        return self.bytes.view(UINT[size])

    def cells(self, offsets: Array, size: int) -> Array:
        """Indices of the elements that accesses touch: (accesses, elements)."""
        each = max(1, size // self.itemsize)
        return (offsets // self.itemsize)[:, None] + np.arange(each)

    def read(self, offsets: Array, size: int, blocks: Array) -> None:
        cells, blocks = self.cells(offsets, size), blocks[:, None]
        if self.poison is not None and size >= self.itemsize:
            unwritten = self.view(self.itemsize)[cells] == self.poison
            if unwritten.any():
                raise Fault(f"reads global memory that nobody wrote: {self.where(cells[unwritten][0])}")
        writer = self.writer[cells]
        if ((writer != 0) & (writer != blocks)).any():
            other = writer[(writer != 0) & (writer != blocks)][0]
            raise Fault(f"a block reads what block {other - 1} of the same launch writes")
        reader = self.reader[cells]
        new = np.where((reader == 0) | (reader == blocks), blocks, _MANY)
        self.reader[cells] = new
        shared = self.reader[cells] != new
        if shared.any():
            self.reader[cells[shared]] = _MANY

    def write(self, offsets: Array, size: int, blocks: Array) -> None:
        if not self.writable:
            raise Fault("writes to a constant")
        cells, blocks = self.cells(offsets, size), blocks[:, None]
        for name, before in (("writes", self.writer[cells]), ("reads", self.reader[cells])):
            if ((before != 0) & (before != blocks)).any():
                raise Fault(f"a block writes what another block of the same launch {name}")
        self.writer[cells] = blocks
        if (self.writer[cells] != blocks).any():
            raise Fault("a block writes what another block of the same launch writes")

    def where(self, cell: int) -> str:
        return f"element {int(cell) - (self.start - self.origin) // self.itemsize} of range {self.start >> TAG_BITS}"


class Global:
    """Ranges by tag. Addresses come one for each active thread, with the number + 1 of its block."""

    def __init__(self, ranges: list[Range]) -> None:
        self.ranges = {r.start >> TAG_BITS: r for r in ranges}

    def _by_range(self, addresses: Array, size: int) -> list[tuple[Range, Array, Array | slice]]:
        if (addresses & np.uint64(size - 1)).any():
            wrong = int(addresses[(addresses & np.uint64(size - 1)) != 0][0])
            raise Fault(f"misaligned access of {size} bytes at {wrong & POINTER:#x}")
        tags = addresses >> np.uint64(TAG_BITS)
        parts, first = [], int(tags[0])
        for tag in [first] if (tags == tags[0]).all() else np.unique(tags).tolist():
            chosen = slice(None) if tag == first and (tags == tag).all() else tags == tag
            found, of = self.ranges.get(tag), addresses[chosen]
            lowest, highest = int(of.min()), int(of.max()) + size
            if found is None or lowest < found.start or highest > found.end:
                near = f"range {tag} of {found.end - found.start} bytes" if found else "any range"
                off = (lowest, highest)[found is not None and lowest >= found.start]
                at = f"byte {off - found.start}" if found else f"address {off:#x}"
                raise Fault(f"access of {size} bytes out of bounds, to {at} of {near}")
            parts.append((found, (of - np.uint64(found.origin)).astype(np.int64), chosen))
        return parts

    def load(self, addresses: Array, unit: int, count: int, blocks: Array) -> Array:
        """(threads, count) words of `unit` bytes."""
        out = np.empty((len(addresses), count), UINT[unit])
        for found, offsets, chosen in self._by_range(addresses, unit * count):
            found.read(offsets, unit * count, blocks[chosen])
            out[chosen] = found.view(unit)[(offsets // unit)[:, None] + np.arange(count)]
        return out

    def store(self, addresses: Array, words: Array, blocks: Array) -> None:
        count, unit = words.shape[1], words.itemsize
        for found, offsets, chosen in self._by_range(addresses, unit * count):
            found.write(offsets, unit * count, blocks[chosen])
            found.view(unit)[(offsets // unit)[:, None] + np.arange(count)] = words[chosen]


@dataclass
class Copy:
    """Asynchronous copies of one instruction: of which threads, where to, and in which group of each thread's."""

    threads: Array
    cells: Array
    group: Array


class Shared:
    """Shared memory of several blocks, each thread's accesses ordered by barriers alone.

    An access is ordered before another thread's if a barrier of the block, or one of their common warp, lies between.
    A cell is as wide as the kernel's narrowest access. Readers are told apart by warps. Where threads of one warp write
    to one place in one instruction, one of them does, which Triton's reductions count on.
    """

    def __init__(self, blocks: int, size: int, cell: int, gaps: list[tuple[int, int]], threads: int) -> None:
        self.size, self.cell = size, cell
        self.stride = -(-size // 16) * 16
        self.bytes = np.zeros(blocks * self.stride, np.uint8)
        cells = self.stride // cell
        self.base = np.repeat(np.arange(blocks) * self.stride, threads)  # of each thread
        self.written, self.writer, self.read_at, self.reader = np.zeros((4, blocks * cells), np.int32)
        self.pending = np.zeros(blocks * cells, bool)
        self.gap = np.zeros(cells, bool)
        for start, end in gaps:
            self.gap[start // cell : end // cell] = True
        self.now = 1
        lanes = blocks * threads
        #: When the last barrier of each thread's block, or warp, was.
        self.block_barrier, self.warp_barrier = np.ones((2, lanes), np.int32)
        self.groups = np.zeros(lanes, np.int32)  # of copies that each thread committed
        self.copies: list[Copy] = []

    def _cells(self, addresses: Array, size: int, threads: Array) -> tuple[Array, Array]:
        """(bytes of all blocks, cells) of each access."""
        if (addresses & np.uint32(size - 1)).any():
            raise Fault(f"misaligned access of {size} bytes to shared memory")
        if (highest := int(addresses.max()) + size) > self.size:
            raise Fault(f"access of {size} bytes out of bounds: ends at byte {highest} of {self.size} shared bytes")
        at = addresses.astype(np.int64)
        inside = (at // self.cell)[:, None] + np.arange(size // self.cell)
        if self.gap[inside].any():
            raise Fault("access between two variables of shared memory")
        base = self.base[threads]
        cells = inside + (base // self.cell)[:, None]
        if self.pending[cells].any():
            raise Fault("access to shared memory that an asynchronous copy writes and nobody has waited for")
        return base + at, cells

    def _races(self, time: Array, thread: Array, threads: Array) -> Array:
        """Which accesses of other threads, at `time`, no barrier orders before."""
        recent = time >= self.block_barrier[threads][:, None]
        if not recent.any():
            return recent
        mine = threads[:, None]
        ordered = (thread >> 5 == mine >> 5) & (time < self.warp_barrier[threads][:, None])
        return recent & (thread != mine) & ~ordered

    def load(self, addresses: Array, unit: int, count: int, threads: Array) -> Array:
        at, cells = self._cells(addresses, unit * count, threads)
        self.now += 1
        time = self.written[cells]
        if not time.all():
            raise Fault(f"reads shared memory that nobody wrote, at byte {int(addresses[~time.all(1)][0])}")
        races = self._races(time, self.writer[cells], threads)
        if races.any():
            raise Fault(f"race: reads what thread {int(self.writer[cells][races][0])} wrote without a barrier between")
        warps = (threads >> 5)[:, None]
        stale = self.read_at[cells] < self.block_barrier[threads][:, None]
        new = np.where(stale | (self.reader[cells] == warps), warps, _MANY)
        self.reader[cells] = new
        self.read_at[cells] = self.now
        several = self.reader[cells] != new
        if several.any():
            self.reader[cells[several]] = _MANY
        return self.bytes.view(UINT[unit])[(at // unit)[:, None] + np.arange(count)]

    def store(self, addresses: Array, words: Array, threads: Array) -> None:
        unit, count = words.itemsize, words.shape[1]
        at, cells = self._cells(addresses, unit * count, threads)
        self._check_write(cells, threads, (at, words))
        memory, where = self.bytes.view(UINT[unit]), (at // unit)[:, None] + np.arange(count)
        memory[where] = words
        self._wrote(cells, threads)
        stored = memory[where]
        for warp in np.unique(threads[(stored != words).any(1)] >> 5):
            mine = threads >> 5 == warp
            memory[where[mine]] = words[mine]
            if (memory[where[mine]] != stored[mine]).any():
                raise Fault("race: two warps write different values to the same shared memory at once")

    def _check_write(self, cells: Array, threads: Array, same: tuple[Array, Array] | None = None) -> None:
        """Two threads may write the same value to the same place."""
        races = self._races(self.written[cells], self.writer[cells], threads).any(1)
        if races.any() and same is not None:
            at, words = same
            where = (at // words.itemsize)[:, None] + np.arange(words.shape[1])
            races &= (self.bytes.view(words.dtype)[where] != words).any(1)
        if races.any():
            raise Fault("race: writes what another thread wrote without a barrier between")
        read = self.read_at[cells] >= self.block_barrier[threads][:, None]
        if (read & (self.reader[cells] != (threads >> 5)[:, None])).any():
            raise Fault("race: writes what another warp reads without a barrier between")

    def _wrote(self, cells: Array, threads: Array) -> None:
        self.now += 1
        self.written[cells] = self.now
        self.writer[cells] = threads[:, None]

    def copy(self, addresses: Array, words: Array, threads: Array) -> None:
        """Begins an asynchronous copy."""
        at, cells = self._cells(addresses, words.shape[1], threads)
        self._check_write(cells, threads)
        self.bytes[at[:, None] + np.arange(words.shape[1])] = words
        self.pending[cells] = True
        self.copies.append(Copy(threads, cells, self.groups[threads]))

    def wait(self, threads: Array, most_pending: int | None) -> None:
        """For all but the last groups that each thread committed; None waits for every copy."""
        waiting = np.zeros(len(self.groups), bool)
        waiting[threads] = True
        left = []
        for copy in self.copies:
            done = waiting[copy.threads]
            if most_pending is not None:
                done &= copy.group < self.groups[copy.threads] - most_pending
            self.pending[copy.cells[done]] = False
            self._wrote(copy.cells[done], copy.threads[done])
            if not done.all():
                left.append(Copy(copy.threads[~done], copy.cells[~done], copy.group[~done]))
        self.copies = left

    def barrier(self, threads: Array, of_warp: bool) -> None:
        self.now += 1
        self.warp_barrier[threads] = self.now
        if not of_warp:
            self.block_barrier[threads] = self.now


def count_sectors(counts: Counts, addresses: Array, active: Array) -> None:
    """Counts one load or store of global memory; arrays hold all threads."""
    rows = np.where(active, addresses >> np.uint64(5), np.uint64(2**64 - 1)).reshape(-1, 32)
    rows.sort(axis=1)
    busy = active.reshape(-1, 32).any(1)
    different = (rows[:, 1:] != rows[:, :-1]).sum(1) + 1 - ~active.reshape(-1, 32).all(1)
    counts.requests += int(busy.sum())
    counts.sectors += int(different[busy].sum())


def count_wavefronts(counts: Counts, addresses: Array, size: int, active: Array) -> None:
    """Counts one access to shared memory: words of 8 and 16 bytes go by halves and quarters of a warp."""
    lanes, words = min(32, 128 // size), max(1, size // 4)
    first = np.where(active, addresses.astype(np.int64) // 4, -1).reshape(-1, lanes)
    every = np.where(first[..., None] < 0, -1, first[..., None] + np.arange(words)).reshape(len(first), -1)
    every.sort(axis=1)
    new = every >= 0
    new[:, 1:] &= every[:, 1:] != every[:, :-1]
    row, column = np.nonzero(new)
    banks = np.bincount(row * 32 + every[row, column] % 32, minlength=32 * len(every)).reshape(-1, 32).max(1)
    counts.shared_requests += int(active.reshape(-1, 32).any(1).sum())
    counts.wavefronts += int(banks.sum())
    counts.conflict_free += int((banks > 0).sum())
