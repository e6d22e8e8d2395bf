"""Haar in 1-D and 3-D beside PyWavelets, and the table of conventions."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops import each
from tests.ops.contract import EVERY_AXIS, LAYOUTS, WITHOUT_CUDA, Case, Contract, image, pairwise, randn, singles
from tests.tolerances import DTYPES
from wavemix_kernels.ops.common import selftest
from wavemix_kernels.ops.haar import (
    BANDS3D,
    CONVENTIONS,
    Convention,
    blocks,
    haar_bands2d,
    haar_bands3d,
    haar_dwt1d,
    haar_dwt3d,
    haar_from_bands2d,
    haar_from_bands3d,
    haar_idwt1d,
    haar_idwt3d,
    joined,
)  # fmt: skip

MODES = ("zero", "constant", "symmetric", "periodic", "periodization", "reflect", "smooth", "antisymmetric",
         "antireflect")  # fmt: skip
BACKENDS = ("cpu", "reference")
ORDERS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}


def pywt() -> Any:
    return pytest.importorskip("pywt", reason="PyWavelets is not installed: pip install PyWavelets")


def functions(of: Convention) -> tuple[object, object]:
    return (haar_bands2d, haar_from_bands2d) if of.axes == 2 else (haar_bands3d, haar_from_bands3d)


class Blocks(Contract):
    """There and, from other bands, back, with an order, signs and scales of no convention."""

    name = "haar_blocks"
    differentiable = ("x", "bands")
    axes: ClassVar[Any] = {
        "along": ((4,), (3,), (2,), (3, 4), (2, 4), (2, 3, 4)), "size": ((4, 6, 32), (5, 7, 9), (1, 3, 2), (6, 1, 40)),
        "mode": ("zero", "symmetric", "antisymmetric", "periodic", "reflect"), "front": (0, 1, 3),
        "inside": blocks.LAYOUTS, "layout": ("contiguous", "channels_last", "sliced"),
    }  # fmt: skip
    dtypes: ClassVar[Any] = {b: Contract.dtypes[b] for b in ("reference", "cpu", "triton")}

    def cases(self, backend: str) -> list[Case]:
        if backend == "triton":  # the interpreter takes half a second for a case
            return singles(dtype=self.dtypes[backend], channels=(8,), **self.axes)
        return pairwise(dtype=self.dtypes[backend], channels=(8, 19), **self.axes)  # 19: vectors and a rest

    def cotangent(self, case: Case, name: str, out: Tensor, seed: int) -> Tensor:
        return randn(*out.shape, seed=seed).to(out.device, out.dtype)

    def inputs(self, case: Case, device: str) -> Any:
        if case.mode == "reflect" and any(case.size[a - 2] + (case.front if a == 2 else 0) == 1 for a in case.along):
            pytest.skip("a single sample has nothing to reflect: tests/tools/test_errors.py")
        x = randn(2, case.channels, *case.size).to(device, case.dtype)
        order = torch.channels_last_3d if case.layout == "channels_last" else torch.contiguous_format
        x = torch.stack((x, x), -1)[..., 0] if case.layout == "sliced" else x.contiguous(memory_format=order)
        shape = blocks._empty_bands(x, case.along, self.front(case), case.inside).shape
        bands = blocks._empty_bands(x, case.along, self.front(case), case.inside)
        return {"x": x, "bands": bands.copy_(randn(*shape, seed=1))}

    def front(self, case: Case) -> int:
        return case.front if 2 in case.along else 0

    def rule(self, case: Case) -> tuple[list[int], list[int], list[float]]:
        order = [p ^ (1 if p > 1 else 0) for p in range(2 ** len(case.along))]
        return list(case.along), order[::-1], [(k + 1) / 8 * (-1) ** k for k in range(len(order))]

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        return self.both(case, tensors, blocks._split_op, blocks._join_op, backend)

    def exact(self, case: Case, tensors: Any) -> Any:
        return self.both(case, tensors, blocks._split_standard, blocks._join_standard, "reference")

    def both(self, case: Case, tensors: Any, there: Any, back: Any, backend: str) -> Any:
        rule, size = self.rule(case), list(case.size)
        border = (self.front(case), True, case.inside)
        joined = ("zero", self.front(case), False, case.inside, case.layout == "channels_last", backend)
        return {
            "split": there(tensors["x"], *rule, case.mode, *border, backend),
            "joined": back(tensors["bands"], *rule, size, *joined),
        }

    def sizes(self, case: Case, tensors: Any, backend: str) -> Any:
        """All bands are the sum of a block, and all samples that of its bands."""
        along, order, weight = self.rule(case)
        mode = "symmetric" if case.mode == "antisymmetric" else case.mode
        weight = [abs(w) for w in weight]
        there = blocks._split_standard(
            tensors["x"], along, [0] * len(order), weight, mode, self.front(case), True, case.inside, backend
        )  # fmt: skip
        total = (tensors["bands"] * torch.tensor(weight, dtype=torch.float64)[:, None, None, None]).sum(2, keepdim=True)
        alone = torch.cat((total, torch.zeros_like(total).expand(-1, -1, len(order) - 1, -1, -1, -1)), 2)
        ones = [*range(len(order))], [1.0] * len(order), list(case.size)
        joined = ("zero", self.front(case), False, case.inside, False, backend)
        return {"split": there, "joined": blocks._join_standard(alone, along, *ones, *joined)}

    def terms(self, case: Case, name: str, backend: str) -> float:
        return 2 * len(case.along) + 2 + self.front(case)

    def operands(self, case: Case, name: str, backend: str) -> float:
        """The gradient of a place past an end is added to samples that are stored."""
        return 1 + len(case.along) + self.front(case) if name == "d_x" else 0


class Views(Blocks):
    """Images and bands in memory as views of larger ones are, the innermost axis any of them."""

    axes: ClassVar[Any] = Blocks.axes | {
        "along": ((2, 3, 4), (2, 4), (4,)), "size": ((3, 4, 6),), "mode": ("symmetric",), "front": (0,),
        "layout": tuple(LAYOUTS),
    }  # fmt: skip

    def cases(self, backend: str) -> list[Case]:
        return pairwise(dtype=self.dtypes[backend], channels=(8,), **self.axes)

    def inputs(self, case: Case, device: str) -> Any:
        x = image(randn(2, case.channels, *case.size), case.dtype, device, case.layout)
        n, c, k, *counts = blocks._empty_bands(x, case.along, 0, case.inside).shape
        bands = image(randn(n, c * k, *counts, seed=1), case.dtype, device, case.layout)
        return {"x": x, "bands": bands.unflatten(1, (c, k))}


test_contract = each.case(Blocks())
test_views = each.case(Views())
test_offsets_beyond_32_bits = each.case(
    Views(WITHOUT_CUDA, along=((2, 3, 4),), inside=("channels",), layout=(*EVERY_AXIS, "far_bands"))
)


@pytest.mark.parametrize(
    "case", pairwise(mode=MODES, size=((5, 7, 9), (4, 6, 8), (3, 4, 5), (2, 5, 3)), order=tuple(ORDERS)), ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dwt3d_is_pywavelets(case: object, backend: str) -> None:
    x = randn(2, 3, *case.size).contiguous(memory_format=ORDERS[case.order])
    want = pywt().dwtn(x.numpy(), "haar", mode=case.mode, axes=(2, 3, 4))
    lll, (high,) = haar_dwt3d(x, mode=case.mode, backend=backend)
    for name, band in zip(BANDS3D, (lll, *high.unbind(2)), strict=True):
        np.testing.assert_allclose(band.numpy(), want[name], rtol=0, atol=1e-13)
    back = haar_idwt3d(lll, [high], size=case.size, add=x, backend=backend)
    torch.testing.assert_close(back, 2 * x, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "case", pairwise(mode=MODES, dim=(0, 1, 2, -1), order=("nchw", "channels_last", "sliced", "transposed")), ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dwt1d_is_pywavelets(case: object, backend: str) -> None:
    x = image(randn(3, 4, 5, 7), layout=case.order)
    low, highs = haar_dwt1d(x, 2, dim=case.dim, mode=case.mode, backend=backend)
    want_low, *want = pywt().wavedec(x.numpy(), "haar", mode=case.mode, level=2, axis=case.dim)
    for got, exact in zip((low, *reversed(highs)), (want_low, *want), strict=True):
        np.testing.assert_allclose(got.numpy(), exact, rtol=0, atol=1e-13)
    back = haar_idwt1d(low, highs, dim=case.dim, size=x.shape[case.dim], backend=backend)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-13)


def taps(of: Convention, band: int) -> Tensor:
    """The block of +-weight whose products with a block of samples sum to a band, from its bits alone."""
    block = torch.full((2,) * of.axes, of.weight[band], dtype=torch.float64)
    for axis in range(of.axes):
        if of.order[band] >> (of.axes - 1 - axis) & 1:
            block.select(axis, 1).neg_()
    return block


def band(bands: Tensor | tuple[Tensor, ...], of: Convention, k: int, n: int, c: int) -> Tensor:
    if of.layout == "channels":
        return bands[:, k :: 2**of.axes]
    if of.layout == "bands":
        return bands[:, c * k : c * k + c]
    return bands[k] if of.layout == "separate" else bands[n * k : n * k + n]


@pytest.mark.parametrize("name", CONVENTIONS)
def test_bands_are_the_tables(name: str) -> None:
    of = CONVENTIONS[name]
    there, back = functions(of)
    x = randn(2, 3, *(5, 4, 6)[3 - of.axes :])
    got = there(x, name)
    seen = torch.cat((x[:, :, :1], x), 2) if of.first_frame else x
    past = seen[:, :, -2:-1] * (of.mode == "reflect")  # or zeros
    seen = torch.cat((seen, past), 2) if seen.shape[2] % 2 else seen
    for k in range(2**of.axes):
        conv = torch.nn.functional.conv2d if of.axes == 2 else torch.nn.functional.conv3d
        want = conv(seen, taps(of, k).expand(3, 1, *(2,) * of.axes), stride=2, groups=3)
        torch.testing.assert_close(band(got, of, k, 2, 3), want, rtol=0, atol=1e-13)
    gain = sum(w * b for w, b in zip(of.weight, of.inverse, strict=True))
    torch.testing.assert_close(back(got, name, size=x.shape[2:]), gain * x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", [n for n, of in CONVENTIONS.items() if of.layout in ("bands", "channels")])
def test_rounds_are_packets(name: str) -> None:
    of = CONVENTIONS[name]
    there, back = functions(of)
    x = randn(1, 2, *(9, 7, 10)[3 - of.axes :])
    front = x[:, :, :1].repeat(1, 1, 2, *[1] * (of.axes - 1))
    twice = there(there(torch.cat((front, x), 2), name), Convention(**{**vars(of), "first_frame": False}))
    got = there(x, name, rounds=2)
    if not of.first_frame:
        twice = there(there(x, name), name)
    torch.testing.assert_close(got, twice, rtol=0, atol=1e-13)
    gain = sum(w * b for w, b in zip(of.weight, of.inverse, strict=True))
    torch.testing.assert_close(back(got, name, rounds=2, size=x.shape[2:]), gain**2 * x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["cosmos3d", "wfvae3d", "mwcnn", "diffll", "wavecnet", "freia"])
def test_gradients_of_every_order(name: str) -> None:
    of = CONVENTIONS[name]
    there, back = functions(of)
    x = randn(1, 2, *(2, 3, 3)[3 - of.axes :]).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: there(x, name), x, check_forward_ad=True)
    assert torch.autograd.gradcheck(lambda x: back(there(x, name), name, size=x.shape[2:]), x)
    square = lambda x: [b.square() for b in there(x, name)]  # noqa: E731
    assert torch.autograd.gradgradcheck(square, x)
    mapped = torch.func.vmap(lambda x: there(x, name))(x.expand(2, *x.shape))
    first = mapped[1] if isinstance(mapped, Tensor) else [b[1] for b in mapped]
    torch.testing.assert_close(first, there(x, name) if isinstance(mapped, Tensor) else list(there(x, name)))


@pytest.mark.parametrize("mode", ["smooth", "reflect", "periodic", "symmetric"])
def test_gradients_at_borders(mode: str) -> None:
    x = randn(1, 1, 3, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: haar_dwt3d(x, 2, mode=mode)[1], x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, backend: str) -> None:
    device = torch.device("cpu")
    error, bound = blocks.self_test(backend, device, dtype)
    assert error <= selftest.half_bound(bound, blocks.self_test("reference", device, dtype)[0], dtype)


LAYOUTS = ("bands", "channels", "batch", "around", "inside", "separate")


@pytest.mark.parametrize("held", ["all", "some"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_eager_call_is_the_operators(layout: str, held: str) -> None:
    """The eager call's kernel reads and writes bands in place; the operators go by a block. Sizes, memory orders, and
    gradients in another memory order than their tensors."""
    for size, axes, order in (((6, 70), (3, 4), "sliced"), ((5, 34), (3, 4), "channels_last"), ((9,), (4,), "plain")):
        count = 2 ** len(axes)
        kept = count if held == "all" else max(count - 1, 1)
        weight = tuple((k + 1) / 8 * (-1) ** k for k in range(count))
        rule = joined.Rule(axes, (*range(1, count), 0), weight, layout, kept, mode="symmetric")
        x = randn(2, 3, *size)
        x = torch.stack((x, x), -1)[..., 0] if order == "sliced" else x
        x = x.contiguous(memory_format=torch.channels_last) if order == "channels_last" else x
        x = x.float().requires_grad_()
        found = []
        for backend in ("auto", "reference"):
            bands = joined.analysis(x, rule, backend)
            given = [randn(*b.shape[::-1], seed=k).float().permute(*range(b.dim())[::-1]) for k, b in enumerate(bands)]
            given[0] = given[0][..., :1].expand(bands[0].shape).requires_grad_()
            (grad,) = torch.autograd.grad(bands, x, given, create_graph=True)
            (again,) = torch.autograd.grad(grad.square().sum(), given[0])
            even = [*[1] * (3 - len(size)), *(2 * ((n + 1) // 2) for n in size)]
            back = joined.synthesis(given, rule._replace(mode="zero", repeat=False), even, False, backend)
            found.append([*bands, grad, again, back])
        for ours, exact in zip(*found, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


def test_nothing_reaches_across_a_zero_border() -> None:
    x = torch.full((1, 1, 3, 3, 3), float("inf"))
    lll, (high,) = haar_dwt3d(x)
    assert lll[0, 0, 1, 1, 1] == float("inf")
    assert not high[0, 0, :, 1, 1, 1].isnan().any()


def test_empty() -> None:
    assert haar_dwt3d(torch.zeros(0, 2, 3, 4, 4))[0].shape == (0, 2, 2, 2, 2)


def test_errors() -> None:
    x = torch.zeros(1, 4, 4, 4)
    with pytest.raises(ValueError, match="convention='haar': expected one of 'wtconv'"):
        haar_bands2d(x, "haar")
    with pytest.raises(ValueError, match="expected one of 2 axes"):
        haar_bands2d(x, "cosmos3d")
    with pytest.raises(TypeError, match=r"convention.order: expected a tuple, got \[0, 1, 2, 3\]"):
        haar_bands2d(x, Convention(2, [0, 1, 2, 3], (1.0,) * 4, (0.25,) * 4, "bands"))
    with pytest.raises(ValueError, match=r"bands\[1\]: expected shape \(1, 4, 4, 4\), got \(1, 4, 4, 2\)"):
        haar_from_bands2d([x, x[..., :2], x, x], "wavecnet")
    with pytest.raises(ValueError, match="rounds=2: layout 'separate' takes one round"):
        haar_bands2d(x, "wavecnet", rounds=2)
    with pytest.raises(IndexError, match="dim=4: expected -4 to 3"):
        haar_dwt1d(x, dim=4)
    with pytest.raises(ValueError, match="size=5"):
        haar_idwt1d(x, [x], size=5)
    with pytest.raises(TypeError, match="expected float64, float32, float16 or bfloat16"):
        haar_dwt1d(x.int())
