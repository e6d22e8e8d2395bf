"""1x1 convolutions of channels_last images, and their gradients, as the products that are fastest on each device
(:func:`wavemix_kernels.ops.choose.product`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wavemix_kernels import _native
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import convolutions
from wavemix_kernels.ops.common.dtypes import accumulate_dtype

_library = torch.library.Library("wavemix_kernels", "FRAGMENT")
_library.define("project_backward_weight(Tensor grad, Tensor image) -> Tensor")


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


#: oneDNN's product of plain matrices: what PyTorch's own compiler calls for a linear layer on a CPU.
ONEDNN = _has_onednn()


def _by_onednn(x: Tensor) -> bool:
    return (
        ONEDNN
        and choose.product(x.device.type, x.dtype, x.numel()) == "onednn"
        and bool(torch.backends.mkldnn.enabled)
        # A traced graph is to hold convolutions, which every compiler knows.
        and not torch.compiler.is_compiling()
    )


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``rows @ weight.T + bias``"""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def matrix(image: Tensor) -> Tensor:
    """Pixels by channels; a view where channels are innermost."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _image(rows: Tensor, like: Tensor) -> Tensor:
    n, _, h, w = like.shape
    return rows.view(n, h, w, rows.shape[1]).permute(0, 3, 1, 2)


def project(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """1x1 convolution: image (N, C, H, W), weight (O, C, 1, 1), bias (O) -> (N, O, H, W), channels_last."""
    if convolutions.widens(image):
        return project(*convolutions.wide(image, weight, bias)).to(image.dtype)
    if _by_onednn(image):
        return _image(_product(matrix(image), weight.flatten(1), bias), image)
    return convolutions.conv2d(image, weight, bias)


def backward_x(grad: Tensor, image: Tensor, weight: Tensor) -> Tensor:
    """Gradient of ``image`` in :func:`project`."""
    if convolutions.widens(grad):
        return backward_x(*convolutions.wide(grad, image, weight)).to(grad.dtype)
    if _by_onednn(grad):
        return _image(_product(matrix(grad), weight.flatten(1).t()), grad)
    return convolutions.backward(grad, image, weight, (True, False, False))[0]


def backward_weight(grad: Tensor, image: Tensor, weight: Tensor) -> Tensor:
    """Gradient of ``weight`` in :func:`project`."""
    if convolutions.widens(grad):
        return backward_weight(*convolutions.wide(grad, image, weight)).to(weight.dtype)
    if _by_core(grad):
        return torch.ops.wavemix_kernels.project_backward_weight(grad, image).reshape(weight.shape)
    return convolutions.backward(grad, image, weight, (False, True, False))[1]


def _by_core(x: Tensor) -> bool:
    return (
        _native.cpu_isa is not None
        and choose.product_backward_weight(x.device.type, x.dtype) == "core"
        and not torch.compiler.is_compiling()
    )


def _backward_weight(grad: Tensor, image: Tensor) -> Tensor:
    core: Any = _native.core
    rows, of_image = matrix(grad), matrix(image)
    out = grad.new_empty((rows.shape[1], of_image.shape[1]))
    core.conv1x1_backward_weight_cpu(
        _native.DTYPES[grad.dtype], (rows.shape[0], *out.shape), (rows.data_ptr(), rows.stride(0)),
        (of_image.data_ptr(), of_image.stride(0)), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


_library.impl("project_backward_weight", _backward_weight, "CPU")
torch.library.register_fake(
    "wavemix_kernels::project_backward_weight",
    lambda grad, image: grad.new_empty((grad.shape[1], image.shape[1])),
    lib=_library,
)


def backward_bias(grad: Tensor) -> Tensor:
    """Gradient of ``bias`` in :func:`project`, summed in fp32 for the half types."""
    if grad.device.type == "cuda":
        return grad.sum((0, 2, 3))  # which sums so by itself, and rounds in the same launch
    return grad.sum((0, 2, 3), dtype=accumulate_dtype(grad.dtype)).to(grad.dtype)


def depthwise_backward(grad: Tensor, image: Tensor, weight: Tensor, want_image: bool) -> tuple[Tensor | None, Tensor]:
    """Gradients of the image and the weight (C, 1, 3, 3) of a depthwise convolution, padded by 1."""
    d_image, d_weight, _ = convolutions.backward(grad, image, weight, (want_image, True, False), 1, image.shape[1])
    return d_image, d_weight
