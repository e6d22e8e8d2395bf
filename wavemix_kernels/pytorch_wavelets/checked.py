"""Arguments of the wavelet modules, checked."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from wavemix_kernels import checks
from wavemix_kernels.ops.haar.op import MODES


def levels_of(levels: int) -> int:
    try:
        number = operator.index(levels)
    except TypeError:
        raise TypeError(f"J: expected an int, the number of levels, got {checks.describe(levels)}") from None
    if number < 0:
        raise ValueError(f"J: expected 0 or more levels, got {number}")
    return number


def mode_of(mode: str) -> str:
    checks.check_choice("mode", mode, MODES)
    return "periodization" if mode == "per" else mode


def coefficients_of(yl: Tensor, yh: Sequence[Tensor | None], shape: str) -> tuple[Tensor, Sequence[Tensor | None]]:
    """yl and yh in one dtype: under autocast, where bands may have met different ops, the widest of theirs. `shape` is
    that of a high."""
    images = "3" in shape
    checks.check_tensor("yl", yl, 4 if images else 3, "(N, C, h, w)" if images else shape)
    if not isinstance(yh, (tuple, list)):
        raise TypeError(f"yh: expected a list of tensors {shape} or None, got {checks.describe(yh)}")
    widest = yl.dtype
    for level, high in enumerate(yh):
        if high is None:
            continue
        name = f"yh[{level}]"
        checks.check_tensor(name, high, 5 if images else 3, shape)
        checks.check_same_device(name, high, "yl", yl)
        if images and high.shape[2] != 3:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(high.shape)}")
        if high.dtype != widest:
            if not torch.is_autocast_enabled(yl.device.type):
                checks.check_same_dtype(name, high, "yl", yl)
            widest = torch.promote_types(widest, high.dtype)
    if widest == yl.dtype and all(high is None or high.dtype == widest for high in yh):
        return yl, yh
    return yl.to(widest), [high if high is None else high.to(widest) for high in yh]
