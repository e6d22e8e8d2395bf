"""Shared by the tools' tests: marks for packages that may be missing, and a Python of its own."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


def needs(extra: str, packages: Iterable[str]) -> pytest.MarkDecorator:
    missing = ", ".join(name for name in packages if importlib.util.find_spec(name) is None)
    return pytest.mark.skipif(bool(missing), reason=f'{missing} missing: pip install -e ".[{extra}]"')


@functools.cache
def why_no_timm() -> str | None:
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as error:  # torchvision of another torch raises RuntimeError
        return f"timm does not import here: {type(error).__name__}: {error}"
    return None


needs_timm = pytest.mark.skipif(why_no_timm() is not None, reason=str(why_no_timm()))


def python(*arguments: str, cwd: Any = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs an interpreter that finds this checkout."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
