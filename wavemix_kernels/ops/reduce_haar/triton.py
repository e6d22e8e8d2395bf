"""A Waveblock's 1x1 convolution and all its Haar levels in Triton: x is read once, the reduced image never stored.

A program owns some blocks of 2^L x 2^L pixels. Its quads' four corners are four matrix products with one register
layout, so the first butterfly, and three quarters of the output, stay within a thread. Quads lie in Z-order: four in
a row are a quad of the next level, whatever the level.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels.ops import tuned
from wavemix_kernels.ops.common.chips import products_of
from wavemix_kernels.ops.common.precision import input_precision
from wavemix_kernels.ops.common.triton_launch import Launch
from wavemix_kernels.ops.haar.triton_analysis import _interleave
from wavemix_kernels.ops.haar.triton_quads import _butterfly
from wavemix_kernels.ops.reduce_haar.tiles import ReduceConfig, config_for, search_space, why_invalid


@triton.jit
def _in_block(item, BITS: tl.constexpr):
    """Row and column of an item in its block of 2^BITS x 2^BITS in Z-order."""
    down = item * 0
    along = item * 0
    for bit in tl.static_range(BITS):
        along |= ((item >> (2 * bit)) & 1) << bit
        down |= ((item >> (2 * bit + 1)) & 1) << bit
    return down, along


@triton.jit
def _position(first, rows, cols, COUNT: tl.constexpr, BITS: tl.constexpr):
    """Image, row and column of COUNT items from block `first` on."""
    item = tl.arange(0, COUNT)
    down, along = _in_block(item, BITS)
    block = first + (item >> (2 * BITS))
    col = block % cols
    row = block // cols % rows
    return block // cols // rows, (row << BITS) + down, (col << BITS) + along


@triton.jit
def _pairs(at, mask):
    """Neighbours along a row of contiguous pixels, in one access for both."""
    both = at[:, :, None] + tl.arange(0, 2)[None, None, :]
    return tl.split(tl.load(both, mask=mask[:, :, None], other=0.0))


@triton.jit
def _split_quads(low):
    """Values in Z-order (4q, outputs) -> the quads' corners a, b, c, d, each (q, outputs)."""
    quads = tl.reshape(low, (low.shape[0] // 4, 2, 2, low.shape[1]))
    left, right = tl.split(tl.permute(quads, (0, 3, 1, 2)))
    a, c = tl.split(left)
    b, d = tl.split(right)
    return a, b, c, d


@triton.jit
def _store_level(
    z, low, lh, hl, hh, image, row, col, valid, height, width, o, first,
    VECTOR: tl.constexpr, DOUBLINGS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """[LL | LH, HL, HH of each channel]; o is in units of VECTOR, which proves vectors aligned to the compiler."""
    OUTPUTS: tl.constexpr = low.shape[1]
    count = o * VECTOR
    if CHANNELS_LAST:
        pixel = z + ((image * height + row) * width + col) * (4 * count)
        plane = 1
        lane = tl.arange(0, OUTPUTS)
        group = first + lane // VECTOR * VECTOR
        shape: tl.constexpr = (low.shape[0], 1, OUTPUTS)
        real: tl.constexpr = z.dtype.element_ty
        x, y, w = _interleave(
            tl.reshape(lh.to(real), shape), tl.reshape(hl.to(real), shape), tl.reshape(hh.to(real), shape), DOUBLINGS
        )
        x, y, w = tl.reshape(x, low.shape), tl.reshape(y, low.shape), tl.reshape(w, low.shape)
        band = count + 3 * group + lane % VECTOR
        step = VECTOR
        in_bands = valid[:, None] & (group < count)[None, :]
    else:
        pixel = z + image * (4 * count) * height * width + row * width + col
        plane = height * width
        band = (count + 3 * (first + tl.arange(0, OUTPUTS))) * plane
        step = plane
        x, y, w = lh, hl, hh
        in_bands = valid[:, None] & (first + tl.arange(0, OUTPUTS) < count)[None, :]
    out = first + tl.arange(0, OUTPUTS)
    mask = valid[:, None] & (out < count)[None, :]
    tl.store(pixel[:, None] + (out * plane)[None, :], low.to(z.dtype.element_ty), mask=mask)
    at = pixel[:, None] + band[None, :]
    tl.store(at, x.to(z.dtype.element_ty), mask=in_bands)
    tl.store(at + step, y.to(z.dtype.element_ty), mask=in_bands)
    tl.store(at + 2 * step, w.to(z.dtype.element_ty), mask=in_bands)


@triton.jit(do_not_specialize=("blocks", "rows", "cols"))
def _reduce_haar_kernel(
    zs, x, weight, bias,
    blocks: tl.int64, rows: tl.int64, cols: tl.int64, channels, o, x_n, x_c, x_h, x_w,
    BIAS: tl.constexpr, LEVELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, PAIRS: tl.constexpr, VECTOR: tl.constexpr,
    DOUBLINGS: tl.constexpr, QUADS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`rows` x `cols` blocks of 2^LEVELS pixels an image, `blocks` in all; o in units of VECTOR."""
    PER_PROGRAM: tl.constexpr = QUADS >> (2 * (LEVELS - 1))
    block = tl.program_id(0).to(tl.int64) * PER_PROGRAM
    first = tl.program_id(1) * OUTPUTS
    out = first + tl.arange(0, OUTPUTS)
    in_outputs = out < o * VECTOR
    image, row, col = _position(block, rows, cols, QUADS, LEVELS - 1)
    valid = block + (tl.arange(0, QUADS) >> (2 * (LEVELS - 1))) < blocks
    corner = x + image * x_n + 2 * row * x_h + 2 * col * x_w
    a = tl.zeros((QUADS, OUTPUTS), tl.float32)
    b = tl.zeros((QUADS, OUTPUTS), tl.float32)
    c = tl.zeros((QUADS, OUTPUTS), tl.float32)
    d = tl.zeros((QUADS, OUTPUTS), tl.float32)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        in_channels = channel < channels
        at = corner[:, None] + (channel.to(tl.int64) * x_c)[None, :]
        mask = valid[:, None] & in_channels[None, :]
        taps = tl.trans(
            tl.load(
                weight + out[:, None] * channels + channel[None, :],
                mask=in_outputs[:, None] & in_channels[None, :],
                other=0.0,
            )
        )
        if PAIRS:
            upper_left, upper_right = _pairs(at, mask)
            lower_left, lower_right = _pairs(at + x_h, mask)
        else:
            upper_left, upper_right = tl.load(at, mask=mask, other=0.0), tl.load(at + x_w, mask=mask, other=0.0)
            lower_left = tl.load(at + x_h, mask=mask, other=0.0)
            lower_right = tl.load(at + x_h + x_w, mask=mask, other=0.0)
        a = tl.dot(upper_left, taps, a, input_precision=PRECISION)
        b = tl.dot(upper_right, taps, b, input_precision=PRECISION)
        c = tl.dot(lower_left, taps, c, input_precision=PRECISION)
        d = tl.dot(lower_right, taps, d, input_precision=PRECISION)
    if BIAS:
        # A constant of every pixel: LL gets twice of it, the bands nothing. Added to the corners it would round them.
        offset = tl.load(bias + out, mask=in_outputs, other=0.0).to(tl.float32)[None, :]
    for level in tl.static_range(1, LEVELS + 1):
        if level > 1:
            a, b, c, d = _split_quads(low)  # noqa: F821 (the loop is unrolled)
        low, lh, hl, hh = _butterfly(a, b, c, d)
        if BIAS and level == 1:
            low += 2.0 * offset
        image, row, col = _position(block, rows, cols, QUADS >> (2 * (level - 1)), LEVELS - level)
        valid = block + (tl.arange(0, QUADS >> (2 * (level - 1))) >> (2 * (LEVELS - level))) < blocks
        _store_level(
            zs[level - 1], low, lh, hl, hh, image, row, col, valid,
            rows << (LEVELS - level), cols << (LEVELS - level), o, first, VECTOR, DOUBLINGS, CHANNELS_LAST,
        )  # fmt: skip


def launch(
    zs: Sequence[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels_last: bool,
    config: ReduceConfig | None = None,
) -> Launch:
    levels, itemsize, outputs = len(zs), x.dtype.itemsize, weight.shape[0]
    n, c, h, w = x.shape
    config = config or tuned.tile(
        "reduce_haar tile", ReduceConfig, lambda: search_space(itemsize, levels), x, weight, extra=(levels,)
    )
    config = config or config_for(itemsize, levels, outputs, c, products_of(x.device))
    if (reason := why_invalid(config, levels)) is not None:
        raise ValueError(f"config: {reason}")
    rows, cols = h >> levels, w >> levels
    blocks = n * rows * cols
    vector = math.gcd(16 // itemsize, outputs)
    grid = triton.cdiv(blocks, config.quads >> (2 * (levels - 1))), triton.cdiv(outputs, config.outputs)
    args = (
        tuple(zs), x, weight, weight if bias is None else bias, blocks, rows, cols, c, outputs // vector, *x.stride(),
    )  # fmt: skip
    constants = {
        "BIAS": bias is not None, "LEVELS": levels, "CHANNELS_LAST": channels_last, "VECTOR": vector,
        # An asynchronous copy has 4 bytes at least: two pixels of the half types, one of fp32.
        "PAIRS": itemsize == 2 and x.stride(3) == 1 and x.stride(1) != 1,
        "DOUBLINGS": vector.bit_length() - 1 if channels_last else 0, "QUADS": config.quads,
        "OUTPUTS": config.outputs, "CHANNELS": config.channels, "PRECISION": input_precision(),
        "num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip
    return Launch(_reduce_haar_kernel, grid, args, constants)


def forward(
    zs: Sequence[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels_last: bool,
    config: ReduceConfig | None = None,
) -> None:
    """Writes Z_1 … Z_L, dense in NCHW or channels_last order.

    Args:
        zs: Z_l of shape (N, 4O, H/2^l, W/2^l).
        x: (N, C, H, W), any strides; H and W multiples of 2^L. fp32, fp16 or bf16.
        weight: (O, C), contiguous; bias: (O) or None.
        channels_last: the order of ``zs``.
        config: a tile other than :func:`config_for`'s.
    """
    launch(zs, x, weight, bias, channels_last, config).run(x)
