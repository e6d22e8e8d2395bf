"""The environment of a run: software, hardware, and the speeds that this machine reaches in the same run."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from wavemix_kernels import _native
from wavemix_kernels.clock import Effort, clock_for, interleave, quantile

from . import photographs

PACKAGES = ("torch", "triton", "numpy", "pytorch_wavelets", "PyWavelets", "wavemix-kernels")


def environment(device: torch.device) -> dict[str, Any]:
    """Everything needed to judge or repeat a run, and nothing that names a host or a path."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cpu_kernels": _native.cpu_isa,  # the instruction set of ours
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device.type),
        "inputs": photographs.source(),
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "gpu_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return facts


# Variables that change what is measured.
_SETTINGS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "WAVEMIX_KERNELS_BACKEND",
    "TRITON_INTERPRET",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TRIM_THRESHOLD_",
)


def _version(package: str) -> str | None:
    if package == "torch":
        return str(torch.__version__)  # with the build, as in 2.9.0+cu130
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout that holds these benchmarks; None where they are installed without one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    commit = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    if commit is None:
        return None
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return commit + ("-modified" if changed else "")


def _driver() -> str | None:
    answer = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return answer.splitlines()[0] if answer else None


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def copy_bandwidth(device: torch.device, size: int = 64 << 20) -> dict[str, float]:
    """GB/s of a copy of `size` bytes, read and write both counted.

    ``reused`` copies into memory that was written before. ``fresh`` copies into memory just allocated; on a CPU a
    large allocation is new pages from the system, each faulted in at its first write, and a function that returns
    a new tensor pays for that.
    """
    source = torch.ones(size // 4, device=device)
    target = torch.ones_like(source)
    samples: dict[str, list[float]] = {}
    effort = Effort(seconds=1.0, fewest=5, most=50)
    interleave({"reused": lambda: target.copy_(source), "fresh": source.clone}, clock_for(device), effort, samples)
    return {name: 2 * size / quantile(seconds, 0.5) / 1e9 for name, seconds in samples.items()}


#: Rows and columns of the matrices of :func:`matmul_rate`.
MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, the arithmetic roof for blocks that are mostly convolutions."""
    side = MATMUL_SIDE.get(device.type, MATMUL_SIDE["cpu"])
    left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    samples: dict[str, list[float]] = {}
    interleave({"matmul": lambda: left @ right}, clock_for(device), Effort(0.5, 3, 20), samples)
    return 2 * side**3 / quantile(samples["matmul"], 0.5)
