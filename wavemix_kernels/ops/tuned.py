"""The fastest choices measured on this device, asked before the rules of :mod:`wavemix_kernels.ops.choose`.

:mod:`wavemix_kernels.tune` measures and writes. A choice is known by its key: its name, and of the first two tensors of
the call dtype, channels and the power of two of all other sizes together. Chosen are backends of an op, tiles of a
Triton kernel, or forms of a composite; a ranking has the best first. Entries are the user's
(:mod:`wavemix_kernels.cache`, section "tuned"), else those shipped for the architecture (``wavemix_kernels/tuned/``).

A tile for which a device has not the shared memory makes room for the next one (:func:`unit`): the next of the ranking,
then the default, then the others of the search space, then the next backend.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from wavemix_kernels import cache, log
from wavemix_kernels.backends import NAMES, Backend, triton_interpreted
from wavemix_kernels.ops.common import plan
from wavemix_kernels.ops.common.precision import input_precision

Key = tuple[Any, ...]
Ranking = list[Any]

SECTION = "tuned"
#: Tables for whoever has none of their own: ``<architecture>.json``, written by ``tune --export``.
SHIPPED = Path(__file__).parent.parent / "tuned"
_MOST_CALLS = 10_000


class Recorder(Protocol):
    """The hook that :mod:`wavemix_kernels.tune` puts into every call while it measures."""

    def run(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def met(self, key: Key, default: Any, candidates: Sequence[Any]) -> None: ...


class _State:
    recorder: Recorder | None = None
    #: Whether calls leave notes: somebody records, or a tile did not fit.
    watching: bool = False
    #: Whether tables are read from files.
    reads: bool = True


class _Notes(threading.local):
    """The last choices of this thread."""

    order: tuple[torch.device, Key] | None = None
    tile: tuple[torch.device, Key, Any] | None = None


_tables: dict[torch.device, dict[Key, Ranking]] = {}
#: (device, key, tile or backend) that did not fit.
_barred: set[tuple[torch.device, Key, Any]] = set()
#: The measured backend or tile, or None, by the exact shapes of a call: one lookup.
_calls: dict[tuple[Any, ...], Any] = {}
_notes = _Notes()


# --- Asked by choose.py and the launches --------------------------------------------------------------------


def order(op: str, rule: tuple[str, ...], table: Mapping[str, Backend], tensors: Sequence[Tensor]) -> tuple[str, ...]:
    """Backends of ``op`` in the order to try them: the measured one, then those of ``rule``."""
    device = tensors[0].device
    found = _tables.get(device)
    if found is None:
        found = load(device)
    if _State.watching:
        return _watched_order(op, rule, table, tensors)
    first = tensors[0]
    if not found or type(first) is not Tensor:  # a traced call's tensor is of another class
        return rule
    call = _call(op, device, tensors)
    try:
        best = _calls[call]
    except KeyError:
        best = _remember(call, next(iter(found.get(key_of(op, tensors), ())), None))
    return rule if best is None else (best, *rule)


def _call(what: Any, device: torch.device, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """All that :func:`key_of` looks at, exactly: made faster, and more of them."""
    first = tensors[0]
    if len(tensors) == 1:
        return what, device, first.dtype, first.is_contiguous(), first.shape
    second = tensors[1]
    return what, device, first.dtype, first.is_contiguous(), first.shape, second.dtype, second.shape


def _remember(call: tuple[Any, ...], best: Any) -> Any:
    if len(_calls) > _MOST_CALLS:
        _calls.clear()
    _calls[call] = best
    return best


def _watched_order(
    op: str, rule: tuple[str, ...], table: Mapping[str, Backend], tensors: Sequence[Tensor]
) -> tuple[str, ...]:
    """:func:`order`, with a note of it, and without what did not fit."""
    device, key = tensors[0].device, key_of(op, tensors)
    _notes.order = (device, key)
    if _State.recorder is not None:
        serving = [name for name in NAMES if name in table and table[name].why_not(*tensors) is None]
        if triton_interpreted() and "triton" not in rule:  # a test's tool, thousands of times as slow as any other
            serving = [name for name in serving if name != "triton"]
        default = next((name for name in rule if name in serving), None)
        _State.recorder.met(key, default, serving)
    best = _tables[device].get(key, [])[:1]
    return tuple(name for name in (*best, *rule) if (device, key, name) not in _barred)


def watching() -> bool:
    """Whether every call of an operator has to be seen."""
    return _State.watching


def is_measured(op: str, backend: str, tensors: Sequence[Tensor]) -> bool:
    """Whether a table says so."""
    return _tables.get(tensors[0].device, {}).get(key_of(op, tensors), [])[:1] == [backend]


def either(what: str, default: str, other: str, *tensors: Tensor, extra: tuple[int, ...] = ()) -> str:
    """The measured one of two forms of a composite, else ``default``. A graph is traced with the default."""
    if torch.compiler.is_compiling():
        return default
    device = tensors[0].device
    found = _tables.get(device)
    if found is None:
        found = load(device)
    if not (found or _State.recorder):
        return default
    key = key_of(what, tensors, extra)
    if _State.recorder is not None:
        _State.recorder.met(key, default, [default, other])
    best = found.get(key)
    return best[0] if best is not None and best[0] in (default, other) else default


def tile(
    kernel: str, config: Callable[..., Any], space: Callable[[], Iterable[Any]], *tensors: Tensor,
    extra: tuple[int, ...] = (),
) -> Any:  # fmt: skip
    """The measured tile of a Triton kernel, or None for the default.

    Args:
        config: makes a tile of its fields, as a file has them.
        space: the tiles worth timing.
        tensors: the launch's, those first that say most about its size.
        extra: what else counts.

    Raises:
        NoTile: none fits this device.
    """
    device = tensors[0].device
    found = _tables.get(device)
    if found is None:
        found = load(device)
    if not (found or _State.watching):
        return None
    if tensors[0].dtype == torch.float32:
        extra = (*extra, int(input_precision() == "tf32"))
    call = _call((kernel, extra), device, tensors)
    if not _State.watching and call in _calls:
        return _calls[call]
    key = key_of(kernel, tensors, extra)
    if _State.recorder is not None:
        _State.recorder.met(key, None, [None, *space()])
    ranking = _decoded(found, key, config)
    if not _State.watching:
        return _remember(call, ranking[0] if ranking else None)
    for candidate in (*ranking, None, *space()):
        if (device, key, candidate) not in _barred:
            _notes.tile = (device, key, candidate)
            return candidate
    raise NoTile(f"no tile of {kernel} fits {device}")


def _decoded(table: dict[Key, Ranking], key: Key, config: Callable[..., Any]) -> Ranking:
    """The tiles of an entry, which a file has as lists."""
    ranking = table.get(key, [])
    if any(isinstance(entry, list) for entry in ranking):
        try:
            ranking = [config(*entry) if isinstance(entry, list) else entry for entry in ranking]
        except TypeError as error:
            log.logger.warning("tuned: left out the tiles of %s (%s)", key[0], error)
            ranking = []
        table[key] = ranking
    return ranking


class NoTile(RuntimeError):
    """No tile of a Triton kernel fits the device."""


def key_of(what: str, tensors: Sequence[Tensor], extra: tuple[int, ...] = ()) -> Key:
    """Sizes by powers of two, so that one entry serves batches and images of about that size."""
    parts: list[Any] = [what, *extra, tensors[0].is_contiguous()]
    for t in tensors[:2]:
        shape = t.shape
        columns = shape[1] if len(shape) > 1 else 1
        parts += (t.dtype, columns, (t.numel() // columns).bit_length() if columns else 0)
    return tuple(parts)


# --- Around every op ----------------------------------------------------------------------------------------


def unit(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, the implementation of operator ``name``, run again with another tile or backend where Triton
    finds that one does not fit the device. Nothing has been launched then. Its last argument is the backend."""

    def run(*args: Any) -> Any:
        if _State.recorder is not None:
            return _State.recorder.run(name, function, args, {})
        try:
            return function(*args)
        except Exception as error:
            if not does_not_fit(error):
                raise
            return again(name, function, args, error)

    return run


def composite(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a function of several operators, with a keyword argument ``backend``, that has a choice of its own."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling() and _State.recorder is not None:
                return _State.recorder.run(name, function, args, kwargs)
            return function(*args, **kwargs)

        return run

    return decorate


def does_not_fit(error: Exception) -> bool:
    """Whether Triton finds that a kernel needs more of something than the device has."""
    if isinstance(error, NoTile):
        return True
    # By name: a process without Triton has no such class.
    return type(error).__name__ == "OutOfResources" and type(error).__module__.startswith("triton")


def again(name: str, function: Callable[..., Any], args: tuple[Any, ...], error: Exception) -> Any:
    """``function(*args)`` after :func:`does_not_fit`, with the next tile or backend."""
    watched, _State.watching = _State.watching, True
    while True:
        if watched:
            _bar(name, args[-1], error)
        try:
            return function(*args)
        except Exception as another:
            if not does_not_fit(another):
                raise
            # The first time it ran without notes: only now is it known which tile it was.
            watched, error = True, another


def _bar(name: str, backend: str, error: Exception) -> None:
    """Takes what did not fit out of the choice.

    Raises:
        RuntimeError: there is nothing else.
    """
    if not isinstance(error, NoTile) and _notes.tile is not None and _notes.tile not in _barred:
        _barred.add(_notes.tile)
        tile = "the default tile" if _notes.tile[2] is None else str(_notes.tile[2])
        log.logger.warning("%s: %s does not fit %s (%s): trying another", name, tile, _notes.tile[0], error)
        return
    if backend != "auto" or _notes.order is None or (*_notes.order, "triton") in _barred:
        raise RuntimeError(f"{name}: backend={backend!r} cannot serve this call: {error}") from error
    _barred.add((*_notes.order, "triton"))
    log.logger.warning("%s: no tile of backend 'triton' fits (%s): the next backend serves", name, error)


# --- The table ----------------------------------------------------------------------------------------------


def load(device: torch.device) -> dict[Key, Ranking]:
    """The table of a device, from the user's cache and from what is shipped."""
    table: dict[Key, Ranking] = {}
    if _State.reads and device.type in ("cpu", "cuda"):
        entries = {**shipped(cache.architecture(device)), **cache.read(device, SECTION)}
        for name, entry in entries.items():
            try:
                if entry.get("threads", torch.get_num_threads()) == torch.get_num_threads():
                    key, ranking = from_entry(entry)
                    table[key] = ranking
            except (KeyError, TypeError, AttributeError) as error:
                log.logger.warning("tuned: left out %r, which is no entry of a table (%r)", name, error)
    _tables[device] = table
    _calls.clear()
    plan.forget()
    return table


def shipped(architecture: str) -> Mapping[str, Any]:
    """The entries shipped for an architecture; none where there is no file."""
    file = SHIPPED / f"{architecture}.json"
    if not file.exists():
        return {}
    entries: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))["entries"]
    return entries


def forget() -> None:
    """Drops the tables and what did not fit: the next call reads the files."""
    _tables.clear()
    _calls.clear()
    _barred.clear()
    plan.forget()


def put(device: torch.device, key: Key, ranking: Ranking | None) -> None:
    """Lets a choice fall as measured, in this process; None: as the rules say."""
    table = _tables.setdefault(device, {})
    _calls.clear()
    plan.forget()
    if ranking is None:
        table.pop(key, None)
    else:
        table[key] = ranking


def entry(key: Key, ranking: Ranking, device: torch.device) -> tuple[str, dict[str, Any]]:
    """Name and value for a file."""
    value: dict[str, Any] = {"key": [_word(part) for part in key], "ranking": ranking}
    name = " ".join(str(word).removeprefix("torch.") for word in value["key"])
    if device.type == "cpu":
        value["threads"] = torch.get_num_threads()
        name += f", {value['threads']} threads"
    return name, value


def from_entry(value: Mapping[str, Any]) -> tuple[Key, Ranking]:
    """The value that :func:`entry` made one of; tiles are made when they are asked for."""
    return _key_from(value["key"]), list(value["ranking"])


@contextmanager
def rules_alone() -> Iterator[None]:
    """Inside, tables hold what is put into them alone. Then they are read again."""
    forget()
    _State.reads = False
    try:
        yield
    finally:
        _State.reads = True
        forget()


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Every call goes through ``recorder``."""
    before = _State.recorder, _State.watching
    _State.recorder, _State.watching = recorder, True
    try:
        with plan.paused():
            yield
    finally:
        _State.recorder, _State.watching = before


@contextmanager
def unrecorded() -> Iterator[None]:
    """Calls inside are nobody's that tunes, such as those of a self-test at a kernel's first use."""
    before, _State.recorder = _State.recorder, None
    try:
        yield
    finally:
        _State.recorder = before


def _word(part: Any) -> Any:
    return str(part) if isinstance(part, torch.dtype) else part


def _key_from(words: list[Any]) -> Key:
    return tuple(
        getattr(torch, word.removeprefix("torch.")) if isinstance(word, str) and word.startswith("torch.") else word
        for word in words
    )
