"""The log of what runs and why nothing faster does: logger ``wavemix_kernels``, level INFO.

``WAVEMIX_KERNELS_LOG=1`` prints it on stderr. Without the variable the logger does what the program's own logging
configuration says.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Hashable

import torch
from torch import nn

from wavemix_kernels import _startup
from wavemix_kernels.tracing import constant_result

VARIABLE = "WAVEMIX_KERNELS_LOG"
#: Calls that are told apart; later ones are not logged.
MOST = 10_000

logger = logging.getLogger("wavemix_kernels")
_seen: set[Hashable] = set()
_told: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def install() -> None:
    """Does what the variable says.

    Raises:
        ValueError: it is neither empty, 0 nor 1.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise _startup.stop(ValueError(f"{VARIABLE}={value!r}: expected '0' or '1'"))
    if value == "1":
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


install()


def enabled() -> bool:
    return logger.isEnabledFor(logging.INFO)


def once(key: Hashable, message: Callable[[], str]) -> None:
    """Logs ``message()`` unless ``key`` was logged before."""
    if key in _seen or len(_seen) > MOST:
        return
    _seen.add(key)
    logger.info(message() if len(_seen) <= MOST else f"more than {MOST} different calls: later ones are not logged")


def fallback(module: nn.Module, reason: str | None, instead: str = "plain modules") -> bool:
    """Whether ``module`` runs as ``instead``: where there is a reason. It is logged once per module and reason, while
    torch.compile traces once per class and reason."""
    if reason is None:
        return False
    if torch.compiler.is_compiling():
        _at_trace_time(f"{type(module).__name__}: runs as {instead}: {reason}")
    elif enabled() and reason not in (told := _told.setdefault(module, set())):
        told.add(reason)
        logger.info("%s: runs as %s: %s", type(module).__name__, instead, reason)
    return True


@constant_result
def _at_trace_time(line: str) -> bool:
    if enabled():
        once(line, lambda: line)
    return True
