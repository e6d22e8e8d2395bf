"""The CPU's passes of batch normalisation below their ops: outputs that are slices, in place."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.subjects import threads
from tests.ops.contract import LAYOUTS, Case, image, pairwise, randn, untouched
from tests.tolerances import DTYPES, UNIT_ROUNDOFF, accumulation, assert_within, stored
from wavemix_kernels import _native
from wavemix_kernels.ops.norm import batch_norm

if (reason := _native.cpu_reason()) is not None:
    pytest.skip(f"CPU kernels: {reason}", allow_module_level=True)
functions: Any = batch_norm.BACKENDS["cpu"].functions
NAN = float("nan")
CASES = pairwise(
    dtype=DTYPES, shape=((2, 3, 5, 7), (3, 20, 17, 19), (6, 8, 1, 1), (2, 5, 1, 9)), out=tuple(LAYOUTS),
    first=tuple(LAYOUTS), second=tuple(LAYOUTS),
)  # fmt: skip


def operands(case: Case) -> tuple[Tensor, ...]:
    layouts = enumerate((case.first, case.second))
    x, z = (image(randn(*case.shape, seed=i), case.dtype, layout=layout) for i, layout in layouts)
    return x, z, *(randn(case.shape[1], seed=i).to(accumulation(case.dtype)) for i in (2, 3, 4))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_of_any_layout(case: Case) -> None:
    """Nothing around a sliced output is written."""
    x, z, a, b, d = operands(case)
    wide = [t.double() for t in (x, z)] + [t.double()[:, None, None] for t in (a, b, d)]
    product, offset = wide[0] * wide[2], wide[4].expand(case.shape)
    for name, inputs, terms in (
        ("apply", (x, a, d, None), [product, offset]),
        ("apply", (x, a, d, z), [product, offset, wide[1]]),
        ("backward", (x, z, a, b, d), [product, wide[1] * wide[3], offset]),
    ):
        out = image(torch.full(case.shape, NAN), case.dtype, layout=case.out)
        functions[name](*inputs, out)
        exact, size = sum(terms), sum(t.abs() for t in terms)
        off = 4 * UNIT_ROUNDOFF[accumulation(case.dtype)] * size
        assert_within(out, exact, off + stored(exact.abs() + off, case.dtype), name)
        assert untouched(out), f"{name} wrote outside of out"


@pytest.mark.parametrize("case", pairwise(dtype=DTYPES, first=tuple(LAYOUTS), second=tuple(LAYOUTS)), ids=str)
def test_in_place(case: Case) -> None:
    case.shape = (3, 20, 17, 19)
    y, r, a, b, d = operands(case)
    fresh = torch.empty_like(y)
    for name, arguments in (("apply", lambda y, r: (y, a, d, r)), ("backward", lambda y, r: (r, y, a, b, d))):
        functions[name](*arguments(y, r), fresh)
        for target in (0, 1):
            pair = [image(t, case.dtype, layout=lay) for t, lay in ((y, case.first), (r, case.second))]
            functions[name](*arguments(*pair), pair[target])
            assert torch.equal(pair[target], fresh), (name, target)


def test_sums_repeat_with_threads() -> None:
    for layout, other in itertools.product(("nchw", "channels_last"), repeat=2):
        y, g = (image(randn(4, 12, 50, 40, seed=i), torch.float32, layout=lay) for i, lay in enumerate((layout, other)))
        with threads(2):
            mean, _, invstd, *_ = functions["stats"](y, None, None, 1e-5)
            runs = [
                (
                    *functions["stats"](y, None, None, 1e-5),
                    *functions["line"](g, y, mean, invstd, None, True, True),
                )
                for _ in range(4)
            ]
        assert all(torch.equal(p, q) for again in runs[1:] for p, q in zip(again, runs[0], strict=True))
