"""One level of :mod:`reduce_haar` for narrow images in channels_last order, in Triton: a 2x2 convolution of stride 2.

Haar's level and the 1x1 convolution together are one product of a quad's four pixels, 4C values, with 4C x 4O signed
weights. It multiplies four times what is needed, which costs few channels nothing: they are bound by memory, and the
pixels lie there in the order of the product, as the bands do in the order of its result.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels import _native
from wavemix_kernels.ops.common.chips import products_of
from wavemix_kernels.ops.common.precision import input_precision
from wavemix_kernels.ops.common.triton_launch import Launch, pow2_at_least
from wavemix_kernels.ops.common.triton_sums import finish
from wavemix_kernels.ops.reduce_haar.tiles import NarrowConfig, narrow_config_for


@triton.jit
def _bands(OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr):
    """The result's columns [LL | LH, HL, HH of each output]: their outputs, their bands 0 to 3, and which exist."""
    column = tl.arange(0, COLUMNS)
    of_band = column - OUTPUTS
    out = tl.where(of_band < 0, column, of_band // 3)
    return out, tl.where(of_band < 0, 0, 1 + of_band % 3), column < 4 * OUTPUTS


@triton.jit
def _signed(tap, sign):
    """Exact; a half type's own negation is an instruction that not every chip has."""
    return (tap.to(tl.float32) * sign).to(tap.dtype)


@triton.jit
def _taps(weight, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Twice the weights of a quad's upper pixels, left and right, for each column (2C, columns); and the sign that
    makes them the lower pixels'."""
    out, band, there = _bands(OUTPUTS, COLUMNS)
    pixel = tl.arange(0, 2 * CHANNELS) // CHANNELS
    channel = tl.arange(0, 2 * CHANNELS) % CHANNELS
    tap = tl.load(weight + out[None, :] * CHANNELS + channel[:, None], mask=there[None, :], other=0.0)
    # LH is the difference of rows, HL of columns, HH of both.
    turned = (pixel == 1)[:, None] & (band >= 2)[None, :]
    return _signed(tap, tl.where(turned, -1.0, 1.0)), 1.0 - 2.0 * (band % 2).to(tl.float32)


@triton.jit
def _quads(first, end, cols, pitch, CHANNELS: tl.constexpr, QUADS: tl.constexpr):
    """Offsets of the upper rows of quads from `first` on, (quads, 2C), and which are before `end`."""
    item = tl.arange(0, QUADS)
    width = cols.to(tl.int32)
    along = (first % cols).to(tl.int32) + item
    line = first // cols + along // width
    start = line * (2 * pitch) + along % width * (2 * CHANNELS)
    return start[:, None] + tl.arange(0, 2 * CHANNELS)[None, :], (first + item < end)[:, None]


@triton.jit(do_not_specialize=("quads", "cols"))
def _narrow_kernel(
    z, x, weight, bias, quads: tl.int64, cols: tl.int64, pitch,
    BIAS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, QUADS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`cols` quads in a row of an image, `quads` in all; `pitch`: elements of a row of x."""
    first = tl.program_id(0).to(tl.int64) * QUADS
    at, valid = _quads(first, quads, cols, pitch, CHANNELS, QUADS)
    upper = tl.load(x + at, mask=valid, other=0.0)
    lower = tl.load(x + at + pitch, mask=valid, other=0.0)
    taps, sign = _taps(weight, CHANNELS, OUTPUTS, COLUMNS)
    value = tl.dot(upper, taps, input_precision=PRECISION)
    value = 0.5 * (value + sign[None, :] * tl.dot(lower, taps, input_precision=PRECISION))
    column = tl.arange(0, COLUMNS)
    if BIAS:
        # A constant of every pixel: LL gets twice of it, the bands nothing.
        offset = tl.load(bias + column, mask=column < OUTPUTS, other=0.0).to(tl.float32)
        value += 2.0 * offset[None, :]
    item = first + tl.arange(0, QUADS)
    at = item[:, None] * (4 * OUTPUTS) + column[None, :]
    mask = valid if COLUMNS == 4 * OUTPUTS else valid & (column < 4 * OUTPUTS)[None, :]
    tl.store(z + at, value.to(z.dtype.element_ty), mask=mask)


@triton.jit
def _store_row(at, add_at, value, valid, ADD: tl.constexpr):
    if ADD:
        value += tl.load(add_at, mask=valid, other=0.0).to(tl.float32)
    tl.store(at, value.to(at.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=("quads", "cols", "each"))
def _narrow_backward_kernel(
    dx, add, partial, partial_bias, grad, x, weight, quads: tl.int64, cols: tl.int64, each, pitch,
    ADD: tl.constexpr, BIAS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr,
    QUADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial (splits, O, C) and partial_bias (splits, O): sums over the `each` quads of a split."""
    split = tl.program_id(0).to(tl.int64)
    end = tl.minimum(split * each + each, quads)  # what lies beyond belongs to the next split
    taps, sign = _taps(weight, CHANNELS, OUTPUTS, COLUMNS)
    of_upper = tl.trans(taps)
    of_lower = tl.trans(_signed(taps, sign[None, :]))
    column = tl.arange(0, COLUMNS)
    upper_sum = tl.zeros((COLUMNS, 2 * CHANNELS), tl.float32)
    lower_sum = tl.zeros((COLUMNS, 2 * CHANNELS), tl.float32)
    total = tl.zeros((QUADS, COLUMNS), tl.float32)
    for start in range(0, each, QUADS):
        first = split * each + start
        at, valid = _quads(first, end, cols, pitch, CHANNELS, QUADS)
        upper = tl.load(x + at, mask=valid, other=0.0)
        lower = tl.load(x + at + pitch, mask=valid, other=0.0)
        item = first + tl.arange(0, QUADS)
        mask = valid if COLUMNS == 4 * OUTPUTS else valid & (column < 4 * OUTPUTS)[None, :]
        g = tl.load(grad + item[:, None] * (4 * OUTPUTS) + column[None, :], mask=mask, other=0.0)
        if BIAS:
            total += g.to(tl.float32)
        upper_sum = tl.dot(tl.trans(g), upper, upper_sum, input_precision=PRECISION)
        lower_sum = tl.dot(tl.trans(g), lower, lower_sum, input_precision=PRECISION)
        _store_row(dx + at, add + at, 0.5 * tl.dot(g, of_upper, input_precision=PRECISION), valid, ADD)
        value = 0.5 * tl.dot(g, of_lower, input_precision=PRECISION)
        _store_row(dx + at + pitch, add + at + pitch, value, valid, ADD)
    # A weight meets its column's four pixels, the left ones with the sign of the row alone.
    both = upper_sum + sign[:, None] * lower_sum
    out, band, there = _bands(OUTPUTS, COLUMNS)
    left, right = tl.split(tl.permute(tl.reshape(both, (COLUMNS, 2, CHANNELS)), (0, 2, 1)))
    value = 0.5 * (left + tl.where(band >= 2, -1.0, 1.0)[:, None] * right)
    at = partial + split * OUTPUTS * CHANNELS + tl.arange(0, CHANNELS)
    for one in tl.static_range(OUTPUTS):
        tl.store(at + one * CHANNELS, tl.sum(tl.where((there & (out == one))[:, None], value, 0.0), 0))
    if BIAS:
        tl.store(partial_bias + split * OUTPUTS + column, 2.0 * tl.sum(total, 0), mask=column < OUTPUTS)


# --------------------------------------------------------------------------------------------------- launch


def _sizes(x: Tensor, weight: Tensor) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Quads, quads in a row and elements of a row of x; what both kernels are compiled for."""
    n, c, h, w = x.shape
    outputs = weight.shape[0]
    constants = {
        "CHANNELS": c, "OUTPUTS": outputs, "COLUMNS": max(16, pow2_at_least(4 * outputs)),
        "PRECISION": input_precision(), "enable_fp_fusion": True,
    }  # fmt: skip
    return (n * (h // 2) * (w // 2), w // 2, w * c), constants


def _of(config: NarrowConfig) -> dict[str, int]:
    return {"QUADS": config.quads, "num_warps": config.num_warps, "num_stages": config.num_stages}


def launch(z: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, config: NarrowConfig | None = None) -> Launch:
    config = config or narrow_config_for(x.shape[1], False)
    sizes, constants = _sizes(x, weight)
    args = z, x, weight, weight if bias is None else bias, *sizes
    constants |= {"BIAS": bias is not None, **_of(config)}
    return Launch(_narrow_kernel, (triton.cdiv(sizes[0], config.quads),), args, constants)


def forward(z: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Writes Z_1 (N, 4O, H/2, W/2), dense in channels_last order, of x (N, C, H, W); weight (O, C) and bias (O) or None
    are contiguous."""
    launch(z, x, weight, bias).run(x)


def backward_launch(
    dx: Tensor, grad: Tensor, x: Tensor, weight: Tensor, add: Tensor | None, has_bias: bool,
    config: NarrowConfig | None = None,
) -> tuple[Launch, Tensor, Tensor]:  # fmt: skip
    """A launch and the partial sums it fills: (splits, O, C), and (splits, O) for the bias."""
    config = config or narrow_config_for(x.shape[1], True, products_of(x.device))
    (quads, *sizes), constants = _sizes(x, weight)
    outputs, channels = weight.shape
    # Deterministic: a function of shapes and device. 16 warps to a multiprocessor; four steps each at least.
    warps = 16 * _native.multiprocessors(x.device)
    splits = max(1, min(warps // config.num_warps, triton.cdiv(quads, 4 * config.quads)))
    each = triton.cdiv(triton.cdiv(quads, splits), config.quads) * config.quads
    splits = triton.cdiv(quads, each) if each else 1  # rounding may leave the last ones nothing
    partial = x.new_empty((splits, outputs, channels), dtype=torch.float32)
    bias = x.new_empty((splits, outputs if has_bias else 0), dtype=torch.float32)
    args = dx, dx if add is None else add, partial, bias, grad, x, weight, quads, sizes[0], each, sizes[1]
    constants |= {"ADD": add is not None, "BIAS": has_bias, **_of(config)}
    return Launch(_narrow_backward_kernel, (splits,), args, constants), partial, bias


def backward(
    dx: Tensor, dw: Tensor, db: Tensor | None, grads: Sequence[Tensor], x: Tensor, weight: Tensor, add: Tensor | None
) -> None:
    """Writes the gradient of x, plus ``add``, into ``dx``, and those of weight and bias, summed in a fixed order.

    Args:
        dx, add, x: (N, C, H, W), dense in channels_last order; ``add`` may be None.
        dw: (O, C), contiguous; db: (O) or None.
        grads: of Z_1 alone, (N, 4O, H/2, W/2), dense in channels_last order.
        weight: (O, C), contiguous.
    """
    made, partial, bias = backward_launch(dx, grads[0], x, weight, add, db is not None)
    made.run(x)
    finish((dw, partial), *([] if db is None else [(db, bias)]))
