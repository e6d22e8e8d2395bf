"""``phase_aggregate`` on the compiled core: C++ for the CPU, branch by branch; CUDA, both branches in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wavemix_kernels import _native
from wavemix_kernels.ops.common import layout
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.patm import waves
from wavemix_kernels.ops.patm.waves import Batch, Branch, Branches, Cotangent, Cotangents, Gradients


def _addresses(branch: Branch) -> tuple[Any, ...]:
    """z, theta, scale, shift and taps of :meth:`Branch.for_kernels`."""
    return *map(_native.address, branch[:2]), *map(_native.pointer, branch[2:])


def _gradient(of: Cotangent, d_z: Tensor, d_theta: Tensor, d_taps: Tensor, sums: Tensor) -> tuple[Any, ...]:
    images = map(_native.address, (d_z, d_theta))
    vectors = map(_native.pointer, (of.a, of.b, of.center))
    return _native.address(of.grad), *vectors, *images, *map(_native.pointer, (d_taps, sums[0], sums[1]))


# --- CPU -------------------------------------------------------------------------------------------------


def _cpu_arguments(branch: Branch) -> tuple[Any, ...]:
    return _native.DTYPES[branch.z.dtype], branch.z.shape, branch.axis == 2, _addresses(branch)


def cpu_forward(branches: Branches, z_c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    core: Any = _native.core
    z_c = layout.channels_inner(z_c)
    sums = z_c.new_empty((2, *z_c.shape[:2]), dtype=accumulate_dtype(z_c.dtype))
    outputs = []
    for i, branch in enumerate(branches):
        out, read = layout.empty(branch.z, branch.z.shape, True), branch.for_kernels()
        core.phase_forward_cpu(
            *_cpu_arguments(read), _native.address(out), _native.address(z_c if i == 0 else None), sums[i].data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        outputs.append(out)
    return outputs[0], outputs[1], sums[0] + sums[1]


def _cpu_branch_backward(
    branch: Branch, cotangent: Cotangent, d_z: Tensor, d_theta: Tensor, d_c: Tensor | None
) -> tuple[Tensor, Tensor]:
    core: Any = _native.core
    d_taps, sums = torch.empty_like(branch.taps), branch.scale.new_empty((2, branch.scale.shape[0]))
    core.phase_backward_cpu(
        *_cpu_arguments(branch), _gradient(cotangent, d_z, d_theta, d_taps, sums), _native.pointer(cotangent.a_c),
        _native.address(d_c), torch.get_num_threads(),
    )  # fmt: skip
    return d_taps, sums


cpu_backward = waves.by_branch(_cpu_branch_backward, "cpu")


# --- CUDA ------------------------------------------------------------------------------------------------


def _cuda_arguments(branches: list[Branch]) -> tuple[Any, ...]:
    z = branches[0].z
    return _native.DTYPES[z.dtype], z.shape, [_addresses(branch) for branch in branches]


def _cuda_workspace(like: Tensor, backward: bool) -> Tensor:
    core: Any = _native.cuda_core
    return like.new_empty(
        core.phase_workspace_cuda(like.shape, _native.multiprocessors(like.device), backward),
        dtype=accumulate_dtype(like.dtype),
    )


def cuda_forward(branches: Branches, z_c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    read = [branch.for_kernels() for branch in branches]
    z_c = layout.channels_inner(z_c)
    h, w = (layout.empty(z_c, z_c.shape, True) for _ in range(2))
    sums = z_c.new_empty(z_c.shape[:2], dtype=accumulate_dtype(z_c.dtype))
    workspace = _cuda_workspace(z_c, False)
    _native.launch(
        "phase_forward_cuda", z_c.device, *_cuda_arguments(read), [_native.address(h), _native.address(w)],
        _native.address(z_c), _native.pointer(sums), _native.pointer(workspace), _native.multiprocessors(z_c.device),
    )  # fmt: skip
    return h, w, sums


def cuda_backward(branches: Branches, cotangents: Cotangents, batch: Batch | None, joined: bool) -> Gradients:
    z = branches[0].z
    images = waves.empty_images(z, joined)
    d_z_h, d_z_w, d_c, *d_thetas = waves.slots(images)
    read = [branch.for_kernels() for branch in branches]
    arguments, multiprocessors = _cuda_arguments(read), _native.multiprocessors(z.device)
    given = [cotangents.of(i, batch) for i in range(2)]
    if cotangents.a is None:
        d_c.copy_(waves.wide(cotangents.grad_s, z)[:, :, None, None].expand(d_c.shape))
    sums = read[0].scale.new_empty((2, 2, z.shape[1]))
    taps = [torch.empty_like(branch.taps) for branch in read]
    workspace = _cuda_workspace(z, True)
    written = zip(given, (d_z_h, d_z_w), d_thetas, taps, sums, strict=True)
    gradients = [_gradient(*of_branch) for of_branch in written]
    a_c = given[0].a_c
    _native.launch(
        "phase_backward_cuda", z.device, *arguments, gradients, _native.pointer(a_c),
        _native.address(None if a_c is None else d_c), _native.pointer(workspace), multiprocessors,
    )  # fmt: skip
    if batch is not None:
        wide = [waves.wide(t, z) for t in batch]
        statistics = [[_native.pointer(t) for t in (*(of[i] for of in wide), *sums[i])] for i in range(2)]
        _native.launch(
            "phase_statistics_cuda", z.device, *arguments, [_native.address(d_theta) for d_theta in d_thetas],
            statistics, multiprocessors,
        )  # fmt: skip
    dtypes = (branch.taps.dtype for branch in branches)
    return Gradients(images, sums, *(d.to(dtype) for d, dtype in zip(taps, dtypes, strict=True)))
