"""Findings about a device: wavemix_kernels/cache.py. The file may hold anything, and several processes may write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import filelock
import pytest
import torch

from tests.tools.helpers import ROOT
from wavemix_kernels import _native, cache

CPU = torch.device("cpu")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's, which does not exist yet."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "folder"))
    return tmp_path / "folder" / "devices.json"


def again() -> dict[str, dict[str, object]]:
    """The contents that the next process would read."""
    cache.forget()
    return {section: dict(cache.read(CPU, section)) for section in cache.SECTIONS}


def test_what_is_written_is_there_for_the_next_process(file: Path) -> None:
    assert again() == {"verified": {}, "tuned": {}}
    assert not file.exists()
    assert cache.write(CPU, "tuned", {"a": [1, 2], "b": {"c": None}})
    assert cache.write(CPU, "verified", {"a": 3})
    assert cache.write(CPU, "tuned", {"a": None, "d": 4})
    assert again() == {"verified": {"a": 3}, "tuned": {"b": {"c": None}, "d": 4}}
    assert [path.name for path in file.parent.iterdir() if path.suffix != ".lock"] == [file.name]


def test_another_build_does_not_go_by_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write(CPU, "verified", {"a": 1})
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_build", lambda: "another")
        cache._key.cache_clear()
        assert again()["verified"] == {}
        cache.write(CPU, "verified", {"a": 2})
    cache._key.cache_clear()
    assert again()["verified"] == {"a": 1}


def test_the_key_names_all_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's key has its name, architecture and driver as well."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(cache, "_driver", lambda: "550.54.15")
    key = cache.key(torch.device("cuda"))
    cache._key.cache_clear()
    assert key.startswith("Card 1, sm_90, driver 550.54.15, torch ")
    assert all(part in key for part in (torch.__version__, cache.__version__, cache._build()))
    assert _native.cpu_isa is None or _native.cpu_isa in cache.key(CPU)


@pytest.mark.parametrize("text, reason", [
    ("{", "is no JSON"), ("\x00\xff", "is no JSON"), ("[1]", "does not say that it is"),
    ('{"devices": {}}', "does not say that it is"),
    (json.dumps({"format": cache.FORMAT}), "has no entries"),
    (json.dumps({"format": cache.FORMAT, "devices": {"card": {"tuned": [1]}}}), "has no entries"),
])  # fmt: skip
def test_another_content_is_left_out_and_replaced(
    text: str, reason: str, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.parent.mkdir()
    file.write_bytes(text.encode("latin-1"))
    assert again() == {"verified": {}, "tuned": {}}
    assert cache.write(CPU, "tuned", {"a": 1})
    assert cache.write(CPU, "tuned", {"b": 2})
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"cache: left out, and replaced as soon as there is something to keep: {file} {reason}")
    assert again()["tuned"] == {"a": 1, "b": 2}


def _in_the_way(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.parent.touch()


def _a_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.mkdir(parents=True)


def _read_only(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The administrator, whom no rights hold off, meets such a system in containers.
    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(30, "Read-only file system", str(file.parent))

    monkeypatch.setattr(Path, "mkdir", refuse)


def _no_home(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)


def _somebody_writes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PATIENCE", 0.01)
    file.parent.mkdir()
    lock = filelock.FileLock(file.with_suffix(".lock"), thread_local=False)
    thread = threading.Thread(target=lock.acquire)
    thread.start()
    thread.join()
    monkeypatch.setattr(cache, "_held_by_the_test", lock, raising=False)


@pytest.mark.parametrize("trouble, reason", [
    (_in_the_way, "folder"), (_a_folder, "Is a directory"), (_read_only, "Read-only"), (_no_home, "no home folder"),
    (_somebody_writes, "could not be acquired"),
])  # fmt: skip
def test_without_a_file_results_last_as_long_as_the_process(
    trouble: object, reason: str, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trouble(file, monkeypatch)
    assert again() == {"verified": {}, "tuned": {}}
    assert not cache.write(CPU, "tuned", {"a": 1})
    assert not cache.write(CPU, "verified", {"b": 2})
    assert cache.read(CPU, "tuned") == {"a": 1}
    assert cache.read(CPU, "verified") == {"b": 2}
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("cache: what is found out about this device is lost with the process: ")
    assert reason in line
    assert cache.VARIABLE in line


def test_an_interrupted_write_leaves_the_file_before(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write(CPU, "tuned", {"a": 1})

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.write(CPU, "tuned", {"a": 2})
    assert again()["tuned"] == {"a": 1}
    assert [path.name for path in file.parent.iterdir() if path.suffix != ".lock"] == [file.name]


@pytest.mark.prove
def test_processes_that_write_at_once_lose_nothing(file: Path) -> None:
    count = 40
    program = f"""
import sys, torch
from wavemix_kernels import cache
for i in range({count}):
    assert cache.write(torch.device("cpu"), "tuned", {{f"{{sys.argv[1]}}-{{i}}": i}})
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    runs = [subprocess.Popen([sys.executable, "-c", program, name], env=environment) for name in ("a", "b", "c")]
    assert [run.wait() for run in runs] == [0, 0, 0]
    assert again()["tuned"] == {f"{name}-{i}": i for name in "abc" for i in range(count)}


def test_threads_that_write_at_once_lose_nothing(file: Path) -> None:
    def work(name: str) -> None:
        for i in range(10):
            cache.write(CPU, "tuned", {f"{name}-{i}": i})

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(again()["tuned"]) == 40


@pytest.mark.parametrize("variable, folder", [(cache.VARIABLE, ""), ("XDG_CACHE_HOME", "wavemix_kernels")])
def test_where_the_file_is(variable: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setenv(variable, str(tmp_path))
    assert cache.path() == tmp_path / folder / "devices.json"


def test_another_section_is_refused() -> None:
    with pytest.raises(ValueError, match="section='fast': expected one of 'verified', 'tuned'"):
        cache.read(CPU, "fast")
