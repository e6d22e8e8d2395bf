"""`SWTForward` and `SWTInverse`: the undecimated (stationary) wavelet transform, à trous."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from wavemix_kernels import checks, fx
from wavemix_kernels.ops.dwt.bank import filter_bank, filter_bank_transpose
from wavemix_kernels.ops.dwt.reference import Filters, Lattice
from wavemix_kernels.ops.haar.op import MODES
from wavemix_kernels.pytorch_wavelets.checked import levels_of
from wavemix_kernels.pytorch_wavelets.dwt.bank import FilterBuffers
from wavemix_kernels.pytorch_wavelets.wavelets import WaveletLike, filters_of

PERIODIC = ("periodization", "per", "periodic")


class SWTForward(FilterBuffers):
    """Multi-level 2-D undecimated wavelet transform, `pytorch_wavelets.dwt.transform2d.SWTForward`.

    Args:
        J: number of levels, 0 or more.
        wave: as for :class:`DWTForward`.
        mode: 'periodization' ('per', 'periodic'), PyWavelets' own, or another one of :class:`DWTForward`'s. The
            original raises in 'periodization' and 'per'. As in it 'constant' means zeros, and 'replicate' is the
            'constant' of DWTForward.

    Buffers are those of :class:`DWTForward`.

    Raises:
        TypeError, ValueError, ImportError: as :class:`DWTForward`.
    """

    _names: tuple[str, str, str, str] = ("h0_col", "h1_col", "h0_row", "h1_row")

    def __init__(
        self, J: int = 1, wave: str | WaveletLike | Sequence[Any] = "db1", mode: str = "periodization"
    ) -> None:
        super().__init__([taps[::-1] for taps in filters_of(wave, "dec_lo", "dec_hi")])
        self.J, self.mode = levels_of(J), mode
        extension_of(mode)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Analysis of x (N, C, H, W). Returns J tensors (N, C, 4, H, W) of x's dtype, the finest first, bands LL, LH,
        HL, HH as `DWTForward` orders them. float16 and bfloat16 are computed in float32 and rounded at each level.
        Raises as :meth:`DWTForward.forward`."""
        if isinstance(x, fx.Proxy):
            return fx.call_module(self, x, lambda x: fx.call_function(swt2d, x, self._filters(), self.J, self.mode))
        checks.check_tensor("x", x, 4, "(N, C, H, W)")
        return swt2d(x, self._filters(), self.J, self.mode)


class SWTInverse(FilterBuffers):
    """Inverse of :class:`SWTForward` in its periodic modes, `pywt.iswt2`. The original has a class of this name that
    inverts the decimated transform.

    Args:
        wave: as for :class:`DWTInverse`.
        mode: 'periodization', 'per' or 'periodic'. In the others a border is filtered from samples that are not there,
            and no inverse of this form exists.

    Buffers are those of :class:`DWTInverse`.

    Raises:
        TypeError, ValueError, ImportError: as :class:`DWTInverse`.
    """

    _names: tuple[str, str, str, str] = ("g0_col", "g1_col", "g0_row", "g1_row")

    def __init__(self, wave: str | WaveletLike | Sequence[Any] = "db1", mode: str = "periodization") -> None:
        super().__init__(filters_of(wave, "rec_lo", "rec_hi"))
        self.mode = mode
        if mode not in PERIODIC:
            raise ValueError(f"mode={mode!r}: the undecimated transform has an inverse in {', '.join(PERIODIC)} only")

    def forward(self, coeffs: Sequence[Tensor]) -> Tensor:
        """Synthesis.

        Args:
            coeffs: what :class:`SWTForward` returns, (N, C, 4, H, W) a level; the LL of the coarsest one counts.

        Returns:
            The image (N, C, H, W), of their dtype.

        Raises:
            TypeError: no list of tensors, or dtypes other than DWTForward's.
            ValueError: other shapes.
        """
        if any(isinstance(level, fx.Proxy) for level in (coeffs if isinstance(coeffs, (tuple, list)) else [coeffs])):
            return fx.call_module(self, coeffs, lambda c: fx.call_function(iswt2d, c, self._filters()))
        if not isinstance(coeffs, (tuple, list)) or not coeffs:
            raise TypeError(f"coeffs: expected a list of tensors (N, C, 4, H, W), got {checks.describe(coeffs)}")
        for level, bands in enumerate(coeffs):
            name = f"coeffs[{level}]"
            checks.check_tensor(name, bands, 5, "(N, C, 4, H, W)")
            checks.check_same_dtype(name, bands, "coeffs[0]", coeffs[0])
            if bands.shape != coeffs[0].shape or bands.shape[2] != 4:
                raise ValueError(
                    f"{name}: expected shape (N, C, 4, H, W), in all levels the same, got {tuple(bands.shape)}"
                )
        return iswt2d(coeffs, self._filters())


def swt2d(x: Tensor, filters: Filters, levels: int, mode: str) -> list[Tensor]:
    """`levels` levels by mirrored `filters`, as :class:`SWTForward` returns them."""
    coefficients = []
    taps = filters.low_h.numel(), filters.low_w.numel()
    for level in range(levels):
        h, w = lattices(taps, x.shape[-2:], 2**level)
        bands = filter_bank(x, filters, h, w, mode=extension_of(mode))
        coefficients.append(bands)
        x = bands[:, :, 0]
    return coefficients


def iswt2d(coeffs: Sequence[Tensor], filters: Filters) -> Tensor:
    """The image of the periodic transform `coeffs`, by filters that are not mirrored."""
    # Every sample is there twice along an axis, so the mean of the two halves each filter.
    halved = Filters(*(f / 2 for f in filters))
    size = coeffs[0].shape[-2:]
    taps = filters.low_h.numel(), filters.low_w.numel()
    x = coeffs[-1][:, :, 0]
    for level in reversed(range(len(coeffs))):
        h, w = lattices(taps, size, 2**level)
        x = filter_bank_transpose(x, coeffs[level][:, :, 1:], halved, h, w, size, mode="periodic")
    return x


def lattices(taps: tuple[int, int], size: Sequence[int], step: int) -> tuple[Lattice, Lattice]:
    """Around every sample of an image of `size`, filters of `taps` along H and W whose taps are `step` samples
    apart."""
    h, w = (Lattice(step - t * step // 2, n, 1, step) for t, n in zip(taps, size, strict=True))
    return h, w


def extension_of(mode: str) -> str:
    """How the signal goes on, as :func:`filter_bank` names it."""
    if mode in PERIODIC:
        return "periodic"
    if mode == "constant":  # the original hands it to torch, where it means zeros
        return "zero"
    if mode == "replicate":
        return "constant"
    checks.check_choice("mode", mode, (*MODES, "replicate"))
    return mode
