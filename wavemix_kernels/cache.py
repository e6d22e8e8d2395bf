"""Findings about the devices of this machine, in one file of the user's cache folder.

:mod:`wavemix_kernels.ops.verify` keeps there which kernels compute right on a device (section ``"verified"``), and
:mod:`wavemix_kernels.tune` which ones are fast (``"tuned"``). An entry holds for one device, driver, torch, Triton,
version and build of this package: whatever changes, the question is asked again.

The folder is ``$WAVEMIX_KERNELS_CACHE``, else ``$XDG_CACHE_HOME/wavemix_kernels``, else ``~/.cache/wavemix_kernels``.
Without a file that can be read or written everything works for the length of the process, and a warning in the log says
so once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock
import torch

from wavemix_kernels import _native, backends, log
from wavemix_kernels._version import __version__

VARIABLE = "WAVEMIX_KERNELS_CACHE"
#: The file's format. Another one is another program's, or another time's.
FORMAT = "wavemix_kernels devices 1"
SECTIONS = ("verified", "tuned")
#: Seconds to wait for another process that writes; one takes milliseconds.
PATIENCE = 10.0

#: device key -> section -> entry -> value
_Devices = dict[str, dict[str, dict[str, Any]]]


class _State:
    """This process's view of the file."""

    devices: _Devices | None = None  # its copy, once somebody asked
    failed: bool = False  # whether the file cannot be written; nobody tries again


_lock = threading.RLock()


# --- Public ------------------------------------------------------------------------------------------------


def path() -> Path:
    """The file; it need not exist.

    Raises:
        OSError: no variable names a folder, and there is no home.
    """
    if folder := os.environ.get(VARIABLE):
        return Path(folder) / "devices.json"
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if base.startswith("~"):
        raise OSError(f"the user has no home folder, and neither {VARIABLE} nor XDG_CACHE_HOME is set")
    return Path(base) / "wavemix_kernels" / "devices.json"


def read(device: torch.device, section: str) -> Mapping[str, Any]:
    """The entries of ``device`` in ``section``: name to value. The file is read once in a process; :func:`write` brings
    in what other processes wrote meanwhile.
    """
    _check(section)
    with _lock:
        devices = _copy()
        return devices.get(key(device), {}).get(section, {}) if devices else {}


def write(device: torch.device, section: str, entries: Mapping[str, Any]) -> bool:
    """Puts ``entries`` (name to JSON value; None removes the name) beside those of the file.

    Returns:
        Whether they are in the file. They hold for this process in any case.
    """
    _check(section)
    with _lock:
        _merge(_copy(), key(device), section, entries)
        if _State.failed:
            return False
        try:
            file = path()
            file.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(file.with_suffix(".lock"), timeout=PATIENCE):
                try:
                    found = _load()
                except ValueError:  # said when the copy was made
                    found = {}
                _merge(found, key(device), section, entries)
                _replace(file, json.dumps({"format": FORMAT, "devices": found}, indent=1, sort_keys=True))
        except OSError as error:
            _State.failed = True
            _warn(f"what is found out about this device is lost with the process: {error}")
            return False
        _State.devices = found
        return True


def forget() -> None:
    """Drops this process's copy: the next :func:`read` reads the file."""
    with _lock:
        _State.devices, _State.failed = None, False


def architecture(device: torch.device) -> str:
    """``"sm_90"``, ROCm's ``"gfx942"``, or ``"cpu"``."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def key(device: torch.device) -> str:
    """All that an entry depends on, in words: device, architecture, driver, torch, Triton, version and build."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _key(device)


# --- The key -----------------------------------------------------------------------------------------------


@functools.cache
def _key(device: torch.device) -> str:
    if device.type == "cuda":
        parts = [torch.cuda.get_device_name(device), architecture(device), f"driver {_driver()}"]
    else:
        parts = [_cpu_name(), _native.cpu_isa or "no compiled CPU kernels"]
    return ", ".join([*parts, f"torch {torch.__version__}", _triton(), f"wavemix_kernels {__version__} {_build()}"])


def _driver() -> str:
    """The kernel module's version; where the system does not tell, the CUDA or ROCm version that the driver serves."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().split("Kernel Module")[1].split()[0]
    except (OSError, IndexError):
        return torch.version.hip or str(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _triton() -> str:
    if backends.triton_reason() is not None:
        return "no Triton"
    import triton

    return f"Triton {triton.__version__}"


def _build() -> str:
    """Tells builds of one version apart: the compiled core, and the sources that Triton compiles."""
    digest = hashlib.sha256()
    ops = Path(__file__).parent / "ops"
    for file in [*([] if _native.core is None else [Path(_native.core.__file__)]), *sorted(ops.rglob("*.py"))]:  # type: ignore[arg-type]
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


# --- The file ----------------------------------------------------------------------------------------------


def _check(section: str) -> None:
    if section not in SECTIONS:
        raise ValueError(f"section={section!r}: expected one of {', '.join(map(repr, SECTIONS))}")


def _copy() -> _Devices:
    if _State.devices is None:
        try:
            _State.devices = _load()
        except ValueError as error:
            _State.devices = {}
            _warn(f"left out, and replaced as soon as there is something to keep: {error}")
        except OSError as error:
            _State.devices = {}
            _State.failed = True
            _warn(f"what is found out about this device is lost with the process: {error}")
    return _State.devices


def _load() -> _Devices:
    """The contents of the file; nothing where there is none.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else.
    """
    try:
        file = path()
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{file} does not say that it is {FORMAT!r}")
    if not _is_nested(content.get("devices"), 3):
        raise ValueError(f"{file} has no entries by device and section")
    return content["devices"]


def _is_nested(content: Any, depth: int) -> bool:
    """Whether it is ``depth`` dicts deep, at least."""
    return depth == 0 or (isinstance(content, dict) and all(_is_nested(value, depth - 1) for value in content.values()))


def _merge(devices: _Devices, device: str, section: str, entries: Mapping[str, Any]) -> None:
    # A new dict, since readers hold the one before.
    merged = {**devices.get(device, {}).get(section, {}), **entries}
    kept = {name: value for name, value in merged.items() if value is not None}
    devices[device] = {**devices.get(device, {}), section: kept}


def _replace(file: Path, text: str) -> None:
    """At once: a reader sees the file before or after."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".new")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(name, file)
    finally:
        Path(name).unlink(missing_ok=True)


def _warn(line: str) -> None:
    log.logger.warning("cache: %s (%s=FOLDER chooses another place)", line, VARIABLE)
