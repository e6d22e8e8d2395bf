"""The beginnings of all threads' ways of a warp: what is alike in several threads is executed once.

Each thread does what :func:`benchmarks.predict.execute.trace` says. Threads whose ways part go on in groups.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .execute import ENDS, LOCAL, Trace, address_of, after, execute, first_thread, forget
from .registers import Thread, Value
from .sass import IS_PREDICATE, Instruction, Kernel

_OWN = frozenset({"SR_TID.X", "SR_LANEID"})  # special registers that each thread has for itself
_ALWAYS = frozenset({"PT", "UPT", ""})


class _Recorder(Thread):
    """Notes what an instruction reads. Nothing is known."""

    def __init__(self) -> None:
        super().__init__(b"", {})
        self.asked: set[str] = set()

    def register(self, name: tuple[str, str], size: int = 4) -> Value:
        self.asked.update(name if size > 4 else name[:1])
        return None

    def predicate(self, text: str) -> bool | None:
        self.asked.add(text.lstrip("!"))
        return None


@dataclass(frozen=True)
class _Names:
    """Registers and predicates of an instruction.

    Attributes:
        reads: its guard and special registers of :data:`_OWN` among them.
        writes: where it runs.
        forgets: where nobody knows whether it runs.
    """

    reads: frozenset[str]
    writes: frozenset[str]
    forgets: frozenset[str]

    @staticmethod
    def of(instruction: Instruction) -> _Names:
        reading, unknown = _Recorder(), Thread(b"", {})
        if instruction.base not in ENDS:
            execute(replace(instruction, guard=("", False)), reading, 0, Trace())
            forget(instruction, unknown)
        for shared in (False, True):
            address_of(instruction, reading, shared)
        reads = reading.asked | _OWN.intersection(instruction.operands) | {instruction.guard[0]}
        reads.update(text.lstrip("!") for text in instruction.operands if IS_PREDICATE.fullmatch(text))
        if instruction.base in (*ENDS, *LOCAL):
            reads.update(instruction.reads)
        writes = {*reading.values, *reading.predicates}
        if not instruction.guard[0] or instruction.kind in ("load", "store") or instruction.base in (*LOCAL, "SYNCS"):
            unknown = reading
        forgets = {*unknown.values, *unknown.predicates}
        return _Names(frozenset(reads - _ALWAYS), frozenset(writes - _ALWAYS), frozenset(forgets - _ALWAYS))


def _kind(thread: Thread, name: str) -> tuple[dict[str, Any], Any]:
    """Where a thread keeps this name, and what it has there before anything is written."""
    return (thread.predicates, None) if "P" in name else (thread.values, 0)


@dataclass
class _Group:
    """Threads that came the same way.

    Attributes:
        at: index of the next instruction.
        common: values that are alike in all threads.
        threads: the others, by thread; names that do not vary may be out of date there.
        varying: the names of the others.
    """

    at: int
    path: list[int]
    common: Thread
    threads: dict[int, Thread]
    varying: set[str]

    def part(self, at: int, indices: Iterable[int]) -> _Group:
        """Some of its threads, which go on elsewhere."""
        common = Thread(b"", self.common.special)
        common.banks, common.local = self.common.banks, self.common.local
        common.values, common.predicates = dict(self.common.values), dict(self.common.predicates)
        part = _Group(at, list(self.path), common, {i: self.threads[i] for i in indices}, set(self.varying))
        part.unite(self.varying - _OWN)
        return part

    def lend(self, names: Iterable[str]) -> None:
        """Brings these up to date in every thread."""
        values: dict[str, Value] = {}
        predicates: dict[str, bool | None] = {}
        for name in names:
            if name not in self.varying:
                held, before = _kind(self.common, name)
                (predicates if held is self.common.predicates else values)[name] = held.get(name, before)
        for thread in self.threads.values():
            thread.values.update(values)
            thread.predicates.update(predicates)

    def unite(self, names: Iterable[str]) -> None:
        """Names that the threads have up to date vary, or are alike."""
        first, *others = self.threads.values()
        for name in names:
            held, before = _kind(first, name)
            value = held.get(name, before)
            if all(_kind(thread, name)[0].get(name, before) == value for thread in others):
                _kind(self.common, name)[0][name] = value
                self.varying.discard(name)
            else:
                self.varying.add(name)


class Warps:
    """Follows warps of a launch.

    Args:
        constants: bank 0 with the parameters in place.
    """

    def __init__(self, kernel: Kernel, constants: bytes) -> None:
        self.kernel, self.constants = kernel, constants
        self._names: dict[int, _Names] = {}

    def beginnings(self, block: tuple[int, int, int], indices: Sequence[int], most: int) -> list[Trace]:
        """Paths and accesses of some threads of one warp, as :func:`benchmarks.predict.execute.trace` finds them with
        ``most``.

        Raises:
            execute.NotUnderstood: an instruction that changes the way is not known.
        """
        common, *_ = threads = [first_thread(self.kernel, self.constants, block, i) for i in (indices[0], *indices)]
        made = {i: Trace() for i in indices}
        groups = [_Group(0, [], common, dict(zip(indices, threads[1:], strict=True)), set(_OWN))]
        while groups:
            groups += self._follow(groups.pop(), most, made)
        return list(made.values())

    def _follow(self, group: _Group, most: int, made: dict[int, Trace]) -> list[_Group]:
        """Until all threads of a group end, or part: the parts."""
        while len(group.path) < 2 * most:
            instruction = self.kernel.code[group.at]
            if group.at not in self._names:
                self._names[group.at] = _Names.of(instruction)
            names = self._names[group.at]
            group.path.append(group.at)
            alike = names.reads.isdisjoint(group.varying)
            if instruction.base not in ENDS:
                self._execute(instruction, names, group, alike and instruction.base not in LOCAL, made)
                group.at += 1
                continue
            ways: dict[int | None, list[int]] = defaultdict(list)
            if alike:
                ways[after(self.kernel, instruction, group.common, Trace(group.path), most)] = list(group.threads)
            else:
                group.lend(names.reads)
                for i, thread in group.threads.items():
                    ways[after(self.kernel, instruction, thread, Trace(group.path), most)].append(i)
            for i in ways.pop(None, ()):
                made[i].path = group.path
            if len(ways) != 1 or not alike:
                return [group.part(at, some) for at, some in ways.items() if at is not None]
            (group.at,) = (at for at in ways if at is not None)
        for i in group.threads:
            made[i].path = group.path
        return []

    def _execute(
        self, instruction: Instruction, names: _Names, group: _Group, alike: bool, made: dict[int, Trace]
    ) -> None:
        position = len(group.path) - 1
        if alike:
            found = Trace()
            runs = execute(instruction, group.common, position, found)
            if found.accesses or found.shared:
                for i in group.threads:
                    made[i].accesses += found.accesses
                    made[i].shared += found.shared
            if runs is not False:
                group.varying -= names.forgets if runs is None else names.writes
            return
        # A thread that the guard keeps out has what it had.
        written = names.writes | names.forgets
        group.lend(names.reads | written if instruction.guard[0] else names.reads)
        for i, thread in group.threads.items():
            execute(instruction, thread, position, made[i])
        group.unite(written)
