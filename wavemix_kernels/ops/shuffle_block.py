"""``shuffle_block``: WaveMix V3's block as one differentiable function.

On x (N, C, H, W): reduction and Haar, conv1x1 (C -> 4C), GELU, Dropout, PixelShuffle, conv3x3, BatchNorm. Kept for
backward are x, the convolution's output and dropout's mask; the hidden layer, an eighth of the arithmetic, is made
again. The convolutions are the library's, the rest of the memory traffic is this package's: the reduction writes the
bands in the block's order, the residual is added in the pass that normalises.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import convolutions, flops, layout
from wavemix_kernels.ops.common.autograd import again
from wavemix_kernels.ops.common.once import once_differentiable
from wavemix_kernels.ops.deconv import upsample
from wavemix_kernels.ops.norm import batch_norm
from wavemix_kernels.ops.reduce_haar import op as reduce_haar

KIND = "pixelshuffle"


class Parameters(NamedTuple):
    """Convolutions' weights as the modules have them; ``mean`` and ``invstd`` None: the batch's own statistics."""

    weight: Tensor  # of the reduction
    bias: Tensor | None
    w1: Tensor
    b1: Tensor | None
    up_weight: Tensor
    up_bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    mean: Tensor | None
    invstd: Tensor | None


class _Options(NamedTuple):
    dropout: float
    eps: float
    residual: bool
    backend: str


def shuffle_block(
    x: Tensor, parameters: Parameters, *, dropout: float, eps: float, residual: bool, backend: str
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The block of checked arguments: output, in x's memory format, and (mean, biased variance) of the batch.

    Args:
        x: (N, C, H, W), H and W even, in the weights' dtype.
        parameters: see :class:`Parameters`.
        dropout: probability of dropping a hidden activation; 0 for inference.
        eps: BatchNorm's.
        residual: add x to the output.
        backend: of the operators.
    """
    out, mean, var = _ShuffleBlock.apply(_Options(dropout, eps, residual, backend), x, *parameters)
    return out, (mean, var)


def hidden(z: Tensor, w1: Tensor, b1: Tensor | None) -> tuple[Tensor, Tensor]:
    """(N, C, h, w) -> the hidden layer (N, 4C, h, w) before GELU and behind it."""
    before = convolutions.conv2d(z, w1, b1)
    return before, F.gelu(before)


def _dropped(value: Tensor, drop: Tensor | None, dropout: float) -> Tensor:
    """In place: a product with a mask of truth values would copy it to the values' dtype first."""
    # All are dropped at 1, where the scale would be infinite.
    return value if drop is None else value.masked_fill_(drop, 0).mul_(1 / (1 - dropout) if dropout < 1 else 0.0)


class _ShuffleBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: _Options, x: Tensor, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
        if not torch.compiler.is_compiling():  # which does not know it
            ctx.set_materialize_grads(False)  # of statistics
        dropout, eps, residual, backend = options
        p = Parameters(*flat)
        norms = choose.for_part(backend, batch_norm.BACKENDS)
        (z,) = reduce_haar.fused(x, p.weight, p.bias, 1, True, choose.for_part(backend, reduce_haar.BACKENDS))
        g = hidden(z, p.w1, p.b1)[1]
        drop = torch.empty_like(g, dtype=torch.bool).bernoulli_(dropout) if dropout > 0 else None
        y = upsample.forward(KIND, _dropped(g, drop, dropout), p.up_weight, p.up_bias, backend)
        del z, g
        if p.mean is not None and p.invstd is not None:
            affine = batch_norm.affine(p.mean, p.invstd, p.bn_weight, p.bn_bias)
            of = batch_norm.Statistics(p.mean, p.mean, p.invstd, *affine)
        else:
            of = batch_norm.stats(y, p.bn_weight, p.bn_bias, eps, norms)
        out = torch.ops.wavemix_kernels.batch_norm_apply(
            y, of.scale, of.shift, x if residual else None, layout.is_channels_last(x), norms
        )
        ctx.options = options
        ctx.save_for_backward(x, *flat, drop, y, of.mean, of.invstd, of.scale)
        # Given statistics belong to the caller.
        batch = [t if p.mean is None else t.detach().clone() for t in (of.mean, of.var)]
        ctx.mark_non_differentiable(*batch)
        return out, batch[0], batch[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        return None, *_backward(ctx.options, grad, *ctx.saved_tensors)


def _backward(options: _Options, grad: Tensor, x: Tensor, *saved: Any) -> list[Tensor | None]:
    """Gradients of x and the parameters."""
    dropout, _, residual, backend = options
    p, (drop, y, mean, invstd, scale) = Parameters(*saved[:-5]), saved[-5:]
    batch_stats, reduce = p.mean is None, choose.for_part(backend, reduce_haar.BACKENDS)
    before = flops.counted()
    (z,) = reduce_haar.fused(again(x), p.weight, p.bias, 1, True, reduce)
    a, g = hidden(z, p.w1, p.b1)
    flops.forget_since(before)
    dy, dbn_weight, dbn_bias = batch_norm.backward(
        grad, y, mean, invstd, p.bn_weight, batch_stats, True, choose.for_part(backend, batch_norm.BACKENDS)
    )
    shuffled = F.pixel_shuffle(_dropped(g, drop, dropout), 2)
    del g
    # One call for both gradients: the library's way to that of the image alone, a transposed convolution, is slower.
    du, dup, _ = convolutions.backward(dy, shuffled, p.up_weight, [True, True, False], padding=1)
    del dy, shuffled
    dg = _dropped(F.pixel_unshuffle(du, 2).view(a.shape), drop, dropout)  # whose shape PyTorch gets wrong if empty
    del du
    da = torch.ops.aten.gelu_backward(dg, a)
    del dg, a
    dz, dw1, db1 = convolutions.backward(da, z, p.w1, [True, True, p.b1 is not None])
    dx, dw, db = reduce_haar.backward([dz], x, p.weight, p.bias is not None, grad if residual else None, reduce)
    dup_bias = None
    if p.up_bias is not None:  # a batch's mean takes the bias before it away
        passed = torch.zeros_like(p.up_bias) if batch_stats else dbn_bias * scale
        dup_bias = passed.to(p.up_bias.dtype)
    return [
        dx, layout.like_weight(dw, p.weight), db, layout.like_weight(dw1, p.w1), db1, dup, dup_bias,
        None if p.bn_weight is None else dbn_weight,
        None if p.bn_bias is None else dbn_bias.to(p.bn_bias.dtype),
        None, None,
    ]  # fmt: skip
