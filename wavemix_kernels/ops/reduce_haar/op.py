"""``reduce_haar``: a Waveblock's 1x1 convolution and all its Haar levels, straight into the block's channel order."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from wavemix_kernels import _native, backends, checks, fx, log
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import chips, convolutions, layout, precision, selftest
from wavemix_kernels.ops.common.autograd import differentiable
from wavemix_kernels.ops.common.library import Library
from wavemix_kernels.ops.haar import op as haar
from wavemix_kernels.ops.haar import pyramid as haar_pyramid
from wavemix_kernels.ops.reduce_haar import reference
from wavemix_kernels.ops.reduce_haar.tiles import is_narrow
from wavemix_kernels.tracing import constant_result

#: Most inputs and outputs of the CUDA kernel of the gradients (csrc/cuda/reduce_haar/reduce_haar_gradients.cu).
_CUDA_CHANNELS, _CUDA_OUTPUTS = 256, 64

_library = Library()
_library.define(
    "reduce_haar(Tensor x, Tensor weight, Tensor? bias, int levels, bool channels_last, str backend) -> Tensor[]"
)
_library.define(
    "reduce_haar_backward(Tensor[] grads, Tensor x, Tensor weight, Tensor? add, bool has_bias, str backend) -> Tensor[]"
)


def reduce_haar(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    levels: int = 1,
    *,
    channels_last: bool | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """1x1 convolution + bias, then every Haar level: ``Z_l = [LL_l | LH_l, HL_l, HH_l of each channel]``.

    Reads x once; the reduced image itself never reaches memory on the fused backends. Under autocast x and the
    weights take the autocast dtype, as a convolution's do.

    Args:
        x: (N, C, H, W), H and W multiples of ``2**levels``; float64, float32, float16 or bfloat16, any strides.
        weight: (O, C, 1, 1), same dtype and device.
        bias: (O) or None.
        levels: 1 to 5.
        channels_last: memory format of the results; default: x's own.
        backend: for this call instead of the ambient :class:`wavemix_kernels.backend`.

    Returns:
        Z_1 … Z_levels, Z_l of shape (N, 4O, H/2^l, W/2^l).

    Raises:
        TypeError, ValueError: types, shapes, dtypes or devices that do not belong together; a call that the backend
            asked for cannot serve.
        RuntimeError: the backend asked for is not installed.

    Source: WaveMix (arXiv:2205.14375), the Waveblock's reduction and DWT.
    """
    if isinstance(x, fx.Proxy):
        name = backends.requested(backend)
        return fx.call_function(reduce_haar, x, weight, bias, levels, channels_last=channels_last, backend=name)
    checks.check_tensor("x", x, 4, "(N, C, H, W)")
    checks.check_tensor("weight", weight, 4, "(O, C, 1, 1)")
    checks.check_positive_int("levels", levels)
    if levels > haar.MAX_LEVELS:
        raise ValueError(f"levels={levels}: expected 1 to {haar.MAX_LEVELS}")
    if tuple(weight.shape[1:]) != (x.shape[1], 1, 1):
        raise ValueError(f"weight: expected shape (O, {x.shape[1]}, 1, 1) to go with x, got {tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    for axis, size in (("H", x.shape[2]), ("W", x.shape[3])):
        checks.check_multiple(f"x: {axis}", size, 2**levels)
    x, weight, bias = checks.autocast(x, weight, bias)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            checks.check_same_device(name, tensor, "x", x)
            checks.check_same_dtype(name, tensor, "x", x)
    order = layout.is_channels_last(x) if channels_last is None else channels_last
    return fused(x, weight, bias, levels, order, backends.requested(backend))


def _inner(x: Tensor) -> Tensor:
    """``x`` where its channels or its pixels are contiguous, else a copy."""
    return x if x.stride(1) == 1 or x.stride(3) == 1 else layout.laid_out(x, layout.is_channels_last(x))


def _addresses(images: list[Tensor]) -> list[list[int]]:
    """Addresses of images with contiguous channels; the stride of a single channel is made 1."""
    out = [list(_native.address(t)) for t in images]
    for address in out:
        address[2] = 1
    return out


def _cpu(x: Tensor, weight: Tensor, bias: Tensor | None, levels: int, channels_last: bool) -> list[Tensor]:
    if not channels_last:
        # The kernel's products give channels_last alone; the library's convolution keeps this order.
        return haar_pyramid.pyramid(convolutions.conv2d(x.contiguous(), weight, bias), levels, False, "cpu")
    core: Any = _native.core
    x, out = _inner(x), haar_pyramid.empty_pyramid(x, weight.shape[0], levels, True)
    a = _native.address
    core.reduce_haar_cpu(
        _native.DTYPES[x.dtype], levels, x.shape, weight.shape[0], a(x), a(weight[:, :, 0, 0]), a(bias),
        _addresses(out), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _cpu_backward(grads: list[Tensor], x: Tensor, weight: Tensor, add: Tensor | None, has_bias: bool) -> list[Tensor]:
    core: Any = _native.core
    order = layout.is_channels_last(x)
    out = _backward_fake(grads, x, weight, add, has_bias)
    x, grads = _inner(x), [layout.channels_inner(g) for g in grads]
    if add is not None and add.stride() != out[0].stride():
        add = layout.laid_out(add, order)
    a = _native.address
    core.reduce_haar_backward_cpu(
        _native.DTYPES[x.dtype], len(grads), x.shape, weight.shape[0], a(x), a(weight[:, :, 0, 0]), _addresses(grads),
        a(out[0]), a(add), out[1].data_ptr(), out[2].data_ptr() if has_bias else 0, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _cuda(x: Tensor, weight: Tensor, bias: Tensor | None, levels: int, channels_last: bool) -> list[Tensor]:
    out = haar_pyramid.empty_pyramid(x, weight.shape[0], levels, channels_last)
    a = _native.address
    _native.launch(
        "reduce_haar_cuda", x.device, _native.DTYPES[x.dtype], levels, x.shape, weight.shape[0], a(x),
        a(weight[:, :, 0, 0]), a(bias), [a(z) for z in out], precision.tf32(),
    )  # fmt: skip
    return out


def why_not_cuda_backward(x: Tensor, weight: Tensor, norm: bool = False) -> str | None:
    """Why the CUDA kernel of the gradients cannot serve a call, or None; ``norm``: with a BatchNorm's sums."""
    outputs, channels = weight.shape[:2]
    if (reason := backends.cuda_why_not(x, weight)) is not None:
        return reason
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"its gradients take float16 and bfloat16, got {str(x.dtype).removeprefix('torch.')}"
    if channels % 8 or outputs % 2 or channels > _CUDA_CHANNELS or outputs > _CUDA_OUTPUTS:
        return (
            f"its gradients take multiples of 8 up to {_CUDA_CHANNELS} channels and of 2 up to {_CUDA_OUTPUTS} "
            f"outputs, got {channels} and {outputs}"
        )
    if x.shape[0] * x.shape[2] * x.shape[3] >= 2**31:
        return f"its gradients take fewer than 2^31 pixels, got a batch of {tuple(x.shape)}"
    return _why_no_room(x.device, channels, outputs, norm)


@constant_result
def _why_no_room(device: torch.device, channels: int, outputs: int, norm: bool) -> str | None:
    wanted, most = _shared_of_backward(channels, outputs, norm), chips.shared_of_block(device)
    if wanted <= most:
        return None
    return f"its gradients take {wanted} bytes of shared memory, a block of this device has {most}"


@functools.cache
def _shared_of_backward(channels: int, outputs: int, norm: bool) -> int:
    core: Any = _native.cuda_core
    return core.reduce_haar_backward_shared_cuda(channels, outputs, norm)


def is_dense(image: Tensor, channels_last: bool) -> bool:
    """Whether the image is dense in this order, and aligned for accesses of 16 bytes."""
    if not image.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format):
        return False
    # A traced tensor has no address: the operator asks again when it runs.
    traced = torch.compiler.is_compiling() or type(image) not in (Tensor, torch.nn.Parameter)
    return traced or image.data_ptr() % 16 == 0


def _dense(image: Tensor, channels_last: bool) -> Tensor:
    return image if is_dense(image, channels_last) else layout.laid_out(image, channels_last)


def _is_by_image(image: Tensor) -> bool:
    """Whether the pixels of an image share one value a channel, as the gradient of an average has it."""
    return image.stride() == (image.shape[1], 1, 0, 0) and image.data_ptr() % 16 == 0


def _row(image: Tensor) -> int:
    """Elements from a pixel to the next, where pixels follow each other in channels_last order."""
    by_axis = zip(image.shape, image.stride(), strict=True)
    n, _, h, w = (stride if size > 1 else 0 for size, stride in by_axis)
    return w or h or n or image.shape[1]


def _pixels(image: Tensor) -> Tensor:
    """Pixels one after the other in channels_last order, whole words of other channels beside them, or a copy."""
    _, c, h, w = image.shape
    row = _row(image)
    wanted = (h * w * row, 1, w * row, row)
    follow = all(size == 1 or a == b for size, a, b in zip(image.shape, image.stride(), wanted, strict=True))
    return (
        image if follow and row >= c and row % 8 == 0 and image.data_ptr() % 16 == 0 else layout.laid_out(image, True)
    )


def cuda_backward(
    grads: list[Tensor], x: Tensor, weight: Tensor, add: Tensor | None, has_bias: bool,
    norm: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> list[Tensor]:  # fmt: skip
    """``norm``: y, mean and invstd of a BatchNorm before x, and the (2, C) that takes the sums of its gradient
    (csrc/include/wavemix/reduce_haar.h, NormSumArgs)."""
    core: Any = _native.cuda_core
    out = _backward_fake(grads, x, weight, add, has_bias)
    order = layout.is_channels_last(x)
    x, weight, grads = _dense(x, order), weight[:, :, 0, 0].contiguous(), [_pixels(g) for g in grads]
    if add is not None and not (norm is not None and _is_by_image(add)):
        add = _dense(add, order)
    size = _native.DTYPES[x.dtype], len(grads), x.shape, weight.shape[0]
    chip = _native.multiprocessors(x.device), chips.shared_of_block(x.device) + chips.SHARED_OF_SYSTEM
    bytes_of_sums = core.reduce_haar_backward_workspace_cuda(*size, norm is not None, *chip)
    workspace = x.new_empty(bytes_of_sums, dtype=torch.uint8)
    a, pointer = _native.address, _native.pointer
    _native.launch(
        "reduce_haar_backward_cuda", x.device, *size, a(x), a(weight), [(pointer(g), 0, 1, 0, _row(g)) for g in grads],
        a(out[0]), a(add),
        pointer(out[1]), pointer(out[2]) if has_bias else 0, [pointer(t) for t in norm or ()], pointer(workspace),
        *chip,
    )  # fmt: skip
    return out


def _is_narrow(x: Tensor, weight: Tensor, levels: int) -> bool:
    """Whether Triton's kernels for narrow images serve a call."""
    dense = x.is_contiguous(memory_format=torch.channels_last)
    return dense and is_narrow(x.dtype.itemsize, levels, *weight.shape[:2])


def _triton(x: Tensor, weight: Tensor, bias: Tensor | None, levels: int, channels_last: bool) -> list[Tensor]:
    from wavemix_kernels.ops.reduce_haar import triton as kernels
    from wavemix_kernels.ops.reduce_haar import triton_narrow as narrow

    out = haar_pyramid.empty_pyramid(x, weight.shape[0], levels, channels_last)
    bias = None if bias is None else bias.contiguous()
    if channels_last and _is_narrow(x, weight, levels):
        narrow.forward(out[0], x, weight[:, :, 0, 0].contiguous(), bias)
    else:
        kernels.forward(out, x, weight[:, :, 0, 0].contiguous(), bias, channels_last)
    return out


def _triton_backward(
    grads: list[Tensor], x: Tensor, weight: Tensor, add: Tensor | None, has_bias: bool
) -> list[Tensor]:
    from wavemix_kernels.ops.reduce_haar import triton_backward as kernels
    from wavemix_kernels.ops.reduce_haar import triton_narrow as narrow

    out = _backward_fake(grads, x, weight, add, has_bias)
    # A Waveblock's gradients come so from its MLP; copies of others are a third of x's size at most.
    grads = [g.contiguous(memory_format=torch.channels_last) for g in grads]
    dx, dw, *db = out
    gradients = dx, dw, db[0] if db else None
    if _is_narrow(x, weight, len(grads)):
        narrow.backward(
            *gradients, grads, x, weight[:, :, 0, 0].contiguous(), None if add is None else _dense(add, True)
        )
    else:
        kernels.backward(*gradients, grads, x, weight[:, :, 0, 0].contiguous(), add)
    return out


BACKENDS: dict[str, backends.Backend] = {
    "triton": backends.Backend(backends.triton_products_why_not, {"forward": _triton, "backward": _triton_backward}),
    # float16 is what both of them serve.
    "cuda": backends.Backend(backends.cuda_why_not, {"forward": _cuda, "backward": cuda_backward}, torch.float16),
    "cpu": backends.Backend(backends.cpu_why_not, {"forward": _cpu, "backward": _cpu_backward}),
    "reference": backends.Backend(backends.reference_why_not, {}),
}


def _reduce_haar(
    x: Tensor, weight: Tensor, bias: Tensor | None, levels: int, channels_last: bool, backend: str
) -> list[Tensor]:
    order = choose.reduce_haar(choose.order(x.device.type), channels_last and _is_narrow(x, weight, levels))
    chosen = choose.select("reduce_haar", BACKENDS, backend, x, weight, order=order)
    if not chosen.functions:
        return [layout.laid_out(z, channels_last) for z in reference.reduce_haar(x, weight, bias, levels)]
    return chosen.functions["forward"](x, weight, bias, levels, channels_last)


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, levels: int, channels_last: bool, backend: str
) -> list[Tensor]:
    return haar_pyramid.empty_pyramid(x, weight.shape[0], levels, channels_last)


def _backward_fake(
    grads: list[Tensor], x: Tensor, weight: Tensor, add: Tensor | None, has_bias: bool, backend: str = ""
) -> list[Tensor]:
    bias = [weight.new_empty(weight.shape[0])] if has_bias else []
    return [layout.empty(x, x.shape, layout.is_channels_last(x)), weight.new_empty(weight.shape), *bias]


def _backward_op(
    grads: list[Tensor], x: Tensor, weight: Tensor, add: Tensor | None, has_bias: bool, backend: str
) -> list[Tensor]:
    order = choose.with_kernels("backward", BACKENDS, x.device.type)
    order = choose.reduce_haar(order, _is_narrow(x, weight, len(grads)))
    asked = backend == "cuda" or (backend == "auto" and "cuda" in order)
    no_cuda = why_not_cuda_backward(x, weight) if asked else None
    if no_cuda is not None:
        order = tuple(name for name in order if name != "cuda")
        if not torch.compiler.is_compiling() and log.enabled():
            line = f"reduce_haar_backward {tuple(x.shape)}, {tuple(weight.shape)}: not by cuda: {no_cuda}"
            log.once(line, lambda: line)
    chosen = choose.select("reduce_haar_backward", BACKENDS, backend, x, weight, order=order)
    if "backward" in chosen.functions and not (chosen is BACKENDS["cuda"] and no_cuda):
        return chosen.functions["backward"](grads, x, weight, add, has_bias)
    channels_last = layout.is_channels_last(x)
    part = choose.for_part(backend, haar_pyramid.BACKENDS)
    reduced = torch.ops.wavemix_kernels.haar_pyramid_backward(grads, channels_last, part)
    dx, dw, *db = _library_gradients(reduced, x, weight, (True, True, has_bias))
    dx = dx if add is None else dx + add
    wanted = layout.empty(x.new_empty(0), x.shape, channels_last).stride()
    return [
        dx if dx.stride() == wanted else layout.laid_out(dx, channels_last),
        dw.contiguous(),
        *(db if has_bias else []),
    ]


_library.impl("reduce_haar_backward", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("wavemix_kernels::reduce_haar_backward", _backward_fake, lib=_library)
_library.impl("reduce_haar", _reduce_haar, "CompositeExplicitAutograd")
torch.library.register_fake("wavemix_kernels::reduce_haar", _fake, lib=_library)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weight, bias, _, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _library_gradients(reduced: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]) -> Any:
    return convolutions.backward(reduced, x, weight, mask)


def backward(
    grads: list[Tensor], x: Tensor, weight: Tensor, has_bias: bool, add: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x (with ``add`` added, in x's memory format), weight and bias, not differentiable again."""
    dx, dw, *db = torch.ops.wavemix_kernels.reduce_haar_backward(grads, x, weight, add, has_bias, backend)
    return dx, dw, db[0] if has_bias else None


def _backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    pyramid = choose.for_part(ctx.backend, haar_pyramid.BACKENDS)
    reduced = haar_pyramid.backward(list(grads), layout.is_channels_last(x), pyramid)
    return (*_library_gradients(reduced, x, weight, (True, True, ctx.has_bias)), None, None, None)


def _standard(
    x: Tensor, weight: Tensor, bias: Tensor | None, levels: int, channels_last: bool, backend: str
) -> list[Tensor]:
    return reference.reduce_haar(x, weight, bias, levels)


#: (x, weight, bias, levels, channels_last, backend) -> [Z_1 …], with its gradient.
fused = differentiable(_library, "reduce_haar", _setup, _backward, standard=_standard)


def self_test(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """One level and two on 16 channels, forward and all gradients, differentiable and in one launch: (error, bound)."""
    p = selftest.pattern
    error = selftest.against_reference(
        lambda x, w, b: reduce_haar(x, w, b, 2, backend=backend),
        lambda x, w, b: reference.reduce_haar(x, w, b, 2),
        [p(2, 16, 8, 12), p(4, 16, 1, 1), p(4)],
        device,
        dtype,
    )

    def run(levels: int, backend: str, x: Tensor, weight: Tensor, bias: Tensor, add: Tensor, *grads: Tensor) -> Any:
        zs = fused(x, weight, bias, levels, layout.is_channels_last(x), backend)
        return *zs, *backward([*grads], x, weight, True, add, backend)

    # One level of narrow images has kernels of its own, and so have each memory order and rows of whole 16-byte words.
    for levels, w in ((1, 12), (2, 12), (2, 16)):
        grads = [p(2, 16, 8 >> level, w >> level, phase=level) for level in range(1, levels + 1)]
        tensors = (p(2, 16, 8, w), p(4, 16, 1, 1), p(4), p(2, 16, 8, w, phase=3), *grads)
        exact = run(levels, "reference", *(t.to(dtype).to("cpu", torch.float64) for t in tensors))
        for order in (torch.contiguous_format, torch.channels_last):
            given = (t.to(device, dtype) for t in tensors)
            ordered = (t.contiguous(memory_format=order) if t.ndim == 4 else t for t in given)
            error = selftest.largest(error, selftest.largest_error(run(levels, backend, *ordered), exact))
    return error, selftest.rounding_bound(2 * 8 * 16, dtype)
