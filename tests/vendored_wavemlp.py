"""Wave-MLP's modules as a user's repository holds them: upstream's class, argument and layer names, written from the
published structure around this file's own stochastic depth."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class PATM(nn.Module):
    def __init__(self, dim, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0, mode="fc"):
        super().__init__()
        self.fc_h, self.fc_w, self.fc_c = (nn.Conv2d(dim, dim, 1, bias=qkv_bias) for _ in range(3))
        self.tfc_h = nn.Conv2d(2 * dim, dim, (1, 7), padding=(0, 3), groups=dim, bias=False)
        self.tfc_w = nn.Conv2d(2 * dim, dim, (7, 1), padding=(3, 0), groups=dim, bias=False)
        self.reweight = Mlp(dim, dim // 4, dim * 3)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.proj_drop = nn.Dropout(proj_drop)
        fc = mode == "fc"
        self.theta_h_conv, self.theta_w_conv = (
            nn.Sequential(
                nn.Conv2d(dim, dim, 1) if fc else nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False),
                nn.BatchNorm2d(dim),
                nn.ReLU(),
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        n, c, _, _ = x.shape
        theta_h, theta_w = self.theta_h_conv(x), self.theta_w_conv(x)
        z_h, z_w = self.fc_h(x), self.fc_w(x)
        h = self.tfc_h(torch.cat([z_h * torch.cos(theta_h), z_h * torch.sin(theta_h)], dim=1))
        w = self.tfc_w(torch.cat([z_w * torch.cos(theta_w), z_w * torch.sin(theta_w)], dim=1))
        c_branch = self.fc_c(x)
        a = self.reweight(F.adaptive_avg_pool2d(h + w + c_branch, 1))
        a = a.reshape(n, c, 3).permute(2, 0, 1).softmax(dim=0)[..., None, None]
        return self.proj_drop(self.proj(h * a[0] + w * a[1] + c_branch * a[2]))


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
