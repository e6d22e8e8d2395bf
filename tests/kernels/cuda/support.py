"""Shared by tests of the emulated CUDA kernels: orders of threads, a sanitized Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.emulator import build

#: Orders of the threads of a block, as WAVEMIX_EMULATOR_ORDER takes them.
ORDERS = ("forward", "reverse", "7")


def sanitized_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python on the emulator's sanitized build. torch allocates every tensor to the byte, by malloc's family; its C++
    exceptions need libstdc++ beside the sanitizers' runtime from the start."""
    gcc = shutil.which("gcc") or "g++"
    asked = ([gcc, f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so.6"))
    paths = [subprocess.run(a, capture_output=True, text=True, check=True).stdout.strip() for a in asked]
    if not all(map(os.path.isabs, paths)):
        pytest.skip(f"{gcc} comes without AddressSanitizer's runtime (libasan.so)")
    environment = os.environ | {
        "LD_PRELOAD": " ".join(paths), build.VARIABLE: build.ADDRESS_AND_UNDEFINED, "OMP_NUM_THREADS": "1",
        "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1",  # leaks: Python's own allocations
    }  # fmt: skip
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=build.ROOT, check=False)
