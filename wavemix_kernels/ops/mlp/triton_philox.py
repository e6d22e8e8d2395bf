"""Counter-based dropout masks inside Triton kernels: bit for bit as csrc/cpu/mlp/philox.h defines them."""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl


@triton.jit
def philox(counter, seed):
    """Philox4x32-10 (Salmon et al., SC 2011) of int64 counters: four words. Both halves of a product come from one
    64-bit multiplication, where ``tl.randint4x`` takes two."""
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0)
    for _ in tl.static_range(10):
        product0, product1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = product1.to(tl.uint32), product0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def unit_order(COLS: tl.constexpr):
    """0 ... COLS - 1 with the middle bits of each 32 turned: column 8b + 2q + c is 8q + 2b + c; of 16, where COLS is no
    multiple of 32, 4q + 2b + c.

    A thread holds the columns 2q, 2q + 1, 8 + 2q, 9 + 2q ... of a matrix instruction's result: eight neighbours in this
    order, which share a Philox call, or four. Masks are made where they are used, by nobody twice, and never change
    hands.
    """
    col = tl.arange(0, COLS)
    BLOCK: tl.constexpr = 32 if COLS % 32 == 0 else 16
    return col // BLOCK * BLOCK + col % 8 // 2 * (BLOCK // 4) + col % BLOCK // 8 * 2 + col % 2


@triton.jit
def _kept(word, edge, FIRST: tl.constexpr):
    """Bits FIRST and FIRST + 1: whether a word's halves are below `edge` / 2^16, the low one first."""
    return ((word << 16) < edge).to(tl.int32) << FIRST | (word < edge).to(tl.int32) << (FIRST + 1)


@triton.jit
def keep_mask(seed, row, first_col, cols, threshold, COLS: tl.constexpr, TURNED: tl.constexpr = True):
    """Mask of the elements that dropout keeps, for int64 matrix rows `row` and columns first_col + unit_order(COLS) or,
    if not TURNED, the COLS from first_col on.

    `first_col` is a multiple of 16, and of 32 where COLS is, `cols` the matrix's width, `threshold` below 2^16.
    """
    EACH: tl.constexpr = 4 if COLS % 32 != 0 and TURNED else 8  # columns of a call that are used together
    part = tl.arange(0, COLS // EACH)
    group = first_col // 8 + part // (8 // EACH)
    w0, w1, w2, w3 = philox(row[:, None] * ((cols + 7) // 8) + group[None, :], seed)
    # A high half is below the threshold where the whole word is below so many times 2^16.
    edge = threshold.to(tl.uint32) << 16
    # One tensor of bits, not eight: Triton then makes the words in the layout that asks for them.
    if EACH == 4:
        second = (part % 2 == 1)[None, :]
        bits = _kept(tl.where(second, w2, w0), edge, 0) | _kept(tl.where(second, w3, w1), edge, 2)
    else:
        bits = _kept(w0, edge, 0) | _kept(w1, edge, 2) | _kept(w2, edge, 4) | _kept(w3, edge, 6)
    if TURNED:
        tiles, two = tl.arange(0, EACH // 2), tl.arange(0, 2)
        bits = tl.reshape(bits, (row.shape[0], COLS // (4 * EACH), 4))[:, :, None, :, None]
        bits = bits >> (2 * tiles[None, None, :, None, None] + two[None, None, None, None, :])
    else:
        bits = bits[:, :, None] >> tl.arange(0, EACH)[None, None, :]
    return tl.reshape(bits & 1, (row.shape[0], COLS)) != 0
