"""FusedMlp: the reference Mlp's parameters and results on the fused operator."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from wavemix_kernels import backends, checks
from wavemix_kernels.nn.parts import untouched
from wavemix_kernels.nn.wavemlp.reference import Mlp
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common.layout import is_channels_last, laid_out
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
        backend = backends.requested()
        if backend == "reference" or not self._parts_are_plain():
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
        return channel_mlp.Weights(self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)

    def is_plain(self) -> bool:
        """Whether the operator can stand for the module inside another one: no hook anywhere would notice."""
        return untouched(self) and self._parts_are_plain()

    def _parts_are_plain(self) -> bool:
        """Whether the operator computes what the modules would, and nobody listens to one of them."""
        parts = ((self.fc1, nn.Conv2d), (self.act, nn.GELU), (self.fc2, nn.Conv2d), (self.drop, nn.Dropout))
        return (
            all(type(module) is kind and untouched(module) for module, kind in parts)
            and cast(nn.GELU, self.act).approximate == "none"
            and (self.drop.p == 0 or not self.drop.training)
        )
