"""FusedExpansion: the head of the models that give images, its transposed convolutions on the fused operator."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavemix_kernels import backends, fx, log
from wavemix_kernels.nn.parts import kept, untouched, why_not_plain
from wavemix_kernels.nn.wavemix.reference import Expansion
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common.dtypes import accumulate_dtype, without_autocast
from wavemix_kernels.ops.deconv import op as deconv


class FusedDeconvs(nn.Sequential):
    """An nn.Sequential whose transposed convolutions run on :func:`wavemix_kernels.ops.deconv.op.deconv`.

    A convolution of other sizes, or with hooks or parametrizations, runs as the module it is. Not differentiable twice,
    except on backend ``"reference"``.
    """

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return fx.call_module(self, x, super().forward)
        return self._through(list(self), x)

    def _through(self, layers: list[nn.Module], x: Tensor) -> Tensor:
        standard = backends.requested() == "reference"
        for i, layer in enumerate(layers):
            # Other layers are the library's in any case.
            other = not isinstance(layer, nn.ConvTranspose2d)
            if standard or other or log.fallback(self, why_not_deconv(str(i), layer)):
                x = layer(x)
            else:
                up = cast(nn.ConvTranspose2d, layer)
                x = deconv.deconv(x, up.weight, up.bias)
        return x


class FusedExpansion(FusedDeconvs, Expansion):
    """An Expansion whose transposed convolutions are fused (:class:`FusedDeconvs`).

    Arguments, parameters and results are :class:`wavemix_kernels.reference.Expansion`'s. On a CPU the last 1x1
    convolution goes into the transposed one before it at each call, where that is less arithmetic: the image between
    them, a head's largest, is neither made nor kept. Its weights are folded in fp32 for the half types.
    """

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy) or backends.requested() == "reference" or not self._folds(x.device.type):
            return super().forward(x)
        *before, up, last = cast(list[Any], list(self))
        x = self._through(before, x)
        with without_autocast(x):
            weight, bias = _folded(up.weight, up.bias, last.weight, last.bias, accumulate_dtype(up.weight.dtype))
        return deconv.deconv(x, weight, bias)

    def _folds(self, device: str) -> bool:
        up, last = (cast(Any, layer) for layer in list(self)[-2:])
        if not is_pointwise(last) or why_not_deconv("", up) is not None:
            return False
        return choose.head_at_each_call(device, up.in_channels, last.in_channels, last.out_channels) == "folded"

    def fuse_for_inference(self) -> nn.Module:
        """The head for inference: the 1x1 convolution folded into the transposed one before it, where that is less
        arithmetic; the head itself where its layers are not those it was made of."""
        *convolutions, last = self
        reasons = (why_not_deconv(str(i), layer) for i, layer in enumerate(convolutions))
        plain = untouched(self) and is_pointwise(last) and len(convolutions) > 0 and not any(reasons)
        return InferenceExpansion(self) if plain else self


class InferenceExpansion(nn.Module):
    """The result of :meth:`FusedExpansion.fuse_for_inference`: the same map up to rounding; its tensors are buffers.

    A 1x1 convolution behind a transposed one is linear too, and local, so it goes into the weights, borders included
    (measured: docs/develop/tuning.md, heads).
    """

    def __init__(self, source: FusedExpansion) -> None:
        super().__init__()
        layers: list[Any] = list(source)
        *convolutions, last = layers
        self.layers = len(layers)
        tensors = [(layer.weight, layer.bias) for layer in convolutions]
        if choose.head(convolutions[-1].in_channels, last.in_channels, last.out_channels) == "folded":
            with torch.no_grad():
                tensors[-1] = _folded(*tensors[-1], last.weight, last.bias, torch.float64)
        else:
            tensors.append((last.weight, last.bias))
        self.count = len(tensors)
        for i, (weight, bias) in enumerate(tensors):
            for name, tensor in (("weight", weight), ("bias", bias)):
                self.register_buffer(f"{name}_{i}", None if tensor is None else kept(tensor))
        self.train(False)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return fx.call_module(self, x)
        for i in range(self.count):
            weight, bias = getattr(self, f"weight_{i}"), getattr(self, f"bias_{i}")
            x = F.conv2d(x, weight, bias) if weight.shape[2] == 1 else deconv.deconv(x, weight, bias)
        return x

    def extra_repr(self) -> str:
        return f"{self.count} of the original {self.layers} layers"


def _folded(
    weight: Tensor, bias: Tensor | None, last: Tensor, last_bias: Tensor | None, wide: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """A transposed convolution's (F, M, 4, 4) and (M) with a 1x1 convolution's (O, M, 1, 1) and (O) behind it, by
    arithmetic in ``wide``."""
    matrix = last.flatten(1).to(wide)
    folded = torch.einsum("fmhw,om->fohw", weight.to(wide), matrix)
    wide_bias = None if last_bias is None else last_bias.to(wide)
    if bias is not None:
        passed = matrix @ bias.to(wide)
        wide_bias = passed if wide_bias is None else wide_bias + passed
    return folded.to(weight.dtype), None if wide_bias is None else wide_bias.to(weight.dtype)


def is_pointwise(layer: nn.Module) -> bool:
    """Whether it is a 1x1 convolution of every pixel, and nobody listens to it."""
    if type(layer) is not nn.Conv2d or not untouched(layer):
        return False
    shape = layer.kernel_size, layer.stride, layer.padding, layer.groups
    return shape == ((1, 1), (1, 1), (0, 0), 1)


def why_not_deconv(name: str, layer: nn.Module) -> str | None:
    """Why the operator cannot stand for the layer, or None."""
    if (reason := why_not_plain(name, layer, nn.ConvTranspose2d)) is not None:
        return reason
    up = cast(nn.ConvTranspose2d, layer)
    shape = up.kernel_size, up.stride, up.padding, up.output_padding, up.dilation, up.groups
    if shape == ((deconv.TAPS,) * 2, (deconv.STRIDE,) * 2, (deconv.PADDING,) * 2, (0, 0), (1, 1), 1):
        return None
    return f"{name} is {up}, expected 4x4 taps, stride 2 and padding 1"
