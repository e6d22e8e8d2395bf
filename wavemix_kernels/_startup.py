"""Stops ``import wavemix_kernels`` with one clear line where it cannot work. ``__init__`` imports this file first."""

from __future__ import annotations

import re
import sys

#: The first torch whose torch.compile traces the blocks whole.
OLDEST = (2, 9)


def stop(error: Exception) -> BaseException:
    """The exception to raise: ``error``, or its text alone for users of ``python -m wavemix_kernels``."""
    return SystemExit(f"{type(error).__name__}: {error}") if sys.argv[0] == "-m" else error


def _check_torch() -> None:
    needed = f"wavemix_kernels needs PyTorch {OLDEST[0]}.{OLDEST[1]} or newer"
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that torch links to is missing
        raise stop(ImportError(f"{needed}, and torch does not import here ({error}): pip install torch")) from error
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found is not None and tuple(map(int, found.groups())) < OLDEST:
        raise stop(ImportError(f"{needed}, this is {torch.__version__}: pip install --upgrade torch"))


_check_torch()
