"""CUDA kernels in forms that the covering sets of their contracts leave out; run by test_kernels.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.cuda.test_haar import FORMS, KERNELS, case
from tests.kernels.test_haar_outputs import check_outputs
from tests.ops import each
from tests.ops.contract import Case, check, on, pairwise
from tests.ops.test_patm import PhaseAggregate
from tests.ops.test_reduce_haar import ReduceHaar
from tests.ptx.triton_forms import Forward
from tests.tolerances import DTYPES
from wavemix_kernels.ops.common.precision import products_in


@on("cuda")
@pytest.mark.parametrize("one", pairwise(form=FORMS, kernel=KERNELS), ids=str)
def test_outputs_of_every_form(one: Case, backend: str, device: str) -> None:
    (memory, bands, shape, *_), (dtype, levels) = one.form, one.kernel
    made = case(shape, levels, memory, dtype, edge=1.0, bands=bands, add=False, lows=False, absent="")
    check_outputs(made, backend, device)


test_phase_statistics = each.case(
    PhaseAggregate(
        {"cuda": DTYPES}, shape=((2, 32, 5, 7),), layout=("channels_last", "channels_slice"), way=("statistics",)
    )
)

#: Tiles of outputs that a block takes, each number once.
WIDTHS: Any = {
    "size": tuple(((1, 12, 4, 8), outputs, 1) for outputs in (10, 30, 36, 48, 64)), "layout": ("channels_last", "nchw"),
    "last": (True,), "bias": (True,), "cotangents": ("channels_last",),
}  # fmt: skip
test_reduce_haar_widths = each.case(ReduceHaar({"cuda": DTYPES}, **WIDTHS))
IN_TF32 = Forward({"cuda": (torch.float32,)}, **WIDTHS)


@on("cuda")
@pytest.mark.parametrize("one", IN_TF32.cases("cuda"), ids=str)
def test_reduce_haar_widths_in_tf32(one: Case, backend: str, device: str) -> None:
    with products_in("tf32"):
        check(IN_TF32, one, backend, device)
