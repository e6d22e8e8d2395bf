"""The gradients of :mod:`reduce_haar` in Triton, each in one kernel that reads the bands' gradients of all levels.

A program makes the gradient of the reduced image for some blocks of 2^L x 2^L pixels in registers, by the pyramid's
adjoint, quads in the forward kernel's Z-order, and multiplies its four corners as they stand: by the weight for the
gradient of x, by x for the weight's. The reduced image's gradient is never stored.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .haar import _butterfly, _deinterleave
from .launch import Launch, input_precision, pow2_at_least
from .reduce_haar import _pairs, _position

_MULTIPROCESSORS = 132  # of an H100


@dataclass(frozen=True)
class GradientConfig:
    """Quads of pixels, channels of the reduced image and of x at work at a time."""

    quads: int
    outputs: int
    channels: int
    num_warps: int
    num_stages: int


def why_invalid(config: GradientConfig, levels: int) -> str | None:
    """Why the kernels cannot run this tile, or None if they can."""
    least = max(16, 4 ** (levels - 1))
    if config.quads < least or config.quads & (config.quads - 1):
        return f"quads={config.quads}: {levels} levels need a power of two from {least} on"
    return None


def config_for(itemsize: int, levels: int, outputs: int, channels: int, of_rows: bool) -> GradientConfig:
    """The default: a deterministic function of its arguments.

    Half types: the four corners of 64 quads by 64 outputs and the sums of four products, 64 KB each, are 64 registers
    of a thread of eight warps each. Programs of the same pixels are neighbours: the bands' gradients, a third of x's
    size, come from L2 for all but the first of C / 64, or
    C / 32 where addresses take more registers: outputs that are no whole 16-byte vectors, images of rows (`of_rows`).
    fp32 multiplies on the ordinary units, whose operands are
    registers too: 16 at a time of what a product sums over, or as few as the levels' blocks allow.
    """
    least = max(16, 4 ** (levels - 1))
    if itemsize == 4:
        across = min(max(16, 1024 // least), 64, max(16, pow2_at_least(channels)))
        return GradientConfig(least, 16, across, 4 if least == 16 else 8, 2)
    quads = max(64, least)
    widest = 2048 // quads if outputs % 8 or of_rows else 4096 // quads
    across = min(widest, max(16, pow2_at_least(channels)))
    outputs = min(4096 // quads, max(16, pow2_at_least(outputs)))
    return GradientConfig(quads, outputs, across, 8 if quads * max(outputs, across) > 2048 else 4, 2)


def search_space(itemsize: int, levels: int) -> Iterator[GradientConfig]:
    """Configurations worth timing."""
    for quads in (16, 64, 256):
        for outputs, channels in ((16, 16), (16, 64), (32, 32), (64, 64), (64, 128)):
            config = GradientConfig(quads, outputs, channels, 8, 2)
            fits = quads * max(outputs, channels) <= (8192 if itemsize == 2 else 1024)
            if fits and why_invalid(config, levels) is None:
                yield config


# ------------------------------------------------------------------------------------------------- on tiles


@triton.jit
def _load_level(
    z, image, row, col, valid, height, width, o, first,
    OUTPUTS: tl.constexpr, VECTOR: tl.constexpr, DOUBLINGS: tl.constexpr,
):  # fmt: skip
    """LL, LH, HL, HH in fp32, zero outside; the counterpart of reduce_haar's store, o in units of VECTOR."""
    count = o * VECTOR
    lane = tl.arange(0, OUTPUTS)
    out = first + lane
    group = first + lane // VECTOR * VECTOR
    pixel = (z + ((image * height + row) * width + col) * (4 * count))[:, None]
    at = pixel + (count + 3 * group + lane % VECTOR)[None, :]
    in_bands = valid[:, None] & (group < count)[None, :]
    low = tl.load(pixel + out[None, :], mask=valid[:, None] & (out < count)[None, :], other=0.0)
    shape: tl.constexpr = (low.shape[0], 1, OUTPUTS)
    x = tl.reshape(tl.load(at, mask=in_bands, other=0.0), shape)
    y = tl.reshape(tl.load(at + VECTOR, mask=in_bands, other=0.0), shape)
    w = tl.reshape(tl.load(at + 2 * VECTOR, mask=in_bands, other=0.0), shape)
    x, y, w = _deinterleave(x, y, w, DOUBLINGS)
    x, y, w = tl.reshape(x, low.shape), tl.reshape(y, low.shape), tl.reshape(w, low.shape)
    return low.to(tl.float32), x.to(tl.float32), y.to(tl.float32), w.to(tl.float32)


@triton.jit
def _join_quads(a, b, c, d):
    """The quads' corners, each (q, outputs), as values in Z-order (4q, outputs)."""
    quads = tl.permute(tl.join(tl.join(a, c), tl.join(b, d)), (0, 2, 3, 1))
    return tl.reshape(quads, (4 * a.shape[0], a.shape[1]))


@triton.jit
def _corners(
    zs, block, blocks, rows, cols, o, first,
    LEVELS: tl.constexpr, QUADS: tl.constexpr, OUTPUTS: tl.constexpr, VECTOR: tl.constexpr, DOUBLINGS: tl.constexpr,
):  # fmt: skip
    """The reduced image's gradient at the corners of QUADS quads from `block` on, and half of each quad's sum."""
    for level in tl.static_range(LEVELS, 0, -1):
        image, row, col = _position(block, rows, cols, QUADS >> (2 * (level - 1)), LEVELS - level)
        valid = block + (tl.arange(0, QUADS >> (2 * (level - 1))) >> (2 * (LEVELS - level))) < blocks
        low, lh, hl, hh = _load_level(
            zs[level - 1], image, row, col, valid, rows << (LEVELS - level), cols << (LEVELS - level), o, first,
            OUTPUTS, VECTOR, DOUBLINGS,
        )  # fmt: skip
        if level < LEVELS:
            low += _join_quads(a, b, c, d)  # noqa: F821 (the loop is unrolled)
        a, b, c, d = _butterfly(low, lh, hl, hh)
    return low, a, b, c, d


@triton.jit
def _store_corner(at, add_at, value, mask, ADD: tl.constexpr):
    if ADD:
        value += tl.load(add_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, value.to(at.dtype.element_ty), mask=mask)


# -------------------------------------------------------------------------------------------------- kernels

_FREE = ("blocks", "rows", "cols")


@triton.jit(do_not_specialize=_FREE)
def _input_gradient_kernel(
    dx, add, zs, weight,
    blocks: tl.int64, rows: tl.int64, cols: tl.int64, channels, o, dx_n, dx_c, dx_h, dx_w, add_n, add_c, add_h, add_w,
    ADD: tl.constexpr, CHUNKS: tl.constexpr, LEVELS: tl.constexpr, VECTOR: tl.constexpr,
    DOUBLINGS: tl.constexpr, QUADS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """CHUNKS of OUTPUTS outputs; `rows` x `cols` blocks of 2^LEVELS pixels an image; o in units of VECTOR."""
    PER_PROGRAM: tl.constexpr = QUADS >> (2 * (LEVELS - 1))
    tiles = tl.cdiv(channels, CHANNELS)
    channel = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    in_channels = channel < channels
    block = (tl.program_id(0) // tiles).to(tl.int64) * PER_PROGRAM
    sum_a = tl.zeros((QUADS, CHANNELS), tl.float32)
    sum_b = tl.zeros((QUADS, CHANNELS), tl.float32)
    sum_c = tl.zeros((QUADS, CHANNELS), tl.float32)
    sum_d = tl.zeros((QUADS, CHANNELS), tl.float32)
    for first in range(0, CHUNKS * OUTPUTS, OUTPUTS):
        _, a, b, c, d = _corners(zs, block, blocks, rows, cols, o, first, LEVELS, QUADS, OUTPUTS, VECTOR, DOUBLINGS)
        out = first + tl.arange(0, OUTPUTS)
        taps = tl.load(
            weight + out[:, None] * channels + channel[None, :],
            mask=(out < o * VECTOR)[:, None] & in_channels[None, :],
            other=0.0,
        )
        sum_a = tl.dot(a.to(taps.dtype), taps, sum_a, input_precision=PRECISION)
        sum_b = tl.dot(b.to(taps.dtype), taps, sum_b, input_precision=PRECISION)
        sum_c = tl.dot(c.to(taps.dtype), taps, sum_c, input_precision=PRECISION)
        sum_d = tl.dot(d.to(taps.dtype), taps, sum_d, input_precision=PRECISION)
    image, row, col = _position(block, rows, cols, QUADS, LEVELS - 1)
    valid = block + (tl.arange(0, QUADS) >> (2 * (LEVELS - 1))) < blocks
    mask = valid[:, None] & in_channels[None, :]
    at = dx + (image * dx_n + 2 * row * dx_h + 2 * col * dx_w)[:, None] + (channel.to(tl.int64) * dx_c)[None, :]
    also = add + (image * add_n + 2 * row * add_h + 2 * col * add_w)[:, None] + (channel.to(tl.int64) * add_c)[None, :]
    _store_corner(at, also, sum_a, mask, ADD)
    _store_corner(at + dx_w, also + add_w, sum_b, mask, ADD)
    _store_corner(at + dx_h, also + add_h, sum_c, mask, ADD)
    _store_corner(at + dx_h + dx_w, also + add_h + add_w, sum_d, mask, ADD)


@triton.jit(do_not_specialize=(*_FREE, "each"))
def _weight_gradient_kernel(
    partial, partial_bias, zs, x,
    blocks: tl.int64, rows: tl.int64, cols: tl.int64, each, channels, o, x_n, x_c, x_h, x_w,
    BIAS: tl.constexpr, LEVELS: tl.constexpr, PAIRS: tl.constexpr, VECTOR: tl.constexpr,
    DOUBLINGS: tl.constexpr, QUADS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """partial (splits, O, C) and partial_bias (splits, O): sums over the `each` blocks of a split."""
    PER_PROGRAM: tl.constexpr = QUADS >> (2 * (LEVELS - 1))
    count = o * VECTOR
    tiles, chunks = tl.cdiv(channels, CHANNELS), tl.cdiv(count, OUTPUTS)
    tile = tl.program_id(0) % tiles
    channel = tile * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.program_id(0) // tiles % chunks * OUTPUTS
    split = (tl.program_id(0) // (tiles * chunks)).to(tl.int64)
    in_channels = channel < channels
    acc = tl.zeros((OUTPUTS, CHANNELS), tl.float32)
    halves = tl.zeros((QUADS, OUTPUTS), tl.float32)
    end = tl.minimum(split * each + each, blocks)  # what lies beyond belongs to the next split
    for start in range(0, each, PER_PROGRAM):
        block = split * each + start
        low, a, b, c, d = _corners(zs, block, end, rows, cols, o, first, LEVELS, QUADS, OUTPUTS, VECTOR, DOUBLINGS)
        image, row, col = _position(block, rows, cols, QUADS, LEVELS - 1)
        valid = block + (tl.arange(0, QUADS) >> (2 * (LEVELS - 1))) < end
        mask = valid[:, None] & in_channels[None, :]
        at = x + (image * x_n + 2 * row * x_h + 2 * col * x_w)[:, None] + (channel.to(tl.int64) * x_c)[None, :]
        if PAIRS:
            upper_left, upper_right = _pairs(at, mask)
            lower_left, lower_right = _pairs(at + x_h, mask)
        else:
            upper_left, upper_right = tl.load(at, mask=mask, other=0.0), tl.load(at + x_w, mask=mask, other=0.0)
            lower_left = tl.load(at + x_h, mask=mask, other=0.0)
            lower_right = tl.load(at + x_h + x_w, mask=mask, other=0.0)
        real: tl.constexpr = x.dtype.element_ty
        acc = tl.dot(tl.trans(a.to(real)), upper_left, acc, input_precision=PRECISION)
        acc = tl.dot(tl.trans(b.to(real)), upper_right, acc, input_precision=PRECISION)
        acc = tl.dot(tl.trans(c.to(real)), lower_left, acc, input_precision=PRECISION)
        acc = tl.dot(tl.trans(d.to(real)), lower_right, acc, input_precision=PRECISION)
        if BIAS:
            halves += low
    out = first + tl.arange(0, OUTPUTS)
    at = partial + split * count * channels + out[:, None] * channels + channel[None, :]
    tl.store(at, acc, mask=(out < count)[:, None] & in_channels[None, :])
    if BIAS:  # noqa: SIM102 (known when compiled, unlike the other)
        if tile == 0:
            tl.store(partial_bias + split * count + out, 2.0 * tl.sum(halves, 0), mask=out < count)


# --------------------------------------------------------------------------------------------------- launch


def _constants(grads: Sequence[Tensor], config: GradientConfig) -> tuple[int, dict[str, Any]]:
    """And how many outputs there are."""
    levels, outputs, itemsize = len(grads), grads[0].shape[1] // 4, grads[0].dtype.itemsize
    if (reason := why_invalid(config, levels)) is not None:
        raise ValueError(f"config: {reason}")
    vector = math.gcd(16 // itemsize, outputs)
    return outputs, {
        "LEVELS": levels, "VECTOR": vector,
        "DOUBLINGS": vector.bit_length() - 1, "QUADS": config.quads, "OUTPUTS": config.outputs,
        "CHANNELS": config.channels, "PRECISION": input_precision(), "num_warps": config.num_warps,
        "num_stages": config.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip


def _blocks(x: Tensor, levels: int) -> tuple[int, int, int]:
    """In all, and down and across an image."""
    rows, cols = x.shape[2] >> levels, x.shape[3] >> levels
    return x.shape[0] * rows * cols, rows, cols


def input_gradient_launch(
    dx: Tensor, grads: Sequence[Tensor], weight: Tensor, add: Tensor | None,
    config: GradientConfig | None = None,
) -> Launch:  # fmt: skip
    levels, channels = len(grads), dx.shape[1]
    config = config or config_for(
        dx.dtype.itemsize, levels, weight.shape[0], channels, channels > 1 and dx.stride(1) != 1
    )
    outputs, constants = _constants(grads, config)
    blocks, rows, cols = _blocks(dx, levels)
    also = dx if add is None else add
    args = (
        dx, also, tuple(grads), weight, blocks, rows, cols, channels, outputs // constants["VECTOR"], *dx.stride(),
        *also.stride(),
    )  # fmt: skip
    tiles = triton.cdiv(channels, config.channels)
    grid = (tiles * triton.cdiv(blocks, config.quads >> (2 * (levels - 1))),)
    constants |= {"ADD": add is not None, "CHUNKS": triton.cdiv(outputs, config.outputs)}
    return Launch(_input_gradient_kernel, grid, args, constants)


def input_gradient(
    dx: Tensor, grads: Sequence[Tensor], weight: Tensor, add: Tensor | None,
    config: GradientConfig | None = None,
) -> None:  # fmt: skip
    """Writes the gradient of x, plus ``add``, into ``dx``.

    Args:
        dx: (N, C, H, W), any strides; H and W multiples of 2^L. fp32, fp16 or bf16.
        grads: of Z_1 … Z_L, (N, 4O, H/2^l, W/2^l) each, dense in channels_last order.
        weight: (O, C), contiguous.
        add: like ``dx``, any strides, or None.
        config: a tile other than :func:`config_for`'s.
    """
    input_gradient_launch(dx, grads, weight, add, config).run(dx)


def weight_gradient_launch(
    grads: Sequence[Tensor], x: Tensor, has_bias: bool, config: GradientConfig | None = None
) -> tuple[Launch, Tensor, Tensor]:
    """A launch and the partial sums it fills: (splits, O, C), and (splits, O) for the bias."""
    levels, channels, itemsize = len(grads), x.shape[1], x.dtype.itemsize
    config = config or config_for(itemsize, levels, grads[0].shape[1] // 4, channels, channels > 1 and x.stride(1) != 1)
    outputs, constants = _constants(grads, config)
    blocks, rows, cols = _blocks(x, levels)
    programs = triton.cdiv(channels, config.channels) * triton.cdiv(outputs, config.outputs)
    per_program = config.quads >> (2 * (levels - 1))
    # Deterministic: a function of the shapes. Two programs for each multiprocessor.
    splits = max(1, min(2 * _MULTIPROCESSORS // programs, triton.cdiv(blocks, per_program)))
    each = triton.cdiv(triton.cdiv(blocks, splits), per_program) * per_program
    partial = x.new_empty((splits, outputs, channels), dtype=torch.float32)
    bias = x.new_empty((splits, outputs if has_bias else 0), dtype=torch.float32)
    args = (
        partial, bias, tuple(grads), x, blocks, rows, cols, each, channels, outputs // constants["VECTOR"], *x.stride(),
    )  # fmt: skip
    # As in the forward kernel: an asynchronous copy has 4 bytes at least.
    pairs = itemsize == 2 and x.stride(3) == 1 and x.stride(1) != 1
    return Launch(
        _weight_gradient_kernel, (programs * splits,), args, {**constants, "BIAS": has_bias, "PAIRS": pairs}
    ), partial, bias  # fmt: skip


def weight_gradient(
    grads: Sequence[Tensor], x: Tensor, has_bias: bool, config: GradientConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of weight (O, C) and bias (O; of no elements without one) in fp32, summed in a fixed order.

    Args:
        grads: as :func:`input_gradient` takes them.
        x: (N, C, H, W), any strides.
        config: a tile other than :func:`config_for`'s.
    """
    launch, partial, bias = weight_gradient_launch(grads, x, has_bias, config)
    launch.run(x)
    return partial.sum(0), bias.sum(0)
