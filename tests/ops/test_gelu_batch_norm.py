"""GELU and batch normalisation in one on every backend: output, statistics and gradients."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.ops import each
from tests.ops.contract import EVERY_AXIS, LAYOUTS, Contract, image, on, randn
from tests.tolerances import UNIT_ROUNDOFF, accumulation, stored
from wavemix_kernels.ops.common import plan
from wavemix_kernels.ops.norm import batch_norm, gelu_batch_norm

ops: Any = torch.ops.wavemix_kernels
SHAPES = ((1, 1, 1, 1), (2, 3, 5, 7), (1, 35, 2, 3), (2, 5, 1, 9), (6, 8, 1, 1), (2, 48, 3, 21), (3, 24, 7, 7))
EPS = 1e-2
BACKENDS: dict[str, Any] = {
    "reference": (torch.float64, torch.float32), "triton": (torch.float32, torch.float16, torch.bfloat16),
}  # fmt: skip
#: Of Triton's GELU and its derivative, in roundings of |x| and of 1 + |x| (triton_gelu.py), and of torch's in float64.
OFF = 8


def channels(t: Tensor) -> Tensor:
    return t[:, None, None]


def gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """And its derivative."""
    cdf = torch.special.ndtr(x)
    return x * cdf, cdf + x * torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5


def roundoff(case: Any) -> float:
    return UNIT_ROUNDOFF[accumulation(case.dtype)] * (2 if case.dtype == torch.float64 else 1)


class Forward(Contract):
    """The statistics' errors are those of sums, and of GELU's values; the output's follow from them."""

    name = "gelu_batch_norm"
    dtypes = BACKENDS
    axes: ClassVar[Any] = {"shape": SHAPES, "layout": tuple(LAYOUTS), "offset": (0, 30), "weighted": (False, True)}

    def inputs(self, case: Any, device: str) -> Any:
        """Values far from zero are GELU's own, and their mean far above their deviation."""
        x = image(2 * randn(*case.shape) + case.offset, case.dtype, device, case.layout)
        weight, bias = (randn(case.shape[1], seed=i).to(device, case.dtype) if case.weighted else None for i in (1, 2))
        return {"x": x, "weight": weight, "bias": bias}

    def run(self, case: Any, tensors: Any, backend: str) -> Any:
        out, rows = ops.gelu_batch_norm(*tensors.values(), EPS, backend)
        return {"out": out, **batch_norm.Statistics(*rows.unbind(0))._asdict()}

    def exact(self, case: Any, t: Any) -> Any:
        value, _ = gelu(t["x"])
        var, mean = torch.var_mean(value, (0, 2, 3), correction=0)
        of = batch_norm.from_moments(mean, var, t["weight"], t["bias"], EPS)
        return {"out": value * channels(of.scale) + channels(of.shift), **of._asdict()}

    def bounds(self, case: Any, t: Any, cotangents: Any, exact: Any, backend: str) -> Any:
        u, n, (value, _) = roundoff(case), t["x"][:, 0].numel(), gelu(t["x"])
        place = OFF * u * t["x"].abs()  # of a value
        most = place.amax((0, 2, 3))
        deviation = (value - channels(exact["mean"])).abs().mean((0, 2, 3))
        error = {
            "mean": (n + 4) * u * value.abs().mean((0, 2, 3)) + most,
            "var": (n + 8) * u * exact["var"] + 2 * (most + 2 * u * exact["mean"].abs()) * deviation + 4 * most**2,
        }
        highest = ((exact["var"] - error["var"]).clamp_min(0) + EPS).rsqrt()
        error["invstd"] = highest - exact["invstd"] + 8 * u * highest
        weight = torch.ones_like(highest) if t["weight"] is None else t["weight"].abs()
        error["scale"] = weight * (error["invstd"] + u * highest)
        size = exact["scale"].abs() + error["scale"]
        terms = exact["mean"].abs() * size + (0 if t["bias"] is None else t["bias"].abs())
        error["shift"] = exact["mean"].abs() * error["scale"] + error["mean"] * size + 4 * u * terms
        spread = (value - channels(exact["mean"])).abs()  # what an error of the scale is of: the mean is taken off
        off = channels(error["scale"]) * spread + channels(size) * (place + channels(error["mean"]))
        off = off + 4 * u * (value.abs() * channels(size) + channels(terms))
        return error | {"out": off + stored(exact["out"].abs() + off, case.dtype, backend)}

    def also(self, case: Any, tensors: Any, results: Any) -> None:
        last = case.layout in ("channels_last", "channels_slice") and case.shape[1] > 1 and case.shape[3] > 1
        if case.layout == "nchw" or last:
            order = torch.channels_last if last else torch.contiguous_format
            assert results["out"].is_contiguous(memory_format=order)


class Backward(Contract):
    """Gradients of x, weight and bias from sums over the batch."""

    name = "gelu_batch_norm_backward"
    dtypes = BACKENDS
    axes: ClassVar[Any] = {
        "shape": SHAPES, "layout": tuple(LAYOUTS), "other": (*LAYOUTS, "expanded"), "weighted": (False, True),
    }  # fmt: skip

    def inputs(self, case: Any, device: str) -> Any:
        c, wide = case.shape[1], accumulation(case.dtype)
        x = image(2 * randn(*case.shape), case.dtype, device, case.layout)
        return {
            "grad": image(randn(*case.shape, seed=1), case.dtype, device, case.other), "x": x,
            "mean": gelu(x.double())[0].mean((0, 2, 3)).to(wide),
            "invstd": (0.5 + randn(c, seed=2).abs()).to(device, wide),
            "weight": randn(c, seed=3).to(device, case.dtype) if case.weighted else None,
        }  # fmt: skip

    def run(self, case: Any, tensors: Any, backend: str) -> Any:
        dx, parameters = ops.gelu_batch_norm_backward(*tensors.values(), backend)
        return {"x": dx, "weight": parameters[0], "bias": parameters[1]}

    def solve(self, case: Any, t: Any) -> tuple[Any, Any]:
        u, g, x, mean, invstd = roundoff(case), t["grad"], t["x"], channels(t["mean"]), channels(t["invstd"])
        (value, slope), n = gelu(x), g[:, 0].numel()
        place, steep = OFF * u * x.abs(), OFF * u * (1 + x.abs())
        xhat = (value - mean) * invstd
        a = invstd if t["weight"] is None else invstd * channels(t["weight"])
        exact = {"weight": (g * xhat).sum((0, 2, 3)), "bias": g.sum((0, 2, 3))}
        far = (value.abs() + mean.abs()) * invstd
        error = {
            "weight": ((n + 4) * u * g.abs() * far + g.abs() * place * invstd).sum((0, 2, 3)),
            "bias": n * u * g.abs().sum((0, 2, 3)),
        }
        share = 1 / max(n, 1)
        of_g, of_gx = (share * channels(exact[name]) for name in ("bias", "weight"))
        line = a * (g - of_g - xhat * of_gx)
        exact["x"] = slope * line
        sizes = a.abs() * (g.abs() + of_g.abs() + (far + mean.abs() * invstd) * of_gx.abs())
        wrong = share * a.abs() * (channels(error["bias"]) + (far + mean.abs() * invstd) * channels(error["weight"]))
        off = 8 * u * sizes + wrong + a.abs() * invstd * of_gx.abs() * place
        error["x"] = (slope.abs() + steep) * off + steep * line.abs()
        return exact, error

    def exact(self, case: Any, tensors: Any) -> Any:
        return self.solve(case, tensors)[0]

    def bounds(self, case: Any, t: Any, cotangents: Any, exact: Any, backend: str) -> Any:
        error = self.solve(case, t)[1]
        for name in ("x", "weight", "bias") if case.weighted else ("x",):
            error[name] = error[name] + stored(exact[name].abs() + error[name], case.dtype, backend)
        return error


FEW: Any = {"shape": ((2, 3, 4, 5),), "layout": ("nchw",), "weighted": (True,)}
EMPTY: Any = {"shape": ((0, 3, 4, 4),), "layout": ("nchw",), "weighted": (True,)}
FARTHER: Any = {"shape": ((2, 3, 2, 3),), "layout": EVERY_AXIS, "weighted": (True,)}
FAR: dict[str, Any] = {"triton": (torch.float16,)}
test_contract = each.case(Forward(), Backward())
test_offsets_beyond_32_bits = each.case(
    Forward(FAR, offset=(0,), **FARTHER), Backward(FAR, other=("far_channels",), **FARTHER)
)
test_empty_batch = each.empty_batch(Forward(offset=(0,), **EMPTY), Backward(other=("nchw",), **EMPTY))
test_repeats = each.backend_repeats(Forward(), Backward())
test_operators = each.operator(
    Forward({"triton": (torch.float32,)}, offset=(0,), **FEW),
    Backward({"triton": (torch.float32,)}, other=("nchw",), **FEW),
)


@on("triton")
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("compiled", [False, True])
def test_agrees_with_torch(backend: str, device: str, layout: str, compiled: bool) -> None:
    """It is the modules, forward and backward; the statistics have no gradient."""
    x = image(2 * randn(4, 10, 12, 14), torch.float32, device, layout).requires_grad_()
    weight, bias = (randn(10, seed=i).to(device, torch.float32).requires_grad_() for i in (1, 2))
    grad = image(randn(*x.shape, seed=3), torch.float32, device)
    activated = torch.nn.functional.gelu(x)
    expected = torch.nn.functional.batch_norm(activated, None, None, weight, bias, True, 0.1, EPS)
    wanted = torch.autograd.grad(expected, (x, weight, bias), grad)
    run = (
        torch.compile(gelu_batch_norm.fused, backend="aot_eager", fullgraph=True) if compiled else gelu_batch_norm.fused
    )
    out, of = run(x, weight, bias, EPS, backend)
    assert out.stride() == x.stride()
    assert not of.mean.requires_grad
    torch.testing.assert_close(of.mean, activated.detach().mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for got, want in zip(torch.autograd.grad(out, (x, weight, bias), grad), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend, serves", [("triton", True), ("reference", False), ("auto", False), ("cpu", False)])
def test_serves_where_kernels_are(backend: str, serves: bool) -> None:
    """A CPU has none, but for the interpreter's by name."""
    assert gelu_batch_norm.serves(torch.empty(1, 4, 2, 2), backend) == serves


@on("triton")
def test_transforms_are_left_to_the_modules(backend: str, device: str) -> None:
    """Its function has neither batching rules nor tangents."""
    x, served = torch.ones(1, 4, 2, 2, device=device), []

    def ask(t: Tensor) -> Tensor:
        served.append(gelu_batch_norm.serves(t, backend))
        return t.sum()

    ask(x)
    torch.func.grad(ask)(x)
    torch.func.vmap(ask)(x[None])
    with torch.autograd.forward_ad.dual_level():
        ask(x)
    assert served == [True, False, False, False]


def test_goes_by_plans(device: str) -> None:
    x = image(randn(2, 8, 6, 5), torch.float32, device, "channels_last").requires_grad_()
    weight, bias = (randn(8, seed=i).to(device, torch.float32).requires_grad_() for i in (1, 2))
    grad = image(randn(2, 8, 6, 5, seed=3), torch.float32, device, "channels_last")
    made = []
    with plan.everywhere():
        for _ in range(3):
            out, of = gelu_batch_norm.fused(x, weight, bias, EPS, "triton")
            made.append([out, *of, *torch.autograd.grad(out, (x, weight, bias), grad)])
        assert [len(plan.tables[f"_GeluBatchNorm.{way}"].plans) for way in ("forward", "backward")] == [1, 1]
    for later in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(later, made[0], strict=True))
