"""``patm_whole`` on a GPU, in CUDA C++: forward, from three reads of x.

``moments`` is one read, for batch statistics. ``forward`` makes the branch weights of sums over each image, without a
convolution (:mod:`csrc/cuda/patm/whole_branch_weights.cu`), then mixes the branches in strips of rows. Half types and
the channels of :data:`CHANNELS`; backward is :mod:`wavemix_kernels.ops.patm.op`'s, by parts.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from wavemix_kernels import _native, backends
from wavemix_kernels.ops.common import chips, layout
from wavemix_kernels.ops.common.dtypes import cast_together
from wavemix_kernels.ops.patm.weights import ON_IMAGES, Affine, Weights

#: Channels that have kernels. Their weights lie in shared memory: 64 and 96 take what sm_80 has, 128 what sm_90 has.
CHANNELS = (64, 96, 128)
DTYPES = (torch.float16, torch.bfloat16)
#: Hidden channels of the branch weights' MLP, up to which a block holds them.
MOST_HIDDEN = 128

_Image = tuple[Tensor, Tensor | None, Tensor | None]


def why_not(*tensors: Tensor) -> str | None:
    if (reason := backends.cuda_why_not(*tensors)) is not None:
        return reason
    for t in tensors:
        if t.dtype not in DTYPES:
            return f"it takes float16 and bfloat16, got {str(t.dtype).removeprefix('torch.')}"
        if t.shape[1] not in CHANNELS:
            return f"it takes {', '.join(map(str, CHANNELS))} channels, got {t.shape[1]}"
        if (wanted := _shared(t.shape[1])) > (most := chips.shared_of_block(t.device)):
            return f"{t.shape[1]} channels take {wanted} bytes of shared memory, a block of this device has {most}"
    return None


@functools.cache
def _shared(channels: int) -> int:
    core: Any = _native.cuda_core
    return core.patm_shared_cuda(channels)


class _Arguments:
    """An image and vectors as the core takes them; holds what must outlive the call."""

    def __init__(self, image: _Image, *vectors: Tensor | None) -> None:
        x, scale, shift = image
        x = layout.channels_inner(x)
        words = 16 // x.element_size()
        if x.data_ptr() % 16 or any(x.stride(axis) % words for axis in (0, 2, 3)):
            x = layout.laid_out(x, True)  # kernels copy by 16 bytes
        self._kept = x, *_floats(scale, shift, *vectors)
        by_image = scale is not None and scale.dim() == 2
        addresses = [_native.pointer(t) for t in self._kept[1:]]
        self.image = _native.DTYPES[x.dtype], x.shape, _native.address(x), *addresses[:2], by_image
        self.vectors = addresses[2:]


def _floats(*tensors: Tensor | None) -> list[Tensor | None]:
    given = [t for t in tensors if t is not None]
    made = iter(cast_together(given, [torch.float32] * len(given)))
    return [None if t is None else next(made).contiguous() for t in tensors]


def moments(image: _Image) -> tuple[Tensor, Tensor]:
    core: Any = _native.cuda_core
    x = image[0]
    c, device, multiprocessors = x.shape[1], x.device, _native.multiprocessors(x.device)
    mean, covariance = x.new_empty(c, dtype=torch.float64), x.new_empty((c, c), dtype=torch.float64)
    if x.numel() == 0:
        return mean.fill_(torch.nan), covariance.fill_(torch.nan)  # as the mean of nothing
    given = _Arguments(image)
    workspace = x.new_empty(core.patm_moments_workspace_cuda(given.image, multiprocessors), dtype=torch.uint8)
    _native.launch(
        "patm_moments_cuda", device, given.image, _native.pointer(mean), _native.pointer(covariance),
        _native.pointer(workspace), multiprocessors,
    )  # fmt: skip
    return mean, covariance


def forward(image: _Image, path: Tensor | None, residual: bool, w: Weights, maps: Affine) -> tuple[Tensor, Tensor]:
    core: Any = _native.cuda_core
    x = image[0]
    (n, c, *_), device, hidden = x.shape, x.device, w.fc1.shape[0]
    if hidden > MOST_HIDDEN:
        raise ValueError(f"fc1: got {hidden} hidden channels; up to {MOST_HIDDEN} would work")
    multiprocessors = _native.multiprocessors(device)
    out, branch_mean = layout.empty(x, x.shape, True), x.new_empty((n, c), dtype=torch.float32)
    if x.numel() == 0:
        return out, branch_mean
    on_images = [None if t is None else t.to(x.dtype).contiguous() for t in w[:ON_IMAGES]]
    given = _Arguments(image, path, *w[ON_IMAGES:], *maps)
    path_at, *rest = given.vectors
    weights = [*map(_native.pointer, on_images), *rest]
    a = x.new_empty((3, n, c), dtype=torch.float32)
    workspace = x.new_empty(core.patm_branch_weights_workspace_cuda(given.image, multiprocessors), dtype=torch.uint8)
    _native.launch(
        "patm_branch_weights_cuda", device, given.image, weights, hidden, _native.pointer(branch_mean),
        _native.pointer(a), _native.pointer(workspace), multiprocessors,
    )  # fmt: skip
    _native.launch(
        "patm_mix_cuda", device, given.image, weights, hidden, residual, path_at, _native.pointer(a),
        _native.address(out), multiprocessors,
    )  # fmt: skip
    return out, branch_mean
