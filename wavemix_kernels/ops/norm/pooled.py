"""``batch_norm_pool``: BatchNorm, residual and the average over all pixels, as a classifier ends.

``mean(y * scale + shift + x)`` over an image is ``mean(y) * scale + shift + mean(x)``: the image is never written, and
what follows reads none. Its gradient is one number for all pixels of an image's channel. So the sums that BatchNorm's
gradient begins with follow from the averages of y, and backward reads y once, for y's own gradient.

Source: Ioffe and Szegedy, arXiv:1502.03167; WaveMix, arXiv:2205.14375, the classifier's head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wavemix_kernels import backends
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import layout, selftest
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.common.library import Library
from wavemix_kernels.ops.norm import batch_norm

_library = Library()
_library.define("batch_norm_pool(Tensor y, Tensor scale, Tensor shift, Tensor x, str backend) -> (Tensor, Tensor)")
_library.define(
    "batch_norm_pool_backward(Tensor grad, Tensor means, Tensor y, Tensor mean, Tensor invstd, Tensor? weight, "
    "str backend) -> (Tensor, Tensor, Tensor)"
)


# --- Backends: pool(y, scale, shift, x) -> averages of the output (N, C, 1, 1), of y (N, C);
#     gradient(grad, means, y, mean, invstd, weight, out) -> the gradient of each value (N, C, 1, 1) and of the
#     parameters (2, C); out takes y's. Small tensors are contiguous, weights of any dtype. ------------------------


def _reference_pool(y: Tensor, scale: Tensor, shift: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    means, of_x = (t.to(scale.dtype).mean((2, 3)) for t in (y, x))
    out = means * scale + shift + of_x
    return out.to(x.dtype)[:, :, None, None], means


def _reference_gradient(
    grad: Tensor, means: Tensor, y: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor]:
    wide = grad.to(means.dtype).flatten(1)
    each = (wide / max(y[0, 0].numel(), 1)).to(grad.dtype)[:, :, None, None] if len(y) else torch.empty_like(grad)
    sums = torch.stack((wide.sum(0), (wide * ((means - mean) * invstd)).sum(0)))
    dy, gradients = batch_norm.backward_of_sums(sums, each.expand(y.shape), y, mean, invstd, weight, "reference")
    out.copy_(dy)
    return each, gradients


def _triton_pool(y: Tensor, scale: Tensor, shift: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    from wavemix_kernels.ops.norm import triton_pooled as kernels

    return kernels.pool(_rows(y), scale, shift, _rows(x))


def _triton_gradient(
    grad: Tensor, means: Tensor, y: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor]:
    from wavemix_kernels.ops.norm import triton_batch_norm as norms
    from wavemix_kernels.ops.norm import triton_pooled as kernels

    each, a, b, d, gradients = kernels.line(grad, means, mean, invstd, weight, y.shape[2] * y.shape[3])
    norms.affine(out, each.expand(y.shape), a, d, y, b)
    return each, gradients


def _rows(image: Tensor) -> Tensor:
    """The image where its rows lie one after the other, else a copy."""
    h, w = image.shape[2:]
    return image if h <= 1 or image.stride(2) == w * image.stride(3) else layout.laid_out(image, True)


BACKENDS: dict[str, backends.Backend] = {
    "triton": backends.Backend(backends.triton_why_not, {"pool": _triton_pool, "gradient": _triton_gradient}),
    "reference": backends.Backend(
        backends.reference_why_not, {"pool": _reference_pool, "gradient": _reference_gradient}
    ),
}


# --- The operators ---------------------------------------------------------------------------------------


def _pool(y: Tensor, scale: Tensor, shift: Tensor, x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    wide = accumulate_dtype(x.dtype)
    small = (t.to(wide).contiguous() for t in (scale, shift))
    made: tuple[Tensor, Tensor] = choose.select("batch_norm_pool", BACKENDS, backend, y, x).functions["pool"](
        y, *small, x
    )
    return made


def _backward_op(
    grad: Tensor, means: Tensor, y: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    run = choose.select("batch_norm_pool_backward", BACKENDS, backend, y).functions["gradient"]
    out = torch.empty_like(y)
    small = means, y, mean.contiguous(), invstd.contiguous(), *batch_norm.contiguous(weight)
    each, gradients = run(grad.contiguous(), *small, out)
    return each, out, gradients


def _pool_fake(y: Tensor, scale: Tensor, shift: Tensor, x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    n, c = x.shape[:2]
    return x.new_empty((n, c, 1, 1)), x.new_empty((n, c), dtype=accumulate_dtype(x.dtype))


def _backward_fake(
    grad: Tensor, means: Tensor, y: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return grad.new_empty(grad.shape), torch.empty_like(y), batch_norm.empty_gradients(y, weight)


for _name, _implementation, _fake in (
    ("batch_norm_pool", _pool, _pool_fake),
    ("batch_norm_pool_backward", _backward_op, _backward_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"wavemix_kernels::{_name}", _fake, lib=_library)


def forward(y: Tensor, of: batch_norm.Affine, x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Averages over each image, without gradient: of ``y * scale + shift + x``, (N, C, 1, 1) of x's dtype, rounded
    once; and of y, (N, C) in fp32 (fp64 for fp64).

    Args:
        y, x: (N, C, H, W) of one dtype.
        of: (C) each.
    """
    out, means = torch.ops.wavemix_kernels.batch_norm_pool(y, *of, x, backend)
    return out, means


def backward(
    grad: Tensor, means: Tensor, y: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients from that of :func:`forward`'s first result: of x, (N, C, H, W), one value an image and channel, with
    strides of 0; of y, by the batch's own statistics; of BatchNorm's weight and bias, in the weight's dtype.

    Args:
        grad: (N, C, 1, 1).
        means: :func:`forward`'s second result.
        mean, invstd: (C), the batch's, fp32 (fp64 for fp64); weight: (C) or None.
    """
    each, dy, of_parameters = torch.ops.wavemix_kernels.batch_norm_pool_backward(
        grad, means, y, mean, invstd, weight, backend
    )
    return each.expand(y.shape), dy, *of_parameters.unbind(0)


def self_test(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Averages and all gradients of images in both orders: (error, bound)."""
    p, results = selftest.pattern, []
    tensors = p(3, 8, 7, 5) + 2, p(3, 8, 7, 5, phase=1), p(3, 8, 1, 1, phase=2), p(8), p(8, phase=1)
    for name, wide, where in ((backend, dtype, device), ("reference", torch.float64, torch.device("cpu"))):
        y, x, grad, weight, bias = (t.to(dtype).to(where, wide) for t in tensors)
        y = y.contiguous(memory_format=torch.channels_last)
        var, mean = torch.var_mean(y.to(accumulate_dtype(y.dtype)), (0, 2, 3), correction=0)
        of = batch_norm.from_moments(mean, var, weight, bias, 1e-5)
        out, means = forward(y, batch_norm.Affine(of.scale, of.shift), x, name)
        results.append([out, means, *backward(grad, means, y, of.mean, of.invstd, weight, name)])
    return selftest.largest_error(*results), selftest.rounding_bound(3 * 7 * 5, dtype)
