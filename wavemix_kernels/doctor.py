"""Reports what is installed here, which backend serves which op, why others do not, and whether they compute right."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from types import ModuleType

import torch

from wavemix_kernels import _native, backends, ops
from wavemix_kernels._version import __version__
from wavemix_kernels.ops import choose

NO_KERNELS = "-"


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
    core = _native.core
    lines = [
        ("wavemix_kernels", f"{__version__} in {Path(__file__).parent}"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("triton", _triton_version()),
        ("compiled core", _native.core_error or f"CPU kernels ({core.cpu_isa()}); {core.BUILD_NOTE}"),  # type: ignore[union-attr]
        (backends.VARIABLE, os.environ.get(backends.VARIABLE) or "not set (auto)"),
    ]
    for device in _devices()[1:]:
        major, minor = torch.cuda.get_device_capability(device)
        lines.append((str(device), f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"))
    return lines


def _examine(op: ModuleType, backend: str, device: torch.device) -> tuple[str, str | None, str | None]:
    """(cell of the table, why the backend does not serve, what is wrong with it)."""
    if backend not in op.BACKENDS:
        return NO_KERNELS, None, None
    if (reason := op.BACKENDS[backend].why_not(torch.empty(1, 4, 2, 2, device=device))) is not None:
        return "no", reason, None
    try:
        error, bound = op.self_test(backend, device)
    except (RuntimeError, ValueError, TypeError) as failure:
        return "BROKEN", None, f"{type(failure).__name__}: {failure}"
    if error <= bound:
        return f"ok {error / bound:.0%}", None, None
    return "WRONG", None, f"error {error:.1e}, where rounding explains {bound:.1e}"


def main() -> int:
    """Prints the report; 0 where the compiled core is there and every backend that claims to work does."""
    for what, value in environment():
        print(f"{what:<24} {value}")
    print(
        "\nForward and gradients of every op against the float64 reference (ok, and its error as a share of what "
        "rounding may do):"
    )
    names = [name for name in backends.NAMES if name != "auto"]
    broken: list[str] = []
    absent: set[str] = set()
    for device in _devices():
        reasons: dict[str, list[str]] = {}
        print(f"\n{f'on {device}':<17}" + "".join(f"{name:<11}" for name in names) + "auto takes")
        for name in ops.OPS:
            op = ops.load(name)
            row = f"{name:<17}"
            for backend in names:
                cell, reason, fault = _examine(op, backend, device)
                row += f"{cell:<11}"
                if reason is not None:
                    reasons.setdefault(f"{backend}: {reason}", []).append(name)
                if fault is not None:
                    broken.append(f"{name}, {backend} on {device}: {fault}")
                absent |= {cell} & {NO_KERNELS}
            print(row + choose.pick(name, op.BACKENDS, "auto", torch.empty(1, 4, 2, 2, device=device)), flush=True)
        for reason, concerned in reasons.items():
            print(f"  no, {reason}{'' if len(concerned) > 1 else f' ({concerned[0]})'}")
    if absent:
        print(f"  {NO_KERNELS}, there are no such kernels: the next backend that serves takes the op")
    print()
    for line in broken:
        print(f"BROKEN: {line}")
    if _native.core_error is not None:
        print(f"MISSING: {_native.core_error}")
    if not broken and _native.core_error is None:
        print("Every backend that is available here computes right.")
    return 1 if broken or _native.core_error is not None else 0
