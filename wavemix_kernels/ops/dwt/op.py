"""Separable wavelet transforms of images and of lines with any filters, on every backend.

One level is a linear map, and `dwt_synthesis` is the exact transpose of `dwt_analysis` with the same filters and mode,
so the two operators close under differentiation. The inverse transform is such a transpose too: of the analysis
with the synthesis filters, whose samples outside the image are zero, or periodic in mode 'periodization'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels import _native, backends
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import layout, selftest
from wavemix_kernels.ops.common.autograd import differentiable
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.common.library import Library
from wavemix_kernels.ops.common.transforms import standard_wanted
from wavemix_kernels.ops.dwt.border import Border, border
from wavemix_kernels.ops.dwt.reference import (
    Filters,
    coefficient_size,
    extend,
    separable_dwt1d,
    separable_dwt2d,
    separable_idwt1d,
    separable_idwt2d,
    synthesis_lengths,
    synthesis_sizes,
)
from wavemix_kernels.ops.haar.op import inlined

_library = Library()
_library.define(
    "dwt_analysis(Tensor x, Tensor[] filters, str mode, ScalarType low, ScalarType high, str backend) "
    "-> (Tensor, Tensor)"
)
_library.define(
    "dwt_synthesis(Tensor ll, Tensor? high, Tensor[] filters, SymInt[] size, str mode, ScalarType dtype, str backend) "
    "-> Tensor"
)


# --- Transforms of several levels ------------------------------------------------------------------------


def dwt2d(
    x: Tensor, filters: Filters, levels: int = 1, *, mode: str = "zero", backend: str | None = None
) -> tuple[Tensor, list[Tensor]]:
    """`levels` levels of analysis, as :func:`~wavemix_kernels.ops.dwt.reference.separable_dwt2d` defines them.

    Args:
        x: (N, C, H, W), float64, float32, float16 or bfloat16, any strides.
        filters: mirrored, on x's device. Filters that require grad get theirs, and the convolutions of the
            reference run.
        mode: a key of `haar.MODES` other than 'per'.
        backend: for this call instead of the ambient :class:`wavemix_kernels.backend`.

    Returns:
        ll (N, C, h_L, w_L) and highs, finest first, each (N, C, 3, h_l, w_l) with bands LH, HL, HH, of x's dtype,
        contiguous.

    Raises:
        ValueError: mode 'reflect' or 'antireflect' at a size of 1, and a backend that cannot serve the call.
        RuntimeError: the backend asked for is not installed.
    """
    chosen = _chosen("dwt2d", backend, filters, x)
    if chosen == "reference":
        return separable_dwt2d(x, filters, levels, mode=mode)
    return _analyse(x, list(filters), levels, mode, chosen)


def idwt2d(
    ll: Tensor, highs: Sequence[Tensor | None], filters: Filters, *, mode: str = "zero", backend: str | None = None
) -> Tensor:
    """Inverse of :func:`dwt2d`, as :func:`~wavemix_kernels.ops.dwt.reference.separable_idwt2d` defines it.

    Args:
        ll: (N, C, h_L, w_L).
        highs: of ll's dtype, finest first, None for a level of zeros.
        filters: not mirrored.
        mode, backend: as for :func:`dwt2d`.

    Returns:
        (N, C, H, W) of ll's dtype.

    Raises:
        ValueError: sizes that do not fit together, or fewer coefficients than the filters reach over.
        ValueError, RuntimeError: a backend that cannot serve the call or is not installed.
    """
    taps = (filters.low_h.numel(), filters.low_w.numel())
    sizes = synthesis_sizes(ll, highs, taps, mode)
    chosen = _chosen("idwt2d", backend, filters, ll, *(high for high in highs if high is not None))
    if chosen == "reference":
        return separable_idwt2d(ll, highs, filters, mode=mode)
    return _synthesise(ll, highs, list(filters), sizes, mode, chosen)


def dwt1d(
    x: Tensor, filters: Sequence[Tensor], levels: int = 1, *, dim: int = -1, mode: str = "zero",
    backend: str | None = None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """`levels` levels of analysis of x (any shape) along `dim`, as :func:`dwt2d` for images.

    Args:
        filters: low and high, mirrored.

    Returns:
        low and highs, finest first, with l_l coefficients along `dim`, of x's dtype.
    """
    chosen = _chosen("dwt1d", backend, filters, x)
    lines = _as_lines(x, dim, chosen)
    if chosen == "reference":
        low, highs = separable_dwt1d(lines, filters, levels, mode=mode)
    else:
        low, highs = _analyse(lines, list(filters), levels, mode, chosen)
    return _like(low, x, dim, chosen), [_like(high, x, dim, chosen) for high in highs]


def idwt1d(
    low: Tensor, highs: Sequence[Tensor | None], filters: Sequence[Tensor], *, dim: int = -1, mode: str = "zero",
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Inverse of :func:`dwt1d`, as :func:`idwt2d` for images; filters low and high, not mirrored."""
    sizes = synthesis_lengths(low, highs, filters[0].numel(), mode, dim)
    chosen = _chosen("idwt1d", backend, filters, low, *(high for high in highs if high is not None))
    lines = _as_lines(low, dim, chosen)
    details = [None if high is None else _as_lines(high, dim, chosen) for high in highs]
    if chosen == "reference":
        return _like(separable_idwt1d(lines, details, filters, mode=mode), low, dim, chosen)
    rest = lines.shape[3:]
    return _like(
        _synthesise(lines, details, list(filters), [(n, *rest) for n in sizes], mode, chosen), low, dim, chosen
    )


def _as_lines(x: Tensor, dim: int, backend: str) -> Tensor:
    """x as lines (N, C, L) of its axis `dim`, or where that is not the last, as images (N, 1, L, W) of columns."""
    dim %= x.ndim
    if backend == "reference":
        x = x.movedim(dim, -1)
    if backend == "reference" or dim == x.ndim - 1:
        return x if x.ndim == 3 else x.reshape(-1, 1, x.shape[-1])
    return x.reshape(math.prod(x.shape[:dim]), 1, x.shape[dim], math.prod(x.shape[dim + 1 :]))


def _like(lines: Tensor, x: Tensor, dim: int, backend: str) -> Tensor:
    """Results of :func:`_as_lines` in the shape of x, but for their own length along `dim`."""
    dim %= x.ndim
    if backend == "reference":
        return lines.reshape(*x.shape[:dim], *x.shape[dim + 1 :], lines.shape[-1]).movedim(-1, dim)
    return lines.reshape(*x.shape[:dim], lines.shape[2], *x.shape[dim + 1 :])


def _analyse(x: Tensor, filters: list[Tensor], levels: int, mode: str, backend: str) -> tuple[Tensor, list[Tensor]]:
    highs = []
    low, exact = x, accumulate_dtype(x.dtype)
    for level in range(1, levels + 1):
        low, high = analysis(low, filters, mode, exact if level < levels else x.dtype, x.dtype, backend)
        highs.append(high)
    return low, highs


def _synthesise(
    low: Tensor, highs: Sequence[Tensor | None], filters: list[Tensor], sizes: Sequence[tuple[int, ...]], mode: str,
    backend: str,
) -> Tensor:  # fmt: skip
    x, exact = low, accumulate_dtype(low.dtype)
    axes, periodic = len(filters) // 2, mode == "periodization"
    # PyWavelets counts an odd filter's samples from one further on, as if a tap of zero came first.
    bank = [F.pad(f.flatten(), (1, 0)) if periodic and f.numel() % 2 else f for f in filters]
    for level, size, finer in zip(range(len(highs), 0, -1), sizes[:-1], sizes[1:], strict=True):
        # A line of odd size is a crop in both modes; the transpose in 'periodization' would fold its end instead.
        target = (*(2 * s for s in size[:axes]), *size[axes:]) if periodic else finer
        x = synthesis(
            _first(x, size), highs[level - 1], bank, target, "periodization" if periodic else "zero",
            exact if level > 1 else low.dtype, backend,
        )  # fmt: skip
        x = _first(x, finer)
    return x


def _first(x: Tensor, size: Sequence[int]) -> Tensor:
    """The first samples along the last axes."""
    for dim, length in zip(range(-len(size), 0), size, strict=True):
        x = x if x.shape[dim] == length else x.narrow(dim, 0, length)
    return x


def _chosen(op: str, backend: str | None, filters: Sequence[Tensor], *tensors: Tensor) -> str:
    return chosen(op, BACKENDS, backend, filters, *tensors)


def chosen(
    op: str, table: dict[str, backends.Backend], backend: str | None, filters: Sequence[Tensor], *tensors: Tensor
) -> str:
    """The backend of a call; learned filters get their gradient from the reference."""
    asked = backends.requested(backend)
    learned = any(f.requires_grad for f in filters)
    if inlined(asked) or standard_wanted() is not None or (asked == "auto" and learned):
        return "reference"
    if learned and asked != "reference":
        raise ValueError(
            f"{op}: backend={asked!r} has no gradient for filters, which require one; use backend='reference' or 'auto'"
        )
    return choose.pick(op, table, asked, *tensors)


# --- Backends: one level on allocated tensors ------------------------------------------------------------


def first_sample(taps: int, mode: str) -> int:
    """The sample that the first tap of coefficient 0 reads: at or before 0."""
    return taps // 2 + 1 - taps if mode == "periodization" else 2 - taps


def _untransformed(size: int) -> tuple[int, ...]:
    return (size, size, *[0] * 9, 2, 1, 1)


def core_axis(
    size: int, count: int, low: Tensor, high: Tensor, table: Border, start: int,
    steps: tuple[int, int, int] = (2, 1, 1),
) -> tuple[int, ...]:  # fmt: skip
    """An axis as the core takes it (csrc/bindings/dwt.cpp); `steps` are its stride, dilation and spacing."""
    return (
        size, count, start, low.numel(), low.data_ptr(), high.data_ptr(), table.before, table.after,
        table.begin.data_ptr(), table.sample.data_ptr(), table.weight.data_ptr(), *steps,
    )  # fmt: skip


def _compiled(direction: str) -> Any:
    def run(image: Tensor, low: Tensor, high: Tensor | None, filters: Sequence[Tensor], mode: str) -> None:
        exact = accumulate_dtype(image.dtype)
        taps = [f.detach().to(exact).flatten().contiguous() for f in filters]
        if image.ndim == 3:  # lines: images of one row
            image, low, high = image.unsqueeze(2), low.unsqueeze(2), None if high is None else high.unsqueeze(2)
            along: tuple[int, ...] = (-1,)
        else:
            along = (-1, -2) if len(taps) == 4 else (-2,)
        if high is not None and high.ndim == 4:
            high = high.unsqueeze(2)
        axes = {dim: _untransformed(image.shape[dim]) for dim in (-1, -2)}
        kept = []  # what the core reads, until it has
        for dim, f, g in zip(along, taps[::2], taps[1::2], strict=True):
            size, count, start = image.shape[dim], low.shape[dim], first_sample(f.numel(), mode)
            table = border(size, -start, max(0, start + 2 * (count - 1) + f.numel() - size), mode)
            kept.append(table)
            axes[dim] = core_axis(size, count, f, g, table, start)
        getattr(_native.core, f"dwt_{direction}_cpu")(
            [_native.DTYPES[t.dtype] for t in (image, low, low if high is None else high)], *image.shape[:2],
            axes[-2], axes[-1], _native.address(image), _native.address(low), _native.address(high),
            torch.get_num_threads(),
        )  # fmt: skip

    return run


def _triton(analysis: bool) -> Any:
    def run(image: Tensor, low: Tensor, high: Tensor | None, filters: Sequence[Tensor], mode: str) -> None:
        from wavemix_kernels.ops.dwt.triton_run import run as launch

        launch(analysis, image, low, high, filters, mode, first_sample)

    return run


BACKENDS: dict[str, backends.Backend] = {
    "triton": backends.Backend(backends.triton_why_not, {"analysis": _triton(True), "synthesis": _triton(False)}),
    "cpu": backends.Backend(
        backends.cpu_why_not, {"analysis": _compiled("analysis"), "synthesis": _compiled("synthesis")}
    ),
    "reference": backends.Backend(backends.reference_why_not, {}),
}


# --- The operators ---------------------------------------------------------------------------------------


def _empty_bands(x: Tensor, filters: Sequence[Tensor], mode: str, low: Any, high: Any) -> tuple[Tensor, Tensor]:
    shape = list(x.shape)
    for f, dim in zip(filters[::2], (-1, -2) if len(filters) == 4 else (2,)):  # noqa: B905
        shape[dim] = coefficient_size(shape[dim], f.numel(), mode)
    bands = shape if len(filters) == 2 else [*shape[:2], 3, *shape[2:]]
    return x.new_empty(shape, dtype=low), x.new_empty(bands, dtype=high)


def _rows(x: Tensor) -> Tensor:
    """x, copied where its rows are far from contiguous: kernels go by rows."""
    return x.contiguous() if x.ndim == 4 and layout.is_channels_last(x) else x


def _analysis(x: Tensor, filters: list[Tensor], mode: str, low: Any, high: Any, backend: str) -> tuple[Tensor, Tensor]:
    chosen = choose.select(f"dwt{len(filters) // 2}d", BACKENDS, backend, x)
    out = _empty_bands(x, filters, mode, low, high)
    image = x if chosen is BACKENDS["cpu"] else _rows(x)  # the CPU's kernel takes both memory orders as they are
    chosen.functions["analysis"](image, *out, filters, mode)
    return out


def _synthesis(
    ll: Tensor, high: Tensor | None, filters: list[Tensor], size: Sequence[int], mode: str, dtype: Any, backend: str
) -> Tensor:
    chosen = choose.select(f"idwt{len(filters) // 2}d", BACKENDS, backend, *([ll] if high is None else [ll, high]))
    image = ll.new_empty((*ll.shape[:2], *size), dtype=dtype)
    chosen.functions["synthesis"](image, _rows(ll), high, filters, mode)
    return image


def _analysis_fake(
    x: Tensor, filters: list[Tensor], mode: str, low: Any, high: Any, backend: str
) -> tuple[Tensor, Tensor]:
    return _empty_bands(x, filters, mode, low, high)


def _synthesis_fake(
    ll: Tensor, high: Tensor | None, filters: list[Tensor], size: Sequence[int], mode: str, dtype: Any, backend: str
) -> Tensor:
    return ll.new_empty((*ll.shape[:2], *size), dtype=dtype)


_library.impl("dwt_analysis", _analysis, "CompositeExplicitAutograd")
_library.impl("dwt_synthesis", _synthesis, "CompositeExplicitAutograd")
torch.library.register_fake("wavemix_kernels::dwt_analysis", _analysis_fake, lib=_library)
torch.library.register_fake("wavemix_kernels::dwt_synthesis", _synthesis_fake, lib=_library)


# --- Gradients: each is the other ------------------------------------------------------------------------


def _analysis_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, filters, ctx.mode, _, _, ctx.backend = inputs
    ctx.save_for_backward(*filters)
    ctx.size, ctx.dtype = x.shape[2:], x.dtype


def _analysis_backward(ctx: Any, d_ll: Tensor, d_high: Tensor) -> tuple[Any, ...]:
    d_x = synthesis(d_ll, d_high, list(ctx.saved_tensors), ctx.size, ctx.mode, ctx.dtype, ctx.backend)
    return d_x, None, None, None, None, None


def _synthesis_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ll, high, filters, _, ctx.mode, _, ctx.backend = inputs
    ctx.save_for_backward(*filters)
    ctx.dtypes = ll.dtype, None if high is None else high.dtype


def _synthesis_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    low, high = ctx.dtypes
    d_ll, d_high = analysis(grad, list(ctx.saved_tensors), ctx.mode, low, low if high is None else high, ctx.backend)
    return d_ll, None if high is None else d_high, None, None, None, None, None


# --- The same by standard operators: products with the matrices of the lines ------------------------------


def _matrices(size: int, low: Tensor, high: Tensor, mode: str, dtype: torch.dtype) -> list[Tensor]:
    """The matrices (size, count) of one axis."""
    taps = low.numel()
    start, count = first_sample(taps, mode), coefficient_size(size, taps, mode)
    samples = torch.eye(size, dtype=dtype, device=low.device)
    wide = extend(samples, -1, -start, max(0, start + 2 * (count - 1) + taps - size), mode)
    windows = wide.narrow(-1, 0, 2 * (count - 1) + taps).unfold(-1, taps, 2)
    return [windows @ f.to(dtype).flatten() for f in (low, high)]


def _times(x: Tensor, matrix: Tensor, dim: int) -> Tensor:
    return (x.movedim(dim, -1) @ matrix).movedim(-1, dim)


def _pairs(filters: Sequence[Tensor]) -> list[tuple[int, Tensor, Tensor]]:
    """(axis, low, high), in the order of analysis."""
    along = (-1, -2) if len(filters) == 4 else (2,)
    return list(zip(along, filters[::2], filters[1::2], strict=True))


def _standard_analysis(
    x: Tensor, filters: list[Tensor], mode: str, low: Any, high: Any, backend: str
) -> tuple[Tensor, Tensor]:
    exact = accumulate_dtype(x.dtype)
    bands = [x.to(exact)]
    for dim, f, g in _pairs(filters):
        both = _matrices(x.shape[dim], f, g, mode, exact)
        bands = [_times(band, matrix, dim) for band in bands for matrix in both]
    return bands[0].to(low), (torch.stack(bands[1:], 2) if len(bands) == 4 else bands[1]).to(high)


def _standard_synthesis(
    ll: Tensor, high: Tensor | None, filters: list[Tensor], size: Sequence[int], mode: str, dtype: Any, backend: str
) -> Tensor:
    exact = accumulate_dtype(dtype)
    shape = (*ll.shape[:2], *size)
    bands = [ll.to(exact)]
    if high is not None:
        bands += [t.to(exact) for t in (high.unbind(2) if len(filters) == 4 else [high])]
    for dim, f, g in reversed(_pairs(filters)):
        low, other = (m.mT for m in _matrices(shape[dim], f, g, mode, exact))
        if len(bands) == 1:
            bands = [_times(bands[0], low, dim)]
        else:
            bands = [_times(a, low, dim) + _times(b, other, dim) for a, b in zip(bands[::2], bands[1::2], strict=True)]
    return bands[0].to(dtype)


#: The operators with their gradients; filters get none.
analysis = differentiable(_library, "dwt_analysis", _analysis_setup, _analysis_backward, standard=_standard_analysis)
synthesis = differentiable(
    _library, "dwt_synthesis", _synthesis_setup, _synthesis_backward, standard=_standard_synthesis
)


def self_test(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """A level of images there and, from other coefficients, back, and one of lines, with filters of 6 and 5 taps at odd
    sizes, and the gradients: (error, bound)."""
    taps = [0.25, 0.875, -0.375, 0.25, 0.125, -0.25]  # exact in every dtype

    def bank(like: Tensor) -> Filters:
        line = torch.tensor(taps, dtype=like.dtype, device=like.device)
        return Filters(line, line.flip(0) * 0.5, line[:5].clone(), line[1:].clone())

    def run(name: str, x: Tensor, ll: Tensor, high: Tensor) -> list[Tensor]:
        of = bank(x)
        low, (band,) = dwt2d(x, of, mode="symmetric", backend=name)
        sums, (differences,) = dwt1d(x, of[:2], mode="symmetric", backend=name)
        return [low, band, sums, differences, idwt2d(ll, [high], of, backend=name)]

    tensors = [
        selftest.pattern(1, 2, 9, 10),
        *(selftest.pattern(*s, phase=2.0) for s in ((1, 2, 5, 6), (1, 2, 3, 5, 6))),
    ]
    error = selftest.against_reference(
        lambda *given: run(backend, *given), lambda *given: run("reference", *given), tensors, device, dtype
    )
    # Two passes of at most 6 products each, of two filters the way back.
    return error, selftest.rounding_bound(4 * 6, dtype)
