"""``patm_whole`` on a GPU, in CUDA C++. Half types and the channels of :data:`CHANNELS`.

Forward from three reads of x: ``moments`` is one, for batch statistics. ``forward`` makes the branch weights of sums
over each image, without a convolution (:mod:`csrc/cuda/patm/whole_branch_weights.cu`), then mixes the branches in
strips of rows.

Backward from x and the output's gradient: ``backward`` first makes the gradients of the branch weights and of ``proj``,
both from one matrix for each image and branch (:mod:`csrc/cuda/patm/whole_backward_mixed.cu`,
:mod:`csrc/cuda/patm/whole_mixed_sums.cu`), then those of all projections at every pixel
(:mod:`csrc/cuda/patm/whole_backward_waves.cu`), the one image in memory in between. ``finish`` makes of these the
gradients of x and of the projections' weights. What hangs on moments alone is one launch each way
(:mod:`csrc/cuda/patm/whole_statistics.cu`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wavemix_kernels import _native, backends
from wavemix_kernels.ops.common import chips, layout
from wavemix_kernels.ops.common.dtypes import cast_together
from wavemix_kernels.ops.patm import branch_weights
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


def why_not_these(x: Tensor, hidden: int, dtype: torch.dtype) -> str | None:
    """The same, of weights: hidden channels of the branch weights' MLP, dtype of the projections."""
    if hidden > MOST_HIDDEN:
        return f"it takes up to {MOST_HIDDEN} hidden channels, got {hidden}"
    if dtype != x.dtype:
        return f"it takes weights of x's dtype, {x.dtype}, got {dtype}"
    return None


@functools.cache
def _shared(channels: int) -> int:
    core: Any = _native.cuda_core
    return core.patm_shared_cuda(channels)


class _Arguments:
    """An image and vectors as the core takes them; holds what must outlive the call."""

    def __init__(self, image: _Image, *vectors: Tensor | None) -> None:
        x, scale, shift = image
        x = _by_words(x)
        self._kept = x, *_floats(scale, shift, *vectors)
        by_image = scale is not None and scale.dim() == 2
        addresses = [_native.pointer(t) for t in self._kept[1:]]
        self.image = _native.DTYPES[x.dtype], x.shape, _native.address(x), *addresses[:2], by_image
        self.vectors = addresses[2:]


def _by_words(x: Tensor) -> Tensor:
    """x as kernels copy it, by 16 bytes."""
    x = layout.channels_inner(x)
    words = 16 // x.element_size()
    if x.data_ptr() % 16 or any(x.stride(axis) % words for axis in (0, 2, 3)):
        return layout.laid_out(x, True)
    return x


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


def statistics(
    mean: Tensor, covariance: Tensor, phases: Sequence[Sequence[Tensor | None]], eps: tuple[float, float]
) -> Tensor:
    """Mean, variance, inverse deviation, scale and shift of the thetas, (5, 2, C) fp32; see
    :func:`wavemix_kernels.ops.patm.statistics.of_moments_standard`."""
    theta: Any = phases[0][0]
    c = theta.shape[0]
    out = theta.new_empty((5, 2, c), dtype=torch.float32)
    thetas = [None if t is None else t.contiguous() for phase in phases for t in phase[:2]]
    norms = _floats(*(t for phase in phases for t in phase[2:]))
    _native.launch(
        "patm_statistics_cuda", theta.device, _native.DTYPES[theta.dtype], c, _native.pointer(mean),
        _native.pointer(covariance), [*map(_native.pointer, thetas)], [*map(_native.pointer, norms)], eps,
        _native.pointer(out),
    )  # fmt: skip
    return out


def _on_images(x: Tensor, w: Weights) -> list[Tensor | None]:
    return [None if t is None else t.to(x.dtype).contiguous() for t in w[:ON_IMAGES]]


def forward(
    image: _Image, path: Tensor | None, residual: bool, w: Weights, maps: Affine, channels_last: bool
) -> tuple[Tensor, Tensor]:
    core: Any = _native.cuda_core
    x = image[0]
    (n, c, *_), device, hidden = x.shape, x.device, w.fc1.shape[0]
    if hidden > MOST_HIDDEN:
        raise ValueError(f"fc1: got {hidden} hidden channels; up to {MOST_HIDDEN} would work")
    multiprocessors = _native.multiprocessors(device)
    out, branch_mean = layout.empty(x, x.shape, channels_last), x.new_empty((n, c), dtype=torch.float32)
    if x.numel() == 0:
        return out, branch_mean
    on_images = _on_images(x, w)
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


#: Sums that ``patm_wave_gradients_cuda`` makes of each branch, behind the taps' gradient (C, 2, 7).
_TAPS, _PRE, _PRE_THETA, _Z, _THIRD = 14, 14, 15, 16, 17
#: Projections in the order of their gradients at a pixel.
_PROJECTIONS = ("z_h", "z_w", "z_c", "theta_h", "theta_w")


def backward(
    grad: Tensor, branch_mean: Tensor, center: Tensor | None, image: _Image, path: Tensor | None, w: Weights,
    maps: Affine,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:  # fmt: skip
    """Gradients of all projections at every pixel (N, 5 C, H, W), those of weights but the projections', and sums."""
    core: Any = _native.cuda_core
    x = image[0]
    (n, c, height, width), device, hidden = x.shape, x.device, w.fc1.shape[0]
    multiprocessors = _native.multiprocessors(device)
    a, _ = branch_weights.branch_weights(branch_mean, 1, w.mlp(), "auto")
    new = branch_mean.new_zeros if x.numel() == 0 else branch_mean.new_empty
    d_a, d_proj, sums = new((3, n, c)), new((c + 1, c)), new((2, 18, c))
    grad = _by_words(grad.to(x.dtype))
    on_images = _on_images(x, w)
    given = _Arguments(image, path, center, *w[ON_IMAGES:], *maps)
    path_at, center_at, *rest = given.vectors
    weights = [*map(_native.pointer, on_images), *rest]
    bytes_ = core.patm_mixed_gradients_workspace_cuda(given.image, multiprocessors)
    workspace = x.new_empty(bytes_, dtype=torch.uint8)
    _native.launch(
        "patm_mixed_gradients_cuda", device, given.image, weights, hidden, path_at, _native.address(grad),
        _native.pointer(a), _native.pointer(d_a), _native.pointer(d_proj), _native.pointer(workspace), multiprocessors,
    )  # fmt: skip
    d_s, (d_fc1, d_fc1_bias, d_fc2, d_fc2_bias) = branch_weights.backward(
        d_a, a, branch_mean, max(height * width, 1), w.mlp(), "auto"
    )
    d_s = d_s.contiguous()
    gradients = x.new_empty((n, height, width, 5 * c))
    bytes_ = core.patm_wave_gradients_workspace_cuda(given.image, multiprocessors)
    workspace = x.new_empty(bytes_, dtype=torch.uint8)
    _native.launch(
        "patm_wave_gradients_cuda", device, given.image, weights, hidden, path_at, _native.address(grad),
        _native.pointer(a), _native.pointer(d_s), center_at, _native.pointer(gradients), _native.pointer(sums),
        _native.pointer(workspace), multiprocessors,
    )  # fmt: skip
    small = {
        "z_h_bias": sums[0, _Z], "z_w_bias": sums[1, _Z], "z_c_bias": sums[0, _THIRD], "proj": d_proj[:c],
        "proj_bias": d_proj[c], "taps_h": sums[0, :_TAPS], "taps_w": sums[1, :_TAPS], "fc1": d_fc1,
        "fc1_bias": d_fc1_bias, "fc2": d_fc2, "fc2_bias": d_fc2_bias,
    }  # fmt: skip
    return gradients.permute(0, 3, 1, 2), small, sums[:, _PRE : _PRE_THETA + 1]


def finish(
    gradients: Tensor,
    image: _Image,
    w: Weights,
    maps: Affine,
    through: tuple[Tensor, ...] | None,
    channels_last: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradients of the image and of the projections' weights, fp32. ``through``: sums, invstd, image_mean and
    covariance, where the phases have batch statistics (:func:`wavemix_kernels.ops.patm.statistics.through_moments`)."""
    core: Any = _native.cuda_core
    x, c, device = image[0], image[0].shape[1], image[0].device
    multiprocessors = _native.multiprocessors(device)
    d_image = layout.empty(x, x.shape, channels_last)
    new = x.new_zeros if x.numel() == 0 else x.new_empty
    d_weights = new((len(_PROJECTIONS), c, c), dtype=torch.float32)
    on_images = _on_images(x, w)
    given = _Arguments(image, *maps)
    weights = [*map(_native.pointer, on_images), *[0] * (len(w) - ON_IMAGES), *given.vectors]
    matrix = vector = size = d_theta = None
    if through is not None:
        sums, (invstd,), mean, covariance = through[0], _floats(through[1]), *(t.double() for t in through[2:])
        matrix, d_theta = x.new_empty((c, c)), x.new_empty((2, c, c), dtype=torch.float32)
        vector, size = (x.new_empty(c, dtype=torch.float32) for _ in range(2))
        _native.launch(
            "patm_through_statistics_cuda", device, given.image, weights, _native.pointer(mean),
            _native.pointer(covariance), _native.pointer(sums), sums.stride(0), _native.pointer(invstd),
            *map(_native.pointer, (matrix, vector, size, d_theta)),
        )  # fmt: skip
    bytes_ = core.patm_image_gradients_workspace_cuda(given.image, multiprocessors)
    workspace = x.new_empty(bytes_, dtype=torch.uint8)
    _native.launch(
        "patm_image_gradients_cuda", device, given.image, weights, w.fc1.shape[0], _native.pointer(gradients),
        _native.pointer(matrix), _native.pointer(vector), _native.pointer(size), _native.pointer(d_theta),
        _native.address(d_image), _native.pointer(d_weights), _native.pointer(workspace), multiprocessors,
    )  # fmt: skip
    return d_image, dict(zip(_PROJECTIONS, d_weights.unbind(), strict=True))
