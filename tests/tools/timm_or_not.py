"""Why timm cannot be had here, or None: what the tests that need it are skipped with."""

from __future__ import annotations

import functools

import pytest


@functools.cache
def reason() -> str | None:
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as error:  # torchvision of another torch raises RuntimeError
        return f"timm does not import here: {type(error).__name__}: {error}"
    return None


needs_timm = pytest.mark.skipif(reason() is not None, reason=str(reason()))
