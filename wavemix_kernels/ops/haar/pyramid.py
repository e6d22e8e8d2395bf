"""``haar_pyramid``: every level's ``[LL | LH, HL, HH of each channel]``, as a Waveblock reads it, in one pass.

The pair (pyramid, its adjoint) closes under differentiation, as analysis and synthesis do.
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

_library = Library()
_library.define("haar_pyramid(Tensor x, int levels, bool channels_last, str backend) -> Tensor[]")
_library.define("haar_pyramid_backward(Tensor[] grads, bool channels_last, str backend) -> Tensor")


def haar_pyramid(
    x: Tensor, levels: int = 1, *, channels_last: bool | None = None, backend: str | None = None
) -> list[Tensor]:
    """The Haar pyramid of a Waveblock: ``Z_l = [LL_l | LH_l, HL_l, HH_l of each channel]``.

    Args:
        x: (N, C, H, W), H and W multiples of ``2**levels``; float64, float32, float16 or bfloat16, any strides.
        levels: 1 to 5.
        channels_last: memory format of the results; default: x's own.
        backend: for this call instead of the ambient :class:`wavemix_kernels.backend`.

    Returns:
        Z_1 … Z_levels, Z_l of shape (N, 4C, H/2^l, W/2^l). Differentiable any number of times.

    Raises:
        TypeError, ValueError: as :func:`wavemix_kernels.haar_dwt2d`; H or W not a multiple of ``2**levels``.
    """
    if isinstance(x, fx.Proxy):
        name = backends.requested(backend)
        return fx.call_function(haar_pyramid, x, levels, channels_last=channels_last, backend=name)
    checks.check_tensor("x", x, 4, "(N, C, H, W)")
    checks.check_positive_int("levels", levels)
    if levels > haar.MAX_LEVELS:
        raise ValueError(f"levels={levels}: expected 1 to {haar.MAX_LEVELS}")
    for axis, size in (("H", x.shape[2]), ("W", x.shape[3])):
        checks.check_multiple(f"x: {axis}", size, 2**levels)
    order = layout.is_channels_last(x) if channels_last is None else channels_last
    return pyramid(x, levels, order, backends.requested(backend))


def _parts(z: Tensor) -> tuple[Tensor, Tensor]:
    """LL and bands (5-D) of one Z_l: views."""
    c = z.shape[1] // 4
    return z[:, :c], z[:, c:].unflatten(1, (c, 3))


def empty_pyramid(x: Tensor, channels: int, levels: int, channels_last: bool) -> list[Tensor]:
    n, _, h, w = x.shape
    return [layout.empty(x, [n, 4 * channels, h >> level, w >> level], channels_last) for level in range(1, levels + 1)]


#: The Haar kernels themselves, which can keep (and add) the LL of every level.
BACKENDS = haar.BACKENDS


def _pyramid(x: Tensor, levels: int, channels_last: bool, backend: str) -> list[Tensor]:
    chosen = choose.select("haar_pyramid", BACKENDS, backend, x)
    if not chosen.functions:
        return [layout.laid_out(z, channels_last) for z in reference.haar_pyramid(x, levels)]
    out = empty_pyramid(x, x.shape[1], levels, channels_last)
    lows, highs = zip(*map(_parts, out), strict=True)
    chosen.functions["analysis"](x, lows[-1], highs, 0.0, lows[:-1])
    return out


def _backward(grads: list[Tensor], channels_last: bool, backend: str) -> Tensor:
    chosen = choose.select("haar_pyramid_backward", BACKENDS, backend, *grads)
    if not chosen.functions:
        return layout.laid_out(reference.haar_pyramid_backward(grads), channels_last)
    n, c, h, w = grads[0].shape
    image = layout.empty(grads[0], [n, c // 4, 2 * h, 2 * w], channels_last)
    lows, highs = zip(*map(_parts, grads), strict=True)
    chosen.functions["synthesis"](image, lows[-1], highs, 0.0, None, lows[:-1])
    return image


def _pyramid_fake(x: Tensor, levels: int, channels_last: bool, backend: str) -> list[Tensor]:
    return empty_pyramid(x, x.shape[1], levels, channels_last)


def _backward_fake(grads: list[Tensor], channels_last: bool, backend: str) -> Tensor:
    n, c, h, w = grads[0].shape
    return layout.empty(grads[0], [n, c // 4, 2 * h, 2 * w], channels_last)


_library.impl("haar_pyramid", _pyramid, "CompositeExplicitAutograd")
_library.impl("haar_pyramid_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("wavemix_kernels::haar_pyramid", _pyramid_fake, lib=_library)
torch.library.register_fake("wavemix_kernels::haar_pyramid_backward", _backward_fake, lib=_library)


def _pyramid_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, ctx.levels, _, ctx.backend = inputs
    ctx.channels_last = layout.is_channels_last(x)


def _pyramid_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return backward(list(grads), ctx.channels_last, ctx.backend), None, None, None


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grads, _, ctx.backend = inputs
    ctx.levels, ctx.channels_last = len(grads), layout.is_channels_last(grads[0])


def _backward_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return pyramid(grad, ctx.levels, ctx.channels_last, ctx.backend), None, None


def _pyramid_standard(x: Tensor, levels: int, channels_last: bool, backend: str) -> list[Tensor]:
    return reference.haar_pyramid(x, levels)


def _backward_standard(grads: list[Tensor], channels_last: bool, backend: str) -> Tensor:
    return reference.haar_pyramid_backward(grads)


#: The operators with their gradients: (x, levels, channels_last, backend) -> [Z_1 …], and
#: (grads, channels_last, backend) -> gradient of x.
pyramid = differentiable(
    _library, "haar_pyramid", _pyramid_setup, _pyramid_backward, standard=_pyramid_standard, linear=True
)
backward = differentiable(
    _library, "haar_pyramid_backward", _backward_setup, _backward_backward, standard=_backward_standard, linear=True
)


def _pyramid_vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, *rest: Any) -> tuple[list[Tensor], list[int]]:
    out = torch.ops.wavemix_kernels.haar_pyramid(into_batch(x, in_dims[0], info.batch_size), *rest)
    return [t.unflatten(0, (info.batch_size, -1)) for t in out], [0] * len(out)


def _backward_vmap(info: Any, in_dims: tuple[Any, ...], grads: list[Tensor], *rest: Any) -> tuple[Tensor, int]:
    joined = [into_batch(t, d, info.batch_size) for t, d in zip(grads, in_dims[0], strict=True)]
    out = torch.ops.wavemix_kernels.haar_pyramid_backward(joined, *rest)
    return out.unflatten(0, (info.batch_size, -1)), 0


torch.library.register_vmap("wavemix_kernels::haar_pyramid", _pyramid_vmap, lib=_library)
torch.library.register_vmap("wavemix_kernels::haar_pyramid_backward", _backward_vmap, lib=_library)


def self_test(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """A three-level pyramid and its gradient: (error, bound)."""
    error = selftest.against_reference(
        lambda x: haar_pyramid(x, 3, backend=backend),
        lambda x: reference.haar_pyramid(x, 3),
        [selftest.pattern(2, 4, 16, 24)],
        device,
        dtype,
    )
    return error, selftest.rounding_bound(4**3, dtype)
