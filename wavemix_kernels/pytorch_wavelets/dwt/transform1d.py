"""`DWT1DForward` and `DWT1DInverse`."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from wavemix_kernels import checks, fx, log
from wavemix_kernels.ops.dwt.op import dwt1d, idwt1d
from wavemix_kernels.pytorch_wavelets.checked import coefficients_of, levels_of, mode_of
from wavemix_kernels.pytorch_wavelets.dwt.bank import hold
from wavemix_kernels.pytorch_wavelets.wavelets import WaveletLike, filters_of


class DWT1DForward(nn.Module):
    """Multi-level 1-D discrete wavelet transform, `pytorch_wavelets.DWT1DForward`.

    Args:
        J, mode: as for :class:`DWTForward`.
        wave: as for :class:`DWTForward`; a tuple holds the two analysis filters (h0, h1).

    Buffers h0, h1 (1, 1, L) hold the filters mirrored, in the default dtype. Learned filters are as for
    :class:`DWTForward`.

    Raises:
        TypeError, ValueError, ImportError: as :class:`DWTForward`.
    """

    def __init__(self, J: int = 1, wave: str | WaveletLike | Sequence[Any] = "db1", mode: str = "zero") -> None:
        super().__init__()
        hold(self, ("h0", "h1"), [taps[::-1] for taps in filters_of(wave, "dec_lo", "dec_hi", axes=1)])
        self.J, self.mode = levels_of(J), mode
        mode_of(mode)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Analysis of x (N, C, L) along L. Returns ``(yl, yh)`` of x's dtype: yl (N, C, l_J) and yh a list of J tensors
        (N, C, l_j), the finest first. Raises as :meth:`DWTForward.forward`."""
        if isinstance(x, fx.Proxy):
            return fx.call_module(self, x, lambda x: fx.call_function(_analyse_lines, x, *_lines(self), self.J))
        checks.check_tensor("x", x, 3, "(N, C, L)")
        return _analyse_lines(x, *_lines(self), self.J)


class DWT1DInverse(nn.Module):
    """Multi-level 1-D inverse wavelet transform, `pytorch_wavelets.DWT1DInverse`.

    Args:
        wave: as for :class:`DWT1DForward`; a tuple holds the two synthesis filters (g0, g1).
        mode: as for :class:`DWTInverse`.

    Buffers g0, g1 (1, 1, L) hold the filters unmirrored.

    Raises:
        TypeError, ValueError, ImportError: as :class:`DWTForward`.
    """

    def __init__(self, wave: str | WaveletLike | Sequence[Any] = "db1", mode: str = "zero") -> None:
        super().__init__()
        hold(self, ("g0", "g1"), filters_of(wave, "rec_lo", "rec_hi", axes=1))
        self.mode = mode
        mode_of(mode)

    def forward(self, coeffs: tuple[Tensor, Sequence[Tensor | None]]) -> Tensor:
        """Synthesis of ``(yl, yh)`` as :class:`DWT1DForward` returns them, None in yh being zeros. Returns the lines
        (N, C, L); odd lengths and errors are as for :meth:`DWTInverse.forward`."""
        if isinstance(coeffs, fx.Proxy) or (isinstance(coeffs, tuple) and isinstance(coeffs[0], fx.Proxy)):
            return fx.call_module(self, coeffs, lambda c: fx.call_function(_synthesise_lines, *c, *_lines(self)))
        if not isinstance(coeffs, (tuple, list)) or len(coeffs) != 2:
            raise TypeError(f"coeffs: expected a pair (yl, yh), got {checks.describe(coeffs)}")
        return _synthesise_lines(*coeffs, *_lines(self))


def _lines(module: DWT1DForward | DWT1DInverse) -> tuple[str, list[Tensor]]:
    """The mode, and the filters low and high."""
    names = ("h0", "h1") if isinstance(module, DWT1DForward) else ("g0", "g1")
    filters = [getattr(module, name) for name in names]
    if any(f.requires_grad for f in filters):
        log.fallback(module, "its filters are learned and need a gradient of their own", "plain convolutions")
    return mode_of(module.mode), filters


def _analyse_lines(x: Tensor, mode: str, filters: list[Tensor], levels: int) -> tuple[Tensor, list[Tensor]]:
    return dwt1d(x, filters, levels, mode=mode) if levels else (x, [])


def _synthesise_lines(yl: Tensor, yh: Sequence[Tensor | None], mode: str, filters: list[Tensor]) -> Tensor:
    yl, yh = coefficients_of(yl, yh, "(N, C, l)")
    return idwt1d(yl, yh, filters, mode=mode) if yh else yl
