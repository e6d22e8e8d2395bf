"""Single levels of the wavelet transforms under the original's names: filters as tensors, bands on the channel axis.

Filters given as tensors are taken as they are: those of an analysis mirrored, as :func:`prep_filt_afb1d` makes them.
Other sequences hold taps in PyWavelets' order.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels import checks
from wavemix_kernels.ops.dwt.bank import filter_bank
from wavemix_kernels.ops.dwt.op import dwt1d, dwt2d, idwt1d, idwt2d
from wavemix_kernels.ops.dwt.reference import Filters, bank_along, coefficient_size, extend, sample_size
from wavemix_kernels.pytorch_wavelets.checked import mode_of
from wavemix_kernels.pytorch_wavelets.dwt.swt import extension_of, lattices
from wavemix_kernels.pytorch_wavelets.utils import reflect as reflect

_CODES = {"zero": 0, "symmetric": 1, "periodization": 2, "constant": 3, "reflect": 4, "replicate": 5, "periodic": 6}
_NAMES = {code: name for name, code in _CODES.items()}


def mode_to_int(mode: str) -> int:
    """The number of a mode, for the `apply` of this file's classes. Raises ValueError for other names."""
    checks.check_choice("mode", mode, (*_CODES, "per"))
    return _CODES["periodization" if mode == "per" else mode]


def int_to_mode(mode: int) -> str:
    """The mode of a number of :func:`mode_to_int`. Raises ValueError for other numbers."""
    if mode not in _NAMES:
        raise ValueError(f"mode: expected 0 to {len(_NAMES) - 1}, a number of mode_to_int, got {mode!r}")
    return _NAMES[mode]


# --- One level -------------------------------------------------------------------------------------------


def afb1d(x: Tensor, h0: Any, h1: Any, mode: str = "zero", dim: int = -1) -> Tensor:
    """Analysis of x (N, C, H, W) along `dim`, 2 or 3: (N, 2C, h, w), low and high of each channel by turns."""
    low, (high,) = dwt1d(x, _pair(h0, h1, x, mirror=True), 1, dim=dim % 4, mode=mode_of(mode))
    return torch.stack((low, high), 2).flatten(1, 2)


def sfb1d(lo: Tensor, hi: Tensor, g0: Any, g1: Any, mode: str = "zero", dim: int = -1) -> Tensor:
    """Synthesis along `dim`, 2 or 3, from low and high (N, C, h, w)."""
    return idwt1d(lo, [hi], _pair(g0, g1, lo, mirror=False), dim=dim % 4, mode=mode_of(mode))


def afb1d_atrous(x: Tensor, h0: Any, h1: Any, mode: str = "periodic", dim: int = -1, dilation: int = 1) -> Tensor:
    """:func:`afb1d` without decimation, the filters dilated: (N, 2C, H, W). Modes as for :class:`SWTForward`."""
    low, high = _pair(h0, h1, x, mirror=True)
    h, w = lattices((low.numel(), low.numel()), x.shape[-2:], dilation)
    along = -2 if dim % 4 == 2 else -1
    return bank_along(x, low.to(x.dtype), high.to(x.dtype), along, h if along == -2 else w, extension_of(mode))


def afb2d(x: Tensor, filts: Sequence[Any], mode: str = "zero") -> Tensor:
    """Analysis of x (N, C, H, W) by (h0, h1) or (h0_col, h1_col, h0_row, h1_row), the "row" pair along W: (N, 4C, h,
    w), LL, LH, HL, HH of each channel."""
    ll, (high,) = dwt2d(x, _bank(filts, x, mirror=True), 1, mode=mode_of(mode))
    return torch.cat((ll.unsqueeze(2), high), 2).flatten(1, 2)


def afb2d_atrous(x: Tensor, filts: Sequence[Any], mode: str = "periodization", dilation: int = 1) -> Tensor:
    """:func:`afb2d` without decimation, the filters dilated: (N, 4C, H, W). Modes as for :class:`SWTForward`."""
    filters = _bank(filts, x, mirror=True)
    h, w = lattices((filters.low_h.numel(), filters.low_w.numel()), x.shape[-2:], dilation)
    return filter_bank(x, filters, h, w, mode=extension_of(mode)).flatten(1, 2)


def sfb2d(ll: Tensor, lh: Tensor, hl: Tensor, hh: Tensor, filts: Sequence[Any], mode: str = "zero") -> Tensor:
    """Synthesis of four bands (N, C, h, w), filters as for :func:`afb2d`."""
    return idwt2d(ll, [torch.stack((lh, hl, hh), 2)], _bank(filts, ll, mirror=False), mode=mode_of(mode))


class AFB2D:
    """A level of 2-D analysis: `apply` returns LL (N, C, h, w) and (N, C, 3, h, w), the "row" filters along W."""

    @staticmethod
    def apply(
        x: Tensor, h0_row: Tensor, h1_row: Tensor, h0_col: Tensor, h1_col: Tensor, mode: int
    ) -> tuple[Tensor, Tensor]:
        low, (high,) = dwt2d(x, Filters(h0_row, h1_row, h0_col, h1_col), 1, mode=mode_of(int_to_mode(mode)))
        return low, high


class SFB2D:
    """A level of 2-D synthesis from what :class:`AFB2D` returns."""

    @staticmethod
    def apply(
        low: Tensor, highs: Tensor, g0_row: Tensor, g1_row: Tensor, g0_col: Tensor, g1_col: Tensor, mode: int
    ) -> Tensor:
        return idwt2d(low, [highs], Filters(g0_row, g1_row, g0_col, g1_col), mode=mode_of(int_to_mode(mode)))


class AFB1D:
    """A level of 1-D analysis of lines (N, C, L): `apply` returns low and high (N, C, l)."""

    @staticmethod
    def apply(x: Tensor, h0: Tensor, h1: Tensor, mode: int) -> tuple[Tensor, Tensor]:
        low, (high,) = dwt1d(x, [h0, h1], 1, mode=mode_of(int_to_mode(mode)))
        return low, high


class SFB1D:
    """A level of 1-D synthesis from what :class:`AFB1D` returns."""

    @staticmethod
    def apply(low: Tensor, high: Tensor, g0: Tensor, g1: Tensor, mode: int) -> Tensor:
        return idwt1d(low, [high], [g0, g1], mode=mode_of(int_to_mode(mode)))


# --- Borders ---------------------------------------------------------------------------------------------


def mypad(x: Tensor, pad: Sequence[int], mode: str = "constant", value: float = 0) -> Tensor:
    """x (N, C, H, W) with `pad` = (left, right, top, bottom) pixels more: those of "symmetric" and "periodic"
    extension, zeros for "zero", else as :func:`torch.nn.functional.pad` has them."""
    if mode in ("symmetric", "periodic"):
        left, right, top, bottom = pad
        return extend(extend(x, -1, left, right, mode), -2, top, bottom, mode)
    return F.pad(x, tuple(pad), "constant" if mode == "zero" else mode, 0 if mode == "zero" else value)


def roll(x: Tensor, n: int, dim: int, make_even: bool = False) -> Tensor:
    """:func:`torch.roll` of one axis; where `make_even` and its size is odd, the first sample follows the last."""
    moved = x.roll(n, dim)
    return torch.cat((moved, moved.narrow(dim, 0, 1)), dim) if make_even and x.shape[dim] % 2 else moved


# --- Filters ---------------------------------------------------------------------------------------------


def prep_filt_afb1d(h0: Any, h1: Any, device: Any = None) -> tuple[Tensor, Tensor]:
    """Both filters mirrored, (1, 1, L), in the default dtype."""
    return _line(_taps(h0)[::-1], device), _line(_taps(h1)[::-1], device)


def prep_filt_sfb1d(g0: Any, g1: Any, device: Any = None) -> tuple[Tensor, Tensor]:
    """Both filters as they are, (1, 1, L), in the default dtype."""
    return _line(_taps(g0), device), _line(_taps(g1), device)


def prep_filt_afb2d(
    h0_col: Any, h1_col: Any, h0_row: Any = None, h1_row: Any = None, device: Any = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four filters mirrored, (1, 1, L, 1) for "col" and (1, 1, 1, L) for "row", which are "col"'s where missing."""
    rows = (h0_col, h1_col) if h0_row is None else (h0_row, h1_row)
    return _columns_and_rows(prep_filt_afb1d(h0_col, h1_col, device), prep_filt_afb1d(*rows, device))


def prep_filt_sfb2d(
    g0_col: Any, g1_col: Any, g0_row: Any = None, g1_row: Any = None, device: Any = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`prep_filt_afb2d` without mirroring."""
    rows = (g0_col, g1_col) if g0_row is None else (g0_row, g1_row)
    return _columns_and_rows(prep_filt_sfb1d(g0_col, g1_col, device), prep_filt_sfb1d(*rows, device))


def _columns_and_rows(
    columns: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    low_col, high_col = (f.reshape(1, 1, -1, 1) for f in columns)
    low_row, high_row = (f.reshape(1, 1, 1, -1) for f in rows)
    return low_col, high_col, low_row, high_row


def _taps(f: Any) -> Any:
    return np.asarray(f, dtype=np.float64).ravel()


def _line(taps: Any, device: Any) -> Tensor:
    return torch.tensor(taps.copy(), dtype=torch.get_default_dtype(), device=device).reshape(1, 1, -1)


def _pair(low: Any, high: Any, like: Tensor, mirror: bool) -> list[Tensor]:
    prepared = prep_filt_afb1d if mirror else prep_filt_sfb1d
    return [f if isinstance(f, Tensor) else prepared(f, f, like.device)[0] for f in (low, high)]


def _bank(filts: Sequence[Any], like: Tensor, mirror: bool) -> Filters:
    if len(filts) not in (2, 4):
        raise ValueError(f"filts: expected (h0, h1) or (h0_col, h1_col, h0_row, h1_row), got {len(filts)} filters")
    low_h, high_h = _pair(filts[0], filts[1], like, mirror)
    low_w, high_w = _pair(filts[-2], filts[-1], like, mirror)
    return Filters(low_w, high_w, low_h, high_h)


# --- Filters of two dimensions, as plain convolutions -----------------------------------------------------


def prep_filt_afb2d_nonsep(
    h0_col: Any, h1_col: Any, h0_row: Any = None, h1_row: Any = None, device: Any = None
) -> Tensor:
    """The products of the filters, mirrored: (4, 1, L_col, L_row) for LL, LH, HL, HH."""
    return prep_filt_sfb2d_nonsep(h0_col, h1_col, h0_row, h1_row, device).flip(2, 3)


def prep_filt_sfb2d_nonsep(
    g0_col: Any, g1_col: Any, g0_row: Any = None, g1_row: Any = None, device: Any = None
) -> Tensor:
    """:func:`prep_filt_afb2d_nonsep` without mirroring."""
    columns = [_taps(g0_col), _taps(g1_col)]
    rows = columns if g0_row is None else [_taps(g0_row), _taps(g1_row)]
    products = np.stack([np.outer(column, row) for row in rows for column in columns])
    return torch.tensor(products[:, None], dtype=torch.get_default_dtype(), device=device)


def afb2d_nonsep(x: Tensor, filts: Any, mode: str = "zero") -> Tensor:
    """:func:`afb2d` by filters of :func:`prep_filt_afb2d_nonsep`, or by the lists that it takes."""
    if isinstance(filts, (tuple, list)):
        filts = prep_filt_afb2d_nonsep(*filts).to(x.device)
    mode = mode_of(mode)
    for dim in (-2, -1):
        n, taps = x.shape[dim], filts.shape[dim]
        before = taps - 1 - taps // 2 if mode == "periodization" else taps - 2
        after = 2 * (coefficient_size(n, taps, mode) - 1) + taps - n - before
        x = extend(x, dim, before, after, mode)
    return F.conv2d(x, filts.to(x.dtype).repeat(x.shape[1], 1, 1, 1), stride=2, groups=x.shape[1])


def sfb2d_nonsep(coeffs: Tensor, filts: Any, mode: str = "zero") -> Tensor:
    """Synthesis of (N, C, 4, h, w) by filters of :func:`prep_filt_sfb2d_nonsep`, or by the lists that it takes."""
    if isinstance(filts, (tuple, list)):
        filts = prep_filt_sfb2d_nonsep(*filts).to(coeffs.device)
    mode, channels = mode_of(mode), coeffs.shape[1]
    y = F.conv_transpose2d(
        coeffs.flatten(1, 2), filts.to(coeffs.dtype).repeat(channels, 1, 1, 1), stride=2, groups=channels
    )
    for dim in (-2, -1):
        taps, size = filts.shape[dim], sample_size(coeffs.shape[dim], filts.shape[dim], mode)
        if mode != "periodization":
            y = y.narrow(dim, taps - 2, size)
            continue
        shape = list(y.shape)
        shape[dim] = size
        place = (torch.arange(y.shape[dim], device=y.device) + 1 - taps // 2) % size
        y = y.new_zeros(shape).index_add(dim, place, y)
    return y.contiguous()
