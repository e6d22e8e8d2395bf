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
    """0 ... COLS - 1 with the middle bits of each 16 turned: column 8b + 2q + c is 4q + 2b + c.

    A thread holds the columns 2q, 2q + 1, 8 + 2q and 9 + 2q of a matrix instruction's result: four neighbours in this
    order, which share a Philox call. Masks are made where they are used, by nobody twice, and never change hands.
    """
    col = tl.arange(0, COLS)
    return col // 16 * 16 + col % 8 // 2 * 4 + col % 16 // 8 * 2 + col % 2


@triton.jit
def keep_mask(seed, row, first_col, cols, threshold, COLS: tl.constexpr, TURNED: tl.constexpr = True):
    """Mask of the elements that dropout keeps, for int64 matrix rows `row` and columns first_col + unit_order(COLS) or,
    if not TURNED, the COLS from first_col on.

    `first_col` is a multiple of 16, `cols` the matrix's width.
    """
    group = first_col // 4 + tl.arange(0, COLS // 4)
    w0, w1, w2, w3 = philox(row[:, None] * ((cols + 3) // 4) + group[None, :], seed)
    limit = threshold.to(tl.uint32)
    # One tensor of bits, not four: Triton then makes the words in the layout that asks for them.
    low = (w0 < limit).to(tl.int32) | (w1 < limit).to(tl.int32) << 1
    bits = low | (w2 < limit).to(tl.int32) << 2 | (w3 < limit).to(tl.int32) << 3
    if TURNED:
        two = tl.arange(0, 2)
        bits = tl.reshape(bits, (row.shape[0], COLS // 16, 4))[:, :, None, :, None]
        bits = bits >> (2 * two[None, None, :, None, None] + two[None, None, None, None, :])
    else:
        bits = bits[:, :, None] >> tl.arange(0, 4)[None, None, :]
    return tl.reshape(bits & 1, (row.shape[0], COLS)) != 0
