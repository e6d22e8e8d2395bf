"""Triton kernels in forms that the contracts leave out: products in TF32, which the interpreter does not know,
statistics of many parts, and sums of several sizes in one launch; run by test_kernels.py."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from tests.conftest import from_ptx
from tests.kernels.triton import test_deconv, test_sums
from tests.ops.contract import Case, Contract, check, singles
from tests.ops.test_reduce_haar import Gradients, ReduceHaar
from tests.ptx.launch import executed_triton
from tests.ptx.static import Executed
from wavemix_kernels.ops.common.precision import products_in

ONE: Any = {"size": (((2, 32, 8, 16), 16, 2), ((1, 20, 6, 10), 5, 1)), "layout": ("channels_last", "nchw")}


class Forward(ReduceHaar):
    """A product cuts the low bits of both factors, 2^-10 of each at most: 2^15 roundoffs of fp32."""

    axes: ClassVar[Any] = {**ReduceHaar.axes, **ONE}

    def terms(self, case: Case, name: str, backend: str) -> float:
        return super().terms(case, name, backend) + 2**15


class Backward(Gradients):
    axes: ClassVar[Any] = {**Gradients.axes, **ONE}

    def terms(self, case: Case, name: str, backend: str) -> float:
        return super().terms(case, name, backend) + 2**15


CASES = [(of, case) for of in (Forward(), Backward()) for case in singles(dtype=(torch.float32,), **of.axes)]


@pytest.mark.parametrize("contract, case", CASES, ids=str)
def test_reduce_haar_products_in_tf32(contract: Contract, case: Case) -> None:
    met: list[Executed] = []
    with executed_triton(met.append), products_in("tf32"):
        check(contract, case, "triton", "cpu")
    assert any("tensor" in one.counts.instructions for one in met)


def test_deconv_statistics_of_many_parts(request: pytest.FixtureRequest, device: str) -> None:
    with from_ptx(request, "triton"):
        test_deconv.test_statistics_of_many_parts(device)


@pytest.mark.parametrize("sums", test_sums.SUMS, ids=["one", "two", "three", "four"])
def test_sums_together(request: pytest.FixtureRequest, device: str, sums: Any) -> None:
    with from_ptx(request, "triton"):
        test_sums.test_sums(device, sums)
