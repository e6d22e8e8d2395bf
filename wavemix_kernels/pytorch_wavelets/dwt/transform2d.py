"""`DWTForward` and `DWTInverse`. Filters that equal Haar's run on the fused Haar kernels, all others on kernels for any
filters."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from wavemix_kernels import checks, fx
from wavemix_kernels.ops.common.layout import is_channels_last
from wavemix_kernels.ops.dwt.op import dwt2d, idwt2d
from wavemix_kernels.ops.dwt.reference import Filters, cropped, synthesis_sizes
from wavemix_kernels.ops.haar.op import haar_dwt2d, haar_idwt2d
from wavemix_kernels.pytorch_wavelets.checked import coefficients_of, levels_of
from wavemix_kernels.pytorch_wavelets.dwt.bank import FilterBank
from wavemix_kernels.pytorch_wavelets.dwt.swt import SWTForward as SWTForward
from wavemix_kernels.pytorch_wavelets.dwt.swt import SWTInverse as SWTInverse
from wavemix_kernels.pytorch_wavelets.wavelets import WaveletLike, filters_of


class DWTForward(FilterBank):
    """Multi-level 2-D discrete wavelet transform, `pytorch_wavelets.DWTForward`.

    Args:
        J: number of levels, 0 or more.
        wave: 'haar' or 'db1'; with PyWavelets installed the name of any discrete wavelet; a `pywt.Wavelet`; or
            the analysis filters (h0, h1) or (h0_col, h1_col, h0_row, h1_row) as arrays, tensors or lists in
            PyWavelets' order of taps, at least 2 taps, equally many in the two filters of an axis. As in the
            original, the "col" pair filters along W and the "row" pair along H.
        mode: how the signal goes on past its ends: 'zero', 'constant', 'symmetric', 'reflect', 'periodic',
            'smooth', 'antisymmetric', 'antireflect' or 'periodization' ('per').

    Buffers h0_col, h1_col (1, 1, L, 1) and h0_row, h1_row (1, 1, 1, L) hold the filters mirrored, in the
    default dtype. Filters that require grad are learned: they get their gradient, and the convolutions are
    used.

    Raises:
        TypeError, ValueError: arguments that fit none of this.
        ImportError: a name that needs PyWavelets, which is missing.
    """

    _names: tuple[str, str, str, str] = ("h0_col", "h1_col", "h0_row", "h1_row")

    def __init__(self, J: int = 1, wave: str | WaveletLike | Sequence[Any] = "db1", mode: str = "zero") -> None:
        super().__init__([taps[::-1] for taps in filters_of(wave, "dec_lo", "dec_hi")], mode)
        self.J = levels_of(J)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Analysis. The half dtypes are computed in float32; autocast changes nothing.

        Args:
            x: (N, C, H, W), float64, float32, float16 or bfloat16.

        Returns:
            ``(yl, yh)`` of x's dtype, contiguous: yl (N, C, h_J, w_J), yh a list of J tensors (N, C, 3, h_j, w_j), the
            finest first, with bands LH, HL, HH.

        Raises:
            TypeError: another dtype.
            ValueError: another rank, an empty H or W, or a size of 1 in mode 'reflect' or 'antireflect'.
        """
        if isinstance(x, fx.Proxy):
            return fx.call_module(self, x, lambda x: _analyse(x, *self._how(), self.J))
        checks.check_tensor("x", x, 4, "(N, C, H, W)")
        return _analyse(x, *self._how(), self.J)


class DWTInverse(FilterBank):
    """Multi-level 2-D inverse wavelet transform, `pytorch_wavelets.DWTInverse`.

    Args:
        wave: as for :class:`DWTForward`; a tuple holds the synthesis filters, (g0, g1) or
            (g0_col, g1_col, g0_row, g1_row).
        mode: as for :class:`DWTForward`; all modes but 'periodization' reconstruct in the same way.

    Buffers g0_col, g1_col (1, 1, L, 1) and g0_row, g1_row (1, 1, 1, L) hold the filters unmirrored. Learned
    filters are as for :class:`DWTForward`.

    Raises:
        TypeError, ValueError, ImportError: as :class:`DWTForward`.
    """

    _names: tuple[str, str, str, str] = ("g0_col", "g1_col", "g0_row", "g1_row")

    def __init__(self, wave: str | WaveletLike | Sequence[Any] = "db1", mode: str = "zero") -> None:
        super().__init__(filters_of(wave, "rec_lo", "rec_hi"), mode)

    def forward(self, coeffs: tuple[Tensor, Sequence[Tensor | None]], size: tuple[int, int] | None = None) -> Tensor:
        """Synthesis. Where the running low-pass is one row or column larger than its level's yh, that one is dropped;
        an odd H or W itself therefore comes out one larger, unless `size` says it.

        Args:
            coeffs: ``(yl, yh)`` as :class:`DWTForward` returns them. None in yh is a level of zeros.
            size: (H, W) of the image; each is what comes out without it, or one less. The original has no `size`.

        Returns:
            The image (N, C, H, W), of yl's dtype, contiguous.

        Raises:
            TypeError: dtypes other than DWTForward's and, outside autocast, different ones in yl and yh.
            ValueError: ranks, sizes or devices that do not fit.
        """
        if isinstance(coeffs, fx.Proxy) or (isinstance(coeffs, tuple) and isinstance(coeffs[0], fx.Proxy)):
            return fx.call_module(self, coeffs, lambda coeffs: _synthesise(*coeffs, *self._how(), size), size=size)
        if not isinstance(coeffs, (tuple, list)) or len(coeffs) != 2:
            raise TypeError(f"coeffs: expected a pair (yl, yh), got {checks.describe(coeffs)}")
        return _synthesise(*coeffs, *self._how(), size)


def _analyse(x: Tensor, mode: str, filters: Filters | None, levels: int) -> tuple[Tensor, list[Tensor]]:
    if isinstance(x, fx.Proxy):
        return fx.call_function(_analyse, x, mode, filters, levels)
    if levels == 0:
        return x, []
    if filters is not None:
        return dwt2d(x, filters, levels, mode=mode)
    # Results are contiguous, as the original's; of one pass over channels_last, reordering x costs least.
    return haar_dwt2d(x.contiguous() if is_channels_last(x) else x, levels, mode=mode)


def _synthesise(
    yl: Tensor, yh: Sequence[Tensor | None], mode: str, filters: Filters | None, size: tuple[int, int] | None
) -> Tensor:
    if isinstance(yl, fx.Proxy):
        return fx.call_function(_synthesise, yl, yh, mode, filters, size)
    yl, yh = coefficients_of(yl, yh, "(N, C, 3, h, w)")
    taps = (2, 2) if filters is None else (filters.low_h.numel(), filters.low_w.numel())
    *sizes, whole = synthesis_sizes(yl, yh, taps, mode)
    size = whole if size is None else _checked_size(size, whole)
    if not yh:
        return cropped(yl, size)
    if filters is not None:
        return cropped(idwt2d(yl, yh, filters, mode=mode), size).contiguous()
    # One zero seen from everywhere stands for a level of None: nothing is allocated.
    highs = [
        yl.new_zeros(()).expand(*yl.shape[:2], 3, *level_size) if high is None else high
        for high, level_size in zip(yh, reversed(sizes), strict=True)
    ]
    return haar_idwt2d(cropped(yl, sizes[0]), highs, mode=mode, size=size).contiguous()


def _checked_size(size: tuple[int, int], whole: tuple[int, int]) -> tuple[int, int]:
    if len(size) != 2 or any(w - s not in (0, 1) for s, w in zip(size, whole, strict=True)):
        raise ValueError(f"size: expected (H, W), each that of {whole} or one less, got {size!r}")
    return size[0], size[1]
