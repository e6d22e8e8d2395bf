"""PATM in plain PyTorch: the specification that its kernels are held to. The mathematics stand at the head
of :mod:`wavemix_kernels.nn.wavemlp.reference`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels import fx
from wavemix_kernels.ops.common.dtypes import accumulate_dtype

TAPS = 7


def as_wave(z: Tensor, theta: Tensor) -> Tensor:
    """Amplitude and phase (N, C, H, W) to the real and imaginary parts (N, 2C, H, W)."""
    return torch.cat((z * torch.cos(theta), z * torch.sin(theta)), 1)


def phase_aggregate(
    z_h: Tensor, z_w: Tensor, z_c: Tensor, theta_h: Tensor, theta_w: Tensor, scale_h: Tensor, shift_h: Tensor,
    scale_w: Tensor, shift_w: Tensor, taps_h: Tensor, taps_w: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Everything of PATM between its projections and its branch weights, as
    :func:`wavemix_kernels.ops.patm.phases.phase_aggregate` describes it. h and w are rounded once, to the dtype of z_h;
    s is in the accumulation dtype."""
    dtype = accumulate_dtype(z_h.dtype)

    def aggregate(z: Tensor, theta: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
        # Phases have no upper bound, so a half type's spacing there would reach whole radians.
        phase = F.relu(theta.to(dtype) * scale.to(dtype)[:, None, None] + shift.to(dtype)[:, None, None])
        padding = (weight.shape[2] // 2, weight.shape[3] // 2)
        return F.conv2d(as_wave(z.to(dtype), phase), weight.to(dtype), padding=padding, groups=z.shape[1])

    h = aggregate(z_h, theta_h, scale_h, shift_h, taps_h)
    w = aggregate(z_w, theta_w, scale_w, shift_w, taps_w)
    s = (h + w + z_c.to(dtype)).sum((2, 3))
    return h.to(z_h.dtype), w.to(z_h.dtype), s


def branch_sum(h: Tensor, w: Tensor, c: Tensor, a: Tensor) -> Tensor:
    """The branches h, w, c (N, C, H, W) weighted by a (N, C, 3), in that order, rounded once to the dtype of h."""
    if isinstance(h, fx.Proxy):
        return fx.call_function(branch_sum, h, w, c, a)
    a_h, a_w, a_c = a.to(accumulate_dtype(h.dtype))[..., None, None].unbind(2)
    return (h * a_h + w * a_w + c * a_c).to(h.dtype)


def patm(image: Tensor, weights: Mapping[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    """PATM of an image, in its dtype and without the rounding of images in between.

    Args:
        image: (N, C, H, W).
        weights: by the names of :class:`wavemix_kernels.ops.patm.weights.Weights` and its ``Affine``.

    Returns:
        The output, and (N, C) the mean over H and W of ``h + w + z_c``.
    """
    t = {name: None if weight is None else weight.to(image.dtype) for name, weight in weights.items()}

    def project(name: str) -> Tensor:
        return F.conv2d(image, t[name], t[f"{name}_bias"])  # type: ignore[arg-type]

    z_h, z_w, z_c, *thetas = map(project, ("z_h", "z_w", "z_c", "theta_h", "theta_w"))
    rest = (t[name] for name in ("scale_h", "shift_h", "scale_w", "shift_w", "taps_h", "taps_w"))
    h, w, s = phase_aggregate(z_h, z_w, z_c, *thetas, *rest)
    mean = s / (image.shape[2] * image.shape[3])
    hidden = F.gelu(F.linear(mean, t["fc1"].flatten(1), t["fc1_bias"]))  # type: ignore[union-attr]
    logits = F.linear(hidden, t["fc2"].flatten(1), t["fc2_bias"])  # type: ignore[union-attr]
    mixed = branch_sum(h, w, z_c, logits.reshape(*mean.shape, 3).softmax(2))
    return F.conv2d(mixed, t["proj"], t["proj_bias"]), mean  # type: ignore[arg-type]
