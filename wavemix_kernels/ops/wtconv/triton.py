"""WTConv's levels in Triton: Haar, a stencil on the bands, and Haar's inverse in registers.

A tile is positions x channels of coefficients. Positions count the columns of all images; a program makes some rows
of them, each row a value of its own, so that a row of bands that several of its rows want is made once. For each column
of taps, the rows that they reach are loaded again, from the first-level cache but for the first time.
Images in rows are tiles of one channel, whose taps are numbers; of channels_last ones, channels are lanes.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef, assignment, var-annotated"
# (Triton's functions are traced, not called: their arguments have no Python types, and tuples grow.)
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels.ops.common import layout
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.common.triton_launch import Launch
from wavemix_kernels.ops.wtconv.tiles import WtconvConfig, config_for

SIZES = ("positions", "channels", "height", "width", "rows", "cols")
_IMAGES = ("x", "back", "add", "out")
STRIDES = tuple(f"{t}_{d}" for t in _IMAGES for d in "nchw")


@triton.jit
def place(tile, positions, channels, cols, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """Image, column of coefficients and channel of a tile, (POSITIONS, 1) and (1, CHANNELS), and which there are."""
    blocks = tl.cdiv(channels, CHANNELS)
    across = tile // blocks
    channel = ((tile - across * blocks) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    position = (across * POSITIONS + tl.arange(0, POSITIONS))[:, None]
    image = position // cols
    return image, position - image * cols, channel, position < positions, channel < channels


@triton.jit
def start_of(image, channel, n, c, LAST: tl.constexpr, UNIT: tl.constexpr):
    """Offsets of the first pixel of each image and channel."""
    at = image.to(tl.int64) * (n * UNIT)
    if LAST:
        return at + channel
    return at + channel.to(tl.int64) * (c * UNIT)


@triton.jit
def _two(x, at, col, mask, width, w, LAST: tl.constexpr, EVEN: tl.constexpr):
    """Two neighbouring pixels of a row; the second one of an odd row's last two is 0."""
    if LAST:
        left = tl.load(x + (at + col * w), mask=mask, other=0.0)
        if not EVEN:
            mask = mask & (col + 1 < width)
        right = tl.load(x + (at + (col + 1) * w), mask=mask, other=0.0)
    else:
        lane = tl.arange(0, 2)[None, None, :]
        mask = mask[:, :, None]
        if not EVEN:
            mask = mask & (col[:, :, None] + lane < width)
        left, right = tl.split(tl.load(x + ((at + col)[:, :, None] + lane), mask=mask, other=0.0))
    return left, right


@triton.jit
def bands_at(
    x, at, row, col, mask, height, width, h, w, LAST: tl.constexpr, EVEN: tl.constexpr, REAL: tl.constexpr
):  # fmt: skip
    """Twice the bands LL, LH, HL and HH of a row of 2x2 blocks, which begins in the pixels (row, col)."""
    a, b = _two(x, at + row * h, col, mask & (row >= 0) & (row < height), width, w, LAST, EVEN)
    c, d = _two(x, at + (row + 1) * h, col, mask & (row >= 0) & (row + 1 < height), width, w, LAST, EVEN)
    top, over = a.to(REAL) + b.to(REAL), a.to(REAL) - b.to(REAL)
    bottom, under = c.to(REAL) + d.to(REAL), c.to(REAL) - d.to(REAL)
    return top + bottom, top - bottom, over + under, over - under


@triton.jit
def _put(
    out, add, at, add_at, left, right, col, mask, width, w, add_w,
    LAST: tl.constexpr, EVEN: tl.constexpr, ADD: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Stores two neighbouring pixels of a row, plus those of `add`."""
    if ADD:
        other_left, other_right = _two(add, add_at, col, mask, width, add_w, LAST, EVEN)
        left += other_left.to(REAL)
        right += other_right.to(REAL)
    left = left.to(out.dtype.element_ty)
    right = right.to(out.dtype.element_ty)
    if LAST:
        tl.store(out + (at + col * w), left, mask=mask)
        if not EVEN:
            mask = mask & (col + 1 < width)
        tl.store(out + (at + (col + 1) * w), right, mask=mask)
    else:
        lane = tl.arange(0, 2)[None, None, :]
        mask = mask[:, :, None]
        if not EVEN:
            mask = mask & (col[:, :, None] + lane < width)
        tl.store(out + ((at + col)[:, :, None] + lane), tl.join(left, right), mask=mask)


@triton.jit(do_not_specialize=SIZES + STRIDES)
def _level_kernel(
    out, x, back, add, taps,
    positions: tl.int32, channels: tl.int32, height: tl.int32, width: tl.int32, rows: tl.int32, cols: tl.int32,
    x_n: tl.int64, x_c: tl.int64, x_h: tl.int64, x_w: tl.int64,
    back_n: tl.int64, back_c: tl.int64, back_h: tl.int64, back_w: tl.int64,
    add_n: tl.int64, add_c: tl.int64, add_h: tl.int64, add_w: tl.int64,
    out_n: tl.int64, out_c: tl.int64, out_h: tl.int64, out_w: tl.int64,
    REACH: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr,
    UNIT: tl.constexpr, EVEN: tl.constexpr, BACK: tl.constexpr, ADD: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Strides arrive divided by UNIT: multiplying here proves to the compiler that vectors are aligned. `taps` is
    (columns, rows, 4, C), of a quarter of their size: Haar and its inverse each halve."""
    SIZE: tl.constexpr = 2 * REACH + 1
    BACK_UNIT: tl.constexpr = UNIT if LAST else 1
    if LAST:
        channels *= UNIT
    if EVEN:
        width = width // 2 * 2
    blocks = tl.cdiv(rows, ROWS)
    tile = tl.program_id(0)
    row0 = tile % blocks * ROWS + tl.zeros((1, 1), tl.int32)  # Triton's interpreter wants masks of tiles
    image, j, channel, in_positions, in_channels = place(
        tile // blocks, positions, channels, cols, POSITIONS, CHANNELS
    )  # fmt: skip
    mask = in_positions & in_channels
    at = start_of(image, channel, x_n, x_c, LAST, UNIT)
    weights = taps + channel
    sums = ()
    for _ in tl.static_range(4 * ROWS):
        sums = sums + (tl.zeros((POSITIONS, CHANNELS), REAL),)  # noqa: RUF005
    for v in range(SIZE):
        there = mask & (j + v >= REACH) & (j + v < cols + REACH)
        tap = ()
        for i in tl.static_range(4 * SIZE):
            tap = tap + (tl.load(weights + (v * (4 * SIZE) + i) * channels, mask=in_channels, other=0.0),)  # noqa: RUF005
        for r in tl.static_range(ROWS + 2 * REACH):
            bands = bands_at(
                x, at, 2 * (row0 + r - REACH), 2 * (j + v - REACH), there, height, width, x_h * UNIT,
                x_w * UNIT, LAST, EVEN, REAL,
            )  # fmt: skip
            made = ()
            for i in tl.static_range(4 * ROWS):
                if r >= i // 4 and r - i // 4 < SIZE:
                    made = made + (sums[i] + tap[4 * (r - i // 4) + i % 4] * bands[i % 4],)  # noqa: RUF005
                else:
                    made = made + (sums[i],)  # noqa: RUF005
            sums = made
    out_at = start_of(image, channel, out_n, out_c, LAST, UNIT)
    add_at = start_of(image, channel, add_n, add_c, LAST, UNIT)
    back_at = start_of(image, channel, back_n, back_c, LAST, BACK_UNIT) + j * (back_w * BACK_UNIT)
    for i in tl.static_range(ROWS):
        row = row0 + i
        here = mask & (row < rows)
        low = sums[4 * i]
        if BACK:
            low += 0.5 * tl.load(back + (back_at + row * (back_h * BACK_UNIT)), mask=here, other=0.0).to(REAL)
        top, bottom = low + sums[4 * i + 1], low - sums[4 * i + 1]
        over, under = sums[4 * i + 2] + sums[4 * i + 3], sums[4 * i + 2] - sums[4 * i + 3]
        _put(
            out, add, out_at + 2 * row * (out_h * UNIT), add_at + 2 * row * (add_h * UNIT), top + over, top - over,
            2 * j, here, width, out_w * UNIT, add_w * UNIT, LAST, EVEN, ADD, REAL,
        )  # fmt: skip
        _put(
            out, add, out_at + (2 * row + 1) * (out_h * UNIT), add_at + (2 * row + 1) * (add_h * UNIT), bottom + under,
            bottom - under, 2 * j, here & (2 * row + 1 < height), width, out_w * UNIT, add_w * UNIT, LAST, EVEN, ADD,
            REAL,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES + STRIDES)
def _low_kernel(
    out, x,
    positions: tl.int32, channels: tl.int32, height: tl.int32, width: tl.int32, rows: tl.int32, cols: tl.int32,
    x_n: tl.int64, x_c: tl.int64, x_h: tl.int64, x_w: tl.int64,
    out_n: tl.int64, out_c: tl.int64, out_h: tl.int64, out_w: tl.int64,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr, EVEN: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """LL alone, which the next level is made of."""
    if LAST:
        channels *= UNIT
    blocks = tl.cdiv(rows, ROWS)
    tile = tl.program_id(0)
    row0 = tile % blocks * ROWS + tl.zeros((1, 1), tl.int32)  # Triton's interpreter wants masks of tiles
    image, j, channel, in_positions, in_channels = place(
        tile // blocks, positions, channels, cols, POSITIONS, CHANNELS
    )  # fmt: skip
    mask = in_positions & in_channels
    at = start_of(image, channel, x_n, x_c, LAST, UNIT)
    out_at = start_of(image, channel, out_n, out_c, LAST, OUT_UNIT) + j * (out_w * OUT_UNIT)
    lows = ()
    for r in tl.static_range(ROWS):
        bands = bands_at(
            x, at, 2 * (row0 + r), 2 * j, mask, height, width, x_h * UNIT, x_w * UNIT, LAST, EVEN, REAL
        )  # fmt: skip
        lows = lows + (0.5 * bands[0],)  # noqa: RUF005
    for r in tl.static_range(ROWS):
        here = mask & (row0 + r < rows)
        tl.store(out + (out_at + (row0 + r) * (out_h * OUT_UNIT)), lows[r].to(out.dtype.element_ty), mask=here)


# --- Launches ----------------------------------------------------------------------------------------------


def in_order(x: Tensor, channels_last: bool) -> Tensor:
    """``x`` where its channels (channels_last) or rows are contiguous, else a copy."""
    if channels_last:
        return layout.channels_inner(x)
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def unit_of(images: Sequence[Tensor], channels_last: bool) -> int:
    """A divisor of all strides but the contiguous one: channels go by pairs or fours, pixels of rows by pairs."""
    strides = [t.stride(axis) for t in images for axis in ((0, 2, 3) if channels_last else (0, 1, 2))]
    strides.append(images[0].shape[1 if channels_last else 3])
    for unit in (4, 2) if channels_last else (2,):
        if all(stride % unit == 0 for stride in strides):
            return unit
    return 1


def geometry(x: Tensor, config: WtconvConfig) -> tuple[list[int], int]:
    """The sizes of a level of the image ``x``, as the kernels want them, and the number of tiles of a row block."""
    n, c, height, width = x.shape
    rows, cols = -(-height // 2), -(-width // 2)
    tiles = -(-n * cols // config.positions) * -(-c // config.channels)
    return [n * cols, c, height, width, rows, cols], tiles


def common(x: Tensor, config: WtconvConfig, channels_last: bool) -> dict[str, Any]:
    return {
        "ROWS": config.rows, "POSITIONS": config.positions, "CHANNELS": config.channels, "LAST": channels_last,
        "EVEN": x.shape[3] % 2 == 0, "REAL": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "num_warps": config.num_warps, "enable_fp_fusion": True,
    }  # fmt: skip


def _divided(t: Tensor, unit: int) -> list[int]:
    return [stride // unit for stride in t.stride()]


def level_launch(
    out: Tensor, x: Tensor, back: Tensor | None, add: Tensor | None, taps: Tensor, config: WtconvConfig | None = None
) -> Launch:  # fmt: skip
    """One level of images of one memory order (:func:`in_order`); ``taps`` are one level's of :func:`prepared`."""
    last = layout.is_channels_last(out)
    config = config or config_for("level", last, x.shape[1], -(-x.shape[2] // 2))
    given = [t for t in (x, out, add) if t is not None]
    unit = unit_of([*given, back] if last and back is not None else given, last)
    sizes, tiles = geometry(x, config)
    if last:
        sizes[1] //= unit
    constants = common(x, config, last) | {
        "REACH": taps.shape[0] // 2, "UNIT": unit, "BACK": back is not None, "ADD": add is not None,
    }  # fmt: skip
    images = x, x if back is None else back, x if add is None else add, out
    strides = [_divided(t, unit if last or t is not back else 1) for t in images]
    blocks = -(-sizes[4] // config.rows)
    arguments = out, x, images[1], images[2], taps, *sizes, *(s for of in strides for s in of)
    return Launch(_level_kernel, (blocks * tiles,), arguments, constants)


def low_launch(out: Tensor, x: Tensor, config: WtconvConfig | None = None) -> Launch:
    last = layout.is_channels_last(x) and x.shape[1] > 1
    config = config or config_for("low", last, x.shape[1], -(-x.shape[2] // 2))
    unit = unit_of([x, out] if last else [x], last)
    sizes, tiles = geometry(x, config)
    if last:
        sizes[1] //= unit
    out_unit = unit if last else 1
    constants = common(x, config, last) | {"UNIT": unit, "OUT_UNIT": out_unit}
    blocks = -(-sizes[4] // config.rows)
    strides = *_divided(x, unit), *_divided(out, out_unit)
    return Launch(_low_kernel, (blocks * tiles,), (out, x, *sizes, *strides), constants)


def prepared(taps: Sequence[Tensor], scales: Sequence[Tensor], wide: torch.dtype, transposed: bool) -> Tensor:
    """Scaled taps of all levels, (levels, columns, rows, 4, C), in the type of the arithmetic and of a quarter of their
    size; mirrored for the transpose."""
    size = taps[0].shape[3]
    scale = torch.stack([s.reshape(-1) for s in scales]).to(wide) * 0.25
    weights = torch.stack(list(taps)).to(wide) * scale[:, :, None, None, None]
    if transposed:
        weights = weights.flip(3, 4)
    return weights.reshape(len(taps), -1, 4, size, size).permute(0, 4, 3, 2, 1).contiguous()


def pyramid(x: Tensor, levels: int, channels_last: bool) -> list[Tensor]:
    """The images that the levels transform: ``x``, and the LL of each level but the last."""
    lows = [x]
    for _ in range(levels - 1):
        n, c, h, w = lows[-1].shape
        low = layout.empty(x, (n, c, -(-h // 2), -(-w // 2)), channels_last)
        low_launch(low, lows[-1]).run(x)
        lows.append(low)
    return lows


def cascade(out: Tensor, lows: Sequence[Tensor], add: Tensor | None, taps: Tensor) -> None:
    """Writes ``out`` from the coarsest level to the finest."""
    back: Tensor | None = None
    last = layout.is_channels_last(out)
    for level in reversed(range(len(lows))):
        image = layout.empty(lows[0], lows[level].shape, last) if level else out
        level_launch(image, lows[level], back, None if level else add, taps[level]).run(out)
        back = image


def forward(
    out: Tensor, x: Tensor, add: Tensor | None, taps: Sequence[Tensor], scales: Sequence[Tensor], transposed: bool
) -> None:
    """Writes ``out`` (N, C, H, W), as :func:`wavemix_kernels.ops.wtconv.wtconv` defines it, in its memory order."""
    if out.numel() == 0:
        return
    last = layout.is_channels_last(out)
    add = None if add is None else in_order(add, last)
    lows = pyramid(in_order(x, last), len(taps), last)
    cascade(out, lows, add, prepared(taps, scales, accumulate_dtype(x.dtype), transposed))
