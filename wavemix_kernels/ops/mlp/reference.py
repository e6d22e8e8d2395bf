"""The pointwise MLP and its counter-based dropout in plain PyTorch: the specification of their kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32x32-bit product, in int64 without overflow."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(group: Tensor, seed: int) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011) of the counters (group, 0): (..., 4) random 32-bit words as int64."""
    c0, c1 = group & _MASK, group >> 32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), -1)


def halves(group: Tensor, seed: int) -> Tensor:
    """The words of :func:`philox` in two, low half first: (..., 8) random 16-bit numbers as int64."""
    words = philox(group, seed)
    return torch.stack((words & 0xFFFF, words >> 16), -1).flatten(-2)


#: Dropout's probability is a multiple of one in so many.
STEPS = 2**16


def dropout(p: float) -> tuple[int, float]:
    """How many of :data:`STEPS` are kept at probability ``p`` of dropping, and what they are multiplied by."""
    threshold = round((1 - p) * STEPS)
    return threshold, STEPS / threshold if threshold else 0.0


def keep_mask(rows: int, cols: int, p: float, seed: int, device: torch.device) -> Tensor:
    """Mask of the elements of a (rows, cols) matrix that dropout keeps: eight columns share one Philox call."""
    groups = (cols + 7) // 8
    return halves(torch.arange(rows * groups, device=device), seed).reshape(rows, groups * 8)[:, :cols] < dropout(p)[0]


def pointwise_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    second: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    p: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """conv1x1 -> GELU -> Dropout -> conv1x1 of ``[x | second*scale + shift]`` (N, C, H, W)."""
    if second is not None:
        if scale is not None:
            assert shift is not None
            second = second * scale[:, None, None].to(second.dtype) + shift[:, None, None].to(second.dtype)
        x = torch.cat((x, second), 1)
    hidden = F.gelu(F.conv2d(x, w1[:, :, None, None], b1))
    if p > 0:
        n, k, h, w = hidden.shape
        keep = keep_mask(n * h * w, k, p, seed, x.device).reshape(n, h, w, k).permute(0, 3, 1, 2)
        hidden = hidden * keep * dropout(p)[1]
    return F.conv2d(hidden, w2[:, :, None, None], b2)
