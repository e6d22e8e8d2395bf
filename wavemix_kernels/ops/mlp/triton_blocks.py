"""Tiles of a pointwise MLP's matrices in registers, and what its kernels make of the hidden layer.

The columns of x, of `second` and of the result lie in two tiles each, of X0 and X1, S0 and S1, O0 and O1 columns
(launch.cover); a width of 0: no tile, for which another stands in where Triton wants a value.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
import triton
import triton.language as tl

from wavemix_kernels.ops.common.triton_gelu import gelu
from wavemix_kernels.ops.mlp.triton_philox import keep_mask, unit_order


@triton.jit
def _tile(matrix, stride, row, in_rows, col, in_cols):
    """A tile of a row-major matrix, zero outside."""
    at = matrix + row[:, None] * stride + col[None, :]
    return tl.load(at, mask=in_rows[:, None] & in_cols[None, :], other=0.0)


@triton.jit
def _second_tile(second, stride, scale, shift, row, in_rows, col, in_cols, AFFINE: tl.constexpr):
    """The same as _tile; the affine map is applied in fp32 and rounded once, as a tensor core wants its operand."""
    tile = _tile(second, stride, row, in_rows, col, in_cols)
    if AFFINE:
        factor = tl.load(scale + col, mask=in_cols, other=0.0)
        offset = tl.load(shift + col, mask=in_cols, other=0.0)
        tile = (tile.to(tl.float32) * factor[None, :] + offset[None, :]).to(second.dtype.element_ty)
    return tile


@triton.jit
def _columns(FIRST: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """WIDTH columns from FIRST on, and which of them are among COUNT; a mask known to be true costs nothing."""
    col = FIRST + tl.arange(0, WIDTH)
    return col, (tl.full((WIDTH,), 1, tl.int1) if FIRST + WIDTH <= COUNT else col < COUNT)


@triton.jit
def _units(first, HIDDEN: tl.constexpr, K: tl.constexpr):
    """A chunk's hidden units in the order of their dropout, and which of them are among K."""
    unit = tl.multiple_of(tl.max_contiguous(first + unit_order(HIDDEN), 2), 2)  # pairs, which Triton does not see
    return unit, (tl.full((HIDDEN,), 1, tl.int1) if K % HIDDEN == 0 else unit < K)


@triton.jit
def _two_tiles(matrix, stride, row, in_rows, COUNT: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr):
    """Rows of a matrix of COUNT columns."""
    col, in_cols = _columns(0, W0, COUNT)
    first = _tile(matrix, stride, row, in_rows, col, in_cols)
    rest = first
    if W1:
        col, in_cols = _columns(W0, W1, COUNT)
        rest = _tile(matrix, stride, row, in_rows, col, in_cols)
    return first, rest


@triton.jit
def _input_tiles(
    x, x_stride, second, second_stride, scale, shift, row, in_rows,
    A: tl.constexpr, B: tl.constexpr, AFFINE: tl.constexpr,
    X0: tl.constexpr, X1: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr,
):  # fmt: skip
    """Rows of x and of second * scale + shift."""
    x0, x1 = _two_tiles(x, x_stride, row, in_rows, A, X0, X1)
    s0, s1 = x0, x0
    if S0:
        col, in_cols = _columns(0, S0, B)
        s0 = _second_tile(second, second_stride, scale, shift, row, in_rows, col, in_cols, AFFINE)
    if S1:
        col, in_cols = _columns(S0, S1, B)
        s1 = _second_tile(second, second_stride, scale, shift, row, in_rows, col, in_cols, AFFINE)
    return x0, x1, s0, s1


@triton.jit
def _w1_tiles(
    w1, unit, in_units, A: tl.constexpr, B: tl.constexpr,
    X0: tl.constexpr, X1: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr,
):  # fmt: skip
    """Hidden units' weights of x and of second."""
    x0, x1 = _two_tiles(w1, A + B, unit, in_units, A, X0, X1)
    s0, s1 = x0, x0
    if S0:
        s0, s1 = _two_tiles(w1 + A, A + B, unit, in_units, B, S0, S1)
    return x0, x1, s0, s1


@triton.jit
def _w2_tiles(w2, unit, in_units, K: tl.constexpr, OUT: tl.constexpr, O0: tl.constexpr, O1: tl.constexpr):
    """Results' weights of hidden units, (columns, units)."""
    col, in_cols = _columns(0, O0, OUT)
    first = _tile(w2, K, col, in_cols, unit, in_units)
    rest = first
    if O1:
        col, in_cols = _columns(O0, O1, OUT)
        rest = _tile(w2, K, col, in_cols, unit, in_units)
    return first, rest


@triton.jit
def _with_bias(z, b1, unit, in_units, UNITS_FIRST: tl.constexpr, BIAS1: tl.constexpr):
    if BIAS1:
        bias = tl.load(b1 + unit, mask=in_units, other=0.0).to(tl.float32)
        z += bias[:, None] if UNITS_FIRST else bias[None, :]
    return z


@triton.jit
def _z_of_tiles(
    x0, x1, s0, s1, w0, w1, v0, v1, X1: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, PRECISION: tl.constexpr
):
    """[x0 | x1 | s0 | s1] @ [w0 | w1 | v0 | v1].T in fp32."""
    z = tl.dot(x0, tl.trans(w0), input_precision=PRECISION)
    if X1:
        z = tl.dot(x1, tl.trans(w1), z, input_precision=PRECISION)
    if S0:
        z = tl.dot(s0, tl.trans(v0), z, input_precision=PRECISION)
    if S1:
        z = tl.dot(s1, tl.trans(v1), z, input_precision=PRECISION)
    return z


@triton.jit
def _z_of_loops(
    x, x_stride, second, second_stride, scale, shift, w1, row, in_rows, unit, in_units,
    A: tl.constexpr, B: tl.constexpr, AFFINE: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[x | second * scale + shift] @ w1.T in fp32, CHANNELS columns at a time."""
    z = tl.zeros((row.shape[0], unit.shape[0]), tl.float32)
    for c in range(0, A, CHANNELS):
        col = c + tl.arange(0, CHANNELS)
        weight = _tile(w1, A + B, unit, in_units, col, col < A)
        z = tl.dot(_tile(x, x_stride, row, in_rows, col, col < A), tl.trans(weight), z, input_precision=PRECISION)
    if B:
        for c in range(0, B, CHANNELS):
            col = c + tl.arange(0, CHANNELS)
            tile = _second_tile(second, second_stride, scale, shift, row, in_rows, col, col < B, AFFINE)
            weight = _tile(w1 + A, A + B, unit, in_units, col, col < B)
            z = tl.dot(tile, tl.trans(weight), z, input_precision=PRECISION)
    return z


@triton.jit
def _hidden_gradient(
    g,
    g_stride,
    w2,
    row,
    in_rows,
    unit,
    in_units,
    K: tl.constexpr,
    OUT: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad @ w2 for some rows and hidden units, in fp32."""
    out = tl.zeros((row.shape[0], unit.shape[0]), tl.float32)
    for c in range(0, OUT, CHANNELS):
        col = c + tl.arange(0, CHANNELS)
        weight = _tile(w2, K, col, col < OUT, unit, in_units)
        out = tl.dot(_tile(g, g_stride, row, in_rows, col, col < OUT), weight, out, input_precision=PRECISION)
    return out


@triton.jit
def _key(seed, DROPOUT: tl.constexpr):
    """The seed that dropout counts from, loaded before a loop: behind its stores it would be loaded anew each time."""
    return tl.load(seed) if DROPOUT else 0


@triton.jit
def _activation(z, key, row, first, threshold, K: tl.constexpr, DROPOUT: tl.constexpr):
    """GELU(z) of pixels by units, and 0 where dropout drops them, NaN included. Who adds them up multiplies what is
    kept by dropout's factor."""
    hidden, _ = gelu(z)
    if DROPOUT:
        keep = keep_mask(key, row, first, K, threshold, z.shape[1])
        hidden = tl.where(keep, hidden, 0.0)
    return hidden


@triton.jit
def _activation_and_gradient(
    z, grad, key, row, first, threshold, K: tl.constexpr, UNITS_FIRST: tl.constexpr, DROPOUT: tl.constexpr
):
    """_activation(z) and z's gradient, given that of the former; one mask and one exponential for both."""
    if DROPOUT:  # the mask first, for the registers
        if UNITS_FIRST:
            keep = tl.trans(keep_mask(key, row, first, K, threshold, z.shape[0]))
        else:
            keep = keep_mask(key, row, first, K, threshold, z.shape[1])
    hidden, slope = gelu(z)
    grad *= slope
    if DROPOUT:
        hidden = tl.where(keep, hidden, 0.0)
        grad = tl.where(keep, grad, 0.0)
    return hidden, grad


@triton.jit
def _in_order(tile):
    """Columns of unit_order as 0, 1, 2 ..."""
    TILES: tl.constexpr = 4 if tile.shape[1] % 32 == 0 else 2
    by_thread = tl.reshape(tile, (tile.shape[0], tile.shape[1] // (8 * TILES), TILES, 4, 2))
    return tl.reshape(tl.permute(by_thread, (0, 1, 3, 2, 4)), (tile.shape[0], tile.shape[1]))


@triton.jit
def _store(matrix, stride, row, in_rows, value, FIRST: tl.constexpr, COUNT: tl.constexpr):
    col, in_cols = _columns(FIRST, value.shape[1], COUNT)
    at = matrix + row[:, None] * stride + col[None, :]
    tl.store(at, value.to(matrix.dtype.element_ty), mask=in_rows[:, None] & in_cols[None, :])


@triton.jit
def _store_sum(partial, tile, FIRST: tl.constexpr, COUNT: tl.constexpr):
    col, in_cols = _columns(FIRST, tile.shape[1], COUNT)
    tl.store(partial + col, tl.sum(tile.to(tl.float32), 0), mask=in_cols)


@triton.jit
def _plus_bias(value, bias, FIRST: tl.constexpr, COUNT: tl.constexpr, BIAS: tl.constexpr):
    if BIAS:
        col, in_cols = _columns(FIRST, value.shape[1], COUNT)
        value += tl.load(bias + col, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    return value
