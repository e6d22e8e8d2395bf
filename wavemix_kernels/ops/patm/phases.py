"""``phase_aggregate``: everything of PATM between its projections and its branch weights, in one pass over memory.

BatchNorm as an affine map, ReLU, sine and cosine, the 7-tap convolutions along W and H, and the spatial sums. Neither
phases nor waves reach memory; backward makes them again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wavemix_kernels import _native, backends, checks
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import layout, selftest
from wavemix_kernels.ops.common.autograd import differentiable
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.norm import batch_norm
from wavemix_kernels.ops.patm import reference

_PHASES = (
    "Tensor theta_h, Tensor theta_w, Tensor scale_h, Tensor shift_h, Tensor scale_w, Tensor shift_w, "
    "Tensor w_h, Tensor w_w"
)
_library = torch.library.Library("wavemix_kernels", "FRAGMENT")
_library.define(
    f"phase_aggregate(Tensor z_h, Tensor z_w, Tensor c, {_PHASES}, str backend) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "phase_aggregate_backward(Tensor grad_h, Tensor grad_w, Tensor grad_s, Tensor? a, Tensor z_h, Tensor z_w, "
    f"{_PHASES}, Tensor? mean, Tensor? invstd, bool joined, str backend) -> Tensor[]"
)


class Gradients(NamedTuple):
    """What backward makes.

    Attributes:
        images: gradients of z_h, z_w, c, theta_h, theta_w: one (N, 5C, H, W) where joined, else [(N, 3C, H, W) of the
            first three, (N, C, H, W), (N, C, H, W)].
        sums: (2, 2, C), for theta_h and theta_w the sums of d and of ``d * (theta - mean)`` with d the gradient of the
            phase before ReLU: the gradients of shift and scale (where ``mean`` is None).
        w_h, w_w: gradients of the taps.
    """

    images: list[Tensor]
    sums: Tensor
    w_h: Tensor
    w_w: Tensor


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
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The wave branches of PATM and what their weights depend on.

    With ``phase = ReLU(scale theta + shift)`` and ``u = [z cos(phase) | z sin(phase)]``: h is a 7-tap convolution of
    u_h along W in C groups, w one of u_w along H. Phases are fp32 (fp64 for fp64) and may be of any size. Under
    autocast the images take the autocast dtype, as a convolution's do.

    Args:
        z_h, z_w, c: amplitudes along W and H, and the channel branch; (N, C, H, W), float64, float32, float16 or
            bfloat16. Contiguous channels (channels_last and slices of it) are read in place.
        theta_h, theta_w: phases before their affine maps; shape and dtype of z_h.
        scale_h, shift_h, scale_w, shift_w: (C).
        w_h, w_w: taps, (C, 2, 1, 7) and (C, 2, 7, 1), of any of these dtypes.
        backend: for this call instead of the ambient :class:`wavemix_kernels.backend`. Kernels want an even C.

    Returns:
        h and w, (N, C, H, W), channels_last in the dtype of z_h, and s (N, C): the sums of ``h + w + c`` over H and W
        before h and w are rounded, fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: types, shapes, dtypes or devices that do not belong together.

    Backward is not differentiable again, except on backend ``"reference"``.

    Source: Tang et al., arXiv:2111.12294.
    """
    checks.check_tensor("z_h", z_h, 4, "(N, C, H, W)")
    z_h, z_w, c, theta_h, theta_w = checks.autocast(z_h, z_w, c, theta_h, theta_w)
    channels = z_h.shape[1]
    for name, tensor in (("z_w", z_w), ("c", c), ("theta_h", theta_h), ("theta_w", theta_w)):
        if tensor.shape != z_h.shape:
            raise ValueError(f"{name}: expected the shape of z_h, {tuple(z_h.shape)}, got {tuple(tensor.shape)}")
        checks.check_same_device(name, tensor, "z_h", z_h)
        checks.check_same_dtype(name, tensor, "z_h", z_h)
    taps = reference.TAPS
    shapes: tuple[tuple[str, Tensor, tuple[int, ...]], ...] = (
        ("scale_h", scale_h, (channels,)),
        ("shift_h", shift_h, (channels,)),
        ("scale_w", scale_w, (channels,)),
        ("shift_w", shift_w, (channels,)),
        ("w_h", w_h, (channels, 2, 1, taps)),
        ("w_w", w_w, (channels, 2, taps, 1)),
    )
    for name, tensor, shape in shapes:
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name}: expected shape {shape} to go with z_h {tuple(z_h.shape)}, got {tuple(tensor.shape)}"
            )
        checks.check_same_device(name, tensor, "z_h", z_h)
    arguments = z_h, z_w, c, theta_h, theta_w, scale_h, shift_h, scale_w, shift_w, w_h, w_w
    chosen = backends.requested(backend)
    if chosen == "reference":
        return reference.phase_aggregate(*arguments)
    h, w, s = fused(*arguments, chosen)
    return h, w, s


def _pairs(why_not: Callable[..., str | None]) -> Callable[..., str | None]:
    """A probe of kernels, which also want whole pairs of channels."""

    def probe(*tensors: Tensor) -> str | None:
        if (reason := why_not(*tensors)) is not None:
            return reason
        odd = next((t.shape[1] for t in tensors if t.shape[1] % 2), None)
        return None if odd is None else f"it takes an even number of channels, got {odd}"

    return probe


# --- CPU -------------------------------------------------------------------------------------------------


def _wide(t: Tensor, like: Tensor) -> Tensor:
    return t.to(accumulate_dtype(like.dtype)).contiguous()


def _cpu_branch(z: Tensor, theta: Tensor, scale: Tensor, shift: Tensor, taps: Tensor) -> tuple[list[Any], list[Tensor]]:
    """Arguments that both passes take, and the tensors that must outlive the call."""
    kept = [layout.channels_inner(z), layout.channels_inner(theta), *(_wide(t, z) for t in (scale, shift, taps))]
    along_h = taps.shape[3] == 1
    pointers = [t.data_ptr() for t in kept[2:]]
    return [_native.DTYPES[z.dtype], z.shape, along_h, *map(_native.address, kept[:2]), *pointers], kept


def _cpu_forward(
    z_h: Tensor, z_w: Tensor, c: Tensor, theta_h: Tensor, theta_w: Tensor, scale_h: Tensor, shift_h: Tensor,
    scale_w: Tensor, shift_w: Tensor, w_h: Tensor, w_w: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    core: Any = _native.core
    c = layout.channels_inner(c)
    sums = z_h.new_empty((2, *z_h.shape[:2]), dtype=accumulate_dtype(z_h.dtype))
    outputs = []
    branches = ((z_h, theta_h, scale_h, shift_h, w_h), (z_w, theta_w, scale_w, shift_w, w_w))
    for i, branch in enumerate(branches):
        out = layout.empty(z_h, z_h.shape, True)
        arguments, _kept = _cpu_branch(*branch)
        core.phase_forward_cpu(
            *arguments, _native.address(out), _native.address(c if i == 0 else None), sums[i].data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        outputs.append(out)
    return outputs[0], outputs[1], sums[0] + sums[1]


def _cpu_backward(
    grad_h: Tensor, grad_w: Tensor, grad_s: Tensor, a: Tensor | None, z_h: Tensor, z_w: Tensor, theta_h: Tensor,
    theta_w: Tensor, scale_h: Tensor, shift_h: Tensor, scale_w: Tensor, shift_w: Tensor, w_h: Tensor, w_w: Tensor,
    mean: Tensor | None, invstd: Tensor | None, joined: bool,
) -> Gradients:  # fmt: skip
    core: Any = _native.core
    images = _empty_images(z_h, joined)
    d_z_h, d_z_w, d_c, d_theta_h, d_theta_w = _slots(images)
    wide = accumulate_dtype(z_h.dtype)
    sums = z_h.new_empty((2, 2, z_h.shape[1]), dtype=wide)
    grad_s = _wide(grad_s, z_h)
    weights = None if a is None else _wide(a, z_h)
    if weights is None:
        d_c.copy_(grad_s[:, :, None, None].expand(d_c.shape))

    def pointer(t: Tensor | None, index: int) -> int:
        return 0 if t is None else t[index].data_ptr()

    taps = []
    branches = (
        (grad_h, z_h, theta_h, scale_h, shift_h, w_h, d_z_h, d_theta_h),
        (grad_w, z_w, theta_w, scale_w, shift_w, w_w, d_z_w, d_theta_w),
    )
    for i, (grad, z, theta, scale, shift, w, d_z, d_theta) in enumerate(branches):
        grad, theta = layout.channels_inner(grad), layout.channels_inner(theta)
        arguments, _kept = _cpu_branch(z, theta, scale, shift, w)
        d_taps = torch.empty(w.shape, dtype=wide)
        third = i == 0 and weights is not None
        core.phase_backward_cpu(
            *arguments, _native.address(grad), pointer(weights, i), grad_s.data_ptr(), pointer(weights, 2),
            pointer(mean, i), _native.address(d_z), _native.address(d_theta), _native.address(d_c if third else None),
            d_taps.data_ptr(), sums[i, 0].data_ptr(), sums[i, 1].data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if mean is not None and invstd is not None:
            rise, offset = _through_statistics(z, sums[i], _wide(scale, z), mean[i], invstd[i])
            one = torch.ones_like(rise)
            batch_norm.BACKENDS["cpu"].functions["backward"](d_theta, theta, one, rise, offset, d_theta)
        taps.append(d_taps.to(w.dtype))
    return Gradients(images, sums, taps[0], taps[1])


def _through_statistics(z: Tensor, sums: Tensor, scale: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Batch statistics depend on theta too: its gradient is ``scale d + rise theta + offset``, a line per channel."""
    count = max(z.shape[0] * z.shape[2] * z.shape[3], 1)
    rise = -scale * invstd.square() * sums[1] / count
    return rise, -scale * sums[0] / count - rise * mean


def _empty_images(like: Tensor, joined: bool) -> list[Tensor]:
    n, c, h, w = like.shape
    return [layout.empty(like, [n, k * c, h, w], True) for k in ((5,) if joined else (3, 1, 1))]


def _slots(images: list[Tensor]) -> tuple[Tensor, ...]:
    """z_h, z_w, c, theta_h, theta_w of :attr:`Gradients.images`: views."""
    if len(images) == 1:
        return images[0].chunk(5, 1)
    return (*images[0].chunk(3, 1), *images[1:])


# --- CUDA ------------------------------------------------------------------------------------------------


class _CudaBranches:
    """Both branches as the core takes them; holds what must outlive the call."""

    def __init__(self, like: Tensor, *branches: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> None:
        self.images = [[layout.channels_inner(t) for t in branch[:2]] for branch in branches]
        self.vectors = [[_wide(t, like) for t in branch[2:]] for branch in branches]
        self.arguments = (
            _native.DTYPES[like.dtype],
            like.shape,
            [
                (*map(_native.address, images), *(t.data_ptr() for t in vectors))
                for images, vectors in zip(self.images, self.vectors, strict=True)
            ],
        )
        self.where = _native.stream(like.device)


def _cuda_workspace(like: Tensor, backward: bool) -> Tensor:
    core: Any = _native.cuda_core
    return like.new_empty(core.phase_workspace_cuda(like.shape, backward), dtype=accumulate_dtype(like.dtype))


def _cuda_forward(
    z_h: Tensor, z_w: Tensor, c: Tensor, theta_h: Tensor, theta_w: Tensor, scale_h: Tensor, shift_h: Tensor,
    scale_w: Tensor, shift_w: Tensor, w_h: Tensor, w_w: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    core: Any = _native.cuda_core
    branches = _CudaBranches(z_h, (z_h, theta_h, scale_h, shift_h, w_h), (z_w, theta_w, scale_w, shift_w, w_w))
    c = layout.channels_inner(c)
    h, w = (layout.empty(z_h, z_h.shape, True) for _ in range(2))
    sums = z_h.new_empty(z_h.shape[:2], dtype=accumulate_dtype(z_h.dtype))
    workspace = _cuda_workspace(z_h, False)
    core.phase_forward_cuda(
        *branches.arguments, [_native.address(h), _native.address(w)], _native.address(c), sums.data_ptr(),
        workspace.data_ptr(), *branches.where,
    )  # fmt: skip
    return h, w, sums


def _cuda_backward(
    grad_h: Tensor, grad_w: Tensor, grad_s: Tensor, a: Tensor | None, z_h: Tensor, z_w: Tensor, theta_h: Tensor,
    theta_w: Tensor, scale_h: Tensor, shift_h: Tensor, scale_w: Tensor, shift_w: Tensor, w_h: Tensor, w_w: Tensor,
    mean: Tensor | None, invstd: Tensor | None, joined: bool,
) -> Gradients:  # fmt: skip
    core: Any = _native.cuda_core
    images = _empty_images(z_h, joined)
    d_z_h, d_z_w, d_c, d_theta_h, d_theta_w = _slots(images)
    wide = accumulate_dtype(z_h.dtype)
    sums = z_h.new_empty((2, 2, z_h.shape[1]), dtype=wide)
    taps = [torch.empty_like(w, dtype=wide, memory_format=torch.contiguous_format) for w in (w_h, w_w)]
    branches = _CudaBranches(z_h, (z_h, theta_h, scale_h, shift_h, w_h), (z_w, theta_w, scale_w, shift_w, w_w))
    grads = [layout.channels_inner(t) for t in (grad_h, grad_w)]
    grad_s = _wide(grad_s, z_h)
    weights = None if a is None else _wide(a, z_h)
    center = None if mean is None else _wide(mean, z_h)
    if weights is None:
        d_c.copy_(grad_s[:, :, None, None].expand(d_c.shape))

    def pointer(t: Tensor | None, index: int) -> int:
        return 0 if t is None else t[index].data_ptr()

    workspace = _cuda_workspace(z_h, True)
    gradients = [
        (
            _native.address(grads[i]), pointer(weights, i), grad_s.data_ptr(), pointer(center, i),
            _native.address(d_z), _native.address(d_theta), taps[i].data_ptr(), sums[i, 0].data_ptr(),
            sums[i, 1].data_ptr(),
        )
        for i, (d_z, d_theta) in enumerate(((d_z_h, d_theta_h), (d_z_w, d_theta_w)))
    ]  # fmt: skip
    core.phase_backward_cuda(
        *branches.arguments, gradients, pointer(weights, 2), _native.address(None if weights is None else d_c),
        workspace.data_ptr(), *branches.where,
    )  # fmt: skip
    if center is not None and invstd is not None:
        scales = torch.stack([vectors[0] for vectors in branches.vectors])
        lines = _through_statistics(z_h, sums.transpose(0, 1), scales, center, _wide(invstd, z_h))
        core.phase_statistics_cuda(
            *branches.arguments, [_native.address(d_theta_h), _native.address(d_theta_w)],
            *([pointer(line, i) for i in range(2)] for line in lines), *branches.where,
        )  # fmt: skip
    return Gradients(images, sums, *(d.to(w.dtype) for d, w in zip(taps, (w_h, w_w), strict=True)))


# --- Triton ----------------------------------------------------------------------------------------------


def _triton_branch(z: Tensor, theta: Tensor, scale: Tensor, shift: Tensor, taps: Tensor) -> Any:
    from wavemix_kernels.ops.patm.triton_phases import Branch

    images = layout.channels_inner(z), layout.channels_inner(theta)
    return Branch(*images, *(_wide(t, z) for t in (scale, shift, taps)))


def _triton_forward(
    z_h: Tensor, z_w: Tensor, c: Tensor, theta_h: Tensor, theta_w: Tensor, scale_h: Tensor, shift_h: Tensor,
    scale_w: Tensor, shift_w: Tensor, w_h: Tensor, w_w: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from wavemix_kernels.ops.patm import triton_phases as kernels

    h, w = (layout.empty(z_h, z_h.shape, True) for _ in range(2))
    branch_h = _triton_branch(z_h, theta_h, scale_h, shift_h, w_h)
    branch_w = _triton_branch(z_w, theta_w, scale_w, shift_w, w_w)
    partial = kernels.forward(h, branch_h, layout.channels_inner(c)), kernels.forward(w, branch_w)
    return h, w, torch.cat(partial).sum(0)


def _triton_backward(
    grad_h: Tensor, grad_w: Tensor, grad_s: Tensor, a: Tensor | None, z_h: Tensor, z_w: Tensor, theta_h: Tensor,
    theta_w: Tensor, scale_h: Tensor, shift_h: Tensor, scale_w: Tensor, shift_w: Tensor, w_h: Tensor, w_w: Tensor,
    mean: Tensor | None, invstd: Tensor | None, joined: bool,
) -> Gradients:  # fmt: skip
    from wavemix_kernels.ops.patm import triton_phases as kernels

    images = _empty_images(z_h, joined)
    d_z_h, d_z_w, d_c, d_theta_h, d_theta_w = _slots(images)
    grad_s = _wide(grad_s, z_h)
    weights = [None] * 3 if a is None else _wide(a, z_h).unbind(0)
    centers = [None] * 2 if mean is None else _wide(mean, z_h).unbind(0)
    if a is None:
        d_c.copy_(grad_s[:, :, None, None].expand(d_c.shape))
    sums, taps = [], []
    branches = (
        (grad_h, z_h, theta_h, scale_h, shift_h, w_h, d_z_h, d_theta_h),
        (grad_w, z_w, theta_w, scale_w, shift_w, w_w, d_z_w, d_theta_w),
    )
    for i, (grad, *inputs, d_z, d_theta) in enumerate(branches):
        branch = _triton_branch(*inputs)
        third = i == 0 and a is not None
        cotangent = kernels.Cotangent(
            layout.channels_inner(grad), weights[i], grad_s, weights[2] if third else None, centers[i]
        )
        d_taps, of_branch = kernels.backward(d_z, d_theta, d_c if third else None, cotangent, branch)
        if mean is not None and invstd is not None:
            rise, offset = _through_statistics(branch.z, of_branch, branch.scale, mean[i], invstd[i])
            one = torch.ones_like(rise)
            batch_norm.BACKENDS["triton"].functions["backward"](d_theta, branch.theta, one, rise, offset, d_theta)
        sums.append(of_branch)
        taps.append(d_taps.to(inputs[-1].dtype))
    return Gradients(images, torch.stack(sums), taps[0], taps[1])


# --- Reference -------------------------------------------------------------------------------------------


def _reference_forward(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h, w, s = reference.phase_aggregate(*tensors)
    return layout.laid_out(h, True), layout.laid_out(w, True), s


def _reference_branch_backward(
    grad: Tensor, z: Tensor, theta: Tensor, scale: Tensor, shift: Tensor, taps: Tensor, center: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of z, theta and taps, and both sums. By hand: an operator runs below autograd."""
    wide = accumulate_dtype(z.dtype)
    z, theta, scale, shift = z.to(wide), theta.to(wide), scale.to(wide), shift.to(wide)
    pre = theta * scale[:, None, None] + shift[:, None, None]
    cosine, sine = pre.relu().cos(), pre.relu().sin()
    padding = [taps.shape[2] // 2, taps.shape[3] // 2]
    d_wave, d_taps, _ = torch.ops.aten.convolution_backward(
        grad, torch.cat((z * cosine, z * sine), 1), taps.to(wide), None, [1, 1], padding, [1, 1], False, [0, 0],
        z.shape[1], (True, True, False),
    )  # fmt: skip
    real, imaginary = d_wave.chunk(2, 1)
    d_pre = torch.where(pre <= 0, 0.0, z * (imaginary * cosine - real * sine))
    centered = theta if center is None else theta - center[:, None, None]
    sums = torch.stack((d_pre.sum((0, 2, 3)), (d_pre * centered).sum((0, 2, 3))))
    return real * cosine + imaginary * sine, d_pre * scale[:, None, None], d_taps, sums


def _reference_backward(
    grad_h: Tensor, grad_w: Tensor, grad_s: Tensor, a: Tensor | None, z_h: Tensor, z_w: Tensor, theta_h: Tensor,
    theta_w: Tensor, scale_h: Tensor, shift_h: Tensor, scale_w: Tensor, shift_w: Tensor, w_h: Tensor, w_w: Tensor,
    mean: Tensor | None, invstd: Tensor | None, joined: bool,
) -> Gradients:  # fmt: skip
    wide = accumulate_dtype(z_h.dtype)
    of_sum = grad_s.to(wide)[:, :, None, None]
    weights = [1.0, 1.0, 0.0] if a is None else [t[:, :, None, None] for t in a.to(wide)]
    amplitudes, d_thetas, sums, taps = [], [], [], []
    branches = (
        (grad_h, z_h, theta_h, scale_h, shift_h, w_h),
        (grad_w, z_w, theta_w, scale_w, shift_w, w_w),
    )
    for i, (grad, z, theta, scale, shift, w) in enumerate(branches):
        center = None if mean is None else mean[i]
        d = grad.to(wide) * weights[i] + of_sum
        d_z, d_theta, d_taps, of_branch = _reference_branch_backward(d, z, theta, scale, shift, w, center)
        if mean is not None and invstd is not None:
            rise, offset = _through_statistics(z, of_branch, scale.to(wide), mean[i], invstd[i])
            d_theta = d_theta + rise[:, None, None] * theta + offset[:, None, None]
        amplitudes.append(d_z)
        d_thetas.append(d_theta)
        sums.append(of_branch)
        taps.append(d_taps.to(w.dtype).contiguous())
    d_c = (grad_h.to(wide) * weights[2] + of_sum) if a is not None else of_sum.expand(z_h.shape)
    images = _empty_images(z_h, joined)
    for slot, value in zip(_slots(images), (*amplitudes, d_c, *d_thetas), strict=True):
        slot.copy_(value)
    return Gradients(images, torch.stack(sums), taps[0], taps[1])


BACKENDS: dict[str, backends.Backend] = {
    "cuda": backends.Backend(_pairs(backends.cuda_why_not), {"forward": _cuda_forward, "backward": _cuda_backward}),
    "triton": backends.Backend(
        _pairs(backends.triton_why_not), {"forward": _triton_forward, "backward": _triton_backward}
    ),
    "cpu": backends.Backend(_pairs(backends.cpu_why_not), {"forward": _cpu_forward, "backward": _cpu_backward}),
    "reference": backends.Backend(
        backends.reference_why_not, {"forward": _reference_forward, "backward": _reference_backward}
    ),
}


# --- The operators ---------------------------------------------------------------------------------------


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, backend = arguments
    chosen = choose.select("phase_aggregate", BACKENDS, backend, *tensors[:5])
    return chosen.functions["forward"](*tensors)


def _backward_op(*arguments: Any) -> list[Tensor]:
    *tensors, joined, backend = arguments
    chosen = choose.select("phase_aggregate_backward", BACKENDS, backend, *(tensors[i] for i in (4, 5, 6, 7, 0, 1)))
    out = chosen.functions["backward"](*tensors, joined)
    return [*out.images, out.sums, out.w_h, out.w_w]


def _forward_fake(z_h: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    sums = z_h.new_empty(z_h.shape[:2], dtype=accumulate_dtype(z_h.dtype))
    return layout.empty(z_h, z_h.shape, True), layout.empty(z_h, z_h.shape, True), sums


def _backward_fake(*arguments: Any) -> list[Tensor]:
    z_h, w_h, w_w, joined = arguments[4], arguments[12], arguments[13], arguments[16]
    sums = z_h.new_empty((2, 2, z_h.shape[1]), dtype=accumulate_dtype(z_h.dtype))
    return [*_empty_images(z_h, joined), sums, w_h.new_empty(w_h.shape), w_w.new_empty(w_w.shape)]


_library.impl("phase_aggregate", _forward, "CompositeExplicitAutograd")
_library.impl("phase_aggregate_backward", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("wavemix_kernels::phase_aggregate", _forward_fake, lib=_library)
torch.library.register_fake("wavemix_kernels::phase_aggregate_backward", _backward_fake, lib=_library)


def backward(*arguments: Any) -> Gradients:
    """All gradients of :data:`fused`.

    (grad_h, grad_w, grad_s, a, z_h, z_w, theta_h … w_w, mean, invstd, joined, backend), where

    - the gradients of h, w and c are ``grad_h a[0] + grad_s``, ``grad_w a[1] + grad_s`` and ``grad_h a[2] + grad_s``
      with a (3, N, C), or ``grad_h + grad_s``, ``grad_w + grad_s`` and ``grad_s`` with a None;
    - mean and invstd (2, C), of theta_h and theta_w, say that the affine maps come from these batch statistics: the
      gradients of theta then go through them too. None: the maps are constants.
    """
    *images, sums, w_h, w_w = torch.ops.wavemix_kernels.phase_aggregate_backward(*arguments)
    return Gradients(images, sums, w_h, w_w)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    z_h, z_w, _, *phases, ctx.backend = inputs
    ctx.save_for_backward(z_h, z_w, *phases)


def _backward(ctx: Any, grad_h: Tensor, grad_w: Tensor, grad_s: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    out = backward(grad_h, grad_w, grad_s, None, *tensors, None, None, False, ctx.backend)
    scale_h, shift_h, scale_w, shift_w = tensors[4:8]
    affine = (
        out.sums[0, 1].to(scale_h.dtype), out.sums[0, 0].to(shift_h.dtype),
        out.sums[1, 1].to(scale_w.dtype), out.sums[1, 0].to(shift_w.dtype),
    )  # fmt: skip
    return (*_slots(out.images), *affine, out.w_h, out.w_w, None)


#: (z_h, z_w, c, theta_h, theta_w, scale_h, shift_h, scale_w, shift_w, w_h, w_w, backend) -> (h, w, s), with gradient.
fused = differentiable(_library, "phase_aggregate", _setup, _backward, once=True)


def self_test(backend: str, device: torch.device) -> tuple[float, float]:
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
    )
    return error, selftest.rounding_bound(2 * 5 * 9 + 14)
