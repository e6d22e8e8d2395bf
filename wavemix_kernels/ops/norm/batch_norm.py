"""``batch_norm_residual``: statistics, then normalise + affine + residual in one pass over memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels import _native, backends, checks
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import layout, selftest
from wavemix_kernels.ops.common.autograd import differentiable

_library = torch.library.Library("wavemix_kernels", "FRAGMENT")
_library.define("batch_norm_stats(Tensor x, str backend) -> (Tensor, Tensor)")
_library.define(
    "batch_norm_apply(Tensor x, Tensor scale, Tensor shift, Tensor? residual, bool channels_last, str backend) "
    "-> Tensor"
)
_library.define(
    "batch_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor invstd, Tensor? weight, bool batch_stats, "
    "bool channels_last, str backend) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "batch_norm_train(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool channels_last, "
    "str backend) -> (Tensor, Tensor, Tensor)"
)


class Affine(NamedTuple):
    """A normalisation as the affine map it is: ``x * scale + shift`` per channel, in the statistics' dtype."""

    scale: Tensor
    shift: Tensor


def affine(mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Affine:
    scale = invstd if weight is None else invstd * weight
    shift = -mean * scale
    return Affine(scale, shift if bias is None else shift + bias)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def batch_norm_residual(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    channels_last: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Batch normalisation plus an optional residual: ``(x - mean) / sqrt(var + eps) * weight + bias + residual``.

    As ``torch.nn.functional.batch_norm`` (biased variance for normalising, unbiased for the running one), then the
    addition, in one pass after the statistics. Statistics are fp32 (fp64 for fp64).

    Args:
        x: (N, C, H, W), float64, float32, float16 or bfloat16, any strides.
        running_mean, running_var: (C), updated in place in training, used otherwise; None: batch statistics always.
        weight, bias: (C) or None.
        training: normalise by the batch's own statistics.
        momentum: weight of the new batch in the running statistics.
        eps: added to the variance.
        residual: (N, C, H, W) to add, x's dtype, or None.
        channels_last: memory format of the result; default: x's own.
        backend: for this call instead of the ambient :class:`wavemix_kernels.backend`.

    Raises:
        TypeError, ValueError: types and shapes that do not belong together; a batch with one value per channel in
            training (its variance is meaningless).

    Source: Ioffe and Szegedy, arXiv:1502.03167.
    """
    checks.check_tensor("x", x, 4, "(N, C, H, W)")
    c = x.shape[1]
    for name, tensor in (
        ("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias),
    ):  # fmt: skip
        if tensor is not None:
            if tuple(tensor.shape) != (c,):
                raise ValueError(
                    f"{name}: expected shape ({c},) to go with x {tuple(x.shape)}, got {tuple(tensor.shape)}"
                )
            checks.check_same_device(name, tensor, "x", x)
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"residual: expected x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
        checks.check_same_device("residual", residual, "x", x)
        checks.check_same_dtype("residual", residual, "x", x)
    batch_stats = training or running_mean is None or running_var is None
    order = layout.is_channels_last(x) if channels_last is None else channels_last
    chosen = backends.requested(backend)
    if not batch_stats:
        assert running_mean is not None
        assert running_var is not None
        invstd = torch.rsqrt(running_var.to(statistics_dtype(x.dtype)) + eps)
        return frozen(x, residual, running_mean, invstd, weight, bias, order, chosen)
    count = x.shape[0] * x.shape[2] * x.shape[3]
    if training and count <= 1:
        raise ValueError(f"x: expected more than one value per channel in training, got shape {tuple(x.shape)}")
    out, mean, var = train(x, residual, weight, bias, eps, order, chosen)
    if training and running_mean is not None and running_var is not None:
        update_running(running_mean, running_var, mean, var, count, momentum)
    return out


def update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float
) -> None:
    """Moves the running statistics towards a batch of ``count`` values per channel (``var`` biased)."""
    with torch.no_grad():
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (count / max(count - 1, 1))).to(running_var.dtype), momentum)


# --- Backends: stats(x), apply(x, scale, shift, residual, out), reduce(grad, x, mean, invstd),
#     backward(grad, x, a, b, d, out): out = a*grad + b*x + d -------------------------------------------------


def _core() -> Any:
    return _native.core


def _cpu_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(x.shape[1], dtype=statistics_dtype(x.dtype))
    var = torch.empty_like(mean)
    _core().batch_norm_stats_cpu(
        _native.DTYPES[x.dtype], x.shape, _native.address(x), mean.data_ptr(), var.data_ptr(), torch.get_num_threads()
    )
    return mean, var


def _cpu_apply(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, out: Tensor) -> None:
    a = _native.address
    _core().batch_norm_apply_cpu(
        _native.DTYPES[x.dtype], x.shape, a(x), scale.data_ptr(), shift.data_ptr(), a(residual), a(out),
        torch.get_num_threads(),
    )  # fmt: skip


def _cpu_reduce(grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    sum_g, sum_gx = torch.empty_like(mean), torch.empty_like(mean)
    a = _native.address
    _core().batch_norm_backward_reduce_cpu(
        _native.DTYPES[x.dtype], x.shape, a(grad), a(x), mean.data_ptr(), invstd.data_ptr(), sum_g.data_ptr(),
        sum_gx.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return sum_g, sum_gx


def _cpu_backward(grad: Tensor, x: Tensor, a: Tensor, b: Tensor, d: Tensor, out: Tensor) -> None:
    address = _native.address
    _core().batch_norm_backward_apply_cpu(
        _native.DTYPES[x.dtype], x.shape, address(grad), address(x), a.data_ptr(), b.data_ptr(), d.data_ptr(),
        address(out), torch.get_num_threads(),
    )  # fmt: skip


def _reference_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x.to(statistics_dtype(x.dtype)), (0, 2, 3), correction=0)
    return mean, var


def _channels(t: Tensor) -> Tensor:
    return t[:, None, None]


def _reference_apply(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, out: Tensor) -> None:
    value = x * _channels(scale) + _channels(shift)
    out.copy_(value if residual is None else value + residual)


def _reference_reduce(grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    wide = grad.to(mean.dtype)
    return wide.sum((0, 2, 3)), (wide * ((x - _channels(mean)) * _channels(invstd))).sum((0, 2, 3))


def _reference_backward(grad: Tensor, x: Tensor, a: Tensor, b: Tensor, d: Tensor, out: Tensor) -> None:
    out.copy_(grad * _channels(a) + x * _channels(b) + _channels(d))


def _triton_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    from wavemix_kernels.ops.norm import triton_batch_norm as kernels

    return kernels.stats(x)


def _triton_apply(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, out: Tensor) -> None:
    from wavemix_kernels.ops.norm import triton_batch_norm as kernels

    kernels.affine(out, x, scale, shift, residual)


def _triton_reduce(grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    from wavemix_kernels.ops.norm import triton_batch_norm as kernels

    return kernels.reduce(grad, x, mean, invstd)


def _triton_backward(grad: Tensor, x: Tensor, a: Tensor, b: Tensor, d: Tensor, out: Tensor) -> None:
    from wavemix_kernels.ops.norm import triton_batch_norm as kernels

    kernels.affine(out, grad, a, d, x, b)


BACKENDS: dict[str, backends.Backend] = {
    "triton": backends.Backend(
        backends.triton_why_not,
        {"stats": _triton_stats, "apply": _triton_apply, "reduce": _triton_reduce, "backward": _triton_backward},
    ),
    "cpu": backends.Backend(
        backends.cpu_why_not,
        {"stats": _cpu_stats, "apply": _cpu_apply, "reduce": _cpu_reduce, "backward": _cpu_backward},
    ),
    "reference": backends.Backend(
        backends.reference_why_not,
        {
            "stats": _reference_stats,
            "apply": _reference_apply,
            "reduce": _reference_reduce,
            "backward": _reference_backward,
        },
    ),
}


# --- The operators ---------------------------------------------------------------------------------------


def _stats(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return choose.select("batch_norm_stats", BACKENDS, backend, x).functions["stats"](x)


def _apply(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, channels_last: bool, backend: str
) -> Tensor:
    chosen = choose.select("batch_norm_apply", BACKENDS, backend, x)
    out = layout.empty(x, x.shape, channels_last)
    wide = statistics_dtype(x.dtype)
    chosen.functions["apply"](x, scale.to(wide).contiguous(), shift.to(wide).contiguous(), residual, out)
    return out


def _train(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, channels_last: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    mean, var = _stats(x, backend)
    scale, shift = affine(mean, torch.rsqrt(var + eps), weight, bias)
    return _apply(x, scale, shift, residual, channels_last, backend), mean, var


def backward_line(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, batch_stats: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What makes the gradient of x from that of the output, ``a grad + b (x - mean) + d`` per channel: a, b, d; then
    the gradients of weight and bias. One pass over both images, below autograd."""
    chosen = choose.select("batch_norm_backward", BACKENDS, backend, grad, x)
    wide = statistics_dtype(x.dtype)
    mean, invstd = mean.to(wide).contiguous(), invstd.to(wide).contiguous()
    sum_g, sum_gx = chosen.functions["reduce"](grad, x, mean, invstd)
    a = invstd if weight is None else invstd * weight.to(wide)
    # With xhat = (x - mean) * invstd: dx = a * (grad - mean(grad) - xhat * mean(grad * xhat)), a plane per channel.
    count = max(x.shape[0] * x.shape[2] * x.shape[3], 1)
    b = -a * invstd * sum_gx / count if batch_stats else torch.zeros_like(a)
    d = -a * sum_g / count if batch_stats else torch.zeros_like(a)
    return a, b, d, sum_gx, sum_g


def _backward_op(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, batch_stats: bool,
    channels_last: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    chosen = choose.select("batch_norm_backward", BACKENDS, backend, grad, x)
    a, b, offset, sum_gx, sum_g = backward_line(grad, x, mean, invstd, weight, batch_stats, backend)
    d = offset - b * mean.to(b.dtype)
    out = layout.empty(x, x.shape, channels_last)
    chosen.functions["backward"](grad, x, a.contiguous(), b, d, out)
    return out, sum_gx, sum_g


def _channel_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=statistics_dtype(x.dtype))


for _name, _implementation, _fake in (
    ("batch_norm_stats", _stats, lambda x, backend: (_channel_fake(x), _channel_fake(x))),
    ("batch_norm_apply", _apply, lambda x, a, b, r, channels_last, k: layout.empty(x, x.shape, channels_last)),
    (
        "batch_norm_train",
        _train,
        lambda x, r, w, b, e, channels_last, k: (
            layout.empty(x, x.shape, channels_last),
            _channel_fake(x),
            _channel_fake(x),
        ),
    ),
    (
        "batch_norm_backward",
        _backward_op,
        lambda g, x, m, i, w, s, channels_last, k: (
            layout.empty(x, x.shape, channels_last),
            _channel_fake(x),
            _channel_fake(x),
        ),
    ),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"wavemix_kernels::{_name}", _fake, lib=_library)


def backward(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, batch_stats: bool,
    channels_last: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight and bias; ``batch_stats``: the statistics depended on x."""
    return torch.ops.wavemix_kernels.batch_norm_backward(
        grad, x, mean, invstd, weight, batch_stats, channels_last, backend
    )


def _dtype(t: Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


def _cast(t: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """A parameter's gradient in the parameter's dtype, None where there is no parameter."""
    return None if dtype is None else t.to(dtype)


def _train_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, bias, ctx.eps, _, ctx.backend = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + ctx.eps))
    ctx.has = residual is not None, _dtype(weight), _dtype(bias)


def _train_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    x, weight, mean, invstd = ctx.saved_tensors
    has_residual, weight_dtype, bias_dtype = ctx.has
    order = layout.is_channels_last(x)
    dx, dw, db = backward(grad, x, mean, invstd, weight, True, order, ctx.backend)
    return dx, grad if has_residual else None, _cast(dw, weight_dtype), _cast(db, bias_dtype), None, None, None


#: (x, residual, weight, bias, eps, channels_last, backend) -> (output, mean, biased variance), with its gradient.
train = differentiable(_library, "batch_norm_train", _train_setup, _train_backward, once=True)


class _Frozen(torch.autograd.Function):
    """Normalisation by given statistics."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, mean: Tensor, invstd: Tensor, weight: Tensor | None,
        bias: Tensor | None, channels_last: bool, backend: str,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.has = residual is not None, _dtype(weight), _dtype(bias)
        ctx.backend = backend
        scale, shift = affine(mean, invstd, weight, bias)
        return torch.ops.wavemix_kernels.batch_norm_apply(x, scale, shift, residual, channels_last, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, mean, invstd = ctx.saved_tensors
        has_residual, weight_dtype, bias_dtype = ctx.has
        order = layout.is_channels_last(x)
        dx, dw, db = backward(grad, x, mean, invstd, weight, False, order, ctx.backend)
        grads = _cast(dw, weight_dtype), _cast(db, bias_dtype)
        return dx, grad if has_residual else None, None, None, *grads, None, None


def frozen(*arguments: Any) -> Tensor:
    """(x, residual, mean, invstd, weight, bias, channels_last, backend) -> output."""
    return _Frozen.apply(*arguments)


def self_test(backend: str, device: torch.device) -> tuple[float, float]:
    """Training form with a residual and all gradients: (error, bound)."""
    p = selftest.pattern

    def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> list[Tensor]:
        return [batch_norm_residual(x, None, None, weight, bias, training=True, residual=residual, backend=backend)]

    def exact(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> list[Tensor]:
        return [F.batch_norm(x, None, None, weight, bias, True) + residual]

    error = selftest.against_reference(run, exact, [p(3, 8, 7, 5) + 2, p(8), p(8), p(3, 8, 7, 5)], device)
    return error, selftest.rounding_bound(3 * 7 * 5)
