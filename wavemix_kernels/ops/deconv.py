"""``deconv``: the Waveblock's transposed convolution, 4x4 taps, stride 2, padding 1, three quarters of its arithmetic.

On a CPU by minimal filtering (csrc/cpu/deconv.cpp: 36 products where the definition has 64); elsewhere the library's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels import _native, backends, checks
from wavemix_kernels.ops import layout, selftest
from wavemix_kernels.ops.autograd import differentiable

_library = torch.library.Library("wavemix_kernels", "FRAGMENT")
_library.define("deconv(Tensor u, Tensor weight, Tensor? bias, str backend) -> Tensor")
_library.define("deconv_input_grad(Tensor grad, Tensor weight, str backend) -> Tensor")
_library.define("deconv_weight_grad(Tensor grad, Tensor u, bool has_bias, str backend) -> Tensor[]")

TAPS, STRIDE, PADDING = 4, 2, 1


def deconv(u: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """``conv_transpose2d(u, weight, bias, stride=2, padding=1)`` with 4x4 taps.

    Under autocast all take the autocast dtype, as a convolution's do.

    Args:
        u: (N, F, H, W), float64, float32, float16 or bfloat16.
        weight: (F, O, 4, 4), same dtype and device; bias: (O) or None.
        backend: for this call instead of the ambient :class:`wavemix_kernels.backend`.

    Returns:
        (N, O, 2H, 2W), channels_last.

    Raises:
        TypeError, ValueError: types, shapes, dtypes or devices that do not belong together.

    Backward is not differentiable again, except on backend ``"reference"``.
    """
    checks.check_tensor("u", u, 4, "(N, F, H, W)")
    checks.check_tensor("weight", weight, 4, "(F, O, 4, 4)")
    if weight.shape[0] != u.shape[1] or tuple(weight.shape[2:]) != (TAPS, TAPS):
        raise ValueError(f"weight: expected ({u.shape[1]}, O, 4, 4) to go with u, got {tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[1],):
        raise ValueError(f"bias: expected shape ({weight.shape[1]},), got {tuple(bias.shape)}")
    u, weight, bias = checks.autocast(u, weight, bias)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            checks.check_same_device(name, tensor, "u", u)
            checks.check_same_dtype(name, tensor, "u", u)
    chosen = backends.requested(backend)
    if chosen == "reference":
        return F.conv_transpose2d(u, weight, bias, STRIDE, PADDING)
    return fused(u, weight, bias, chosen)


# --- CPU -------------------------------------------------------------------------------------------------

#: Below so many channels on either side the sums around the products cost more than they save.
NARROW = 32


def _library_is_faster(u_channels: int, y_channels: int, dtype: torch.dtype, gradient_of_weight: bool) -> bool:
    """Measured (AMD EPYC with AVX-512, 2 threads), this kernel's time over oneDNN's: fp32 0.67, 0.73 and 0.46 (forward,
    gradients of input and weight) at 192 channels, 0.83, 0.84 and 0.48 at 64, 0.8, 1.4 and 1.0 at 16. oneDNN multiplies
    half types twice as fast, where this kernel widens them: 1.2, 1.35 and 0.69 at 192 channels."""
    if dtype == torch.float64:
        return False
    return not gradient_of_weight and (dtype != torch.float32 or min(u_channels, y_channels) < NARROW)


def _size(u: Tensor, y: Tensor) -> tuple[int, ...]:
    return u.shape[0], u.shape[1], y.shape[1], u.shape[2], u.shape[3]


def _cpu_forward(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _library_is_faster(u.shape[1], weight.shape[1], u.dtype, False):
        return _reference_forward(u, weight, bias)
    core: Any = _native.core
    u, weight, y = layout.channels_inner(u), weight.contiguous(), _empty_output(u, weight)
    bias = None if bias is None else bias.contiguous()
    core.deconv_forward_cpu(
        _native.DTYPES[u.dtype], _size(u, y), _native.address(u), _native.address(y), weight.data_ptr(),
        0 if bias is None else bias.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _cpu_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    if _library_is_faster(weight.shape[0], grad.shape[1], grad.dtype, False):
        return _reference_input_grad(grad, weight)
    core: Any = _native.core
    grad, weight, u = layout.channels_inner(grad), weight.contiguous(), _empty_input(grad, weight)
    core.deconv_input_grad_cpu(
        _native.DTYPES[u.dtype], _size(u, grad), _native.address(u), _native.address(grad), weight.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return u


def _cpu_weight_grad(grad: Tensor, u: Tensor, has_bias: bool) -> list[Tensor]:
    core: Any = _native.core
    grad, u = layout.channels_inner(grad), layout.channels_inner(u)
    out = _empty_weights(grad, u, has_bias)
    core.deconv_weight_grad_cpu(
        _native.DTYPES[u.dtype], _size(u, grad), _native.address(u), _native.address(grad), out[0].data_ptr(),
        out[1].data_ptr() if has_bias else 0, torch.get_num_threads(),
    )  # fmt: skip
    return out


# --- The library -----------------------------------------------------------------------------------------


def _channels_last(x: Tensor) -> Tensor:
    # A copy only where the library answered in another order: its strides must be those that were announced.
    return x if x.stride() == layout.empty(x.new_empty(0), x.shape, True).stride() else layout.laid_out(x, True)


def _reference_forward(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _channels_last(F.conv_transpose2d(u, weight, bias, STRIDE, PADDING))


def _reference_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    return _channels_last(F.conv2d(grad, weight, None, STRIDE, PADDING))


def _reference_weight_grad(grad: Tensor, u: Tensor, has_bias: bool) -> list[Tensor]:
    weight = u.new_empty(u.shape[1], grad.shape[1], TAPS, TAPS)  # its shape alone is read
    _, d_weight, d_bias = torch.ops.aten.convolution_backward(
        grad, u, weight, [grad.shape[1]], [STRIDE] * 2, [PADDING] * 2, [1, 1], True, [0, 0], 1, [False, True, has_bias]
    )
    return [d_weight.contiguous(), *([d_bias] if has_bias else [])]


BACKENDS: dict[str, backends.Backend] = {
    "cpu": backends.Backend(
        backends.cpu_why_not,
        {"forward": _cpu_forward, "input_grad": _cpu_input_grad, "weight_grad": _cpu_weight_grad},
    ),
    "reference": backends.Backend(
        backends.reference_why_not,
        {"forward": _reference_forward, "input_grad": _reference_input_grad, "weight_grad": _reference_weight_grad},
    ),
}


# --- The operators ---------------------------------------------------------------------------------------


def _empty_output(u: Tensor, weight: Tensor) -> Tensor:
    n, _, h, w = u.shape
    return layout.empty(u, [n, weight.shape[1], 2 * h, 2 * w], True)


def _empty_input(grad: Tensor, weight: Tensor) -> Tensor:
    n, _, h, w = grad.shape
    return layout.empty(grad, [n, weight.shape[0], h // 2, w // 2], True)


def _empty_weights(grad: Tensor, u: Tensor, has_bias: bool) -> list[Tensor]:
    d_weight = u.new_empty(u.shape[1], grad.shape[1], TAPS, TAPS)
    return [d_weight, *([u.new_empty(grad.shape[1])] if has_bias else [])]


def _forward(u: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return backends.select("deconv", BACKENDS, backend, u, weight).functions["forward"](u, weight, bias)


def _input_grad(grad: Tensor, weight: Tensor, backend: str) -> Tensor:
    return backends.select("deconv_input_grad", BACKENDS, backend, grad, weight).functions["input_grad"](grad, weight)


def _weight_grad(grad: Tensor, u: Tensor, has_bias: bool, backend: str) -> list[Tensor]:
    chosen = backends.select("deconv_weight_grad", BACKENDS, backend, grad, u)
    return chosen.functions["weight_grad"](grad, u, has_bias)


_library.impl("deconv", _forward, "CompositeExplicitAutograd")
_library.impl("deconv_input_grad", _input_grad, "CompositeExplicitAutograd")
_library.impl("deconv_weight_grad", _weight_grad, "CompositeExplicitAutograd")
torch.library.register_fake(
    "wavemix_kernels::deconv", lambda u, weight, bias, backend: _empty_output(u, weight), lib=_library
)
torch.library.register_fake(
    "wavemix_kernels::deconv_input_grad", lambda grad, weight, backend: _empty_input(grad, weight), lib=_library
)
torch.library.register_fake(
    "wavemix_kernels::deconv_weight_grad",
    lambda grad, u, has_bias, backend: _empty_weights(grad, u, has_bias),
    lib=_library,
)


def input_grad(grad: Tensor, weight: Tensor, backend: str) -> Tensor:
    """Gradient of u."""
    return torch.ops.wavemix_kernels.deconv_input_grad(grad, weight, backend)


def weight_grad(grad: Tensor, u: Tensor, has_bias: bool, backend: str) -> tuple[Tensor, Tensor | None]:
    """Gradients of weight and bias."""
    d_weight, *d_bias = torch.ops.wavemix_kernels.deconv_weight_grad(grad, u, has_bias, backend)
    return d_weight, d_bias[0] if has_bias else None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    u, weight, bias, ctx.backend = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(u, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    u, weight = ctx.saved_tensors
    return (
        input_grad(grad, weight, ctx.backend), *weight_grad(grad, u, ctx.has_bias, ctx.backend), None
    )  # fmt: skip


#: (u, weight, bias, backend) -> output, with its gradient.
fused = differentiable(_library, "deconv", _setup, _backward, once=True)


def self_test(backend: str, device: torch.device) -> tuple[float, float]:
    """An odd size, 40 channels to 36, and all gradients: (error, bound)."""
    error = selftest.against_reference(
        lambda u, w, b: [deconv(u, w, b, backend=backend)],
        lambda u, w, b: [F.conv_transpose2d(u, w, b, STRIDE, PADDING)],
        [selftest.pattern(2, 40, 5, 7), selftest.pattern(40, 36, 4, 4), selftest.pattern(36)],
        device,
    )
    return error, selftest.rounding_bound(4 * 40)
