"""``gelu_batch_norm``: GELU and a BatchNorm by the batch's own statistics, as WaveMix's stem ends.

GELU is made where the norm's kernels read, forward and backward, so it never reaches memory: three passes over an image
forward where modules take five, and five backward where they take eight.

Source: Hendrycks and Gimpel, arXiv:1606.08415; Ioffe and Szegedy, arXiv:1502.03167; WaveMix, arXiv:2205.14375.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels import backends
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import layout, plan, selftest
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.common.library import Library
from wavemix_kernels.ops.common.once import once_differentiable
from wavemix_kernels.ops.common.transforms import standard_wanted
from wavemix_kernels.ops.norm import batch_norm

_library = Library()
_library.define("gelu_batch_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, str backend) -> (Tensor, Tensor)")
_library.define(
    "gelu_batch_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor invstd, Tensor? weight, str backend) "
    "-> (Tensor, Tensor)"
)


# --- Backends: forward(x, weight, bias, eps, out) -> the rows of Statistics (5, C), out the normalised GELU(x);
#     backward(grad, x, mean, invstd, weight, out) -> the gradients of weight and bias (2, C), out that of x.
#     Small tensors are contiguous, weights of any dtype. ------------------------------------------------------------


def _reference_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor) -> Tensor:
    wide = F.gelu(x.to(accumulate_dtype(x.dtype)))
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    of = batch_norm.from_moments(mean, var, weight, bias, eps)
    out.copy_(wide * of.scale[:, None, None] + of.shift[:, None, None])
    return torch.stack(of)


def _reference_backward(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, out: Tensor
) -> Tensor:
    wide, grad = x.to(mean.dtype), grad.to(mean.dtype)
    of_norm, parameters = torch.ops.wavemix_kernels.batch_norm_backward(
        grad, F.gelu(wide), mean, invstd, weight, True, False, "reference"
    )
    out.copy_(torch.ops.aten.gelu_backward(of_norm, wide))
    made: Tensor = parameters
    return made


def _triton_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor) -> Tensor:
    from wavemix_kernels.ops.norm import triton_batch_norm as kernels

    rows = kernels.stats(x, weight, bias, eps, gelu=True)
    *_, scale, shift = rows.unbind(0)
    kernels.affine(out, x, scale, shift, gelu=True)
    return rows


def _triton_backward(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, out: Tensor
) -> Tensor:
    from wavemix_kernels.ops.norm import triton_batch_norm as kernels

    a, b, d, parameters = kernels.line(grad, x, mean, invstd, weight, True, False, gelu=True)
    kernels.affine(out, grad, a, d, x, b, gelu=True)
    return parameters


def _triton_why_not(*tensors: Tensor) -> str | None:
    if (reason := backends.triton_why_not(*tensors)) is not None:
        return reason
    return "its GELU is float32, got float64" if any(t.dtype == torch.float64 for t in tensors) else None


BACKENDS: dict[str, backends.Backend] = {
    "triton": backends.Backend(_triton_why_not, {"forward": _triton_forward, "backward": _triton_backward}),
    "reference": backends.Backend(
        backends.reference_why_not, {"forward": _reference_forward, "backward": _reference_backward}
    ),
}


# --- The operators ---------------------------------------------------------------------------------------


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    run = choose.select("gelu_batch_norm", BACKENDS, backend, x).functions["forward"]
    out = _empty(x)
    return out, run(x, *batch_norm.contiguous(weight, bias), eps, out)


def _backward_op(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    run = choose.select("gelu_batch_norm_backward", BACKENDS, backend, grad, x).functions["backward"]
    out = _empty(x)
    return out, run(grad, x, mean.contiguous(), invstd.contiguous(), *batch_norm.contiguous(weight), out)


def _empty(x: Tensor) -> Tensor:
    return layout.empty(x, x.shape, layout.is_channels_last(x))


for _name, _implementation, _fake in (
    ("gelu_batch_norm", _forward, lambda x, *_: (_empty(x), batch_norm.empty_statistics(x, x.shape[1]))),
    (
        "gelu_batch_norm_backward",
        _backward_op,
        lambda grad, x, mean, invstd, weight, backend: (_empty(x), batch_norm.empty_gradients(x, weight)),
    ),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"wavemix_kernels::{_name}", _fake, lib=_library)


@plan.function
class _GeluBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, rows = torch.ops.wavemix_kernels.gelu_batch_norm(x, weight, bias, eps, backend)
        if not torch.compiler.is_compiling():  # which does not know it
            ctx.set_materialize_grads(False)  # of statistics
        ctx.backend = backend
        ctx.save_for_backward(x, rows, weight, bias)
        ctx.mark_non_differentiable(rows)
        return out, rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        x, rows, weight, bias = ctx.saved_tensors
        of = batch_norm.Statistics.of(rows)
        made = torch.ops.wavemix_kernels.gelu_batch_norm_backward
        dx, parameters = made(grad, x, of.mean, of.invstd, weight, ctx.backend)
        d_weight, d_bias = parameters.unbind(0)
        return dx, None if weight is None else d_weight, None if bias is None else d_bias.to(bias.dtype), None, None


def serves(x: Tensor, backend: str) -> bool:
    """Whether kernels make GELU where they read: elsewhere the modules are as good. Transforms of torch.func and
    forward-mode differentiation, for which :func:`fused` has no rules, want the modules."""
    if x.dtype == torch.float64 or standard_wanted() is not None:
        return False
    return choose.pick("gelu_batch_norm", BACKENDS, choose.for_part(backend, BACKENDS), x) != "reference"


def fused(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, batch_norm.Statistics]:
    """``batch_norm(gelu(x))``, GELU in its exact form, with its gradient, and the statistics of ``gelu(x)``, fp32 (fp64
    for fp64), without.

    Args:
        x: (N, C, H, W), fp32 or a half type on Triton; the output takes its memory format.
        weight, bias: (C) of any dtype, or None; eps is added to the variance.

    Raises:
        ValueError: the backend asked for by name cannot serve x.
    """
    out, rows = _GeluBatchNorm.apply(x, weight, bias, eps, choose.for_part(backend, BACKENDS))
    return out, batch_norm.Statistics.of(rows)


def self_test(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """The output, which the statistics are a part of, and all gradients: (error, bound)."""
    p = selftest.pattern

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        return [fused(x, weight, bias, 1e-2, backend)[0]]

    def exact(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        return [F.batch_norm(F.gelu(x), None, None, weight, bias, True, 0.1, 1e-2)]

    tensors = [2 * p(3, 8, 7, 5), p(8) + 2, p(8, phase=1)]
    return selftest.against_reference(run, exact, tensors, device, dtype), selftest.rounding_bound(3 * 7 * 5, dtype)
