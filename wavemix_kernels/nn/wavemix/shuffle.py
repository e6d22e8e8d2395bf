"""FusedShuffleWaveblock: the blocks of WaveMixSR-V2 and WaveMix V3 on the fused operators."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from wavemix_kernels import backends, checks, fx, log
from wavemix_kernels.nn.parts import Batch, affine_of, frozen, kept, update, why_not_plain
from wavemix_kernels.nn.wavemix.reference import ShuffleWaveblock
from wavemix_kernels.ops import choose, shuffle_block, waveblock
from wavemix_kernels.ops.common import layout
from wavemix_kernels.ops.common.kept import Kept
from wavemix_kernels.ops.common.transforms import standard_wanted
from wavemix_kernels.ops.deconv import upsample
from wavemix_kernels.ops.haar.op import haar_dwt2d
from wavemix_kernels.ops.mlp import op as pointwise_mlp
from wavemix_kernels.ops.mlp import reference as mlp_reference
from wavemix_kernels.ops.reduce_haar import op as reduce_haar
from wavemix_kernels.ops.reduce_haar import reference as reduce_haar_reference


class FusedShuffleWaveblock(ShuffleWaveblock):
    """A :class:`wavemix_kernels.reference.ShuffleWaveblock` as one autograd function, in half of its activation memory.

    (N, final_dim, H, W) -> the same shape and memory format, H and W even; the residual is the caller's to add.
    Arguments, parameters, buffers and results are ShuffleWaveblock's; dtypes, and what runs where the function cannot
    stand for the modules, are as in :class:`wavemix_kernels.FusedWaveblock`. Not differentiable twice, except on
    backend ``"reference"``.

    Raises:
        TypeError, ValueError: as ShuffleWaveblock.
    """

    def analyse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ll, (high,) = haar_dwt2d(x)
        return ll, high

    def forward(self, x: Tensor, residual: bool = False) -> Tensor:
        """The block's output; with ``residual`` plus x, added in the pass that normalises."""
        if isinstance(x, fx.Proxy):
            return fx.call_module(self, x, super().forward, residual=residual)
        backend = backends.requested()
        if backend == "reference" or log.fallback(self, self.why_not_fused()):
            out = super().forward(x)
            return x + out if residual else out
        self.check_input(x)
        part: list[Any] = list(self.feedforward)  # type: ignore[arg-type]
        dropout, norm = part[2], part[-1]
        convs = [self.reduction, *(m for m in part if isinstance(m, nn.Conv2d))]
        weights: list[Any] = [t for m in convs for t in (m.weight, m.bias)]
        cast_x, *flat = checks.autocast(x, *weights)
        checks.check_same_dtype("x", cast_x, "the block's weights", flat[0])
        weight, bias, *rest = cast(list[Any], flat)
        p = dropout.p if dropout.training else 0.0
        of_norm = norm.weight, norm.bias, *frozen(norm)
        adds = residual and cast_x is x
        if self.second:
            seeds = pointwise_mlp.draw_seed(x.device) if p else None
            levels = [waveblock.Level(*rest, *of_norm)]
            block = waveblock.Block(weight, bias, levels, [p], [norm.eps], seeds, self.upsample, "auto")
            out, (rows,) = waveblock.waveblock(cast_x, block, adds, backend)
            mean, var = rows, None
        else:
            parameters = shuffle_block.Parameters(weight, bias, *rest, *of_norm)
            common: dict[str, Any] = {"residual": adds, "backend": backend}
            out, (mean, var) = shuffle_block.shuffle_block(cast_x, parameters, dropout=p, eps=norm.eps, **common)
        if norm.training:
            update(Batch(norm, mean, var, x.shape[0] * x.shape[2] * x.shape[3]))
        return x + out if residual and cast_x is not x else out

    def why_not_joined(self) -> str | None:
        """See :meth:`wavemix_kernels.FusedWaveblock.why_not_joined`."""
        return why_not_plain("it", self) or self.why_not_fused()

    def why_not_fused(self) -> str | None:
        """See :meth:`wavemix_kernels.FusedWaveblock.why_not_fused`."""
        part: Any = self.feedforward
        reason = standard_wanted() or why_not_plain("reduction", self.reduction, nn.Conv2d)
        if (reason := reason or why_not_plain("feedforward", part, nn.Sequential)) is not None:
            return reason
        middle = [nn.Conv2d] if self.second else []
        kinds = [nn.Conv2d, nn.GELU, nn.Dropout, *middle, nn.PixelShuffle, nn.Conv2d, nn.BatchNorm2d]
        if len(part) != len(kinds):
            return f"feedforward has {len(part)} parts, expected {len(kinds)}"
        reasons = (why_not_plain(f"feedforward.{i}", m, k) for i, (m, k) in enumerate(zip(part, kinds, strict=True)))
        return next((reason for reason in reasons if reason is not None), None)

    def fuse_for_inference(self) -> InferenceShuffleWaveblock:
        """Like :meth:`wavemix_kernels.FusedWaveblock.fuse_for_inference`.

        Raises:
            ValueError: a part has hooks, parametrizations or a class of its own; BatchNorm has no running statistics.
        """
        if (reason := self.why_not_fused()) is not None:
            raise ValueError(f"fuse_for_inference: {reason}, which folded weights cannot stand for")
        return InferenceShuffleWaveblock(self)


class InferenceShuffleWaveblock(nn.Module):
    """The result of :meth:`FusedShuffleWaveblock.fuse_for_inference`: the same map up to rounding, BatchNorm in the
    weights of the 3x3 convolution. Its tensors are buffers."""

    def __init__(self, block: FusedShuffleWaveblock) -> None:
        super().__init__()
        self.final_dim, self.second = block.final_dim, block.second
        convs: list[Any] = [block.reduction, *(m for m in block.feedforward if isinstance(m, nn.Conv2d))]  # type: ignore
        *_, norm = cast(nn.Sequential, block.feedforward)
        scale, shift = affine_of(norm, f"feedforward.{len(convs) + 2}")
        *tensors, (weight, bias) = [(conv.weight, conv.bias) for conv in convs]
        wide = shift if bias is None else bias.detach().double() * scale + shift
        folded = (weight.detach().double() * scale.view(-1, 1, 1, 1)).to(weight.dtype), wide.to(weight.dtype)
        self.count = len(convs)
        for i, of_conv in enumerate([*tensors, folded]):
            for name, tensor in zip(("weight", "bias"), of_conv, strict=True):
                self.register_buffer(f"{name}_{i}", None if tensor is None else kept(tensor))
        self._made = Kept()
        self.train(False)

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
            checks.check_multiple(f"x: {axis}", size, 2)
        given: Any = [getattr(self, f"{name}_{i}") for i in range(self.count) for name in ("weight", "bias")]
        cast_x, weight, bias, *rest = cast(list[Any], self._made.autocast(x, *given))
        checks.check_same_dtype("x", cast_x, "the block's weights", weight)
        backend = "reference" if log.fallback(self, standard_wanted(), "standard operators") else backends.requested()
        if backend == "reference":
            (z,) = reduce_haar_reference.reduce_haar(cast_x, weight, bias, 1)
        else:
            part = choose.for_part(backend, reduce_haar.BACKENDS)
            (z,) = reduce_haar.fused(cast_x, weight, bias, 1, True, part)
        up_weight, up_bias = rest[-2:]
        if self.second:
            w1, b1, w2, b2 = rest[:4]
            w1, w2 = w1.flatten(1), w2.flatten(1)
            if backend == "reference":
                u = mlp_reference.pointwise_mlp(z, w1, b1, w2, b2)
            else:
                part = choose.for_part(backend, pointwise_mlp.BACKENDS)
                u = pointwise_mlp.fused(z, None, None, None, w1, b1, w2, b2, 0.0, None, part)
        else:
            u = shuffle_block.hidden(z, *rest[:2])[1]
        out = upsample.standard("pixelshuffle", u, up_weight, up_bias)
        return layout.ordered_as(x + out if residual else out, x)

    def extra_repr(self) -> str:
        return f"final_dim={self.final_dim}, second={self.second}"
