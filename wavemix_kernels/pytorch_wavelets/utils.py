"""The original's helpers that other people's code imports from here."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def reflect(x: ArrayLike, minx: float, maxx: float) -> NDArray[Any]:
    """`x` with values beyond `minx` and `maxx` mirrored there, as often as it takes; in x's dtype."""
    values = np.asanyarray(x)
    span = maxx - minx
    apart = np.mod(values - minx, 2 * span)
    return np.asarray(np.minimum(apart, 2 * span - apart) + minx, dtype=values.dtype)


def symm_pad_1d(l: int, m: int) -> NDArray[np.int32]:  # noqa: E741 the original's name
    """Indices of a signal of `l` samples with `m` more on either side, mirrored about its borders."""
    return reflect(np.arange(-m, l + m, dtype=np.int32), -0.5, l - 0.5)
