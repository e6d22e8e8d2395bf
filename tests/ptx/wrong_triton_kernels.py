"""Triton kernels that are wrong on purpose, each beside its right form; run by test_executor.py in its own session."""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
import pytest
import torch
import triton
import triton.language as tl

from tests.ptx.launch import executed_triton
from wavemix_kernels.ops.common.triton_launch import Launch

COUNT, TILE = 1000, 256


@triton.jit
def out_of_bounds(out, x, count, WRONG: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    value = tl.load(x + at, mask=(at < count) | WRONG, other=0.0)
    tl.store(out + at, value, mask=at < count)


@triton.jit
def unwritten(out, x, count, WRONG: tl.constexpr, TILE: tl.constexpr):
    """Adds to what the output holds."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    value = tl.load(x + at, mask=at < count, other=0.0)
    if WRONG:
        value += tl.load(out + at, mask=at < count, other=0.0)
    tl.store(out + at, value, mask=at < count)


@triton.jit
def both_write(out, x, count, WRONG: tl.constexpr, TILE: tl.constexpr):
    """Each block also writes the first element of the next."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(out + at, tl.load(x + at, mask=at < count, other=0.0), mask=at < count)
    if WRONG:
        after = tl.program_id(0) * TILE + TILE
        tl.store(out + after, tl.load(x + after, mask=after < count, other=0.0), mask=after < count)


@triton.jit
def one_reads(out, x, count, WRONG: tl.constexpr, TILE: tl.constexpr):
    """Copies, then reads the first element of the next block's copy."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    value = tl.load(x + at, mask=at < count, other=0.0)
    tl.store(out + at, value, mask=at < count)
    if WRONG:
        before = tl.program_id(0) * TILE - 1
        last = tl.load(out + before, mask=before >= 0, other=0.0)
        tl.store(out + at, value + 0 * last, mask=at < count)


@triton.jit
def misaligned(out, x, count, WRONG: tl.constexpr, TILE: tl.constexpr):
    """Swears that an odd offset is a multiple of four."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    if WRONG:
        at = tl.multiple_of(at + count % 2 + 1, [4])
    value = tl.load(x + at, mask=at < count // TILE * TILE, other=0.0)
    rest = tl.load(x + at, mask=(at >= count // TILE * TILE) & (at < count), other=0.0)
    tl.store(out + at, value + rest, mask=at < count)


CAUGHT = {
    out_of_bounds: r"out of bounds, to byte 40\d\d of range 2 of 4000 bytes",
    unwritten: "reads global memory that nobody wrote",
    both_write: "writes what another block of the same launch writes",
    one_reads: r"reads what block \d of the same launch writes|writes what another block of the same launch reads",
    misaligned: "misaligned access of (8|16) bytes",
}


@pytest.mark.parametrize("kernel", CAUGHT, ids=lambda kernel: kernel.__name__)
def test_wrong_kernel_is_caught(kernel) -> None:
    def copied(wrong: bool) -> torch.Tensor:
        x, out = torch.arange(1.0, COUNT + 1), torch.empty(COUNT)
        grid = (triton.cdiv(COUNT, TILE),)
        Launch(kernel, grid, (out, x, COUNT), {"WRONG": wrong, "TILE": TILE, "num_warps": 4}).run(x)
        return out

    with executed_triton(lambda counts: None):
        assert torch.equal(copied(False), torch.arange(1.0, COUNT + 1))
        with pytest.raises(AssertionError, match=CAUGHT[kernel]):
            copied(True)
