"""The library of operators, in which each implementation is a :func:`wavemix_kernels.ops.tuned.unit`, and
goes by a :mod:`plan <wavemix_kernels.ops.common.plan>`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from wavemix_kernels.ops import tuned
from wavemix_kernels.ops.common import plan


class Library(torch.library.Library):
    """Operators ``wavemix_kernels::*``.

    Args:
        kind: "FRAGMENT", or "DEF" in the one place that begins the library.
    """

    def __init__(self, kind: str = "FRAGMENT") -> None:
        super().__init__("wavemix_kernels", kind)

    def impl(self, op_name: str, fn: Callable[..., Any], dispatch_key: str = "", **options: Any) -> None:
        if dispatch_key == "CompositeExplicitAutograd":
            fn = plan.operator(op_name, tuned.unit(op_name, fn))
        super().impl(op_name, fn, dispatch_key, **options)
