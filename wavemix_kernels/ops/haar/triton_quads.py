"""Shared by Haar analysis and synthesis in Triton: a tile's place, its quads in registers, its samples in memory.

One program owns a tile of rows x cols samples in some (n, c) planes. Level 1, three quarters of the traffic, is
thread-local: samples of a quad come from separate loads that share one register layout (row-major synthesis alone
regroups its rows before storing them). LL stays in registers; the coarser levels, a quarter of the samples at most,
change hands through shared memory.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
import triton
import triton.language as tl

# ------------------------------------------------------------------------------------------------ addresses
#
# LAYOUT says which dimension has stride 1: "rows" (w), "channels" (c; the bands then have c stride 3 and band
# stride 1), "strided" (nothing known). Tiles put it last: [plane, row, col] or, "channels", [row, col, plane].
# ALIGN, a power of two, divides every other stride and that dimension's size; in "rows" it is the image's, and
# level l has ALIGN >> l. Sizes and strides arrive divided by it: multiplying by the constant inside the kernel
# is what proves vectors aligned to the compiler, without specialising on any value, so that one binary serves
# all shapes of one alignment. VECTOR is the length of a 16-byte (or shorter, aligned) vector. Tiles stay
# three-dimensional with vectors inside the last axis: that alone fixes how lanes lie along memory.


@triton.jit
def _units(ALIGN: tl.constexpr, LEVEL: tl.constexpr, LAYOUT: tl.constexpr):
    """Divisor of level LEVEL's strides."""
    if LAYOUT != "rows":
        return ALIGN
    else:
        return (ALIGN >> LEVEL) if (ALIGN >> LEVEL) > 0 else 1


@triton.jit
def _size_at(size, ALIGN: tl.constexpr, LEVEL: tl.constexpr):
    """ceil(size * ALIGN / 2**LEVEL), visibly a multiple of ALIGN >> LEVEL."""
    if (ALIGN >> LEVEL) > 0:
        return size * (ALIGN >> LEVEL)
    else:
        return (size * ALIGN + ((1 << LEVEL) - 1)) >> LEVEL


@triton.jit
def _tile_origin(
    planes, height, width, ROWS: tl.constexpr, COLS: tl.constexpr, PLANES: tl.constexpr, LAYOUT: tl.constexpr
):
    """First row, column and plane of this program; neighbours in memory run at the same time."""
    tile = tl.program_id(0).to(tl.int64)
    tiles_w = tl.cdiv(width, COLS)
    if LAYOUT == "channels":
        tiles_p = tl.cdiv(planes, PLANES)
        plane = tile % tiles_p
        col = tile // tiles_p % tiles_w
        row = tile // tiles_p // tiles_w
    else:
        tiles_h = tl.cdiv(height, ROWS)
        col = tile % tiles_w
        row = tile // tiles_w % tiles_h
        plane = tile // tiles_w // tiles_h
    return row * ROWS, col * COLS, plane * PLANES


@triton.jit
def _split_planes(first, planes, channels, COUNT: tl.constexpr, GROUP: tl.constexpr):
    """Batch index, channel and validity of planes first, first + 1, ..., or rather of the first in each GROUP.

    A tile may straddle images; a group cannot.
    """
    batch = first // channels
    lane = tl.arange(0, COUNT) // GROUP * GROUP
    channel = (first - batch * channels).to(tl.int32) + lane
    count = channels.to(tl.int32)
    return batch + channel // count, channel % count, first + lane < planes


@triton.jit
def _on_axes(row, col, plane, LAYOUT: tl.constexpr):
    """Three vectors, each along its axis of a tile."""
    if LAYOUT == "channels":
        return row[:, None, None], col[None, :, None], plane[None, None, :]
    else:
        return row[None, :, None], col[None, None, :], plane[:, None, None]


@triton.jit
def _samples(
    base, plane, row, col, height, width, strides,
    UNITS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Pointers and mask of a tile; in "channels" `channel` is the offset along c."""
    batch, channel, valid = plane
    s_n, s_c, s_h, s_w = strides
    start = batch * s_n * UNITS + (channel if LAYOUT == "channels" else channel * s_c * UNITS)
    along = col if LAYOUT == "rows" else col * s_w * UNITS
    down, along, start = _on_axes(row * s_h * UNITS, along, start, LAYOUT)
    in_rows, in_cols, in_planes = _on_axes(row < height, col < width, valid, LAYOUT)
    return base + (start + down + along), in_planes & in_rows & in_cols


@triton.jit
def _wide(strides):
    """Strides that came in a tuple, where no annotation makes them int64."""
    one = tl.full((), 1, tl.int64)
    return strides[0] * one, strides[1] * one, strides[2] * one, strides[3] * one


# -------------------------------------------------------------------------------------- values in registers


@triton.jit
def _butterfly(a, b, c, d):
    """Orthonormal and symmetric: (a, b, c, d) -> (LL, LH, HL, HH), and back."""
    p = a + b
    q = a - b
    r = c + d
    s = c - d
    return (p + r) * 0.5, (p - r) * 0.5, (q + s) * 0.5, (q - s) * 0.5


@triton.jit
def _split_quads(x, LAYOUT: tl.constexpr):
    """A tile of samples -> a, b, c, d, tiles of half the rows and columns."""
    if LAYOUT == "channels":
        quads = tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1] // 2, 2, x.shape[2]))
        quads = tl.permute(quads, (0, 2, 4, 3, 1))
    else:
        quads = tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2))
        quads = tl.permute(quads, (0, 1, 3, 4, 2))
    upper, lower = tl.split(quads)
    a, b = tl.split(upper)
    c, d = tl.split(lower)
    return a, b, c, d


@triton.jit
def _join_quads(a, b, c, d, LAYOUT: tl.constexpr):
    """Inverse of _split_quads."""
    quads = tl.join(tl.join(a, b), tl.join(c, d))
    if LAYOUT == "channels":
        shape: tl.constexpr = (2 * a.shape[0], 2 * a.shape[1], a.shape[2])
        return tl.reshape(tl.permute(quads, (0, 4, 1, 3, 2)), shape)
    else:
        shape: tl.constexpr = (a.shape[0], 2 * a.shape[1], 2 * a.shape[2])
        return tl.reshape(tl.permute(quads, (0, 1, 4, 2, 3)), shape)


@triton.jit
def _in_vectors(x, VECTOR: tl.constexpr):
    return tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // VECTOR, VECTOR))


@triton.jit
def _flat(x):
    return tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] * x.shape[3]))


@triton.jit
def _concatenate(x, y):
    """[..., g, m] twice -> [..., g, 2m], vector by vector."""
    pairs = tl.permute(tl.join(x, y), (0, 1, 2, 4, 3))
    return tl.reshape(pairs, (x.shape[0], x.shape[1], x.shape[2], 2 * x.shape[3]))


@triton.jit
def _halves(x):
    """Inverse of _concatenate."""
    pairs = tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2], 2, x.shape[3] // 2))
    return tl.split(tl.permute(pairs, (0, 1, 2, 4, 3)))


@triton.jit
def _merge(x, y):
    """[..., g, m] twice -> [..., 2g, m], their vectors in turn."""
    pairs = tl.permute(tl.join(x, y), (0, 1, 2, 4, 3))
    return tl.reshape(pairs, (x.shape[0], x.shape[1], 2 * x.shape[2], x.shape[3]))


@triton.jit
def _deal(x):
    """Inverse of _merge: the even and the odd vectors."""
    pairs = tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 2, 2, x.shape[3]))
    return tl.split(tl.permute(pairs, (0, 1, 2, 4, 3)))


@triton.jit
def _dealt(first, second, RUN: tl.constexpr):
    """Even and odd samples of pairs of vectors of RUN samples next to each other."""
    if RUN == 1:
        return first, second
    else:
        even0, odd0 = _deal(_in_vectors(first, 1))
        even1, odd1 = _deal(_in_vectors(second, 1))
        even = _concatenate(_in_vectors(_flat(even0), RUN // 2), _in_vectors(_flat(even1), RUN // 2))
        odd = _concatenate(_in_vectors(_flat(odd0), RUN // 2), _in_vectors(_flat(odd1), RUN // 2))
        return _flat(even), _flat(odd)


# -------------------------------------------------------------------------------------------- tiles in memory


@triton.jit
def _load_pairs(
    image, plane, row, x0, height, width, strides,
    COLS: tl.constexpr, VECTOR: tl.constexpr, ALIGN: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Even and odd columns of image rows `row`, from column x0 on, zero outside.

    In "rows" a thread takes two vectors next to each other and deals them out, so that the vectors of
    coefficients it owns are whole; the second load finds its half sectors in L1.
    """
    if LAYOUT == "rows":
        run: tl.constexpr = VECTOR
        step = VECTOR
    else:
        run: tl.constexpr = 1
        step = strides[3] * ALIGN
    col = x0 + tl.arange(0, COLS // 2) // run * (2 * run) + tl.arange(0, COLS // 2) % run
    at, mask = _samples(image, plane, row, col, height, width, strides, ALIGN, LAYOUT)
    first = tl.load(at, mask=mask, other=0.0)
    _, mask = _samples(image, plane, row, col + run, height, width, strides, ALIGN, LAYOUT)
    return _dealt(first, tl.load(at + step, mask=mask, other=0.0), run)


@triton.jit
def _load_quads(
    image, plane, row, x0, height, width, strides,
    COLS: tl.constexpr, VECTOR: tl.constexpr, ALIGN: tl.constexpr, LAYOUT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Quads a, b, c, d of the image from column x0 on, zero outside; `row` counts quads."""
    a, b = _load_pairs(image, plane, 2 * row, x0, height, width, strides, COLS, VECTOR, ALIGN, LAYOUT)
    c, d = _load_pairs(image, plane, 2 * row + 1, x0, height, width, strides, COLS, VECTOR, ALIGN, LAYOUT)
    return a.to(REAL), b.to(REAL), c.to(REAL), d.to(REAL)


@triton.jit
def _band_vectors(
    high, plane, row, col, height, width, strides,
    GROUP: tl.constexpr, UNITS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Pointers and mask of the first of three vectors, and the step to the next; `plane` is by groups.

    GROUP > 1, only in "channels", means the vectors of _interleave; otherwise the three are LH, HL and HH.
    """
    batch, channel, valid = plane
    s_n, s_c, s_b, s_h, s_w = strides
    if LAYOUT == "channels":
        channel = channel * 3 + tl.arange(0, channel.shape[0]) % GROUP
        step = GROUP
    else:
        step = s_b * UNITS
    plane = (batch, channel, valid)
    at, mask = _samples(high, plane, row, col, height, width, (s_n, s_c, s_h, s_w), UNITS, LAYOUT)
    return at, mask, step
