"""``haar_dwt1d`` along any axis, ``haar_dwt3d`` of volumes, and their inverses, on the kernel of
:mod:`wavemix_kernels.ops.haar.blocks`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wavemix_kernels import backends, checks, fx
from wavemix_kernels.ops.haar import blocks
from wavemix_kernels.ops.haar.op import MODES
from wavemix_kernels.ops.haar.reference import NEEDS_TWO, half_up

#: The bands of one level in 3-D, in the order of PyWavelets' ``dwtn``: "a" sums, "d" differences, along D, H, W.
BANDS3D = ("aaa", "aad", "ada", "add", "daa", "dad", "dda", "ddd")
_VOLUME = (2, 3, 4)


def haar_dwt3d(
    x: Tensor, levels: int = 1, *, mode: str = "zero", backend: str | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Orthonormal 3-D Haar wavelet analysis.

    Args:
        x: (N, C, D, H, W), float64, float32, float16 or bfloat16, any strides.
        levels: how many, at least 1.
        mode: what stands past the end where a level's size is odd, as in :func:`wavemix_kernels.haar_dwt2d`.
        backend: for this call instead of the ambient :class:`wavemix_kernels.backend`; all but ``"cuda"``.

    Returns:
        ``(lll, highs)``: lll (N, C, d_L, h_L, w_L) and ``highs[l-1]`` (N, C, 7, d_l, h_l, w_l), the finest level first,
        with the bands ``BANDS3D[1:]``; in x's dtype. Differentiable any number of times.

    Raises:
        TypeError, ValueError: as :func:`wavemix_kernels.haar_dwt2d`.
        RuntimeError: the backend asked for is not installed.

    Source: PyWavelets' ``dwtn`` with wavelet "haar".
    """
    if isinstance(x, fx.Proxy):
        return fx.call_function(haar_dwt3d, x, levels, mode=mode, backend=backends.requested(backend))
    checks.check_tensor("x", x, 5, "(N, C, D, H, W)")
    _check(levels, mode, dict(zip("DHW", x.shape[2:], strict=True)))
    highs = []
    for _ in range(levels):
        bands = blocks.split(
            x, _VOLUME, range(8), [8**-0.5] * 8, mode=mode, layout="batch", backend=backends.requested(backend)
        )
        x = bands[:, :, 0]
        highs.append(bands[:, :, 1:])
    return x, highs


def haar_idwt3d(
    lll: Tensor, highs: Sequence[Tensor], *, mode: str = "zero", size: tuple[int, int, int] | None = None,
    add: Tensor | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Orthonormal 3-D Haar wavelet synthesis: the inverse of :func:`haar_dwt3d`.

    Args:
        lll: (N, C, d_L, h_L, w_L).
        highs: of each level, finest first, (N, C, 7, d_l, h_l, w_l), of lll's dtype and device.
        mode: accepted for symmetry: Haar's inverse crops in every mode.
        size: (D, H, W) of the output; default: twice the finest bands'. Give it to get an odd size back.
        add: (N, C, D, H, W) to add to the result.
        backend: as for :func:`haar_dwt3d`.

    Returns:
        (N, C, D, H, W) in lll's dtype.

    Raises:
        TypeError, ValueError: no such tensors, or shapes that do not belong together.
        RuntimeError: the backend asked for is not installed.
    """
    if isinstance(lll, fx.Proxy):
        name = backends.requested(backend)
        return fx.call_function(haar_idwt3d, lll, highs, mode=mode, size=size, add=add, backend=name)
    checks.check_choice("mode", mode, MODES)
    checks.check_tensor("lll", lll, 5, "(N, C, d, h, w)")
    _check_highs(highs, lll, 6, "(N, C, 7, d, h, w)")
    out = lll
    for level in reversed(range(len(highs))):
        high = highs[level]
        if high.shape[2] != 7 or high.shape[3:] != out.shape[2:] or high.shape[:2] != out.shape[:2]:
            raise ValueError(
                f"highs[{level}]: expected shape {(*out.shape[:2], 7, *out.shape[2:])}, got {tuple(high.shape)}"
            )
        target = _target(level, highs, 3, size)
        bands = torch.cat((out.unsqueeze(2), high), 2)
        last = blocks.is_channels_last(high[:, :, 0])
        out = blocks.join(
            bands, _VOLUME, range(8), [8**-0.5] * 8, target, repeat=False, channels_last=last,
            backend=backends.requested(backend),
        )  # fmt: skip
    return out if add is None else _added(out, add)


def haar_dwt1d(
    x: Tensor, levels: int = 1, *, dim: int = -1, mode: str = "zero", backend: str | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Orthonormal 1-D Haar wavelet analysis of ``x`` along ``dim``: ``(a + b) / sqrt 2`` and ``(a - b) / sqrt 2``.

    Args:
        x: any shape, float64, float32, float16 or bfloat16, any strides.
        levels: how many, at least 1.
        dim: the axis that is transformed.
        mode, backend: as for :func:`haar_dwt3d`.

    Returns:
        ``(low, highs)``: low with the last level's sums, ``highs[l-1]`` with level l's differences, the finest level
        first; n_l = ceil(n_{l-1} / 2) coefficients along ``dim``, other axes and memory order as ``x`` has them.

    Raises:
        TypeError, ValueError: as :func:`wavemix_kernels.haar_dwt2d`; IndexError: no such ``dim``.
        RuntimeError: the backend asked for is not installed.
    """
    if isinstance(x, fx.Proxy):
        name = backends.requested(backend)
        return fx.call_function(haar_dwt1d, x, levels, dim=dim, mode=mode, backend=name)
    _check_line("x", x)
    dim = _axis(x, dim)
    _check(levels, mode, {f"dim {dim}": x.shape[dim]})
    order = _physical(x)
    highs = []
    for _ in range(levels):
        lines, axis = _as_lines(x, order, dim)
        bands = blocks.split(
            lines, (axis,), range(2), [0.5**0.5] * 2, mode=mode, layout="batch", backend=backends.requested(backend)
        )
        high = _as_given(bands[:, :, 1], axis, x, order, dim)
        x = _as_given(bands[:, :, 0], axis, x, order, dim)
        highs.append(high)
    return x, highs


def haar_idwt1d(
    low: Tensor, highs: Sequence[Tensor], *, dim: int = -1, mode: str = "zero", size: int | None = None,
    add: Tensor | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Orthonormal 1-D Haar wavelet synthesis along ``dim``: the inverse of :func:`haar_dwt1d`.

    Args:
        low: any shape.
        highs: of each level, finest first, of low's dtype, device and other sizes.
        size: how many samples the output has along ``dim``; default: twice the finest level's.
        add: a tensor of the output's shape to add to it.
        dim, mode, backend: as for :func:`haar_dwt1d`.

    Returns:
        The samples, in low's dtype.

    Raises:
        TypeError, ValueError: no such tensors, or shapes that do not belong together; IndexError: no such ``dim``.
        RuntimeError: the backend asked for is not installed.
    """
    if isinstance(low, fx.Proxy):
        name = backends.requested(backend)
        return fx.call_function(haar_idwt1d, low, highs, dim=dim, mode=mode, size=size, add=add, backend=name)
    checks.check_choice("mode", mode, MODES)
    _check_line("low", low)
    _check_highs(highs, low, low.dim(), "of low's rank")
    dim, out, order = _axis(low, dim), low, _physical(low)
    for level in reversed(range(len(highs))):
        high = highs[level]
        if high.shape != out.shape:
            raise ValueError(f"highs[{level}]: expected shape {tuple(out.shape)}, got {tuple(high.shape)}")
        finer = 2 * high.shape[dim] if level == 0 else highs[level - 1].shape[dim]
        n = size if level == 0 and size is not None else finer
        if half_up(n) != high.shape[dim]:
            raise ValueError(f"size={n}: {high.shape[dim]} coefficients at level {level + 1} give {finer} or one less")
        (sums, axis), (differences, _) = _as_lines(out, order, dim), _as_lines(high, order, dim)
        lines = blocks.join(
            torch.stack((sums, differences), 2), (axis,), range(2), [0.5**0.5] * 2,
            [n if a == axis else sums.shape[a] for a in _VOLUME], repeat=False, backend=backends.requested(backend),
        )  # fmt: skip
        out = _as_given(lines, axis, out, order, dim)
    return out if add is None else _added(out, add)


# --- Checks ----------------------------------------------------------------------------------------------


def _check(levels: int, mode: str, sizes: dict[str, int]) -> None:
    checks.check_positive_int("levels", levels)
    checks.check_choice("mode", mode, MODES)
    for axis, n in sizes.items():
        for level in range(1, levels + 1):
            if mode in NEEDS_TWO and n == 1:
                raise ValueError(
                    f"mode={mode!r}: level {level} meets a single sample along {axis}, which has nothing to reflect"
                )
            n = half_up(n)


def _check_line(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {checks.describe(x)}")
    checks.check_tensor(name, x, max(x.dim(), 1), "(..., n, ...)")


def _check_highs(highs: Sequence[Tensor], low: Tensor, rank: int, shape: str) -> None:
    if isinstance(highs, Tensor) or not isinstance(highs, Sequence) or len(highs) == 0:
        raise TypeError(f"highs: expected a list with one tensor for each level, got {checks.describe(highs)}")
    for i, high in enumerate(highs):
        checks.check_tensor(f"highs[{i}]", high, rank, shape)
        checks.check_same_device(f"highs[{i}]", high, "low", low)
        if high.dtype != low.dtype:
            raise TypeError(f"highs[{i}]: {high.dtype}, the coarsest coefficients are {low.dtype}")


def _target(level: int, highs: Sequence[Tensor], axes: int, size: Sequence[int] | None) -> list[int]:
    here = [int(n) for n in highs[level].shape[-axes:]]
    wanted = list(highs[level - 1].shape[-axes:]) if level else list(size or [2 * n for n in here])
    if len(wanted) != axes or [half_up(n) for n in wanted] != here:
        raise ValueError(f"size={tuple(wanted)}: bands of {tuple(here)} give twice as many or one less on each axis")
    return wanted


def _added(out: Tensor, add: Tensor) -> Tensor:
    if add.shape != out.shape:
        raise ValueError(f"add: expected shape {tuple(out.shape)}, got {tuple(add.shape)}")
    return out + add


# --- Lines of a tensor of any rank -----------------------------------------------------------------------


def _axis(x: Tensor, dim: int) -> int:
    if not -x.dim() <= dim < x.dim():
        raise IndexError(f"dim={dim}: expected {-x.dim()} to {x.dim() - 1} for a tensor of shape {tuple(x.shape)}")
    return dim % x.dim()


def _physical(x: Tensor) -> list[int]:
    """The axes from the outermost in memory to the innermost."""
    strides = x.stride()
    return sorted(range(x.dim()), key=lambda i: -strides[i])


def _as_lines(x: Tensor, order: list[int], dim: int) -> tuple[Tensor, int]:
    """(outer, 1, 1, n, inner) and its axis 3, or (outer, 1, 1, 1, n) and axis 4: a view of a dense tensor."""
    place = order.index(dim)
    sizes = [x.shape[i] for i in order]
    outer, n, inner = math.prod(sizes[:place]), sizes[place], math.prod(sizes[place + 1 :])
    dense = x.permute(order)
    if inner == 1:
        return dense.reshape(outer, 1, 1, 1, n), 4
    return dense.reshape(outer, 1, 1, n, inner), 3


def _as_given(lines: Tensor, axis: int, x: Tensor, order: list[int], dim: int) -> Tensor:
    sizes = [lines.shape[axis] if i == dim else x.shape[i] for i in order]
    return lines.reshape(sizes).permute([order.index(i) for i in range(x.dim())])
