"""Phase-aware token mixing (PATM) of Wave-MLP (Tang et al., "An Image Patch is a Wave: Phase-Aware Vision MLP",
CVPR 2022, arXiv:2111.12294), and the block around it, in plain PyTorch: the specification of their kernels.

A token is a wave ``z exp(i theta)`` of amplitude ``z`` and phase ``theta``, unfolded by Euler's formula into the 2C
real channels ``u = [z cos(theta) | z sin(theta)]``. On x (N, C, H, W):

- ``z_h, z_w, c`` are 1x1 convolutions of x; ``theta_h, theta_w`` are ``ReLU(BatchNorm(conv(x)))``;
- ``h`` is a 7-tap convolution of ``u_h`` along W, ``w`` one of ``u_w`` along H, both in C groups;
- ``a = softmax(MLP(mean over H, W of h + w + c))`` weighs the three branches, per image and channel;
- the output is ``proj(h a_0 + w a_1 + c a_2)``.

Group g of a convolution reads channels 2g and 2g+1 **of the concatenation** u: for even C the cosine parts of channels
2g, 2g+1 where g < C/2, the sine parts of channels 2g-C, 2g-C+1 from there on. For odd C the middle group reads the
last cosine and the first sine part. Parameter names and shapes are upstream's, so checkpoints load both ways.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from wavemix_kernels import checks, fx
from wavemix_kernels.ops.patm.reference import TAPS, as_wave, branch_sum

MODES = ("fc", "depthwise")
NormLayer = Callable[[int], nn.Module]
#: Called as ``token_mixer(dim, qkv_bias=..., qk_scale=..., attn_drop=..., mode=...)``; maps (N, dim, H, W) to itself.
TokenMixer = Callable[..., nn.Module]


def warn_unused(name: str, value: object) -> None:
    """Upstream takes a few arguments that nothing reads: they change no result here either, but not in silence."""
    if value:
        warnings.warn(f"{name}={value!r} has no effect: upstream takes the argument and never reads it", stacklevel=3)


class Mlp(nn.Module):
    """1x1 convolution, activation, dropout, 1x1 convolution, dropout: (N, C_in, H, W) -> (N, C_out, H, W).

    Args:
        in_features: channels of the input, C_in.
        hidden_features, out_features: channels between and after the convolutions, C_out; C_in where None or 0.
        act_layer: called without arguments for the activation.
        drop: probability of both dropouts.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Conv2d(in_features, hidden_features, 1)
        self.act = act_layer()
        self.fc2 = nn.Conv2d(hidden_features, out_features or in_features, 1)
        self.drop = nn.Dropout(checks.check_probability("drop", drop))

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class PATM(nn.Module):
    """Phase-aware token mixing: (N, dim, H, W) -> the same shape, any H and W.

    Args:
        dim: channels, at least 4.
        qkv_bias: whether the projections to z_h, z_w and c have a bias.
        qk_scale, attn_drop: unused, as upstream; other than None and 0 they warn.
        proj_drop: dropout probability of the output.
        mode: what the phases are made with: ``"fc"``, a 1x1 convolution with bias, or ``"depthwise"``, a depthwise 3x3
            convolution without.

    Raises:
        TypeError, ValueError: an argument out of these ranges, or an input that is no (N, dim, H, W).

    Source: arXiv:2111.12294.
    """

    def __init__(
        self,
        dim: int,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        mode: str = "fc",
    ) -> None:
        super().__init__()
        if checks.check_positive_int("dim", dim) < 4:
            raise ValueError(
                f"dim={dim}: expected at least 4, since the branch weights come from dim // 4 hidden channels"
            )
        checks.check_choice("mode", mode, MODES)
        warn_unused("qk_scale", qk_scale)
        warn_unused("attn_drop", attn_drop)
        self.dim = dim
        self.mode = mode
        # In upstream's order, so that a seed initialises both alike.
        self.fc_h = nn.Conv2d(dim, dim, 1, bias=qkv_bias)
        self.fc_w = nn.Conv2d(dim, dim, 1, bias=qkv_bias)
        self.fc_c = nn.Conv2d(dim, dim, 1, bias=qkv_bias)
        self.tfc_h = nn.Conv2d(2 * dim, dim, (1, TAPS), padding=(0, TAPS // 2), groups=dim, bias=False)
        self.tfc_w = nn.Conv2d(2 * dim, dim, (TAPS, 1), padding=(TAPS // 2, 0), groups=dim, bias=False)
        self.reweight = Mlp(dim, dim // 4, 3 * dim)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.proj_drop = nn.Dropout(checks.check_probability("proj_drop", proj_drop))
        self.theta_h_conv = self._phase()
        self.theta_w_conv = self._phase()

    def _phase(self) -> nn.Sequential:
        conv = (
            nn.Conv2d(self.dim, self.dim, 1)
            if self.mode == "fc"
            else nn.Conv2d(self.dim, self.dim, 3, padding=1, groups=self.dim, bias=False)
        )
        return nn.Sequential(conv, nn.BatchNorm2d(self.dim), nn.ReLU())

    def check_input(self, x: Tensor) -> None:
        if isinstance(x, fx.Proxy):
            return
        checks.check_tensor("x", x, 4, f"(N, {self.dim}, H, W)")
        if x.shape[1] != self.dim:
            raise ValueError(f"x: expected {self.dim} channels (dim), got shape {tuple(x.shape)}")

    def branch_weights(self, mean: Tensor) -> Tensor:
        """Mean of ``h + w + c`` over H and W, (N, dim, 1, 1), to the weights of h, w, c, (N, dim, 3)."""
        return self.reweight(mean).reshape(mean.shape[0], self.dim, 3).softmax(2)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        h = self.tfc_h(as_wave(self.fc_h(x), self.theta_h_conv(x)))
        w = self.tfc_w(as_wave(self.fc_w(x), self.theta_w_conv(x)))
        c = self.fc_c(x)
        a = self.branch_weights(F.adaptive_avg_pool2d(h + w + c, 1))
        return self.proj_drop(self.proj(branch_sum(h, w, c, a)))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, mode={self.mode!r}"


class DropPath(nn.Module):
    """Stochastic depth: in training, each sample of the batch is zeroed with probability ``drop_prob``, the others are
    scaled by ``1 / (1 - drop_prob)``."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = checks.check_probability("drop_prob", drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return fx.call_module(self, x)
        factors = self.factors(x)
        return x if factors is None else x * factors

    def factors(self, x: Tensor) -> Tensor | None:
        """The factor of each sample of x, (N, 1, ...) in the dtype of x, or None for 1."""
        if not self.training or self.drop_prob == 0:
            return None
        keep = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return mask / keep if keep > 0 else mask

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3g}"


class WaveBlock(nn.Module):
    """``x + PATM(norm1(x))``, then ``x + MLP(norm2(x))``: (N, dim, H, W) -> the same shape.

    Args:
        dim: channels, at least 4.
        mlp_ratio: hidden channels of the MLP as a multiple of ``dim``.
        qkv_bias, mode: as :class:`PATM` takes them.
        qk_scale, drop, attn_drop: unused, as upstream; other than None and 0 they warn.
        drop_path: probability of :class:`DropPath` in both branches.
        act_layer: activation of the MLP.
        norm_layer: called with ``dim`` for each norm.
        token_mixer: what takes PATM's place.
        channel_mixer: what takes :class:`Mlp`'s place.

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
        token_mixer: TokenMixer = PATM,
        channel_mixer: Callable[..., nn.Module] = Mlp,
    ) -> None:
        super().__init__()
        warn_unused("drop", drop)
        self.norm1 = norm_layer(dim)
        self.attn = token_mixer(dim, qkv_bias=qkv_bias, qk_scale=qk_scale, attn_drop=attn_drop, mode=mode)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = channel_mixer(dim, int(dim * mlp_ratio), act_layer=act_layer)

    def mix_tokens(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.attn(self.norm1(x)))

    def mix_channels(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix_channels(self.mix_tokens(x))
