"""The wavelet part of WTConv: every backend beside the reference, which tests/clients/test_wtconv.py holds to modules
with upstream's arithmetic."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.ops import each
from tests.ops.contract import EVERY_AXIS, SHORT, Case, Contract, image, on, randn, singles
from tests.tolerances import accumulation
from wavemix_kernels.ops.wtconv import reference, wtconv


def plus(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    """The butterfly without minus signs."""
    return ((a + b + c + d) * 0.5,) * 4


class Wtconv(Contract):
    """A level sums k x k products of bands, themselves sums of four values, and four such sums for each pixel; the
    gradient of a tap sums over all positions. LL and what a level gives to the finer one are stored."""

    name = "wtconv"
    differentiable = ("x", "add", "taps0", "taps1", "taps2", "scale0", "scale1", "scale2")
    axes: ClassVar[Any] = {
        "shape": ((2, 3, 7, 10), (1, 2, 1, 9), (3, 1, 6, 3), (1, 1, 10, 8), (2, 5, 9, 2)),
        "size": (3, 5, 7),
        "levels": (3, 1, 1, 2, 1),
        "add": ("same", "none", "wide"),
        "layout": ("channels_last", "nchw", "sliced", "expanded", "channels_slice"),
    }
    dtypes: ClassVar[Any] = {
        "reference": Contract.dtypes["reference"],
        "triton": (torch.float32, torch.float16, torch.bfloat16, torch.float64),  # the image that PTX leaves out last
    }

    def cases(self, backend: str) -> list[Case]:
        return singles(dtype=self.dtypes[backend], **self.axes)  # a case takes Triton's interpreter seconds

    def inputs(self, case: Case, device: str) -> Any:
        n, c, h, w = case.shape
        made: dict[str, Any] = {"x": image(randn(n, c, h, w), case.dtype, device, case.layout), "add": None}
        if case.add != "none":
            dtype = accumulation(case.dtype) if case.add == "wide" else case.dtype
            made["add"] = image(randn(n, c, h, w, seed=1), dtype, device, "nchw")
        for i in range(case.levels):
            made[f"taps{i}"] = randn(4 * c, 1, case.size, case.size, seed=2 + i).to(device, case.dtype)
            made[f"scale{i}"] = randn(1, 4 * c, 1, 1, seed=5 + i).to(device, case.dtype)
        return made

    def parts(self, case: Case, tensors: Any) -> tuple[list[Tensor], list[Tensor]]:
        return tuple([tensors[f"{name}{i}"] for i in range(case.levels)] for name in ("taps", "scale"))  # type: ignore[return-value]

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        out = wtconv(tensors["x"], *self.parts(case, tensors), tensors["add"], backend=backend)
        assert out.dtype == (tensors["x"] if tensors["add"] is None else tensors["add"]).dtype
        return {"out": out}

    def exact(self, case: Case, tensors: Any) -> Any:
        return {"out": reference.wtconv(tensors["x"], tensors["add"], *self.parts(case, tensors))}

    def sizes(self, case: Case, tensors: Any, backend: str) -> Any:
        before, reference.butterfly = reference.butterfly, plus
        try:
            return self.exact(case, tensors)
        finally:
            reference.butterfly = before

    def terms(self, case: Case, name: str, backend: str) -> float:
        n, _, h, w = case.shape
        positions = n * (h + 1) * (w + 1) / 4 if name.startswith(("d_taps", "d_scale")) else 0
        return (case.size**2 + 12) * case.levels + positions

    def operands(self, case: Case, name: str, backend: str) -> float:
        return 2 * case.levels


ONE = {"shape": ((1, 2, 3, 6),), "size": (3,), "levels": (2,), "layout": ("nchw",)}
test_contract = each.case(Wtconv())
FARTHER: Any = {"shape": ((2, 2, 4, 5),), "size": (3,), "levels": (1,), "layout": EVERY_AXIS, "cotangents": ("nchw",)}
test_offsets_beyond_32_bits = each.case(Wtconv({"triton": SHORT["triton"]}, add=("same",), **FARTHER))
test_empty_batch = each.empty_batch(Wtconv(**ONE | {"shape": ((0, 2, 4, 4),)}, add=("none",)))
test_operators = each.operator(Wtconv(**ONE, add=("same",)), backends=("auto",))
test_repeats = each.backend_repeats(Wtconv(**ONE | {"shape": ((1, 1, 3, 2),), "levels": (1,)}, add=("none",)))


@on("triton")
def test_frozen_taps_and_the_transpose(backend: str, device: str) -> None:
    """Without gradients of taps, that of x is the forward pass with mirrored taps: <A x, y> = <x, A* y>."""
    x, y = (randn(1, 1, 3, 5, seed=i).to(device).requires_grad_() for i in (0, 1))
    taps, scales = [randn(4, 1, 3, 3, seed=2).to(device)], [randn(4, seed=3).to(device)]
    (d_x,) = torch.autograd.grad(wtconv(x, taps, scales, backend=backend), x, y.detach())
    exact = reference.wtconv(y, None, taps, scales, transposed=True)
    torch.testing.assert_close(d_x, exact.detach(), rtol=0, atol=1e-12)
    leaves = [t.requires_grad_() for t in (*taps, *scales)]
    op = torch.ops.wavemix_kernels.wtconv
    ours = torch.autograd.grad(op(y, None, leaves[:1], leaves[1:], True, backend), [y, *leaves], x.detach())
    theirs = torch.autograd.grad(reference.wtconv(y, None, leaves[:1], leaves[1:], True),
                                 [y, *leaves], x.detach())  # fmt: skip
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_what_does_not_belong_together() -> None:
    x, taps, scales = randn(1, 2, 4, 4), [randn(8, 1, 3, 3)], [randn(8)]
    for arguments, named in (
        ((x, taps[0], scales), "taps: expected a list"),
        ((x, [], []), "taps: expected a list"),
        ((x, taps, []), "scales: expected 1 tensors"),
        ((x, [randn(8, 1, 4, 4)], scales), r"taps\[0\]: expected \(8, 1, k, k\), k odd"),
        ((x, [*taps, randn(8, 1, 5, 5)], scales * 2), r"taps\[1\]: expected \(8, 1, k, k\)"),
        ((x, taps, [randn(2)]), r"scales\[0\]: expected 8 numbers"),
        ((x, [*taps, taps[0].float()], scales * 2), r"taps\[1\]: expected the dtype of taps\[0\]"),
        ((x, taps, scales, randn(1, 2, 4, 5)), "add: expected the shape of x"),
    ):
        with pytest.raises((TypeError, ValueError), match=named):
            wtconv(*arguments)
