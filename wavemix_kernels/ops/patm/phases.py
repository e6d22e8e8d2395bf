"""``phase_aggregate``: everything of PATM between its projections and its branch weights, in one pass over memory.

BatchNorm as an affine map, ReLU, sine and cosine, the 7-tap convolutions along W and H, and the spatial sums. Neither
phases nor waves reach memory; backward makes them again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wavemix_kernels import backends, checks, fx
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import layout, selftest
from wavemix_kernels.ops.common.autograd import differentiable
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.common.library import Library
from wavemix_kernels.ops.patm import phases_native as native
from wavemix_kernels.ops.patm import reference, waves
from wavemix_kernels.ops.patm.waves import Batch, Branch, Branches, Cotangent, Cotangents, Gradients

_PHASES = (
    "Tensor theta_h, Tensor theta_w, Tensor scale_h, Tensor shift_h, Tensor scale_w, Tensor shift_w, "
    "Tensor taps_h, Tensor taps_w"
)
_library = Library()
_library.define(
    f"phase_aggregate(Tensor z_h, Tensor z_w, Tensor z_c, {_PHASES}, str backend) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "phase_aggregate_backward(Tensor grad_h, Tensor grad_w, Tensor grad_s, Tensor? a, Tensor z_h, Tensor z_w, "
    f"{_PHASES}, Tensor? mean, Tensor? invstd, bool joined, str backend) -> Tensor[]"
)


def phase_aggregate(
    z_h: Tensor, z_w: Tensor, z_c: Tensor, theta_h: Tensor, theta_w: Tensor, scale_h: Tensor, shift_h: Tensor,
    scale_w: Tensor, shift_w: Tensor, taps_h: Tensor, taps_w: Tensor, *, backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The wave branches of PATM and what their weights depend on.

    With ``phase = ReLU(scale theta + shift)`` and ``u = [z cos(phase) | z sin(phase)]``: h is a 7-tap convolution of
    u_h along W in C groups, w one of u_w along H. Phases are fp32 (fp64 for fp64) and may be of any size. Under
    autocast the images take the autocast dtype, as a convolution's do.

    Args:
        z_h, z_w, z_c: amplitudes along W and H, and the channel branch; (N, C, H, W), float64, float32, float16 or
            bfloat16. Contiguous channels (channels_last and slices of it) are read in place.
        theta_h, theta_w: phases before their affine maps; shape and dtype of z_h.
        scale_h, shift_h, scale_w, shift_w: (C).
        taps_h, taps_w: taps, (C, 2, 1, 7) and (C, 2, 7, 1), of any of these dtypes.
        backend: for this call instead of the ambient :class:`wavemix_kernels.backend`. Kernels want an even C.

    Returns:
        h and w, (N, C, H, W), channels_last in the dtype of z_h, and s (N, C): the sums of ``h + w + z_c`` over H and W
        before h and w are rounded, fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: types, shapes, dtypes or devices that do not belong together.

    Backward is not differentiable again, except on backend ``"reference"``.

    Source: Tang et al., arXiv:2111.12294.
    """
    if isinstance(z_h, fx.Proxy):
        tensors = z_h, z_w, z_c, theta_h, theta_w, scale_h, shift_h, scale_w, shift_w, taps_h, taps_w
        return fx.call_function(phase_aggregate, *tensors, backend=backends.requested(backend))
    checks.check_tensor("z_h", z_h, 4, "(N, C, H, W)")
    z_h, z_w, z_c, theta_h, theta_w = checks.autocast(z_h, z_w, z_c, theta_h, theta_w)
    channels = z_h.shape[1]
    for name, tensor in (("z_w", z_w), ("z_c", z_c), ("theta_h", theta_h), ("theta_w", theta_w)):
        if tensor.shape != z_h.shape:
            raise ValueError(f"{name}: expected the shape of z_h, {tuple(z_h.shape)}, got {tuple(tensor.shape)}")
        checks.check_same_device(name, tensor, "z_h", z_h)
        checks.check_same_dtype(name, tensor, "z_h", z_h)
    vectors = {"scale_h": scale_h, "shift_h": shift_h, "scale_w": scale_w, "shift_w": shift_w}
    shapes = [
        *((name, tensor, (channels,)) for name, tensor in vectors.items()),
        ("taps_h", taps_h, (channels, 2, 1, reference.TAPS)),
        ("taps_w", taps_w, (channels, 2, reference.TAPS, 1)),
    ]
    for name, tensor, shape in shapes:
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name}: expected shape {shape} to go with z_h {tuple(z_h.shape)}, got {tuple(tensor.shape)}"
            )
        checks.check_same_device(name, tensor, "z_h", z_h)
    arguments = z_h, z_w, z_c, theta_h, theta_w, scale_h, shift_h, scale_w, shift_w, taps_h, taps_w
    chosen = backends.requested(backend)
    if chosen == "reference":
        return reference.phase_aggregate(*arguments)
    h, w, s = fused(*arguments, chosen)
    return h, w, s


# --- Triton ----------------------------------------------------------------------------------------------


def _triton_forward(branches: Branches, z_c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from wavemix_kernels.ops.patm import triton_phases as kernels

    h, w = (layout.empty(z_c, z_c.shape, True) for _ in range(2))
    along_w, along_h = (branch.for_kernels() for branch in branches)
    partial = kernels.forward(h, along_w, layout.channels_inner(z_c)), kernels.forward(w, along_h)
    return h, w, torch.cat(partial).sum(0)


def _triton_branch_backward(
    branch: Branch, cotangent: Cotangent, d_z: Tensor, d_theta: Tensor, d_c: Tensor | None
) -> tuple[Tensor, Tensor]:
    from wavemix_kernels.ops.patm import triton_phases_backward as kernels

    return kernels.backward(d_z, d_theta, d_c, cotangent, branch)


# --- Reference -------------------------------------------------------------------------------------------


def _reference_forward(branches: Branches, z_c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (z_h, theta_h, scale_h, shift_h, taps_h), (z_w, theta_w, scale_w, shift_w, taps_w) = branches
    h, w, s = reference.phase_aggregate(
        z_h, z_w, z_c, theta_h, theta_w, scale_h, shift_h, scale_w, shift_w, taps_h, taps_w
    )
    return layout.laid_out(h, True), layout.laid_out(w, True), s


def _reference_branch_backward(grad: Tensor, branch: Branch, center: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of z, theta and taps, and both sums. By hand: an operator runs below autograd."""
    wide = accumulate_dtype(branch.z.dtype)
    z, theta, scale, shift, taps = (t.to(wide) for t in branch)
    pre = theta * scale[:, None, None] + shift[:, None, None]
    cosine, sine = pre.relu().cos(), pre.relu().sin()
    padding = [taps.shape[2] // 2, taps.shape[3] // 2]
    d_wave, d_taps, _ = torch.ops.aten.convolution_backward(
        grad, torch.cat((z * cosine, z * sine), 1), taps, None, [1, 1], padding, [1, 1], False, [0, 0], z.shape[1],
        (True, True, False),
    )  # fmt: skip
    real, imaginary = d_wave.chunk(2, 1)
    d_pre = torch.where(pre <= 0, 0.0, z * (imaginary * cosine - real * sine))
    centered = theta if center is None else theta - center[:, None, None]
    sums = torch.stack((d_pre.sum((0, 2, 3)), (d_pre * centered).sum((0, 2, 3))))
    return real * cosine + imaginary * sine, d_pre * scale[:, None, None], d_taps, sums


def _reference_backward(branches: Branches, cotangents: Cotangents, batch: Batch | None, joined: bool) -> Gradients:
    z = branches[0].z
    wide = accumulate_dtype(z.dtype)
    grad_h, grad_w, grad_s = (t.to(wide) for t in cotangents[:3])
    grad_s = grad_s[:, :, None, None]
    a_h, a_w, a_c = (1.0, 1.0, 0.0) if cotangents.a is None else cotangents.a.to(wide)[..., None, None].unbind(0)
    amplitudes, d_thetas, sums, taps = [], [], [], []
    for i, (branch, d) in enumerate(zip(branches, (grad_h * a_h + grad_s, grad_w * a_w + grad_s), strict=True)):
        center = None if batch is None else batch.mean[i]
        d_z, d_theta, d_taps, of_branch = _reference_branch_backward(d, branch, center)
        if batch is not None:
            rise, offset = waves.line(z, of_branch, branch.scale.to(wide), Batch(batch.mean[i], batch.invstd[i]))
            d_theta = d_theta + rise[:, None, None] * branch.theta + offset[:, None, None]
        amplitudes.append(d_z)
        d_thetas.append(d_theta)
        sums.append(of_branch)
        taps.append(d_taps.to(branch.taps.dtype).contiguous())
    d_c = grad_s.expand(z.shape) if cotangents.a is None else grad_h * a_c + grad_s
    images = waves.empty_images(z, joined)
    for slot, value in zip(waves.slots(images), (*amplitudes, d_c, *d_thetas), strict=True):
        slot.copy_(value)
    return Gradients(images, torch.stack(sums), *taps)


BACKENDS: dict[str, backends.Backend] = {
    "cuda": backends.Backend(
        waves.in_pairs(backends.cuda_why_not), {"forward": native.cuda_forward, "backward": native.cuda_backward}
    ),
    "triton": backends.Backend(
        waves.in_pairs(backends.triton_why_not),
        {"forward": _triton_forward, "backward": waves.by_branch(_triton_branch_backward, "triton")},
    ),
    "cpu": backends.Backend(
        waves.in_pairs(backends.cpu_why_not), {"forward": native.cpu_forward, "backward": native.cpu_backward}
    ),
    "reference": backends.Backend(
        backends.reference_why_not, {"forward": _reference_forward, "backward": _reference_backward}
    ),
}


# --- The operators ---------------------------------------------------------------------------------------


def _branches(
    z_h: Tensor, z_w: Tensor, theta_h: Tensor, theta_w: Tensor, scale_h: Tensor, shift_h: Tensor, scale_w: Tensor,
    shift_w: Tensor, taps_h: Tensor, taps_w: Tensor,
) -> Branches:  # fmt: skip
    return Branch(z_h, theta_h, scale_h, shift_h, taps_h), Branch(z_w, theta_w, scale_w, shift_w, taps_w)


def _forward_op(z_h: Tensor, z_w: Tensor, z_c: Tensor, theta_h: Tensor, theta_w: Tensor, *rest: Any) -> Any:
    chosen = choose.select("phase_aggregate", BACKENDS, rest[-1], z_h, z_w, z_c, theta_h, theta_w)
    return chosen.functions["forward"](_branches(z_h, z_w, theta_h, theta_w, *rest[:-1]), z_c)


def _backward_op(*arguments: Any) -> list[Tensor]:
    cotangents, tensors = Cotangents(*arguments[:4]), arguments[4:14]
    mean, invstd, joined, backend = arguments[14:]
    chosen = choose.select("phase_aggregate_backward", BACKENDS, backend, *tensors[:4], *cotangents[:2])
    batch = None if mean is None else Batch(mean, invstd)
    out = chosen.functions["backward"](_branches(*tensors), cotangents, batch, joined)
    return [*out.images, *out[1:]]


def _forward_fake(z_h: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    sums = z_h.new_empty(z_h.shape[:2], dtype=accumulate_dtype(z_h.dtype))
    return layout.empty(z_h, z_h.shape, True), layout.empty(z_h, z_h.shape, True), sums


def _backward_fake(*arguments: Any) -> list[Tensor]:
    z_h, taps_h, taps_w, joined = arguments[4], arguments[12], arguments[13], arguments[16]
    sums = z_h.new_empty((2, 2, z_h.shape[1]), dtype=accumulate_dtype(z_h.dtype))
    return [*waves.empty_images(z_h, joined), sums, taps_h.new_empty(taps_h.shape), taps_w.new_empty(taps_w.shape)]


_library.impl("phase_aggregate", _forward_op, "CompositeExplicitAutograd")
_library.impl("phase_aggregate_backward", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("wavemix_kernels::phase_aggregate", _forward_fake, lib=_library)
torch.library.register_fake("wavemix_kernels::phase_aggregate_backward", _backward_fake, lib=_library)


def backward(*arguments: Any) -> Gradients:
    """All gradients of :data:`fused`.

    Args:
        arguments: ``*Cotangents, z_h, z_w, theta_h … taps_w, *Batch, joined, backend``; see
            :mod:`wavemix_kernels.ops.patm.waves`. With a Batch, gradients of the thetas go through its statistics too;
            with None for both, the affine maps are constants.
    """
    *images, sums, taps_h, taps_w = torch.ops.wavemix_kernels.phase_aggregate_backward(*arguments)
    return Gradients(images, sums, taps_h, taps_w)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    z_h, z_w, _, *rest, ctx.backend = inputs
    ctx.save_for_backward(z_h, z_w, *rest)


def _backward(ctx: Any, grad_h: Tensor, grad_w: Tensor, grad_s: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    out = backward(grad_h, grad_w, grad_s, None, *tensors, None, None, False, ctx.backend)
    (shift_h, scale_h), (shift_w, scale_w) = out.sums
    affine = zip((scale_h, shift_h, scale_w, shift_w), tensors[4:8], strict=True)
    return (*out.slots(), *(d.to(t.dtype) for d, t in affine), out.taps_h, out.taps_w, None)


def _standard(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, _backend = arguments
    return reference.phase_aggregate(*tensors)


#: (z_h, z_w, z_c, theta_h, theta_w, scale_h, shift_h, scale_w, shift_w, taps_h, taps_w, backend) -> (h, w, s), with
#: gradient.
fused = differentiable(_library, "phase_aggregate", _setup, _backward, standard=_standard, once=True)


def self_test(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """A thin image and all gradients: (error, bound)."""
    p = selftest.pattern
    shape = (2, 6, 5, 9)
    tensors = [
        *(p(*shape, phase=i) for i in range(5)),
        *(p(6, phase=i) for i in range(4)),
        p(6, 2, 1, 7),
        p(6, 2, 7, 1),
    ]
    error = selftest.against_reference(
        lambda *t: list(phase_aggregate(*t, backend=backend)),
        lambda *t: list(reference.phase_aggregate(*t)),
        tensors,
        device,
        dtype,
    )
    return error, selftest.rounding_bound(2 * 5 * 9 + 14, dtype)
