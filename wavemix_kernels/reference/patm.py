"""Phase-aware token mixing (PATM) of Wave-MLP (Tang et al., "An Image Patch is a Wave: Phase-Aware Vision MLP",
CVPR 2022, arXiv:2111.12294) in plain PyTorch: the specification of its kernels.

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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavemix_kernels import checks
from wavemix_kernels.reference.haar import accumulate_dtype

MODES = ("fc", "depthwise")
TAPS = 7


def as_wave(z: Tensor, theta: Tensor) -> Tensor:
    """Amplitude and phase (N, C, H, W) to the real and imaginary parts (N, 2C, H, W)."""
    return torch.cat((z * torch.cos(theta), z * torch.sin(theta)), 1)


def phase_aggregate(
    z_h: Tensor,
    z_w: Tensor,
    c: Tensor,
    theta_h: Tensor,
    theta_w: Tensor,
    scale_h: Tensor,
    shift_h: Tensor,
    scale_w: Tensor,
    shift_w: Tensor,
    w_h: Tensor,
    w_w: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Everything of PATM between its projections and its branch weights.

    Args:
        z_h, z_w, c: amplitudes along W and H, and the channel branch; (N, C, H, W), one dtype.
        theta_h, theta_w: what the BatchNorms of the phases read; (N, C, H, W) of that dtype.
        scale_h, shift_h, scale_w, shift_w: those BatchNorms as affine maps, phase = ReLU(scale theta + shift); (C,).
        w_h, w_w: taps of the grouped convolutions along W and H; (C, 2, 1, 7) and (C, 2, 7, 1).

    Returns:
        h, w (N, C, H, W) in the dtype of z_h, each rounded once, and s (N, C), the sums of ``h + w + c`` over H and W
        before that rounding, in the dtype of the arithmetic: fp32 for the half types.
    """
    dtype = accumulate_dtype(z_h.dtype)

    def aggregate(z: Tensor, theta: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
        # Phases have no upper bound, so a half type's spacing there would reach whole radians.
        phase = F.relu(theta.to(dtype) * scale.to(dtype)[:, None, None] + shift.to(dtype)[:, None, None])
        padding = (weight.shape[2] // 2, weight.shape[3] // 2)
        return F.conv2d(as_wave(z.to(dtype), phase), weight.to(dtype), padding=padding, groups=z.shape[1])

    h = aggregate(z_h, theta_h, scale_h, shift_h, w_h)
    w = aggregate(z_w, theta_w, scale_w, shift_w, w_w)
    s = (h + w + c.to(dtype)).sum((2, 3))
    return h.to(z_h.dtype), w.to(z_h.dtype), s


def branch_sum(h: Tensor, w: Tensor, c: Tensor, a: Tensor) -> Tensor:
    """The branches h, w, c (N, C, H, W) weighted by a (N, C, 3), in that order, rounded once to the dtype of h."""
    a_h, a_w, a_c = a.to(accumulate_dtype(h.dtype))[..., None, None].unbind(2)
    return (h * a_h + w * a_w + c * a_c).to(h.dtype)


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
