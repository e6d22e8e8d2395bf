"""Verdicts of long test sessions that passed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.predict import kept
from tests import passed


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The one that a session reads, in a project of its own where it is nobody's day."""
    monkeypatch.setattr(passed, "ROOT", tmp_path)
    monkeypatch.setattr("benchmarks.predict.tools.ROOT", tmp_path)
    monkeypatch.setattr(passed, "KEPT", tmp_path / "passed.json")
    monkeypatch.setattr(kept, "serves", lambda row, today, anew: not anew and row is not None and row.key == today)
    (tmp_path / "read.py").write_text("1")
    return tmp_path / "read.py"


def runs(renew: bool = False, fails: bool = False) -> bool:
    """Whether the session runs."""
    request = SimpleNamespace(config=SimpleNamespace(getoption=lambda name: renew))
    try:
        with passed.unless_passed(request, "session", ("*.py",), "compiler 1"):
            if fails:
                raise AssertionError
            return True
    except pytest.skip.Exception:
        return False


def test_a_session_runs_until_it_is_kept_and_after_a_change(file: Path) -> None:
    assert runs()
    assert runs()  # without --renew nothing is kept
    assert runs(renew=True)
    assert not runs()
    assert runs(renew=True)
    file.write_text("2")
    assert runs()


def test_a_session_that_fails_is_not_kept(file: Path) -> None:
    with pytest.raises(AssertionError):
        runs(renew=True, fails=True)
    assert runs()


def test_a_pattern_without_files_is_an_error(file: Path) -> None:
    with (
        pytest.raises(AssertionError, match="names no file"),
        passed.unless_passed(
            SimpleNamespace(config=SimpleNamespace(getoption=lambda name: False)), "session", ("*.cu",)
        ),
    ):
        pass
