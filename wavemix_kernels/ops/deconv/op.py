"""``deconv``: the Waveblock's transposed convolution, 4x4 taps, stride 2, padding 1, three quarters of its arithmetic.

On a CPU by minimal filtering (csrc/cpu/deconv/: 36 products where the definition has 64), for few channels
and by matrix units by its definition; elsewhere the library's. Kernels of ours take the BatchNorm that follows
along: its statistics come from the pass that writes the output, and its backward is made where the gradients' kernels
read, so the gradient of the output itself never reaches memory. On a CPU one such read makes both gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels import _native, backends, checks, fx
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import chips, layout, selftest
from wavemix_kernels.ops.common.autograd import differentiable
from wavemix_kernels.ops.common.dtypes import MULTIPLIED
from wavemix_kernels.ops.common.library import Library
from wavemix_kernels.ops.norm import batch_norm

_library = Library()
_library.define("deconv(Tensor u, Tensor weight, Tensor? bias, str backend) -> Tensor")
_library.define("deconv_residual(Tensor u, Tensor weight, Tensor? bias, Tensor residual, str backend) -> Tensor")
_library.define("deconv_backward_x(Tensor grad, Tensor weight, str backend) -> Tensor")
_library.define(
    "deconv_backward_weight(Tensor grad, Tensor u, bool has_bias, bool channels_last, str backend) -> Tensor[]"
)
# The same around a BatchNorm of the output: its statistics, and gradients that begin with the normalised output's.
_library.define(
    "deconv_stats(Tensor u, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float eps, "
    "str backend) -> (Tensor, Tensor)"
)
_library.define(
    "deconv_norm_backward(Tensor grad, Tensor y, Tensor mean, Tensor invstd, Tensor? norm_weight, bool batch_stats, "
    "Tensor u, Tensor weight, str backend) -> (Tensor, Tensor, Tensor)"
)

TAPS, STRIDE, PADDING = 4, 2, 1
_FORMATS = torch.contiguous_format, torch.channels_last


def deconv(u: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """``conv_transpose2d(u, weight, bias, stride=2, padding=1)`` with 4x4 taps.

    Under autocast all take the autocast dtype, as a convolution's do.

    Args:
        u: (N, F, H, W), float64, float32, float16 or bfloat16.
        weight: (F, O, 4, 4), same dtype and device; bias: (O) or None.
        backend: for this call instead of the ambient :class:`wavemix_kernels.backend`.

    Returns:
        (N, O, 2H, 2W), channels_last.

    Raises:
        TypeError, ValueError: types, shapes, dtypes or devices that do not belong together; a call that the backend
            asked for cannot serve.
        RuntimeError: the backend asked for is not installed.

    Backward is not differentiable again, except on backend ``"reference"``.

    Source: WaveMix (arXiv:2205.14375), the upsampling of a feed-forward part.
    """
    if isinstance(u, fx.Proxy):
        return fx.call_function(deconv, u, weight, bias, backend=backends.requested(backend))
    checks.check_tensor("u", u, 4, "(N, F, H, W)")
    checks.check_tensor("weight", weight, 4, "(F, O, 4, 4)")
    if weight.shape[0] != u.shape[1] or tuple(weight.shape[2:]) != (TAPS, TAPS):
        raise ValueError(f"weight: expected ({u.shape[1]}, O, 4, 4) to go with u, got {tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[1],):
        raise ValueError(f"bias: expected shape ({weight.shape[1]},), got {tuple(bias.shape)}")
    u, weight, bias = checks.autocast(u, weight, bias)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            checks.check_same_device(name, tensor, "u", u)
            checks.check_same_dtype(name, tensor, "u", u)
    chosen = backends.requested(backend)
    if chosen == "reference":
        return F.conv_transpose2d(u, weight, bias, STRIDE, PADDING)
    return fused(u, weight, bias, chosen)


# --- CPU -------------------------------------------------------------------------------------------------


def _size(u: Tensor, y: Tensor) -> tuple[int, ...]:
    return u.shape[0], u.shape[1], y.shape[1], u.shape[2], u.shape[3]


def _cpu_forward(
    u: Tensor, weight: Tensor, bias: Tensor | None, stats: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    core: Any = _native.core
    residual = None if residual is None else layout.channels_inner(residual)
    u, weight, y = layout.channels_inner(u), weight.contiguous(), _empty_output(u, weight)
    bias = None if bias is None else bias.contiguous()
    core.deconv_forward_cpu(
        _native.DTYPES[u.dtype], _size(u, y), _native.address(u), _native.address(y), weight.data_ptr(),
        0 if bias is None else bias.data_ptr(), *((0, 0) if stats is None else (t.data_ptr() for t in stats)),
        _native.address(residual), torch.get_num_threads(),
    )  # fmt: skip
    return y


#: The BatchNorm's weight, bias and eps.
Parameters = tuple[Tensor | None, Tensor | None, float]


def _cpu_forward_stats(u: Tensor, weight: Tensor, bias: Tensor | None, norm: Parameters) -> tuple[Tensor, Tensor]:
    mean, var, *_ = batch_norm.empty_statistics(u, weight.shape[1])
    y = _cpu_forward(u, weight, bias, (mean, var))
    return y, torch.stack(batch_norm.from_moments(mean, var, *norm))


def _cpu_forward_residual(u: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return _cpu_forward(u, weight, bias, None, residual)


#: y, a, b, mean, d: the gradient of y is ``a grad + b (y - mean) + d``; the last four contiguous, in the arithmetic
#: type.
Norm = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _norm_addresses(norm: Norm | None) -> tuple[Sequence[int], list[int]]:
    return ([], []) if norm is None else (_native.address(norm[0]), [t.data_ptr() for t in norm[1:]])


def _cpu_gradients(
    grad: Tensor, u: Tensor | None, weight: Tensor | None, d_u: Tensor | None, d_weight: Tensor | None,
    norm: Norm | None = None,
) -> None:  # fmt: skip
    """Writes ``d_u``, which takes ``weight``, ``d_weight``, which takes ``u``, or from one read of ``grad`` both."""
    core: Any = _native.core
    grad, u = layout.channels_inner(grad), None if u is None else layout.channels_inner(u)
    weight = None if weight is None else weight.contiguous()
    f = cast(Tensor, d_weight if weight is None else weight).shape[0]
    n, o, h, w = grad.shape
    core.deconv_backward_cpu(
        _native.DTYPES[grad.dtype], (n, f, o, h // 2, w // 2), _native.address(u), _native.address(grad),
        0 if weight is None else weight.data_ptr(), *_norm_addresses(norm), _native.address(d_u),
        0 if d_weight is None else d_weight.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def _cpu_backward_x(grad: Tensor, weight: Tensor) -> Tensor:
    d_u = _empty_input(grad, weight)
    _cpu_gradients(grad, None, weight, d_u, None)
    return d_u


def _cpu_backward_weight(grad: Tensor, u: Tensor, has_bias: bool) -> list[Tensor]:
    d_weight = u.new_empty(u.shape[1], grad.shape[1], TAPS, TAPS)
    _cpu_gradients(grad, u, None, None, d_weight)
    return [d_weight, *([grad.sum((0, 2, 3))] if has_bias else [])]


def _cpu_norm_backward(grad: Tensor, u: Tensor, weight: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    d_u, d_weight = _empty_input(grad, weight), torch.empty(weight.shape, dtype=weight.dtype)
    _cpu_gradients(grad, u, weight, d_u, d_weight, norm)
    return d_u, d_weight


# --- Triton ----------------------------------------------------------------------------------------------


def _triton_forward(u: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    from wavemix_kernels.ops.deconv import triton as kernels

    y, other = _empty_output(u, weight), None if residual is None else layout.channels_inner(residual)
    kernels.forward(y, layout.channels_inner(u), weight, None if bias is None else bias.contiguous(), residual=other)
    return y


def _triton_forward_stats(u: Tensor, weight: Tensor, bias: Tensor | None, norm: Parameters) -> tuple[Tensor, Tensor]:
    from wavemix_kernels.ops.deconv import triton as kernels

    u, y = layout.channels_inner(u), _empty_output(u, weight)
    return y, kernels.forward_stats(y, u, weight, None if bias is None else bias.contiguous(), *norm)


def _triton_backward_x(grad: Tensor, weight: Tensor) -> Tensor:
    from wavemix_kernels.ops.deconv import triton_backward as kernels

    grad, u = layout.channels_inner(grad), _empty_input(grad, weight)
    kernels.backward_x(u, grad, None, weight)
    return u


def _triton_backward_weight(grad: Tensor, u: Tensor, has_bias: bool) -> list[Tensor]:
    from wavemix_kernels.ops.deconv import triton_backward as kernels

    grad, u = layout.channels_inner(grad), layout.channels_inner(u)
    out = _empty_weights(grad, u, has_bias)
    kernels.backward_weight(out[0], out[1] if has_bias else None, grad, None, u)
    return out


def _triton_norm_backward(grad: Tensor, u: Tensor, weight: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    from wavemix_kernels.ops.deconv import triton_backward as kernels

    grad, u = layout.channels_inner(grad), layout.channels_inner(u)
    d_u, (d_weight,) = _empty_input(grad, weight), _empty_weights(grad, u, False)
    kernels.norm_backward(d_u, d_weight, grad, kernels.Norm(*norm), u, weight)
    return d_u, d_weight


# --- The library -----------------------------------------------------------------------------------------


def _channels_last(x: Tensor) -> Tensor:
    # A copy only where the library answered in another order: its strides must be those that were announced.
    return x if x.stride() == layout.empty(x.new_empty(0), x.shape, True).stride() else layout.laid_out(x, True)


def _reference_forward(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _channels_last(F.conv_transpose2d(u, weight, bias, STRIDE, PADDING))


def _reference_backward_x(grad: Tensor, weight: Tensor) -> Tensor:
    return _channels_last(F.conv2d(grad, weight, None, STRIDE, PADDING))


def _reference_backward_weight(grad: Tensor, u: Tensor, has_bias: bool) -> list[Tensor]:
    weight = u.new_empty(u.shape[1], grad.shape[1], TAPS, TAPS)  # its shape alone is read
    _, d_weight, d_bias = torch.ops.aten.convolution_backward(
        grad, u, weight, [grad.shape[1]], [STRIDE] * 2, [PADDING] * 2, [1, 1], True, [0, 0], 1, [False, True, has_bias]
    )
    return [d_weight, *([d_bias] if has_bias else [])]


BACKENDS: dict[str, backends.Backend] = {
    "triton": backends.Backend(backends.triton_products_why_not, {
        "forward": _triton_forward, "forward_residual": _triton_forward, "forward_stats": _triton_forward_stats,
        "backward_x": _triton_backward_x, "backward_weight": _triton_backward_weight,
        "norm_backward": _triton_norm_backward,
    }),
    "cpu": backends.Backend(backends.cpu_why_not, {
        "forward": _cpu_forward, "forward_residual": _cpu_forward_residual, "forward_stats": _cpu_forward_stats,
        "backward_x": _cpu_backward_x, "backward_weight": _cpu_backward_weight, "norm_backward": _cpu_norm_backward,
    }),
    "reference": backends.Backend(backends.reference_why_not, {
        "forward": _reference_forward, "backward_x": _reference_backward_x,
        "backward_weight": _reference_backward_weight,
    }),
}  # fmt: skip


# --- The operators ---------------------------------------------------------------------------------------


def _empty_output(u: Tensor, weight: Tensor) -> Tensor:
    n, _, h, w = u.shape
    return layout.empty(u, [n, weight.shape[1], 2 * h, 2 * w], True)


def _empty_input(grad: Tensor, weight: Tensor) -> Tensor:
    n, _, h, w = grad.shape
    return layout.empty(grad, [n, weight.shape[0], h // 2, w // 2], True)


def _empty_weights(grad: Tensor, u: Tensor, has_bias: bool, channels_last: bool = False) -> list[Tensor]:
    d_weight = layout.empty(u, (u.shape[1], grad.shape[1], TAPS, TAPS), channels_last)
    return [d_weight, *([u.new_empty(grad.shape[1])] if has_bias else [])]


def _order(like: Tensor, u_channels: int, y_channels: int, forward: bool = False) -> choose.Order:
    few = 0 if _native.core is None else _native.core.DECONV_NARROW
    units = forward and _native.by_matrix_units(like.dtype)
    return choose.deconv(like.device.type, like.dtype, u_channels, y_channels, few, like.dtype in MULTIPLIED, units)


def _functions(op: str, backend: str, like: Tensor, weight: Tensor, forward: bool = False) -> Mapping[str, Any]:
    order = _order(like, weight.shape[0], weight.shape[1], forward)
    return choose.select(op, BACKENDS, backend, like, weight, order=order).functions


def folds(backend: str, u_channels: int, grad: Tensor) -> bool:
    """Whether :func:`norm_backward` serves: it begins with the gradient of a normalised output. Where it does not,
    the library's kernels get the gradient of the output itself, made before."""
    order = _order(grad, u_channels, grad.shape[1])
    return choose.pick("deconv_norm_backward", BACKENDS, backend, grad, order=order) != "reference"


def _forward(u: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return _functions("deconv", backend, u, weight, True)["forward"](u, weight, bias)


def _residual(u: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, backend: str) -> Tensor:
    given = min(weight.shape[:2]), chips.products_of(u.device), chips.little_shared(u.device)
    order = choose.deconv_residual(u.dtype, *given) if u.is_cuda else _order(u, weight.shape[0], weight.shape[1], True)
    functions = choose.select("deconv_residual", BACKENDS, backend, u, weight, order=order).functions
    if "forward_residual" in functions:
        return functions["forward_residual"](u, weight, bias, residual)
    return functions["forward"](u, weight, bias).add_(residual)


def _backward_x(grad: Tensor, weight: Tensor, backend: str) -> Tensor:
    return _functions("deconv_backward_x", backend, grad, weight)["backward_x"](grad, weight)


def _backward_weight(grad: Tensor, u: Tensor, has_bias: bool, channels_last: bool, backend: str) -> list[Tensor]:
    order = choose.deconv_backward_weight(grad.device.type)
    chosen = choose.select("deconv_backward_weight", BACKENDS, backend, grad, u, order=order)
    d_weight, *d_bias = chosen.functions["backward_weight"](grad, u, has_bias)
    return [d_weight.contiguous(memory_format=_FORMATS[channels_last]), *d_bias]


def _stats(
    u: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    functions = _functions("deconv_stats", backend, u, weight, True)
    if "forward_stats" in functions:
        return functions["forward_stats"](u, weight, bias, (*batch_norm.contiguous(norm_weight, norm_bias), eps))
    y, part = functions["forward"](u, weight, bias), choose.for_part(backend, batch_norm.BACKENDS)
    return y, torch.ops.wavemix_kernels.batch_norm_stats(y, norm_weight, norm_bias, eps, part)


def _norm_backward(
    grad: Tensor, y: Tensor, mean: Tensor, invstd: Tensor, norm_weight: Tensor | None, batch_stats: bool,
    u: Tensor, weight: Tensor, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    norm, grad = choose.for_part(backend, batch_norm.BACKENDS), layout.channels_inner(grad)
    functions = _functions("deconv_norm_backward", backend, grad, weight)
    if "norm_backward" in functions:
        of = batch_norm.line(grad, y, mean, invstd, norm_weight, batch_stats, True, norm)
        line: Norm = (y, of.a.contiguous(), of.b, mean.to(of.a.dtype).contiguous(), of.d)
        du, d_weight = functions["norm_backward"](grad, u, weight, line)
        return du, d_weight.contiguous(memory_format=layout.memory_format(weight)), of.parameters
    # The library's kernels take the gradient of y itself.
    made = torch.ops.wavemix_kernels.batch_norm_backward
    dy, of_norm = made(grad, y, mean, invstd, norm_weight, batch_stats, True, norm)
    return backward_x(dy, weight, backend), backward_weight(dy, u, weight, False, backend)[0], of_norm


def _stats_fake(u: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_output(u, weight), batch_norm.empty_statistics(u, weight.shape[1])


def _norm_backward_fake(
    grad: Tensor, y: Tensor, mean: Tensor, invstd: Tensor, norm_weight: Tensor | None, batch_stats: bool,
    u: Tensor, weight: Tensor, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_weight = _empty_weights(y, u, False, layout.is_channels_last(weight))[0]
    return _empty_input(grad, weight), d_weight, batch_norm.empty_gradients(y, norm_weight)


for _name, _implementation, _fake in (
    ("deconv", _forward, lambda u, weight, bias, backend: _empty_output(u, weight)),
    ("deconv_residual", _residual, lambda u, weight, bias, residual, backend: _empty_output(u, weight)),
    ("deconv_backward_x", _backward_x, lambda grad, weight, backend: _empty_input(grad, weight)),
    ("deconv_backward_weight", _backward_weight, lambda *arguments: _empty_weights(*arguments[:-1])),
    ("deconv_stats", _stats, _stats_fake),
    ("deconv_norm_backward", _norm_backward, _norm_backward_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"wavemix_kernels::{_name}", _fake, lib=_library)


def backward_x(grad: Tensor, weight: Tensor, backend: str) -> Tensor:
    """Gradient of u."""
    return torch.ops.wavemix_kernels.deconv_backward_x(grad, weight, backend)


def backward_weight(
    grad: Tensor, u: Tensor, weight: Tensor, has_bias: bool, backend: str
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the weight, in its memory order, and of the bias. The library makes them in the images' order, which
    a weight in channels_last takes without a copy."""
    made = torch.ops.wavemix_kernels.deconv_backward_weight
    d_weight, *d_bias = made(grad, u, has_bias, layout.is_channels_last(weight), backend)
    return d_weight, d_bias[0] if has_bias else None


def plus_residual(u: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, backend: str) -> Tensor:
    """Output plus an image of its shape, added before rounding where our kernels make it; without gradient."""
    return torch.ops.wavemix_kernels.deconv_residual(u, weight, bias, residual, backend)


class NormGradients(NamedTuple):
    """Gradients of u, of the weight and of the BatchNorm's weight and bias. The convolution's own bias has none that
    kernels would be needed for: BatchNorm takes a batch's mean away, or passes its bias' gradient on."""

    u: Tensor
    weight: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


def norm_backward(
    grad: Tensor, y: Tensor, mean: Tensor, invstd: Tensor, norm_weight: Tensor | None, batch_stats: bool,
    u: Tensor, weight: Tensor, backend: str,
) -> NormGradients:  # fmt: skip
    """Gradients from that of BatchNorm(y), where :func:`folds`; ``batch_stats``: its statistics are y's own."""
    made = torch.ops.wavemix_kernels.deconv_norm_backward
    d_u, d_weight, of_norm = made(grad, y, mean, invstd, norm_weight, batch_stats, u, weight, backend)
    return NormGradients(d_u, d_weight, *of_norm.unbind(0))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    u, weight, bias, ctx.backend = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(u, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    u, weight = ctx.saved_tensors
    return (
        backward_x(grad, weight, ctx.backend), *backward_weight(grad, u, weight, ctx.has_bias, ctx.backend), None
    )  # fmt: skip


def _standard(u: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return F.conv_transpose2d(u, weight, bias, STRIDE, PADDING)


#: (u, weight, bias, backend) -> output, with its gradient.
fused = differentiable(_library, "deconv", _setup, _backward, standard=_standard, once=True)


def self_test(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """An odd size, 40 channels to 36: gradients, residual, statistics, a BatchNorm's gradients; (error, bound)."""
    p, results = selftest.pattern, []
    error = selftest.against_reference(
        lambda u, w, b: [deconv(u, w, b, backend=backend)],
        lambda u, w, b: [F.conv_transpose2d(u, w, b, STRIDE, PADDING)],
        [p(2, 40, 5, 7), p(40, 36, 4, 4), p(36)], device, dtype,
    )  # fmt: skip
    tensors = p(2, 40, 5, 7), p(40, 36, 4, 4), p(36), p(2, 36, 10, 14, phase=1), p(2, 36, 10, 14, phase=2)
    for name, wide, where in ((backend, dtype, device), ("reference", torch.float64, torch.device("cpu"))):
        u, weight, bias, residual, grad = (t.to(dtype).to(where, wide) for t in tensors)
        y, rows = torch.ops.wavemix_kernels.deconv_stats(u, weight, bias, None, None, 1e-5, name)
        stats = batch_norm.Statistics.of(rows)
        norm = stats.mean, stats.invstd, None, True
        gradients = norm_backward(grad, y, *norm, u, weight, name)
        results.append([plus_residual(u, weight, bias, residual, name), y, *stats, *gradients])
    terms = 4 * 40 + 2 * 10 * 14  # of the convolution, and behind it of the statistics
    return selftest.largest(error, selftest.largest_error(*results)), selftest.rounding_bound(terms, dtype)
