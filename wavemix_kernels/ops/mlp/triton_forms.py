"""Both directions of a pointwise MLP in one of the forms of :func:`wavemix_kernels.ops.choose.pointwise_mlp`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wavemix_kernels.ops import choose, tuned
from wavemix_kernels.ops.common import chips
from wavemix_kernels.ops.common.triton_sums import finish
from wavemix_kernels.ops.mlp import triton_backward, triton_hidden, triton_narrow, triton_normed, triton_products
from wavemix_kernels.ops.mlp.tiles import runs_together
from wavemix_kernels.ops.mlp.triton import Mlp, forward_launch


class Results(NamedTuple):
    """Where gradients are written: matrices of pixels, weights and biases in the dtype of the inputs. `output`: where
    the output is made again, or None."""

    x: Tensor
    second: Tensor | None
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    output: Tensor | None


def _form(mlp: Mlp, backward: bool) -> str:
    """The default or, where tiles allow for it, what was measured to be faster: the library's part larger by one."""
    little = chips.little_shared(mlp.x.device)
    default = choose.pointwise_mlp(mlp.x.dtype, mlp.w1.shape[1], mlp.w2.shape[0], backward, little)
    if default == "products" or mlp.x.dtype == torch.float32:
        return default
    other = "kept" if backward and default == "fused" else "products"
    return tuned.either("pointwise_mlp form", default, other, mlp.x, mlp.w1, extra=(int(backward),))


def forward(out: Tensor, mlp: Mlp) -> None:
    """Writes conv1x1(Dropout(GELU(conv1x1([x | second * scale + shift])))) into `out` (pixels, O)."""
    if _form(mlp, False) == "products":
        triton_products.forward(out, mlp)
    else:
        forward_launch(out, mlp).run(out)


def backward(into: Results, grad: Tensor, mlp: Mlp) -> None:
    """Writes all gradients, given that of the output (pixels, O), and where wanted the output."""
    form = _form(mlp, True)
    sums: list[tuple[Tensor | None, Tensor]] = []
    if form == "fused" and runs_together(mlp.x.dtype.itemsize, **mlp.sizes):
        made = triton_narrow.backward(into.x, into.output, grad, mlp)
        sums = list(zip((into.w1, into.b1, into.w2, into.b2), made, strict=True))
    elif form == "fused":
        of_b2 = triton_backward.backward_x(into.x, into.second, grad, mlp)
        weights = triton_backward.backward_weight(grad, mlp)
        sums = [(into.w1, weights.w1), (into.b1, weights.b1), (into.w2, weights.w2), (into.b2, of_b2)]
        if into.output is not None:
            forward(into.output, mlp)
    else:
        if form == "kept":
            layer = triton_hidden.make(grad, mlp)
            hidden, hidden_grad, inputs = layer.hidden, layer.grad, [layer.joined]
            sums = [(into.b1, layer.b1), (into.b2, layer.b2)]
        else:
            second = triton_products.joined(mlp)
            inputs = [mlp.x] if second is None else [mlp.x, second]
            hidden = triton_products.before_activation(mlp, second)
            hidden_grad = torch.mm(grad, mlp.w2)
            launch, partial_b1 = triton_products.between_launch(hidden, hidden_grad, mlp)
            launch.run(grad)
            sums = [(into.b1, partial_b1)]
            if into.b2 is not None:
                into.b2.copy_(grad.sum(0, dtype=torch.float32))
        triton_products.backward_x(into.x, into.second, hidden_grad, mlp)
        triton_products.backward_weight(into.w1, into.w2, grad, hidden, hidden_grad, inputs)
        if into.output is not None:
            triton_products.after_activation(into.output, hidden, mlp)
    finish(*((out, partial) for out, partial in sums if out is not None))


def keeps(mlp: Mlp) -> bool:
    """Whether backward's form is the one that keeps the hidden layer and its gradient."""
    return _form(mlp, True) == "kept"


def normed_backward(into: Results, grad: Tensor, mlp: Mlp, norm: triton_normed.Norm) -> tuple[Tensor, ...]:
    """:func:`backward` where :func:`keeps` and there is a first bias, through the BatchNorm that is the second input's
    affine map: a, b and d of the line that makes the gradient of what it took from that of what it gave, and the
    gradients of its weight and bias, (2, B). The gradients of x and of what it gave lie side by side in ``into.x``."""
    layer = triton_hidden.make(grad, mlp, norm)
    triton_products.backward_x(into.x, None, layer.grad, mlp)
    triton_products.backward_weight(into.w1, into.w2, grad, layer.hidden, layer.grad, [layer.joined])
    assert into.b1 is not None
    total = layer.b1.new_empty(into.b1.shape)
    finish((total, layer.b1), *([] if into.b2 is None else [(into.b2, layer.b2)]))
    return triton_normed.line(into.w1, into.b1, total, mlp, norm)
