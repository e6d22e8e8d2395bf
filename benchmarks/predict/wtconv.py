"""The cases of WTConv's operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .case import Case, operator, sized, vector
from .record import image


def _wtconv(
    shape: tuple[int, int, int, int], levels: int, size: int, dtype: torch.dtype, last: bool, backward: bool
) -> Callable[[], Any]:
    def run() -> Any:
        x, wide = image(shape, dtype, last), 4 * shape[1]
        taps = [torch.empty(wide, 1, size, size, dtype=dtype) for _ in range(levels)]
        scales = [vector(wide) for _ in range(levels)]
        if backward:
            return operator("wtconv_backward")(image(shape, dtype, last), x, taps, scales, "triton")
        return operator("wtconv")(x, image(shape, dtype, last), taps, scales, False, "triton")

    return run


def wtconv_cases() -> Iterator[Case]:
    """A stage of WTConv-ConvNeXt-T."""
    shape = (64, 96, 56, 56)
    for backward in (False, True):
        what = f"{'gradients' if backward else 'forward'} 5x5 L5 nchw float32"
        yield Case(f"triton wtconv {what} {sized(shape)}", _wtconv(shape, 5, 5, torch.float32, False, backward))
