"""Shared by the launches of every kernel family."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from wavemix_kernels import _native
from wavemix_kernels.ops.common import chips

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
        constants = chips.for_chip(self.constants)
        with _native.on(like.device):
            made = self.kernel[self.grid](*self.args, **constants)
            if (recorder := _native.recorder()) is not None:
                if made is None:
                    recorder.launched(self.kernel, self.grid, self.args, constants)
                else:
                    recorder.launched_compiled(made, lambda: self.kernel[self.grid](*self.args, **constants))
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
