"""Facts that torch.compile is told, without importing the compiler: that takes as long as torch itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant_result(function: F) -> F:
    """``torch.compiler.assume_constant_result``: the function runs while a graph is traced, which holds its result."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
