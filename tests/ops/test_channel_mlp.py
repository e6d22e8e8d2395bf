"""Wave-MLP's channel MLP, and the matrix products around it, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.models.subjects import threads
from tests.ops import each
from tests.ops.contract import Case, Contract, image, randn
from tests.tolerances import DTYPES, UNIT_ROUNDOFF, accumulation, assert_within, stored
from wavemix_kernels import _native
from wavemix_kernels.ops.common import products
from wavemix_kernels.ops.mlp import channel

WEIGHTS = ("w1", "b1", "w2", "b2")


@pytest.fixture(autouse=True)
def in_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a processor multiplies bfloat16 itself the library's products would serve some images."""
    monkeypatch.setattr(channel, "_BFLOAT16_PRODUCTS", False)


class ChannelMlp(Contract):
    """A hidden value errs by (c + 1) u of the sum of its terms, GELU by 5 u and, its slope and curvature being at most
    1.13, by as much; what follows is a sum of products of such."""

    name = "channel_mlp"
    dtypes: ClassVar[Any] = {"cpu": DTYPES, "triton": (torch.float32,), "reference": (torch.float64, torch.float32)}
    axes: ClassVar[Any] = {
        # Images, channels, rows and columns, hidden channels: fewer pixels than hidden channels, which threads then
        # share (whole vectors; none; several blocks of pixels), and more.
        "size": ((2, 32, 5, 4, 128), (1, 13, 3, 7, 45), (1, 6, 23, 23, 600), (2, 6, 9, 8, 20)),
        "bias": (True, False),
        "threads": (1, 3),
        "layout": ("channels_last", "channels_slice"),
    }

    def cases(self, backend: str) -> list[Case]:
        """Interpreted, the largest takes minutes."""
        return [case for case in super().cases(backend) if backend != "triton" or case.size[4] < 600]

    def inputs(self, case: Any, device: str) -> Any:
        n, c, h, w, k = case.size
        o = c + 3
        made: Any = {"x": image(randn(n, c, h, w), case.dtype, device, case.layout)}
        made |= {"grad": image(randn(n, o, h, w, seed=1), case.dtype, device, "channels_last")}
        tensors = randn(k, c, 1, 1) / c**0.5, randn(k, seed=3), randn(o, k, 1, 1) / k**0.5, randn(o, seed=5)
        for name, t in zip(WEIGHTS, tensors, strict=True):
            made[name] = None if not case.bias and t.dim() == 1 else t.to(device, case.dtype)
        return made

    def run(self, case: Any, tensors: Any, backend: str) -> Any:
        weights = channel.Weights(*(tensors[name] for name in WEIGHTS))
        with threads(case.threads):
            out = channel.fused(tensors["x"], *weights, backend)
            d_x, d_weights = channel.backward(tensors["grad"], tensors["x"], weights, backend)
        assert [d is None for d in d_weights] == [t is None for t in weights]
        return {"out": out, "d_x": d_x} | {f"d_{name}": d for name, d in zip(WEIGHTS, d_weights, strict=True)}

    def exact(self, case: Any, tensors: Any) -> Any:
        return self.run(case, tensors, "reference")

    def bounds(self, case: Any, tensors: Any, cotangents: Any, exact: Any, backend: str) -> Any:
        n, c, h, w, k = case.size
        o, pixels, u = c + 3, n * h * w, UNIT_ROUNDOFF[accumulation(case.dtype)]
        x, g, w1, b1, w2, b2 = (None if t is None else t.abs() for t in tensors.values())
        hidden = products.project(tensors["x"], tensors["w1"], tensors["b1"])
        # Matrix units multiply in bfloat16: the hidden layer, after a GELU of its own, and its gradient are rounded.
        units = backend == "cpu" and _native.by_matrix_units(case.dtype)
        half = UNIT_ROUNDOFF[case.dtype] + 2.0**-12.9 if units else 0.0
        error = 1.13 * (c + 2) * u * products.project(x, w1, b1) + 5 * u * (hidden.abs() + 1) + half * hidden.abs()
        value, slope = hidden.abs() + error, torch.full_like(hidden, 1.13)
        d_h = products.backward_x(g, hidden, w2)
        d_h_error = d_h * (error + ((o + 2) * u + half) * slope)

        def sums(of: Callable[[Tensor], Tensor], value: Tensor, error: Tensor, terms: int) -> Tensor:
            return of(error) + (terms + 2) * u * of(value)

        by_channel: Any = lambda t: t.sum((0, 2, 3))  # noqa: E731
        bounds = {
            "out": sums(lambda t: products.project(t, w2, None), value, error, k),
            "d_x": sums(lambda t: products.backward_x(t, x, w1), d_h * slope, d_h_error, k),
            "d_w1": sums(lambda t: products.backward_weight(t, x, w1), d_h * slope, d_h_error, pixels),
            "d_b1": sums(by_channel, d_h * slope, d_h_error, pixels),
            "d_w2": sums(lambda t: products.backward_weight(g, t, w2), value, error, pixels),
            "d_b2": sums(by_channel, g, torch.zeros_like(g), pixels),
        }
        offset = 0 if b2 is None else b2.max()
        # float64's own reference errs as much.
        return {
            name: 2 * bounds[name] + 2 * u * (want.abs() + offset) + stored(want, case.dtype)
            for name, want in exact.items() if want is not None
        }  # fmt: skip


test_contract = each.case(ChannelMlp())
test_operators = each.operator(ChannelMlp(size=((2, 4, 3, 5, 8),), bias=(True,), threads=(1,)))


# --- Products --------------------------------------------------------------------------------------------


# More pixels than channels, and fewer: the library's convolution and its plain product; more than one block of pixels.
@pytest.mark.parametrize(
    "size", [(1, 20, 12, 1, 3), (1, 20, 12, 1, 40), (2, 37, 20, 9, 5), (1, 64, 48, 30, 21), (3, 5, 3, 1, 1)], ids=str
)
@pytest.mark.parametrize("layout", ["channels_last", "channels_slice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products(dtype: torch.dtype, layout: str, size: tuple[int, ...]) -> None:
    n, o, c, h, w = size
    images = (image(randn(n, k, h, w, seed=k), dtype, layout=layout) for k in (c, o))
    given = *images, randn(o, c, 1, 1).to(dtype), randn(o).to(dtype)

    def rows_of(t: Tensor) -> Tensor:
        return t.double().permute(0, 2, 3, 1).flatten(0, 2)

    def by_definition(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        columns, rows, w = rows_of(x), rows_of(grad), weight.double().flatten(1)
        return [columns @ w.t() + bias.double(), rows @ w, rows.t() @ columns, rows.sum(0)]

    x, grad, weight, bias = given
    images = products.project(x, weight, bias), products.backward_x(grad, x, weight)
    made = *map(rows_of, images), products.backward_weight(grad, x, weight).flatten(1), products.backward_bias(grad)
    sizes, terms = by_definition(*(t.abs() for t in given)), (c + 1, o, n * h * w, n * h * w)
    for got, want, size_of, k in zip(made, by_definition(*given), sizes, terms, strict=True):
        # In float64 the product that it is compared with errs as much.
        assert_within(got, want, 2 * (k + 1) * UNIT_ROUNDOFF[dtype] * size_of)
