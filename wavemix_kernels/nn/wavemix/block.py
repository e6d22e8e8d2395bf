"""FusedWaveblock: the reference Waveblock's parameters and results on the fused operators."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wavemix_kernels import backends, checks, fx, log
from wavemix_kernels.nn.parts import (
    Batch,
    affine_parameters,
    all_plain,
    frozen,
    update,
    why_not_all_plain,
    why_not_plain,
)
from wavemix_kernels.nn.wavemix.inference import InferenceWaveblock
from wavemix_kernels.nn.wavemix.reference import Waveblock
from wavemix_kernels.ops import waveblock
from wavemix_kernels.ops.common.transforms import standard_wanted
from wavemix_kernels.ops.haar.op import haar_dwt2d
from wavemix_kernels.ops.mlp import op as pointwise_mlp

_UPSAMPLING: dict[str, type[nn.Module]] = {
    "deconv": nn.ConvTranspose2d,
    "pixelshuffle": nn.Sequential,
    "bilinear": nn.Upsample,
    "nearest": nn.Upsample,
}


def _kinds_of_part(upsample: str) -> tuple[type[nn.Module], ...]:
    return nn.Conv2d, nn.GELU, nn.Dropout, nn.Conv2d, _UPSAMPLING[upsample], nn.BatchNorm2d


@functools.lru_cache
def _kinds(levels: int, upsample: str) -> list[type[nn.Module]]:
    """Classes of the reduction, of the feed-forward parts, and of the modules in these."""
    return [nn.Conv2d, *[nn.Sequential] * levels, *_kinds_of_part(upsample) * levels]


class FusedWaveblock(Waveblock):
    """A Waveblock that trains in about half (``"mlp"``) or a quarter (``"all"``) of the activation memory.

    (N, final_dim, H, W) -> the same shape and memory format, H and W multiples of ``2**level``, in float64, float32,
    float16 or bfloat16 as the weights are (autocast converts both); the residual is the caller's to add. Parameters,
    buffers and results are :class:`wavemix_kernels.reference.Waveblock`'s. Runs as one autograd function; where that
    cannot stand for the modules (a BatchNorm turned into SyncBatchNorm, hooks or parametrizations on a part) the
    modules themselves run.
    Not differentiable twice, except on backend ``"reference"``.

    Args:
        level: DWT levels, 1 to 4.
        mult: hidden width of each feed-forward part as a multiple of ``final_dim``.
        ff_channel: channels between the second 1x1 convolution and the weights of the upsampling.
        final_dim: channels C of input and output, a multiple of 4.
        dropout: probability of dropping a hidden activation.
        upsample: ``"deconv"``, ``"bilinear"``, ``"nearest"`` or ``"pixelshuffle"``.
        recompute: what backward makes again: ``"hidden"``, the hidden layers alone; ``"mlp"``, the reduction with its
            pyramid and the MLPs, which keeps up to two thirds of x's size less; ``"all"``, to keep x alone; ``"auto"``,
            ``"hidden"`` on a GPU and ``"mlp"`` on a CPU.

    Raises:
        TypeError, ValueError: an argument out of these ranges, or an input that does not fit them.

    Source: arXiv:2205.14375; ``upsample="pixelshuffle"``: arXiv:2409.10582.
    """

    def __init__(
        self,
        *,
        level: int = 1,
        mult: int = 2,
        ff_channel: int = 16,
        final_dim: int = 16,
        dropout: float = 0.5,
        upsample: str = "deconv",
        recompute: str = "auto",
    ) -> None:
        super().__init__(
            level=level, mult=mult, ff_channel=ff_channel, final_dim=final_dim, dropout=dropout, upsample=upsample
        )
        self.recompute = checks.check_choice("recompute", recompute, waveblock.RECOMPUTE)

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
        cast_x, block = self.prepared(x)
        if any(block.dropout):
            block = block._replace(seeds=pointwise_mlp.draw_seed(x.device, self.level))
        out, stats = waveblock.waveblock(cast_x, block, residual and cast_x is x, backend)
        update(*self.batches(x, stats))
        return x + out if residual and cast_x is not x else out

    def prepared(self, x: Tensor) -> tuple[Tensor, waveblock.Block]:
        """x and the operator's arguments, in autocast's dtype where it is on; without seeds.

        Raises:
            TypeError, ValueError: x does not fit the block.
        """
        self.check_input(x)
        # Lists, since nn.Sequential walks to what an index asks for.
        parts: list[list[Any]] = [[*part] for part in self._parts()]
        weights: list[Any] = [*affine_parameters(self.reduction)]
        for part in parts:
            for conv in (part[0], part[3], *_upsampling_conv(part[4])):
                weights += affine_parameters(conv)
        parameters: torch.dtype | None = None
        if (dtypes := checks.autocast_inside(x, weights)) is not None:
            cast_x, flat, parameters = x.to(dtypes[0]), weights, dtypes[1]
        else:
            cast_x, *flat = checks.autocast(x, *weights)
            checks.check_same_dtype("x", cast_x, "the block's weights", flat[0])
        weight, bias, *flat = flat
        count, missing = len(flat) // len(parts), (None,) * (6 - len(flat) // len(parts))
        levels = []
        for i, part in enumerate(parts):
            own, norm = flat[i * count : (i + 1) * count], part[5]
            tensors: list[Any] = [*own, *missing, *affine_parameters(norm), *frozen(norm)]
            levels.append(waveblock.Level(*tensors))
        dropout = [part[2].p if part[2].training else 0.0 for part in parts]
        eps = [part[5].eps for part in parts]
        block = waveblock.Block(weight, bias, levels, dropout, eps, None, self.upsample, self.recompute, parameters)
        return cast_x, block

    def batches(self, x: Tensor, stats: Sequence[Tensor]) -> list[Batch]:
        """Each level's statistics, which move its BatchNorm's running ones."""
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        norms = [[*part][5] for part in self._parts()]
        return [Batch(norm, stats[i], None, pixels >> (2 * i)) for i, norm in enumerate(norms)]

    def _parts(self) -> list[Any]:
        own: Any = self._modules  # not by nn.Module's attributes, which take longer than a launch
        return [own[self._feedforward_name(level)] for level in range(1, self.level + 1)]

    def why_not_joined(self) -> str | None:
        """Why calling with ``residual`` cannot stand for ``block(x) + x`` (a hook would notice), or None."""
        return why_not_plain("it", self) or self.why_not_fused()

    def fuse_for_inference(self) -> InferenceWaveblock:
        """A new module for inference, equal to this one in evaluation up to rounding: BatchNorms folded, dropout gone.

        Raises:
            ValueError: a part has hooks, parametrizations or a class of its own; a BatchNorm has no running statistics.
        """
        if (reason := self.why_not_fused()) is not None:
            raise ValueError(f"fuse_for_inference: {reason}, which folded weights cannot stand for")
        return InferenceWaveblock(self)

    def why_not_fused(self) -> str | None:
        """Why the modules themselves run, or None: a part of another class, or one that somebody listens to, or
        :func:`wavemix_kernels.ops.common.transforms.standard_wanted`."""
        if (reason := standard_wanted()) is not None:
            return reason
        if not torch.compiler.is_compiling() and self._all_plain():
            return None
        kinds = _kinds_of_part(self.upsample)
        parts: list[tuple[str, nn.Module, type[nn.Module]]] = [("reduction", self.reduction, nn.Conv2d)]
        for level in range(1, self.level + 1):
            name = self._feedforward_name(level)
            part = getattr(self, name)
            parts.append((name, part, nn.Sequential))
            if type(part) is nn.Sequential:
                if len(part) != len(kinds):
                    return f"{name} has {len(part)} parts, expected {len(kinds)}"
                parts += [(f"{name}.{i}", *pair) for i, pair in enumerate(zip(part, kinds, strict=True))]
        return why_not_all_plain(parts)

    def _all_plain(self) -> bool:
        """Whether no part has a reason of :meth:`why_not_fused`, asked quickly."""
        own: Any = self._modules
        kinds = _kinds(self.level, self.upsample)
        parts = [own.get("reduction"), *(own.get(self._feedforward_name(i)) for i in range(1, self.level + 1))]
        if [*map(type, parts)] != kinds[: len(parts)]:
            return False
        if any(len(part._modules) * self.level != len(kinds) - len(parts) for part in parts[1:]):
            return False
        return all_plain([*parts, *(m for part in parts[1:] for m in part._modules.values())], kinds)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recompute={self.recompute!r}"


def _upsampling_conv(module: nn.Module) -> list[nn.Module]:
    """The module with weights in an upsampling, if there is one."""
    if isinstance(module, nn.ConvTranspose2d):
        return [module]
    return [module[1]] if isinstance(module, nn.Sequential) else []
