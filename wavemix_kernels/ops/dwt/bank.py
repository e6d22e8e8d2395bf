"""One level of a separable filter bank of images on any regular lattice of samples: undecimated transforms, whose
filters are dilated from level to level, and the two trees of the dual-tree transform.

Each operator is the exact transpose of the other with the same filters, lattices and mode.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wavemix_kernels import _native, backends
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import selftest
from wavemix_kernels.ops.common.autograd import differentiable
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.common.library import Library
from wavemix_kernels.ops.dwt.border import border
from wavemix_kernels.ops.dwt.op import chosen, core_axis
from wavemix_kernels.ops.dwt.reference import Filters, Lattice, separable_bank, separable_bank_transpose

_library = Library()
_library.define("filter_banks(Tensor x, Tensor[] filters, SymInt[] h, SymInt[] w, str mode, str backend) -> Tensor[]")
_library.define(
    "filter_banks_transpose(Tensor[] ll, Tensor[] high, Tensor[] filters, SymInt[] h, SymInt[] w, SymInt[] size, "
    "str mode, str backend) -> Tensor"
)

#: The filters of a bank, and its lattices along H and W.
Bank = tuple[Filters, Lattice, Lattice]


def filter_bank(
    x: Tensor, filters: Filters, h: Lattice, w: Lattice, *, mode: str = "zero", backend: str | None = None
) -> Tensor:
    """One level, as :func:`~wavemix_kernels.ops.dwt.reference.separable_bank` defines it.

    Args:
        x: (N, C, H, W), float64, float32, float16 or bfloat16, any strides.
        filters: on x's device. Filters that require grad get theirs, and the convolutions of the reference run.
        h, w: of each axis; their strides are 1 or 2 times the greatest common divisor of stride and step, and step
            itself that divisor where it is 2.
        mode: a key of `haar.MODES` other than 'per'.
        backend: for this call instead of the ambient :class:`wavemix_kernels.backend`.

    Returns:
        (N, C, 4, h.length, w.length) of x's dtype, contiguous, bands LL, LH (high along H), HL (high along W), HH.

    Raises:
        ValueError: other lattices, mode 'reflect' or 'antireflect' at a size of 1, and a backend that cannot serve.
        RuntimeError: the backend asked for is not installed.
    """
    return filter_banks(x, [(filters, h, w)], mode=mode, backend=backend)[0]


def filter_bank_transpose(
    ll: Tensor, high: Tensor | None, filters: Filters, h: Lattice, w: Lattice, size: Sequence[int], *,
    mode: str = "zero", backend: str | None = None,
) -> Tensor:  # fmt: skip
    """The transpose of :func:`filter_bank`: from its first band (N, C, h.length, w.length) and the other three
    (N, C, 3, h.length, w.length), None for zeros, to (N, C, *size). Raises as it."""
    highs = None if high is None else [high]
    return filter_banks_transpose([ll], highs, [(filters, h, w)], size, mode=mode, backend=backend)


def filter_banks(x: Tensor, banks: Sequence[Bank], *, mode: str = "zero", backend: str | None = None) -> list[Tensor]:
    """:func:`filter_bank` of each bank. The gradient of x is one sum, made where it lies."""
    filters, h, w = _spread(banks)
    name = chosen("filter_bank", BACKENDS, backend, filters, x)
    if name == "reference":
        return _standard_banks(x, filters, h, w, mode, name)
    out: list[Tensor] = list(_banks(x, filters, h, w, mode, name))
    return out


def filter_banks_transpose(
    ll: Sequence[Tensor], high: Sequence[Tensor] | None, banks: Sequence[Bank], size: Sequence[int], *,
    mode: str = "zero", backend: str | None = None,
) -> Tensor:  # fmt: skip
    """The transpose of :func:`filter_banks`, the sum of each bank's :func:`filter_bank_transpose`: from their first
    bands, of one dtype, and the other three of each, None for zeros."""
    filters, h, w = _spread(banks)
    low, rest = list(ll), [] if high is None else list(high)
    name = chosen("filter_bank_transpose", BACKENDS, backend, filters, *low, *rest)
    run = _standard_transpose if name == "reference" else _banks_transpose
    out: Tensor = run(low, rest, filters, h, w, list(size), mode, name)
    return out


def _spread(banks: Sequence[Bank]) -> tuple[list[Tensor], list[int], list[int]]:
    """The banks as the operators take them: four filters and four integers of either axis after the other."""
    for _, h, w in banks:
        _check_lattices(h, w)
    return (
        [f for filters, _, _ in banks for f in filters],
        [i for _, h, _ in banks for i in h],
        [i for _, _, w in banks for i in w],
    )


def _by_bank(filters: Sequence[Tensor], h: Sequence[int], w: Sequence[int]) -> list[Bank]:
    """The banks that :func:`_spread` laid out."""
    at = range(0, len(filters), 4)
    return [(Filters(*filters[i : i + 4]), Lattice(*h[i : i + 4]), Lattice(*w[i : i + 4])) for i in at]


def _steps(lattice: Sequence[int]) -> tuple[int, int, int]:
    """Stride and dilation in units of the spacing of the samples read, and that spacing."""
    _, _, stride, step = lattice
    spacing = math.gcd(stride, step)
    return stride // spacing, step // spacing, spacing


def _check_lattices(h: Lattice, w: Lattice) -> None:
    for name, lattice in (("h", h), ("w", w)):
        stride, dilation, _ = _steps(lattice)
        if lattice.start > 0 or not (stride == 1 or (stride == 2 and dilation == 1)):
            raise ValueError(
                f"{name}: expected start <= 0 and a stride that divides step, or is twice step, got {lattice}"
            )


# --- Backends: on allocated tensors ----------------------------------------------------------------------


def _compiled(direction: str, image: Tensor, ll: Tensor, high: Tensor | None, bank: Bank, mode: str) -> None:
    filters, h, w = bank
    taps = [f.detach().to(accumulate_dtype(image.dtype)).flatten().contiguous() for f in filters]
    axes, kept = [], []  # kept: what the core reads, until it has
    for lattice, size, (f, g) in zip((w, h), (image.shape[3], image.shape[2]), (taps[:2], taps[2:]), strict=True):
        start, count, stride, step = lattice
        after = start + stride * (count - 1) + step * (f.numel() - 1) + 1 - size
        table = border(size, -start, max(0, after), mode)
        kept.append(table)
        axes.append(core_axis(size, count, f, g, table, start, _steps(lattice)))
    getattr(_native.core, f"dwt_{direction}_cpu")(
        [_native.DTYPES[t.dtype] for t in (image, ll, ll if high is None else high)], *image.shape[:2], axes[1],
        axes[0], _native.address(image), _native.address(ll), _native.address(high), torch.get_num_threads(),
    )  # fmt: skip


def _compiled_analysis(image: Tensor, bands: Sequence[Tensor], banks: Sequence[Bank], mode: str) -> None:
    for out, bank in zip(bands, banks, strict=True):
        _compiled("analysis", image, out[:, :, 0], out[:, :, 1:], bank, mode)


def _compiled_synthesis(
    image: Tensor, ll: Sequence[Tensor], high: Sequence[Tensor | None], banks: Sequence[Bank], mode: str
) -> None:
    # A half type rounds the sum of several once.
    exact = accumulate_dtype(image.dtype)
    total = image if len(banks) == 1 or exact == image.dtype else torch.empty_like(image, dtype=exact)
    for i, (one, rest, bank) in enumerate(zip(ll, high, banks, strict=True)):
        _compiled("synthesis" if i == 0 else "synthesis_add", total, one, rest, bank, mode)
    if total is not image:
        image.copy_(total)


def _triton(function: str) -> Any:
    def run(*args: Any) -> None:
        from wavemix_kernels.ops.dwt import triton_bank

        getattr(triton_bank, function)(*args)

    return run


BACKENDS: dict[str, backends.Backend] = {
    "triton": backends.Backend(
        backends.triton_why_not, {"analysis": _triton("analyse"), "synthesis": _triton("synthesise")}
    ),
    "cpu": backends.Backend(backends.cpu_why_not, {"analysis": _compiled_analysis, "synthesis": _compiled_synthesis}),
    "reference": backends.Backend(backends.reference_why_not, {}),
}


# --- The operators ---------------------------------------------------------------------------------------


def _banks_op(
    x: Tensor, filters: list[Tensor], h: Sequence[int], w: Sequence[int], mode: str, backend: str
) -> list[Tensor]:
    runs = choose.select("filter_bank", BACKENDS, backend, x).functions["analysis"]
    bands = _banks_fake(x, filters, h, w, mode, backend)
    runs(x, bands, _by_bank(filters, h, w), mode)
    return bands


def _banks_fake(
    x: Tensor, filters: list[Tensor], h: Sequence[int], w: Sequence[int], mode: str, backend: str
) -> list[Tensor]:
    return [x.new_empty((*x.shape[:2], 4, *size)) for size in zip(h[1::4], w[1::4], strict=True)]


def _transpose_op(
    ll: list[Tensor], high: list[Tensor], filters: list[Tensor], h: Sequence[int], w: Sequence[int],
    size: Sequence[int], mode: str, backend: str,
) -> Tensor:  # fmt: skip
    runs = choose.select("filter_bank_transpose", BACKENDS, backend, *ll, *high).functions["synthesis"]
    image = _transpose_fake(ll, high, filters, h, w, size, mode, backend)
    runs(image, ll, _or_none(high, ll), _by_bank(filters, h, w), mode)
    return image


def _transpose_fake(
    ll: list[Tensor], high: list[Tensor], filters: list[Tensor], h: Sequence[int], w: Sequence[int],
    size: Sequence[int], mode: str, backend: str,
) -> Tensor:  # fmt: skip
    return ll[0].new_empty((*ll[0].shape[:2], *size))


_library.impl("filter_banks", _banks_op, "CompositeExplicitAutograd")
_library.impl("filter_banks_transpose", _transpose_op, "CompositeExplicitAutograd")
torch.library.register_fake("wavemix_kernels::filter_banks", _banks_fake, lib=_library)
torch.library.register_fake("wavemix_kernels::filter_banks_transpose", _transpose_fake, lib=_library)


def _or_none(high: list[Tensor], ll: list[Tensor]) -> Sequence[Tensor | None]:
    return high or [None for _ in ll]


def _banks_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, filters, ctx.h, ctx.w, ctx.mode, ctx.backend = inputs
    ctx.save_for_backward(*filters)
    ctx.size = list(x.shape[2:])


def _banks_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    ll, high = [g[:, :, 0] for g in grads], [g[:, :, 1:] for g in grads]
    d_x = _banks_transpose(ll, high, list(ctx.saved_tensors), ctx.h, ctx.w, ctx.size, ctx.mode, ctx.backend)
    return d_x, None, None, None, None, None


def _transpose_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, high, filters, ctx.h, ctx.w, _, ctx.mode, ctx.backend = inputs
    ctx.save_for_backward(*filters)
    ctx.alone = not high


def _transpose_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    bands = _banks(grad, list(ctx.saved_tensors), ctx.h, ctx.w, ctx.mode, ctx.backend)
    high = None if ctx.alone else [b[:, :, 1:] for b in bands]
    return [b[:, :, 0] for b in bands], high, None, None, None, None, None, None


def _standard_banks(
    x: Tensor, filters: list[Tensor], h: Sequence[int], w: Sequence[int], mode: str, backend: str
) -> list[Tensor]:
    return [separable_bank(x, *bank, mode).contiguous() for bank in _by_bank(filters, h, w)]


def _standard_transpose(
    ll: list[Tensor], high: list[Tensor], filters: list[Tensor], h: Sequence[int], w: Sequence[int],
    size: Sequence[int], mode: str, backend: str,
) -> Tensor:  # fmt: skip
    banks = _by_bank(filters, h, w)
    wide = [t.to(accumulate_dtype(t.dtype)) if len(banks) > 1 else t for t in ll]
    parts = [
        separable_bank_transpose(one, other, *bank, size, mode)
        for one, other, bank in zip(wide, _or_none(high, ll), banks, strict=True)
    ]
    return functools.reduce(torch.add, parts).to(ll[0].dtype).contiguous()


#: The operators with their gradients; filters get none.
_banks = differentiable(_library, "filter_banks", _banks_setup, _banks_backward, standard=_standard_banks)
_banks_transpose = differentiable(
    _library, "filter_banks_transpose", _transpose_setup, _transpose_backward, standard=_standard_transpose
)


def self_test(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Filters of 6 and 5 taps, dilated along H, spaced apart along W, and their gradient: (error, bound)."""
    taps = torch.tensor([0.25, 0.875, -0.375, 0.25, 0.125, -0.25])  # exact in every dtype
    h, w = Lattice(-7, 21, 1, 3), Lattice(-3, 6, 4, 2)

    def filters(x: Tensor) -> Filters:
        line = taps.to(x)
        return Filters(line, line.flip(0) * 0.5, line[:5].clone(), line[1:].clone())

    error = selftest.against_reference(
        lambda x: [filter_bank(x, filters(x), h, w, mode="symmetric", backend=backend)],
        lambda x: [separable_bank(x, filters(x), h, w, "symmetric")],
        [selftest.pattern(2, 4, 21, 24)],
        device,
        dtype,
    )
    return error, selftest.rounding_bound(2 * 6, dtype)
