"""The requirements of a run, checked before anything starts, each with the line that installs it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.gpu.jobs import search_path

#: The words in a job's `needs`, with their meanings.
PURPOSES = {
    "all": "everything",
    "tests": "the parity tests",
    "nvcc": "the CUDA kernels",
    "triton": "the Triton kernels",
    "compute-sanitizer": "the sanitizers",
    "extras": "upstream's timings, inputs, pictures, and (PyWavelets) parity of wavelets; the rest runs without",
}


@dataclass(frozen=True)
class Requirement:
    """One thing to look for.

    Attributes:
        need: what cannot run without it, of :data:`PURPOSES`.
        found: version or place, or None.
        install: the line that installs it.
    """

    name: str
    need: str
    found: str | None
    install: str


@dataclass(frozen=True)
class Gpu:
    """The device as torch sees it."""

    name: str
    arch: str
    torch: str


def _package(name: str, least: str = "0") -> str | None:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
    return version if _numbers(version) >= _numbers(least) else None


def _numbers(version: str) -> list[int]:
    return [int("".join(filter(str.isdigit, part)) or 0) for part in version.split("+")[0].split(".")[:3]]


def _program(name: str) -> str | None:
    return shutil.which(name, path=search_path())


def cuda_tool(name: str) -> str | None:
    """Path of a program of the CUDA toolkit, looked for where setup.py looks."""
    homes = [os.environ[v] for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)] + ["/usr/local/cuda"]
    places = [Path(home, folder, name) for home in homes for folder in ("bin", "compute-sanitizer")]
    return _program(name) or next((str(place) for place in places if shutil.which(place)), None)


def _compiler() -> str | None:
    return next(filter(None, map(_program, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)


_LOOK_AT_GPU = """
import json, torch
if not torch.cuda.is_available():
    raise SystemExit(f"torch {torch.__version__} sees no NVIDIA GPU on this machine")
arch = "".join(map(str, torch.cuda.get_device_capability()))
torch.ones(1, device="cuda").sum().item()
print(json.dumps({"name": torch.cuda.get_device_name(), "arch": arch, "torch": torch.__version__}))
"""


def find_gpu(python: str = sys.executable) -> Gpu | str:
    """The GPU, or why there is none, in one line. In a process of its own: the run itself stays off the device."""
    done = subprocess.run([python, "-c", _LOOK_AT_GPU], capture_output=True, text=True)
    if done.returncode == 0:
        return Gpu(**json.loads(done.stdout.splitlines()[-1]))
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"looking for a GPU ended with status {done.returncode}"


def look() -> list[Requirement]:
    """Everything but the GPU, found or not."""
    compiled = 'pip install "cmake>=3.24" ninja setuptools'
    toolkit = "the CUDA toolkit (apt install cuda-toolkit-13-0), or CUDA_HOME=/path/to/it"
    return [
        Requirement("torch >= 2.9", "all", _package("torch", "2.9"),
                    "pip install torch --index-url https://download.pytorch.org/whl/cu130"),
        Requirement("numpy", "all", _package("numpy"), "pip install numpy"),
        Requirement("pytest >= 8", "tests", _package("pytest", "8"), 'pip install "pytest>=8"'),
        Requirement("triton >= 3.5", "triton", _package("triton", "3.5"), 'pip install "triton>=3.5"'),
        Requirement("nvcc", "nvcc", cuda_tool("nvcc"), toolkit),
        Requirement("a C++ compiler", "nvcc", _compiler(), "apt install g++"),
        Requirement("cmake", "nvcc", _program("cmake"), compiled),
        Requirement("ninja", "nvcc", _program("ninja"), compiled),
        Requirement("setuptools", "nvcc", _package("setuptools"), compiled),
        Requirement("compute-sanitizer", "compute-sanitizer", cuda_tool("compute-sanitizer"), toolkit),
        *(
            Requirement(package, "extras", importlib.util.find_spec(module) and "found", f'pip install "{package}"')
            for module, package in (
                ("pytorch_wavelets", "pytorch_wavelets"), ("pywt", "PyWavelets"), ("skimage", "scikit-image"),
                ("matplotlib", "matplotlib"), ("rich", "rich"),
            )
        ),
    ]  # fmt: skip


def missing(requirements: Sequence[Requirement]) -> dict[str, str]:
    """Need -> what is missing for it, in words; without those that a run does without."""
    found: dict[str, list[str]] = {}
    for one in requirements:
        if one.found is None and one.need != "extras":
            found.setdefault(one.need, []).append(one.name)
    return {need: f"{' and '.join(names)} missing" for need, names in found.items()}


def listing(requirements: Sequence[Requirement], say: Callable[[str], Any]) -> None:
    """A line for each."""
    width = max(len(one.name) for one in requirements)
    for one in requirements:
        if one.found is not None:
            say(f"  {one.name:<{width}}  {one.found}")
        else:
            say(f"  {one.name:<{width}}  MISSING, for {PURPOSES[one.need]}: {one.install}")
