"""Counter-based dropout masks inside Triton kernels: bit for bit as csrc/cpu/mlp/philox.h defines them."""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl


@triton.jit
def keep_mask(seed, row, first_col, cols, threshold, COLS: tl.constexpr):
    """Mask of the elements that dropout keeps, of columns first_col … first_col + COLS, for int64 matrix rows `row`.

    `first_col` is a multiple of 4, `cols` the matrix's width. The four words of a Philox call belong to four
    neighbouring columns; they are compared before they are interleaved, so that bytes change hands, not words.
    """
    group = first_col // 4 + tl.arange(0, COLS // 4)
    counter = row[:, None] * ((cols + 3) // 4) + group[None, :]
    w0, w1, w2, w3 = tl.randint4x(seed, counter)
    limit = threshold.to(tl.uint32)
    even = tl.join((w0 < limit).to(tl.int8), (w2 < limit).to(tl.int8))
    odd = tl.join((w1 < limit).to(tl.int8), (w3 < limit).to(tl.int8))
    return tl.reshape(tl.join(even, odd), (row.shape[0], COLS)) != 0
