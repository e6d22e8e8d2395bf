"""BatchNorm in parts: batch statistics; normalisation, affine map and residual in one pass; the backward pass.

Statistics are fp32 (fp64 for fp64). Source: Ioffe and Szegedy, arXiv:1502.03167.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from wavemix_kernels import _native, backends
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import layout, selftest
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.common.library import Library

_library = Library()
_library.define("batch_norm_stats(Tensor x, str backend) -> (Tensor, Tensor)")
_library.define(
    "batch_norm_apply(Tensor x, Tensor scale, Tensor shift, Tensor? residual, bool channels_last, str backend) "
    "-> Tensor"
)
_library.define(
    "batch_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor invstd, Tensor? weight, bool batch_stats, "
    "bool channels_last, str backend) -> (Tensor, Tensor, Tensor)"
)


class Affine(NamedTuple):
    """A normalisation as the affine map it is: ``x * scale + shift`` per channel, in the statistics' dtype."""

    scale: Tensor
    shift: Tensor


def affine(mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Affine:
    scale = invstd if weight is None else invstd * weight
    shift = -mean * scale
    return Affine(scale, shift if bias is None else shift + bias)


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float | Tensor,
) -> None:
    """Moves the running statistics towards a batch of ``count`` values per channel (``var`` biased) by ``momentum``, a
    number or a tensor of one element on their device."""
    with torch.no_grad():
        for running, batch in ((running_mean, mean), (running_var, var * (count / max(count - 1, 1)))):
            weight = momentum.to(running.dtype) if isinstance(momentum, Tensor) else momentum
            running.lerp_(batch.to(running.dtype), weight)


# --- Backends: stats(x), apply(x, scale, shift, residual, out), reduce(grad, x, mean, invstd),
#     backward(grad, x, a, b, d, out): out = a*grad + b*x + d -------------------------------------------------


def _core() -> Any:
    return _native.core


def _cpu_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(x.shape[1], dtype=accumulate_dtype(x.dtype))
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
    var, mean = torch.var_mean(x.to(accumulate_dtype(x.dtype)), (0, 2, 3), correction=0)
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
    wide = accumulate_dtype(x.dtype)
    chosen.functions["apply"](x, scale.to(wide).contiguous(), shift.to(wide).contiguous(), residual, out)
    return out


def backward_line(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, batch_stats: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The line that makes the gradient of x from the output's, ``a grad + b (x - mean) + d`` per channel: a, b, d; then
    the gradients of weight and bias. One pass over both images, below autograd."""
    chosen = choose.select("batch_norm_backward", BACKENDS, backend, grad, x)
    wide = accumulate_dtype(x.dtype)
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
    return x.new_empty(x.shape[1], dtype=accumulate_dtype(x.dtype))


for _name, _implementation, _fake in (
    ("batch_norm_stats", _stats, lambda x, backend: (_channel_fake(x), _channel_fake(x))),
    ("batch_norm_apply", _apply, lambda x, a, b, r, channels_last, k: layout.empty(x, x.shape, channels_last)),
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


def self_test(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Batch statistics, the norm with a residual, and gradients: (error, bound)."""
    p, ops, results = selftest.pattern, torch.ops.wavemix_kernels, []
    tensors = p(3, 8, 7, 5) + 2, p(3, 8, 7, 5, phase=1), p(3, 8, 7, 5, phase=2), p(8), p(8, phase=1)
    for name, wide, where in ((backend, dtype, device), ("reference", torch.float64, torch.device("cpu"))):
        x, grad, residual, weight, bias = (t.to(dtype).to(where, wide) for t in tensors)
        mean, var = ops.batch_norm_stats(x, name)
        invstd = torch.rsqrt(var + 1e-5)
        out = ops.batch_norm_apply(x, *affine(mean, invstd, weight, bias), residual, False, name)
        results.append([mean, var, out, *backward(grad, x, mean, invstd, weight, True, False, name)])
    return selftest.largest_error(*results), selftest.rounding_bound(3 * 7 * 5, dtype)
