"""The last step of gradients that kernels sum in parts, in Triton: one launch adds up, rounds and stores several.

Each would be two operators of PyTorch's, a sum and a cast. Parts are added in a fixed order: the same in every run.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels.ops.common.triton_launch import Launch, pow2_at_least

MOST = 4  # sums of a launch
_TILE = 8192  # values that a program of eight warps has on their way at once
_FEW, _FEW_TILE = 1 << 20, 2048  # of sums up to that many values: programs for all multiprocessors
_PARTS = 512  # of them at most, in columns of 8 or more: a sector


@triton.jit
def _sum(program, out, partial, parts, size, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    column = program.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.arange(0, PARTS)
    total = tl.zeros((PARTS, COLUMNS), partial.dtype.element_ty)
    for start in range(0, parts, PARTS):
        here = start + part
        at = partial + here.to(tl.int64)[:, None] * size + column[None, :]
        total += tl.load(at, mask=(here < parts)[:, None] & (column < size)[None, :], other=0.0)
    tl.store(out + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < size)


@triton.jit
def _sums_kernel(
    out0, partial0, parts0, size0, out1, partial1, parts1, size1, out2, partial2, parts2, size2,
    out3, partial3, parts3, size3, end0, end1, end2,
    PARTS0: tl.constexpr, COLUMNS0: tl.constexpr, PARTS1: tl.constexpr, COLUMNS1: tl.constexpr,
    PARTS2: tl.constexpr, COLUMNS2: tl.constexpr, PARTS3: tl.constexpr, COLUMNS3: tl.constexpr,
):  # fmt: skip
    """Programs up to `end0` make the first sum, those up to `end1` the second, and so on. PARTS of 0: no such sum."""
    program = tl.program_id(0)
    if program < end0:
        _sum(program, out0, partial0, parts0, size0, PARTS0, COLUMNS0)
    elif program < end1:
        if PARTS1:
            _sum(program - end0, out1, partial1, parts1, size1, PARTS1, COLUMNS1)
    elif program < end2:
        if PARTS2:
            _sum(program - end1, out2, partial2, parts2, size2, PARTS2, COLUMNS2)
    else:
        if PARTS3:
            _sum(program - end2, out3, partial3, parts3, size3, PARTS3, COLUMNS3)


def finish_launch(*sums: tuple[Tensor, Tensor]) -> Launch:
    """See :func:`finish`; of one to :data:`MOST` sums that have elements."""
    args: list[Any] = []
    constants: dict[str, Any] = {}
    ends: list[int] = []
    tile = _FEW_TILE if sum(partial.numel() for _, partial in sums) <= _FEW else _TILE
    for i in range(MOST):
        out, partial = sums[min(i, len(sums) - 1)]
        parts, size = partial.shape[0], out.numel()
        rows = min(pow2_at_least(parts), _PARTS)
        columns = min(max(tile // rows, 8), max(pow2_at_least(size), 8))
        there = i < len(sums)
        args += [out, partial, parts, size]
        constants |= {f"PARTS{i}": rows if there else 0, f"COLUMNS{i}": columns if there else 0}
        ends.append((ends[-1] if ends else 0) + (triton.cdiv(size, columns) if there else 0))
    constants |= {"num_warps": 8, "enable_fp_fusion": True}
    return Launch(_sums_kernel, (ends[-1],), (*args, *ends[:-1]), constants)


def finish(*sums: tuple[Tensor, Tensor]) -> None:
    """Writes sums over the first axis, each rounded once to its own dtype.

    Args:
        sums: up to :data:`MOST` pairs: what is written, contiguous, of any dtype; the parts, contiguous,
            (parts, *its shape) in fp32 or fp64. A pair of no elements is nothing to do.
    """
    given = [pair for pair in sums if pair[0].numel()]
    if given:
        finish_launch(*given).run(given[0][0])
