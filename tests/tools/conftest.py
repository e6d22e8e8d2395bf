"""Fixtures of several tools' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.tools.two_processes import TwoProcesses


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoProcesses]:
    """Two processes joined by gloo."""
    processes = TwoProcesses(tmp_path_factory.mktemp("gloo"))
    yield processes
    processes.close()


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[Callable[[list[str]], int], list[str]], str]:
    """``refused(main, arguments)``: the one line with which a program refuses, and with status 2."""

    def ask(main: Callable[[list[str]], int], arguments: list[str]) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n")) == ("", 1), printed
        return printed.err

    return ask
