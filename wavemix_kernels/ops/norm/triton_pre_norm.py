"""The norm in front of a residual branch, its gradient and the sum behind the branch, in Triton.

One kernel is every pass that writes an image: ``(u - center) scale + shift + v rise + w``, with up to three images
of any layouts and parameters by channel, by image or both. Statistics are BatchNorm's (:mod:`.batch_norm`); the sums of
a gradient that is normalised by image are made here, for each image and channel. Results are the same in every run.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels import _native
from wavemix_kernels.ops import tuned
from wavemix_kernels.ops.common import triton_sums
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.common.triton_launch import Launch
from wavemix_kernels.ops.norm import triton_batch_norm as batch_norm
from wavemix_kernels.ops.norm import triton_finish as finish
from wavemix_kernels.ops.norm.triton_batch_norm import NormConfig, _offsets, config_for, search_space

_PROGRAMS = 4  # for each multiprocessor


@triton.jit(do_not_specialize=("tiles", "outer0"))
def _map_kernel(
    out, u, v, w, center, scale, shift, rise, weight, tiles: tl.int64, run: tl.int64, outer0: tl.int64, channels,
    center_n, center_c, scale_n, scale_c, shift_n, shift_c, rise_n, rise_c,
    out_n: tl.int64, out_1: tl.int64, out_0: tl.int64, out_p, out_c,
    u_n: tl.int64, u_1: tl.int64, u_0: tl.int64, u_p, u_c,
    v_n: tl.int64, v_1: tl.int64, v_0: tl.int64, v_p, v_c,
    w_n: tl.int64, w_1: tl.int64, w_0: tl.int64, w_p, w_c,
    HAS_NORM: tl.constexpr,  # center and shift
    HAS_SCALE: tl.constexpr,
    WEIGHT: tl.constexpr,  # by channel, of any dtype: "none"; a factor of "scale"; of "rise"
    HAS_V: tl.constexpr, HAS_W: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """A tile of one image. `tiles`: of each image."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(channels, CHANNELS)
    channel = (program % blocks).to(tl.int32) * CHANNELS + tl.arange(0, CHANNELS)
    program = program // blocks
    image, tile = program // tiles, program % tiles
    known = channel < channels
    at, valid = _offsets(tile, run, outer0, (u_1, u_0, u_p, u_c), channel.to(tl.int64), POSITIONS)
    mask = valid[:, None] & known[None, :]
    value = tl.load(u + image * u_n + at, mask=mask, other=0.0).to(REAL)
    if HAS_NORM:
        value -= tl.load(center + image * center_n + channel * center_c, mask=known, other=0.0)[None, :]
    if HAS_SCALE:
        factor = tl.load(scale + image * scale_n + channel * scale_c, mask=known, other=0.0).to(REAL)
        if WEIGHT == "scale":
            factor *= tl.load(weight + channel, mask=known, other=0.0).to(REAL)
        value *= factor[None, :]
    if HAS_NORM:
        value += tl.load(shift + image * shift_n + channel * shift_c, mask=known, other=0.0).to(REAL)[None, :]
    if HAS_V:
        at, valid = _offsets(tile, run, outer0, (v_1, v_0, v_p, v_c), channel.to(tl.int64), POSITIONS)
        term = tl.load(v + image * v_n + at, mask=mask, other=0.0).to(REAL)
        factor = tl.load(rise + image * rise_n + channel * rise_c, mask=known, other=0.0)
        if WEIGHT == "rise":
            factor *= tl.load(weight + channel, mask=known, other=0.0).to(REAL)
        value += term * factor[None, :]
    if HAS_W:
        at, valid = _offsets(tile, run, outer0, (w_1, w_0, w_p, w_c), channel.to(tl.int64), POSITIONS)
        value += tl.load(w + image * w_n + at, mask=mask, other=0.0).to(REAL)
    at, valid = _offsets(tile, run, outer0, (out_1, out_0, out_p, out_c), channel.to(tl.int64), POSITIONS)
    tl.store(out + image * out_n + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("tiles", "outer0"))
def _image_sums_kernel(
    partial_g, partial_gx, grad, x, mean, invstd, tiles: tl.int64, run: tl.int64, outer0: tl.int64, channels, splits,
    grad_n: tl.int64, grad_1: tl.int64, grad_0: tl.int64, grad_p, grad_c,
    x_n: tl.int64, x_1: tl.int64, x_0: tl.int64, x_p, x_c,
    AHEAD: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Sums of grad and of grad * xhat over some of an image's tiles, for each of its channels."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(channels, CHANNELS)
    channel = (program % blocks).to(tl.int32) * CHANNELS + tl.arange(0, CHANNELS)
    program = program // blocks
    image, split = program // splits, program % splits
    known = channel < channels
    center = tl.load(mean + image)
    scale = tl.load(invstd + image)
    sum_g = tl.zeros((POSITIONS, CHANNELS), REAL)
    sum_gx = tl.zeros((POSITIONS, CHANNELS), REAL)
    for tile in tl.range(split, tiles, splits, num_stages=AHEAD):
        at, valid = _offsets(tile, run, outer0, (grad_1, grad_0, grad_p, grad_c), channel.to(tl.int64), POSITIONS)
        mask = valid[:, None] & known[None, :]
        g = tl.load(grad + image * grad_n + at, mask=mask, other=0.0).to(REAL)
        at, valid = _offsets(tile, run, outer0, (x_1, x_0, x_p, x_c), channel.to(tl.int64), POSITIONS)
        value = tl.load(x + image * x_n + at, mask=mask, other=0.0).to(REAL)
        sum_g += g
        # g is 0 beyond the image, so the product is too.
        sum_gx += g * ((value - center) * scale)
    at = (split * (tl.num_programs(0) // (blocks * splits)) + image) * channels + channel
    tl.store(partial_g + at, tl.sum(sum_g, 0), mask=known)
    tl.store(partial_gx + at, tl.sum(sum_gx, 0), mask=known)


# --------------------------------------------------------------------------------------------------- launch


class _Plan(NamedTuple):
    blocks: int
    tiles: int  # of an image
    scalars: tuple[int, ...]  # tiles, run, outer0, channels
    strides: tuple[int, ...]  # of each tensor: image, outer1, outer0, position, channel
    constants: dict[str, Any]


def _real(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _plan(tensors: Sequence[Tensor], dtype: torch.dtype, config: NormConfig | None) -> _Plan:
    made = batch_norm.geometry([t[:1] for t in tensors])
    innermost = [s[3] == 1 for s in made.strides]
    config = config or tuned.tile("pre_norm tile", NormConfig, search_space, *tensors, extra=(*innermost,))
    config = config or config_for(made.channels, made.run, innermost)
    tiles = made.runs * triton.cdiv(made.run, config.positions)
    strides = tuple(s for t, own in zip(tensors, made.strides, strict=True) for s in (t.stride(0), *own))
    constants = {
        "CHANNELS": config.channels, "POSITIONS": config.positions, "REAL": _real(dtype),
        "num_warps": config.num_warps, "enable_fp_fusion": True,
    }  # fmt: skip
    blocks = triton.cdiv(made.channels, config.channels)
    return _Plan(blocks, tiles, (tiles, made.run, made.outer0, made.channels), strides, constants)


def _strides(parameter: Tensor, by_image: bool) -> tuple[int, int]:
    """A value per image or channel is a vector, one per image and channel a matrix."""
    if parameter.dim() == 2:
        return parameter.stride(0), parameter.stride(1)
    return (1, 0) if by_image else (0, 1)


class Parameter(NamedTuple):
    """Values by image, by channel, or by both (N, C)."""

    values: Tensor
    by_image: bool = False


def map_launch(
    out: Tensor, u: Tensor, scale: Parameter | None, norm: tuple[Parameter, Parameter] | None = None,
    v: tuple[Tensor, Parameter] | None = None, w: Tensor | None = None, weight: tuple[str, Tensor] | None = None,
    config: NormConfig | None = None,
) -> Launch:  # fmt: skip
    """``out = (u - center) scale + shift + v rise + w``; ``norm``: center and shift, ``v``: with its rise, ``weight``:
    "scale" or "rise", and a factor of it by channel. Small tensors are of any dtype; a rise is of the arithmetic's."""
    images = [out, u, u if v is None else v[0], u if w is None else w]
    plan = _plan(images, accumulate_dtype(u.dtype), config)
    absent = Parameter(u)  # stands for what is not there, and is never read
    center, shift = norm or (absent, absent)
    parameters = (center, scale or absent, shift, absent if v is None else v[1])
    which, factor = weight or ("none", u)
    args = (
        *images, *(p.values for p in parameters), factor, *plan.scalars, *(s for p in parameters for s in _strides(*p)),
        *plan.strides,
    )  # fmt: skip
    constants = {
        **plan.constants, "HAS_NORM": norm is not None, "HAS_SCALE": scale is not None, "WEIGHT": which,
        "HAS_V": v is not None, "HAS_W": w is not None,
    }  # fmt: skip
    return Launch(_map_kernel, (plan.blocks * plan.tiles * out.shape[0],), args, constants)


def image_sums_launch(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, config: NormConfig | None = None
) -> tuple[Launch, Tensor]:
    """A launch and the (2, splits, N, C) partial sums it fills."""
    plan = _plan([grad, x], mean.dtype, config)
    n, c = x.shape[:2]
    splits = max(1, min(_PROGRAMS * _native.multiprocessors(x.device) // max(plan.blocks * n, 1), plan.tiles))
    partial = mean.new_empty((2, splits, n, c))
    args = (*partial.unbind(0), grad, x, mean, invstd, *plan.scalars, splits, *plan.strides)
    # Tiles that are on their way at once, where a program has several and shared memory room for their rows.
    ahead = plan.tiles > 2 * splits and grad.itemsize == 2 and grad.stride(1) == x.stride(1) == 1
    constants = {**plan.constants, "AHEAD": 3 if ahead else 1}
    return Launch(_image_sums_kernel, (plan.blocks * n * splits,), args, constants), partial


def apply(
    out: Tensor, x: Tensor, mean: Tensor | None, invstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    by_image: bool,
) -> None:  # fmt: skip
    """``(x - mean) * invstd * weight + bias``; mean and invstd (N) or (C), weight and bias (C) of any dtype; no mean is
    0."""
    norm, factor = None, None if weight is None else ("scale", weight)
    if mean is not None or bias is not None:
        center = torch.zeros_like(invstd) if mean is None else mean
        shift = invstd.new_zeros(x.shape[1]) if bias is None else bias
        norm = Parameter(center, by_image), Parameter(shift)
    map_launch(out, x, Parameter(invstd, by_image), norm, weight=factor).run(x)


def backward(
    out: Tensor, grad: Tensor, x: Tensor, around: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None,
    by_image: bool, own: bool,
) -> Tensor:  # fmt: skip
    """Writes the gradient of x plus ``around``; returns those of weight and bias (2, C), in the weight's dtype if there
    is one. ``own``: statistics are x's."""
    if not by_image:
        a, b, d, of_parameters = batch_norm.line(grad, x, mean, invstd, weight, own, True)
        map_launch(out, x, Parameter(b), (Parameter(mean), Parameter(d)), (grad, Parameter(a)), around).run(x)
        return of_parameters
    launch, partial = image_sums_launch(grad, x, mean, invstd)
    launch.run(x)
    dtype = partial.dtype if weight is None else weight.dtype
    of_parameters = torch.empty((2, x.shape[1]), dtype=dtype, device=x.device)
    d_weight, d_bias = of_parameters.unbind(0)
    by_channel = partial.flatten(1, 2)
    triton_sums.finish((d_bias, by_channel[0]), (d_weight, by_channel[1]))
    # With xhat = (x - mean) * invstd and g = weight * grad, over the values that share statistics:
    # dx = invstd * (g - mean(g) - xhat * mean(g * xhat)).
    scale, shift = finish.image_line(partial, invstd, weight, x[:1].numel(), own)
    norm, factor = (Parameter(mean, True), Parameter(shift, True)), None if weight is None else ("rise", weight)
    map_launch(out, x, Parameter(scale, True), norm, (grad, Parameter(invstd, True)), around, factor).run(x)
    return of_parameters


def join(out: Tensor, x: Tensor, branch: Tensor, path: Tensor | None) -> None:
    """``x + path * branch``, path (N) of any dtype."""
    map_launch(out, branch, None if path is None else Parameter(path, True), w=x).run(x)
