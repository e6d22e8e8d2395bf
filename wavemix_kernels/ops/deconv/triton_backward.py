"""The gradients of :mod:`deconv` in Triton: of the input, of the weight, and both behind a BatchNorm in one launch.

They read y's gradient, or make it in registers from that of a BatchNorm behind it. There one launch makes both, image
after image, so that what both read comes from memory once. The weight's gradient is a sum over fixed parts, added in a
fixed order: the same in every run.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels import _native
from wavemix_kernels.ops import tuned
from wavemix_kernels.ops.common.triton_launch import Launch
from wavemix_kernels.ops.deconv.tiles import DeconvConfig, search_space
from wavemix_kernels.ops.deconv.triton import FREE, _config, _constants, _default, _matrix, _places, _sizes, _strides

_REDUCED = 64  # weights of all 16 taps that a program adds up
# Bytes of g and y in a split of the launch that reads them for both gradients: they stay in L2 (50 MB in an H100, 40 in
# an A100) while the split is worked on and the next begins. Large batches pay with more partial sums.
_SPLIT_BYTES = 24 * 2**20


class Norm(NamedTuple):
    """BatchNorm's backward through batch statistics: y's gradient is a * g + b * (y - mean) + d, g being the output's.

    y (N, O, 2H, 2W) as the convolution's, the rest fp32 (O).
    """

    y: Tensor
    a: Tensor
    b: Tensor
    mean: Tensor
    d: Tensor


@triton.jit
def _gradient(g, y, a, b, mean, d, in_image, channel, in_channels, NORM: tl.constexpr, ZERO: tl.constexpr):
    """A tile of y's gradient, at addresses of g and of y; where made from a norm, rounded once to g's dtype.

    The tile's pixels vary along one axis, its channels along the other. ZERO: pixels that are not in the image are
    zero (else they are what the norm makes of zeros).
    """
    value = tl.load(g, mask=in_image & in_channels, other=0.0)
    if NORM:
        centred = tl.load(y, mask=in_image & in_channels, other=0.0).to(tl.float32)
        centred -= tl.load(mean + channel, mask=in_channels, other=0.0)
        made = centred * tl.load(b + channel, mask=in_channels, other=0.0)
        made += tl.load(d + channel, mask=in_channels, other=0.0)
        made += value.to(tl.float32) * tl.load(a + channel, mask=in_channels, other=0.0)
        if ZERO:
            made = tl.where(in_image, made, 0.0)
        value = made.to(value.dtype)
    return value


# --------------------------------------------------------------------------------------------------- gradients
#
# A program of each is a function of its number: for a kernel of its own, and for the one that has both.


@triton.jit
def _backward_x(
    number, du, weight, pixels, du_n, du_h, du_w, g, y, a, b, mean, d, h, w, f, o, g_n, g_h, g_w, y_n, y_h, y_w,
    NORM: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A convolution of stride 2: input pixel i has output pixels 2i - 1 + k. weight: (4, 4, o, f)."""
    COLUMNS: tl.constexpr = W0 + W1
    OTHER: tl.constexpr = W1 if W1 > 0 else 16
    blocks = tl.cdiv(f, COLUMNS)
    first = (number % blocks).to(tl.int32) * COLUMNS
    image, row, col, valid = _places((number // blocks).to(tl.int64) * ROWS, pixels, h, w, ROWS)
    from_g = g + image * g_n + 2 * row * g_h + 2 * col * g_w
    from_y = y + image * y_n + 2 * row * y_h + 2 * col * y_w
    out0 = first + tl.arange(0, W0)
    out1 = first + W0 + tl.arange(0, OTHER)
    acc0 = tl.zeros((ROWS, W0), tl.float32)
    acc1 = tl.zeros((ROWS, OTHER), tl.float32)
    for step in tl.range(0, 16 * tl.cdiv(o, DEPTH), num_stages=STAGES):
        down, along = step % 16 // 4 - 1, step % 4 - 1
        channel = step // 16 * DEPTH + tl.arange(0, DEPTH)
        there = valid & (2 * row + down >= 0) & (2 * row + down < 2 * h)
        there = there & (2 * col + along >= 0) & (2 * col + along < 2 * w)
        tile = _gradient(
            from_g[:, None] + (down * g_h + along * g_w) + channel[None, :],
            from_y[:, None] + (down * y_h + along * y_w) + channel[None, :],
            a, b, mean, d, there[:, None], channel[None, :], (channel < o)[None, :], NORM, True,
        )  # fmt: skip
        tap = weight + (step % 16) * f * o
        acc0 = tl.dot(tile, _matrix(tap, f, channel, o, out0, f), acc0, input_precision=PRECISION)
        if W1 > 0:
            acc1 = tl.dot(tile, _matrix(tap, f, channel, o, out1, f), acc1, input_precision=PRECISION)
    at = du + (image * du_n + row * du_h + col * du_w)[:, None]
    tl.store(at + out0[None, :], acc0.to(du.dtype.element_ty), mask=valid[:, None] & (out0 < f)[None, :])
    if W1 > 0:
        tl.store(at + out1[None, :], acc1.to(du.dtype.element_ty), mask=valid[:, None] & (out1 < f)[None, :])


@triton.jit(do_not_specialize=FREE)
def _backward_x_kernel(
    du, weight, pixels: tl.int64, du_n: tl.int64, du_h: tl.int64, du_w: tl.int64,
    g, y, a, b, mean, d, h, w, f, o, g_n: tl.int64, g_h: tl.int64, g_w: tl.int64, y_n: tl.int64, y_h: tl.int64,
    y_w: tl.int64,
    NORM: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    _backward_x(
        tl.program_id(0), du, weight, pixels, du_n, du_h, du_w, g, y, a, b, mean, d, h, w, f, o, g_n, g_h, g_w, y_n,
        y_h, y_w, NORM, ROWS, DEPTH, W0, W1, STAGES, PRECISION,
    )  # fmt: skip


@triton.jit
def _sums(
    u, g, y, a, b, mean, d, begin, end, h, w, f, o, m, col0, col1, p, q, g_n, g_h, g_w, y_n, y_h, y_w, u_n, u_h, u_w,
    NORM: tl.constexpr, BIAS: tl.constexpr, ACROSS: tl.constexpr, DEPTH: tl.constexpr, W1: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Over the patches `begin` to `end` of DEPTH pixels: products of the inputs at m (pairs of a tap and a channel) and
    the gradients of outputs of parity (p, q) in columns col0 and col1; or where BIAS, the sums of the latter alone."""
    DOWN: tl.constexpr = DEPTH // ACROSS
    SUMMED: tl.constexpr = DEPTH if BIAS else m.shape[0]
    acc0 = tl.zeros((col0.shape[0], SUMMED), tl.float32)
    acc1 = tl.zeros((col1.shape[0], SUMMED), tl.float32)
    tap = m // f
    down, along = p - 1 + tap // 2, q - 1 + tap % 2
    item = tl.arange(0, DEPTH)
    r, c = item // ACROSS, item % ACROSS
    # All that differs within a patch is the same for every patch: a step advances scalars.
    from_u = (r * u_h + c * u_w)[:, None] + (down * u_h + along * u_w + (m - tap * f))[None, :]
    from_g = (2 * r + p) * g_h + (2 * c + q) * g_w
    from_y = (2 * r + p) * y_h + (2 * c + q) * y_w
    wide, high = tl.cdiv(w, ACROSS), tl.cdiv(h, DOWN)
    image = begin // (wide * high)
    left = (begin - image * (wide * high)).to(tl.int32)
    top = left // wide
    left = left - top * wide
    for _ in tl.range(begin, end, num_stages=STAGES):
        row, col = top * DOWN + r, left * ACROSS + c
        valid = (row < h) & (col < w)
        at_g = (g + image * g_n + 2 * top * DOWN * g_h + 2 * left * ACROSS * g_w + from_g)[None, :]
        at_y = (y + image * y_n + 2 * top * DOWN * y_h + 2 * left * ACROSS * y_w + from_y)[None, :]
        grad0 = _gradient(
            at_g + col0[:, None], at_y + col0[:, None], a, b, mean, d, valid[None, :], col0[:, None],
            (col0 < o)[:, None], NORM, BIAS,
        )  # fmt: skip
        if BIAS:
            acc0 += grad0.to(tl.float32)
        else:
            there = (row[:, None] + down[None, :] >= 0) & (row[:, None] + down[None, :] < h)
            there = there & (col[:, None] + along[None, :] >= 0) & (col[:, None] + along[None, :] < w)
            # Zeros of pixels that are not there take what the norm makes of them out of the products.
            start = u + image * u_n + top * DOWN * u_h + left * ACROSS * u_w
            taken = tl.load(start + from_u, mask=there & valid[:, None] & (m < 4 * f)[None, :], other=0.0)
            acc0 = tl.dot(grad0, taken, acc0, input_precision=PRECISION)
        if W1 > 0:
            grad1 = _gradient(
                at_g + col1[:, None], at_y + col1[:, None], a, b, mean, d, valid[None, :], col1[:, None],
                (col1 < o)[:, None], NORM, BIAS,
            )  # fmt: skip
            if BIAS:
                acc1 += grad1.to(tl.float32)
            else:
                acc1 = tl.dot(grad1, taken, acc1, input_precision=PRECISION)
        left += 1
        top += left // wide
        left = tl.where(left == wide, 0, left)
        image += top // high
        top = tl.where(top == high, 0, top)
    return acc0, acc1


@triton.jit
def _backward_weight(
    number, patches, each, partial, partial_bias, u, u_n, u_h, u_w, g, y, a, b, mean, d, h, w, f, o, g_n, g_h, g_w, y_n,
    y_h, y_w,
    NORM: tl.constexpr, BIAS: tl.constexpr, ACROSS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    W0: tl.constexpr, W1: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial: (splits, 4, 4, o, f); partial_bias: (splits, 4 parities, o).

    All parities, taps and channels of a split of the pixels are neighbours in the grid: their reads meet in L2. So do
    those of the bias's own programs, without which the products' would have to spill.
    """
    COLUMNS: tl.constexpr = W0 + W1
    OTHER: tl.constexpr = W1 if W1 > 0 else 16
    parity = number % 4
    p, q = parity // 2, parity % 2
    index = number // 4
    tiles, blocks = tl.cdiv(4 * f, ROWS) + BIAS, tl.cdiv(o, COLUMNS)
    tile = index % tiles
    first = index // tiles % blocks * COLUMNS
    split = (index // (tiles * blocks)).to(tl.int64)
    begin, end = split * each, tl.minimum(split * each + each, patches)
    m = tile * ROWS + tl.arange(0, ROWS)
    col0 = first + tl.arange(0, W0)
    col1 = first + W0 + tl.arange(0, OTHER)
    if tile * ROWS < 4 * f:
        acc0, acc1 = _sums(
            u, g, y, a, b, mean, d, begin, end, h, w, f, o, m, col0, col1, p, q, g_n, g_h, g_w, y_n, y_h, y_w, u_n,
            u_h, u_w, NORM, False, ACROSS, DEPTH, W1, STAGES, PRECISION,
        )  # fmt: skip
        tap = m // f
        tap = (3 - p - tap // 2 * 2) * 4 + 3 - q - tap % 2 * 2
        at = partial + (split * 16 + tap)[None, :] * (o * f) + (m % f)[None, :]
        tl.store(at + col0[:, None] * f, acc0, mask=(col0 < o)[:, None] & (m < 4 * f)[None, :])
        if W1 > 0:
            tl.store(at + col1[:, None] * f, acc1, mask=(col1 < o)[:, None] & (m < 4 * f)[None, :])
    elif BIAS:
        sum0, sum1 = _sums(
            u, g, y, a, b, mean, d, begin, end, h, w, f, o, m, col0, col1, p, q, g_n, g_h, g_w, y_n, y_h, y_w, u_n,
            u_h, u_w, NORM, True, ACROSS, DEPTH, W1, STAGES, PRECISION,
        )  # fmt: skip
        sums = partial_bias + (split * 4 + parity) * o
        tl.store(sums + col0, tl.sum(sum0, 1), mask=col0 < o)
        if W1 > 0:
            tl.store(sums + col1, tl.sum(sum1, 1), mask=col1 < o)


@triton.jit(do_not_specialize=("patches", "each", "h", "w"))
def _backward_weight_kernel(
    patches: tl.int64, each: tl.int64, partial, partial_bias, u, u_n: tl.int64, u_h: tl.int64, u_w: tl.int64,
    g, y, a, b, mean, d, h, w, f, o, g_n: tl.int64, g_h: tl.int64, g_w: tl.int64, y_n: tl.int64, y_h: tl.int64,
    y_w: tl.int64,
    NORM: tl.constexpr, BIAS: tl.constexpr, ACROSS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    W0: tl.constexpr, W1: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    _backward_weight(
        tl.program_id(0), patches, each, partial, partial_bias, u, u_n, u_h, u_w, g, y, a, b, mean, d, h, w, f, o, g_n,
        g_h, g_w, y_n, y_h, y_w, NORM, BIAS, ACROSS, ROWS, DEPTH, W0, W1, STAGES, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=("weights", "inputs", "all_inputs", "patches", "each", *FREE))
def _backward_kernel(
    weights, inputs, all_inputs: tl.int64,
    du, weight, pixels: tl.int64, du_n: tl.int64, du_h: tl.int64, du_w: tl.int64,
    patches: tl.int64, each: tl.int64, partial, partial_bias, u, u_n: tl.int64, u_h: tl.int64, u_w: tl.int64,
    g, y, a, b, mean, d, h, w, f, o, g_n: tl.int64, g_h: tl.int64, g_w: tl.int64, y_n: tl.int64, y_h: tl.int64,
    y_w: tl.int64,
    INPUT_ROWS: tl.constexpr, INPUT_DEPTH: tl.constexpr, INPUT_W0: tl.constexpr, INPUT_W1: tl.constexpr,
    INPUT_STAGES: tl.constexpr, ACROSS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, W0: tl.constexpr,
    W1: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both gradients behind a norm, one split of the pixels after the other: `weights` programs of the weight's, the
    longer ones, then the input's, whose share of `all_inputs` is that of the split's patches (at most `inputs`).

    Programs start in about this order: those at work are of one or two splits, whose reads meet in L2.
    """
    split = tl.program_id(0) // (weights + inputs)
    number = tl.program_id(0) % (weights + inputs)
    if number < weights:
        _backward_weight(
            split * weights + number, patches, each, partial, partial_bias, u, u_n, u_h, u_w, g, y, a, b, mean, d, h, w,
            f, o, g_n, g_h, g_w, y_n, y_h, y_w, True, False, ACROSS, ROWS, DEPTH, W0, W1, STAGES, PRECISION,
        )  # fmt: skip
    else:
        begin = split.to(tl.int64) * each
        end = tl.minimum(begin + each, patches)
        run = begin * all_inputs // patches + number - weights
        if run < end * all_inputs // patches:
            _backward_x(
                run, du, weight, pixels, du_n, du_h, du_w, g, y, a, b, mean, d, h, w, f, o, g_n, g_h, g_w, y_n, y_h,
                y_w, True, INPUT_ROWS, INPUT_DEPTH, INPUT_W0, INPUT_W1, INPUT_STAGES, PRECISION,
            )  # fmt: skip


@triton.jit
def _reduce_kernel(dw, partial, splits, o, f, WEIGHTS: tl.constexpr):
    """dw (f, o, 16) from partial (splits, 16, o, f)."""
    at = tl.program_id(0) * WEIGHTS + tl.arange(0, WEIGHTS)
    tap = tl.arange(0, 16)
    total = tl.zeros((16, WEIGHTS), tl.float32)
    for split in range(0, splits):
        start = partial + (split * 16 + tap).to(tl.int64)[:, None] * (o * f)
        total += tl.load(start + at[None, :], mask=(at < o * f)[None, :], other=0.0)
    out = dw + ((at % f) * o + at // f).to(tl.int64)[:, None] * 16 + tap[None, :]
    tl.store(out, tl.trans(total).to(dw.dtype.element_ty), mask=(at < o * f)[:, None])


# --------------------------------------------------------------------------------------------------- launch


def _norm_arguments(g: Tensor, norm: Norm | None) -> tuple[Tensor, ...]:
    """g stands in for absent tensors, which are never read."""
    return (g,) * 5 if norm is None else norm


def backward_x_launch(
    du: Tensor, g: Tensor, norm: Norm | None, weight: Tensor, config: DeconvConfig | None = None
) -> Launch:
    f, o = weight.shape[:2]
    sizes = _sizes(du, o)
    config = config or _config("input", du, f, o, sizes[0])
    blocks, constants = _constants(config, f)
    made = _norm_arguments(g, norm)
    args = (
        du, weight.permute(2, 3, 1, 0).contiguous(), sizes[0], *_strides(du),
        g, *made, *sizes[1:], *_strides(g), *_strides(made[0]),
    )  # fmt: skip
    grid = (triton.cdiv(sizes[0], config.rows) * blocks,)
    return Launch(_backward_x_kernel, grid, args, {**constants, "NORM": norm is not None})


def backward_x(du: Tensor, g: Tensor, norm: Norm | None, weight: Tensor, config: DeconvConfig | None = None) -> None:
    """Writes the gradient of u.

    Args:
        du: (N, F, H, W), g: (N, O, 2H, 2W), fp32, fp16 or bf16, channels contiguous, any other strides.
        norm: None where g is y's gradient, else what makes it from g (:class:`Norm`); it is rounded to g's dtype and
            never written to memory.
        weight: (F, O, 4, 4), of the same dtype.
        config: a tile other than :func:`config_for`'s.

    Raises:
        ValueError: an image has 2**30 pixels or more.
    """
    backward_x_launch(du, g, norm, weight, config).run(g)


def _patch(depth: int, h: int, w: int) -> tuple[int, int]:
    """Rows and columns of a patch of `depth` pixels: of those that cover an image with the fewest, the widest."""
    sides = [(depth >> k, 1 << k) for k in reversed(range(depth.bit_length()))]
    return min(sides, key=lambda side: triton.cdiv(h, side[0]) * triton.cdiv(w, side[1]))


def backward_weight_launch(
    g: Tensor, norm: Norm | None, u: Tensor, has_bias: bool, config: DeconvConfig | None = None, least: int = 1
) -> tuple[Launch, Tensor, Tensor]:
    """A launch and the partial sums it fills: (splits, 4, 4, O, F), and (splits, 4, O) for the bias; about `least`
    splits or more."""
    f, o = u.shape[1], g.shape[1]
    _, h, w, *_ = sizes = _sizes(u, o)
    config = config or _config("weight", u, o, sizes[0], 4 * f)
    blocks, constants = _constants(config, o)
    down, across = _patch(config.depth, h, w)
    patches = u.shape[0] * triton.cdiv(h, down) * triton.cdiv(w, across)
    rows = triton.cdiv(4 * f, config.rows)
    tiles = 4 * rows * blocks
    # Deterministic: a function of shapes and device. Two programs for each multiprocessor, of four patches at least.
    splits = max(least, min(2 * _native.multiprocessors(u.device) // tiles, triton.cdiv(patches, 4)))
    each = triton.cdiv(patches, splits)
    splits = max(1, triton.cdiv(patches, max(each, 1)))
    partial = u.new_empty((splits, 4, 4, o, f), dtype=torch.float32)
    bias = u.new_empty((splits, 4, o), dtype=torch.float32)
    made = _norm_arguments(g, norm)
    args = (
        patches, each, partial, bias, u, *_strides(u), g, *made, *sizes[1:], *_strides(g), *_strides(made[0]),
    )  # fmt: skip
    constants |= {"NORM": norm is not None, "BIAS": has_bias, "ACROSS": across}
    return Launch(_backward_weight_kernel, (4 * (rows + has_bias) * blocks * splits,), args, constants), partial, bias


def reduce_launch(dw: Tensor, partial: Tensor) -> Launch:
    splits, _, _, o, f = partial.shape
    constants = {"WEIGHTS": _REDUCED, "num_warps": 4, "enable_fp_fusion": True}
    return Launch(_reduce_kernel, (triton.cdiv(f * o, _REDUCED),), (dw, partial, splits, o, f), constants)


def backward_weight(
    dw: Tensor, db: Tensor | None, g: Tensor, norm: Norm | None, u: Tensor, config: DeconvConfig | None = None
) -> None:
    """Writes the gradients of weight and bias, summed in a fixed order.

    Args:
        dw: (F, O, 4, 4), contiguous; db: (O) or None.
        g, norm: as :func:`backward_x` takes them.
        u: (N, F, H, W) as :func:`forward` takes it.
        config: a tile other than :func:`config_for`'s.

    Raises:
        ValueError: an image has 2**30 pixels or more.
    """
    launch, partial, bias = backward_weight_launch(g, norm, u, db is not None, config)
    launch.run(u)
    reduce_launch(dw, partial).run(u)
    if db is not None:
        db.copy_(bias.sum((0, 1)))


_Pair = tuple[DeconvConfig | None, DeconvConfig | None]


def _pair(of_input: list[int] | None, of_weight: list[int] | None) -> _Pair:
    first, second = (None if fields is None else DeconvConfig(*fields) for fields in (of_input, of_weight))
    return first, second


def _pairs(itemsize: int) -> list[_Pair]:
    """Tiles worth timing for both gradients in one launch: one of them other than its default."""
    others = search_space(itemsize)
    return [*((config, None) for config in others), *((None, config) for config in others)]


def norm_backward_launch(
    du: Tensor, g: Tensor, norm: Norm, u: Tensor, weight: Tensor,
    configs: tuple[DeconvConfig | None, DeconvConfig | None] = (None, None), least: int | None = None,
) -> tuple[Launch, Tensor]:  # fmt: skip
    """A launch and the partial sums it fills: (splits, 4, 4, O, F); about `least` splits or more."""
    if least is None:
        least = max(1, triton.cdiv(2 * g.numel() * g.itemsize, _SPLIT_BYTES))
    f, o = weight.shape[:2]
    if configs == (None, None):
        found = tuned.tile("deconv both gradients tile", _pair, lambda: _pairs(du.itemsize), du, extra=(o,))
        configs = found or configs
    pixels = du[:, :1].numel()
    default = _default("input", du, f, o, pixels)
    config = configs[0] or replace(default, columns=min(default.columns, 192))  # 256 spill beside the other gradient
    of_input = backward_x_launch(du, g, norm, weight, config)
    other = configs[1] or _default("weight", u, o, pixels, 4 * f)
    of_weight, partial, _ = backward_weight_launch(g, norm, u, False, other, least)
    patches, each, *_ = of_weight.args
    (programs,), (all_inputs,), splits = of_weight.grid, of_input.grid, partial.shape[0]
    weights, inputs = programs // splits, triton.cdiv(each * all_inputs, max(patches, 1))
    constants = {name: value for name, value in of_weight.constants.items() if name not in ("NORM", "BIAS")}
    constants |= {f"INPUT_{name}": of_input.constants[name] for name in ("ROWS", "DEPTH", "W0", "W1", "STAGES")}
    constants["num_warps"] = max(launch.constants["num_warps"] for launch in (of_input, of_weight))
    args = (weights, inputs, all_inputs, *of_input.args[:6], *of_weight.args)
    return Launch(_backward_kernel, (splits * (weights + inputs),), args, constants), partial


def norm_backward(
    du: Tensor, dw: Tensor, g: Tensor, norm: Norm, u: Tensor, weight: Tensor,
    configs: tuple[DeconvConfig | None, DeconvConfig | None] = (None, None), least: int | None = None,
) -> None:  # fmt: skip
    """Writes the gradients of u and of weight, made by one launch that is to read g and norm.y from memory once.

    They are :func:`backward_x`'s and, of as many splits, :func:`backward_weight`'s, bit for bit.

    Args:
        du, g, norm, weight: as :func:`backward_x` takes them; dw, u: as :func:`backward_weight`.
        configs: of the input's and the weight's gradient, other than :func:`config_for`'s; the more warps serve both.
        least: about so many splits of the pixels or more, other than what keeps a split's g and y in L2.

    Raises:
        ValueError: an image has 2**30 pixels or more.
    """
    launch, partial = norm_backward_launch(du, g, norm, u, weight, configs, least)
    launch.run(u)
    reduce_launch(dw, partial).run(u)
