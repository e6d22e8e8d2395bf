"""``normed_mlp_backward``: the pointwise MLP's gradients through a BatchNorm of its second input.

With g the gradient of the second input, y's BatchNorm, its own begins with the sums of g and of g * yhat over all
pixels: a pass over two images. But g is ``dh @ w1``, dh the gradient of the hidden layer before its activation. So the
sums are ``sum(dh) @ w1``, of the first bias's gradient, and ``sum over units of w1 * (dh^T @ yhat)``, of a product that
the first weight's gradient needs anyway: two reads of matrices of weights. The first weight's own gradient follows by
BatchNorm's weight and bias, since the second input is ``yhat * weight + bias``.

Source: WaveMix (arXiv:2205.14375), a feed-forward part and the BatchNorm of the level below; Ioffe and Szegedy,
arXiv:1502.03167.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from wavemix_kernels import backends
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import chips, layout, selftest
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.common.library import Library
from wavemix_kernels.ops.common.products import matrix
from wavemix_kernels.ops.mlp import op as pointwise_mlp
from wavemix_kernels.ops.norm import batch_norm

_ARGUMENTS = (
    "Tensor grad, Tensor x, Tensor y, Tensor mean, Tensor invstd, Tensor scale, Tensor shift, Tensor? norm_weight, "
    "Tensor? norm_bias, Tensor w1, Tensor b1, Tensor w2, Tensor? b2, float p, Tensor? seed"
)
_library = Library()
_library.define(f"normed_mlp_backward({_ARGUMENTS}, str backend) -> Tensor[]")


class Norm(NamedTuple):
    """A BatchNorm of y by its batch's own statistics: (C) each, fp32; weight and bias of any dtype, or None."""

    mean: Tensor
    invstd: Tensor
    scale: Tensor
    shift: Tensor
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, of: batch_norm.Statistics, weight: Tensor | None, bias: Tensor | None) -> Norm:
        return cls(of.mean, of.invstd, of.scale, of.shift, weight, bias)


class Gradients(NamedTuple):
    """Results; ``y``: the gradient of y itself. Absent ones are None."""

    x: Tensor
    y: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor


# --- Backends: backward(grad, x, y, norm, w1, b1, w2, b2, p, seed) -> gradients of x and the BatchNorm's output side by
#     side, of y, w1, b1, w2, b2, and of the BatchNorm's parameters (2, C). ----------------------------------------


def _triton_backward(
    grad: Tensor, x: Tensor, y: Tensor, norm: Norm, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor | None, p: float,
    seed: Tensor | None,
) -> list[Tensor | None]:  # fmt: skip
    from wavemix_kernels.ops.mlp import triton_forms as forms
    from wavemix_kernels.ops.mlp import triton_normed as kernels
    from wavemix_kernels.ops.norm import triton_batch_norm as norms

    mlp = pointwise_mlp.triton_mlp(x, y, norm.scale, norm.shift, w1, b1, w2, b2, p, seed)
    if not forms.keeps(mlp):  # measured to be slower on this device
        return _in_parts(grad, x, y, norm, w1, b1, w2, b2, p, seed, "triton")
    weight, bias = batch_norm.contiguous(norm.weight, norm.bias)
    of = kernels.Norm(norm.mean.contiguous(), norm.invstd.contiguous(), weight, bias)
    n, _, h, w = x.shape
    both = layout.empty(x, (n, w1.shape[1], h, w), True)
    weights = [None if t is None else torch.empty_like(t) for t in (mlp.w1, mlp.b1, mlp.w2, mlp.b2)]
    into = forms.Results(*cast(Any, (matrix(both), None, *weights, None)))
    a, b, d, parameters = forms.normed_backward(into, pointwise_mlp.rows_of(grad), mlp, of)
    dy = layout.empty(y, y.shape, True)
    norms.affine(dy, both[:, x.shape[1] :], a, d, y, b)
    return [both, dy, *weights, parameters]


def _in_parts(
    grad: Tensor, x: Tensor, y: Tensor, norm: Norm, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor | None, p: float,
    seed: Tensor | None, backend: str,
) -> list[Tensor | None]:  # fmt: skip
    part = choose.for_part(backend, pointwise_mlp.BACKENDS)
    made = pointwise_mlp.backward(grad, x, y, norm.scale, norm.shift, w1, b1, w2, b2, p, seed, False, part)
    assert made.second is not None
    both = layout.laid_out(torch.cat((made.x, made.second), 1), True)
    part = choose.for_part(backend, batch_norm.BACKENDS)
    dy, *of_norm = batch_norm.backward(made.second, y, norm.mean, norm.invstd, norm.weight, True, True, part)
    return [both, dy, made.w1, made.b1, made.w2, made.b2, torch.stack(of_norm)]


BACKENDS: dict[str, backends.Backend] = {
    "triton": backends.Backend(pointwise_mlp.triton_why_not, {"backward": _triton_backward}),
    "reference": backends.Backend(backends.reference_why_not, {}),
}


# --- The operator ----------------------------------------------------------------------------------------


def _backward_op(grad: Tensor, x: Tensor, y: Tensor, *rest: Any) -> list[Tensor]:
    mean, invstd, scale, shift, norm_weight, norm_bias, w1, b1, w2, b2, p, seed, backend = rest
    norm, mlp = Norm(mean, invstd, scale, shift, norm_weight, norm_bias), (w1, b1, w2, b2, p, seed)
    chosen = choose.select("normed_mlp_backward", BACKENDS, choose.for_part(backend, BACKENDS), grad, w1, x)
    if chosen.functions:
        made = chosen.functions["backward"](grad, x, y, norm, *mlp)
    else:
        made = _in_parts(grad, x, y, norm, *mlp, backend)
    return [grad.new_empty(0) if t is None else t for t in made]


def _fake(grad: Tensor, x: Tensor, y: Tensor, *rest: Any) -> list[Tensor]:
    _, _, _, _, norm_weight, _, w1, b1, w2, b2, *_ = rest
    n, _, h, w = x.shape
    images = layout.empty(x, (n, w1.shape[1], h, w), True), layout.empty(y, y.shape, True)
    weights = (torch.empty_like(t) for t in (w1, b1, w2))
    of_b2 = grad.new_empty(0) if b2 is None else torch.empty_like(b2)
    return [*images, *weights, of_b2, batch_norm.empty_gradients(y, norm_weight)]


_library.impl("normed_mlp_backward", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("wavemix_kernels::normed_mlp_backward", _fake, lib=_library)


def serves(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, backend: str) -> bool:
    """Whether the sums follow from the gradients of weights, w1 (K, A + B) and w2 (O, K): on a GPU in half types, where
    the kernels keep the hidden layer's gradient for the library's products, and there is a first bias."""
    if x.dtype.itemsize != 2 or b1 is None or not (x.is_cuda or backend == "triton"):
        return False
    little = chips.little_shared(x.device)
    return choose.pointwise_mlp(x.dtype, w1.shape[1], w2.shape[0], True, little) == "kept"


def backward(
    grad: Tensor, x: Tensor, y: Tensor, norm: Norm, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor | None, p: float,
    seed: Tensor | None, backend: str,
) -> Gradients:  # fmt: skip
    """Gradients of ``pointwise_mlp(x, w1, b1, w2, b2, second=BatchNorm(y))``, its statistics those of y.

    Args:
        grad: (N, O, H, W); x: (N, A, H, W); y: (N, B, H, W), channels_last, of one dtype.
        w1: (K, A + B), b1: (K), w2: (O, K), b2: (O) or None, of that dtype.
        p, seed: of dropout, as :func:`~wavemix_kernels.ops.mlp.pointwise_mlp` takes them.
    """
    both, dy, d_w1, d_b1, d_w2, d_b2, parameters = torch.ops.wavemix_kernels.normed_mlp_backward(
        grad, x, y, *norm, w1, b1, w2, b2, p, seed, backend
    )
    gx = both[:, : x.shape[1]]
    return Gradients(gx, dy, d_w1, d_b1, d_w2, None if b2 is None else d_b2, *parameters.unbind(0))


def self_test(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """All gradients, with dropout, as wide as the kernels that keep the hidden layer are: (error, bound)."""
    p, results, wide = selftest.pattern, [], 40
    a = choose.MLP_WEIGHTS_HELD
    tensors = (
        p(2, 8, 6, 10, phase=2), p(2, a, 6, 10), p(2, 4, 6, 10, phase=1) + 1, p(wide, a + 4), p(wide), p(8, wide), p(8),
        p(4) + 2, p(4, phase=3),
    )  # fmt: skip
    for name, real, where in ((backend, dtype, device), ("reference", torch.float64, torch.device("cpu"))):
        given = (t.to(dtype).to(where, real) for t in tensors)
        ordered = (t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in given)
        grad, x, y, w1, b1, w2, b2, weight, bias = ordered
        var, mean = torch.var_mean(y.to(accumulate_dtype(real)), (0, 2, 3), correction=0)
        norm = Norm.of(batch_norm.from_moments(mean, var, weight, bias, 1e-5), weight, bias)
        seed = torch.tensor([12345], device=where)
        results.append([*backward(grad, x, y, norm, w1, b1, w2, b2, 0.25, seed, name)])
    return selftest.largest_error(*results), selftest.rounding_bound(max(2 * 6 * 10, a) + wide, dtype)
