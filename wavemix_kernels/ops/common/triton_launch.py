"""Shared by the launches of every kernel family."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Called with every kernel that was launched: what Triton compiled, or None in its interpreter.
observers: list[Callable[[Any], None]] = []


class Launch(NamedTuple):
    """A kernel with all it takes: ``kernel[grid](*args, **constants)`` runs it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]

    def run(self, like: Tensor) -> None:
        """On the device of ``like``; an empty grid is nothing to do."""
        if 0 in self.grid:
            return
        with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
            made = self.kernel[self.grid](*self.args, **self.constants)
        if observers:
            for observe in observers:
                observe(made)


def cover(columns: int, least: int = 16) -> tuple[int, int]:
    """Widths of the two tiles that hold some columns with least padding, powers of two from `least` on (16 is
    ``tl.dot``'s smallest): 144 as 128 + 16. The second is 0 where one does as well; both are for no columns."""
    if columns == 0:
        return 0, 0
    whole = max(least, pow2_at_least(columns))
    rest = max(least, pow2_at_least(columns - whole // 2))
    return (whole // 2, rest) if rest < whole // 2 else (whole, 0)


def pow2_at_least(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def input_precision() -> str:
    """How ``tl.dot`` multiplies fp32: in TF32 where torch's own setting for matrix products says so."""
    matmul: Any = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 on; reading the older flag beside it is an error there
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"
