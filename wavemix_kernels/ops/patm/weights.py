"""PATM's words: each name below means one thing in the modules, the operators and the C++ core.

- ``z_h, z_w, z_c``: amplitudes along W and H, and the channel branch: 1x1 convolutions of the image;
- ``theta_h, theta_w``: phases before their BatchNorms, ``scale theta + shift`` behind them;
- ``taps_h, taps_w``: the 7-tap convolutions of the waves. They make the branches h and w; the third, c, is z_c itself;
- ``fc1, fc2``: the MLP that makes the branch weights ``a`` of the branches' mean;
- ``proj``: the output projection.

Upstream's names, which checkpoints keep, are read in :mod:`wavemix_kernels.nn.wavemlp.patm` alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from wavemix_kernels.ops.common.dtypes import cast_together
from wavemix_kernels.ops.norm import pre_norm
from wavemix_kernels.ops.patm import branch_weights


class Weights(NamedTuple):
    """(C, C, 1, 1) and (C) of the projections and thetas, theta (C, 1, 3, 3) where it is depthwise; taps (C, 2, 1, 7)
    and (C, 2, 7, 1); fc1 (K, C, 1, 1) and fc2 (3C, K, 1, 1)."""

    z_h: Tensor
    z_h_bias: Tensor | None
    z_w: Tensor
    z_w_bias: Tensor | None
    z_c: Tensor
    z_c_bias: Tensor | None
    theta_h: Tensor
    theta_h_bias: Tensor | None
    theta_w: Tensor
    theta_w_bias: Tensor | None
    proj: Tensor
    proj_bias: Tensor | None
    taps_h: Tensor
    taps_w: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor

    def with_taps(self, dtype: torch.dtype) -> Weights:
        """With the taps in the dtype of the arithmetic on them, below autograd."""
        taps_h, taps_w = cast_together((self.taps_h, self.taps_w), (dtype, dtype))
        return self._replace(taps_h=taps_h, taps_w=taps_w)

    def mlp(self) -> branch_weights.Mlp:
        return branch_weights.Mlp(self.fc1, self.fc1_bias, self.fc2, self.fc2_bias)


#: The first so many of :class:`Weights` are of convolutions on images: in x's dtype, where the others are in any.
ON_IMAGES = Weights._fields.index("taps_h")


class Affine(NamedTuple):
    """The phases' BatchNorms as maps ``scale theta + shift``, (C) each."""

    scale_h: Tensor
    shift_h: Tensor
    scale_w: Tensor
    shift_w: Tensor


class PhaseNorm(NamedTuple):
    """A phase's BatchNorm, (C) each; ``mean`` and ``invstd`` None: batch statistics."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    invstd: Tensor | None


class Arguments(NamedTuple):
    """Everything beside x that a gradient may be asked of: the norm in front, weights, the phases' norms.

    An autograd function takes tensors one by one: ``flat()`` is that order, and :func:`unflatten` its inverse.
    """

    norm: pre_norm.Norm
    weights: Weights
    norm_h: PhaseNorm
    norm_w: PhaseNorm

    def flat(self) -> tuple[Tensor | None, ...]:
        return (*self.norm, *self.weights, *self.norm_h, *self.norm_w)

    def norms(self) -> tuple[PhaseNorm, PhaseNorm]:
        return self.norm_h, self.norm_w

    def by_batch(self) -> bool:
        """Whether the phases are normalised by batch statistics."""
        return self.norm_h.mean is None

    def depthwise(self) -> bool:
        return self.weights.theta_h.shape[2] == 3


_PARTS = (pre_norm.Norm, Weights, PhaseNorm, PhaseNorm)
#: How many tensors :meth:`Arguments.flat` has.
COUNT = sum(len(part._fields) for part in _PARTS)


def unflatten(flat: Iterable[Tensor | None]) -> Arguments:
    rest = list(flat)
    w, h = len(pre_norm.Norm._fields), len(PhaseNorm._fields)
    norms = rest[w + len(Weights._fields) :]
    return Arguments(
        pre_norm.Norm(*rest[:w]), Weights(*rest[w : w + len(Weights._fields)]),  # type: ignore[arg-type]
        PhaseNorm(*norms[:h]), PhaseNorm(*norms[h:]),
    )  # fmt: skip
