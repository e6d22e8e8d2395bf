"""CUDA kernels in forms that the covering sets of their contracts leave out; run by test_kernels.py."""

from __future__ import annotations

import pytest

from tests.kernels.cuda.test_haar import FORMS, KERNELS, case
from tests.kernels.test_haar_outputs import check_outputs
from tests.ops import each
from tests.ops.contract import Case, on, pairwise
from tests.ops.test_patm import PhaseAggregate
from tests.tolerances import DTYPES


@on("cuda")
@pytest.mark.parametrize("one", pairwise(form=FORMS, kernel=KERNELS), ids=str)
def test_outputs_of_every_form(one: Case, backend: str, device: str) -> None:
    (memory, bands, shape, _), (dtype, levels) = one.form, one.kernel
    made = case(shape, levels, memory, dtype, edge=1.0, bands=bands, add=False, lows=False, absent="")
    check_outputs(made, backend, device)


test_contract_of_statistics = each.case(
    PhaseAggregate({"cuda": DTYPES}, shape=((2, 32, 5, 7),), layout=("channels_last", "nchw"), way=("statistics",))
)
