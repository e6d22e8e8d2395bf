"""Fixtures of several tools' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.tools.two_processes import TwoProcesses


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoProcesses]:
    """Two processes joined by gloo."""
    processes = TwoProcesses(tmp_path_factory.mktemp("gloo"))
    yield processes
    processes.close()
