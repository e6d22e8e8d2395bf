"""The filter bank on any lattice of samples, and its transpose: every backend beside the reference."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from tests.ops import each
from tests.ops.contract import EVERY_AXIS, WITHOUT_CUDA, Case, Contract, image, randn
from tests.ops.test_dwt import bank
from wavemix_kernels.ops.dwt.bank import filter_bank, filter_bank_transpose, filter_banks_transpose
from wavemix_kernels.ops.dwt.reference import Filters, Lattice, separable_bank, separable_bank_transpose

#: name -> the lattice of an axis of n samples under filters of t taps.
LATTICES = {
    "every sample": lambda n, t: Lattice(-(t // 2), n),
    "dilated": lambda n, t: Lattice(3 - 3 * t // 2, n, 1, 3),
    "decimated": lambda n, t: Lattice(2 - t, (n + t - 1) // 2, 2, 1),
    "tree": lambda n, t: Lattice(3 - t, n // 4, 4, 2),
}


class Bank(Contract):
    """A level sums `taps` products along either axis; a sample past an end is one within. No mode here subtracts."""

    name = "filter_bank"
    differentiable = ("x",)
    axes: ClassVar[Any] = {
        "shape": ((2, 3, 16, 33), (1, 2, 8, 40), (3, 1, 4, 9), (1, 1, 30, 131)),
        "taps": ((8, 8), (3, 5), (5, 18), (10, 3)),
        "lattices": (("every sample",) * 2, ("dilated",) * 2, ("tree",) * 2, ("decimated", "dilated")),
        "mode": ("zero", "symmetric", "periodic", "reflect", "constant"),
        "layout": ("nchw", "channels_last", "sliced", "expanded"),
    }  # fmt: skip
    dtypes: ClassVar[Any] = {b: Contract.dtypes[b] for b in ("reference", "cpu", "triton")}
    few: ClassVar[Any] = {
        "shape": ((1, 2, 4, 9), (2, 1, 8, 5)), "taps": ((4, 3), (3, 5)), "layout": ("nchw", "channels_last"),
    }  # fmt: skip

    def terms(self, case: Case, name: str, backend: str) -> float:
        return sum(case.taps) + 4

    def parts(self, case: Case, tensors: Any) -> tuple[Filters, Lattice, Lattice]:
        first = next(t for t in tensors.values() if t is not None)
        exact = first.dtype if first.dtype == torch.float64 else torch.float32
        filters = Filters(*(f.to(exact) for f in bank(case.taps, torch.float32, str(first.device))))
        h, w = (
            LATTICES[lattice](n, t)
            for lattice, n, t in zip(case.lattices, case.shape[2:], case.taps[::-1], strict=True)
        )
        return filters, h, w

    def inputs(self, case: Case, device: str) -> Any:
        return {"x": image(randn(*case.shape), case.dtype, device, case.layout)}

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        bands = filter_bank(tensors["x"], *self.parts(case, tensors), mode=case.mode, backend=backend)
        assert bands.is_contiguous()
        return {"bands": bands}

    def exact(self, case: Case, tensors: Any) -> Any:
        return {"bands": separable_bank(tensors["x"], *self.parts(case, tensors), case.mode)}

    def sizes(self, case: Case, tensors: Any, backend: str) -> Any:
        filters, h, w = self.parts(case, tensors)
        return {"bands": separable_bank(tensors["x"], Filters(*(f.abs() for f in filters)), h, w, case.mode)}


class Transpose(Bank):
    name = "filter_bank_transpose"
    differentiable = ("ll", "high")
    axes: ClassVar[Any] = Bank.axes | {"missing": (False, True)}

    def inputs(self, case: Case, device: str) -> Any:
        n, c = case.shape[:2]
        _, h, w = self.parts(case, {"ll": randn(1)})
        ll, high = randn(n, c, h.length, w.length), randn(n, c, 3, h.length, w.length, seed=1)
        return {
            "ll": image(ll, case.dtype, device, case.layout),
            "high": None if case.missing else image(high, case.dtype, device, case.layout),
        }

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        parts = self.parts(case, tensors)
        return {
            "image": filter_bank_transpose(
                tensors["ll"], tensors["high"], *parts, case.shape[2:], mode=case.mode, backend=backend
            )
        }

    def exact(self, case: Case, tensors: Any) -> Any:
        parts = self.parts(case, tensors)
        return {"image": separable_bank_transpose(tensors["ll"], tensors["high"], *parts, case.shape[2:], case.mode)}

    def sizes(self, case: Case, tensors: Any, backend: str) -> Any:
        filters, *lattices = self.parts(case, tensors)
        absolute = Filters(*(f.abs() for f in filters))
        return {
            "image": separable_bank_transpose(
                tensors["ll"], tensors["high"], absolute, *lattices, case.shape[2:], case.mode
            )
        }


class Banks(Transpose):
    """The sum of the four pairs of trees, whose samples lie between each other's, or of banks whose samples are the
    same. Its gradient is all banks' analysis."""

    name = "filter_banks_transpose"
    differentiable = ("ll0", "high1")
    axes: ClassVar[Any] = Bank.axes | {
        "shape": ((2, 3, 16, 36), (1, 2, 8, 40), (3, 1, 4, 8)),
        "taps": ((10, 4), (4, 18), (6, 6)),
        "lattices": (("trees",) * 4, ("trees", "trees", "every sample")),
        "missing": (False, True),
    }
    few: ClassVar[Any] = {"shape": ((1, 2, 4, 8), (2, 1, 8, 4)), "taps": ((4, 6),), "layout": ("nchw", "channels_last")}

    def terms(self, case: Case, name: str, backend: str) -> float:
        return len(case.lattices) * super().terms(case, name, backend)

    def banks(self, case: Case, tensors: Any) -> list[tuple[Filters, Lattice, Lattice]]:
        made = []
        for i, lattice in enumerate(case.lattices):
            one = Case(**vars(case) | {"lattices": (lattice.replace("trees", "tree"),) * 2})
            filters, *axes = self.parts(one, tensors)
            if lattice == "trees":  # the second tree reads odd samples
                axes = [Lattice(2 - t + n, *axis[1:]) for axis, t, n in zip(axes, case.taps[::-1], divmod(i, 2))]  # noqa: B905
            made.append((filters, *axes))
        return made

    def inputs(self, case: Case, device: str) -> Any:
        n, c = case.shape[:2]
        out = {}
        for i, (_, h, w) in enumerate(self.banks(case, {"ll": randn(1)})):
            ll, high = randn(n, c, h.length, w.length, seed=i), randn(n, c, 3, h.length, w.length, seed=9 + i)
            out[f"ll{i}"] = image(ll, case.dtype, device, case.layout)
            out[f"high{i}"] = None if case.missing else image(high, case.dtype, device, case.layout)
        return out

    def lists(self, case: Case, tensors: Any) -> tuple[list[Any], list[Any] | None]:
        ll, high = ([tensors[f"{name}{i}"] for i in range(len(case.lattices))] for name in ("ll", "high"))
        return ll, None if case.missing else high

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        ll, high = self.lists(case, tensors)
        banks = self.banks(case, tensors)
        return {"image": filter_banks_transpose(ll, high, banks, case.shape[2:], mode=case.mode, backend=backend)}

    def sum_of(self, case: Case, tensors: Any, absolute: bool) -> Any:
        ll, high = self.lists(case, tensors)
        parts = []
        for one, other, (filters, h, w) in zip(ll, high or [None] * len(ll), self.banks(case, tensors), strict=True):
            taps = Filters(*(f.abs() for f in filters)) if absolute else filters
            parts.append(separable_bank_transpose(one, other, taps, h, w, case.shape[2:], case.mode))
        return {"image": sum(parts)}

    def exact(self, case: Case, tensors: Any) -> Any:
        return self.sum_of(case, tensors, absolute=False)

    def sizes(self, case: Case, tensors: Any, backend: str) -> Any:
        return self.sum_of(case, tensors, absolute=True)


test_bank = each.case(Bank())
test_transpose_of_banks = each.case(Banks())
test_transpose = each.case(Transpose())
FARTHER: Any = {"shape": ((2, 2, 4, 6),), "taps": ((3, 2),), "lattices": (("dilated",) * 2,), "mode": ("symmetric",),
                "layout": EVERY_AXIS}  # fmt: skip
test_offsets_beyond_32_bits = each.case(
    Bank(WITHOUT_CUDA, **FARTHER), Transpose(WITHOUT_CUDA, **FARTHER, missing=(False,))
)
ONE = {"shape": ((1, 2, 8, 40),), "taps": ((3, 5),), "lattices": (("tree",) * 2,), "layout": ("nchw",)}
test_operators = each.operator(
    Bank(**ONE, mode=("symmetric",)), Transpose(**ONE, mode=("periodic",)), backends=("auto",)
)
SMALL = {"shape": ((1, 1, 8, 9),), "taps": ((5, 3), (4, 6)), "layout": ("nchw",), "mode": ("symmetric", "zero")}
# Each operator is the other's gradient, on every backend: one shows that they close.
CPU = {"cpu": (torch.float64,)}
FEW: Any = SMALL | {"shape": ((1, 1, 4, 8),), "taps": ((4, 4),), "missing": (False,)}
test_derivatives = each.gradient(Bank(CPU, **SMALL), Transpose(CPU, **SMALL), Banks(CPU, **FEW))


@pytest.mark.parametrize("mode", ["antisymmetric", "antireflect", "periodization"])
def test_modes_that_subtract_on_triton(mode: str):
    """And rows that a program has too many of, far past the ends."""
    x, filters = randn(1, 1, 5, 7), bank((4, 4), torch.float64, "cpu")
    h, w = LATTICES["dilated"](5, 4), LATTICES["tree"](7, 4)
    bands = separable_bank(x, filters, h, w, mode)
    back = separable_bank_transpose(bands[:, :, 0], None, filters, h, w, (5, 7), mode)
    ours = filter_bank(x, filters, h, w, mode=mode, backend="triton")
    torch.testing.assert_close(ours, bands, rtol=0, atol=1e-13)
    ours = filter_bank_transpose(bands[:, :, 0], None, filters, h, w, (5, 7), mode=mode, backend="triton")
    torch.testing.assert_close(ours, back, rtol=0, atol=1e-13)


def test_other_lattices_are_refused():
    x, filters = randn(1, 1, 8, 8), bank((4, 4), torch.float64, "cpu")
    good = Lattice(-2, 8)
    for bad in (Lattice(1, 8), Lattice(-2, 2, 3, 1), Lattice(-2, 2, 2, 3)):
        with pytest.raises(ValueError, match="w: expected start <= 0 and a stride that divides step"):
            filter_bank(x, filters, good, bad)
