"""FusedMlp: the reference Mlp's parameters and results on the fused operator."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from wavemix_kernels import backends, checks, fx, log
from wavemix_kernels.nn.parts import affine_parameters, all_plain, why_not_all_plain, why_not_plain
from wavemix_kernels.nn.wavemlp.reference import Mlp
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common.layout import is_channels_last, laid_out
from wavemix_kernels.ops.common.transforms import standard_wanted
from wavemix_kernels.ops.mlp import channel as channel_mlp


class FusedMlp(Mlp):
    """An Mlp that keeps its input alone for backward: (N, C_in, H, W) -> (N, C_out, H, W) in the input's memory format.

    Arguments, parameters and results are :class:`wavemix_kernels.reference.Mlp`'s. The hidden activations are made
    again; where the operator cannot stand for the modules (another activation than GELU, active dropout, hooks or
    parametrizations on a part) the modules themselves run. Not differentiable twice, except on backend ``"reference"``.

    Raises:
        TypeError, ValueError: an argument out of its range, or an input that does not fit.
    """

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return fx.call_module(self, x, super().forward)
        backend = backends.requested()
        if backend == "reference" or log.fallback(self, self.why_not_fused()):
            return super().forward(x)
        channels = self.fc1.in_channels
        checks.check_tensor("x", x, 4, f"(N, {channels}, H, W)")
        if x.shape[1] != channels:
            raise ValueError(f"x: expected {channels} channels (in_features), got shape {tuple(x.shape)}")
        cast_x, *flat = checks.autocast(x, *self.weights())
        checks.check_same_dtype("x", cast_x, "the weights", flat[0])
        out = channel_mlp.fused(cast_x, *flat, choose.for_part(backend, channel_mlp.BACKENDS))
        return out if is_channels_last(x) else laid_out(out, False)

    def weights(self) -> channel_mlp.Weights:
        own: Any = self._modules  # not by nn.Module's attributes, which take longer than a launch
        return channel_mlp.Weights(*affine_parameters(own["fc1"]), *affine_parameters(own["fc2"]))

    def why_not_joined(self) -> str | None:
        """Why the operator cannot stand for the module inside another one, or None."""
        return why_not_plain("it", self) or self.why_not_fused()

    def why_not_fused(self) -> str | None:
        """Why the operator cannot stand for the modules, or None: it computes something else, or a part's hook or
        parametrization would be left out."""
        return standard_wanted() or why_not_mlp(self)


#: The parts of an Mlp, in their order.
MLP_KINDS: tuple[tuple[str, type[nn.Module]], ...] = (
    ("fc1", nn.Conv2d),
    ("act", nn.GELU),
    ("fc2", nn.Conv2d),
    ("drop", nn.Dropout),
)


def why_not_mlp(mlp: Mlp) -> str | None:
    """The reason of :meth:`FusedMlp.why_not_fused`, for any Mlp."""
    parts: list[Any] = [*mlp._modules.values()]
    if not torch.compiler.is_compiling() and all_plain(parts, [kind for _, kind in MLP_KINDS]):
        return why_not_mlp_runs(mlp)
    if (reason := why_not_all_plain((name, getattr(mlp, name), kind) for name, kind in MLP_KINDS)) is not None:
        return reason
    return why_not_mlp_runs(mlp)


def why_not_mlp_runs(mlp: Mlp) -> str | None:
    """The same where all parts are plain."""
    if (approximate := cast(nn.GELU, mlp.act).approximate) != "none":
        return f"act has approximate={approximate!r}, expected 'none'"
    return why_not_dropping("drop", mlp.drop)


def why_not_dropping(name: str, drop: nn.Dropout) -> str | None:
    return f"{name} is active with p={drop.p}" if drop.training and drop.p != 0 else None
