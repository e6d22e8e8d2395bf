"""The .cu files as nvcc compiles them: PTX, and host code that a stub of the CUDA runtime serves."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import shutil
import subprocess
import sysconfig
from types import ModuleType
from typing import NamedTuple

import pytest

from benchmarks.predict import core as predicted
from benchmarks.predict.tools import ROOT, Missing, key
from tests.emulator import build as emulator

FOLDER = ROOT / "build" / "ptx"
STUB = ROOT / "benchmarks" / "predict" / "stub" / "runtime.cpp"
#: So small that common shapes are cut into several launches, as in the emulator.
MOST_TASKS, MOST_BLOCKS = 1024, 8
NVCC = ["nvcc", "-std=c++17", f"-arch=compute_{predicted.PTX}", "-cudart=none", "-Xcompiler", "-fPIC"]


class Built(NamedTuple):
    module: ModuleType
    ptx: dict[str, str]  # by source


@functools.cache
def core() -> Built:
    """`_core`'s CUDA functions, of the module that predictions compile."""
    try:
        module = predicted.load()
    except Missing as missing:
        pytest.skip(f"PTX: {missing}")
    ctypes.CDLL(module.__file__).wavemix_most(ctypes.c_int64(MOST_TASKS), ctypes.c_int64(MOST_BLOCKS))
    return Built(module, predicted.ptx())


@functools.cache
def test_kernels() -> Built:
    """Those of the emulator's own tests: right and wrong ones, and matrix products."""
    if shutil.which("nvcc") is None:
        pytest.skip("PTX: nvcc is not on PATH")
    tests = ROOT / "tests" / "emulator"
    kernels, name = [tests / "wrong_kernels.cu", tests / "mma_kernels.cu"], "_emulator_tests"
    sources = [*kernels, tests / "bindings.cpp", STUB]
    headers = [path for folder in (ROOT / "csrc", tests) for path in folder.rglob("*.*h")]
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    folder = FOLDER / f"{name}-{key([*sources, *headers], version, *NVCC)}"
    library = folder / (name + sysconfig.get_config_var("EXT_SUFFIX"))
    includes = [ROOT / "csrc", ROOT / "csrc" / "cuda", sysconfig.get_path("include")]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # parallel test processes share the folder
        if not library.is_file():
            command = [*NVCC, *(f"-I{path}" for path in includes), "--keep", f"--keep-dir={folder}", "-shared",
                       *map(str, sources), "-o", str(library)]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                pytest.fail(f"PTX: {' '.join(command)} failed:\n{(done.stdout + done.stderr)[-6000:]}")
    return Built(
        emulator.load(folder, name), {path.stem: (folder / f"{path.stem}.ptx").read_text() for path in kernels}
    )
