"""Wave-MLP's modules as a user's repository holds them: upstream's class, argument and layer names, written from the
published structure around this file's own stochastic depth. PATM's order of operations is the benchmarks'."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.harness.rivals import UpstreamPATM


class DropPath(nn.Module):
    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        return x.div(keep) * torch.floor(keep + torch.rand((len(x), 1, 1, 1), dtype=x.dtype))


class Mlp(nn.Module):
    def __init__(self, in_features, hidden_features=None, out_features=None, act_layer=nn.GELU, drop=0.0):
        super().__init__()
        self.fc1 = nn.Conv2d(in_features, hidden_features or in_features, 1)
        self.act = act_layer()
        self.fc2 = nn.Conv2d(hidden_features or in_features, out_features or in_features, 1)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class PATM(UpstreamPATM):
    def __init__(self, dim, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0, mode="fc"):
        super().__init__(dim, qkv_bias, mode=mode)
        self.reweight = Mlp(dim, dim // 4, dim * 3)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_drop(super().forward(x))


class WaveBlock(nn.Module):
    def __init__(self, dim, mlp_ratio=4.0, drop_path=0.0, norm_layer=nn.BatchNorm2d, mode="fc"):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = PATM(dim, mode=mode)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))
