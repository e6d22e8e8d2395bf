"""The weights of several convolutions as those of one, for each part of an image; and their gradients, by hand for a
GPU's plans."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels.ops.common import layout
from wavemix_kernels.ops.stem.geometry import Convolution, Geometry, Part


def _compose(outer: Tensor, inner: Tensor, stride: int) -> Tensor:
    """Weights (O, M, k, k) over what (M, C, q, q) makes, as weights over its input: (O, C, side, side)."""
    if outer.device.type == "cpu":
        return F.conv_transpose2d(outer, inner, stride=stride)
    # A GPU's library might do that in TF32.
    o, _, k, _ = outer.shape
    q = inner.shape[-1]
    return F.fold(_products(outer, inner).view(o, k * k, -1).transpose(1, 2), (k - 1) * stride + q, q, stride=stride)


def _compose_backward(grad: Tensor, outer: Tensor, inner: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    return _products_backward(F.unfold(grad, inner.shape[-1], stride=stride).transpose(1, 2), outer, inner)


def _products(outer: Tensor, inner: Tensor) -> Tensor:
    """(O * k * k, C * q * q)"""
    return outer.permute(0, 2, 3, 1).reshape(-1, outer.shape[1]) @ inner.flatten(1)


def _products_backward(grad: Tensor, outer: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    o, m, k, _ = outer.shape
    grad = grad.reshape(o * k * k, -1)
    of_outer = (grad @ inner.flatten(1).t()).view(o, k, k, m).permute(0, 3, 1, 2)
    of_inner = outer.permute(0, 2, 3, 1).reshape(-1, m).t() @ grad
    return of_outer, of_inner.view(inner.shape)


def _outer(convolutions: Sequence[Convolution], wide: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """All but the first convolution as one weight, and the weights that it is made of."""
    weights = [one.weight.to(wide) for one in convolutions[1:]]
    return weights[0] if len(weights) == 1 else _compose(weights[1], weights[0], convolutions[1].stride), weights


def taps_of(convolutions: Sequence[Convolution], wide: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """What each tap of the outer weights gives: (O, k, k, C * q * q + 1), a product for each of the inner one's taps
    and one for its bias; and the bias (O) behind."""
    outer, weights = _outer(convolutions, wide)
    inner = _with_bias(convolutions[0], wide)
    o, _, k, _ = outer.shape
    bias = convolutions[1].bias
    if len(convolutions) == 3:
        through = None if bias is None else weights[1].sum((2, 3)) @ bias.to(wide)
        last = convolutions[2].bias
        bias = through if last is None else last.to(wide) if through is None else through + last
    return _products(outer, inner).view(o, k, k, -1), bias


def _with_bias(one: Convolution, wide: torch.dtype) -> Tensor:
    """(O, C * q * q + 1)"""
    weight = one.weight.flatten(1)
    column = weight.new_zeros((len(weight), 1)) if one.bias is None else one.bias[:, None].to(weight.dtype)
    return torch.cat((weight, column), 1).to(wide)


def of_parts(
    taps: Tensor, bias: Tensor | None, way: Geometry, rows: Sequence[Part], columns: Sequence[Part]
) -> tuple[Tensor, Tensor]:
    """Each part's weights (P, O, C, window, window) and biases (P, O): folded without the taps outside."""
    o = taps.shape[0]
    each = (taps * _inside(taps, way.k, rows, columns)).flatten(0, 1)
    each, of_bias = each.split((each.shape[-1] - 1, 1), -1)
    biases = of_bias.sum((2, 3, 4))
    channels, q = way.inner.weight.shape[1], way.inner.weight.shape[-1]
    products = each.flatten(0, 1).flatten(1, 2).transpose(1, 2)
    weights = F.fold(products, way.window, q, stride=way.inner.stride)
    return weights.view(-1, o, channels, way.window, way.window), biases if bias is None else biases + bias


def of_parts_backward(
    of_weights: Tensor, of_biases: Tensor, way: Geometry, rows: Sequence[Part], columns: Sequence[Part]
) -> Tensor:
    """The gradient of the taps."""
    o, q = of_weights.shape[1], way.inner.weight.shape[-1]
    products = F.unfold(of_weights.flatten(0, 1), q, stride=way.inner.stride).transpose(1, 2)
    each = products.new_empty((len(rows), len(columns), o, way.k, way.k, products.shape[-1] + 1))
    each[..., :-1] = products.view((*each.shape[:-1], -1))
    each[..., -1] = of_biases.view((*each.shape[:3], 1, 1))
    return (each * _inside(each, way.k, rows, columns)).sum((0, 1))


def _inside(like: Tensor, k: int, rows: Sequence[Part], columns: Sequence[Part]) -> Tensor:
    """(rows, columns, 1, k, k, 1): 1 for each tap that a part has inside, else 0. Made where it is used: a copy from a
    CPU would wait for the GPU."""
    made = like.new_ones((len(rows), len(columns), 1, k, k, 1))
    for axis, parts in enumerate((rows, columns)):
        for i, (_, _, a, b) in enumerate(parts):
            for start, end in ((0, a), (b, k)):
                if start < end:
                    made.select(axis, i).narrow(axis + 2, start, end - start).zero_()
    return made


def taps_backward(
    d_taps: Tensor, d_bias: Tensor, convolutions: Sequence[Convolution], wide: torch.dtype
) -> list[Tensor | None]:
    """The gradients of each convolution's weight and bias, from those of what :func:`taps_of` gives."""
    outer, weights = _outer(convolutions, wide)
    first = convolutions[0]
    d_outer, d_inner = _products_backward(d_taps, outer, _with_bias(first, wide))
    made: list[Tensor | None] = [d_inner[:, :-1].reshape(first.weight.shape), d_inner[:, -1]]
    if len(convolutions) == 2:
        made += [d_outer, d_bias]
    else:
        d_last, d_second = _compose_backward(d_outer, weights[1], weights[0], convolutions[1].stride)
        if (bias := convolutions[1].bias) is not None:
            d_last = d_last + (d_bias[:, None] * bias.to(wide))[..., None, None]
        made += [d_second, d_bias @ weights[1].sum((2, 3)), d_last, d_bias]
    parameters = [t for one in convolutions for t in (one.weight, one.bias)]
    pairs = zip(made, parameters, strict=True)
    return [None if t is None or g is None else _as_parameter(g, t) for g, t in pairs]


def _as_parameter(grad: Tensor, parameter: Tensor) -> Tensor:
    """In its dtype and memory order."""
    made = grad.to(parameter.dtype)
    return layout.ordered_as(made, parameter) if parameter.dim() == 4 else made
