"""The gradients of :mod:`reduce_haar` in Triton, all in one kernel that reads x and the bands' gradients once.

A program goes through a run of blocks of 2^L x 2^L pixels, some a step. It makes the gradient of the reduced image in
registers, by the pyramid's adjoint, quads in the forward kernel's Z-order, and multiplies its four corners as they
stand: by the weight for the gradient of x, by x for the weight's, whose sum it holds. The reduced image's gradient is
never stored. Two launches would read the bands' gradients, a third of x's size, twice; so would programs of two kinds
in one launch wherever they fall out of step by more than L2 holds.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels import _native
from wavemix_kernels.ops import tuned
from wavemix_kernels.ops.common.chips import products_of
from wavemix_kernels.ops.common.precision import input_precision
from wavemix_kernels.ops.common.triton_launch import Launch
from wavemix_kernels.ops.common.triton_sums import finish
from wavemix_kernels.ops.haar.triton_quads import _butterfly
from wavemix_kernels.ops.haar.triton_synthesis import _deinterleave
from wavemix_kernels.ops.reduce_haar.tiles import ReduceConfig, backward_config_for, backward_search_space, why_invalid
from wavemix_kernels.ops.reduce_haar.triton import _in_block, _pairs

# ------------------------------------------------------------------------------------------------- on tiles


@triton.jit
def _position(first, rows, cols, COUNT: tl.constexpr, BITS: tl.constexpr):
    """The forward kernel's in fewer registers: long divisions are of scalars, those of the items short, since an
    image's rows and columns fit 32 bits."""
    item = tl.arange(0, COUNT)
    down, along = _in_block(item, BITS)
    height, width = rows.to(tl.int32), cols.to(tl.int32)
    col = (first % cols).to(tl.int32) + (item >> (2 * BITS))
    row = (first // cols % rows).to(tl.int32) + col // width
    image = first // cols // rows + row // height
    return image, ((row % height << BITS) + down).to(tl.int64), ((col % width << BITS) + along).to(tl.int64)


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
def _weight_tile(weight, first, channel, in_channels, channels, count, OUTPUTS: tl.constexpr):
    out = first + tl.arange(0, OUTPUTS)
    mask = (out < count)[:, None] & in_channels[None, :]
    return tl.load(weight + out[:, None] * channels + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _store_added(at, add_at, value, mask, ADD: tl.constexpr):
    if ADD:
        value += tl.load(add_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, value.to(at.dtype.element_ty), mask=mask)


@triton.jit
def _store_neighbours(at, add_at, left, right, mask, step, add_step, ADD: tl.constexpr, PAIRS: tl.constexpr):
    """Along a row, in one access for both where they are contiguous."""
    if PAIRS:
        lane = tl.arange(0, 2)[None, None, :]
        _store_added(at[:, :, None] + lane, add_at[:, :, None] + lane, tl.join(left, right), mask[:, :, None], ADD)
    else:
        _store_added(at, add_at, left, mask, ADD)
        _store_added(at + step, add_at + add_step, right, mask, ADD)


@triton.jit
def _where(block, end, rows, cols, in_channels, QUADS: tl.constexpr, BITS: tl.constexpr):
    """Images, upper rows and left columns of the quads from `block` on, and which of their channels to touch."""
    image, row, col = _position(block, rows, cols, QUADS, BITS)
    valid = block + (tl.arange(0, QUADS) >> (2 * BITS)) < end
    return image, 2 * row, 2 * col, valid[:, None] & in_channels[None, :]


# --------------------------------------------------------------------------------------------------- kernel


@triton.jit(do_not_specialize=("blocks", "rows", "cols", "each"))
def _backward_kernel(
    dx, add, partial, partial_bias, zs, x, weight,
    blocks: tl.int64, rows: tl.int64, cols: tl.int64, each, channels, o,
    dx_n, dx_c, dx_h, dx_w, add_n, add_c, add_h, add_w, x_n, x_c, x_h, x_w,
    ADD: tl.constexpr, BIAS: tl.constexpr, PAIRS: tl.constexpr, DX_PAIRS: tl.constexpr, CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr, VECTOR: tl.constexpr, DOUBLINGS: tl.constexpr, QUADS: tl.constexpr, OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial (splits, O, C) and partial_bias (splits, O): sums over the `each` blocks of a split. `rows` x `cols`
    blocks of 2^LEVELS pixels an image; o in units of VECTOR.

    The programs of a split share its pixels: each holds the weight's gradient of one of CHUNKS of outputs and one tile
    of channels, and makes x's gradient of that tile, from all outputs, in every CHUNKS-th step.
    """
    STEP: tl.constexpr = QUADS >> (2 * (LEVELS - 1))
    real: tl.constexpr = x.dtype.element_ty
    count = o * VECTOR
    tiles = tl.cdiv(channels, CHANNELS)
    tile = tl.program_id(0) % tiles
    chunk = tl.program_id(0) // tiles % CHUNKS
    split = (tl.program_id(0) // (tiles * CHUNKS)).to(tl.int64)
    channel = tile * CHANNELS + tl.arange(0, CHANNELS)
    in_channels = channel < channels
    wide = channel.to(tl.int64)[None, :]
    first = chunk * OUTPUTS
    taps = _weight_tile(weight, first, channel, in_channels, channels, count, OUTPUTS)
    acc = tl.zeros((OUTPUTS, CHANNELS), tl.float32)
    half = tl.zeros((OUTPUTS,), tl.float32)
    end = tl.minimum(split * each + each, blocks)  # what lies beyond belongs to the next split
    # `block` again, for the stores: positions of one name would be made with the loads, a step ahead, and kept.
    here = split * each
    for start in range(0, each, STEP):
        block = split * each + start
        image, row, col, mask = _where(block, end, rows, cols, in_channels, QUADS, LEVELS - 1)
        at = x + (image * x_n + row * x_h + col * x_w)[:, None] + wide * x_c
        if PAIRS:
            upper_left, upper_right = _pairs(at, mask)
            lower_left, lower_right = _pairs(at + x_h, mask)
        else:
            upper_left, upper_right = tl.load(at, mask=mask, other=0.0), tl.load(at + x_w, mask=mask, other=0.0)
            lower_left = tl.load(at + x_h, mask=mask, other=0.0)
            lower_right = tl.load(at + x_h + x_w, mask=mask, other=0.0)
        low, a, b, c, d = _corners(zs, block, end, rows, cols, o, first, LEVELS, QUADS, OUTPUTS, VECTOR, DOUBLINGS)
        if BIAS:
            half += tl.sum(low, 0)
        a, b, c, d = a.to(real), b.to(real), c.to(real), d.to(real)
        acc = tl.dot(tl.trans(a), upper_left, acc, input_precision=PRECISION)
        acc = tl.dot(tl.trans(b), upper_right, acc, input_precision=PRECISION)
        acc = tl.dot(tl.trans(c), lower_left, acc, input_precision=PRECISION)
        acc = tl.dot(tl.trans(d), lower_right, acc, input_precision=PRECISION)
        if start // STEP % CHUNKS == chunk:
            sum_a = tl.zeros((QUADS, CHANNELS), tl.float32)
            sum_b = tl.zeros((QUADS, CHANNELS), tl.float32)
            sum_c = tl.zeros((QUADS, CHANNELS), tl.float32)
            sum_d = tl.zeros((QUADS, CHANNELS), tl.float32)
            for further in range(1, CHUNKS):
                other = (chunk + further) % CHUNKS * OUTPUTS
                _, e, f, g, h = _corners(
                    zs, block, end, rows, cols, o, other, LEVELS, QUADS, OUTPUTS, VECTOR, DOUBLINGS
                )
                others = _weight_tile(weight, other, channel, in_channels, channels, count, OUTPUTS)
                sum_a = tl.dot(e.to(real), others, sum_a, input_precision=PRECISION)
                sum_b = tl.dot(f.to(real), others, sum_b, input_precision=PRECISION)
                sum_c = tl.dot(g.to(real), others, sum_c, input_precision=PRECISION)
                sum_d = tl.dot(h.to(real), others, sum_d, input_precision=PRECISION)
            image, row, col, mask = _where(here, end, rows, cols, in_channels, QUADS, LEVELS - 1)
            at = dx + (image * dx_n + row * dx_h + col * dx_w)[:, None] + wide * dx_c
            also = add + (image * add_n + row * add_h + col * add_w)[:, None] + wide * add_c
            sum_a = tl.dot(a, taps, sum_a, input_precision=PRECISION)
            sum_b = tl.dot(b, taps, sum_b, input_precision=PRECISION)
            _store_neighbours(at, also, sum_a, sum_b, mask, dx_w, add_w, ADD, DX_PAIRS)
            sum_c = tl.dot(c, taps, sum_c, input_precision=PRECISION)
            sum_d = tl.dot(d, taps, sum_d, input_precision=PRECISION)
            _store_neighbours(at + dx_h, also + add_h, sum_c, sum_d, mask, dx_w, add_w, ADD, DX_PAIRS)
        here += STEP
    out = first + tl.arange(0, OUTPUTS)
    at = partial + split * count * channels + out[:, None] * channels + channel[None, :]
    tl.store(at, acc, mask=(out < count)[:, None] & in_channels[None, :])
    if BIAS:  # noqa: SIM102 (known when compiled, unlike the other)
        if tile == 0:
            tl.store(partial_bias + split * count + out, 2.0 * half, mask=out < count)


# --------------------------------------------------------------------------------------------------- launch


def launch(
    dx: Tensor, grads: Sequence[Tensor], x: Tensor, weight: Tensor, add: Tensor | None, has_bias: bool,
    config: ReduceConfig | None = None,
) -> tuple[Launch, Tensor, Tensor]:  # fmt: skip
    """A launch and the partial sums it fills: (splits, O, C), and (splits, O) for the bias."""
    levels, itemsize, (outputs, channels) = len(grads), x.dtype.itemsize, weight.shape
    config = config or tuned.tile(
        "reduce_haar_backward tile", ReduceConfig, lambda: backward_search_space(itemsize, levels), x, weight,
        extra=(levels,),
    )  # fmt: skip
    if config is None:
        of_rows = channels > 1 and not x.stride(1) == dx.stride(1) == 1
        config = backward_config_for(itemsize, levels, outputs, channels, of_rows, products_of(x.device))
    if (reason := why_invalid(config, levels)) is not None:
        raise ValueError(f"config: {reason}")
    rows, cols = x.shape[2] >> levels, x.shape[3] >> levels
    blocks, step = x.shape[0] * rows * cols, config.quads >> (2 * (levels - 1))
    chunks = triton.cdiv(outputs, config.outputs)
    programs = triton.cdiv(channels, config.channels) * chunks
    # Deterministic: a function of shapes and device. Two programs for each multiprocessor.
    splits = max(1, min(2 * _native.multiprocessors(x.device) // programs, triton.cdiv(blocks, step)))
    each = triton.cdiv(triton.cdiv(blocks, splits), step) * step
    splits = triton.cdiv(blocks, each) if each else 1  # rounding may leave the last ones nothing
    partial = x.new_empty((splits, outputs, channels), dtype=torch.float32)
    bias = x.new_empty((splits, outputs if has_bias else 0), dtype=torch.float32)
    vector = math.gcd(16 // itemsize, outputs)
    also = dx if add is None else add
    args = (
        dx, also, partial, bias, tuple(grads), x, weight, blocks, rows, cols, each, channels, outputs // vector,
        *dx.stride(), *also.stride(), *x.stride(),
    )  # fmt: skip
    pairs, dx_pairs = (
        # An asynchronous copy has 4 bytes at least, as in the forward kernel.
        itemsize == 2 and all(t.stride(3) == 1 and t.stride(1) != 1 for t in images)
        for images in ((x,), (dx, also))
    )
    constants = {
        "ADD": add is not None, "BIAS": has_bias, "PAIRS": pairs, "DX_PAIRS": dx_pairs, "CHUNKS": chunks,
        "LEVELS": levels, "VECTOR": vector, "DOUBLINGS": vector.bit_length() - 1, "QUADS": config.quads,
        "OUTPUTS": config.outputs, "CHANNELS": config.channels, "PRECISION": input_precision(),
        "num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip
    return Launch(_backward_kernel, (programs * splits,), args, constants), partial, bias


def backward(
    dx: Tensor, dw: Tensor, db: Tensor | None, grads: Sequence[Tensor], x: Tensor, weight: Tensor, add: Tensor | None,
    config: ReduceConfig | None = None,
) -> None:  # fmt: skip
    """Writes the gradient of x, plus ``add``, into ``dx``, and those of weight and bias, summed in a fixed order.

    Args:
        dw: of O C elements, contiguous, of any dtype; db: (O) likewise, or None.
        dx: (N, C, H, W), any strides; H and W multiples of 2^L. fp32, fp16 or bf16.
        grads: of Z_1 … Z_L, (N, 4O, H/2^l, W/2^l) each, dense in channels_last order.
        x: like ``dx``, any strides.
        weight: (O, C), contiguous.
        add: like ``dx``, any strides, or None.
        config: a tile other than :func:`backward_config_for`'s.
    """
    made, partial, bias = launch(dx, grads, x, weight, add, db is not None, config)
    made.run(x)
    finish((dw, partial), *([] if db is None else [(db, bias)]))
