"""The programs that compile and disassemble, and the folder that keeps what they made."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "predict"


class Missing(RuntimeError):
    """A program that predictions need is not here; the message says which, and how to get it."""


@functools.cache
def toolkit() -> Path | None:
    """The CUDA toolkit's folder as nvcc itself names it (nvcc on PATH may be a wrapper), or None."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    command = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    plan = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    match = re.search(r"^#\$ TOP=(.*)$", plan, re.MULTILINE)
    return Path(match[1].strip()).resolve() if match else None


def program(name: str) -> str:
    """``cuobjdump`` or ``nvdisasm``: on PATH, in the toolkit, or as Triton's package carries it.

    Raises:
        Missing: none has it.
    """
    if (found := shutil.which(name)) is not None:
        return found
    places = [top / "bin"] if (top := toolkit()) is not None else []
    if (triton := importlib.util.find_spec("triton")) is not None:
        places += [Path(place) / "backends/nvidia/bin" for place in triton.submodule_search_locations or []]
    for place in places:
        if (place / name).is_file():
            return str(place / name)
    raise Missing(f"{name} is neither on PATH, nor in the toolkit, nor in a triton package: pip install triton")


def run(command: Iterable[object], **options: object) -> str:
    """Runs a program and returns its output, errors included.

    Raises:
        RuntimeError: it failed; the message has its last words.
    """
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    return done.stdout + done.stderr


def key(files: Iterable[Path], *versions: object) -> str:
    """Changes with any of the files, their names and the versions."""
    digest = hashlib.sha256(repr(versions).encode())
    for file in sorted(files):
        digest.update(f"\0{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def locked(name: str) -> Iterator[Path]:
    """The cache folder, for one process at a time under this name."""
    (CACHE / "locks").mkdir(parents=True, exist_ok=True)
    with open(CACHE / "locks" / name, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield CACHE
