"""A kernel proves itself on this device before its first result is used.

Where :mod:`wavemix_kernels.ops.verified` does not list (operator, backend, architecture), the first call with a dtype
runs the operator's ``self_test`` in that dtype: forward and gradients against the reference in float64. The verdict is
kept in the user's cache (:mod:`wavemix_kernels.cache`) for the processes to come. A kernel that fails is not used: a
warning says so once in a process, ``"auto"`` goes on to the next backend, and a backend asked for by name raises.

``WAVEMIX_KERNELS_VERIFY=0`` trusts every kernel; ``1`` runs the test in every process, whatever list and cache say. CPU
kernels are not asked: their tests run where they are built.
"""

from __future__ import annotations

import datetime
import os
import threading
import warnings
from collections.abc import Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from wavemix_kernels import cache, log, ops
from wavemix_kernels.backends import Backend
from wavemix_kernels.ops import tuned
from wavemix_kernels.ops.common import plan, precision, selftest
from wavemix_kernels.ops.verified import VERIFIED

VARIABLE = "WAVEMIX_KERNELS_VERIFY"
#: Types of devices whose kernels are verified at first use.
DEVICES = {"cuda"}
REPORT = "please report it with the output of `python -m wavemix_kernels doctor`"

Key = tuple[int, str, torch.device, torch.dtype]


@dataclass(frozen=True)
class Verdict:
    """The outcome of a self-test: one operator, backend, device and dtype.

    Attributes:
        error: of forward and gradients, relative to the largest exact value; None where the test raised.
        bound: what rounding explains.
        fault: None where the kernel computes right, else what is wrong, in words.
        date: of the test.
    """

    error: float | None
    bound: float | None
    fault: str | None
    date: str

    @property
    def share(self) -> float:
        """The error as a share of the bound; NaN where the test raised."""
        return float("nan") if self.error is None or self.bound is None else self.error / self.bound


class _Thread(threading.local):
    testing = False  # whether this is the thread of a self-test: it must not wait for its own verdict


#: Faults of kernels, by (table of backends, backend, device, dtype); None: it computes right. The tables are
#: kept beside, so that no other one gets the address.
_faults: dict[Key, str | None] = {}
_tables: list[Mapping[str, Backend]] = []
_thread = _Thread()
_lock = threading.RLock()


def _mode() -> str:
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE}={value!r}: expected '0' or '1'")
    return value


MODE = _mode()


# --- Asked at every call ------------------------------------------------------------------------------------


def fault(table: Mapping[str, Backend], backend: str, tensor: Tensor) -> str | None:
    """The fault of an operator's kernel for a device and dtype, or None. The first time it is found out.

    Args:
        table: the operator's ``BACKENDS``.
        tensor: of the call, on a device of a type in :data:`DEVICES`.

    Raises:
        RuntimeError: it is not known yet, and cannot be found out while a CUDA graph is captured.
    """
    if backend == "reference" or torch.compiler.is_compiling():
        return None
    try:
        return _faults[id(table), backend, tensor.device, tensor.dtype]
    except KeyError:
        return _first(table, backend, tensor)


def known_fault(table: Mapping[str, Backend], backend: str, tensor: Tensor) -> str | None:
    """The fault that :func:`fault` has found, or None."""
    return _faults.get((id(table), backend, tensor.device, tensor.dtype))


def refused(devices: Container[torch.device]) -> list[str]:
    """The faults of the kernels that failed on ``devices`` so far."""
    return [fault for (_, _, device, _), fault in _faults.items() if fault is not None and device in devices]


def forget() -> None:
    """Drops the verdicts of this process: the next calls look into the list and the cache again."""
    with _lock:
        _faults.clear()


# --- The first time ----------------------------------------------------------------------------------------


def _first(table: Mapping[str, Backend], backend: str, tensor: Tensor) -> str | None:
    # A traced call's tensor is of another class, and computes nothing: the graph asks when it runs.
    if _thread.testing or type(tensor) not in (Tensor, torch.nn.Parameter):
        return None
    device, dtype = tensor.device, tensor.dtype
    op = _name_of(table)
    with _lock:
        key = id(table), backend, device, dtype
        if key in _faults:  # another thread was first
            return _faults[key]
        if MODE == "0" or (MODE == "" and (op, backend, cache.architecture(device)) in VERIFIED):
            return _remember(table, backend, device, dtype, None)
        verdict = None if MODE == "1" else _kept(op, backend, device, dtype)
        if verdict is None:
            if _capturing(device):
                _refuse_capture(op, backend, device, dtype)
            verdict = examine(op, backend, device, dtype)
        elif verdict.fault is not None:
            _warn(f"{verdict.fault} (found on {verdict.date})")
        return _remember(table, backend, device, dtype, verdict.fault)


def examine(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> Verdict:
    """Runs the self-test and says how it ended. On a GPU the verdict is kept, later calls go by it, and a warning tells
    of a failure."""
    table = ops.load(op).BACKENDS
    with _lock:
        _faults.pop((id(table), backend, device, dtype), None)
        verdict, lasting = _test(op, backend, device, dtype)
        if device.type in DEVICES and backend != "reference":
            if lasting:
                cache.write(device, "verified", {_entry(op, backend, dtype): asdict(verdict)})
            if verdict.fault is None:
                log.logger.info("verified: %s", _subject(op, backend, device, dtype))
            else:
                _warn(verdict.fault)
            _remember(table, backend, device, dtype, verdict.fault)
        return verdict


def _test(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> tuple[Verdict, bool]:
    """The verdict, and whether it holds for other processes as well."""
    subject, date = _subject(op, backend, device, dtype), datetime.date.today().isoformat()
    # A thread of its own has none of the caller's modes: no autocast, inference mode, default device or dispatch mode.
    with ThreadPoolExecutor(1, "wavemix_kernels-self-test") as pool:
        future = pool.submit(_self_test, op, backend, device, dtype)
        failure = future.exception()
    if failure is None:
        error, bound = future.result()
        right = error <= bound  # not so for NaN
        fault = None if right else f"{subject}: error {error:.1e}, where rounding explains {bound:.1e}; {REPORT}"
        return Verdict(error, bound, fault, date), True
    if not isinstance(failure, Exception):
        raise failure
    fault = f"{subject}: its self-test raised {type(failure).__name__}: {failure}; {REPORT}"
    if isinstance(failure, torch.OutOfMemoryError):
        return Verdict(None, None, f"{subject}: no memory is left to verify it: {failure}", date), False
    if device_is_lost(device):
        fault += f". No call on {device} works in this process any more; the next process will not use this kernel"
    return Verdict(None, None, fault, date), True


def _self_test(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    _thread.testing = True
    # Backward in this thread too, which may call the kernel unasked.
    one_thread = torch.autograd.set_multithreading_enabled(False)
    with one_thread, precision.products_in("ieee"), tuned.unrecorded(), _on(device):
        return selftest.run(ops.load(op).self_test, backend, device, dtype)


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def device_is_lost(device: torch.device) -> bool:
    """Whether a kernel has left the device's context unusable, as a wrong address does."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _refuse_capture(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> NoReturn:
    raise RuntimeError(
        f"{_subject(op, backend, device, dtype)}: not verified yet, and cannot be while a CUDA graph is captured; call "
        f"wavemix_kernels.warmup(model, example) before (or set {VARIABLE}=0 to trust it)"
    )


# --- Words and records -------------------------------------------------------------------------------------


def _name_of(table: Mapping[str, Backend]) -> str:
    for name in ops.OPS:
        if ops.load(name).BACKENDS is table:
            return name
    raise LookupError(f"these backends are of no operator in wavemix_kernels.ops.OPS: {', '.join(table)}")


def _subject(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    where = ""
    if device.type == "cuda":
        where = f" ({torch.cuda.get_device_name(device)}, {cache.architecture(device)})"
    return f"{op}, backend {backend!r}, {_dtype(dtype)} on {device}{where}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _entry(op: str, backend: str, dtype: torch.dtype) -> str:
    return f"{op} {backend} {_dtype(dtype)}"


def _kept(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> Verdict | None:
    entry = cache.read(device, "verified").get(_entry(op, backend, dtype))
    try:
        return None if entry is None else Verdict(**entry)
    except TypeError:
        log.logger.warning("cache: %s is no verdict; the kernel is verified again", entry)
        return None


def _remember(
    table: Mapping[str, Backend], backend: str, device: torch.device, dtype: torch.dtype, fault: str | None
) -> str | None:
    if not any(known is table for known in _tables):
        _tables.append(table)
    _faults[id(table), backend, device, dtype] = fault
    if fault is not None:
        plan.forget()
    return fault


def _warn(fault: str) -> None:
    line = f"{fault}. It is not used"
    warnings.warn(line, RuntimeWarning, stacklevel=2)
    log.logger.error(line)
