"""``wtconv``: the wavelet part of WTConv (Finder et al., ECCV 2024, arXiv:2407.05848), all levels by one operator.

On a GPU a level is one pass: Haar, the depthwise convolution of the four bands, their scales, what the coarser levels
add to LL, Haar's inverse and, at the finest level, another image that is added. Bands do not reach memory, except
LL, which the next level is made of. The transpose is the same with mirrored taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wavemix_kernels import backends, checks, fx
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import layout, selftest
from wavemix_kernels.ops.common.autograd import differentiable
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.common.library import Library
from wavemix_kernels.ops.wtconv import reference

_library = Library()
_library.define("wtconv(Tensor x, Tensor? add, Tensor[] taps, Tensor[] scales, bool transposed, str backend) -> Tensor")
_library.define(
    "wtconv_backward(Tensor grad, Tensor x, Tensor[] taps, Tensor[] scales, str backend) -> (Tensor, Tensor, Tensor)"
)


def wtconv(
    x: Tensor, taps: Sequence[Tensor], scales: Sequence[Tensor], add: Tensor | None = None, *,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """The sum of all wavelet levels of a WTConv, and of ``add``.

    Level l takes the Haar bands of level l-1's LL (of x, at first), convolves each of the 4C by its own k x k taps
    (zeros around), scales it, adds the image that level l+1 gives to LL, and transforms back. Under autocast x and taps
    take the autocast dtype, as a convolution's do.

    Args:
        x: (N, C, H, W), float64, float32, float16 or bfloat16, any strides.
        taps: for each level (4C, 1, k, k), k odd and the same for all; channel 4c + b is band b (LL, LH, HL, HH) of
            channel c.
        scales: for each level 4C numbers, in any shape and of any of these dtypes.
        add: an image of x's shape, of any of these dtypes, for example the base convolution's.
        backend: for this call instead of the ambient :class:`wavemix_kernels.backend`.

    Returns:
        (N, C, H, W) in the dtype of ``add``, or x's without it, and in x's memory order.

    Raises:
        TypeError, ValueError: types, shapes, dtypes or devices that do not belong together.
        RuntimeError: the backend asked for is not installed.

    Backward is not differentiable again, except on backend ``"reference"``.

    Source: Finder et al., arXiv:2407.05848.
    """
    if isinstance(x, fx.Proxy):
        return fx.call_function(wtconv, x, taps, scales, add, backend=backends.requested(backend))
    _check(x, taps, scales, add)
    x, *of_levels = checks.autocast(x, *taps)
    chosen = backends.requested(backend)
    if chosen == "reference":
        return reference.wtconv(x, add, of_levels, scales)
    out: Tensor = fused(x, add, of_levels, list(scales), False, chosen)
    return out


def _check(x: Tensor, taps: Sequence[Tensor], scales: Sequence[Tensor], add: Tensor | None) -> None:
    checks.check_tensor("x", x, 4, "(N, C, H, W)")
    if isinstance(taps, Tensor) or not isinstance(taps, Sequence) or len(taps) == 0:
        raise TypeError(f"taps: expected a list with one tensor for each level, got {checks.describe(taps)}")
    if isinstance(scales, Tensor) or len(scales) != len(taps):
        raise ValueError(f"scales: expected {len(taps)} tensors, as many as taps, got {checks.describe(scales)}")
    wide, size = 4 * x.shape[1], taps[0].shape[-1]
    for i, (of_level, scale) in enumerate(zip(taps, scales, strict=True)):
        if size % 2 == 0 or tuple(of_level.shape) != (wide, 1, size, size):
            raise ValueError(
                f"taps[{i}]: expected ({wide}, 1, k, k), k odd and the same for all levels, to go with x "
                f"{tuple(x.shape)}, got {tuple(of_level.shape)}"
            )
        if scale.numel() != wide:
            raise ValueError(f"scales[{i}]: expected {wide} numbers, got shape {tuple(scale.shape)}")
        checks.check_same_device(f"taps[{i}]", of_level, "x", x)
        checks.check_same_device(f"scales[{i}]", scale, "x", x)
        checks.check_same_dtype(f"taps[{i}]", of_level, "taps[0]", taps[0])
    if add is not None:
        checks.check_tensor("add", add, 4, "(N, C, H, W)")
        checks.check_same_device("add", add, "x", x)
        if add.shape != x.shape:
            raise ValueError(f"add: expected the shape of x, {tuple(x.shape)}, got {tuple(add.shape)}")


# --- Backends: on allocated tensors ----------------------------------------------------------------------


def _triton_forward(*args: Any) -> None:
    from wavemix_kernels.ops.wtconv import triton as kernels

    kernels.forward(*args)


def _triton_backward(*args: Any) -> None:
    from wavemix_kernels.ops.wtconv import triton_weights as kernels

    kernels.backward(*args)


def _reference_forward(
    out: Tensor, x: Tensor, add: Tensor | None, taps: list[Tensor], scales: list[Tensor], transposed: bool
) -> None:
    out.copy_(reference.wtconv(x, add, taps, scales, transposed))


def _reference_backward(
    out: tuple[Tensor, ...], grad: Tensor, x: Tensor, taps: list[Tensor], scales: list[Tensor]
) -> None:
    for written, made in zip(out, reference.backward(grad, x, taps, scales), strict=True):
        written.copy_(made)


BACKENDS: dict[str, backends.Backend] = {
    "triton": backends.Backend(backends.triton_why_not, {"forward": _triton_forward, "backward": _triton_backward}),
    "reference": backends.Backend(
        backends.reference_why_not, {"forward": _reference_forward, "backward": _reference_backward}
    ),
}


# --- The operators ---------------------------------------------------------------------------------------


def _forward(
    x: Tensor, add: Tensor | None, taps: list[Tensor], scales: list[Tensor], transposed: bool, backend: str
) -> Tensor:
    runs = choose.select("wtconv", BACKENDS, backend, x).functions["forward"]
    out = _forward_fake(x, add, taps, scales, transposed, backend)
    runs(out, x, add, taps, scales, transposed)
    return out


def _forward_fake(
    x: Tensor, add: Tensor | None, taps: list[Tensor], scales: list[Tensor], transposed: bool, backend: str
) -> Tensor:
    return layout.empty(x if add is None else add, x.shape, layout.is_channels_last(x))


def _backward(
    grad: Tensor, x: Tensor, taps: list[Tensor], scales: list[Tensor], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    runs = choose.select("wtconv_backward", BACKENDS, backend, x, grad).functions["backward"]
    out = _backward_fake(grad, x, taps, scales, backend)
    runs(out, grad, x, taps, scales)
    return out


def _backward_fake(
    grad: Tensor, x: Tensor, taps: list[Tensor], scales: list[Tensor], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulate_dtype(x.dtype)
    d_taps = x.new_empty((len(taps), *taps[0].shape), dtype=wide)
    d_scales = x.new_empty((len(taps), taps[0].shape[0]), dtype=wide)
    return layout.empty(x, x.shape, layout.is_channels_last(x)), d_taps, d_scales


_library.impl("wtconv", _forward, "CompositeExplicitAutograd")
_library.impl("wtconv_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("wavemix_kernels::wtconv", _forward_fake, lib=_library)
torch.library.register_fake("wavemix_kernels::wtconv_backward", _backward_fake, lib=_library)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, add, taps, scales, ctx.transposed, ctx.backend = inputs
    ctx.add_dtype = None if add is None else add.dtype
    ctx.levels = len(taps)
    ctx.save_for_backward(x, *taps, *scales)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    taps, scales = rest[: ctx.levels], rest[ctx.levels :]
    d_add = None if ctx.add_dtype is None else grad
    trained = any(t.requires_grad for t in rest)
    if ctx.transposed or not trained:
        d_x = torch.ops.wavemix_kernels.wtconv(grad.to(x.dtype), None, taps, scales, not ctx.transposed, ctx.backend)
        if not trained:
            return d_x, d_add, None, None, None, None
        grad, x = x, grad  # as taps see it, a transpose has them the other way round
        _, d_taps, d_scales = torch.ops.wavemix_kernels.wtconv_backward(grad, x, taps, scales, ctx.backend)
    else:
        d_x, d_taps, d_scales = torch.ops.wavemix_kernels.wtconv_backward(grad, x, taps, scales, ctx.backend)
    of_taps = d_taps.to(taps[0].dtype).unbind(0)
    of_scales = [d.to(s.dtype).reshape(s.shape) for d, s in zip(d_scales.unbind(0), scales, strict=True)]
    return d_x, d_add, of_taps, of_scales, None, None


def _standard(
    x: Tensor, add: Tensor | None, taps: list[Tensor], scales: list[Tensor], transposed: bool, backend: str
) -> Tensor:
    return reference.wtconv(x, add, taps, scales, transposed)


#: (x, add, taps, scales, transposed, backend) -> image, with gradient.
fused = differentiable(_library, "wtconv", _setup, _gradients, standard=_standard, once=True)


def self_test(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """One level of an odd image in rows, two of one in channels_last, and all gradients: (error, bound)."""
    p = selftest.pattern
    errors = []
    for levels, order in ((1, torch.contiguous_format), (2, torch.channels_last)):

        def of_levels(run: Any, x: Tensor, add: Tensor, rest: tuple[Tensor, ...], levels: int = levels) -> list[Tensor]:
            return [run(x, add, list(rest[:levels]), list(rest[levels:]))]

        def ours(x: Tensor, add: Tensor, taps: list[Tensor], scales: list[Tensor], order: Any = order) -> Tensor:
            return wtconv(x.contiguous(memory_format=order), taps, scales, add, backend=backend)

        tensors = [p(2, 2, 5, 6), p(2, 2, 5, 6, phase=1), *(p(8, 1, 3, 3, phase=i) for i in range(levels)),
                   *(p(8, phase=i) for i in range(levels))]  # fmt: skip
        errors.append(
            selftest.against_reference(
                lambda x, add, *rest, f=of_levels, g=ours: f(g, x, add, rest),
                lambda x, add, *rest, f=of_levels: f(reference.wtconv, x, add, rest),
                tensors,
                device,
                dtype,
            )
        )
    return selftest.largest(*errors), selftest.rounding_bound(2 * (9 + 12) + 30, dtype)
