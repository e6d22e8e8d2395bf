"""Counts of kernels that ran from their PTX (tests/ptx), beside those that predictions make of the same launches.

Predictions follow machine code at the shape that is asked for. How many sectors a request names and how often banks
conflict depend on the shape, so a prediction cannot take these from another one; but how far its own count of a small
launch is off, it can. Static counts are multiplied by executed / static of that launch. Instructions are not: the
compiler makes others of PTX, and machine code is what runs.

`executed.json` has the counts of each kernel in bfloat16 as (static, executed), and the hash of the sources that ran.
``python -m pytest tests/ptx/test_kernels.py -k SESSION --renew`` writes them anew.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .profile import Profile
from .record import Launch
from .tools import ROOT, locked

DATA = Path(__file__).with_name("executed.json")
SCALED = ("requests", "sectors", "passes")
LEAST, MOST = 0.8, 1.25  # of static / executed
_CUDA = ROOT / "csrc" / "cuda"


def kernel_of(mangled: str) -> str:
    """A CUDA kernel's name in the source: the last of the lengths and names behind `_ZN`."""
    name, rest = mangled, mangled.removeprefix("_ZN")
    while match := re.match(r"\d+", rest):
        end = match.end() + int(match[0])
        name, rest = rest[match.end() : end], rest[end:]
    return name


def name_of(launch: Launch) -> str:
    """The kernel's name in the records: of a Triton kernel with its module."""
    return kernel_of(launch.name) if launch.kind == "cuda" else f"{launch.kernel.fn.__module__}.{launch.name}"


@functools.cache
def source(kernel: str) -> str:
    """A hash of the code that a kernel is made of: its family's and what all share, without comments.

    Raises:
        LookupError: no file has such a kernel.
    """
    if "." in kernel:
        folder = ROOT.joinpath(*kernel.split(".")[:-2])
        files = [*folder.glob("triton*.py"), *(ROOT / "wavemix_kernels" / "ops" / "common").glob("triton*.py")]
    else:
        found = [path for path in _CUDA.rglob("*.cu") if re.search(rf"\b{kernel}\(", path.read_text())]
        if not found:
            raise LookupError(f"kernel={kernel!r}: no .cu file under {_CUDA} has it")
        files = [*found[0].parent.iterdir(), *(_CUDA / "common").iterdir()]
    digest = hashlib.sha256()
    for file in sorted(set(files)):
        text = file.read_text()
        bare = re.sub(rf"{'#' if file.suffix == '.py' else '//'}.*|\s+", " ", text)
        digest.update(f"\0{file.name}\0{bare}".encode())
    return digest.hexdigest()[:16]


@functools.cache
def records() -> dict[str, Mapping[str, Any]]:
    return json.loads(DATA.read_text()) if DATA.exists() else {}


def renew(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Puts the counts of these kernels in place of older ones, several processes after each other."""
    with locked("executed"):
        records.cache_clear()
        kept = dict(sorted((records() | rows).items()))
        DATA.write_text("{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(row)}" for k, row in kept.items()) + "\n}\n")
    records.cache_clear()


def scales(kernel: str) -> dict[str, float]:
    """Executed / static of each count that predictions scale; empty where the kernel was not executed, or is another
    one by now, or has branches that data decide: a test's data are no model's. A ratio outside of the bounds is not
    used: machine code has other accesses than PTX there."""
    row = records().get(kernel)
    if row is None or row["guessed"] or row["source"] != source(kernel):
        return {}
    pairs = {what: row[what] for what in SCALED}
    return {what: ran / static for what, (static, ran) in pairs.items() if ran and LEAST * ran <= static <= MOST * ran}


def scaled(found: Profile, by: Mapping[str, float]) -> Profile:
    """A profile with its counts of memory accesses multiplied."""
    sectors, passes = by.get("sectors", 1.0), by.get("passes", 1.0)
    return replace(
        found,
        requests=found.requests * by.get("requests", 1.0),
        asked=found.asked * sectors,
        loaded={at: value * sectors for at, value in found.loaded.items()},
        stored={at: value * sectors for at, value in found.stored.items()},
        passes=found.passes * passes,
        shared_clocks=found.shared_clocks + found.passes * (passes - 1),
    )
