"""``channel_mlp``: Wave-MLP's channel MLP (1x1 convolution, GELU, 1x1 convolution) that keeps its input alone, and the
residual branch around it.

The MLP is :mod:`wavemix_kernels.ops.mlp.op` without its second input and dropout, or the library's products
(:func:`wavemix_kernels.ops.choose.channel_mlp`).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels import _native, backends
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import layout, plan, products, selftest
from wavemix_kernels.ops.common.autograd import again, differentiable
from wavemix_kernels.ops.common.dtypes import cast_given, without_autocast
from wavemix_kernels.ops.common.library import Library
from wavemix_kernels.ops.common.once import once_differentiable
from wavemix_kernels.ops.mlp import op as pointwise_mlp
from wavemix_kernels.ops.norm import pre_norm

_library = Library()
_library.define("channel_mlp(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str backend) -> Tensor")
_library.define(
    "channel_mlp_backward(Tensor grad, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str backend) -> Tensor[]"
)


class Weights(NamedTuple):
    """(K, C, 1, 1), (K), (O, K, 1, 1), (O); biases may be None."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None


# --- Backends --------------------------------------------------------------------------------------------


def _products_forward(x: Tensor, w: Weights) -> Tensor:
    hidden = torch.ops.aten.gelu_(products.project(x, w.w1, w.b1))
    return products.project(hidden, w.w2, w.b2)


def _products_backward(grad: Tensor, x: Tensor, w: Weights) -> list[Tensor | None]:
    hidden = products.project(x, w.w1, w.b1)
    d_hidden = products.backward_x(grad, hidden, w.w2)
    # In place, one after the other: fresh memory costs a CPU more than the arithmetic.
    torch.ops.aten.gelu_backward.grad_input(d_hidden, hidden, grad_input=d_hidden)
    torch.ops.aten.gelu_(hidden)
    return [
        products.backward_x(d_hidden, x, w.w1),
        products.backward_weight(d_hidden, x, w.w1),
        None if w.b1 is None else products.backward_bias(d_hidden),
        products.backward_weight(grad, hidden, w.w2),
        None if w.b2 is None else products.backward_bias(grad),
    ]


def _pointwise_arguments(x: Tensor, w: Weights) -> tuple[Any, ...]:
    return x, None, None, None, w.w1.flatten(1), w.b1, w.w2.flatten(1), w.b2, 0.0, None


def _pointwise_forward(name: str, x: Tensor, w: Weights) -> Tensor:
    return pointwise_mlp.BACKENDS[name].functions["forward"](*_pointwise_arguments(x, w))


def _pointwise_backward(name: str, grad: Tensor, x: Tensor, w: Weights) -> list[Tensor | None]:
    out = pointwise_mlp.BACKENDS[name].functions["backward"](grad, *_pointwise_arguments(x, w), False)
    return [out.x, out.w1[:, :, None, None], out.b1, out.w2[:, :, None, None], out.b2]


def _multiplies_bfloat16() -> bool:
    probe: Any = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return probe is not None and probe()


_BFLOAT16_PRODUCTS = _multiplies_bfloat16()


def _order(x: Tensor, w1: Tensor, forward: bool) -> choose.Order:
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    units = forward and _native.by_matrix_units(x.dtype)
    return choose.channel_mlp(x.device.type, x.dtype, pixels, w1.shape[0], _BFLOAT16_PRODUCTS, units)


BACKENDS: dict[str, backends.Backend] = {
    **{
        name: backends.Backend(
            pointwise_mlp.BACKENDS[name].why_not,
            {
                "forward": functools.partial(_pointwise_forward, name),
                "backward": functools.partial(_pointwise_backward, name),
            },
        )
        for name in ("triton", "cpu")
    },
    "reference": backends.Backend(
        backends.reference_why_not, {"forward": _products_forward, "backward": _products_backward}
    ),
}


# --- The operators ---------------------------------------------------------------------------------------


def _forward(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, backend: str) -> Tensor:
    chosen = choose.select("channel_mlp", BACKENDS, backend, x, w1, order=_order(x, w1, True))
    out = chosen.functions["forward"](x, Weights(w1, b1, w2, b2))
    return out if layout.is_channels_last(out) else layout.laid_out(out, True)


def _backward_op(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, backend: str
) -> list[Tensor]:
    chosen = choose.select("channel_mlp_backward", BACKENDS, backend, grad, w1, x, order=_order(x, w1, False))
    out = chosen.functions["backward"](grad, x, Weights(w1, b1, w2, b2))
    d_x, *d_weights = out
    d_x = d_x if layout.is_channels_last(d_x) else layout.laid_out(d_x, True)
    return [d_x, *(grad.new_empty(0) if t is None else t.contiguous() for t in d_weights)]


def _backward_fake(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, backend: str
) -> list[Tensor]:
    d_x = layout.empty(x, x.shape, True)
    return [d_x, *(grad.new_empty(0) if t is None else t.new_empty(t.shape) for t in (w1, b1, w2, b2))]


_library.impl("channel_mlp", _forward, "CompositeExplicitAutograd")
_library.impl("channel_mlp_backward", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake(
    "wavemix_kernels::channel_mlp",
    lambda x, w1, b1, w2, b2, backend: layout.empty(x, [x.shape[0], w2.shape[0], *x.shape[2:]], True),
    lib=_library,
)
torch.library.register_fake("wavemix_kernels::channel_mlp_backward", _backward_fake, lib=_library)


def backward(grad: Tensor, x: Tensor, weights: Weights, backend: str) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of x and of the weights."""
    d_x, *d_weights = torch.ops.wavemix_kernels.channel_mlp_backward(grad, x, *weights, backend)
    return d_x, [None if t is None else layout.like_weight(d, t) for t, d in zip(weights, d_weights, strict=True)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *weights = ctx.saved_tensors
    d_x, d_weights = backward(grad, x, Weights(*weights), ctx.backend)
    return d_x, *d_weights, None


def _standard(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, backend: str) -> Tensor:
    return F.conv2d(F.gelu(F.conv2d(x, w1, b1)), w2, b2)


#: (x, w1, b1, w2, b2, backend) -> (N, O, H, W), channels_last, with its gradient. Tensors are of one dtype.
fused = differentiable(_library, "channel_mlp", _setup, _backward, standard=_standard, once=True)


# --- The residual branch ---------------------------------------------------------------------------------


@plan.words
class Options(NamedTuple):
    """``dtypes``: of the arithmetic between norm and sum, and of the weights, where these are converted."""

    kind: pre_norm.Kind
    backend: str
    dtypes: tuple[torch.dtype, torch.dtype] | None


@plan.function
class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Options, x: Tensor, path: Tensor | None, *flat: Tensor | None) -> tuple[Tensor, ...]:
        kind, backend, dtypes = options
        norm, weights = _parameters(flat)
        if dtypes is not None:
            weights = Weights(*cast_given(weights, dtypes[0]))
        stats = pre_norm.statistics(x, norm, kind, backend)
        image = pre_norm.normalise(x, norm, kind, stats, backend, weights.w1.dtype)
        out = torch.ops.wavemix_kernels.channel_mlp(image, *weights, choose.for_part(backend, BACKENDS))
        del image
        ctx.options = options
        if not torch.compiler.is_compiling():  # which does not know it
            ctx.set_materialize_grads(False)  # of statistics
        ctx.save_for_backward(x, path, *norm, *weights, *stats)
        ctx.mark_non_differentiable(stats.mean, stats.var)
        return pre_norm.join(x, out, path, backend), stats.mean, stats.var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        kind, backend, dtypes = ctx.options
        x, path, *rest = ctx.saved_tensors
        flat, stats = rest[:-3], pre_norm.Statistics(*rest[-3:])
        norm, weights = _parameters(flat)
        image = pre_norm.normalise(again(x), norm, kind, stats, backend, weights.w1.dtype)
        of_branch = pre_norm.join_backward(grad, path, image, backend)
        d_image, d_weights = backward(of_branch, image, weights, choose.for_part(backend, BACKENDS))
        del image, of_branch
        dx, *d_norm = pre_norm.backward(d_image, x, grad, norm, kind, stats, backend)
        d_weights = d_weights if dtypes is None else cast_given(d_weights, dtypes[1])
        return None, dx, None, *d_norm, None, None, *d_weights


def _parameters(flat: Any) -> tuple[pre_norm.Norm, Weights]:
    count = len(pre_norm.Norm._fields)
    return pre_norm.Norm(*flat[:count]), Weights(*flat[count:])


def branch(
    x: Tensor, norm: pre_norm.Norm, kind: pre_norm.Kind, weights: Weights, path: Tensor | None, backend: str,
    dtypes: tuple[torch.dtype, torch.dtype] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``x + path MLP(norm(x))`` of checked arguments, which keeps x alone for its backward pass.

    Args:
        x: (N, C, H, W); the output takes its dtype and memory format.
        norm, kind: see :mod:`wavemix_kernels.ops.norm.pre_norm`.
        weights: see :class:`Weights`.
        dtypes: see :class:`Options`; None: everything is in the weights'.
        path: (N, 1, 1, 1), what stochastic depth multiplies each sample's branch with, or None.
        backend: for the ops that have it.

    Returns:
        The output, and the norm's mean and biased variance, meaningless where it is frozen.
    """
    # Everything is in the dtype it is to be in.
    with without_autocast(x):
        return _Branch.apply(Options(kind, backend, dtypes), x, path, *norm, *weights)


def self_test(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Few pixels and many, with all gradients: (error, bound)."""
    p, errors = selftest.pattern, []
    for width in (2, 9):
        tensors = [p(3, 8, 2, width), p(24, 8, 1, 1), p(24), p(8, 24, 1, 1), p(8)]
        errors.append(
            selftest.against_reference(
                lambda x, *w: [fused(x.contiguous(memory_format=torch.channels_last), *w, backend)],
                lambda x, *w: [F.conv2d(F.gelu(F.conv2d(x, *w[:2])), *w[2:])],
                tensors,
                device,
                dtype,
            )
        )
    return selftest.largest(*errors), selftest.rounding_bound(3 * 2 * 9 + 24, dtype)
