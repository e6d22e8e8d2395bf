"""WTConv's wavelet part in plain PyTorch: the specification of its kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.haar.reference import butterfly


def bands_of(x: Tensor) -> Tensor:
    """The four Haar bands (N, C, 4, h, w) of an image, zeros past an odd size."""
    x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
    return torch.stack(butterfly(*(x[..., p::2, q::2] for p in (0, 1) for q in (0, 1))), 2)


def image_of(bands: Tensor, size: Sequence[int]) -> Tensor:
    """Inverse of :func:`bands_of`, cropped to ``size``."""
    a, b, c, d = butterfly(*bands.unbind(2))
    image = torch.stack((torch.stack((a, b), -1), torch.stack((c, d), -1)), -3)
    n, channels, h, _, w, _ = image.shape
    return image.reshape(n, channels, 2 * h, 2 * w)[..., : size[0], : size[1]]


def wtconv(
    x: Tensor, add: Tensor | None, taps: Sequence[Tensor], scales: Sequence[Tensor], transposed: bool = False
) -> Tensor:
    """The same as :func:`wavemix_kernels.ops.wtconv.wtconv`; ``transposed``: the transpose, whose taps are mirrored."""
    low, kept = x, []
    for of_level, scale in zip(taps, scales, strict=True):
        weight = of_level.flip(2, 3) if transposed else of_level
        bands = bands_of(low)
        wide = F.conv2d(bands.flatten(1, 2), weight.to(x.dtype), padding=weight.shape[2] // 2, groups=len(weight))
        made = wide * scale.reshape(-1, 1, 1).to(x.dtype)
        kept.append((made.reshape(bands.shape), low.shape[2:]))
        low = bands[:, :, 0]
    back: Tensor | None = None
    for bands, size in reversed(kept):
        if back is not None:
            bands = torch.cat(((bands[:, :, 0] + back).unsqueeze(2), bands[:, :, 1:]), 2)
        back = image_of(bands, size)
    assert back is not None  # there is one level at least
    return back if add is None else add + back


def backward(
    grad: Tensor, x: Tensor, taps: Sequence[Tensor], scales: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of all taps (levels, 4C, 1, k, k) and of all scales (levels, 4C), in the type of the
    arithmetic."""
    wide = accumulate_dtype(x.dtype)
    grad, low = grad.to(wide), x.to(wide)
    d_x = wtconv(grad, None, [t.to(wide) for t in taps], scales, transposed=True)
    d_taps, d_scales = [], []
    for of_level, scale in zip(taps, scales, strict=True):
        bands, grads = bands_of(low), bands_of(grad)
        reach = [of_level.shape[2] // 2] * 2
        _, sums, _ = torch.ops.aten.convolution_backward(
            grads.flatten(1, 2), bands.flatten(1, 2), of_level.to(wide), None, [1, 1], reach, [1, 1], False, [0, 0],
            len(of_level), (False, True, False),
        )  # fmt: skip
        d_taps.append(sums * scale.reshape(-1, 1, 1, 1).to(wide))
        d_scales.append((sums * of_level.to(wide)).sum((1, 2, 3)))
        low, grad = bands[:, :, 0], grads[:, :, 0]
    return d_x, torch.stack(d_taps), torch.stack(d_scales)
