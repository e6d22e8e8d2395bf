"""WTConv's forward as one operator (:func:`wavemix_kernels.ops.wtconv.wtconv`) where
:func:`wavemix_kernels.ops.choose.wtconv` wants it, for :func:`wavemix_kernels.accelerate`.

A layer is judged by its parts and by what a copy of it computes beside the operator's reference. It keeps its class as
a base, and its plain forward for every other call.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from wavemix_kernels import backends, fx, log
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.wtconv import reference, wtconv

NOW = "on a GPU in float32 its forward as one operator"
_FILTERS = ("wt_filter", "iwt_filter")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class WTConvLayer(nn.Module):
    """Mixed into the class of a WTConv that :func:`replacement` has found."""

    _wtconv: Any  # what the filters were when they were seen to be Haar's

    def forward(self, x: Any) -> Any:
        reason = self._why_parts(x)
        if reason is None:
            ours: Any = self
            taps, scales = [c.weight for c in ours.wavelet_convs], [s.weight for s in ours.wavelet_scale]
            return wtconv(x, taps, scales, ours.base_scale(ours.base_conv(x)))
        if not torch.compiler.is_compiling() and log.enabled():
            log.once(("WTConv", reason), lambda: f"WTConv: runs by parts: {reason}")
        return super().forward(x)

    def _why_parts(self, x: Any) -> str | None:
        name = backends.requested()
        if not isinstance(x, Tensor) or isinstance(x, fx.Proxy):
            return "called with something else than a tensor"
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if name not in ("auto", "triton") or (name == "auto" and choose.wtconv(device, dtype) == "parts"):
            return f"backend {name!r} on {device} in {dtype}"
        if (reason := backends.triton_why_not(x)) is not None:
            return reason
        parts = _parts(self)
        if parts is None:
            return "its convolutions or scales have changed"
        if any(getattr(part, hooks) for part in parts for hooks in _HOOKS):
            return "its convolutions or scales have hooks"
        taps = [part.weight for part in parts if isinstance(part, nn.Conv2d)]
        if not torch.is_autocast_enabled(device) and any(t.dtype != x.dtype for t in taps):
            return "its weights are of another dtype"
        if x.dim() != 4 or x.shape[1] * 4 != taps[0].shape[0] or x.numel() == 0:
            return f"an input of shape {tuple(x.shape)}"
        return None if self._has_haar() else "its filters are not Haar's, or trainable"

    def _has_haar(self) -> bool:
        from wavemix_kernels.wtconv import why_not_haar

        filters: list[Any] = [getattr(self, name) for name in _FILTERS]
        if any(f.requires_grad or f.is_inference() for f in filters):
            return False
        if torch.compiler.is_compiling():  # a compiled graph keeps what it was traced with
            return True
        now = [(id(f), f._version, f.device) for f in filters]
        if now != self._wtconv:
            if any(f.is_cuda for f in filters) and torch.cuda.is_current_stream_capturing():
                return False  # their values cannot be read
            if any(why_not_haar(f) is not None for f in filters):
                return False
            self.__dict__["_wtconv"] = now
        return True

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, (type(self).__mro__[2],), self.__dict__ | {"_wtconv": None}


@functools.cache
def _class(kind: Any) -> type[nn.Module]:
    return type(kind.__name__, (WTConvLayer, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _new(kind: Any) -> nn.Module:
    made = _class(kind)
    return made.__new__(made)


def _parts(module: Any) -> list[nn.Module] | None:
    """The convolutions and scales of the levels; None where they are not WTConv's."""
    convs, scales = getattr(module, "wavelet_convs", None), getattr(module, "wavelet_scale", None)
    if not isinstance(convs, nn.ModuleList) or not isinstance(scales, nn.ModuleList):
        return None
    if len(convs) == 0 or len(convs) != len(scales):
        return None
    size = convs[0].kernel_size if isinstance(convs[0], nn.Conv2d) else ()
    for conv, scale in zip(convs, scales, strict=True):
        weight = getattr(scale, "weight", None)
        if type(conv) is not nn.Conv2d or not isinstance(weight, Tensor):
            return None
        around = conv.padding in ("same", tuple(n // 2 for n in size))
        plain = conv.stride == conv.dilation == (1, 1) and conv.padding_mode == "zeros" and conv.bias is None
        depthwise = conv.groups == conv.in_channels == conv.out_channels == weight.numel()
        if not (around and plain and depthwise and conv.kernel_size == size):
            return None
        if size[0] != size[1] or size[0] % 2 == 0:
            return None
    return [*convs, *scales]


def replacement(module: nn.Module) -> Callable[[nn.Module], str] | None:
    """How to fuse the forward of a module with WTConv's filters; None for others, and where it is ours."""
    kind = type(module)
    if isinstance(module, WTConvLayer) or "forward" in module.__dict__ or _parts(module) is None:
        return None
    if any(t.is_meta for t in module.parameters()) or list(inspect.signature(kind.forward).parameters) != ["self", "x"]:
        return None
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in ("base_conv", "base_scale")):
        return None
    return _replace if _agrees(module) else None


def _replace(module: nn.Module) -> str:
    module.__dict__["_wtconv"] = None
    kind: Any = type(module)
    module.__class__ = _class(kind)
    return NOW


def _agrees(module: nn.Module) -> bool:
    """Whether a copy with random weights, in training and in evaluation, returns what the operator does."""
    try:
        twin: Any = copy.deepcopy(module).cpu().float()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                if name not in _FILTERS:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
            channels = twin.wavelet_convs[0].in_channels // 4
            x = torch.randn(2, channels, 11, 14, generator=generator)
            taps, scales = [c.weight for c in twin.wavelet_convs], [s.weight for s in twin.wavelet_scale]
            ours = reference.wtconv(x, twin.base_scale(twin.base_conv(x)), taps, scales)
            for training in (False, True):
                twin.train(training)
                theirs = type(module).forward(twin, x.clone())
                if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
                    return False
                if not torch.allclose(theirs, ours, rtol=0, atol=1e-5 * ours.abs().max().item()):
                    return False
    except Exception:  # noqa: BLE001 whatever a stranger's code raises: it cannot be vouched for
        return False
    return True
