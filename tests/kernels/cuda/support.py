"""Shared by tests of the emulated CUDA kernels: orders of threads, huge strides, a sanitized Python."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from tests.emulator import build

#: Orders of the threads of a block, as WAVEMIX_EMULATOR_ORDER takes them.
ORDERS = ("forward", "reverse", "7")
HUGE = 2**31 + 64  # elements; a multiple of every word


@contextmanager
def huge_view(shape: tuple[int, ...], position: int) -> Iterator[np.ndarray]:
    """float16 with one stride beyond 2^31 elements, in memory of which only the touched pages exist."""
    extent = shape[position]
    strides, step = [0] * len(shape), 1
    for i in reversed(range(len(shape))):
        if i != position:
            strides[i], step = step, step * shape[i]
    strides[position] = HUGE
    size = 2 * (HUGE * (extent - 1) + step)
    reserve = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE; named since Python 3.13
    with mmap.mmap(-1, size, flags=reserve) as memory:
        huge = np.ndarray(shape, np.float16, memory, strides=[2 * s for s in strides])
        try:
            yield huge
        finally:
            del huge  # a mapping with a live view cannot be closed


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
