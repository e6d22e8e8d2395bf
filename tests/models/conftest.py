"""Fixtures of the models: the packages they are compared with, and the choice of PATM's kernels.

This file imports nothing of ours: Triton would be read before tests/conftest.py sets its interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.upstream import original_wavemix


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """Upstream's package `wavemix`."""
    with original_wavemix(tmp_path_factory.mktemp("original")) as package:
        yield package


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
