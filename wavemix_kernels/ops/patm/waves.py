"""One wave branch as every backend of ``phase_aggregate`` takes it, and the gradient of both branches."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from wavemix_kernels.ops.common import layout
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.norm import batch_norm
from wavemix_kernels.ops.patm.statistics import line_through


def wide(t: Tensor, like: Tensor) -> Tensor:
    return t.to(accumulate_dtype(like.dtype)).contiguous()


class Branch(NamedTuple):
    """Images z and theta (N, C, H, W); scale and shift (C); taps (C, 2, 1, 7) along W or (C, 2, 7, 1) along H. Kernels
    take an even C, images with contiguous channels and the others contiguous in the accumulation dtype."""

    z: Tensor
    theta: Tensor
    scale: Tensor
    shift: Tensor
    taps: Tensor

    @property
    def axis(self) -> int:
        """The axis that the taps lie along."""
        return 2 if self.taps.shape[3] == 1 else 3

    def for_kernels(self) -> Branch:
        images = layout.channels_inner(self.z), layout.channels_inner(self.theta)
        return Branch(*images, *(wide(t, self.z) for t in self[2:]))


Branches = tuple[Branch, Branch]  # along W, along H


def in_pairs(why_not: Callable[..., str | None]) -> Callable[..., str | None]:
    """A probe of kernels, which also take whole pairs of channels."""

    def probe(*tensors: Tensor) -> str | None:
        if (reason := why_not(*tensors)) is not None:
            return reason
        odd = next((t.shape[1] for t in tensors if t.shape[1] % 2), None)
        return None if odd is None else f"it takes an even number of channels, got {odd}"

    return probe


class Cotangent(NamedTuple):
    """The gradient of a branch's outputs, ``grad * a + b``; that of z_c is ``grad * a_c + b``. ``center`` (C) is the
    mean of theta that sums are taken about, None for 0."""

    grad: Tensor
    a: Tensor | None
    b: Tensor
    a_c: Tensor | None
    center: Tensor | None


class Batch(NamedTuple):
    """Batch statistics that the affine maps come from, (2, C) of theta_h and theta_w."""

    mean: Tensor
    invstd: Tensor


class Cotangents(NamedTuple):
    """Gradients of h, w and z_c: ``grad_h a[0] + grad_s``, ``grad_w a[1] + grad_s`` and ``grad_h a[2] + grad_s`` with a
    (3, N, C), or ``grad_h + grad_s``, ``grad_w + grad_s`` and ``grad_s`` with a None."""

    grad_h: Tensor
    grad_w: Tensor
    grad_s: Tensor
    a: Tensor | None

    def of(self, i: int, batch: Batch | None) -> Cotangent:
        """The branch along W or along H, for kernels; the first has that of z_c, too."""
        grad = layout.channels_inner((self.grad_h, self.grad_w)[i])
        a = None if self.a is None else wide(self.a, grad)
        center = None if batch is None else wide(batch.mean[i], grad)
        a_i, a_c = (None, None) if a is None else (a[i], a[2] if i == 0 else None)
        return Cotangent(grad, a_i, wide(self.grad_s, grad), a_c, center)


class Gradients(NamedTuple):
    """Results of the backward pass.

    Attributes:
        images: gradients of z_h, z_w, z_c, theta_h, theta_w: one (N, 5C, H, W) where joined, else [(N, 3C, H, W) of the
            first three, (N, C, H, W), (N, C, H, W)].
        sums: (2, 2, C), for theta_h and theta_w the sums of d and of ``d (theta - mean)`` with d the gradient of the
            phase before ReLU: the gradients of shift and scale (where ``mean`` is None).
        taps_h, taps_w: gradients of the taps.
    """

    images: list[Tensor]
    sums: Tensor
    taps_h: Tensor
    taps_w: Tensor

    def slots(self) -> tuple[Tensor, ...]:
        """z_h, z_w, z_c, theta_h, theta_w of ``images``: views."""
        return slots(self.images)


def slots(images: list[Tensor]) -> tuple[Tensor, ...]:
    if len(images) == 1:
        return images[0].chunk(5, 1)
    return (*images[0].chunk(3, 1), *images[1:])


def empty_images(like: Tensor, joined: bool) -> list[Tensor]:
    n, c, h, w = like.shape
    return [layout.empty(like, [n, k * c, h, w], True) for k in ((5,) if joined else (3, 1, 1))]


#: (branch, cotangent, d_z, d_theta, d_c or None) -> gradient of the taps, sums (2, C); the images are written.
BranchBackward = Callable[[Branch, Cotangent, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def line(z: Tensor, sums: Tensor, scale: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Rise and offset of ``rise theta + offset``, which batch statistics add to theta's gradient."""
    rise, offset = line_through(sums, scale, batch.invstd, z.shape[0] * z.shape[2] * z.shape[3])
    return rise, torch.addcmul(offset, rise, batch.mean, value=-1)


def by_branch(one: BranchBackward, backend: str) -> Callable[..., Gradients]:
    """The gradient of both branches, one after the other, from that of one with statistics as constants."""
    add_line = batch_norm.BACKENDS[backend].functions["backward"]

    def backward(branches: Branches, cotangents: Cotangents, batch: Batch | None, joined: bool) -> Gradients:
        z = branches[0].z
        images = empty_images(z, joined)
        d_z_h, d_z_w, d_c, *d_thetas = slots(images)
        if cotangents.a is None:
            d_c.copy_(wide(cotangents.grad_s, z)[:, :, None, None].expand(d_c.shape))
        sums, taps = [], []
        for i, (branch, d_z, d_theta) in enumerate(zip(branches, (d_z_h, d_z_w), d_thetas, strict=True)):
            read, cotangent = branch.for_kernels(), cotangents.of(i, batch)
            third = None if cotangent.a_c is None else d_c
            d_taps, sums_i = one(read, cotangent, d_z, d_theta, third)
            if batch is not None:
                rise, offset = line(z, sums_i, read.scale, Batch(batch.mean[i], batch.invstd[i]))
                add_line(d_theta, read.theta, torch.ones_like(rise), rise, offset, d_theta)
            sums.append(sums_i)
            taps.append(d_taps.to(branch.taps.dtype))
        return Gradients(images, torch.stack(sums), *taps)

    return backward
