"""PATM in evaluation: constants folded and joined, no gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import convolutions, products
from wavemix_kernels.ops.patm import branch_weights, branches, phases, reference, whole
from wavemix_kernels.ops.patm.op import runs_whole
from wavemix_kernels.ops.patm.weights import Affine, Weights


class Folded(NamedTuple):
    """Weights and affine maps by their names, but for the 1x1 convolutions of the image: ``joined`` (3C, C, 1, 1) is
    those of z_h, z_w and z_c one after the other, or (5C, C, 1, 1) with theta_h and theta_w. The fields ``theta_h`` and
    ``theta_w`` are depthwise convolutions, or None."""

    joined: Tensor
    joined_bias: Tensor | None
    theta_h: Tensor | None
    theta_w: Tensor | None
    proj: Tensor
    proj_bias: Tensor | None
    scale_h: Tensor
    shift_h: Tensor
    scale_w: Tensor
    shift_w: Tensor
    taps_h: Tensor
    taps_w: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor

    def affine(self) -> Affine:
        return Affine(self.scale_h, self.shift_h, self.scale_w, self.shift_w)

    def mlp(self) -> branch_weights.Mlp:
        return branch_weights.Mlp(self.fc1, self.fc1_bias, self.fc2, self.fc2_bias)


def evaluate(image: Tensor, f: Folded, backend: str, channels_last: bool = True) -> Tensor:
    """PATM of an image (N, C, H, W) in the dtype of ``f.joined``, without gradient; channels_last, or
    contiguous where that is asked for and costs nothing. Backend ``"reference"`` has standard operators only."""
    if backend == "reference":
        return _evaluate_standard(image, f)
    if (name := runs_whole(image, backend, f.theta_h is not None, f.fc1.shape[0], f.joined.dtype)) is not None:
        z_h, z_w, z_c, theta_h, theta_w = f.joined.chunk(5)
        biases = (None,) * 5 if f.joined_bias is None else f.joined_bias.chunk(5)
        weights = Weights(
            z_h, biases[0], z_w, biases[1], z_c, biases[2], theta_h, biases[3], theta_w, biases[4], f.proj,
            f.proj_bias, f.taps_h, f.taps_w, *f.mlp(),
        )  # fmt: skip
        return whole.forward(whole.Image(image, None, None), None, False, weights, f.affine(), name, channels_last)[0]
    image = image.contiguous(memory_format=torch.channels_last)
    z_h, z_w, z_c, *thetas = _images(image, products.project(image, f.joined, f.joined_bias), f)
    part = choose.for_part(backend, phases.BACKENDS)
    h, w, s = phases.fused(z_h, z_w, z_c, *thetas, *f.affine(), f.taps_h, f.taps_w, part)
    a, _ = branch_weights.branch_weights(s, image.shape[2] * image.shape[3], f.mlp(), backend)
    mixed = branches.branch_sum(h, w, z_c, a, choose.for_part(backend, branches.BACKENDS))
    return products.project(mixed, f.proj, f.proj_bias)


def _evaluate_standard(image: Tensor, f: Folded) -> Tensor:
    z_h, z_w, z_c, theta_h, theta_w = _images(image, F.conv2d(image, f.joined, f.joined_bias), f)
    h, w, s = reference.phase_aggregate(z_h, z_w, z_c, theta_h, theta_w, *f.affine(), f.taps_h, f.taps_w)
    a = branch_weights.standard(s / (image.shape[2] * image.shape[3]), f.mlp())
    return F.conv2d(reference.branch_sum(h, w, z_c, a), f.proj, f.proj_bias)


def _images(image: Tensor, projected: Tensor, f: Folded) -> list[Tensor]:
    """z_h, z_w, z_c, theta_h, theta_w, from what the joined convolution makes."""
    channels = image.shape[1]
    parts = list(projected.split(channels, 1))
    if f.theta_h is not None and f.theta_w is not None:
        parts += [convolutions.conv2d(image, theta, padding=1, groups=channels) for theta in (f.theta_h, f.theta_w)]
    return parts
