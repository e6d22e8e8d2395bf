"""Several sums of partial results in one launch."""

from __future__ import annotations

import pytest
import torch

from tests.ops.contract import randn
from tests.tolerances import UNIT_ROUNDOFF, assert_within, stored
from wavemix_kernels.ops.common import triton_sums as kernels

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
#: Parts and shapes of what is written: one part, one column, more parts than a tile has, more columns, nothing.
SUMS = [
    [((1, 7), torch.float32)],
    [((700, 1), torch.float16), ((3, 40, 300), torch.bfloat16)],
    [((0, 5), torch.float32), ((11, 8, 24), torch.float16), ((1030, 17), torch.float32)],
    [((9, 3), torch.float32), ((64, 0), torch.float32), ((2, 9000), torch.float32), ((33, 16), torch.bfloat16)],
]


@pytest.mark.parametrize("sums", SUMS, ids=["one", "two", "three", "four"])
def test_sums(device: str, sums: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
    parts = [randn(*shape, seed=i).float().to(device) for i, (shape, _) in enumerate(sums)]
    outs = [torch.full(shape[1:], float("nan"), dtype=dtype, device=device) for shape, dtype in sums]
    kernels.finish(*zip(outs, parts, strict=True))
    for out, part in zip(outs, parts, strict=True):
        exact, size = part.double().sum(0), part.double().abs().sum(0)
        off = part.shape[0] * UNIT_ROUNDOFF[torch.float32] * size
        assert_within(out, exact, off + stored(exact.abs() + off, out.dtype, "triton"), "sum")


def test_repeats(device: str) -> None:
    part = randn(600, 50).float().to(device)
    first, second = torch.empty(50, device=device), torch.empty(50, device=device)
    kernels.finish((first, part), (second, part))
    assert torch.equal(first, second)
