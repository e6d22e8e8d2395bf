"""`DTCWTForward` and `DTCWTInverse`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wavemix_kernels import checks
from wavemix_kernels.pytorch_wavelets.checked import levels_of
from wavemix_kernels.pytorch_wavelets.dtcwt.coeffs import biort as level_1
from wavemix_kernels.pytorch_wavelets.dtcwt.coeffs import given
from wavemix_kernels.pytorch_wavelets.dtcwt.coeffs import qshift as level_2
from wavemix_kernels.pytorch_wavelets.dtcwt.levels import (
    analyse_1,
    analyse_2,
    low_1,
    low_2,
    synthesise_1,
    synthesise_2,
)
from wavemix_kernels.pytorch_wavelets.dtcwt.lowlevel import prep_filt
from wavemix_kernels.pytorch_wavelets.dwt.lowlevel import mode_to_int

Given = str | Sequence[Any]


class _Filters(nn.Module):
    """Filter buffers of shape (1, 1, L, 1), mirrored."""

    def _hold(self, biort: Given, qshift: Given, kind: str) -> None:
        """The filters of `kind` 'h', analysis, or 'g', synthesis."""
        one, trees = [f"{kind}0o", f"{kind}1o"], [f"{kind}{band}{tree}" for band in "01" for tree in "ab"]
        first = 0 if kind == "h" else 1
        filters = level_1(biort)[first:4:2] if isinstance(biort, str) else given("biort", biort, one)
        if isinstance(qshift, str):
            banks = level_2(qshift)
            filters = *filters, *(banks[2 * first + i] for i in (0, 1, 4, 5))
        else:
            filters = *filters, *given("qshift", qshift, trees)
        for name, taps in zip((*one, *trees), filters, strict=True):
            self.register_buffer(name, prep_filt(taps, 1))

    def _layout(self, o_dim: int, ri_dim: int, mode: str) -> None:
        if o_dim % 6 == ri_dim % 6:
            raise ValueError(f"o_dim, ri_dim: expected two different axes of six, got {o_dim} and {ri_dim}")
        mode_to_int(mode)
        self.o_dim, self.ri_dim, self.mode = o_dim, ri_dim, mode


class DTCWTForward(_Filters):
    """Multi-level 2-D dual-tree complex wavelet transform, `pytorch_wavelets.DTCWTForward`.

    Args:
        biort: filters of level 1, a name of :func:`~wavemix_kernels.pytorch_wavelets.dtcwt.coeffs.biort`, or a tuple
            of arrays (h0o, h1o), the low- and the high-pass, of odd lengths.
        qshift: of the further levels, a name of :func:`~wavemix_kernels.pytorch_wavelets.dtcwt.coeffs.qshift`, which
            `dtcwt` or `pytorch_wavelets` must have brought, or a tuple of arrays (h0a, h0b, h1a, h1b).
        J: number of levels, 0 or more.
        skip_hps: whether the complex coefficients are left out; one bool, or one a level from the finest.
        include_scale: whether the low-pass is returned; one bool, or one a level from the finest.
        o_dim, ri_dim: axes of the six orientations (15, 45, 75, 105, 135, 165 degrees) and of real and imaginary part.
        mode: border of level 1, 'symmetric', or zeros for every other name; the further levels are always symmetric.

    Buffers h0o, h1o, h0a, h0b, h1a, h1b (1, 1, L, 1) hold the filters mirrored, in the default dtype.

    Raises:
        ImportError: no installed package has the filters of that name.
        ValueError: another name, equal axes, or a level of fewer than 0.
    """

    h0o: Tensor
    h1o: Tensor
    h0a: Tensor
    h0b: Tensor
    h1a: Tensor
    h1b: Tensor

    def __init__(
        self, biort: Given = "near_sym_a", qshift: Given = "qshift_a", J: int = 3,
        skip_hps: bool | Sequence[bool] = False, include_scale: bool | Sequence[bool] = False, o_dim: int = 2,
        ri_dim: int = -1, mode: str = "symmetric",
    ) -> None:  # fmt: skip
        super().__init__()
        self._layout(o_dim, ri_dim, mode)
        self.biort, self.qshift, self.J = biort, qshift, levels_of(J)
        self._hold(biort, qshift, "h")
        self.skip_hps = _per_level(skip_hps, self.J)
        self.include_scale = _per_level(include_scale, self.J)

    def forward(self, x: Tensor) -> tuple[Any, Any]:
        """Analysis.

        Args:
            x: (N, C, H, W), float64, float32, float16 or bfloat16. An odd axis has its end repeated, and a low-pass
                whose size 4 does not divide both its ends.

        Returns:
            ``(yl, yh)`` of x's dtype: yl (N, C, h_J, w_J), or where include_scale is set a list of J low-passes, an
            empty scalar for those left out; yh a list of J tensors (N, C, 6, h_j, w_j, 2), axes as o_dim and ri_dim
            say, an empty scalar for those left out, the finest first. Without levels ``(x, None)``.

        Raises:
            TypeError: another dtype.
            ValueError: another rank, or an empty H or W.
        """
        checks.check_tensor("x", x, 4, "(N, C, H, W)")
        if self.J == 0:
            return x, None
        none = x.new_zeros([])
        scales, highs = [none] * self.J, [none] * self.J
        trees = ((self.h0b, self.h1b), (self.h0a, self.h1a))
        low = x
        for level in range(self.J):
            low = _extended(low, 4 if level else 2)
            if level == 0 and self.skip_hps[0]:
                low = low_1(low, self.h0o, self.h1o, self.mode, back=False)
            elif level == 0:
                low, highs[0] = analyse_1(low, self.h0o, self.h1o, self.o_dim, self.ri_dim, self.mode)
            elif self.skip_hps[level]:
                low = low_2(low, trees)
            else:
                low, highs[level] = analyse_2(low, trees, self.o_dim, self.ri_dim)
            if self.include_scale[level]:
                scales[level] = low
        return (scales if any(self.include_scale) else low.contiguous()), highs


class DTCWTInverse(_Filters):
    """Multi-level 2-D inverse dual-tree complex wavelet transform, `pytorch_wavelets.DTCWTInverse`.

    Args:
        biort, qshift: as for :class:`DTCWTForward`; tuples hold the synthesis filters, (g0o, g1o) and
            (g0a, g0b, g1a, g1b).
        o_dim, ri_dim, mode: as for :class:`DTCWTForward`.

    Buffers g0o, g1o, g0a, g0b, g1a, g1b (1, 1, L, 1) hold the filters mirrored, in the default dtype.

    Raises:
        ImportError: no installed package has the filters of that name.
        ValueError: another name, or equal axes.
    """

    g0o: Tensor
    g1o: Tensor
    g0a: Tensor
    g0b: Tensor
    g1a: Tensor
    g1b: Tensor

    def __init__(
        self, biort: Given = "near_sym_a", qshift: Given = "qshift_a", o_dim: int = 2, ri_dim: int = -1,
        mode: str = "symmetric",
    ) -> None:  # fmt: skip
        super().__init__()
        self._layout(o_dim, ri_dim, mode)
        self.biort, self.qshift = biort, qshift
        self._hold(biort, qshift, "g")

    def forward(self, coeffs: tuple[Tensor | None, Sequence[Tensor | None]]) -> Tensor:
        """Synthesis.

        Args:
            coeffs: ``(yl, yh)`` as :class:`DTCWTForward` returns them without include_scale. None or an empty tensor
                stands for zeros, in yl only where the coarsest yh is there. A low-pass larger than its level's yh asks
                for loses one sample on both sides.

        Returns:
            The image (N, C, H, W).

        Raises:
            TypeError: no pair, or other dtypes.
            ValueError: ranks and sizes that do not fit.
        """
        if not isinstance(coeffs, (tuple, list)) or len(coeffs) != 2:
            raise TypeError(f"coeffs: expected a pair (yl, yh), got {checks.describe(coeffs)}")
        low, highs = coeffs
        if highs is None or len(highs) == 0:
            raise ValueError("yh: expected a list of one tensor or None a level, got none")
        given = [None if z is None or z.numel() == 0 or z.ndim == 0 else z for z in highs]
        if low is None or low.ndim == 0 or low.numel() == 0:
            if given[-1] is None:
                raise ValueError("yl: expected a tensor (N, C, h, w) where the coarsest yh is missing, got none")
            n, c, h, w = self._sizes(len(given) - 1, given[-1])
            low = given[-1].new_zeros((n, c, 2 * h, 2 * w))
        checks.check_tensor("yl", low, 4, "(N, C, h, w)")
        trees = [(g0.flip(2), g1.flip(2)) for g0, g1 in ((self.g0b, self.g1b), (self.g0a, self.g1a))]
        for level in range(len(given) - 1, -1, -1):
            z = given[level]
            if z is not None:
                low = self._fitted(low, level, z)
            if level:
                low = synthesise_2(low, z, trees, self.o_dim, self.ri_dim)
            elif z is None:
                low = low_1(low, self.g0o.flip(2), self.g1o.flip(2), self.mode, back=True)
            else:
                filters = self.g0o.flip(2), self.g1o.flip(2)
                low = synthesise_1(low, z, *filters, self.o_dim, self.ri_dim, self.mode)
        return low

    def _sizes(self, level: int, z: Tensor) -> tuple[int, int, int, int]:
        """N, C, h, w of complex coefficients."""
        checks.check_tensor(f"yh[{level}]", z, 6, "(N, C, 6, h, w, 2)")
        if z.shape[self.o_dim] != 6 or z.shape[self.ri_dim] != 2:
            raise ValueError(
                f"yh[{level}]: expected 6 orientations on axis {self.o_dim} and 2 parts on axis {self.ri_dim}, got "
                f"shape {tuple(z.shape)}"
            )
        n, c, h, w = (s for d, s in enumerate(z.shape) if d not in (self.o_dim % 6, self.ri_dim % 6))
        return n, c, h, w

    def _fitted(self, low: Tensor, level: int, z: Tensor) -> Tensor:
        n, c, h, w = self._sizes(level, z)
        checks.check_same_dtype(f"yh[{level}]", z, "yl", low)
        size = tuple(low.shape)
        if low.shape[2] != 2 * h:
            low = low[:, :, 1:-1]
        if low.shape[3] != 2 * w:
            low = low[:, :, :, 1:-1]
        if low.shape != (n, c, 2 * h, 2 * w):
            raise ValueError(
                f"yh[{level}]: expected (N, C) of {(n, c)} and half the height and width of the low-pass {size} there, "
                f"or of one smaller by 2, got {tuple(z.shape)}"
            )
        return low


def _per_level(flag: Any, levels: int) -> Sequence[bool]:
    return [bool(flag)] * levels if isinstance(flag, (bool, int)) else flag


def _extended(x: Tensor, multiple: int) -> Tensor:
    """x with the end of an odd axis repeated, or both ends of one that 4 does not divide."""
    for dim in (2, 3):
        if x.shape[dim] % multiple:
            first, last = x.narrow(dim, 0, 1), x.narrow(dim, x.shape[dim] - 1, 1)
            x = torch.cat((x, last) if multiple == 2 else (first, x, last), dim)
    return x
