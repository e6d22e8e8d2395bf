"""The inference form of a Waveblock: BatchNorms folded into the weights before them, dropout and bookkeeping gone."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from wavemix_kernels import backends, checks, fx, log
from wavemix_kernels.nn.parts import affine_of, kept, why_not_plain
from wavemix_kernels.ops import waveblock_evaluate as evaluation
from wavemix_kernels.ops.common import layout
from wavemix_kernels.ops.common.kept import Kept
from wavemix_kernels.ops.common.transforms import standard_wanted


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
        self._made = Kept()
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
        own = self._buffers  # not by nn.Module's attributes, which take longer than a launch
        given: list[Any] = [own["weight"], own["bias"]]
        given += [own[f"{name}_{i + 1}"] for i in range(self.level) for name in evaluation.Level._fields]
        cast_x, weight, bias, *flat = self._made.autocast(x, *given)
        checks.check_same_dtype("x", cast_x, "the block's weights", weight)
        backend = "reference" if log.fallback(self, standard_wanted(), "standard operators") else backends.requested()
        fields = len(evaluation.Level._fields)
        levels = [evaluation.Level(*flat[i : i + fields]) for i in range(0, len(flat), fields)]
        joined = residual and cast_x is x
        options = evaluation.Options(self.upsample, layout.is_channels_last(x), joined, backend)
        run = evaluation.standard if backend == "reference" else evaluation.evaluate
        out = run(options, cast_x, weight, bias, levels)
        out = x + out if residual and not joined else out
        return layout.ordered_as(out, x)

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
