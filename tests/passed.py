"""Test sessions that take minutes, and run again where something that they are made of has changed.

`passed.json` has a key of each that passed. Every day another part of them runs whatever has changed, as
:mod:`benchmarks.predict.kept` says; `python -m pytest -m prove --renew FILE` runs all of a file, and writes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.predict import kept
from benchmarks.predict.tools import ROOT, key, locked

KEPT = Path(__file__).with_name("passed.json")
#: Files that every session of tests/ops and tests/kernels reads.
HELPERS = ("tests/*.py", "tests/ops/[!t]*.py", "tests/kernels/**/support.py", "wavemix_kernels/ops/*.py")


@contextmanager
def unless_passed(
    request: pytest.FixtureRequest, name: str, patterns: tuple[str, ...], *versions: str
) -> Iterator[None]:
    """Skips what passed with the same files and versions; else keeps it, under `--renew`, if it passes inside."""
    files = {path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file() and path != KEPT}
    assert all(any(ROOT.glob(pattern)) for pattern in patterns), f"{name}: a pattern of {patterns} names no file"
    today, renew = key(files, *versions), request.config.getoption("--renew")
    if kept.serves(kept.read(KEPT).get(name), today, anew=renew):
        pytest.skip(f"{name} passed with the same sources; it runs when they change, on its day, and with --renew")
    yield
    if renew:
        with locked("passed"):
            known = kept.read(KEPT)
            kept.write(KEPT, {name: kept.Kept(today)}, {*known, name})
