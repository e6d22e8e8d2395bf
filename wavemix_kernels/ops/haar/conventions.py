"""Haar's bands as public networks order, sign, scale and lay them out: a table, and the two directions by it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wavemix_kernels import backends, checks, fx
from wavemix_kernels.ops.haar import blocks, joined
from wavemix_kernels.ops.haar.reference import half_up

LAYOUTS = ("channels", "bands", "separate", "batch")


@dataclass(frozen=True)
class Convention:
    """How one code writes a level of Haar.

    Attributes:
        axes: 2 (H, W) or 3 (D, H, W).
        order: for each band the axes along which it takes differences, as bits: 4 for D, 2 for H, 1 for W.
        weight: of each band in the analysis; the plain sums and differences have weight 1.
        inverse: of each band in the synthesis.
        layout: "channels": (N, C * bands, ...), each channel's bands side by side; "bands": (N, bands * C, ...), all
            channels of a band together; "separate": a tuple of the bands; "batch": (bands * N, C, ...).
        mode: what stands past the end of an odd size (:func:`wavemix_kernels.haar_dwt2d`).
        first_frame: r rounds see the first frame 2^r times; the synthesis drops what was added.
    """

    axes: int
    order: tuple[int, ...]
    weight: tuple[float, ...]
    inverse: tuple[float, ...]
    layout: str
    mode: str = "zero"
    first_frame: bool = False


def _scaled(
    order: tuple[int, ...], scale: float, inverse: float, layout: str, signs: tuple[int, ...] = (1,) * 8, *,
    mode: str = "zero", first_frame: bool = False,
) -> Convention:  # fmt: skip
    axes = {4: 2, 8: 3}[len(order)]
    weight, back = (tuple(s * sign for _, sign in zip(order, signs, strict=False)) for s in (scale, inverse))
    return Convention(axes, order, weight, back, layout, mode, first_frame)


_ROWS_FIRST, _COLUMNS_FIRST, _CUBE = (0, 2, 1, 3), (0, 1, 2, 3), tuple(range(8))
_ROOT = 8**-0.5
#: Name -> convention. docs/use/wavelet-code.md says whose code each is.
CONVENTIONS: dict[str, Convention] = {
    "wtconv": _scaled(_ROWS_FIRST, 0.5, 0.5, "channels"),
    "swagan": _scaled(_ROWS_FIRST, 0.5, 0.5, "bands"),
    "cosmos2d": _scaled(_ROWS_FIRST, 0.25, 1.0, "bands", mode="reflect"),
    "mwcnn": _scaled(_COLUMNS_FIRST, 0.5, 0.5, "bands", (1, -1, -1, 1)),
    "diffll": _scaled(_COLUMNS_FIRST, 0.5, 0.5, "batch", (1, -1, -1, 1)),
    "irn": _scaled(_COLUMNS_FIRST, 0.25, 1.0, "bands"),
    "freia": _scaled(_COLUMNS_FIRST, 0.5, 0.5, "channels"),
    "freia_by_wavelet": _scaled(_COLUMNS_FIRST, 0.5, 0.5, "bands"),
    "wavecnet": _scaled(_COLUMNS_FIRST, 0.5, 0.5, "separate"),
    "wct2": _scaled(_COLUMNS_FIRST, 0.5, 0.5, "separate", (1, -1, -1, 1)),
    "rows_first": _scaled(_ROWS_FIRST, 0.5, 0.5, "separate"),
    "cosmos3d": _scaled(_CUBE, 0.125, 1.0, "bands", mode="reflect", first_frame=True),
    "wfvae3d": _scaled(_CUBE, 0.3536, 0.3536, "bands", first_frame=True),
    "leanvae2d": _scaled(_ROWS_FIRST, 1.0, 0.25, "bands", mode="reflect"),
    "leanvae3d": _scaled(_CUBE, 1.0, 0.125, "bands", mode="reflect"),
    "cube": _scaled(_CUBE, _ROOT, _ROOT, "bands"),
    "wdm3d": _scaled(_CUBE, _ROOT, _ROOT, "separate"),
}


def haar_bands2d(
    x: Tensor, convention: str | Convention, *, rounds: int = 1, backend: str | None = None
) -> Tensor | tuple[Tensor, ...]:
    """One level of 2-D Haar as the code named by ``convention`` writes it.

    Args:
        x: (N, C, H, W), or a video (N, C, T, H, W) whose frames are images; float64, float32, float16 or bfloat16,
            any strides.
        convention: a name in :data:`CONVENTIONS` or a :class:`Convention` of two axes.
        rounds: more than 1: every band is transformed again (packets), in layout "bands" or "channels".
        backend: for this call instead of the ambient :class:`wavemix_kernels.backend`; all but ``"cuda"``.

    Returns:
        The bands in the convention's layout, in x's dtype; H and W are halved and rounded up each round.
        Differentiable any number of times.

    Raises:
        TypeError, ValueError: no such tensor or convention; rounds in a layout that has none.
        RuntimeError: the backend asked for is not installed.
    """
    if isinstance(x, fx.Proxy):
        return fx.call_function(haar_bands2d, x, convention, rounds=rounds, backend=backends.requested(backend))
    checks.check_tensor("x", x, *_rank(x, 2))
    return _analysis(x, _named(convention, 2), rounds, backend)


def haar_bands3d(
    x: Tensor, convention: str | Convention, *, rounds: int = 1, backend: str | None = None
) -> Tensor | tuple[Tensor, ...]:
    """The same as :func:`haar_bands2d` for (N, C, D, H, W) and conventions of three axes; D too is halved."""
    if isinstance(x, fx.Proxy):
        return fx.call_function(haar_bands3d, x, convention, rounds=rounds, backend=backends.requested(backend))
    checks.check_tensor("x", x, *_rank(x, 3))
    return _analysis(x, _named(convention, 3), rounds, backend)


def haar_from_bands2d(
    bands: Tensor | Sequence[Tensor], convention: str | Convention, *, rounds: int = 1,
    size: tuple[int, int] | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """The inverse of :func:`haar_bands2d` as the code named by ``convention`` writes it.

    Args:
        bands: as :func:`haar_bands2d` returns them; a sequence in layout "separate".
        size: (H, W) of the output; default: the largest that has such bands.
        convention, rounds, backend: as for :func:`haar_bands2d`.

    Returns:
        (N, C, H, W), or (N, C, T, H, W) where the bands have five dimensions, in the dtype of ``bands``.

    Raises:
        TypeError, ValueError: no such tensors or convention, or shapes that do not belong together.
        RuntimeError: the backend asked for is not installed.
    """
    return _synthesis(bands, _named(convention, 2), rounds, size, backend)


def haar_from_bands3d(
    bands: Tensor | Sequence[Tensor], convention: str | Convention, *, rounds: int = 1,
    size: tuple[int, int, int] | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """The same as :func:`haar_from_bands2d` for (N, C, D, H, W) and conventions of three axes. Frames that a
    convention puts in front of the first are dropped."""
    return _synthesis(bands, _named(convention, 3), rounds, size, backend)


#: The two directions by the number of axes.
FUNCTIONS: dict[int, tuple[Any, Any]] = {
    2: (haar_bands2d, haar_from_bands2d),
    3: (haar_bands3d, haar_from_bands3d),
}


def _named(convention: str | Convention, axes: int) -> Convention:
    if isinstance(convention, str):
        if convention not in CONVENTIONS:
            raise ValueError(f"convention={convention!r}: expected one of {', '.join(map(repr, CONVENTIONS))}")
        convention = CONVENTIONS[convention]
    if not isinstance(convention, Convention):
        raise TypeError(f"convention: expected a name or a Convention, got {checks.describe(convention)}")
    for name in ("order", "weight", "inverse"):
        if not isinstance(value := getattr(convention, name), tuple):
            raise TypeError(f"convention.{name}: expected a tuple, got {checks.describe(value)}")
    if convention.axes != axes or convention.layout not in LAYOUTS or sorted(convention.order) != [*range(2**axes)]:
        raise ValueError(f"convention={convention}: expected one of {axes} axes, with all {2**axes} bands")
    return convention


def _rank(x: object, axes: int) -> tuple[int, str]:
    """The rank that is checked, and what it means."""
    if axes == 3:
        return 5, "(N, C, D, H, W)"
    return (5, "(N, C, T, H, W)") if isinstance(x, Tensor) and x.dim() == 5 else (4, "(N, C, H, W) or (N, C, T, H, W)")


def _check_rounds(of: Convention, rounds: int) -> None:
    checks.check_positive_int("rounds", rounds)
    if rounds > 1 and of.layout not in ("bands", "channels"):
        raise ValueError(f"rounds={rounds}: layout {of.layout!r} takes one round")


def _analysis(x: Tensor, of: Convention, rounds: int, backend: str | None) -> Tensor | tuple[Tensor, ...]:
    _check_rounds(of, rounds)
    front = 2**rounds - 1 if of.first_frame else 0
    name = backends.requested(backend)
    for done in range(rounds):
        bands = joined.analysis(x, rule_of(of, of.weight, of.mode, 0 if done else front, True), name)
        if of.layout == "separate":
            return bands
        x = bands[0]
    return x


def rule_of(of: Convention, weight: tuple[float, ...], mode: str, front: int, repeat: bool) -> joined.Rule:
    """The rule of one round of a convention."""
    return (_made if torch.compiler.is_compiling() else _known)(of, weight, mode, front, repeat)


def _made(of: Convention, weight: tuple[float, ...], mode: str, front: int, repeat: bool) -> joined.Rule:
    return joined.Rule(_axes(of), of.order, weight, of.layout, 2**of.axes, mode, front, repeat)


_known = functools.cache(_made)


def _axes(of: Convention) -> tuple[int, ...]:
    return (3, 4) if of.axes == 2 else (2, 3, 4)


def _synthesis(
    bands: Tensor | Sequence[Tensor], of: Convention, rounds: int, size: Sequence[int] | None, backend: str | None
) -> Tensor:
    _check_rounds(of, rounds)
    count = 2**of.axes
    if of.layout == "separate":
        if isinstance(bands, Tensor) or len(bands) != count:
            raise TypeError(f"bands: expected a sequence of {count} tensors, got {checks.describe(bands)}")
        for i, band in enumerate(bands):
            checks.check_tensor(f"bands[{i}]", band, *_rank(band, of.axes))
            if band.shape != bands[0].shape:
                raise ValueError(f"bands[{i}]: expected shape {tuple(bands[0].shape)}, got {tuple(band.shape)}")
        dtype = functools.reduce(torch.promote_types, (band.dtype for band in bands))
        tensors: Sequence[Tensor] = [band.to(dtype) for band in bands]
    else:
        checks.check_tensor("bands", bands, *_rank(bands, of.axes))
        assert isinstance(bands, Tensor)
        tensors = (bands,)
    name = backends.requested(backend)
    targets = _targets((1, *tensors[0].shape[2:])[-3:], of, rounds, size)
    for done, target in enumerate(targets):
        front = 2**rounds - 1 if of.first_frame and done == rounds - 1 else 0
        last = blocks.is_channels_last(tensors[0])
        tensors = (joined.synthesis(tensors, rule_of(of, of.inverse, "zero", front, False), target, last, name),)
    return tensors[0]


def _targets(here: Sequence[int], of: Convention, rounds: int, size: Sequence[int] | None) -> list[list[int]]:
    """(D, H, W) after each round of the synthesis."""
    front = (2**rounds - 1 if of.first_frame else 0, 0, 0)
    moved = [axis + 2 in _axes(of) for axis in range(3)]
    largest = [(n << rounds) - f if on else n for n, f, on in zip(here, front, moved, strict=True)]
    wanted = largest if size is None else [*largest[: 3 - len(size)], *size]
    sizes, n = [wanted], [w + f for w, f in zip(wanted, front, strict=True)]
    for _ in range(rounds):
        n = [half_up(m) if on else m for m, on in zip(n, moved, strict=True)]
        sizes.insert(0, n)
    if sizes[0] != list(here):
        raise ValueError(f"size={tuple(size or ())}: bands of {tuple(here)} give at most {tuple(largest)}")
    return sizes[1:]
