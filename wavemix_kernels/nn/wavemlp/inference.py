"""Inference forms of Wave-MLP's modules: constants joined and folded, dropout and bookkeeping gone."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavemix_kernels import backends, checks, fx, log
from wavemix_kernels.nn.parts import affine_of, kept, untouched
from wavemix_kernels.nn.wavemlp import norm as norms
from wavemix_kernels.ops import choose
from wavemix_kernels.ops import wave_block_evaluate as evaluation
from wavemix_kernels.ops.common import layout
from wavemix_kernels.ops.common.dtypes import accumulate_dtype, without_autocast
from wavemix_kernels.ops.common.kept import Kept
from wavemix_kernels.ops.common.transforms import standard_wanted
from wavemix_kernels.ops.mlp import channel as channel_mlp
from wavemix_kernels.ops.norm import pre_norm
from wavemix_kernels.ops.patm import evaluate as patm


class _Constants(nn.Module):
    """Tensors as buffers: they move and convert with the module, and no optimizer sees them. On backend ``"reference"``
    the forward pass consists of standard operators only, for ``torch.export`` and ONNX."""

    def __init__(self) -> None:
        super().__init__()
        self._made = Kept()

    def _backend(self) -> str:
        return "reference" if log.fallback(self, standard_wanted(), "standard operators") else backends.requested()

    def _keep(self, name: str, tensor: Tensor | None) -> None:
        self.register_buffer(name, None if tensor is None else kept(tensor))

    def _tensors(self, names: Sequence[str]) -> list[Any]:
        own = self._buffers  # not by nn.Module's attributes, which take longer than a launch
        return [own[name] for name in names]


class InferencePATM(_Constants):
    """The result of :meth:`wavemix_kernels.FusedPATM.fuse_for_inference`: (N, dim, H, W) -> the same shape and memory
    format, without gradient.

    Args:
        mixer: a FusedPATM; it is read, not changed.
        norm: a norm in front, to fold in where it can be, or None. A BatchNorm folds into 1x1 convolutions; in mode
            ``"depthwise"`` it stays, since the zeros around the image come after it.

    Raises:
        ValueError: a part of the mixer has hooks, parametrizations or a class of its own, or a BatchNorm has no running
            statistics.
    """

    def __init__(self, mixer: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        source: Any = mixer
        if (reason := source.why_not_fused()) is not None:
            raise ValueError(f"fuse_for_inference: {reason}, which joined weights cannot stand for")
        self.dim: int = source.dim
        given = source.weights()
        depthwise = source.mode == "depthwise"
        names = ("z_h", "z_w", "z_c") if depthwise else ("z_h", "z_w", "z_c", "theta_h", "theta_w")
        joined = torch.cat([getattr(given, name).detach() for name in names])
        missing = joined.new_zeros(self.dim)
        biases = (getattr(given, f"{name}_bias") for name in names)
        joined_bias = torch.cat([missing if bias is None else bias.detach() for bias in biases])
        folds = norm is not None and not depthwise and _folds(norm)
        if folds:
            joined, joined_bias = _behind(norm, joined, joined_bias, "norm1")
        self.norm = None if folds or norm is None else _frozen_copy(norm)
        tensors = given._asdict() | {"joined": joined, "joined_bias": joined_bias}
        wide = accumulate_dtype(joined.dtype)
        for b, phase in zip("hw", (source.theta_h_conv, source.theta_w_conv), strict=True):
            scale, shift = affine_of(phase[1], f"theta_{b}_conv.1")
            taps = tensors[f"taps_{b}"].detach().to(wide)
            tensors |= {f"scale_{b}": scale.to(wide), f"shift_{b}": shift.to(wide), f"taps_{b}": taps}
            if not depthwise:
                tensors[f"theta_{b}"] = None
        for name in patm.Folded._fields:
            self._keep(name, tensors[name])
        self.train(False)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return fx.call_module(self, x)
        with _without_gradient():
            return layout.ordered_as(self.branch(x, layout.is_channels_last(x)), x)

    def branch(self, x: Tensor, channels_last: bool = True) -> Tensor:
        """A fresh result of :meth:`forward`, in the memory order that costs least: channels_last if asked for."""
        folded, dtype = self.prepared(x)
        backend = self._backend()
        image = _normalised(x, self.norm, dtype, backend)
        with without_autocast(x):
            return patm.evaluate(image, folded, backend, channels_last)

    def prepared(self, x: Tensor) -> tuple[patm.Folded, torch.dtype]:
        """The operator's tensors in autocast's dtype where it is on, and that.

        Raises:
            TypeError, ValueError: x does not fit the module.
        """
        checks.check_tensor("x", x, 4, f"(N, {self.dim}, H, W)")
        if x.shape[1] != self.dim:
            raise ValueError(f"x: expected {self.dim} channels (dim), got shape {tuple(x.shape)}")
        tensors = self._tensors(patm.Folded._fields)
        # The convolutions' tensors come first.
        like, *convolutions = self._made.autocast(x.new_empty(0), *tensors[:6])
        checks.check_same_dtype("x", like, "the weights", convolutions[0])
        return patm.Folded(*convolutions, *tensors[6:]), like.dtype

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class InferenceWaveBlock(_Constants):
    """The result of a fused WaveBlock's ``fuse_for_inference``: (N, dim, H, W) -> the same shape and memory format,
    without gradient.

    Args:
        block: a FusedWaveBlock; it is read, not changed.

    Raises:
        ValueError: as :class:`InferencePATM`.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        source: Any = block
        self.attn = InferencePATM(source.attn, source.norm1)
        if (reason := source.mlp.why_not_fused()) is not None:
            raise ValueError(f"fuse_for_inference: mlp: {reason}, which folded weights cannot stand for")
        w1, b1, w2, b2 = source.mlp.weights()
        folds = _folds(source.norm2)
        if folds:
            w1, b1 = _behind(source.norm2, w1.detach(), b1.detach(), "norm2")
        self.norm = None if folds else _frozen_copy(source.norm2)
        for name, tensor in zip(channel_mlp.Weights._fields, (w1, b1, w2, b2), strict=True):
            self._keep(name, tensor)
        self.train(False)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return fx.call_module(self, x)
        backend = self._backend()
        with _without_gradient():
            like, *weights = self._made.autocast(x.new_empty(0), *self._tensors(channel_mlp.Weights._fields))
            of_norms = [_read(norm, x) for norm in (self.attn.norm, self.norm)]
            if backend != "reference" and None not in of_norms:
                folded, dtype = self.attn.prepared(x)
                (norm1, kind1), (norm2, kind2) = cast(Any, of_norms)
                options = evaluation.Options((kind1, kind2), (dtype, like.dtype), backend)
                return evaluation.evaluate(options, x, (norm1, norm2), folded, channel_mlp.Weights(*weights))
            x = _sum(x, self.attn.branch(x), backend)
            image = _normalised(x, self.norm, like.dtype, backend)
            if backend == "reference":
                w1, b1, w2, b2 = weights
                return _sum(x, F.conv2d(F.gelu(F.conv2d(image, w1, b1)), w2, b2), backend)
            image = image.contiguous(memory_format=torch.channels_last)
            part = choose.for_part(backend, channel_mlp.BACKENDS)
            return _sum(x, channel_mlp.fused(image, *weights, part), backend)


def _read(norm: nn.Module | None, x: Tensor) -> tuple[pre_norm.Norm, pre_norm.Kind | None] | None:
    """The norm as kernels take it, of no kind where there is none; None: it has to run itself."""
    if norm is None:
        return pre_norm.Norm(None, None, None, None), None
    return None if norms.why_not("norm", norm) is not None else norms.read(norm, x)


def _sum(x: Tensor, branch: Tensor, backend: str) -> Tensor:
    return x + branch if backend == "reference" else pre_norm.join(x, branch, None, backend)


def _normalised(x: Tensor, norm: nn.Module | None, dtype: torch.dtype, backend: str) -> Tensor:
    """``norm(x)`` in ``dtype``; by kernels, which keep channels_last, where they stand for the norm."""
    if norm is None:
        return x.to(dtype)
    if backend == "reference" or norms.why_not("norm", norm) is not None:
        return norm(x).to(dtype)
    given, kind = norms.read(norm, x)
    return pre_norm.normalise(x, given, kind, pre_norm.statistics(x, given, kind, backend), backend, dtype)


def _without_gradient() -> AbstractContextManager[Any]:
    # An exported graph has no gradient to begin with, and would hold the region as a graph within, which ONNX refuses.
    return contextlib.nullcontext() if torch.compiler.is_exporting() else torch.no_grad()


def _folds(norm: nn.Module) -> bool:
    return type(norm) is nn.BatchNorm2d and untouched(norm) and norm.running_mean is not None


def _frozen_copy(norm: nn.Module) -> nn.Module:
    return copy.deepcopy(norm).eval().requires_grad_(False)


def _behind(norm: Any, weight: Tensor, bias: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """A 1x1 convolution with the BatchNorm in front of it folded in, rounded once."""
    scale, shift = affine_of(norm, name)
    wide = weight.flatten(1).double()
    return (
        (wide * scale).to(weight.dtype)[:, :, None, None],
        (bias.double() + wide @ shift).to(bias.dtype),
    )
