"""FusedWaveBlock: the reference WaveBlock's parameters and results, each residual branch one autograd function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from wavemix_kernels import backends, checks, fx, log
from wavemix_kernels.nn.parts import Batch, update, why_not_plain
from wavemix_kernels.nn.wavemlp import norm as pre_norm
from wavemix_kernels.nn.wavemlp.inference import InferenceWaveBlock
from wavemix_kernels.nn.wavemlp.mlp import FusedMlp
from wavemix_kernels.nn.wavemlp.patm import FusedPATM
from wavemix_kernels.nn.wavemlp.reference import DropPath, NormLayer, TokenMixer, WaveBlock
from wavemix_kernels.ops.mlp import channel as channel_mlp
from wavemix_kernels.ops.patm import op as patm_op


class FusedWaveBlock(WaveBlock):
    """A WaveBlock that keeps four images for backward, or two (``recompute="all"``), where the modules keep thirty.

    (N, dim, H, W) -> the same shape and memory format; parameters, buffers and results are
    :class:`wavemix_kernels.reference.WaveBlock`'s. Each of the two branches, its norm, its stochastic depth
    and the sum included, runs as one function; where that cannot stand for the modules (a norm other than BatchNorm2d
    and GroupNorm of one group, another mixer than :class:`FusedPATM` or :class:`FusedMlp`, hooks or parametrizations on
    a part) the branch's modules themselves run. Not differentiable twice, except on backend ``"reference"``.

    Args:
        dim: channels, at least 4.
        mlp_ratio, qkv_bias, qk_scale, drop, attn_drop, drop_path, act_layer, norm_layer, mode: as
            :class:`wavemix_kernels.reference.WaveBlock` takes them.
        token_mixer, channel_mixer: what takes FusedPATM's and FusedMlp's place.
        recompute: what backward makes again: ``"amplitudes"``, all but the input of each branch and the phases of a
            FusedPATM, or ``"all"`` to keep the inputs alone. (Phases are two images and a seventh of the arithmetic.)

    Raises:
        TypeError, ValueError: an argument out of these ranges, or an input that does not fit them.

    Source: arXiv:2111.12294.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: NormLayer = nn.BatchNorm2d,
        mode: str = "fc",
        *,
        token_mixer: TokenMixer = FusedPATM,
        channel_mixer: Callable[..., nn.Module] = FusedMlp,
        recompute: str = "amplitudes",
    ) -> None:
        checks.check_choice("recompute", recompute, patm_op.RECOMPUTE)
        super().__init__(
            dim, mlp_ratio, qkv_bias, qk_scale, drop, attn_drop, drop_path, act_layer, norm_layer, mode,
            token_mixer=token_mixer, channel_mixer=channel_mixer,
        )  # fmt: skip
        if isinstance(self.attn, FusedPATM):
            self.attn.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return fx.call_module(self, x)
        return super().forward(x)

    def mix_tokens(self, x: Tensor) -> Tensor:
        own: Any = self._modules  # not by nn.Module's attributes, which take longer than a launch
        backend, mixer = backends.requested(), own["attn"]
        if backend == "reference" or log.fallback(self, self._why_not_fused("attn", FusedPATM, "norm1")):
            return super().mix_tokens(x)
        assert isinstance(mixer, FusedPATM)
        return mixer.residual(x, own["norm1"], self._path(x), backend)

    def mix_channels(self, x: Tensor) -> Tensor:
        own: Any = self._modules
        backend, mixer, norm2 = backends.requested(), own["mlp"], own["norm2"]
        if backend == "reference" or log.fallback(self, self._why_not_fused("mlp", FusedMlp, "norm2")):
            return super().mix_channels(x)
        assert isinstance(mixer, FusedMlp)
        norm, kind = pre_norm.read(norm2, x)
        # The norm reads x as it is: only x's dtype counts here.
        weights: Any = mixer.weights()
        if (dtypes := checks.autocast_inside(x, weights)) is None:
            like_x, *weights = checks.autocast(x[:0], *weights)
            checks.check_same_dtype("x", like_x, "the weights", weights[0])
        of_mlp, path = channel_mlp.Weights(*weights), self._path(x)
        out, mean, var = channel_mlp.branch(x, norm, kind, of_mlp, path, backend, dtypes)
        update(Batch(norm2, mean, var, x.shape[0] * x.shape[2] * x.shape[3]))
        return out

    def fuse_for_inference(self) -> InferenceWaveBlock:
        """A new module for inference, equal to this one in evaluation up to rounding: BatchNorms folded where that is
        exact, stochastic depth gone.

        Raises:
            ValueError: a mixer of another class or with hooks, parametrizations or a class of its own in a part; a
                BatchNorm without running statistics.
        """
        for name, mixer, kind in (("attn", self.attn, FusedPATM), ("mlp", self.mlp, FusedMlp)):
            if type(mixer) is not kind:
                raise ValueError(f"fuse_for_inference: {name} is a {type(mixer).__name__}, expected {kind.__name__}")
        return InferenceWaveBlock(self)

    def _why_not_fused(self, name: str, kind: type[FusedPATM | FusedMlp], norm: str) -> str | None:
        """Why one function cannot stand for a residual branch, or None."""
        own: Any = self._modules
        mixer = own[name]
        if type(mixer) is not kind:
            return f"{name} is {type(mixer).__name__}, expected {kind.__name__}"
        if (reason := mixer.why_not_joined()) is not None:
            return f"{name}: {reason}"
        return pre_norm.why_not(norm, own[norm]) or why_not_plain("drop_path", own["drop_path"])

    def _path(self, x: Tensor) -> Tensor | None:
        """The factor of each sample in stochastic depth: of another class than ours, the module's output for ones."""
        drop_path = self.drop_path
        if isinstance(drop_path, nn.Identity) or not drop_path.training:
            return None
        if type(drop_path) is DropPath:
            return drop_path.factors(x)
        path: Any = drop_path(x.new_ones((x.shape[0], 1, 1, 1)))
        return path
