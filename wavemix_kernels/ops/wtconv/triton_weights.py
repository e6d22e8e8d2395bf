"""The gradients of WTConv's taps in Triton: bands of the image times bands of the gradient, summed over positions.

A program makes the sums of its tile for all taps, column by column; the tile's rows go by in blocks. The sums of all
tiles are added up in a fixed order by a second kernel: results are the same in every run.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef, assignment"
# (Triton's functions are traced, not called: their arguments have no Python types, and tuples grow.)
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels.ops.common import layout, triton_sums
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.common.triton_launch import Launch
from wavemix_kernels.ops.wtconv.tiles import WtconvConfig, config_for
from wavemix_kernels.ops.wtconv.triton import (
    SIZES,
    bands_at,
    cascade,
    common,
    geometry,
    in_order,
    place,
    prepared,
    pyramid,
    start_of,
    unit_of,
)

_STRIDES = tuple(f"{t}_{d}" for t in ("grad", "x") for d in "nchw")


@triton.jit(do_not_specialize=SIZES + _STRIDES)
def _weights_kernel(
    partial, grad, x,
    positions: tl.int32, channels: tl.int32, height: tl.int32, width: tl.int32, rows: tl.int32, cols: tl.int32,
    grad_n: tl.int64, grad_c: tl.int64, grad_h: tl.int64, grad_w: tl.int64,
    x_n: tl.int64, x_c: tl.int64, x_h: tl.int64, x_w: tl.int64,
    REACH: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr,
    UNIT: tl.constexpr, EVEN: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """`partial` (parts, columns, rows, 4, C) gets sums of bands that are both twice their size, halved twice."""
    SIZE: tl.constexpr = 2 * REACH + 1
    if LAST:
        channels *= UNIT
    if EVEN:
        width = width // 2 * 2
    tile = tl.program_id(0)
    image, j, channel, in_positions, in_channels = place(tile, positions, channels, cols, POSITIONS, CHANNELS)
    mask = in_positions & in_channels
    at = start_of(image, channel, x_n, x_c, LAST, UNIT)
    grad_at = start_of(image, channel, grad_n, grad_c, LAST, UNIT)
    part = tile // tl.cdiv(channels, CHANNELS)
    to = partial + part.to(tl.int64) * (4 * SIZE * SIZE) * channels + channel
    for v in range(SIZE):
        there = mask & (j + v >= REACH) & (j + v < cols + REACH)
        sums = ()
        for _ in tl.static_range(4 * SIZE):
            sums = sums + (tl.zeros((POSITIONS, CHANNELS), REAL),)  # noqa: RUF005
        for first in range(0, rows, ROWS):
            row0 = first + tl.zeros((1, 1), tl.int32)  # Triton's interpreter wants masks of tiles
            grads = ()
            for r in tl.static_range(ROWS):
                grads = grads + bands_at(
                    grad, grad_at, 2 * (row0 + r), 2 * j, mask, height, width, grad_h * UNIT, grad_w * UNIT, LAST,
                    EVEN, REAL,
                )  # fmt: skip
            for r in tl.static_range(ROWS + 2 * REACH):
                bands = bands_at(
                    x, at, 2 * (row0 + r - REACH), 2 * (j + v - REACH), there, height, width, x_h * UNIT,
                    x_w * UNIT, LAST, EVEN, REAL,
                )  # fmt: skip
                # Row i of the gradient's block meets this row of bands through the taps' row r - i.
                for i in tl.static_range(ROWS):
                    if r >= i and r - i < SIZE:
                        made = ()
                        for k in tl.static_range(4 * SIZE):
                            if k // 4 == r - i:
                                made = made + (sums[k] + grads[4 * i + k % 4] * bands[k % 4],)  # noqa: RUF005
                            else:
                                made = made + (sums[k],)  # noqa: RUF005
                        sums = made
        for k in tl.static_range(4 * SIZE):
            total = tl.sum(sums[k], 0)[None, :] * 0.25
            tl.store(to + (v * (4 * SIZE) + k) * channels, total, mask=in_channels)


def weights_launch(
    grad: Tensor, x: Tensor, size: int, channels_last: bool, config: WtconvConfig | None = None
) -> tuple[Launch, Tensor]:
    """A launch for one level and the (parts, size, size, 4, C) sums that it fills: columns of taps, rows, bands."""
    config = config or config_for("weights", channels_last, x.shape[1], -(-x.shape[2] // 2))
    unit = unit_of([x, grad], channels_last)
    sizes, tiles = geometry(x, config)
    parts = tiles // -(-x.shape[1] // config.channels)
    if channels_last:
        sizes[1] //= unit
    constants = common(x, config, channels_last) | {"REACH": size // 2, "UNIT": unit}
    partial = x.new_empty((parts, size, size, 4, x.shape[1]), dtype=accumulate_dtype(x.dtype))
    strides = [stride // unit for t in (grad, x) for stride in t.stride()]
    return Launch(_weights_kernel, (tiles,), (partial, grad, x, *sizes, *strides), constants), partial


def backward(
    out: tuple[Tensor, Tensor, Tensor], grad: Tensor, x: Tensor, taps: Sequence[Tensor], scales: Sequence[Tensor]
) -> None:
    """Writes the gradients of x (N, C, H, W), of all taps (levels, 4C, 1, k, k) and all scales (levels, 4C)."""
    d_x, d_taps, d_scales = out
    if x.numel() == 0:
        d_taps.zero_()
        d_scales.zero_()
        return
    last, size, levels = layout.is_channels_last(d_x), taps[0].shape[3], len(taps)
    wide = accumulate_dtype(x.dtype)
    grads, lows = (pyramid(in_order(t, last), levels, last) for t in (grad, x))
    cascade(d_x, grads, None, prepared(taps, scales, wide, True))
    sums = x.new_empty((levels, size, size, 4, x.shape[1]), dtype=wide)
    parts = []
    for level in range(levels):
        launch, partial = weights_launch(grads[level], lows[level], size, last)
        launch.run(x)
        parts.append(partial)
    for first in range(0, levels, triton_sums.MOST):
        some = range(first, min(levels, first + triton_sums.MOST))
        triton_sums.finish(*((sums[level], parts[level]) for level in some))
    by_tap = sums.permute(0, 4, 3, 2, 1).reshape(d_taps.shape)
    scale = torch.stack([s.reshape(-1) for s in scales]).to(wide)
    torch.mul(by_tap, scale[:, :, None, None, None], out=d_taps)
    torch.sum(by_tap * torch.stack(list(taps)).to(wide), (2, 3, 4), out=d_scales)
