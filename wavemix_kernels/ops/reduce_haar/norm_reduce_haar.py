"""``norm_reduce_haar``: between two Waveblocks, BatchNorm, residual and the next block's reduce_haar in one pass.

``image = y * scale + shift + x`` is written by one block and read by the next; here the convolution reads it on its way
to memory. Backward, the pass that writes the image's gradient reads y along, and makes the sums that BatchNorm's
gradient begins with: two reads of an image less in all. Elsewhere than in the CUDA kernels it is the operators it is
made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from wavemix_kernels import _native, backends, log
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import layout, selftest
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.common.library import Library
from wavemix_kernels.ops.haar import pyramid as haar_pyramid
from wavemix_kernels.ops.norm import batch_norm
from wavemix_kernels.ops.reduce_haar import op as reduce_haar

_library = Library()
_library.define(
    "norm_reduce_haar(Tensor y, Tensor scale, Tensor shift, Tensor x, Tensor weight, Tensor? bias, int levels, "
    "str backend) -> Tensor[]"
)
_library.define(
    "norm_reduce_haar_backward(Tensor[] grads, Tensor? add, Tensor image, Tensor weight, bool has_bias, Tensor y, "
    "Tensor mean, Tensor invstd, Tensor? norm_weight, str backend) -> Tensor[]"
)


def _why_not_cuda(y: Tensor | None = None, x: Tensor | None = None, weight: Tensor | None = None) -> str | None:
    """The probe takes y, x (backward: the image) and weight. Both directions have one answer: what is joined forward is
    so backward."""
    if y is None or x is None or weight is None:
        return backends.cuda_why_not()
    if (reason := reduce_haar.why_not_cuda_backward(x, weight, norm=True)) is not None:
        return reason
    if not (x.shape[1] > 1 and reduce_haar.is_dense(x, True) and reduce_haar.is_dense(y, True)):
        return f"it takes dense images in channels_last order, got strides {x.stride()} and {y.stride()}"
    return None


def _in_words(vector: Tensor) -> Tensor:
    """fp32, for accesses of 16 bytes."""
    vector = vector.float().contiguous()
    return vector if vector.data_ptr() % 16 == 0 else vector.clone()


def _cuda(
    y: Tensor, scale: Tensor, shift: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, levels: int
) -> list[Tensor]:
    image, zs = torch.empty_like(x), haar_pyramid.empty_pyramid(x, weight.shape[0], levels, True)
    a, pointer = _native.address, _native.pointer
    scale, shift = (_in_words(t) for t in (scale, shift))
    _native.launch(
        "norm_reduce_haar_cuda", x.device, _native.DTYPES[x.dtype], levels, x.shape, weight.shape[0], a(x),
        a(weight[:, :, 0, 0]), a(bias), [a(z) for z in zs], pointer(y), pointer(scale), pointer(shift), pointer(image),
    )  # fmt: skip
    return [image, *zs]


def _cuda_backward(
    grads: list[Tensor], add: Tensor | None, image: Tensor, weight: Tensor, has_bias: bool, y: Tensor, mean: Tensor,
    invstd: Tensor,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The sums (2, C) of BatchNorm's gradient, and the reduction's gradients."""
    mean, invstd = mean.contiguous(), invstd.contiguous()
    sums = mean.new_empty(2, len(mean))
    return sums, reduce_haar.cuda_backward(grads, image, weight, add, has_bias, (y, mean, invstd, sums))


BACKENDS: dict[str, backends.Backend] = {
    "cuda": backends.Backend(_why_not_cuda, {"forward": _cuda, "backward": _cuda_backward}, torch.float16),
    "reference": backends.Backend(backends.reference_why_not, {}),
}


def _functions(op: str, backend: str, *tensors: Tensor) -> Mapping[str, Callable[..., Any]]:
    """The joined kernels, or nothing where the parts run."""
    name = backend if backend in ("auto", *BACKENDS) else "reference"
    if name == "cuda" and (reason := _why_not_cuda(*tensors)) is not None:
        name = "reference"  # the parts have kernels of this name, or say why not
        if not torch.compiler.is_compiling() and log.enabled():
            line = f"{op} {', '.join(str(tuple(t.shape)) for t in tensors)}: in parts: {reason}"
            log.once(line, lambda: line)
    return choose.select(op, BACKENDS, name, *tensors).functions


def _forward(
    y: Tensor, scale: Tensor, shift: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, levels: int, backend: str
) -> list[Tensor]:
    if functions := _functions("norm_reduce_haar", backend, y, x, weight):
        return functions["forward"](y, scale, shift, x, weight, bias, levels)
    norm = choose.for_part(backend, batch_norm.BACKENDS)
    image = torch.ops.wavemix_kernels.batch_norm_apply(y, scale, shift, x, True, norm)
    return [image, *torch.ops.wavemix_kernels.reduce_haar(image, weight, bias, levels, True, backend)]


def _backward(
    grads: list[Tensor], add: Tensor | None, image: Tensor, weight: Tensor, has_bias: bool, y: Tensor, mean: Tensor,
    invstd: Tensor, norm_weight: Tensor | None, backend: str,
) -> list[Tensor]:  # fmt: skip
    norm = choose.for_part(backend, batch_norm.BACKENDS)
    if functions := _functions("norm_reduce_haar_backward", backend, y, image, weight):
        sums, (d_image, *of_reduction) = functions["backward"](grads, add, image, weight, has_bias, y, mean, invstd)
        dy, of_norm = batch_norm.backward_of_sums(sums, d_image, y, mean, invstd, norm_weight, norm)
    else:
        made = torch.ops.wavemix_kernels.reduce_haar_backward
        d_image, *of_reduction = made(grads, image, weight, add, has_bias, backend)
        made = torch.ops.wavemix_kernels.batch_norm_backward
        dy, of_norm = made(d_image, y, mean, invstd, norm_weight, True, True, norm)
    return [d_image, dy, of_norm, *of_reduction]


def _fake(
    y: Tensor, scale: Tensor, shift: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, levels: int, backend: str
) -> list[Tensor]:
    return [layout.empty(x, x.shape, True), *haar_pyramid.empty_pyramid(x, weight.shape[0], levels, True)]


def _backward_fake(
    grads: list[Tensor], add: Tensor | None, image: Tensor, weight: Tensor, has_bias: bool, y: Tensor, mean: Tensor,
    invstd: Tensor, norm_weight: Tensor | None, backend: str,
) -> list[Tensor]:  # fmt: skip
    of_norm = batch_norm.empty_gradients(y, norm_weight)
    bias = [weight.new_empty(weight.shape[0])] if has_bias else []
    image = layout.empty(image, image.shape, True)
    return [image, torch.empty_like(image), of_norm, weight.new_empty(weight.shape), *bias]


for _name, _implementation, _of in (
    ("norm_reduce_haar", _forward, _fake),
    ("norm_reduce_haar_backward", _backward, _backward_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"wavemix_kernels::{_name}", _of, lib=_library)


def serves(y: Tensor, x: Tensor, weight: Tensor, backend: str) -> bool:
    """Whether one kernel does it. What follows from ``False``: the parts, no faster than each in its own block."""
    return bool(_functions("norm_reduce_haar", backend, y, x, weight))


def forward(
    y: Tensor, of: batch_norm.Affine, x: Tensor, weight: Tensor, bias: Tensor | None, levels: int, backend: str
) -> tuple[Tensor, list[Tensor]]:
    """The image ``y * scale + shift + x`` and its pyramid Z_1 ... Z_levels, channels_last; without gradient.

    Args:
        y, x: (N, C, H, W) of one dtype, H and W multiples of ``2**levels``.
        of: (C), fp32 (fp64 for fp64).
        weight, bias: (O, C, 1, 1) and (O) or None, of the images' dtype.
    """
    image, *zs = torch.ops.wavemix_kernels.norm_reduce_haar(y, *of, x, weight, bias, levels, backend)
    return image, zs


def backward(
    grads: list[Tensor], add: Tensor | None, image: Tensor, weight: Tensor, has_bias: bool, y: Tensor, mean: Tensor,
    invstd: Tensor, norm_weight: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of x, of y (by the batch's own statistics), of BatchNorm's weight and bias, and of the convolution's;
    that of x has ``add`` added, the gradient of the image from elsewhere."""
    dx, dy, of_norm, dw, *db = torch.ops.wavemix_kernels.norm_reduce_haar_backward(
        grads, add, image, weight, has_bias, y, mean, invstd, norm_weight, backend
    )
    return dx, dy, *of_norm.unbind(0), dw, db[0] if has_bias else None


def self_test(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """One level and three on 16 channels, forward and all gradients: (error, bound)."""
    p, error = selftest.pattern, 0.0

    def run(levels: int, backend: str, *tensors: Tensor) -> Any:
        y, x, weight, bias, add, *grads = tensors
        var, mean = torch.var_mean(y.to(accumulate_dtype(y.dtype)), (0, 2, 3), correction=0)
        invstd = (var + 1e-5).rsqrt()
        image, zs = forward(y, batch_norm.affine(mean, invstd, None, None), x, weight, bias, levels, backend)
        made = backward(grads, add, image, weight, True, y, mean, invstd, None, backend)
        return image, *zs, *made

    for levels in (1, 3):
        grads = [p(2, 16, 8 >> level, 16 >> level, phase=level) for level in range(1, levels + 1)]
        y, x, add = (p(2, 16, 8, 16, phase=phase) for phase in (5, 0, 3))
        tensors = (y + 2, x, p(4, 16, 1, 1), p(4), add, *grads)
        exact = run(levels, "reference", *(t.to(dtype).to("cpu", torch.float64) for t in tensors))
        given = (t.to(device, dtype) for t in tensors)
        ordered = (t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in given)
        error = selftest.largest(error, selftest.largest_error(run(levels, backend, *ordered), exact))
    return error, selftest.rounding_bound(2 * 8 * 16, dtype)
