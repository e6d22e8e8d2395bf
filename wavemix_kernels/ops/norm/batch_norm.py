"""BatchNorm in parts: batch statistics; normalisation, affine map and residual in one pass; the backward pass.

Statistics are fp32 (fp64 for fp64). Source: Ioffe and Szegedy, arXiv:1502.03167.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wavemix_kernels import _native, backends
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import layout, selftest
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.common.library import Library

_library = Library()
_library.define("batch_norm_stats(Tensor x, Tensor? weight, Tensor? bias, float eps, str backend) -> Tensor")
_library.define(
    "batch_norm_apply(Tensor x, Tensor scale, Tensor shift, Tensor? residual, bool channels_last, str backend) "
    "-> Tensor"
)
_library.define(
    "batch_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor invstd, Tensor? weight, bool batch_stats, "
    "bool channels_last, str backend) -> (Tensor, Tensor)"
)


class Affine(NamedTuple):
    """A normalisation as the affine map it is: ``x * scale + shift`` per channel, in the statistics' dtype."""

    scale: Tensor
    shift: Tensor


def affine(mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Affine:
    scale = invstd if weight is None else invstd * weight
    shift = -mean * scale
    return Affine(scale, shift if bias is None else shift + bias)


class Statistics(NamedTuple):
    """A batch's statistics by channel, with the affine map that normalises by them: (C) each, fp32 (fp64 for fp64).

    Operators return the rows as one tensor (5, C): what an operator returns must not share memory, and a tensor that
    autograd keeps costs time.
    """

    mean: Tensor
    var: Tensor  # biased
    invstd: Tensor
    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Statistics:
        return cls(*rows.unbind(0))

    def affine(self) -> Affine:
        return Affine(self.scale, self.shift)


def from_moments(
    mean: Tensor, var: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 0.0
) -> Statistics:
    invstd = torch.rsqrt(var + eps)
    return Statistics(mean, var, invstd, *affine(mean, invstd, weight, bias))


class Line(NamedTuple):
    """The gradient of x from the output's, ``a grad + b x + d`` per channel, or with ``x - mean`` in x's place; and the
    gradients of weight and bias (2, C), in the weight's dtype if there is one."""

    a: Tensor
    b: Tensor
    d: Tensor
    parameters: Tensor


# --- Backends: stats(x, weight, bias, eps, out=None) -> the rows of Statistics (5, C), `out` where that is given;
#     apply(x, scale, shift, residual, out);
#     line(grad, x, mean, invstd, weight, batch_stats, centred) -> Line, one pass over both images;
#     backward(grad, x, a, b, d, out): out = a*grad + b*x + d. Small tensors are contiguous, weights of any dtype. ----

_Moments = Callable[[Tensor], tuple[Tensor, Tensor]]
_Sums = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _stats_by(moments: _Moments) -> Callable[..., Tensor]:
    """``stats`` of a backend whose kernel gives mean and variance."""

    def stats(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor | None = None) -> Tensor:
        return torch.stack(from_moments(*moments(x), weight, bias, eps), out=out)

    return stats


def _line_by(sums: _Sums) -> Callable[..., Line]:
    """``line`` of a backend whose kernel gives the sums of grad and of grad * xhat."""

    def line(
        grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, batch_stats: bool, centred: bool
    ) -> Line:
        return _line(*sums(grad, x, mean, invstd), mean, invstd, weight, x[:, :1].numel(), batch_stats, centred)

    return line


def _line(
    sum_g: Tensor, sum_gx: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, count: int, batch_stats: bool,
    centred: bool,
) -> Line:  # fmt: skip
    a = invstd if weight is None else invstd * weight.to(invstd.dtype)
    # With xhat = (x - mean) * invstd: dx = a * (grad - mean(grad) - xhat * mean(grad * xhat)).
    b = -a * invstd * sum_gx / max(count, 1) if batch_stats else torch.zeros_like(a)
    d = -a * sum_g / max(count, 1) if batch_stats else torch.zeros_like(a)
    dtype = a.dtype if weight is None else weight.dtype
    return Line(a, b, d if centred else d - b * mean, torch.stack((sum_gx, sum_g)).to(dtype))


def _core() -> Any:
    return _native.core


def _cpu_moments(x: Tensor) -> tuple[Tensor, Tensor]:
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


def _cpu_sums(grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
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


def _reference_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x.to(accumulate_dtype(x.dtype)), (0, 2, 3), correction=0)
    return mean, var


def _channels(t: Tensor) -> Tensor:
    return t[:, None, None]


def _reference_apply(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, out: Tensor) -> None:
    value = x * _channels(scale) + _channels(shift)
    out.copy_(value if residual is None else value + residual)


def _reference_sums(grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    wide = grad.to(mean.dtype)
    return wide.sum((0, 2, 3)), (wide * ((x - _channels(mean)) * _channels(invstd))).sum((0, 2, 3))


def _reference_backward(grad: Tensor, x: Tensor, a: Tensor, b: Tensor, d: Tensor, out: Tensor) -> None:
    out.copy_(grad * _channels(a) + x * _channels(b) + _channels(d))


def _triton_stats(*arguments: Any) -> Tensor:
    from wavemix_kernels.ops.norm import triton_batch_norm as kernels

    return kernels.stats(*arguments)


def _triton_apply(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, out: Tensor) -> None:
    from wavemix_kernels.ops.norm import triton_batch_norm as kernels

    kernels.affine(out, x, scale, shift, residual)


def _triton_line(*arguments: Any) -> Line:
    from wavemix_kernels.ops.norm import triton_batch_norm as kernels

    return Line(*kernels.line(*arguments))


def _triton_line_of_sums(sums: Tensor, *arguments: Any) -> Line:
    from wavemix_kernels.ops.norm import triton_finish as kernels

    return Line(*kernels.line(sums[:, None], *arguments))


def _triton_backward(grad: Tensor, x: Tensor, a: Tensor, b: Tensor, d: Tensor, out: Tensor) -> None:
    from wavemix_kernels.ops.norm import triton_batch_norm as kernels

    kernels.affine(out, grad, a, d, x, b)


BACKENDS: dict[str, backends.Backend] = {
    "triton": backends.Backend(
        backends.triton_why_not,
        {
            "stats": _triton_stats,
            "apply": _triton_apply,
            "line": _triton_line,
            "line_of_sums": _triton_line_of_sums,
            "backward": _triton_backward,
        },
    ),
    "cpu": backends.Backend(
        backends.cpu_why_not,
        {
            "stats": _stats_by(_cpu_moments),
            "apply": _cpu_apply,
            "line": _line_by(_cpu_sums),
            "backward": _cpu_backward,
        },
    ),
    "reference": backends.Backend(
        backends.reference_why_not,
        {
            "stats": _stats_by(_reference_moments),
            "apply": _reference_apply,
            "line": _line_by(_reference_sums),
            "backward": _reference_backward,
        },
    ),
}


# --- The operators ---------------------------------------------------------------------------------------


def _stats(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str) -> Tensor:
    made: Tensor = choose.select("batch_norm_stats", BACKENDS, backend, x).functions["stats"](
        x, *contiguous(weight, bias), eps
    )
    return made


def _apply(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, channels_last: bool, backend: str
) -> Tensor:
    chosen = choose.select("batch_norm_apply", BACKENDS, backend, x)
    out = layout.empty(x, x.shape, channels_last)
    wide = accumulate_dtype(x.dtype)
    chosen.functions["apply"](x, scale.to(wide).contiguous(), shift.to(wide).contiguous(), residual, out)
    return out


def contiguous(*parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in parameters)


def line(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, batch_stats: bool, centred: bool,
    backend: str,
) -> Line:  # fmt: skip
    """One pass over both images, below autograd; ``batch_stats``: the statistics depended on x, ``centred``: the line
    is of ``x - mean``."""
    run = choose.select("batch_norm_backward", BACKENDS, backend, grad, x).functions["line"]
    wide = accumulate_dtype(x.dtype)
    small = mean.to(wide).contiguous(), invstd.to(wide).contiguous(), *contiguous(weight)
    made: Line = run(grad, x, *small, batch_stats, centred)
    return made


def backward_of_sums(
    sums: Tensor, grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """The operator ``batch_norm_backward`` of a batch's own statistics where the sums of grad and of grad * xhat,
    (2, C), are known; below autograd."""
    functions = choose.select("batch_norm_backward", BACKENDS, backend, grad, x).functions
    small = mean, invstd, *contiguous(weight), x[:, :1].numel(), True, False
    made: Line = functions["line_of_sums"](sums, *small) if "line_of_sums" in functions else _line(*sums, *small)
    out = torch.empty_like(x)
    functions["backward"](grad, x, made.a.contiguous(), made.b, made.d, out)
    return out, made.parameters


def _backward_op(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, batch_stats: bool,
    channels_last: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    made = line(grad, x, mean, invstd, weight, batch_stats, False, backend)
    out = layout.empty(x, x.shape, channels_last)
    run = choose.select("batch_norm_backward", BACKENDS, backend, grad, x).functions["backward"]
    run(grad, x, made.a.contiguous(), made.b, made.d, out)
    return out, made.parameters


def empty_statistics(x: Tensor, channels: int) -> Tensor:
    """The rows of :class:`Statistics` for images of x's dtype."""
    return x.new_empty((len(Statistics._fields), channels), dtype=accumulate_dtype(x.dtype))


def empty_gradients(x: Tensor, weight: Tensor | None) -> Tensor:
    """The gradients of a norm's weight and bias, (2, C), for images like x."""
    shape = 2, x.shape[1]
    return x.new_empty(shape, dtype=accumulate_dtype(x.dtype)) if weight is None else weight.new_empty(shape)


for _name, _implementation, _fake in (
    ("batch_norm_stats", _stats, lambda x, w, b, eps, k: empty_statistics(x, x.shape[1])),
    ("batch_norm_apply", _apply, lambda x, a, b, r, channels_last, k: layout.empty(x, x.shape, channels_last)),
    (
        "batch_norm_backward",
        _backward_op,
        lambda g, x, m, i, w, s, channels_last, k: (layout.empty(x, x.shape, channels_last), empty_gradients(x, w)),
    ),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"wavemix_kernels::{_name}", _fake, lib=_library)


def rows(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str) -> Tensor:
    """The batch's :class:`Statistics`, (5, C); eps is added to the variance, weight and bias (C) go into the affine
    map."""
    made: Tensor = torch.ops.wavemix_kernels.batch_norm_stats(x, weight, bias, eps, backend)
    return made


def stats(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str) -> Statistics:
    return Statistics.of(rows(x, weight, bias, eps, backend))


def given_rows(mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """:func:`rows` for statistics that are not the batch's; the variance is not among them."""
    return torch.stack((mean, mean, invstd, *affine(mean, invstd, weight, bias)))


def backward(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, batch_stats: bool,
    channels_last: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight and bias, the last two in the weight's dtype; ``batch_stats``: the statistics depended on
    x."""
    dx, of_parameters = torch.ops.wavemix_kernels.batch_norm_backward(
        grad, x, mean, invstd, weight, batch_stats, channels_last, backend
    )
    return dx, *of_parameters.unbind(0)


def self_test(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Batch statistics, the norm with a residual, and gradients: (error, bound)."""
    p, ops, results = selftest.pattern, torch.ops.wavemix_kernels, []
    tensors = p(3, 8, 7, 5) + 2, p(3, 8, 7, 5, phase=1), p(3, 8, 7, 5, phase=2), p(8), p(8, phase=1)
    for name, wide, where in ((backend, dtype, device), ("reference", torch.float64, torch.device("cpu"))):
        x, grad, residual, weight, bias = (t.to(dtype).to(where, wide) for t in tensors)
        of = stats(x, weight, bias, 1e-5, name)
        out = ops.batch_norm_apply(x, of.scale, of.shift, residual, False, name)
        xhat = (x - _channels(of.mean)) * _channels(of.invstd)
        sums = torch.stack([(grad * of_x).to(of.mean.dtype).sum((0, 2, 3)) for of_x in (1, xhat)])
        norm = of.mean, of.invstd, weight
        made = backward_of_sums(sums, grad, x, *norm, name)
        results.append([*of, out, *backward(grad, x, *norm, True, False, name), *made])
    return selftest.largest_error(*results), selftest.rounding_bound(3 * 7 * 5, dtype)
