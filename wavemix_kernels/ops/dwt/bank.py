"""One level of a separable filter bank of images on any regular lattice of samples: undecimated transforms, whose
filters are dilated from level to level, and the two trees of the dual-tree transform.

Each operator is the exact transpose of the other with the same filters, lattices and mode.
"""

from __future__ import annotations

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
_library.define("filter_bank(Tensor x, Tensor[] filters, SymInt[] h, SymInt[] w, str mode, str backend) -> Tensor")
_library.define(
    "filter_bank_transpose(Tensor ll, Tensor? high, Tensor[] filters, SymInt[] h, SymInt[] w, SymInt[] size, str mode, "
    "str backend) -> Tensor"
)


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
    _check_lattices(h, w)
    name = chosen("filter_bank", BACKENDS, backend, filters, x)
    if name == "reference":
        return separable_bank(x, filters, h, w, mode).contiguous()
    return bank(x, list(filters), list(h), list(w), mode, name)


def filter_bank_transpose(
    ll: Tensor, high: Tensor | None, filters: Filters, h: Lattice, w: Lattice, size: Sequence[int], *,
    mode: str = "zero", backend: str | None = None,
) -> Tensor:  # fmt: skip
    """The transpose of :func:`filter_bank`: from its first band (N, C, h.length, w.length) and the other three
    (N, C, 3, h.length, w.length), None for zeros, to (N, C, *size). Raises as it."""
    _check_lattices(h, w)
    name = chosen("filter_bank_transpose", BACKENDS, backend, filters, *([ll] if high is None else [ll, high]))
    if name == "reference":
        return separable_bank_transpose(ll, high, filters, h, w, size, mode).contiguous()
    return bank_transpose(ll, high, list(filters), list(h), list(w), list(size), mode, name)


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


def _compiled(direction: str) -> Any:
    def run(
        image: Tensor, ll: Tensor, high: Tensor | None, filters: Sequence[Tensor], h: Sequence[int],
        w: Sequence[int], mode: str,
    ) -> None:  # fmt: skip
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

    return run


def _triton(analysis: bool) -> Any:
    def run(*args: Any) -> None:
        from wavemix_kernels.ops.dwt.triton_bank import run as launch

        launch(analysis, *args)

    return run


BACKENDS: dict[str, backends.Backend] = {
    "triton": backends.Backend(backends.triton_why_not, {"analysis": _triton(True), "synthesis": _triton(False)}),
    "cpu": backends.Backend(
        backends.cpu_why_not, {"analysis": _compiled("analysis"), "synthesis": _compiled("synthesis")}
    ),
    "reference": backends.Backend(backends.reference_why_not, {}),
}


# --- The operators ---------------------------------------------------------------------------------------


def _bank(x: Tensor, filters: list[Tensor], h: Sequence[int], w: Sequence[int], mode: str, backend: str) -> Tensor:
    runs = choose.select("filter_bank", BACKENDS, backend, x).functions["analysis"]
    bands = _bank_fake(x, filters, h, w, mode, backend)
    runs(x, bands[:, :, 0], bands[:, :, 1:], filters, h, w, mode)
    return bands


def _bank_fake(x: Tensor, filters: list[Tensor], h: Sequence[int], w: Sequence[int], mode: str, backend: str) -> Tensor:
    return x.new_empty((*x.shape[:2], 4, h[1], w[1]))


def _transpose(
    ll: Tensor, high: Tensor | None, filters: list[Tensor], h: Sequence[int], w: Sequence[int], size: Sequence[int],
    mode: str, backend: str,
) -> Tensor:  # fmt: skip
    given = [ll] if high is None else [ll, high]
    runs = choose.select("filter_bank_transpose", BACKENDS, backend, *given).functions["synthesis"]
    image = ll.new_empty((*ll.shape[:2], *size))
    runs(image, ll, high, filters, h, w, mode)
    return image


def _transpose_fake(
    ll: Tensor, high: Tensor | None, filters: list[Tensor], h: Sequence[int], w: Sequence[int], size: Sequence[int],
    mode: str, backend: str,
) -> Tensor:  # fmt: skip
    return ll.new_empty((*ll.shape[:2], *size))


_library.impl("filter_bank", _bank, "CompositeExplicitAutograd")
_library.impl("filter_bank_transpose", _transpose, "CompositeExplicitAutograd")
torch.library.register_fake("wavemix_kernels::filter_bank", _bank_fake, lib=_library)
torch.library.register_fake("wavemix_kernels::filter_bank_transpose", _transpose_fake, lib=_library)


def _bank_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, filters, ctx.h, ctx.w, ctx.mode, ctx.backend = inputs
    ctx.save_for_backward(*filters)
    ctx.size = x.shape[2:]


def _bank_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    filters = list(ctx.saved_tensors)
    d_x = bank_transpose(grad[:, :, 0], grad[:, :, 1:], filters, ctx.h, ctx.w, list(ctx.size), ctx.mode, ctx.backend)
    return d_x, None, None, None, None, None


def _transpose_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, high, filters, ctx.h, ctx.w, _, ctx.mode, ctx.backend = inputs
    ctx.save_for_backward(*filters)
    ctx.alone = high is None


def _transpose_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    bands = bank(grad, list(ctx.saved_tensors), ctx.h, ctx.w, ctx.mode, ctx.backend)
    return bands[:, :, 0], None if ctx.alone else bands[:, :, 1:], None, None, None, None, None, None


def _standard_bank(
    x: Tensor, filters: list[Tensor], h: Sequence[int], w: Sequence[int], mode: str, backend: str
) -> Tensor:
    return separable_bank(x, Filters(*filters), Lattice(*h), Lattice(*w), mode).contiguous()


def _standard_transpose(
    ll: Tensor, high: Tensor | None, filters: list[Tensor], h: Sequence[int], w: Sequence[int], size: Sequence[int],
    mode: str, backend: str,
) -> Tensor:  # fmt: skip
    return separable_bank_transpose(ll, high, Filters(*filters), Lattice(*h), Lattice(*w), size, mode).contiguous()


#: The operators with their gradients; filters get none.
bank = differentiable(_library, "filter_bank", _bank_setup, _bank_backward, standard=_standard_bank)
bank_transpose = differentiable(
    _library, "filter_bank_transpose", _transpose_setup, _transpose_backward, standard=_standard_transpose
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
