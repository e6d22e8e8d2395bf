"""A block of Wave-MLP in plain PyTorch: the specification of the fused one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from wavemix_kernels import checks
from wavemix_kernels.reference.patm import PATM, Mlp, warn_unused

NormLayer = Callable[[int], nn.Module]
#: Called as ``token_mixer(dim, qkv_bias=..., qk_scale=..., attn_drop=..., mode=...)``; maps (N, dim, H, W) to itself.
TokenMixer = Callable[..., nn.Module]


class DropPath(nn.Module):
    """Stochastic depth: in training, each sample of the batch is zeroed with probability ``drop_prob``, the others are
    scaled by ``1 / (1 - drop_prob)``."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = checks.check_probability("drop_prob", drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * (mask / keep if keep > 0 else mask)

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
