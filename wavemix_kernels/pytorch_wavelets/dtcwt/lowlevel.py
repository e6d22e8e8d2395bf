"""The passes of the dual-tree transform along one axis, under the original's names, as plain convolutions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels.ops.dwt.reference import extend


def prep_filt(h: Any, c: int, transpose: bool = False) -> Tensor:
    """Taps `h` mirrored, `c` times: (c, 1, L, 1), or (c, 1, 1, L) where `transpose`, in the default dtype."""
    taps = np.asarray(h, dtype=np.float64).ravel()[::-1].copy()
    line = torch.tensor(taps, dtype=torch.get_default_dtype()).reshape((1, 1, 1, -1) if transpose else (1, 1, -1, 1))
    return line.repeat(c, 1, 1, 1)


def colfilter(X: Tensor, h: Tensor, mode: str = "symmetric") -> Tensor:
    """Filters X (N, C, H, W) along H by mirrored taps h of odd length; all modes but 'symmetric' mean zeros."""
    return _filtered(X, h, -2, mode)


def rowfilter(X: Tensor, h: Tensor, mode: str = "symmetric") -> Tensor:
    """:func:`colfilter` along W."""
    return _filtered(X, h, -1, mode)


def coldfilt(X: Tensor, ha: Tensor, hb: Tensor, highpass: bool = False, mode: str = "symmetric") -> Tensor:
    """Filters the even samples of X (N, C, H, W) along H by ha and the odd ones by hb, every other one of them, and
    interleaves the results, the other way round where `highpass`: (N, C, H / 2, W).

    Raises:
        ValueError: 4 does not divide H.
        NotImplementedError: a mode other than 'symmetric'.
    """
    return _decimated(X, ha, hb, highpass, -2, mode)


def rowdfilt(X: Tensor, ha: Tensor, hb: Tensor, highpass: bool = False, mode: str = "symmetric") -> Tensor:
    """:func:`coldfilt` along W."""
    return _decimated(X, ha, hb, highpass, -1, mode)


def colifilt(X: Tensor, ha: Tensor, hb: Tensor, highpass: bool = False, mode: str = "symmetric") -> Tensor:
    """Interpolates X (N, C, H, W) along H by 2, even results of each four from ha and its phases: (N, C, 2 H, W).

    Raises:
        ValueError: 2 does not divide H.
        NotImplementedError: a mode other than 'symmetric'.
    """
    return _interpolated(X, ha, hb, highpass, -2, mode)


def rowifilt(X: Tensor, ha: Tensor, hb: Tensor, highpass: bool = False, mode: str = "symmetric") -> Tensor:
    """:func:`colifilt` along W."""
    return _interpolated(X, ha, hb, highpass, -1, mode)


def q2c(y: Tensor, dim: int = -1) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The two complex numbers, as (real, imaginary), of each 2 x 2 quad of y (N, C, 2h, 2w)."""
    y = y * 0.5**0.5
    a, b, c, d = y[:, :, 0::2, 0::2], y[:, :, 0::2, 1::2], y[:, :, 1::2, 0::2], y[:, :, 1::2, 1::2]
    return (a - d, b + c), (a + d, b - c)


def c2q(w1: Sequence[Tensor], w2: Sequence[Tensor]) -> Tensor:
    """Inverse of :func:`q2c`: (N, C, 2h, 2w) of two complex numbers (N, C, h, w) as (real, imaginary)."""
    (w1r, w1i), (w2r, w2i) = w1, w2
    upper = torch.stack((w1r + w2r, w1i + w2i), -1).flatten(-2)
    lower = torch.stack((w1i - w2i, w2r - w1r), -1).flatten(-2)
    return torch.stack((upper, lower), -2).flatten(-3, -2) * 0.5**0.5


def _filtered(x: Tensor, h: Tensor, dim: int, mode: str) -> Tensor:
    m = h.numel() // 2
    return _correlated(extend(x, dim, m, m, "symmetric" if mode == "symmetric" else "zero"), h, dim)


def _decimated(x: Tensor, ha: Tensor, hb: Tensor, highpass: bool, dim: int, mode: str) -> Tensor:
    _check(x, 4, dim, mode)
    taps = ha.numel()
    wide = extend(x, dim, taps - 2, taps - 1, "symmetric")
    a, b = (_correlated(_every_other(wide, tree, dim), h, dim, 2) for tree, h in ((0, ha), (1, hb)))
    return _by_turns([b, a] if highpass else [a, b], dim)


def _interpolated(x: Tensor, ha: Tensor, hb: Tensor, highpass: bool, dim: int, mode: str) -> Tensor:
    _check(x, 2, dim, mode)
    half, count = ha.numel() // 2, x.shape[dim] // 2
    wide = extend(x, dim, half, half, "symmetric")
    # For four results each: the coefficients they start from and the phases of their filters: with an odd half both
    # results of a tree lie on one stretch of it, with an even one the later lies a coefficient further on.
    starts, first = ((1, 2, 1, 2), 1) if half % 2 else ((0, 1, 2, 3), 0)
    if highpass:
        starts = (starts[1], starts[0], starts[3], starts[2])
    filters = [f.flatten()[phase::2] for phase in (first, 1 - first) for f in (ha, hb)]
    parts = [
        _correlated(_every_other(wide, start, dim), f, dim).narrow(dim, 0, count)
        for start, f in zip(starts, filters, strict=True)
    ]
    return _by_turns(parts, dim)


def _check(x: Tensor, multiple: int, dim: int, mode: str) -> None:
    if mode != "symmetric":
        raise NotImplementedError(f"mode={mode!r}: the trees of levels 2 and up are extended symmetrically only")
    if x.shape[dim] % multiple:
        axis = "rows" if dim == -2 else "columns"
        raise ValueError(f"X: expected a number of {axis} that {multiple} divides, got shape {tuple(x.shape)}")


def _every_other(x: Tensor, start: int, dim: int) -> Tensor:
    return x[..., start::2, :] if dim == -2 else x[..., start::2]


def _correlated(x: Tensor, taps: Tensor, dim: int, stride: int = 1) -> Tensor:
    """x (N, C, H, W) with the filter along `dim`, within x."""
    kernel = taps.reshape((1, 1, -1, 1) if dim == -2 else (1, 1, 1, -1)).to(x.dtype)
    steps = (stride, 1) if dim == -2 else (1, stride)
    return F.conv2d(x, kernel.repeat(x.shape[1], 1, 1, 1), stride=steps, groups=x.shape[1])


def _by_turns(parts: Sequence[Tensor], dim: int) -> Tensor:
    return torch.stack(list(parts), dim).flatten(dim - 1, dim)
