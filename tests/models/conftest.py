"""Fixtures of the models: the packages they are compared with, and the choice of PATM's kernels.

This file imports nothing of ours: Triton would be read before tests/conftest.py sets its interpreter."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

PACKAGES = ("wavemix==0.2.4", "einops==0.8.1")


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """Upstream's package `wavemix` with its submodules, installed into a folder of its own; skips where pip cannot."""
    folder = str(tmp_path_factory.mktemp("original"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--target", folder, *PACKAGES], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip could not get {' and '.join(PACKAGES)}: {done.stderr.strip().splitlines()[-1]}")
    # It imports a name it never uses from a module that NumPy 2 has removed.
    removed = ModuleType("numpy.lib.function_base")
    removed.hamming = None
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setitem(sys.modules, removed.__name__, removed)
        for name in ("classification", "SemSegment", "sisr"):
            importlib.import_module(f"wavemix.{name}")
        yield sys.modules["wavemix"]
    for name in [n for n in sys.modules if n.split(".")[0] in ("wavemix", "einops")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def wavelets() -> ModuleType:
    return pytest.importorskip("pytorch_wavelets", exc_type=ImportError)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """PATM in kernels of parts, as wide images run; otherwise a CPU takes narrow ones from end to end."""
    monkeypatch.setattr("wavemix_kernels.ops.choose.WHOLE", 0)


@pytest.fixture(params=["whole", "parts"])
def either(request: pytest.FixtureRequest) -> str:
    """PATM from end to end, and in kernels of parts."""
    if request.param == "parts":
        request.getfixturevalue("parts")
    return request.param
