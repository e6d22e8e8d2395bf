"""Reports what is installed here, which backend serves which op, why others do not, whether they compute right, and
what to do next.

On a GPU the verdicts are kept for the processes to come (:mod:`wavemix_kernels.ops.verify`).
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from wavemix_kernels import _native, backends, cache, ops
from wavemix_kernels._version import __version__
from wavemix_kernels.ops import choose, verify

NO_KERNELS = "-"
#: Dtypes that users run. A kernel in float64 is verified at first use.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found.append(torch.device("cuda", torch.cuda.current_device()))
    return found


def _triton_version() -> str:
    if (reason := backends.triton_reason()) is not None:
        return reason
    import triton

    return f"{triton.__version__}{' (interpreter)' if backends.triton_interpreted() else ''}"


def environment() -> list[tuple[str, str]]:
    """(what, value) lines of the installation."""
    lines = [
        ("wavemix_kernels", f"{__version__} in {Path(__file__).parent}"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("triton", _triton_version()),
        ("compiled core", _native.core_error or _core()),
        (backends.VARIABLE, os.environ.get(backends.VARIABLE) or "not set (auto)"),
        (verify.VARIABLE, os.environ.get(verify.VARIABLE) or "not set (kernels that no GPU of the kind has verified)"),
        ("cache", _cache()),
    ]
    if not torch.cuda.is_available():
        lines.append(("GPU", _why_no_gpu()))
    for device in _devices()[1:]:
        major, minor = torch.cuda.get_device_capability(device)
        lines.append((str(device), f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"))
    return lines


def _core() -> str:
    core: Any = _native.core
    threads = "" if core.OPENMP else ", one thread: built without OpenMP"
    return f"CPU kernels ({_native.cpu_isa or 'none that run here'}{threads}); {core.BUILD_NOTE}"


def _why_no_gpu() -> str:
    """torch's own words: no driver, one too old for this build, or a build for CPUs."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"none: torch {torch.__version__} is built for CPUs"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"none: {' '.join(str(error).split())}"
    return "none: torch sees no device"


def _cache() -> str:
    try:
        return str(cache.path())
    except OSError as error:
        return f"none: {error}"


def _examine(name: str, backend: str, device: torch.device) -> tuple[str, str | None, list[str]]:
    """(cell of the table, why the backend does not serve its dtype, what is wrong with it)."""
    table = ops.load(name).BACKENDS
    if backend not in table:
        return NO_KERNELS, None, []
    one = table[backend]
    reasons = {
        dtype: one.why_not(torch.empty(one.example, device=device, dtype=dtype))
        for dtype in dict.fromkeys((one.dtype, *DTYPES))
    }
    if reasons[one.dtype] is not None:
        return "no", reasons[one.dtype], []
    verdicts = [verify.examine(name, backend, device, dtype) for dtype, reason in reasons.items() if reason is None]
    faults = [verdict.fault for verdict in verdicts if verdict.fault is not None]
    if faults:
        return "BROKEN" if any(verdict.error is None for verdict in verdicts) else "WRONG", None, faults
    return f"ok {max(verdict.share for verdict in verdicts):.0%}", None, []


def _example(device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(1, 4, 2, 2, device=device, dtype=dtype)


def _driver() -> bool:
    """Whether an NVIDIA driver is here, whatever torch makes of it."""
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()


def advice() -> list[str]:
    """The next steps on this machine, a line each; the core's own error is told before."""
    core, cuda = _native.core, _native.cuda_core
    lines = []
    if core is not None and (better := core.CPU_ISAS_HERE[0]) not in core.CPU_ISAS and _native.cpu_isa is not None:
        built = ", ".join(core.CPU_ISAS)
        lines.append(f"this CPU has {better}, the CPU kernels were built for {built}: build here by `{_native.AGAIN}`")
    if core is not None and not core.OPENMP:
        lines.append(
            f"the CPU kernels run on one thread: install OpenMP for your compiler (clang: libomp), `{_native.AGAIN}`"
        )
    if not torch.cuda.is_available():
        if _driver() and torch.version.cuda is None and torch.version.hip is None:
            lines.append(f"a GPU is here, but torch {torch.__version__} is built for CPUs: install torch's CUDA build")
        elif _driver():
            lines.append(f"a GPU is here, but torch does not see it: {_why_no_gpu().removeprefix('none: ')}")
    elif torch.version.cuda is not None:
        arch = "{}{}".format(*torch.cuda.get_device_capability())
        if core is not None and cuda is None:
            lines.append(f"Triton serves the GPU alone: for the CUDA kernels put nvcc on PATH, `{_native.AGAIN}`")
        elif (reason := _native.cuda_reason()) is not None:
            lines.append(reason)
        elif cuda is not None and arch not in cuda.CUDA_ARCHS.split():
            lines.append(
                "the first CUDA kernel waits for the driver to compile it for this GPU: "
                f"`WAVEMIX_KERNELS_CUDA_ARCHS={arch} {_native.AGAIN}` saves that"
            )
        if (reason := backends.triton_reason()) is not None:
            lines.append(reason)
        lines.append("let your GPU choose: `python -m wavemix_kernels tune MODEL` measures the kernels of a model")
    if not lines and core is not None:
        lines.append(
            "`wavemix_kernels.accelerate(model)`; `python -m wavemix_kernels bench --quick` shows the speed here"
        )
    return lines


def main() -> int:
    """Prints the report; 0 where the compiled core is there and every backend that claims to work does."""
    for what, value in environment():
        print(f"{what:<24} {value}")
    print(
        "\nForward and gradients of every op against the float64 reference, in float32, float16 and bfloat16 (ok, and "
        "the largest error as a share of what rounding may do):"
    )
    names = [name for name in backends.NAMES if name != "auto"]
    broken: list[str] = []
    absent: set[str] = set()
    for device in _devices():
        reasons: dict[str, list[str]] = {}
        print(f"\n{f'on {device}':<17}" + "".join(f"{name:<11}" for name in names) + "auto takes")
        for name in ops.OPS:
            row = f"{name:<17}"
            for backend in names:
                cell, reason, faults = _examine(name, backend, device)
                row += f"{cell:<11}"
                if reason is not None:
                    reasons.setdefault(f"{backend}: {reason}", []).append(name)
                broken += faults
                absent |= {cell} & {NO_KERNELS}
            print(row + choose.pick(name, ops.load(name).BACKENDS, "auto", _example(device)), flush=True)
        for reason, concerned in reasons.items():
            print(f"  no, {reason}{'' if len(concerned) > 1 else f' ({concerned[0]})'}")
    if absent:
        print(f"  {NO_KERNELS}, there are no such kernels: the next backend that serves takes the op")
    print()
    for line in broken:
        print(f"BROKEN: {line}")
    if (missing := _native.cpu_reason()) is not None:
        print(f"MISSING: {missing}")
    if not broken and missing is None:
        print("Every backend that is available here computes right.")
    print(*(f"Next: {line}" for line in advice()), sep="\n")
    return 1 if broken or missing is not None else 0
