"""The inference form of a Waveblock: BatchNorms folded into the weights before them, dropout and bookkeeping gone."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from wavemix_kernels import backends, checks, fx, log
from wavemix_kernels.nn.parts import affine_of, kept, why_not_plain
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import layout
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.common.transforms import standard_wanted
from wavemix_kernels.ops.deconv import op as deconv
from wavemix_kernels.ops.deconv import upsample
from wavemix_kernels.ops.mlp import op as pointwise_mlp
from wavemix_kernels.ops.mlp import reference as mlp_reference
from wavemix_kernels.ops.norm import batch_norm
from wavemix_kernels.ops.reduce_haar import op as reduce_haar
from wavemix_kernels.ops.reduce_haar import reference as reduce_haar_reference


class InferenceWaveblock(nn.Module):
    """The result of :meth:`wavemix_kernels.FusedWaveblock.fuse_for_inference`: (N, C, H, W) -> the same shape.

    Its tensors are buffers: they move and convert with the module, and no optimizer sees them. On backend
    ``"reference"`` it consists of standard operators only, for ``torch.export`` and ONNX.

    Args:
        block: a FusedWaveblock; it is read, not changed.

    Raises:
        ValueError: a part of the block has hooks, parametrizations or a class of its own, or a BatchNorm has no running
            statistics.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        source: Any = block
        self.level: int = source.level
        self.final_dim: int = source.final_dim
        self.upsample: str = source.upsample
        self._buffer("weight", source.reduction.weight)
        self._buffer("bias", source.reduction.bias)
        for level in range(1, self.level + 1):
            part = getattr(block, source._feedforward_name(level))
            for name, tensor in _folded(part, self.upsample, source._feedforward_name(level)).items():
                self._buffer(f"{name}_{level}", tensor)
        self.train(False)

    def _buffer(self, name: str, tensor: Tensor | None) -> None:
        self.register_buffer(name, None if tensor is None else kept(tensor))

    def why_not_joined(self) -> str | None:
        """See :meth:`wavemix_kernels.FusedWaveblock.why_not_joined`."""
        return standard_wanted() or why_not_plain("it", self)

    def forward(self, x: Tensor, residual: bool = False) -> Tensor:
        """The block's output, with ``residual`` plus x."""
        if isinstance(x, fx.Proxy):
            return fx.call_module(self, x, residual=residual)
        checks.check_tensor("x", x, 4, f"(N, {self.final_dim}, H, W)")
        if x.shape[1] != self.final_dim:
            raise ValueError(f"x: expected {self.final_dim} channels (final_dim), got shape {tuple(x.shape)}")
        for axis, size in (("H", x.shape[2]), ("W", x.shape[3])):
            checks.check_multiple(f"x: {axis}", size, 2**self.level)
        names = ("w1", "b1", "w2", "b2", "up_weight", "up_bias")
        levels = [[getattr(self, f"{name}_{i + 1}") for name in names] for i in range(self.level)]
        given: Any = (self.weight, self.bias, *(t for level in levels for t in level))
        cast_x, weight, bias, *flat = checks.autocast(x, *given)
        checks.check_same_dtype("x", cast_x, "the block's weights", weight)
        backend = "reference" if log.fallback(self, standard_wanted(), "standard operators") else backends.requested()
        if backend == "reference":
            zs = reduce_haar_reference.reduce_haar(cast_x, weight, bias, self.level)
        else:
            part = choose.for_part(backend, reduce_haar.BACKENDS)
            zs = reduce_haar.fused(cast_x, weight, bias, self.level, True, part)
        order = layout.is_channels_last(x)
        # Kernels without gradient add the residual as they store.
        has_gradient = torch.is_grad_enabled() and x.requires_grad
        adds = residual and backend != "reference" and cast_x is x and not has_gradient
        out: Tensor | None = None
        for i in range(self.level - 1, -1, -1):
            w1, b1, w2, b2, up_weight, up_bias = flat[6 * i : 6 * i + 6]
            if backend == "reference":
                u = mlp_reference.pointwise_mlp(zs[i], w1, b1, w2, b2, second=out)
                out = upsample.standard(self.upsample, u, up_weight, up_bias)
            else:
                part = choose.for_part(backend, pointwise_mlp.BACKENDS)
                u = pointwise_mlp.fused(zs[i], out, None, None, w1, b1, w2, b2, 0.0, None, part)
                part = choose.for_part(backend, deconv.BACKENDS)
                if i == 0 and adds and order and self.upsample == "deconv":
                    return deconv.plus_residual(u, up_weight, up_bias, x, part)
                out = upsample.forward(self.upsample, u, up_weight, up_bias, part)
        assert out is not None
        if backend == "reference":
            return layout.ordered_as(x + out if residual else out, x)
        if not adds and (order or has_gradient or cast_x is not x):
            out = x + out if residual else out
            return out.contiguous(memory_format=layout.memory_format(x))
        # The pass that normalises also adds and reorders, at the speed of memory; there is nothing left to normalise.
        part = choose.for_part(backend, batch_norm.BACKENDS)
        one = torch.ones(out.shape[1], dtype=accumulate_dtype(out.dtype), device=out.device)
        return torch.ops.wavemix_kernels.batch_norm_apply(
            out, one, torch.zeros_like(one), x if residual else None, order, part
        )

    def extra_repr(self) -> str:
        return f"final_dim={self.final_dim}, level={self.level}, upsample={self.upsample!r}"


def _folded(part: nn.Sequential, kind: str, name: str) -> dict[str, Tensor | None]:
    """Tensors of one feed-forward part, its BatchNorm folded into the last weights before it."""
    first, last = cast(nn.Conv2d, part[0]), cast(nn.Conv2d, part[3])
    scale, shift = affine_of(part[5], f"{name}.5")
    tensors: dict[str, Tensor | None] = {
        "w1": first.weight[:, :, 0, 0], "b1": first.bias, "w2": last.weight[:, :, 0, 0], "b2": last.bias,
        "up_weight": None, "up_bias": None,
    }  # fmt: skip
    # Interpolation without weights is linear and keeps constants: the affine map passes through it.
    weight_name, bias_name, channel = "w2", "b2", 0
    if kind == "deconv":
        up: Any = part[4]
        channel = 1
    elif kind == "pixelshuffle":
        up = cast(nn.Sequential, part[4])[1]
    if kind in ("deconv", "pixelshuffle"):
        weight_name, bias_name = "up_weight", "up_bias"
        tensors |= {"up_weight": up.weight, "up_bias": up.bias}
    weight, bias = cast(Tensor, tensors[weight_name]).detach(), tensors[bias_name]
    shape = [1] * weight.dim()
    shape[channel] = -1
    wide_bias = shift if bias is None else bias.detach().double() * scale + shift
    tensors[weight_name] = (weight.double() * scale.view(shape)).to(weight.dtype)
    tensors[bias_name] = wide_bias.to(weight.dtype)
    return tensors
