"""The .cu files as nvcc compiles them: PTX beside host code, which a stub of the CUDA runtime serves."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from benchmarks.predict.tools import ROOT, key
from tests.emulator import build as emulator

FOLDER = ROOT / "build" / "ptx"
CSRC = ROOT / "csrc"
INCLUDES = [f"-I{path}" for path in (CSRC, CSRC / "cuda", CSRC / "include")]
#: So small that common shapes are cut into several launches, as in the emulator.
DEFINES = ["-DWAVEMIX_WITH_CPU=0", "-DWAVEMIX_WITH_CUDA=1", '-DWAVEMIX_BUILD_NOTE="executed"',
           '-DWAVEMIX_CUDA_ARCHS="executed"', "-DWAVEMIX_MAX_TASKS=1024", "-DWAVEMIX_MAX_BLOCKS=8"]  # fmt: skip
NVCC = ["nvcc", "-std=c++17", "-arch=compute_80", "-cudart=none", "-Xcompiler", "-fPIC"]
CXX = ["g++", "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden"]


class Built(NamedTuple):
    module: ModuleType
    ptx: dict[str, str]  # by source


@functools.cache
def core() -> Built:
    """`_core`'s CUDA functions."""
    bindings = CSRC / "emulator" / "bindings.cpp"
    return _built("_executed", bindings, sorted((CSRC / "cuda").rglob("*.cu")), ["-DWAVEMIX_MODULE_NAME=_executed"])


@functools.cache
def test_kernels() -> Built:
    """Those of the emulator's own tests: right and wrong ones, and matrix products."""
    folder = ROOT / "tests" / "emulator"
    kernels = [folder / "wrong_kernels.cu", folder / "mma_kernels.cu"]
    return _built("_emulator_tests", folder / "bindings.cpp", kernels, [])


def _built(name: str, bindings: Path, kernels: list[Path], defines: list[str]) -> Built:
    pybind11 = pytest.importorskip("pybind11", reason="PTX: pybind11 is not installed")
    include = emulator.cuda_include()
    for tool in ("nvcc", "g++"):
        if shutil.which(tool) is None or include is None:
            pytest.skip(f"PTX: {tool} is not on PATH, or CUDA's headers are missing")
    headers = [
        path
        for pattern in ("*.h", "*.cuh", "bindings/*.cpp")
        for path in (*CSRC.rglob(pattern), *Path(__file__).parent.parent.rglob(pattern))
    ]
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    sources = [*kernels, bindings, Path(__file__).with_name("runtime.cpp")]
    folder = FOLDER / f"{name}-{key([*sources, *headers, Path(__file__)], version)}"
    library = folder / (name + sysconfig.get_config_var("EXT_SUFFIX"))
    host = [*CXX, *INCLUDES, *DEFINES, *defines, f"-I{include}", f"-I{pybind11.get_include()}",
            f"-I{sysconfig.get_path('include')}"]  # fmt: skip

    def compiled(source: Path) -> str:
        target = folder / f"{source.name}.o"
        if source.suffix == ".cu":
            _run([*NVCC, *INCLUDES, *DEFINES, "--keep", f"--keep-dir={folder}", "-c", str(source), "-o", str(target)])
        else:
            _run([*host, "-c", str(source), "-o", str(target)])
        return str(target)

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # parallel test processes share the folder
        if not library.is_file():
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(compiled, sources))
            _run(["g++", "-shared", *objects, "-o", str(library)])
    return Built(
        emulator.load(folder, name), {path.stem: (folder / f"{path.stem}.ptx").read_text() for path in kernels}
    )


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.fail(f"PTX: {' '.join(command)} failed:\n{(done.stdout + done.stderr)[-6000:]}")
