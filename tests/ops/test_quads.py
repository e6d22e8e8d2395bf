"""Quads of real bands as complex numbers, and back: every backend beside the definition."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tests.ops import each
from tests.ops.contract import EVERY_AXIS, WITHOUT_CUDA, Case, Contract, image, randn
from wavemix_kernels.ops.dwt.quads import ORIENTATIONS, from_complex, to_complex


def corners(bands: list[torch.Tensor], band: int) -> list[torch.Tensor]:
    """a, b, c, d of a band, from one image or from the four pairs of trees, of which the second is the first to come
    along an axis that the band is a high-pass of."""
    if len(bands) == 1:
        return [bands[0][:, :, band, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    high_h, high_w = band in (1, 3), band in (2, 3)
    return [bands[2 * (i ^ high_h) + (j ^ high_w)][:, :, band] for i in (0, 1) for j in (0, 1)]


def defined(bands: list[torch.Tensor], minus: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """Low-pass (N, C, 2h, 2w), and (N, C, 6, h, w, 2); with sums in place of differences where `minus` is 1."""
    a, b, c, d = corners(bands, 0)
    n, channels, h, w = a.shape
    quads = torch.stack((a, b, c, d), -1).unflatten(-1, (2, 2)).permute(0, 1, 2, 4, 3, 5)
    z: list[Any] = [None] * 6
    for band, (one, other) in enumerate(ORIENTATIONS, 1):
        a, b, c, d = corners(bands, band)
        z[one], z[other] = torch.stack((a + minus * d, b + c), -1), torch.stack((a + d, b + minus * c), -1)
    return quads.reshape(n, channels, 2 * h, 2 * w), torch.stack(z, 2) / 2**0.5


def transposed(low: torch.Tensor, z: torch.Tensor, trees: bool, minus: int = -1) -> Any:
    """The transpose of the definition, which is linear."""
    n, c, h, w = low.shape
    shape = (n, c, 4, h // 2, w // 2) if trees else (n, c, 4, h, w)
    leaves = [low.new_zeros(shape, requires_grad=True) for _ in range(4 if trees else 1)]
    bands = torch.autograd.grad(defined(leaves, minus), leaves, [low, z], create_graph=True)
    return {f"bands{i}": band for i, band in enumerate(bands)}


class ToComplex(Contract):
    """A part is the difference or sum of two samples, times a constant."""

    name = "quads_to_complex"
    differentiable = ("bands0",)
    axes: ClassVar[Any] = {
        "shape": ((2, 3, 4, 9), (1, 2, 1, 1), (3, 1, 5, 300), (1, 2, 0, 3)),
        "trees": (False, True),
        "dims": ((2, 5), (2, 0), (4, 1), (5, 2)),
        "layout": ("nchw", "channels_last", "sliced", "expanded"),
    }  # fmt: skip
    dtypes: ClassVar[Any] = {b: Contract.dtypes[b] for b in ("reference", "cpu", "triton")}

    def terms(self, case: Case, name: str, backend: str) -> float:
        return 3

    def inputs(self, case: Case, device: str) -> Any:
        n, c, h, w = case.shape
        shape = (n, c, 4, h, w) if case.trees else (n, c, 4, 2 * h, 2 * w)
        many = 4 if case.trees else 1
        return {f"bands{i}": image(randn(*shape, seed=i), case.dtype, device, case.layout) for i in range(many)}

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        low, z = to_complex(list(tensors.values()), *case.dims, backend=backend)
        assert low.is_contiguous()
        assert z.is_contiguous()
        return {"low": low, "z": z.movedim(case.dims, (2, 3)).flatten(2, 3)}

    def exact(self, case: Case, tensors: Any) -> Any:
        return self.sum_of(tensors, minus=-1)

    def sizes(self, case: Case, tensors: Any, backend: str) -> Any:
        return self.sum_of(tensors, minus=1)

    def sum_of(self, tensors: Any, minus: int) -> Any:
        low, z = defined(list(tensors.values()), minus)
        return {"low": low, "z": z.movedim(5, 3).flatten(2, 3)}


class FromComplex(ToComplex):
    name = "quads_from_complex"
    differentiable = ("low", "z")

    def inputs(self, case: Case, device: str) -> Any:
        n, c, h, w = case.shape
        low = image(randn(n, c, 2 * h, 2 * w), case.dtype, device, case.layout)
        z = image(randn(n, c, 12, h, w, seed=1), case.dtype, device, case.layout).unflatten(2, (6, 2))
        z = z.movedim((2, 3), case.dims)
        return {"low": low, "z": z.contiguous() if case.layout == "nchw" else z}

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        bands = from_complex(tensors["low"], tensors["z"], *case.dims, case.trees, backend=backend)
        assert all(band.is_contiguous() for band in bands)
        return {f"bands{i}": band for i, band in enumerate(bands)}

    def exact(self, case: Case, tensors: Any) -> Any:
        return transposed(tensors["low"], tensors["z"].movedim(case.dims, (2, 5)), case.trees)

    def sizes(self, case: Case, tensors: Any, backend: str) -> Any:
        return transposed(tensors["low"], tensors["z"].movedim(case.dims, (2, 5)), case.trees, minus=1)


test_to_complex = each.case(ToComplex())
test_from_complex = each.case(FromComplex())
FARTHER: Any = {"shape": ((2, 2, 3, 2),), "layout": EVERY_AXIS}
test_offsets_beyond_32_bits = each.case(ToComplex(WITHOUT_CUDA, **FARTHER), FromComplex(WITHOUT_CUDA, **FARTHER))
ONE: Any = {"shape": ((1, 2, 3, 4),), "dims": ((2, 5),), "layout": ("nchw",)}
test_operators = each.operator(ToComplex(**ONE), FromComplex(**ONE), backends=("auto",))
CPU = {"cpu": (torch.float64,)}
test_derivatives = each.gradient(ToComplex(CPU, **ONE), FromComplex(CPU, **ONE))
