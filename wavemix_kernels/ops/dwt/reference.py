"""Any separable 2-D wavelet in plain PyTorch operations: extend the signal, convolve with stride 2.

Differentiable to any order with the true gradient, in the signal and in the filters. Sizes, alignment and
extension are those of PyWavelets' `dwt2` and `idwt2`. float16 and bfloat16 are computed in float32, levels
recurse on the float32 LL, and every output is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels.ops.common.dtypes import accumulate_dtype, without_autocast
from wavemix_kernels.ops.haar.reference import half_up


class Filters(NamedTuple):
    """A two-channel filter bank per axis; the two filters of an axis have equally many taps, at least 2.

    Analysis filters are stored mirrored (what `conv2d`, a correlation, wants), synthesis filters are not. Any
    shape: only the order of the taps counts.
    """

    low_w: Tensor  # along W
    high_w: Tensor
    low_h: Tensor  # along H
    high_h: Tensor


def coefficient_size(size: int, taps: int, mode: str) -> int:
    """Number of coefficients that `size` samples give in one level."""
    return half_up(size) if mode == "periodization" else (size + taps - 1) // 2


def sample_size(size: int, taps: int, mode: str) -> int:
    """Number of samples that `size` coefficients give back in one level, before any crop."""
    return 2 * size if mode == "periodization" else 2 * size - taps + 2


def separable_dwt2d(x: Tensor, filters: Filters, levels: int = 1, *, mode: str = "zero") -> tuple[Tensor, list[Tensor]]:
    """`levels` levels of analysis of x (N, C, H, W); `mode` is a key of `haar.MODES` other than 'per'.

    Returns ll (N, C, h_L, w_L) and highs, finest first, each (N, C, 3, h_l, w_l) with bands LH, HL, HH, all
    of x's dtype and contiguous. Raises ValueError where mode 'reflect' or 'antireflect' meets a size of 1,
    which has nothing to reflect.
    """
    with without_autocast(x):  # which would run the convolutions, and so LL between levels, in a half type
        ll = x.to(accumulate_dtype(x.dtype))
        bank = Filters(*(f.to(ll.dtype) for f in filters))
        highs = []
        for _ in range(levels):
            rows = _split(ll, bank.low_w, bank.high_w, -1, mode)
            bands = _split(rows, bank.low_h, bank.high_h, -2, mode).unflatten(1, (ll.shape[1], 4))
            ll = bands[:, :, 0]
            # Copied apart, so that whoever holds a high does not keep every level's LL alive.
            highs.append(bands[:, :, 1:].to(x.dtype).contiguous())
        return ll.to(x.dtype).contiguous(), highs


def separable_idwt2d(ll: Tensor, highs: Sequence[Tensor | None], filters: Filters, *, mode: str = "zero") -> Tensor:
    """Inverse of `separable_dwt2d`: ll (N, C, h, w) and highs, finest first, None for a level of zeros.

    A running LL one row or column larger than its level's high is cropped, since the finer size was odd.
    Returns (N, C, H, W) of ll's dtype, contiguous, with H = sample_size(h_1, ...). Raises ValueError where the sizes
    of a level do not match, and where it has fewer coefficients than the filters reach over.
    """
    sizes = synthesis_sizes(ll, highs, (filters.low_h.numel(), filters.low_w.numel()), mode)
    with without_autocast(ll):
        x = ll.to(accumulate_dtype(ll.dtype))
        bank = Filters(*(f.to(x.dtype) for f in filters))
        for high, size in zip(reversed(highs), sizes[:-1], strict=True):
            x = cropped(x, size)
            if high is None:  # the high-pass half of the bank is left out: no zeros are made
                x = _merge(_merge(x, (bank.low_h,), -2, mode), (bank.low_w,), -1, mode)
            else:
                bands = torch.cat((x.unsqueeze(2), high.to(x.dtype)), 2).flatten(1, 2)
                columns = _merge(bands, (bank.low_h, bank.high_h), -2, mode)
                x = _merge(columns, (bank.low_w, bank.high_w), -1, mode)
        return x.to(ll.dtype).contiguous()


def separable_dwt1d(
    x: Tensor, filters: Sequence[Tensor], levels: int = 1, *, mode: str = "zero"
) -> tuple[Tensor, list[Tensor]]:
    """`levels` levels of analysis of x (N, C, L) along L by the filters (low, high), mirrored.

    Returns low (N, C, l_L) and highs, finest first, each (N, C, l_l), of x's dtype and contiguous. Raises ValueError
    as `separable_dwt2d`.
    """
    with without_autocast(x):
        low = x.to(accumulate_dtype(x.dtype)).unsqueeze(2)
        bank = [f.to(low.dtype) for f in filters]
        highs = []
        for _ in range(levels):
            bands = _split(low, bank[0], bank[1], -1, mode).unflatten(1, (low.shape[1], 2))
            low = bands[:, :, 0]
            highs.append(bands[:, :, 1].squeeze(2).to(x.dtype).contiguous())
        return low.squeeze(2).to(x.dtype).contiguous(), highs


def separable_idwt1d(
    low: Tensor, highs: Sequence[Tensor | None], filters: Sequence[Tensor], *, mode: str = "zero"
) -> Tensor:
    """Inverse of `separable_dwt1d`: low (N, C, l) and highs, finest first, None for a level of zeros.

    Cropped, and refused, as `separable_idwt2d` does. Returns (N, C, L) of low's dtype.
    """
    sizes = synthesis_lengths(low, highs, filters[0].numel(), mode, -1)
    with without_autocast(low):
        x = low.to(accumulate_dtype(low.dtype)).unsqueeze(2)
        bank = tuple(f.to(x.dtype) for f in filters)
        for high, size in zip(reversed(highs), sizes[:-1], strict=True):
            x = x[..., :size]
            if high is None:
                x = _merge(x, bank[:1], -1, mode)
            else:
                bands = torch.stack((x, high.to(x.dtype).unsqueeze(2)), 2).flatten(1, 2)
                x = _merge(bands, bank, -1, mode)
        return x.squeeze(2).to(low.dtype)


class Lattice(NamedTuple):
    """The samples that the coefficients of an axis read: coefficient k = 0 ... length - 1 is the sum over t of
    filter[t] * sample[start + stride * k + step * t]; start <= 0."""

    start: int
    length: int
    stride: int = 1
    step: int = 1


def separable_bank(x: Tensor, filters: Filters, h: Lattice, w: Lattice, mode: str) -> Tensor:
    """One level of x (N, C, H, W) on the lattices of its axes, past the ends as `mode`, a key of `haar.MODES` other
    than 'per', says. Returns (N, C, 4, h.length, w.length), bands LL, LH, HL, HH, of x's dtype."""
    with without_autocast(x):
        exact = x.to(accumulate_dtype(x.dtype))
        bank = Filters(*(f.to(exact.dtype) for f in filters))
        rows = bank_along(exact, bank.low_w, bank.high_w, -1, w, mode)
        bands = bank_along(rows, bank.low_h, bank.high_h, -2, h, mode)
        return bands.unflatten(1, (x.shape[1], 4)).to(x.dtype)


def separable_bank_transpose(
    ll: Tensor, high: Tensor | None, filters: Filters, h: Lattice, w: Lattice, size: Sequence[int], mode: str
) -> Tensor:
    """The transpose of :func:`separable_bank`, from its first band (N, C, h.length, w.length) and the other three
    (N, C, 3, h.length, w.length), None for zeros, to (N, C, *size) of ll's dtype."""
    with without_autocast(ll):
        first = ll.to(accumulate_dtype(ll.dtype)).unsqueeze(2)
        rest = first.new_zeros(()).expand(*ll.shape[:2], 3, *ll.shape[2:]) if high is None else high.to(first.dtype)
        bank = Filters(*(f.to(first.dtype) for f in filters))
        bands = torch.cat((first, rest), 2).flatten(1, 2)
        rows = _bank_back(bands, bank.low_h, bank.high_h, -2, h, size[0], mode)
        return _bank_back(rows, bank.low_w, bank.high_w, -1, w, size[1], mode).to(ll.dtype)


def bank_along(x: Tensor, low: Tensor, high: Tensor, dim: int, lattice: Lattice, mode: str) -> Tensor:
    """x (N, C, H, W) to (N, 2C, h, w), low and high by turns."""
    start, count, stride, step = lattice
    taps = low.numel()
    length = stride * (count - 1) + step * (taps - 1) + 1
    x = extend(x, dim, -start, max(0, start + length - x.shape[dim]), mode).narrow(dim, 0, length)
    kernel = torch.stack((low.flatten(), high.flatten())).reshape(2, 1, *_along(dim, taps, 1))
    return _convolve(x, kernel, _along(dim, stride, 1), _along(dim, step, 1))


def _bank_back(bands: Tensor, low: Tensor, high: Tensor, dim: int, lattice: Lattice, size: int, mode: str) -> Tensor:
    """The transpose of :func:`bank_along`, to lines of `size`."""
    start, _, stride, step = lattice
    channels = bands.shape[1] // 2
    kernel = torch.stack((low.flatten(), high.flatten())).reshape(2, 1, *_along(dim, low.numel(), 1))
    wide = F.conv_transpose2d(
        bands, kernel.repeat(channels, 1, 1, 1), stride=_along(dim, stride, 1), dilation=_along(dim, step, 1),
        groups=channels,
    )  # fmt: skip
    wide = extend(wide, dim, 0, max(0, size - start - wide.shape[dim]), "zero")
    return fold(wide, dim, -start, size, mode)


def fold(wide: Tensor, dim: int, before: int, size: int, mode: str) -> Tensor:
    """The transpose of :func:`extend`: `before` samples in front of a line of `size` and all behind it are added to
    those within that they are sums of."""
    after = wide.shape[dim] - before - size
    inside = wide.narrow(dim, before, size)
    if mode == "zero":
        return inside
    border = torch.cat((wide.narrow(dim, 0, before), wide.narrow(dim, before + size, after)), dim)
    samples = extend(torch.eye(size, dtype=wide.dtype, device=wide.device), -1, before, after, mode)
    of_border = torch.cat((samples[:, :before], samples[:, before + size :]), 1)
    return inside + (border.movedim(dim, -1) @ of_border.mT).movedim(-1, dim)


def synthesis_lengths(low: Tensor, highs: Sequence[Tensor | None], taps: int, mode: str, dim: int) -> list[int]:
    """The length along `dim` at which each level reads its low-pass, coarsest first, then that of the result; raises
    as `synthesis_sizes`."""
    shape = list(low.shape)
    sizes = []
    for level in range(len(highs), 0, -1):
        high = highs[level - 1]
        if high is not None:
            fewer = [s - 1 if d == dim % low.ndim else s for d, s in enumerate(shape)]
            if list(high.shape) not in (shape, fewer):
                raise ValueError(
                    f"yh[{level - 1}]: expected shape {tuple(shape)} to go with the low-pass there, or one less along "
                    f"axis {dim} where the finer length is odd, got {tuple(high.shape)}"
                )
            shape[dim] = high.shape[dim]
        sizes.append(shape[dim])
        shape[dim] = sample_size(shape[dim], taps, mode)
        if shape[dim] < 1:
            raise ValueError(
                f"mode={mode!r}: filters of {taps} taps need at least {taps // 2} coefficients, got {sizes[-1]} at "
                f"level {level}"
            )
    return [*sizes, shape[dim]]


def synthesis_sizes(
    ll: Tensor, highs: Sequence[Tensor | None], taps: tuple[int, int], mode: str
) -> list[tuple[int, int]]:
    """The (h, w) at which each level reads its LL, coarsest first, then the (H, W) of the result.

    `taps` are the lengths of the filters along H and W. Raises ValueError as `separable_idwt2d` says.
    """
    n, c, h, w = ll.shape
    sizes = []
    for level in range(len(highs), 0, -1):
        high = highs[level - 1]
        if high is not None:
            high_h, high_w = high.shape[-2:]
            if high.shape[:2] != (n, c) or h - high_h not in (0, 1) or w - high_w not in (0, 1):
                raise ValueError(
                    f"yh[{level - 1}]: expected shape {(n, c, 3, h, w)} to go with the low-pass there, or a row or "
                    f"column less where the finer size is odd, got {tuple(high.shape)}"
                )
            h, w = high_h, high_w
        sizes.append((h, w))
        h, w = sample_size(h, taps[0], mode), sample_size(w, taps[1], mode)
        if h < 1 or w < 1:
            raise ValueError(
                f"mode={mode!r}: filters of {taps} taps along H and W need at least "
                f"{(taps[0] // 2, taps[1] // 2)} coefficients, got {sizes[-1]} at level {level}"
            )
    return [*sizes, (h, w)]


def cropped(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The first rows and columns of x (..., H, W), x itself where that is all of it."""
    return x if x.shape[-2:] == size else x[..., : size[0], : size[1]]


def extend(x: Tensor, dim: int, left: int, right: int, mode: str) -> Tensor:
    """x with `left` and `right` samples more along `dim` (-1 or -2), as `mode` extrapolates.

    `mode` is a key of `haar.MODES` other than 'per'. Borders longer than the signal are right too. Only
    borders are gathered, so the gradient scatters nothing else.
    """
    if mode == "zero":
        return F.pad(x, (left, right) if dim == -1 else (0, 0, left, right))
    n = x.shape[dim]
    pieces = [x]
    if left > 0:
        at = torch.arange(-left, 0, device=x.device)
        pieces.insert(0, _extrapolate(x, dim, at, mode, _stretch(x, dim, left, True, mode)))
    if right > 0:
        at = torch.arange(n, n + right, device=x.device)
        pieces.append(_extrapolate(x, dim, at, mode, _stretch(x, dim, right, False, mode)))
    return torch.cat(pieces, dim) if len(pieces) > 1 else x


def _stretch(x: Tensor, dim: int, count: int, before: bool, mode: str) -> Tensor | None:
    """The samples of x that `mode` repeats on the `count` places before or behind it; None: not one stretch of it.

    No index, since Inductor's gradient of one writes out of bounds on a CPU (torch 2.13).
    """
    n = x.shape[dim]
    if mode in ("symmetric", "antisymmetric", "reflect", "antireflect"):
        end = 1 if mode in ("reflect", "antireflect") else 0  # samples that are not repeated
        if count + end > n:
            return None
        return x.narrow(dim, end if before else n - end - count, count).flip(dim)
    if mode == "periodization" and n % 2:  # of the signal whose last sample stands twice
        if count > n:
            return None
        rest, twice = x.narrow(dim, n + 1 - count if before else 0, count - 1), x.narrow(dim, n - 1, 1)
        return torch.cat((rest, twice) if before else (twice, rest), dim)
    if mode in ("periodic", "periodization") and count <= n:
        return x.narrow(dim, n - count if before else 0, count)
    return None


def _extrapolate(x: Tensor, dim: int, at: Tensor, mode: str, stretch: Tensor | None) -> Tensor:
    """Samples of the infinitely extended x at the positions `at`, all of them outside 0 ... n - 1."""
    n = x.shape[dim]
    first, last = x.narrow(dim, 0, 1), x.narrow(dim, n - 1, 1)

    def take(index: Tensor) -> Tensor:
        return x.index_select(dim, index) if stretch is None else stretch

    def along(values: Tensor) -> Tensor:
        return values.reshape((-1, 1) if dim == -2 else (-1,))

    before = along(at < 0)
    if mode == "constant" or (mode == "smooth" and n == 1):  # a single sample has no slope
        return torch.where(before, first, last)
    if mode == "smooth":
        slope = torch.where(before, x.narrow(dim, 1, 1) - first, last - x.narrow(dim, n - 2, 1))
        distance = at - at.clamp(0, n - 1)
        return torch.where(before, first, last) + along(distance).to(x.dtype) * slope
    if mode == "periodic":
        return take(at % n)
    if mode == "periodization":  # of the signal whose odd end is repeated
        return take((at % (n + n % 2)).clamp(max=n - 1))
    if mode in ("symmetric", "antisymmetric"):
        phase = at % (2 * n)  # forwards, then backwards, both end samples twice
        backwards = phase >= n
        samples = take(torch.where(backwards, 2 * n - 1 - phase, phase))
        return torch.where(along(backwards), -samples, samples) if mode == "antisymmetric" else samples
    if n == 1:
        raise ValueError(
            f"mode={mode!r}: a level meets a single sample along {'H' if dim == -2 else 'W'}, which has nothing "
            f"to reflect; use fewer levels or mode='symmetric'"
        )
    period = 2 * (n - 1)
    phase = at % period  # forwards, then backwards, both end samples once
    backwards = phase >= n
    samples = take(torch.where(backwards, period - phase, phase))
    if mode == "reflect":
        return samples
    # 'antireflect' is odd about either end point, so every period adds the same rise once more.
    periods = torch.div(at, period, rounding_mode="floor")
    rise = along(periods).to(x.dtype) * (2 * (last - first))
    return torch.where(along(backwards), 2 * last - samples, samples) + rise


def _split(x: Tensor, low: Tensor, high: Tensor, dim: int, mode: str) -> Tensor:
    """One level of analysis along `dim`: x (N, C, H, W) to (N, 2C, h, w), low and high by turns."""
    n, taps = x.shape[dim], low.numel()
    if mode == "periodization":
        x = extend(x, dim, taps - 1 - taps // 2, taps // 2 - 1 + n % 2, mode)
    else:
        # Coefficient k reads the samples 2k + 2 - taps ... 2k + 1.
        x = extend(x, dim, taps - 2, 2 * coefficient_size(n, taps, mode) - n, mode)
    kernel = torch.stack((low.flatten(), high.flatten())).reshape(2, 1, *_along(dim, taps, 1))
    return _convolve(x, kernel, _along(dim, 2, 1))


def _merge(bands: Tensor, filters: tuple[Tensor, ...], dim: int, mode: str) -> Tensor:
    """One level of synthesis along `dim`: bands (N, K * C, h, w), K by turns with a filter each, to (N, C, H, W).

    Even and odd samples are one convolution each (the filters' two phases), which spares the products with
    inserted zeros that a transposed convolution is made of.
    """
    n, taps = bands.shape[dim], filters[0].numel()
    size, start = sample_size(n, taps, mode), 0
    if mode == "periodization":
        # Wrapped around before the convolution, not after: exact for filters longer than the signal too.
        left = (taps - taps // 2) // 2
        start = 2 * left - (taps - taps // 2 - 1)
        bands = extend(bands, dim, left, (start + taps - 1) // 2 - left, "periodic")
    weight = torch.stack([f.flatten() for f in filters])
    if taps % 2:  # a zero tap makes the phases equally long
        weight, bands = F.pad(weight, (1, 0)), extend(bands, dim, 0, 1, "zero")
    phases = weight.flip(1).unflatten(1, (-1, 2)).permute(2, 0, 1).flip(0)
    kernel = phases.reshape(2, len(filters), *_along(dim, phases.shape[-1], 1))
    samples = _convolve(bands, kernel, (1, 1))
    even, odd = samples.unflatten(1, (bands.shape[1] // len(filters), 2)).unbind(2)
    return torch.stack((even, odd), dim).flatten(dim - 1, dim).narrow(dim, start, size)


def _convolve(x: Tensor, kernel: Tensor, stride: tuple[int, int], dilation: tuple[int, int] = (1, 1)) -> Tensor:
    """`kernel` (2, K, h, w) on each K channels of x (N, K * C, H, W) to (N, 2 * C, ...)."""
    channels = x.shape[1] // kernel.shape[1]
    if channels == 0:  # conv2d takes no samples, but not no channels
        none = F.conv2d(x.reshape(0, kernel.shape[1], *x.shape[2:]), kernel, stride=stride, dilation=dilation)
        return none.reshape(x.shape[0], 0, *none.shape[2:])
    return F.conv2d(x, kernel.repeat(channels, 1, 1, 1), stride=stride, dilation=dilation, groups=channels)


def _along(dim: int, size: int, other: int) -> tuple[int, int]:
    """(height, width) with `size` along `dim` and `other` along the other axis."""
    return (size, other) if dim == -2 else (other, size)
