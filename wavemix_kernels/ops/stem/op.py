"""Convolutions of an image with nothing between them, as one: a WaveMix model's stem.

The map is linear, so its weights are folded: two or three convolutions of three channels, up to 96 and 192 become one
of three to 192 over 8x8 pixels. No activation between them is made or kept.
At the border the inner convolution's padding is zeros, which is not what the outer one's weights would find there:
outputs whose patch reaches it have weights of their own, folded without the taps outside.

A CPU multiplies copied patches (:mod:`patches <wavemix_kernels.ops.stem.patches>`), a GPU convolves blocks of pixels
(:mod:`blocks <wavemix_kernels.ops.stem.blocks>`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wavemix_kernels import log
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common.kept import Kept
from wavemix_kernels.ops.common.transforms import standard_wanted
from wavemix_kernels.ops.stem import blocks, patches
from wavemix_kernels.ops.stem.geometry import Convolution, geometry


def products(convolutions: Sequence[Convolution], n: int, h: int, w: int) -> tuple[int, int]:
    """Multiplications forward for ``n`` images of (h, w): of the folded convolution, folding included, and apart."""
    way = geometry(convolutions)
    apart = 0
    for one in convolutions:
        h, w = one.size(h), one.size(w)
        apart += n * h * w * one.weight.numel()
    inner, outputs = way.inner.weight, convolutions[-1].weight.shape[0]
    folding = outputs * way.k**2 * inner.numel()
    if len(convolutions) == 3:
        folding += convolutions[2].weight.numel() * convolutions[1].weight[0].numel()
    return n * h * w * outputs * way.window**2 * inner.shape[1] + folding, apart


def why_not(x: Tensor, convolutions: Sequence[Convolution]) -> str | None:
    """Why :func:`run` does not take ``convolutions`` of ``x``, or None: it can, and :func:`choose.stem` says so."""
    if not 2 <= len(convolutions) <= 3:
        return f"{len(convolutions)} convolutions follow each other, expected 2 or 3"
    if len(convolutions) == 3 and convolutions[2].padding:
        return f"the third convolution has padding {convolutions[2].padding}, expected 0"
    weight, autocast = convolutions[0].weight, torch.is_autocast_enabled(x.device.type)
    if x.dim() != 4 or x.shape[1] != weight.shape[1] or x.device != weight.device:
        return f"the image is {tuple(x.shape)} on {x.device}, the first weight {tuple(weight.shape)} on {weight.device}"
    if any(one.weight.dtype != x.dtype for one in convolutions) and not autocast:
        return f"the image is {x.dtype}, and a weight is not"
    if x.device.type != "cpu" and x.requires_grad and torch.is_grad_enabled():
        return "the image has a gradient"
    if x.device.type != "cpu" and (reason := standard_wanted()) is not None:
        return reason
    n, h, w = x.shape[0], x.shape[2], x.shape[3]
    for i, one in enumerate(convolutions):
        h, w = one.size(h), one.size(w)
        if min(h, w) < 1:
            return f"convolution {i} leaves {h}x{w} pixels"
    folded, apart = products(convolutions, n, x.shape[2], x.shape[3])
    if choose.stem(x.device.type, folded, apart) == "apart":
        return f"{folded} products as one, {apart} apart"
    return None


def serves(x: Tensor, convolutions: Sequence[Convolution]) -> bool:
    """Whether ``auto`` takes :func:`run`; logged once per shape and dtype.

    Not in a traced graph, which serves many sizes and holds the convolutions themselves.
    """
    if torch.compiler.is_compiling():
        return False
    reason = why_not(x, convolutions)
    if log.enabled():
        chosen = "folded" if reason is None else f"apart ({reason})"
        shape = tuple(x.shape)
        name = str(x.dtype).removeprefix("torch.")
        log.once(("stem", x.dtype, shape, chosen), lambda: f"stem {name} {shape}: {chosen}")
    return reason is None


def run(x: Tensor, convolutions: Sequence[Convolution], kept: Kept | None = None) -> Tensor:
    """The convolutions as one: x (N, C, H, W) -> (N, O, h, w), channels_last. ``kept``: where folded weights
    stay from call to call."""
    return (patches if x.device.type == "cpu" else blocks).folded(x, convolutions, kept)
