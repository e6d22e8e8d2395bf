"""Complex coefficients of six orientations from the quads of three real bands, and back.

A quad is 2 x 2 real coefficients a b / c d of a band. Its two complex numbers are ((a - d) + i (b + c)) / sqrt(2) and
((a + d) + i (b - c)) / sqrt(2): an orthonormal map, so its transpose is its inverse. Band LH gives the orientations 15
and 165 degrees, HL 75 and 105, HH 45 and 135.

Level 1 has its quads in one image of bands. At the other levels each of the four belongs to one pair of trees along H
and W, whose bands are a tensor of their own.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from wavemix_kernels.ops.common.transforms import in_transform

_ROOT_HALF = math.sqrt(0.5)
#: Where the two complex numbers of bands LH, HL, HH go among 15, 45, 75, 105, 135, 165 degrees.
_ORIENTATIONS = ((0, 5), (2, 3), (1, 4))


def to_complex(bands: Sequence[Tensor], o_dim: int, ri_dim: int) -> tuple[Tensor, Tensor]:
    """Low-pass and complex coefficients of the bands LL, LH, HL, HH of one level.

    Args:
        bands: one (N, C, 4, 2h, 2w), or the four (N, C, 4, h, w) of trees (a, a), (a, b), (b, a), (b, b) along H and W.
        o_dim, ri_dim: axes of the six orientations and of real and imaginary part, of six.

    Returns:
        (N, C, 2h, 2w), and (N, C, 6, h, w, 2) with its axes where they belong.
    """
    if plain_wanted():
        return _gathered(bands, o_dim, ri_dim)
    low, z = _ToComplex.apply(o_dim, ri_dim, *bands)
    return low, z


def from_complex(low: Tensor, z: Tensor, o_dim: int, ri_dim: int, trees: bool) -> tuple[Tensor, ...]:
    """The bands of :func:`to_complex`: four where `trees`, else one."""
    if plain_wanted():
        return _scattered(low, z, o_dim, ri_dim, trees)
    bands: tuple[Tensor, ...] = _FromComplex.apply(o_dim, ri_dim, trees, low, z)
    return bands


def interleaved(corners: Sequence[Tensor]) -> Tensor:
    """(..., 2h, 2w) of its corners a, b, c, d."""
    a, b, c, d = corners
    upper, lower = torch.stack((a, b), -1).flatten(-2), torch.stack((c, d), -1).flatten(-2)
    return torch.stack((upper, lower), -2).flatten(-3, -2)


def plain_wanted() -> bool:
    """Whether differentiable operations are wanted instead of functions that write into their outputs."""
    return torch.compiler.is_compiling() or in_transform() or forward_ad._current_level >= 0


class _ToComplex(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o_dim: int, ri_dim: int, *bands: Tensor) -> tuple[Tensor, Tensor]:
        ctx.layout = o_dim, ri_dim, len(bands) == 4
        first = bands[0]
        n, c, _, h, w = first.shape
        h, w = (h, w) if len(bands) == 4 else (h // 2, w // 2)
        low = first.new_empty((n, c, 2 * h, 2 * w))
        for quad, to in zip(_corners(bands, 0), _quads(low), strict=True):
            to.copy_(quad)
        shape = [n, c, h, w]
        for dim, size in sorted(((o_dim % 6, 6), (ri_dim % 6, 2))):
            shape.insert(dim, size)
        z = first.new_empty(shape)
        parts = z.movedim((o_dim, ri_dim), (2, 5))
        for band, places in enumerate(_ORIENTATIONS, 1):
            a, b, c_, d = _corners(bands, band)
            one, other = (parts[:, :, place] for place in places)
            torch.sub(a, d, out=one[..., 0])
            torch.add(b, c_, out=one[..., 1])
            torch.add(a, d, out=other[..., 0])
            torch.sub(b, c_, out=other[..., 1])
        return low, z.mul_(_ROOT_HALF)

    @staticmethod
    def backward(ctx: Any, d_low: Tensor, d_z: Tensor) -> tuple[Any, ...]:
        o_dim, ri_dim, trees = ctx.layout
        return (None, None, *from_complex(d_low, d_z, o_dim, ri_dim, trees))


class _FromComplex(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o_dim: int, ri_dim: int, trees: bool, low: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        ctx.layout = o_dim, ri_dim
        parts = z.movedim((o_dim, ri_dim), (2, 5))
        n, c, _, h, w, _ = parts.shape
        bands = tuple(
            low.new_empty((n, c, 4, h, w) if trees else (n, c, 4, 2 * h, 2 * w)) for _ in range(4 if trees else 1)
        )
        for quad, to in zip(_quads(low), _corners(bands, 0), strict=True):
            to.copy_(quad)
        for band, places in enumerate(_ORIENTATIONS, 1):
            (one_r, one_i), (other_r, other_i) = (parts[:, :, place].unbind(-1) for place in places)
            a, b, c_, d = _corners(bands, band)
            torch.add(one_r, other_r, out=a).mul_(_ROOT_HALF)
            torch.add(one_i, other_i, out=b).mul_(_ROOT_HALF)
            torch.sub(one_i, other_i, out=c_).mul_(_ROOT_HALF)
            torch.sub(other_r, one_r, out=d).mul_(_ROOT_HALF)
        return bands

    @staticmethod
    def backward(ctx: Any, *d_bands: Tensor) -> tuple[Any, ...]:
        return (None, None, None, *to_complex(d_bands, *ctx.layout))


def _gathered(bands: Sequence[Tensor], o_dim: int, ri_dim: int) -> tuple[Tensor, Tensor]:
    low = interleaved(_corners(bands, 0))
    oriented: list[Any] = [None] * 6
    for band, (one, other) in enumerate(_ORIENTATIONS, 1):
        a, b, c, d = _corners(bands, band)
        oriented[one] = torch.stack((a - d, b + c), -1)
        oriented[other] = torch.stack((a + d, b - c), -1)
    return low, (torch.stack(oriented, 2) * _ROOT_HALF).movedim((2, 5), (o_dim, ri_dim)).contiguous()


def _scattered(low: Tensor, z: Tensor, o_dim: int, ri_dim: int, trees: bool) -> tuple[Tensor, ...]:
    parts = z.movedim((o_dim, ri_dim), (2, 5)) * _ROOT_HALF
    corners = [[quad] for quad in _quads(low)]
    for band, (one, other) in enumerate(_ORIENTATIONS, 1):
        (one_r, one_i), (other_r, other_i) = parts[:, :, one].unbind(-1), parts[:, :, other].unbind(-1)
        quads = (one_r + other_r, one_i + other_i, one_i - other_i, other_r - one_r)
        for corner, place in zip(quads, _places(band, trees), strict=True):
            corners[place].append(corner)
    bands = [torch.stack(corner, 2) for corner in corners]
    return tuple(bands) if trees else (interleaved(bands),)


def _quads(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, b, c, d of each quad of x (..., 2h, 2w)."""
    return x[..., 0::2, 0::2], x[..., 0::2, 1::2], x[..., 1::2, 0::2], x[..., 1::2, 1::2]


def _places(band: int, trees: bool) -> tuple[int, int, int, int]:
    """The corners that hold a, b, c, d of a band: a high-pass of the second tree comes first."""
    flip = band if trees else 0  # bit 0: along H, bit 1: along W
    row, column = flip & 1, flip >> 1
    a, b, c, d = (2 * (r ^ row) + (k ^ column) for r in (0, 1) for k in (0, 1))
    return a, b, c, d


def _corners(bands: Sequence[Tensor], band: int) -> list[Tensor]:
    """a, b, c, d of each quad of a band."""
    if len(bands) == 1:
        return list(_quads(bands[0][:, :, band]))
    return [bands[place][:, :, band] for place in _places(band, True)]
