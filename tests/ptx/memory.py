"""Global and shared memory that check every access: bounds, alignment, values that nobody wrote, and races."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
#: Addresses hold the number of their range above the 47 bits of a host address, so that none reaches another's.
TAG_BITS = 48
POINTER = (1 << TAG_BITS) - 1
#: Every two bytes of memory that nobody has written: a NaN in each type that no arithmetic makes.
POISON = 0xFFA5
UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_WORD = UINT | {16: np.complex128}  # what an access moves at once
_MANY = -1
ABSENT = np.uint32(2**32 - 1)  # in place of the address of a thread that takes no part
#: Reads that are kept until a write comes: threads' accesses of a range, instructions of shared memory.
_LOG, _READS = 1 << 22, 256


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
        self.poison = np.full(4, POISON, np.uint16).view(UINT[itemsize])[0] if itemsize > 1 else None
        self.begin()

    def begin(self) -> None:
        """Forgets the accesses of the launch before. Zero is no block; pages are made when touched."""
        cells = len(self.bytes) // self.itemsize
        self.writer, self.reader = np.zeros(cells, np.int32), np.zeros(cells, np.int32)
        self.written, self.reads, self.logged = False, [], 0

    def cells(self, offsets: Array, size: int) -> Array:
        """Indices of the elements that accesses touch: (accesses, elements)."""
        return (offsets // self.itemsize)[:, None] + np.arange(max(1, size // self.itemsize))

    def load(self, offsets: Array, size: int, blocks: Array) -> Array:
        """A row of `size` bytes for each access."""
        rows = self.bytes.view(_WORD[size])[offsets // size]
        if self.poison is not None and size >= self.itemsize:
            unwritten = rows.view(UINT[self.itemsize]) == self.poison
            if unwritten.any():
                cell = int(self.cells(offsets, size).reshape(-1)[unwritten][0])
                where = (
                    f"element {cell - (self.start - self.origin) // self.itemsize} of range {self.start >> TAG_BITS}"
                )
                raise Fault(f"reads global memory that nobody wrote: {where}")
        if self.written:
            writer = self.writer[self.cells(offsets, size)]
            others = writer[(writer != 0) & (writer != blocks[:, None])]
            if len(others):
                raise Fault(f"a block reads what block {others[0] - 1} of the same launch writes")
        self.reads.append((offsets, size, blocks))
        self.logged += len(offsets)
        if self.logged > _LOG:
            self._look_at_reads()
        return rows

    def _look_at_reads(self) -> None:
        """Notes the readers of each element: not before a write comes, since most memory is only read."""
        for offsets, size, blocks in self.reads:
            cells, blocks = self.cells(offsets, size), blocks[:, None]
            reader = self.reader[cells]
            self.reader[cells] = new = np.where((reader == 0) | (reader == blocks), blocks, _MANY)
            self.reader[cells[self.reader[cells] != new]] = _MANY
        self.reads, self.logged = [], 0

    def store(self, offsets: Array, rows: Array, blocks: Array) -> None:
        if not self.writable:
            raise Fault("writes to a constant")
        self._look_at_reads()
        cells, of = self.cells(offsets, rows.itemsize), blocks[:, None]
        for name, before in (("writes", self.writer), ("reads", self.reader)):
            if (((found := before[cells]) != 0) & (found != of)).any():
                raise Fault(f"a block writes what another block of the same launch {name}")
        self.written, self.writer[cells] = True, of
        if (self.writer[cells] != of).any():
            raise Fault("a block writes what another block of the same launch writes")
        self.bytes.view(rows.dtype)[offsets // rows.itemsize] = rows


class Global:
    """Ranges by tag. Addresses come one for each active thread, with the number + 1 of its block."""

    def __init__(self, ranges: list[Range]) -> None:
        self.ranges = {r.start >> TAG_BITS: r for r in ranges}

    def _by_range(self, addresses: Array, size: int) -> list[tuple[Range, Array, Array | slice]]:
        if (wrong := addresses[(addresses & np.uint64(size - 1)) != 0]).size:
            raise Fault(f"misaligned access of {size} bytes at {int(wrong[0]) & POINTER:#x}")
        tags = addresses >> np.uint64(TAG_BITS)
        parts, one = [], (tags == tags[0]).all()
        for tag in tags[:1].tolist() if one else np.unique(tags).tolist():
            chosen = slice(None) if one else tags == tag
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
        out = np.empty(len(addresses), _WORD[unit * count])
        for found, offsets, chosen in self._by_range(addresses, unit * count):
            out[chosen] = found.load(offsets, unit * count, blocks[chosen])
        return out.view(UINT[unit]).reshape(-1, count)

    def store(self, addresses: Array, words: Array, blocks: Array) -> None:
        size = words.shape[1] * words.itemsize
        rows = words.view(_WORD[size])[:, 0]
        for found, offsets, chosen in self._by_range(addresses, size):
            found.store(offsets, rows[chosen], blocks[chosen])


class Layout(NamedTuple):
    """Shared memory of several blocks of so many threads: `size` bytes each, with `gaps` (start, end) that belong to no
    variable. A cell is as wide as the kernel's narrowest access."""

    blocks: int
    threads: int
    size: int
    cell: int
    gaps: tuple[tuple[int, int], ...]

    @property
    def stride(self) -> int:
        return -(-self.size // 16) * 16


class Place(NamedTuple):
    """Where the accesses of an instruction go: the index of each, by its size, and its cells; whether no two are the
    same; and how warps take it: requests, passes over the banks, and the fewest that could be."""

    at: Array
    cells: Array
    distinct: bool
    requests: int
    wavefronts: int
    conflict_free: int


@functools.lru_cache(maxsize=1024)  # loops ask the same again
def _place(addresses: bytes, size: int, layout: Layout) -> Place:
    every = np.frombuffer(addresses, np.uint32)
    active = every != ABSENT
    there = every[active].astype(np.int64)
    if (there % size).any():
        raise Fault(f"misaligned access of {size} bytes to shared memory")
    if (highest := int(there.max()) + size) > layout.size:
        raise Fault(f"access of {size} bytes out of bounds: ends at byte {highest} of {layout.size} shared bytes")
    cell = layout.cell
    cells = there[:, None] // cell + np.arange(size // cell)
    if any(((cells >= start // cell) & (cells < end // cell)).any() for start, end in layout.gaps):
        raise Fault("access between two variables of shared memory")
    base = np.flatnonzero(active) // layout.threads * layout.stride
    at = (base + there) // size
    distinct = len(np.unique(at)) == len(at)
    return Place(at, cells + base[:, None] // cell, distinct, *_passes(every.reshape(-1, 32), size))


def _passes(addresses: Array, size: int) -> tuple[int, int, int]:
    """(requests, passes over the banks, the least): words of 8 and 16 bytes go by halves and quarters of a warp."""
    lanes, words = min(32, 128 // size), max(1, size // 4)
    first = np.where(addresses != ABSENT, addresses.astype(np.int64) // 4, -1).reshape(-1, lanes)
    every = np.where(first[..., None] < 0, -1, first[..., None] + np.arange(words)).reshape(len(first), -1)
    every.sort(axis=1)
    new = every >= 0
    new[:, 1:] &= every[:, 1:] != every[:, :-1]
    row, column = np.nonzero(new)
    banks = np.bincount(row * 32 + every[row, column] % 32, minlength=32 * len(every)).reshape(-1, 32).max(1)
    return int((addresses != ABSENT).any(1).sum()), int(banks.sum()), int((banks > 0).sum())


class Shared:
    """Shared memory, each thread's accesses ordered by barriers alone.

    An access is ordered before another thread's if a barrier of the block, or one of their common warp, lies between.
    Readers are told apart by warps. Where threads of one warp write to one place in one instruction, one of them does,
    which Triton's reductions count on.
    """

    def __init__(self, layout: Layout, counts: Counts) -> None:
        self.layout, self.counts = layout, counts
        self.bytes = np.zeros(layout.blocks * layout.stride, np.uint8)
        cells, lanes = len(self.bytes) // layout.cell, layout.blocks * layout.threads
        self.written, self.writer, self.read_at, self.reader = np.zeros((4, cells), np.int32)
        self.pending = np.zeros(cells, bool)
        #: Times: now, of the last write, of the last read that is noted, of the last barrier at which all threads met,
        #: and each thread's last barrier of its block and of its warp.
        self.now, self.wrote, self.read, self.met = 1, 0, 0, 1
        self.block_barrier, self.warp_barrier = np.ones((2, lanes), np.int32)
        self.reads: list[tuple[Array, Array, int]] = []  # since then: cells, threads, time
        self.groups = np.zeros(lanes, np.int32)  # of copies that each thread committed
        #: Asynchronous copies of an instruction: of which threads, where to, and in which group of each thread's.
        self.copies: list[tuple[Array, Array, Array]] = []

    def place(self, addresses: Array, mask: Array, size: int) -> Place:
        """The place of an access by the threads of a mask. The access is counted."""
        found = _place(np.where(mask, addresses, ABSENT).tobytes(), size, self.layout)
        self.counts.shared_requests += found.requests
        self.counts.wavefronts += found.wavefronts
        self.counts.conflict_free += found.conflict_free
        if self.copies and self.pending.take(found.cells).any():
            raise Fault("access to shared memory that an asynchronous copy writes and nobody has waited for")
        return found

    def _races(self, cells: Array, threads: Array) -> Array:
        """Cells among these that other threads wrote, with no barrier between."""
        if self.wrote < self.met:
            return np.zeros((1, 1), bool)
        time, writer, mine = self.written.take(cells), self.writer.take(cells), threads[:, None]
        ordered = (writer >> 5 == mine >> 5) & (time < self.warp_barrier[threads][:, None])
        return (time >= self.block_barrier[threads][:, None]) & (writer != mine) & ~ordered

    def load(self, place: Place, unit: int, count: int, threads: Array) -> Array:
        at, cells = place.at, place.cells
        self.now += 1
        if not (written := self.written.take(cells)).all():
            byte = int(at[~written.all(1)][0]) * unit * count % self.layout.stride
            raise Fault(f"reads shared memory that nobody wrote, at byte {byte}")
        if (races := self._races(cells, threads)).any():
            raise Fault(f"race: reads what thread {int(self.writer[cells][races][0])} wrote without a barrier between")
        self.reads.append((cells, threads, self.now))
        if len(self.reads) > _READS:
            self._look_at_reads()
        return self.bytes.view(_WORD[unit * count])[at].view(UINT[unit]).reshape(-1, count)

    def _look_at_reads(self) -> None:
        """Notes the readers of each cell: not before a write comes, since a barrier mostly lies between."""
        for cells, threads, time in self.reads:
            self.read, warps = time, (threads >> 5)[:, None]
            stale = self.read_at.take(cells) < self.block_barrier[threads][:, None]
            self.reader[cells] = new = np.where(stale | (self.reader.take(cells) == warps), warps, _MANY)
            self.read_at[cells] = time
            self.reader[cells[self.reader.take(cells) != new]] = _MANY
        self.reads = []

    def store(self, place: Place, words: Array, threads: Array) -> None:
        at, cells = place.at, place.cells
        rows = words.view(_WORD[words.shape[1] * words.itemsize])[:, 0]
        memory = self.bytes.view(rows.dtype)
        self._check_write(cells, threads, lambda: (memory[at].view(words.dtype).reshape(words.shape) != words).any(1))
        memory[at] = rows
        self._wrote(cells, threads)
        if place.distinct:
            return
        stored = memory[at].view(words.dtype).reshape(words.shape)
        for warp in np.unique(threads[(stored != words).any(1)] >> 5):
            mine = threads >> 5 == warp
            memory[at[mine]] = rows[mine]
            if (memory[at[mine]].view(words.dtype).reshape(-1, words.shape[1]) != stored[mine]).any():
                raise Fault("race: two warps write different values to the same shared memory at once")

    def _check_write(self, cells: Array, threads: Array, differs: Callable[[], Array]) -> None:
        """Two threads may write the same value to the same place."""
        if (races := self._races(cells, threads).any(1)).any() and (races & differs()).any():
            raise Fault("race: writes what another thread wrote without a barrier between")
        self._look_at_reads()
        if self.read < self.met:
            return
        read = self.read_at.take(cells) >= self.block_barrier[threads][:, None]
        if (read & (self.reader.take(cells) != (threads >> 5)[:, None])).any():
            raise Fault("race: writes what another warp reads without a barrier between")

    def _wrote(self, cells: Array, threads: Array) -> None:
        self.now += 1
        self.wrote = self.now
        self.written[cells] = self.now
        self.writer[cells] = threads[:, None]

    def copy(self, place: Place, rows: Array, threads: Array) -> None:
        """Begins an asynchronous copy."""
        self._check_write(place.cells, threads, lambda: np.ones(1, bool))
        self.bytes.view(_WORD[rows.shape[1]])[place.at] = rows.view(_WORD[rows.shape[1]])[:, 0]
        self.pending[place.cells] = True
        self.copies.append((threads, place.cells, self.groups[threads]))

    def commit(self, threads: Array) -> None:
        self.groups[threads] += 1

    def wait(self, threads: Array, most_pending: int | None) -> None:
        """For all but the last groups that each thread committed; None waits for every copy."""
        waiting = np.zeros(len(self.groups), bool)
        waiting[threads] = True
        copies, self.copies = self.copies, []
        for of, cells, group in copies:
            done = waiting[of]
            if most_pending is not None:
                done &= group < self.groups[of] - most_pending
            self.pending[cells[done]] = False
            self._wrote(cells[done], of[done])
            if not done.all():
                self.copies.append((of[~done], cells[~done], group[~done]))

    def barrier(self, threads: Array, of_warp: bool) -> None:
        self.now += 1
        self.warp_barrier[threads] = self.now
        if not of_warp:
            self.block_barrier[threads] = self.now
            if len(threads) == len(self.groups):
                self.met, self.reads = self.now, []


def count_sectors(counts: Counts, addresses: Array, active: Array) -> None:
    """Counts one load or store of global memory; one address is that of all threads."""
    there = active.reshape(-1, 32)
    # Who is away looks like a sector of its own.
    rows = np.where(active, addresses >> np.uint64(5), np.uint64(2**64 - 1)).reshape(-1, 32)
    if (rows[:, 1:] < rows[:, :-1]).any():
        rows.sort(axis=1)
    counts.requests += int(there.any(1).sum())
    counts.sectors += int((rows[:, 1:] != rows[:, :-1]).sum()) + int(there.all(1).sum())
