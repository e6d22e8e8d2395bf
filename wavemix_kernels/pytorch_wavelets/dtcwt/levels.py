"""One level of the dual-tree transform: a filter bank, and quads of its bands as complex numbers."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from wavemix_kernels.ops.common.transforms import in_transform
from wavemix_kernels.ops.dwt.bank import filter_bank, filter_bank_transpose, filter_banks, filter_banks_transpose
from wavemix_kernels.ops.dwt.quads import from_complex, interleaved, to_complex
from wavemix_kernels.ops.dwt.reference import Filters, Lattice


def analyse_1(
    x: Tensor, low: Tensor, high: Tensor, o_dim: int, ri_dim: int, mode: str, diagonal: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Level 1 of x (N, C, 2h, 2w): low-pass (N, C, 2h, 2w) and coefficients (N, C, 6, h, w, 2), axes 6 and 2 at `o_dim`
    and `ri_dim`. Filters are mirrored, of odd lengths; `diagonal` takes the place of `high` in HH. All modes but
    'symmetric' mean zeros."""
    bands = _bank_1(x, low, high, mode)
    if diagonal is not None:
        bands = _with_diagonal(bands, _bank_1(x, low, diagonal, mode))
    return to_complex([bands], o_dim, ri_dim)


def synthesise_1(low_pass: Tensor, z: Tensor, low: Tensor, high: Tensor, o_dim: int, ri_dim: int, mode: str) -> Tensor:
    """The transpose of :func:`analyse_1` with these filters."""
    (bands,) = from_complex(low_pass, z, o_dim, ri_dim, trees=False)
    filters, h, w = _on_every_sample(low, high, low_pass.shape[-2:])
    return filter_bank_transpose(
        bands[:, :, 0], bands[:, :, 1:], filters, h, w, low_pass.shape[-2:], mode=_border(mode)
    )


def low_1(low_pass: Tensor, low: Tensor, high: Tensor, mode: str, back: bool) -> Tensor:
    """The low-pass of level 1 alone, or where `back` its transpose."""
    filters, h, w = _on_every_sample(low, high, low_pass.shape[-2:])
    if not back:
        return _low_band(low_pass, filters, h, w, _border(mode))
    return filter_bank_transpose(low_pass, None, filters, h, w, low_pass.shape[-2:], mode=_border(mode))


def analyse_2(
    x: Tensor, trees: Sequence[tuple[Tensor, Tensor]], o_dim: int, ri_dim: int,
    diagonals: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A further level of x (N, C, 4h, 4w): low-pass (N, C, 2h, 2w) and coefficients as :func:`analyse_1`'s. `trees`
    holds low and high of the tree that reads even samples, then of the one that reads odd samples, mirrored."""
    bands = _banks_2(x, trees)
    if diagonals is not None:
        others = [(low, diagonal) for (low, _), diagonal in zip(trees, diagonals, strict=True)]
        bands = [_with_diagonal(*pair) for pair in zip(bands, _banks_2(x, others), strict=True)]
    return to_complex(bands, o_dim, ri_dim)


def low_2(x: Tensor, trees: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The low-pass of :func:`analyse_2` alone."""
    return interleaved([_low_band(x, *_of_trees(x.shape[-2:], trees, a, b), "symmetric") for a, b in _PAIRS])


def synthesise_2(
    low_pass: Tensor, z: Tensor | None, trees: Sequence[tuple[Tensor, Tensor]], o_dim: int, ri_dim: int
) -> Tensor:
    """The transpose of :func:`analyse_2` with these filters; z None means zeros."""
    size, high = [2 * n for n in low_pass.shape[-2:]], None
    if z is None:
        low = [low_pass[..., a::2, b::2] for a, b in _PAIRS]
    else:
        bands = from_complex(low_pass, z, o_dim, ri_dim, trees=True)
        low, high = [t[:, :, 0] for t in bands], [t[:, :, 1:] for t in bands]
    banks = [_of_trees(size, trees, a, b) for a, b in _PAIRS]
    return filter_banks_transpose(low, high, banks, size, mode="symmetric")


def plain_wanted() -> bool:
    """Whether differentiable operations are wanted instead of functions that write into their outputs."""
    return torch.compiler.is_compiling() or in_transform() or forward_ad._current_level >= 0


#: The trees along H and W of the four corners of a quad.
_PAIRS = ((0, 0), (0, 1), (1, 0), (1, 1))


def _bank_1(x: Tensor, low: Tensor, high: Tensor, mode: str) -> Tensor:
    filters, h, w = _on_every_sample(low, high, x.shape[-2:])
    return filter_bank(x, filters, h, w, mode=_border(mode))


def _banks_2(x: Tensor, trees: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return filter_banks(x, [_of_trees(x.shape[-2:], trees, a, b) for a, b in _PAIRS], mode="symmetric")


def _on_every_sample(low: Tensor, high: Tensor, size: Sequence[int]) -> tuple[Filters, Lattice, Lattice]:
    """The two filters around each sample, the shorter one with zeros on both sides."""
    for name, f in (("low", low), ("high", high)):
        if f.numel() % 2 == 0:
            raise ValueError(f"biort: expected filters of odd lengths, got a {name}-pass of {f.numel()} taps")
    taps = max(low.numel(), high.numel())
    low, high = (F.pad(f.flatten(), [(taps - f.numel()) // 2] * 2) for f in (low, high))
    h, w = (Lattice(-(taps // 2), n) for n in size)
    return Filters(low, high, low, high), h, w


def _of_trees(
    size: Sequence[int], trees: Sequence[tuple[Tensor, Tensor]], a: int, b: int
) -> tuple[Filters, Lattice, Lattice]:
    filters, taps = Filters(*trees[b], *trees[a]), trees[0][0].numel()
    if taps == 2:  # zeros around, as a lattice starts at the first sample or in front of it
        filters, taps = Filters(*(F.pad(f.flatten(), (1, 1)) for f in filters)), 4
    h, w = (Lattice(2 - taps + tree, n // 4, 4, 2) for tree, n in zip((a, b), size, strict=True))
    return filters, h, w


def _low_band(x: Tensor, filters: Filters, h: Lattice, w: Lattice, mode: str) -> Tensor:
    if plain_wanted() or any(f.requires_grad for f in filters):
        return filter_bank(x, filters, h, w, mode=mode)[:, :, 0]
    low: Tensor = _LowBand.apply(x, filters, h, w, mode)
    return low


class _LowBand(torch.autograd.Function):
    """The first band, whose gradient makes no zeros for the others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, filters: Filters, h: Lattice, w: Lattice, mode: str) -> Tensor:
        ctx.call, ctx.size = (filters, h, w, mode), x.shape[-2:]
        return filter_bank(x, filters, h, w, mode=mode)[:, :, 0].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        filters, h, w, mode = ctx.call
        return filter_bank_transpose(grad, None, filters, h, w, ctx.size, mode=mode), None, None, None, None


def _with_diagonal(bands: Tensor, other: Tensor) -> Tensor:
    if (torch.is_grad_enabled() and bands.requires_grad) or torch.compiler.is_compiling():
        return bands.slice_scatter(other[:, :, 3:], 2, 3, 4)
    bands[:, :, 3] = other[:, :, 3]
    return bands


def _border(mode: str) -> str:
    return "symmetric" if mode == "symmetric" else "zero"
