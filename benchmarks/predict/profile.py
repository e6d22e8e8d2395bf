"""The work of a launch: instructions by unit, bytes by tensor, and how long a warp alone would take."""

from __future__ import annotations

import bisect
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .chips import Chip
from .compiled import Compiled, compiled
from .execute import ABSENT, Trace, trace
from .record import Array, Launch
from .sass import Instruction, Kernel
from .tools import key, locked
from .warps import Warps

SECTOR = 32  # bytes that device memory and L2 move at least
_FEW, _MANY = 3, 12  # blocks that are followed, two warps each: alike, and of several kinds
#: Clocks from an instruction to its result, where no unit has a queue (microbenchmarks of sm_80 and sm_90).
_LATENCY = {"fp32": 4, "imad": 5, "alu": 5, "fp64": 8, "mufu": 20, "shared": 28, "tensor": 33, "barrier": 20}
_L2_CLOCKS = 280
_REUSED = 4  # a tensor that is read so often, on average, is found in L2


@dataclass
class Profile:
    """The work of a launch, of one warp on average if not said otherwise.

    Attributes:
        blocks, threads: of the grid, of a block.
        resident: blocks that a multiprocessor holds.
        counts: instructions by class (:data:`benchmarks.predict.sass.CLASSES`).
        shared_clocks: clocks of a multiprocessor's shared memory and first-level cache, bank conflicts included.
        requests, asked: global loads and stores that ran, and the sectors that they name: what the first-level cache
            answers counts here.
        passes, conflict_free: over the banks of shared memory, and the least that the same accesses could take.
        warp_flops, flops: of tensor cores, by mma.sync and by the chip's own matrix instruction.
        loaded, stored: bytes of the whole launch by tensor's address, in sectors.
        dram: bytes of the whole launch that device memory moves.
        clocks: of one warp that has the multiprocessor for itself.
        footprints: bytes of each tensor that is touched, by its address.
        guessed: branches that data decide.
        background: whether it copies to shared memory in the background.
    """

    name: str
    blocks: int
    threads: int
    resident: int
    counts: Counter[str] = field(default_factory=Counter)
    shared_clocks: float = 0.0
    requests: float = 0.0
    asked: float = 0.0
    passes: float = 0.0
    conflict_free: float = 0.0
    warp_flops: float = 0.0
    flops: float = 0.0
    loaded: dict[int, float] = field(default_factory=dict)
    stored: dict[int, float] = field(default_factory=dict)
    dram: float = 0.0
    clocks: float = 0.0
    footprints: dict[int, int] = field(default_factory=dict)
    guessed: int = 0
    background: bool = False

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return -(-self.threads // 32)

    @property
    def coverage(self) -> dict[int, float]:
        """Bytes touched for each byte of a tensor, by its address: below 1 the way through the kernel is misread, or a
        part of the tensor is not asked for; above, sectors are used in part or values more than once."""
        sides = (self.loaded, self.stored)
        return {at: sum(side.get(at, 0.0) for side in sides) / size for at, size in self.footprints.items()}

    @property
    def instructions(self) -> float:
        return sum(self.counts.values())

    @property
    def sectors(self) -> float:
        """Bytes between L2 and the multiprocessors."""
        return sum(self.loaded.values()) + sum(self.stored.values())


class _Arrays:
    """Finds the tensor that an address belongs to."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        largest: dict[int, Array] = {}
        for array in arrays:
            if array.address not in largest or array.bytes > largest[array.address].bytes:
                largest[array.address] = array
        self.by_address = dict(sorted(largest.items()))
        self._starts = list(self.by_address)

    def of(self, address: int | None) -> int | None:
        """Its address, or None."""
        if address is None:
            return None
        i = bisect.bisect_right(self._starts, address) - 1
        return self._starts[i] if i >= 0 else None


def _blocks(blocks: int, count: int) -> list[int]:
    """Different ones all over the grid, but for its beginning."""
    golden = 0.6180339887
    return list(dict.fromkeys(int(blocks * ((0.5 + i * golden) % 1)) for i in range(count)))


def profile(launch: Launch, chip: Chip) -> Profile:
    """Follows some warps of a launch through its machine code.

    Raises:
        execute.NotUnderstood: its way could not be followed.
        tools.Missing: a compiler is missing.
    """
    made = compiled(launch, chip)
    where = [(a.address, a.bytes) for a in launch.arrays]
    made_of = key(SOURCES, made.cubin, made.name, made.constants, made.grid, made.threads, made.shared, where, chip)
    with locked(f"profile-{made_of[:2]}") as folder:
        file = folder / "profiles" / f"{made_of}.json"
        if file.exists():
            return _read(file.read_text())
        found = profiled(made, launch.arrays, chip)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(vars(found)))
        return found


#: A profile depends on these and on the machine code.
SOURCES = [
    Path(__file__).parent / f"{name}.py" for name in ("profile", "execute", "warps", "arithmetic", "registers", "sass")
]


def _read(text: str) -> Profile:
    stored = json.loads(text)
    for name in ("loaded", "stored", "footprints"):
        stored[name] = {int(at): value for at, value in stored[name].items()}
    return Profile(**{**stored, "counts": Counter(stored["counts"])})


def profiled(made: Compiled, tensors: Sequence[Array], chip: Chip, *, step: int = 0) -> Profile:
    """:func:`profile` of machine code, anew; ``step``: of all warps of each ``step``-th block instead of some."""
    result, arrays = Profile(made.name, made.blocks, made.threads, made.resident(chip)), _Arrays(tensors)
    warps = result.warps
    loaded: dict[int, float] = defaultdict(float)
    stored: dict[int, float] = defaultdict(float)
    paths: list[Trace] = []
    met, beginnings = _Met(), Warps(made.kernel, made.constants)

    def follow(block: int, window: int) -> None:
        for warp in range(warps) if step else dict.fromkeys((0, warps - 1)):
            whole, lanes, longest = _ways(made, beginnings, block, warp, window)
            paths.append(whole)
            met.meet(made.kernel, lanes, longest)

    for i, block in enumerate(range(0, made.blocks, step) if step else _blocks(made.blocks, _FEW)):
        follow(block, 200_000 // 32 if i < 1 + bool(step) else 30_000 // 32)
    lengths = [len(path.path) for path in paths]
    if max(lengths) > 1.2 * min(lengths) and not step:  # blocks of different kinds, or at edges
        for block in _blocks(made.blocks, _MANY)[_FEW:]:
            follow(block, 0)
    for path in paths:
        _count(made.kernel, path, result)
        _touch(made.kernel, path, met, arrays, result, loaded, stored)
    n = len(paths)
    for name in result.counts:
        result.counts[name] /= n
    for name in ("shared_clocks", "requests", "asked", "passes", "conflict_free", "warp_flops", "flops"):
        setattr(result, name, getattr(result, name) / n)
    result.guessed = sum(sum(path.guessed.values()) for path in paths)
    whole = made.blocks * warps / n
    result.loaded = {at: value * whole for at, value in loaded.items()}
    result.stored = {at: value * whole for at, value in stored.items()}
    # Each tensor once, and both ways where it is read and written: samples miss what few threads touch.
    result.dram = sum(
        array.bytes * max(1, (at in result.loaded) + (at in result.stored)) for at, array in arrays.by_address.items()
    )
    result.footprints = {at: arrays.by_address[at].bytes for at in {*result.loaded, *result.stored}}
    reused = {at for at, value in result.loaded.items() if value >= _REUSED * result.footprints[at]}
    result.background = any(
        made.kernel.code[i].base in ("LDGSTS", "UBLKCP", "UTMALDG") for path in paths for i in path.path
    )
    result.clocks = sum(_alone(made.kernel, path, arrays, reused, chip) for path in paths) / n
    return result


def _ways(made: Compiled, beginnings: Warps, block: int, warp: int, window: int) -> tuple[Trace, list[Trace], int]:
    """The whole way of one thread of a warp, the beginning of all threads' ways, and which of them it is: the one with
    the longest way, since some leave early at edges, and the warp goes on."""
    x, y, _ = made.grid
    at = block % x, block // x % y, block // (x * y)
    threads = range(32 * warp, min(32 * warp + 32, made.threads))
    lanes = beginnings.beginnings(at, threads, window) if window else []
    longest = max(range(len(lanes)), key=lambda i: len(lanes[i].path), default=0)
    return trace(made.kernel, made.constants, at, 32 * warp + longest), lanes, longest


def _count(kernel: Kernel, path: Trace, result: Profile) -> None:
    shapes = dict(path.descriptors)
    for position, i in enumerate(path.path):
        instruction = kernel.code[i]
        result.counts[instruction.kind] += 1
        if position in path.skipped:
            continue
        if instruction.kind in ("shared", "load", "store"):
            result.shared_clocks += _least_passes(instruction)
        elif instruction.kind == "tensor":
            own, flops = _flops(instruction, shapes.get(position), result.warps)
            if own:
                result.flops += flops
            else:
                result.warp_flops += flops


def _least_passes(instruction: Instruction) -> int:
    """Over the banks of shared memory, or the lines of the first-level cache, of a whole warp."""
    if instruction.base == "SHFL":
        return 1
    if instruction.base in ("LDSM", "STSM"):
        return 4 if "4" in instruction.modifiers else 2 if "2" in instruction.modifiers else 1
    return max(1, instruction.width // 4)


def _flops(instruction: Instruction, descriptor: int | None, warps: int) -> tuple[bool, float]:
    """Whether it is the chip's own matrix instruction (of groups of warps) and the FLOP of one warp's share."""
    if instruction.base == "HMMA":
        m, n, k = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}[
            next(m for m in instruction.modifiers if m in ("16816", "1688", "1684"))
        ]
        return False, 2.0 * m * n * k
    if match := re.search(r"(\d+)x(\d+)x(\d+)", instruction.op):
        m, n, k = map(int, match.groups())
        return True, 2.0 * m * n * k / 4
    if descriptor is not None:  # PTX ISA, instruction descriptor of tcgen05.mma
        n, m = (descriptor >> 17 & 63) * 8, (descriptor >> 24 & 31) * 16
        return True, 2.0 * m * n * 16
    return True, 0.0


def _requests(lanes: list[Trace], kind: str, longest: int) -> Iterator[tuple[_Issued, dict[int, int]]]:
    """Each time that a warp issues an instruction, but where an address is not known: ((the instruction, whether its
    guard keeps the followed lane out), lane -> address of the others)."""
    found: dict[tuple[int, int], dict[int, int | None]] = defaultdict(dict)
    for lane, way in enumerate(lanes):
        seen: Counter[int] = Counter()
        for position, address in getattr(way, kind):
            i = way.path[position]
            seen[i] += 1
            found[i, seen[i]][lane] = address
    for (i, _), addresses in found.items():
        known = {lane: address for lane, address in addresses.items() if address is not None}
        if len(known) == len(addresses):
            out = known.get(longest, ABSENT) == ABSENT
            yield (i, out), {lane: address for lane, address in known.items() if address != ABSENT}


#: An instruction, and whether its guard keeps the followed lane out.
_Issued = tuple[int, bool]


class _Met:
    """Requests of the beginnings of ways, by instruction and whether its guard keeps the followed lane out.

    Attributes:
        ran: 1, or 0 where guards kept the whole warp out.
        asked, moved: sectors that the request names, and those that L2 is asked for.
        passes: over the banks of shared memory.
        address: one that it touched.
    """

    def __init__(self) -> None:
        self.ran, self.asked, self.moved, self.passes = (defaultdict[_Issued, list[int]](list) for _ in range(4))
        self.address: dict[int, int] = {}

    def meet(self, kernel: Kernel, lanes: list[Trace], longest: int) -> None:
        """Adds the ways of the threads of a warp, of which the longest is followed to its end."""
        cache: set[int] = set()
        for issued, addresses in _requests(lanes, "accesses", longest):
            i, _ = issued
            instruction = kernel.code[i]
            last = instruction.width - 1
            sectors = {part for at in addresses.values() for part in range(at // SECTOR, (at + last) // SECTOR + 1)}
            self.ran[issued].append(bool(addresses))
            self.asked[issued].append(len(sectors))
            self.address.update((i, at) for at in addresses.values())
            # A warp finds in the first-level cache what it loads again, unless the load goes past it or writes came.
            if (instruction.base == "LDG" and "STRONG" not in instruction.modifiers) or (
                instruction.base == "LDGSTS" and "BYPASS" not in instruction.modifiers
            ):
                sectors, _ = sectors - cache, cache.update(sectors)
            self.moved[issued].append(len(sectors))
        for issued, addresses in _requests(lanes, "shared", longest):
            i, _ = issued
            # 32 banks of 4 bytes, one word of each in a pass; words of 8 and 16 bytes go by parts of a warp.
            # Eight lanes name the rows of a matrix.
            matrices = kernel.code[i].base in ("LDSM", "STSM")
            words = 4 if matrices else max(1, kernel.code[i].width // 4)
            parts: dict[int, set[int]] = defaultdict(set)
            for lane, at in addresses.items():
                if not matrices or lane < 8 * _least_passes(kernel.code[i]):
                    parts[lane * words // 32].update(range(at // 4, at // 4 + words))
            banks = (Counter(word % 32 for word in part) for part in parts.values())
            self.passes[issued].append(sum(max(each.values()) for each in banks))


def _mean(values: Sequence[int] | None, otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _touch(
    kernel: Kernel, path: Trace, met: _Met, arrays: _Arrays, result: Profile,
    loaded: dict[int, float], stored: dict[int, float],
) -> None:  # fmt: skip
    """Adds the sectors that a warp names, the bytes that it moves from and to L2, and its passes over the banks of
    shared memory: as many a request as were met, or whole ones where none was."""
    for position, address in path.accesses:
        i = path.path[position]
        instruction = kernel.code[i]
        issued = i, address == ABSENT
        whole = 0 if address == ABSENT else instruction.width
        result.requests += _mean(met.ran.get(issued), address != ABSENT)
        result.asked += _mean(met.asked.get(issued), whole)
        at = arrays.of(met.address.get(i) if address in (None, ABSENT) else address)
        if at is not None:
            side = stored if instruction.kind == "store" else loaded
            side[at] += SECTOR * _mean(met.moved.get(issued), whole)
    for position, address in path.shared:
        i = path.path[position]
        least = 0 if address == ABSENT else _least_passes(kernel.code[i])
        passes = _mean(met.passes.get((i, address == ABSENT)), least)
        result.passes += passes
        result.conflict_free += least
        result.shared_clocks += max(0.0, passes - least)


def _alone(kernel: Kernel, path: Trace, arrays: _Arrays, reused: set[int], chip: Chip) -> float:
    """Clocks of one warp: each instruction waits for its operands, copies to shared memory are waited for by group."""
    memory = chip.latency * chip.clock
    addresses = dict(path.accesses)
    ready: dict[str, float] = {}
    now, group, tensor = 0.0, 0.0, 0.0
    groups: list[float] = []
    flops_a_clock = chip.tensor_flops[next(iter(chip.tensor_flops))] / chip.sms / chip.clock
    shapes = dict(path.descriptors)
    for position, i in enumerate(path.path):
        instruction = kernel.code[i]
        now = max([now + 1, *(ready[r] for r in instruction.reads if r in ready)])
        if position in path.skipped:
            continue
        if instruction.kind == "load":
            latency = _L2_CLOCKS if arrays.of(addresses.get(position)) in reused else memory
            if instruction.base == "LDGSTS":
                group = max(group, now + latency)
        elif instruction.base == "LDGDEPBAR":
            groups.append(group)
            group = 0.0
            continue
        elif instruction.base == "DEPBAR":
            pending = next((int(t, 16) for t in instruction.operands[1:] if t.startswith("0x")), 0)
            first = max(len(groups) - pending, 0)
            now = max([now, *groups[:first]])
            groups = groups[first:]
            continue
        elif instruction.kind == "tensor":
            own, flops = _flops(instruction, shapes.get(position), 4)
            if own:
                tensor = max(tensor, now) + 4 * flops / flops_a_clock
                continue
            latency = _LATENCY["tensor"]
        elif instruction.base == "WARPGROUP" or instruction.base == "SYNCS":
            now = max(now, tensor) if "DEPBAR" in instruction.modifiers or instruction.base == "SYNCS" else now
            latency = 0
        else:
            latency = _LATENCY.get(instruction.kind, 8)
            if instruction.kind == "barrier" and instruction.base == "BAR":
                now += latency
        for register in instruction.writes:
            ready[register] = now + latency
    return now
