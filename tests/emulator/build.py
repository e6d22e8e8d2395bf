"""Builds the CUDA sources for the host (csrc/emulator), once per session and incrementally between sessions."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.predict.tools import ROOT, run, toolkit

#: The sanitizers of the emulated core that the tests of this process load: none, or ADDRESS_AND_UNDEFINED.
VARIABLE = "WAVEMIX_EMULATOR_SANITIZE"
ADDRESS_AND_UNDEFINED = "address,undefined"


def cuda_include() -> Path | None:
    """A folder with CUDA's headers: the toolkit's, else Triton's own copy, else that of NVIDIA's wheels."""
    candidates = []
    if (top := toolkit()) is not None:
        candidates += [top / "include", *sorted(top.glob("targets/*/include"))]
    for package, folder in (("triton", "backends/nvidia/include"), ("nvidia", "cu13/include")):
        spec = importlib.util.find_spec(package)  # finds it without importing it
        places = spec.submodule_search_locations if spec else None
        candidates += [Path(place) / folder for place in places or []]
    needed = ("cuda_runtime_api.h", "cuda_fp16.h", "cuda_bf16.h", "crt/host_defines.h")
    return next((path for path in candidates if all((path / name).is_file() for name in needed)), None)


def compiler_version() -> str:
    return run(["g++", "--version"]) if shutil.which("g++") else ""


@functools.cache
def build(sanitize: str = "none") -> Path:
    """The folder with modules `_emulated` and `_emulator_tests`; skips with the reason where that cannot be."""
    include = cuda_include()
    if include is None:
        pytest.skip("emulator: no CUDA headers; the toolkit, triton or nvidia-cuda-runtime + nvidia-cuda-crt have them")
    for tool in ("cmake", "ninja", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"emulator: {tool} is not on PATH")

    folder = ROOT / "build" / f"emulator-{sanitize.replace(',', '-')}"
    folder.mkdir(parents=True, exist_ok=True)
    configure = [
        *("cmake", "-S", str(ROOT / "tests" / "emulator"), "-B", str(folder), "-G", "Ninja"),
        f"-DWAVEMIX_SANITIZE={sanitize}",
        f"-DWAVEMIX_CUDA_INCLUDE={include}",
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DCMAKE_CXX_COMPILER=g++",
    ]
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # parallel test processes share the folder
        for command in (configure, ["ninja", "-C", str(folder)]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                pytest.fail(f"emulator: {' '.join(command)} failed:\n{(done.stdout + done.stderr)[-6000:]}")
    return folder


def load(folder: Path, name: str) -> ModuleType:
    """The extension module `name` of a build folder, without touching sys.path."""
    (path,) = (p for s in importlib.machinery.EXTENSION_SUFFIXES if (p := folder / (name + s)).is_file())
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def emulated_core() -> ModuleType:
    """`_core`'s CUDA functions, on host memory."""
    return load(build(os.environ.get(VARIABLE, "none")), "_emulated")


def launches(core: ModuleType) -> list[str]:
    """The emulated launches since the last call, by name."""
    ask = ctypes.CDLL(core.__file__).wavemix_emulator_launches
    ask.restype = ctypes.c_char_p
    return ask().decode().splitlines()


if __name__ == "__main__":
    try:
        print(f"emulator: {build()}")
    except pytest.skip.Exception as reason:
        print(reason)
