"""`ScatLayer` and `ScatLayerj2`."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavemix_kernels import checks
from wavemix_kernels.pytorch_wavelets.dtcwt.coeffs import biort as level_1
from wavemix_kernels.pytorch_wavelets.dtcwt.coeffs import qshift as level_2
from wavemix_kernels.pytorch_wavelets.dtcwt.levels import analyse_1, analyse_2
from wavemix_kernels.pytorch_wavelets.dtcwt.lowlevel import prep_filt
from wavemix_kernels.pytorch_wavelets.scatternet.lowlevel import mode_to_int, smooth_magnitude

#: Bytes of a level's bands on a CPU that images go through together. Blocks from twice as many bytes on are mapped anew
#: at each call (docs/use/benchmarks.md, fresh memory), which takes longer than the transform.
_AT_ONCE = 16 * 2**20
#: Axes of orientations, and of real and imaginary part: in front, as magnitudes take them apart.
_AXES = (2, 0)


class _Scattering(nn.Module):
    h0o: Tensor
    h1o: Tensor
    h2o: Tensor

    def __init__(self, biort: str, mode: str, magbias: float, combine_colour: bool) -> None:
        super().__init__()
        self.biort, self.magbias, self.combine_colour = biort, magbias, combine_colour
        self.mode_str, self.mode = mode, mode_to_int(mode)
        self.bandpass_diag = biort == "near_sym_b_bp"
        names = ("h0o", "h1o", "h2o") if self.bandpass_diag else ("h0o", "h1o")
        self._hold(names, level_1(biort)[::2])

    def _hold(self, names: Sequence[str], filters: Sequence[Any]) -> None:
        for name, taps in zip(names, filters, strict=True):
            setattr(self, name, nn.Parameter(prep_filt(taps, 1), requires_grad=False))

    def _first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        diagonal = self.h2o if self.bandpass_diag else None
        return analyse_1(x, self.h0o, self.h1o, *_AXES, self.mode_str, diagonal)

    def _checked(self, x: Tensor) -> None:
        checks.check_tensor("x", x, 4, "(N, C, H, W)")
        if self.combine_colour and x.shape[1] != 3:
            raise ValueError(f"x: expected 3 channels with combine_colour=True, got shape {tuple(x.shape)}")

    def _scatter(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _in_parts(self, x: Tensor) -> Tensor:
        """:meth:`_scatter` of some images at a time."""
        bands = 4 * x.numel() * x.element_size()
        if x.device.type != "cpu" or torch.compiler.is_compiling() or bands < 2 * _AT_ONCE:
            return self._scatter(x)
        return torch.cat([self._scatter(part) for part in x.split(max(1, x.shape[0] * _AT_ONCE // bands))])

    def extra_repr(self) -> str:
        return f"biort='{self.biort}', mode='{self.mode_str}', magbias={self.magbias}"


class ScatLayer(_Scattering):
    """One order of scattering at one scale, `pytorch_wavelets.ScatLayer`.

    Args:
        biort: filters, a name of :func:`~wavemix_kernels.pytorch_wavelets.dtcwt.coeffs.biort`; 'near_sym_b_bp' has a
            filter of its own for the diagonals.
        mode: border, 'symmetric', or zeros for every other name.
        magbias: the bias b of the magnitude sqrt(|z|^2 + b^2) - b.
        combine_colour: one magnitude of the three channels.

    Frozen parameters h0o, h1o and with 'near_sym_b_bp' h2o, (1, 1, L, 1), hold the filters mirrored.

    Raises:
        ImportError: no installed package has the filters of that name.
        ValueError: another name.
    """

    def __init__(
        self, biort: str = "near_sym_a", mode: str = "symmetric", magbias: float = 1e-2, combine_colour: bool = False
    ) -> None:
        super().__init__(biort, mode, magbias, combine_colour)

    def forward(self, x: Tensor) -> Tensor:
        """Scattering of x (N, C, H, W), an odd axis with its end repeated. Returns (N, 7C, H / 2, W / 2), the means of
        the low-pass first, then the magnitudes of six orientations, each of all channels; with combine_colour (N, 9, H
        / 2, W / 2). Raises TypeError for other dtypes, ValueError for other ranks and channels."""
        self._checked(x)
        for dim in (2, 3):
            if x.shape[dim] % 2:
                x = torch.cat((x, x.narrow(dim, x.shape[dim] - 1, 1)), dim)
        return self._in_parts(x)

    def _scatter(self, x: Tensor) -> Tensor:
        low, z = self._first(x)
        low, r = F.avg_pool2d(low, 2), smooth_magnitude(z, self.magbias, self.combine_colour)
        if self.combine_colour:
            return torch.cat((low, r[:, :, 0]), 1)
        return torch.cat((low.unsqueeze(1), r), 1).flatten(1, 2)


class ScatLayerj2(_Scattering):
    """Two orders of scattering over two scales, `pytorch_wavelets.ScatLayerj2`.

    Args:
        biort, mode, magbias, combine_colour: as for :class:`ScatLayer`.
        qshift: filters of the second scale, a name of :func:`~wavemix_kernels.pytorch_wavelets.dtcwt.coeffs.qshift`;
            'qshift_b_bp' goes with 'near_sym_b_bp'.

    Frozen parameters are those of :class:`ScatLayer`, and h0a, h0b, h1a, h1b, with 'qshift_b_bp' h2a and h2b.

    Raises:
        ImportError: no installed package has the filters of that name.
        ValueError: another name, or one of the two with a filter for the diagonals alone.
    """

    h0a: Tensor
    h0b: Tensor
    h1a: Tensor
    h1b: Tensor
    h2a: Tensor
    h2b: Tensor

    def __init__(
        self, biort: str = "near_sym_a", qshift: str = "qshift_a", mode: str = "symmetric", magbias: float = 1e-2,
        combine_colour: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(biort, mode, magbias, combine_colour)
        if self.bandpass_diag != (qshift == "qshift_b_bp"):
            raise ValueError(f"qshift={qshift!r}: 'qshift_b_bp' goes with biort='near_sym_b_bp', got biort={biort!r}")
        self.qshift = qshift
        filters = level_2(qshift)
        self._hold(("h0a", "h0b", "h1a", "h1b"), [filters[i] for i in (0, 1, 4, 5)])
        if self.bandpass_diag:
            self._hold(("h2a", "h2b"), filters[8:10])

    def forward(self, x: Tensor) -> Tensor:
        """Scattering of x (N, C, H, W), sizes made multiples of 8 by repeating rows and columns of both ends. Returns
        (N, 49C, H / 4, W / 4): the means of the low-pass, six magnitudes of the first scale, six of the second, 36 of
        the second order, each of all channels; with combine_colour (N, 51, H / 4, W / 4). Raises as
        :meth:`ScatLayer.forward`."""
        self._checked(x)
        return self._in_parts(_to_eighths(_to_eighths(x, 2), 3))

    def _scatter(self, x: Tensor) -> Tensor:
        low, z = self._first(x)
        first = smooth_magnitude(z, self.magbias, self.combine_colour)
        trees = ((self.h0b, self.h1b), (self.h0a, self.h1a))
        low, z = analyse_2(low, trees, *_AXES, (self.h2b, self.h2a) if self.bandpass_diag else None)
        second = smooth_magnitude(z, self.magbias, self.combine_colour)
        means, z = self._first(first.flatten(1, 2))
        again = smooth_magnitude(z, self.magbias, colour=False)
        means = F.avg_pool2d(means, 2).reshape(second.shape)
        parts = [means, second, again.reshape(second.shape[0], 36, *second.shape[2:])]
        low = F.avg_pool2d(low, 2)
        if self.combine_colour:
            return torch.cat((low, *(part[:, :, 0] for part in parts)), 1)
        return torch.cat((low.unsqueeze(1), *parts), 1).flatten(1, 2)


def _to_eighths(x: Tensor, dim: int) -> Tensor:
    n, beyond = x.shape[dim], x.shape[dim] % 8
    if beyond == 0:
        return x
    before, after = (8 - beyond) // 2, (9 - beyond) // 2
    return torch.cat((x.narrow(dim, 0, before), x, x.narrow(dim, n - after, after)), dim)
