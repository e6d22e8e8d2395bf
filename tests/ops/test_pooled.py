"""BatchNorm, residual and the average over all pixels on every backend, and its gradients."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.ops import each
from tests.ops.contract import EVERY_AXIS, LAYOUTS, Contract, image, on, randn
from tests.tolerances import UNIT_ROUNDOFF, accumulation, stored
from wavemix_kernels.ops.norm import batch_norm, pooled

SHAPES = ((1, 1, 1, 1), (2, 3, 5, 7), (1, 35, 2, 3), (2, 5, 1, 9), (3, 8, 9, 1), (2, 48, 3, 21), (3, 24, 7, 7))
#: More images than a program takes at once, and pixels than a tile has.
MANY = ((600, 3, 1, 2), (2, 16, 40, 33))
WITHOUT_CPU = {name: types for name, types in Contract.dtypes.items() if name in ("reference", "triton")}
FAR = {"triton": (torch.float16,)}


def averages(image: Tensor) -> Tensor:
    return image.mean((2, 3))


def channels(t: Tensor) -> Tensor:
    return t[:, None, None]


class Pool(Contract):
    """Sums of all pixels, and a map of them; y lies 100 away from zero."""

    name = "batch_norm_pool"
    dtypes = WITHOUT_CPU
    axes: ClassVar[Any] = {"shape": SHAPES, "layout": (*LAYOUTS, "expanded"), "other": tuple(LAYOUTS)}

    def inputs(self, case: Any, device: str) -> Any:
        scale, shift = (randn(case.shape[1], seed=i).to(device, accumulation(case.dtype)) for i in (1, 2))
        y, x = randn(*case.shape, seed=3) + 100, randn(*case.shape, seed=4)
        y, x = (image(t, case.dtype, device, order) for t, order in ((y, case.layout), (x, case.other)))
        return {"y": y, "scale": scale, "shift": shift, "x": x}

    def run(self, case: Any, tensors: Any, backend: str) -> Any:
        y, scale, shift, x = tensors.values()
        out, means = pooled.forward(y, batch_norm.Affine(scale, shift), x, backend)
        assert out.dtype == x.dtype
        assert means.dtype == accumulation(x.dtype)
        return {"out": out, "means": means}

    def exact(self, case: Any, t: Any) -> Any:
        means = averages(t["y"])
        return {"out": (means * t["scale"] + t["shift"] + averages(t["x"]))[:, :, None, None], "means": means}

    def bounds(self, case: Any, t: Any, cotangents: Any, exact: Any, backend: str) -> Any:
        u = UNIT_ROUNDOFF[accumulation(case.dtype)] * (2 if case.dtype == torch.float64 else 1)
        terms = case.shape[2] * case.shape[3] + 4
        y, x = averages(t["y"].abs()), averages(t["x"].abs())
        off = terms * u * (y * t["scale"].abs() + x) + 4 * u * t["shift"].abs()
        out = exact["out"].abs()[:, :, 0, 0] + off
        return {"out": (off + stored(out, case.dtype, backend))[:, :, None, None], "means": terms * u * y}


class Backward(Contract):
    """Gradients of both images and of the parameters; y lies 100 away from zero."""

    name = "batch_norm_pool_backward"
    dtypes = WITHOUT_CPU
    axes: ClassVar[Any] = {"shape": SHAPES, "layout": tuple(LAYOUTS), "weighted": (False, True)}

    def inputs(self, case: Any, device: str) -> Any:
        c, wide = case.shape[1], accumulation(case.dtype)
        y = image(randn(*case.shape) + 100, case.dtype, device, case.layout)
        return {
            "grad": randn(case.shape[0], c, 1, 1, seed=1).to(device, case.dtype),
            "means": averages(y.double()).to(wide),
            "y": y, "mean": y.double().mean((0, 2, 3)).to(wide),
            "invstd": (0.5 + randn(c, seed=2).abs()).to(device, wide),
            "weight": randn(c, seed=3).to(device, case.dtype) if case.weighted else None,
        }  # fmt: skip

    def run(self, case: Any, tensors: Any, backend: str) -> Any:
        made = pooled.backward(*tensors.values(), backend)
        assert made[0].shape == made[1].shape == tensors["y"].shape
        return dict(zip(("x", "y", "weight", "bias"), made, strict=True))

    def solve(self, case: Any, t: Any) -> tuple[Any, Any]:
        g, y, mean, invstd = t["grad"][:, :, 0, 0], t["y"], t["mean"], t["invstd"]
        u = UNIT_ROUNDOFF[accumulation(case.dtype)] * (2 if case.dtype == torch.float64 else 1)
        images, positions = len(y), y.shape[2] * y.shape[3]
        a = invstd if t["weight"] is None else invstd * t["weight"]
        terms = g * (t["means"] - mean) * invstd
        exact = {"weight": terms.sum(0), "bias": g.sum(0)}
        far = g.abs() * (t["means"].abs() + mean.abs()) * invstd
        error = {"weight": (images + 6) * u * far.sum(0), "bias": images * u * g.abs().sum(0)}
        share = 1 / max(images * positions, 1)
        one = (g / max(positions, 1))[:, :, None, None]
        exact["x"] = one.expand(y.shape)
        error["x"] = 2 * u * one.abs().expand(y.shape)
        xhat = (y - channels(mean)) * channels(invstd)
        of_g, of_gx = (channels(exact[name]) * share for name in ("bias", "weight"))
        exact["y"] = channels(a) * (one - of_g - xhat * of_gx)
        far = (y.abs() + 2 * channels(mean).abs()) * channels(invstd)  # they are large and nearly cancel
        sizes = one.abs() + of_g.abs() + far * of_gx.abs()
        wrong = share * (channels(error["bias"]) + far * channels(error["weight"]))
        error["y"] = channels(a).abs() * (8 * u * sizes + wrong)
        return exact, error

    def exact(self, case: Any, tensors: Any) -> Any:
        return self.solve(case, tensors)[0]

    def bounds(self, case: Any, t: Any, cotangents: Any, exact: Any, backend: str) -> Any:
        error = self.solve(case, t)[1]
        rounded = stored(exact["x"].abs() + error["x"], case.dtype, backend)
        error["x"] = error["x"] + rounded
        a = t["invstd"] if t["weight"] is None else t["invstd"] * t["weight"]
        error["y"] = error["y"] + channels(a).abs() * rounded  # what goes into the line is what x gets
        error["y"] = error["y"] + stored(exact["y"].abs() + error["y"], case.dtype, backend)
        for name in ("weight", "bias") if case.weighted else ():
            error[name] = error[name] + stored(exact[name].abs() + error[name], case.dtype, backend)
        return error


FEW: Any = {"shape": ((2, 3, 4, 5),), "layout": ("nchw",)}
EMPTY: Any = {"shape": ((0, 3, 4, 4),), "layout": ("nchw",)}
FARTHER: Any = {"shape": ((2, 3, 2, 3),), "layout": EVERY_AXIS}
BOTH: Any = {"shape": MANY, "layout": ("nchw", "channels_last")}
test_contract = each.case(Pool(), Backward())
test_many = each.case(Pool(other=("channels_last",), **BOTH), Backward(**BOTH))
test_repeats = each.backend_repeats(Pool(WITHOUT_CPU), Backward(WITHOUT_CPU))
test_offsets_beyond_32_bits = each.case(
    Pool(FAR, other=("far_channels",), **FARTHER), Backward(FAR, weighted=(True,), **FARTHER)
)
test_empty_batch = each.empty_batch(Pool(other=("nchw",), **EMPTY), Backward(**EMPTY))
test_operators = each.operator(Pool(other=("nchw",), **FEW), Backward(weighted=(True,), **FEW))


@on("triton")
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_agrees_with_torch(backend: str, device: str, layout: str) -> None:
    """Together with the batch's statistics it is what modules of torch give, forward and backward."""
    y = image(randn(4, 10, 6, 7) + 2, device=device, layout=layout).requires_grad_()
    x = image(randn(4, 10, 6, 7, seed=1), device=device, layout=layout).requires_grad_()
    weight, bias = (randn(10, seed=i).to(device).requires_grad_() for i in (2, 3))
    norm = torch.nn.functional.batch_norm(y, None, None, weight, bias, training=True, eps=1e-5)
    expected = torch.nn.functional.adaptive_avg_pool2d(norm + x, 1)
    grad = randn(4, 10, 1, 1, seed=4).to(device)
    wanted = torch.autograd.grad(expected, (x, y, weight, bias), grad)
    y, x, weight, bias = (t.detach() for t in (y, x, weight, bias))
    of = batch_norm.stats(y, weight, bias, 1e-5, backend)
    out, means = pooled.forward(y, batch_norm.Affine(of.scale, of.shift), x, backend)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    made = pooled.backward(grad, means, y, of.mean, of.invstd, weight, backend)
    for got, want in zip(made, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
