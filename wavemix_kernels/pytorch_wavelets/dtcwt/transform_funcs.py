"""One level of the dual-tree transform and of its inverse, called as the original's autograd functions are."""

from typing import Any

import torch
from torch import Tensor

from wavemix_kernels.pytorch_wavelets.dtcwt.levels import (
    analyse_1,
    analyse_2,
    low_1,
    low_2,
    synthesise_1,
    synthesise_2,
)
from wavemix_kernels.pytorch_wavelets.dwt.lowlevel import int_to_mode


class FWD_J1:
    """Level 1: `apply` returns the low-pass and the complex coefficients, an empty scalar where `skip_hps`."""

    @staticmethod
    def apply(
        x: Tensor, h0: Tensor, h1: Tensor, skip_hps: bool, o_dim: int, ri_dim: int, mode: int
    ) -> tuple[Tensor, Tensor]:
        name = int_to_mode(mode)
        if skip_hps:
            return low_1(x, h0, h1, name, back=False), x.new_zeros([])
        return analyse_1(x, h0, h1, o_dim, ri_dim, name)


class FWD_J2PLUS:
    """A further level, as :class:`FWD_J1`; its border is always symmetric."""

    @staticmethod
    def apply(
        x: Tensor, h0a: Tensor, h1a: Tensor, h0b: Tensor, h1b: Tensor, skip_hps: bool, o_dim: int, ri_dim: int,
        mode: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        trees = ((h0b, h1b), (h0a, h1a))
        return (low_2(x, trees), x.new_zeros([])) if skip_hps else analyse_2(x, trees, o_dim, ri_dim)


class INV_J1:
    """Inverse of level 1; `highs` None or an empty tensor means zeros."""

    @staticmethod
    def apply(lows: Tensor, highs: Any, g0: Tensor, g1: Tensor, o_dim: int, ri_dim: int, mode: int) -> Tensor:
        name, filters = int_to_mode(mode), (g0.flip(2), g1.flip(2))
        if _missing(highs):
            return low_1(lows, *filters, name, back=True)
        return synthesise_1(lows, highs, *filters, o_dim, ri_dim, name)


class INV_J2PLUS:
    """Inverse of a further level, as :class:`INV_J1`."""

    @staticmethod
    def apply(
        lows: Tensor, highs: Any, g0a: Tensor, g1a: Tensor, g0b: Tensor, g1b: Tensor, o_dim: int, ri_dim: int,
        mode: int,
    ) -> Tensor:  # fmt: skip
        trees = [(g0.flip(2), g1.flip(2)) for g0, g1 in ((g0b, g1b), (g0a, g1a))]
        return synthesise_2(lows, None if _missing(highs) else highs, trees, o_dim, ri_dim)


def _missing(highs: Any) -> bool:
    return highs is None or highs.shape == torch.Size([])
