"""The original package `wavemix`, installed into a folder of its own: what our drop-ins are compared with."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PACKAGES = ("wavemix==0.2.4", "einops==0.8.1")


@contextmanager
def original_wavemix(folder: Path) -> Iterator[types.ModuleType]:
    """Imports `wavemix` with its submodules from `folder`, after installing it there; skips where pip cannot."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--target", str(folder), *PACKAGES], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip could not get {' and '.join(PACKAGES)}: {done.stderr.strip().splitlines()[-1]}")
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(folder))
    # It imports a name it never uses from a module that NumPy 2 has removed.
    removed = types.ModuleType("numpy.lib.function_base")
    removed.hamming = None  # type: ignore[attr-defined]
    patch.setitem(sys.modules, removed.__name__, removed)
    try:
        package = importlib.import_module("wavemix")
        for name in ("classification", "SemSegment", "sisr"):
            importlib.import_module(f"wavemix.{name}")
        yield package
    finally:
        patch.undo()
        for name in [n for n in sys.modules if n.split(".")[0] in ("wavemix", "einops")]:
            del sys.modules[name]
