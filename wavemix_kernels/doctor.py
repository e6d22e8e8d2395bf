"""What is installed here, which backend serves which op, why the others do not, and whether they compute right."""

from __future__ import annotations

import importlib
import os
import platform
import time

import torch

from wavemix_kernels import _native, backends
from wavemix_kernels._version import __version__
from wavemix_kernels.ops import OPS


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
        ("wavemix_kernels", __version__),
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


def main() -> int:
    """Prints the report; 0 where every device has a backend and every backend that claims to work does."""
    for what, value in environment():
        print(f"{what:<24} {value}")
    broken: list[str] = []
    for name in OPS:
        op = importlib.import_module(f"wavemix_kernels.ops.{name}")
        for device in _devices():
            print(f"\n{name} on {device}")
            probe = torch.empty(1, 4, 2, 2, device=device)
            for backend, entry in op.BACKENDS.items():
                if (reason := entry.why_not(probe)) is not None:
                    print(f"  {backend:<10} no    {reason}")
                    continue
                start = time.perf_counter()
                try:
                    error, bound = op.self_test(backend, device)
                except (RuntimeError, ValueError, TypeError) as failure:
                    broken.append(f"{name}/{backend} on {device}")
                    print(f"  {backend:<10} BROKEN {type(failure).__name__}: {failure}")
                    continue
                right = error <= bound
                if not right:
                    broken.append(f"{name}/{backend} on {device}")
                print(
                    f"  {backend:<10} {'works' if right else 'WRONG'} self-test error {error:.1e} (bound {bound:.1e}), "
                    f"{time.perf_counter() - start:.2f} s"
                )
            served = backends.select(name, op.BACKENDS, "auto", probe)
            print(f"  auto picks {next(k for k, v in op.BACKENDS.items() if v is served)}")
    print(f"\n{'BROKEN: ' + ', '.join(broken) if broken else 'All backends that claim to work do.'}")
    return 1 if broken else 0
