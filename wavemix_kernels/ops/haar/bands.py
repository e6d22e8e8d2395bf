"""``haar_bands``: one level of Haar with its four bands side by side, as WTConv's convolutions read them.

The kernels are :mod:`wavemix_kernels.ops.haar.op`'s: they take any strides, so LL and the other bands go straight to
their places in one tensor. Both directions are orthonormal, so each is the other's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wavemix_kernels import backends, checks, fx
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import layout, selftest
from wavemix_kernels.ops.common.autograd import differentiable
from wavemix_kernels.ops.common.library import Library
from wavemix_kernels.ops.haar import op as haar
from wavemix_kernels.ops.haar import reference
from wavemix_kernels.ops.haar.batching import into_batch

BACKENDS = haar.BACKENDS

_library = Library()
_library.define("haar_bands(Tensor x, str backend) -> Tensor")
_library.define("haar_from_bands(Tensor bands, bool channels_last, str backend) -> Tensor")


def haar_bands(x: Tensor, *, backend: str | None = None) -> Tensor:
    """LL, LH, HL and HH of each channel: (N, C, H, W) -> (N, C, 4, H/2, W/2).

    Args:
        x: H and W even; float64, float32, float16 or bfloat16, any strides.
        backend: for this call instead of the ambient :class:`wavemix_kernels.backend`.

    Returns:
        The bands in x's dtype; from a channels_last ``x`` so laid out that ``bands.flatten(1, 2)`` is a channels_last
        view. Differentiable any number of times.

    Raises:
        TypeError, ValueError: as :func:`wavemix_kernels.haar_dwt2d`; an odd H or W.
    """
    if isinstance(x, fx.Proxy):
        return fx.call_function(haar_bands, x, backend=backends.requested(backend))
    checks.check_tensor("x", x, 4, "(N, C, H, W)")
    for axis, size in (("H", x.shape[2]), ("W", x.shape[3])):
        checks.check_multiple(f"x: {axis}", size, 2)
    name = backends.requested(backend)
    return (_analysis if haar.inlined(name) else analysis)(x, name)


def haar_from_bands(bands: Tensor, *, backend: str | None = None) -> Tensor:
    """The inverse of :func:`haar_bands`: (N, C, 4, h, w) -> (N, C, 2h, 2w).

    Raises:
        TypeError, ValueError: no floating-point tensor of that shape, or a backend that cannot serve it.
    """
    if isinstance(bands, fx.Proxy):
        return fx.call_function(haar_from_bands, bands, backend=backends.requested(backend))
    checks.check_tensor("bands", bands, 5, "(N, C, 4, h, w)")
    if bands.shape[2] != 4:
        raise ValueError(f"bands: expected shape (N, C, 4, h, w), got {tuple(bands.shape)}")
    name = backends.requested(backend)
    channels_last = layout.is_channels_last(bands[:, :, 0])
    return (_synthesis if haar.inlined(name) else synthesis)(bands, channels_last, name)


def _empty_bands(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return layout.empty(x, [n, c, 4, h // 2, w // 2], layout.is_channels_last(x))


def _empty_image(bands: Tensor, channels_last: bool) -> Tensor:
    n, c, _, h, w = bands.shape
    return layout.empty(bands, [n, c, 2 * h, 2 * w], channels_last)


def _analysis_standard(x: Tensor, backend: str) -> Tensor:
    ll, (high,) = reference.analysis(x)
    return torch.cat((ll.unsqueeze(2), high), 2)


def _synthesis_standard(bands: Tensor, channels_last: bool, backend: str) -> Tensor:
    return reference.synthesis(bands[:, :, 0], [bands[:, :, 1:]])


def _analysis(x: Tensor, backend: str) -> Tensor:
    chosen = choose.select("haar_bands", BACKENDS, backend, x)
    if not chosen.functions:
        return layout.laid_out(_analysis_standard(x, backend), layout.is_channels_last(x))
    bands = _empty_bands(x)
    chosen.functions["analysis"](x, bands[:, :, 0], [bands[:, :, 1:]], 0.0)
    return bands


def _synthesis(bands: Tensor, channels_last: bool, backend: str) -> Tensor:
    chosen = choose.select("haar_from_bands", BACKENDS, backend, bands)
    if not chosen.functions:
        return layout.laid_out(_synthesis_standard(bands, channels_last, backend), channels_last)
    image = _empty_image(bands, channels_last)
    chosen.functions["synthesis"](image, bands[:, :, 0], [bands[:, :, 1:]], 0.0, None)
    return image


_library.impl("haar_bands", _analysis, "CompositeExplicitAutograd")
_library.impl("haar_from_bands", _synthesis, "CompositeExplicitAutograd")
torch.library.register_fake("wavemix_kernels::haar_bands", lambda x, backend: _empty_bands(x), lib=_library)
torch.library.register_fake(
    "wavemix_kernels::haar_from_bands",
    lambda bands, channels_last, backend: _empty_image(bands, channels_last),
    lib=_library,
)


def _analysis_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.backend = inputs
    ctx.channels_last = layout.is_channels_last(x)


def _analysis_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return synthesis(grad, ctx.channels_last, ctx.backend), None


def _synthesis_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, ctx.backend = inputs


def _synthesis_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return analysis(grad, ctx.backend), None, None


#: The operators with their gradients: (x, backend) -> bands, and (bands, channels_last, backend) -> image.
analysis = differentiable(
    _library, "haar_bands", _analysis_setup, _analysis_backward, standard=_analysis_standard, linear=True
)
synthesis = differentiable(
    _library, "haar_from_bands", _synthesis_setup, _synthesis_backward, standard=_synthesis_standard, linear=True
)


def _analysis_vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, backend: str) -> tuple[Tensor, int]:
    bands = torch.ops.wavemix_kernels.haar_bands(into_batch(x, in_dims[0], info.batch_size), backend)
    return bands.unflatten(0, (info.batch_size, -1)), 0


def _synthesis_vmap(
    info: Any, in_dims: tuple[Any, ...], bands: Tensor, channels_last: bool, backend: str
) -> tuple[Tensor, int]:
    joined = into_batch(bands, in_dims[0], info.batch_size)
    image = torch.ops.wavemix_kernels.haar_from_bands(joined, channels_last, backend)
    return image.unflatten(0, (info.batch_size, -1)), 0


torch.library.register_vmap("wavemix_kernels::haar_bands", _analysis_vmap, lib=_library)
torch.library.register_vmap("wavemix_kernels::haar_from_bands", _synthesis_vmap, lib=_library)


def self_test(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """There and back with the bands scaled, and the gradient of that: (error, bound)."""
    scale = selftest.pattern(4, 1, 1)

    def scaled(x: Tensor) -> list[Tensor]:
        bands = haar_bands(x, backend=backend)
        return [haar_from_bands(bands * scale.to(bands), backend=backend)]

    def exact(x: Tensor) -> list[Tensor]:
        ll, (high,) = reference.analysis(x)
        return [reference.synthesis(ll * scale[0], [high * scale[1:]])]

    error = selftest.against_reference(scaled, exact, [selftest.pattern(2, 4, 14, 12)], device, dtype)
    return error, selftest.rounding_bound(2 * 4, dtype)
