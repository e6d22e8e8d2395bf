"""Results that lie beside the sources, so that `make prove` compiles and follows again only what has changed.

A file has a line for each kernel: a key of all that its result is made of, and the result. A kernel whose key differs
is new, and so is one whose day it is: every day another :data:`PARTS`-th of the kept results is made again, so that a
wrong one does not stay. ``python -m benchmarks.predict.gates --renew`` and ``python -m tests.aot.test_rules --renew``
write the files.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import core
from .chips import Chip
from .record import Launch

PARTS = 16


class Kept(NamedTuple):
    """A kernel's result, and what it was made of."""

    key: str
    result: Any = None


def key(*parts: object) -> str:
    """Changes with what any of the parts looks like."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def read(file: Path) -> dict[str, Kept]:
    """By the kernel's name; empty without the file."""
    return {name: Kept(*row) for name, row in json.loads(file.read_text()).items()} if file.exists() else {}


def write(file: Path, rows: Mapping[str, Kept], names: Iterable[str]) -> None:
    """Puts rows in place of older ones; what is not among the names of today's kernels goes."""
    every = read(file) | rows
    lines = [f" {json.dumps(name)}: {json.dumps(list(every[name]))}" for name in sorted(names) if name in every]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def serves(row: Kept | None, today: str, anew: bool = False) -> bool:
    """Whether a kept result is that of today's key, and need not be made again today."""
    if row is None or row.key != today or anew:
        return False
    return int(today[:8], 16) % PARTS != datetime.date.today().toordinal() % PARTS


def triton_code(kernel: Any, args: tuple[Any, ...], constants: Mapping[str, Any], arch: int | str) -> str:
    """The inputs of Triton's compiler for a launch, without compiling it: sources, specialisation, options, chip and
    version."""
    import triton
    from triton import knobs

    from .compiled import on_chip

    found: list[object] = []

    def hook(**given: Any) -> bool:
        found.extend([given["fn"].jit_function.cache_key, given["key"]])
        return True  # do not compile

    with on_chip(arch, f"keys of sm_{arch}"):  # where nothing is compiled, and the hook therefore asked
        before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, hook
        try:
            kernel.warmup(*args, grid=(1,), **constants)
        finally:
            knobs.runtime.jit_cache_hook = before
    return key(triton.__version__, arch, *found)


def code(launch: Launch, chip: Chip) -> str:
    """Changes with the program that a launch runs on a chip, which is not compiled for it."""
    if launch.kind == "triton":
        return triton_code(launch.kernel, launch.args, launch.constants, chip.arch)
    name = re.sub(r"_GLOBAL__N__[0-9a-f]{8}_(\w+?_cu)_[0-9a-f]{8}", r"\1", launch.name)  # the source's path is in it
    return key(name, core.key_of(core.source_of(launch.name)), chip.arch)
