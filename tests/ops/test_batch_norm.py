"""The passes of batch normalisation on every backend: statistics, affine map with a residual, backward."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ops import each
from tests.ops.contract import EVERY_AXIS, LAYOUTS, WITHOUT_CUDA, Case, Contract, image, on, randn
from tests.tolerances import DTYPES, UNIT_ROUNDOFF, accumulation, assert_within, stored
from wavemix_kernels.ops.norm import batch_norm
from wavemix_kernels.ops.norm import running as running_statistics

ops: Any = torch.ops.wavemix_kernels
SHAPES = ((1, 1, 1, 1), (2, 3, 5, 7), (1, 35, 2, 3), (2, 5, 1, 9), (6, 8, 1, 1), (1, 1, 9, 40))
#: On the CPU alone: the interpreter has a program for each channel.
WIDE = {"dtypes": {"cpu": DTYPES}, "shape": ((2, 130, 3, 3), (2, 1100, 2, 1))}
BACKENDS = {name: types for name, types in Contract.dtypes.items() if name != "cuda"}


def channels(t: Tensor) -> Tensor:
    return t[:, None, None]


def cpu_stats_bounds(mean: Tensor, var: Tensor, u: float) -> dict[str, Tensor]:
    """Sums of up to 1024 values by four lanes (SSE) are chains of 256 additions in the arithmetic type.

    Deviations are taken from a running mean, whose distances from the tiles' means add up to no more than twice the sum
    of squares (three times with that sum itself); means of tiles err like the deviations they are made of. Tiles are
    merged in double, and no channel here is cut into more than 64: each merge rounds the mean, and that enters the
    variance through the tile's distance from it.
    """
    spread, merged = var.sqrt(), 64 * UNIT_ROUNDOFF[torch.float64] * mean.abs()
    return {"mean": u * mean.abs() + merged + 3 * 260 * u * spread,
            "var": 3 * 260 * u * var + merged * (2 * spread + merged)}  # fmt: skip


class Stats(Contract):
    """Mean and biased variance. Data far from zero is hard: a difference of squares would have nothing left. And what
    follows from them: the inverse deviation and the affine map."""

    name = "batch_norm_stats"
    dtypes = BACKENDS
    axes: ClassVar[Any] = {
        "shape": SHAPES, "layout": (*LAYOUTS, "expanded"), "offset": (0, 1000), "weighted": (False, True),
    }  # fmt: skip
    eps = 1e-5

    def inputs(self, case: Case, device: str) -> Any:
        x = image(randn(*case.shape) + case.offset, case.dtype, device, case.layout)
        parameters = (randn(case.shape[1], seed=i).to(device, case.dtype) if case.weighted else None for i in (1, 2))
        return {"x": x, **dict(zip(("weight", "bias"), parameters, strict=True))}

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        return batch_norm.stats(*tensors.values(), self.eps, backend)._asdict()

    def exact(self, case: Case, tensors: Any) -> Any:
        values = tensors["x"].permute(1, 0, 2, 3).flatten(1).numpy().astype(np.longdouble)  # for float64
        mean, var = (torch.from_numpy(t.astype(np.float64)) for t in (values.mean(1), values.var(1)))
        return batch_norm.from_moments(mean, var, tensors["weight"], tensors["bias"], self.eps)._asdict()

    def bounds(self, case: Case, tensors: Any, cotangents: Any, exact: Any, backend: str) -> Any:
        """The mean's own error enters the variance squared, and as that of each deviation."""
        x, u = tensors["x"], UNIT_ROUNDOFF[accumulation(case.dtype)]
        if backend == "cpu":
            bounds = cpu_stats_bounds(exact["mean"], exact["var"], u)
        else:
            n, place = x[:, 0].numel(), 4 * u * x.abs().amax((0, 2, 3))
            deviation = (x - channels(exact["mean"])).abs().mean((0, 2, 3))
            bounds = {"mean": (n + 2) * u * x.abs().mean((0, 2, 3)),
                      "var": (n + 8) * u * exact["var"] + place * deviation + place**2}  # fmt: skip
        # An error of the variance counts most where that is too small; a sum, a root and a quotient round.
        most = ((exact["var"] - bounds["var"]).clamp_min(0) + self.eps).rsqrt()
        bounds["invstd"] = most - exact["invstd"] + 8 * u * most
        weight = 1 if tensors["weight"] is None else tensors["weight"].abs()
        bounds["scale"] = weight * (bounds["invstd"] + u * most)
        size = exact["scale"].abs() + bounds["scale"]
        terms = exact["mean"].abs() * size + (0 if tensors["bias"] is None else tensors["bias"].abs())
        off = exact["mean"].abs() * bounds["scale"] + bounds["mean"] * size
        return bounds | {"shift": off + 4 * u * (terms + off)}


class Apply(Contract):
    """x * scale + shift + residual: four roundings of the terms' sizes at most."""

    name = "batch_norm_apply"
    dtypes = BACKENDS
    axes: ClassVar[Any] = {
        "shape": SHAPES, "layout": tuple(LAYOUTS), "other": (None, *LAYOUTS), "last": (False, True),
    }  # fmt: skip

    def inputs(self, case: Case, device: str) -> Any:
        wide = accumulation(case.dtype)
        scale, shift = (randn(case.shape[1], seed=i).to(device, wide) for i in (1, 2))
        x, other = (randn(*case.shape, seed=i) for i in (3, 4))
        residual = image(other, case.dtype, device, case.other) if case.other else None
        return {"x": image(x, case.dtype, device, case.layout), "scale": scale, "shift": shift, "residual": residual}

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        return {"out": ops.batch_norm_apply(*tensors.values(), case.last, backend)}

    def terms_of(self, t: Any) -> list[Tensor]:
        shift = channels(t["shift"]).expand_as(t["x"])
        return [t["x"] * channels(t["scale"]), shift, *([] if t["residual"] is None else [t["residual"]])]

    def exact(self, case: Case, tensors: Any) -> Any:
        return {"out": torch.stack(self.terms_of(tensors)).sum(0)}

    def bounds(self, case: Case, tensors: Any, cotangents: Any, exact: Any, backend: str) -> Any:
        terms = torch.stack(self.terms_of(tensors)).abs().sum(0)
        off = 4 * UNIT_ROUNDOFF[accumulation(case.dtype)] * terms
        return {"out": off + stored(exact["out"].abs() + off, case.dtype, backend)}

    def also(self, case: Case, tensors: Any, results: Any) -> None:
        order = torch.channels_last if case.last else torch.contiguous_format
        assert results["out"].is_contiguous(memory_format=order)


class Backward(Contract):
    """Gradients of x, weight and bias from sums over the batch; y lies 100 away from zero."""

    name = "batch_norm_backward"
    dtypes = BACKENDS
    axes: ClassVar[Any] = {
        "shape": SHAPES, "layout": tuple(LAYOUTS), "other": (*LAYOUTS, "expanded"), "last": (False, True),
        "weighted": (False, True), "batch_stats": (False, True),
    }  # fmt: skip

    def inputs(self, case: Case, device: str) -> Any:
        c, wide = case.shape[1], accumulation(case.dtype)
        x = image(randn(*case.shape) + 100, case.dtype, device, case.layout)
        return {
            "grad": image(randn(*case.shape, seed=1), case.dtype, device, case.other), "x": x,
            "mean": x.double().mean((0, 2, 3)).to(wide), "invstd": (0.5 + randn(c, seed=2).abs()).to(device, wide),
            "weight": randn(c, seed=3).to(device, wide) if case.weighted else None,
        }  # fmt: skip

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        made = batch_norm.backward(*tensors.values(), case.batch_stats, case.last, backend)
        return dict(zip(("x", "weight", "bias"), made, strict=True))

    def solve(self, case: Case, t: Any, backend: str = "") -> tuple[Any, Any]:
        g, x, mean, invstd = t["grad"], t["x"], channels(t["mean"]), channels(t["invstd"])
        u, n = UNIT_ROUNDOFF[accumulation(case.dtype)] * (2 if case.dtype == torch.float64 else 1), g[:, 0].numel()
        xhat = (x - mean) * invstd
        a = invstd if t["weight"] is None else invstd * channels(t["weight"])
        exact = {"weight": (g * xhat).sum((0, 2, 3)), "bias": g.sum((0, 2, 3))}
        size = (g * xhat).abs().sum((0, 2, 3))
        if backend != "cpu":  # which takes differences first, of numbers about 100
            size = size + (g * (x.abs() + mean.abs()) * invstd).abs().sum((0, 2, 3))
        error = {"weight": (n + 4) * u * size, "bias": n * u * g.abs().sum((0, 2, 3))}
        share = 1 / n if case.batch_stats and n else 0.0
        mean_g, mean_gx = (share * channels(exact[name]) for name in ("bias", "weight"))
        exact["x"] = a * (g - mean_g - xhat * mean_gx)
        far = (x.abs() + 2 * mean.abs()) * invstd  # b * x and b * mean are large and nearly cancel
        sums = a.abs() * (g.abs() + mean_g.abs() + far * mean_gx.abs())
        wrong = share * a.abs() * (channels(error["bias"]) + far * channels(error["weight"]))
        error["x"] = 8 * u * sums + wrong
        return exact, error

    def exact(self, case: Case, tensors: Any) -> Any:
        return self.solve(case, tensors)[0]

    def bounds(self, case: Case, tensors: Any, cotangents: Any, exact: Any, backend: str) -> Any:
        error = self.solve(case, tensors, backend)[1]
        error["x"] = error["x"] + stored(exact["x"].abs() + error["x"], case.dtype, backend)
        return error


MANY = {"shape": ((3, 16, 48, 28), (4, 130, 9, 9)), "layout": ("nchw", "channels_slice")}
EMPTY: Any = {"shape": ((0, 3, 4, 4), (2, 3, 0, 4)), "layout": ("nchw",)}
FEW: Any = {"shape": ((2, 3, 4, 5),), "layout": ("nchw",)}
BOTH = ("nchw", "channels_last")
test_contract = each.case(Stats(), Apply(), Backward())
test_wide = each.case(Stats(**WIDE), Apply(**WIDE), Backward(**WIDE))
test_repeats = each.backend_repeats(Stats(), Backward())
FARTHER: Any = {"shape": ((2, 3, 2, 3),), "layout": EVERY_AXIS}
test_offsets_beyond_32_bits = each.case(
    Stats(WITHOUT_CUDA, offset=(0,), weighted=(False,), **FARTHER),
    Apply(WITHOUT_CUDA, other=("far_channels",), **FARTHER),
    Backward(WITHOUT_CUDA, other=("far_channels",), batch_stats=(True,), **FARTHER),
)
test_threads = each.thread_count(Stats(offset=(0,), **MANY), Backward(other=("nchw", "cropped"), **MANY), same=False)
test_empty_batch = each.empty_batch(Stats(**EMPTY), Apply(other=BOTH, **EMPTY), Backward(other=("nchw",), **EMPTY))
test_operators = each.operator(
    Stats(offset=(0,), **FEW),
    Apply(other=BOTH, **FEW),
    Backward(other=BOTH, weighted=(False,), batch_stats=(True,), **FEW),
)


def awkward() -> dict[str, Tensor]:
    """Data whose level changes along the way, so that no early mean is a good shift for the rest."""
    steps = randn(6, 5, 64, 64) + 1e3
    steps[:3] = 0
    border = randn(4, 20, 48, 48) + 1e3
    border[:, :, :2] = border[:, :, :, :2] = 0
    ramp = randn(2, 7, 90, 90) + torch.linspace(0, 1e4, 90, dtype=torch.float64)[:, None]
    outlier = randn(2, 3, 40, 40)
    outlier[0, :, 0, 0] = 1e6
    constant = torch.full((3, 4, 40, 30), 1234.5678, dtype=torch.float64)
    return {"steps": steps, "border": border, "ramp": ramp, "outlier": outlier, "constant": constant,
            "far": randn(2, 2, 40, 40) + 2.0**20}  # fmt: skip


AWKWARD = [("cpu", name) for name in awkward()] + [("triton", "constant"), ("triton", "far")]  # slow in the interpreter


@pytest.mark.parametrize("backend, name", AWKWARD, indirect=["backend"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_stats_of_awkward_data(backend: str, device: str, layout: str, name: str) -> None:
    x = image(awkward()[name], torch.float32, device, layout)
    wide, u = x.double().cpu(), UNIT_ROUNDOFF[torch.float32]
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    bounds = cpu_stats_bounds(mean, var, u)
    if backend != "cpu":
        # A tile's mean is off by half a unit in its last place, or by its sum's roundings where nothing differs; that
        # error enters squared.
        sums, place = 260 * u * wide.abs().amax((0, 2, 3)), 2**1.5 * u * wide.abs().amax((0, 2, 3))
        off = sums if name == "constant" else place
        bounds = {"mean": sums, "var": bounds["var"] + 1e-3 * var + off**2}
    made = batch_norm.stats(x, None, None, 1e-5, backend)
    for key, got, want in zip(("mean", "var"), made[:2], (mean, var), strict=True):
        assert_within(got, want, bounds[key], key)


@on("cpu", "triton")
def test_stats_stay_in_their_channel(backend: str, device: str) -> None:
    for layout in ("nchw", "channels_last"):
        x = image(randn(2, 12, 25, 20) + 5, torch.float32, device, layout)
        clean = batch_norm.stats(x, None, None, 1e-5, backend)
        x[1, 5, 3, 3], x[1, 7, 0, 0] = float("nan"), float("inf")
        others = torch.ones(12, dtype=torch.bool, device=device)
        others[[5, 7]] = False
        for got, want in zip(batch_norm.stats(x, None, None, 1e-5, backend), clean, strict=True):
            assert torch.equal(got[others], want[others])
            assert not got[[5, 7]].isfinite().any()


@on("cpu", "triton")
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_agrees_with_torch(backend: str, device: str, layout: str) -> None:
    """Together the passes are training-mode batch normalisation, forward and backward."""
    x = image(randn(4, 10, 12, 14) + 2, device=device, layout=layout).requires_grad_()
    weight, bias = (randn(10, seed=i).to(device).requires_grad_() for i in (1, 2))
    expected = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=1e-5)
    g = image(randn(*x.shape, seed=3), device=device)
    wanted = torch.autograd.grad(expected, (x, weight, bias), g)
    y = x.detach()
    of = batch_norm.stats(y, weight.detach(), bias.detach(), 1e-5, backend)
    out = ops.batch_norm_apply(y, of.scale, of.shift, None, layout == "channels_last", backend)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    made = batch_norm.backward(g, y, of.mean, of.invstd, weight.detach(), True, layout == "channels_last", backend)
    for got, want in zip(made, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_follow_torch(momentum: float | None) -> None:
    """Biased variance normalises, the unbiased one runs."""
    x = randn(3, 4, 5, 2)
    module = torch.nn.BatchNorm2d(4, momentum=momentum).double()
    mean, var, seen = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64), torch.tensor(0)
    for scale in (1, 2):
        module(scale * x)
        of = batch_norm.stats(scale * x, None, None, 1e-5, "cpu")
        running_statistics.update([running_statistics.Move(mean, var, seen, of.mean, of.var, 30)], momentum)
    torch.testing.assert_close(mean, module.running_mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(var, module.running_var, rtol=1e-13, atol=1e-13)
    assert seen == 2


@pytest.mark.parametrize("backend", ["triton", "reference"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [0.3, 0.75])
def test_running_statistics_of_several_norms_together(
    backend: str, device: str, dtype: torch.dtype, momentum: float
) -> None:
    """A GPU's one launch, or few, gives what updates one by one in float64 give: three roundings of two values, and
    the last one. More norms than a launch takes, more channels than a program."""
    update = running_statistics._update_by_plan if backend == "triton" else running_statistics._by_operators
    moves, want = [], []
    for i, (c, values) in enumerate(((4, 30), (3, 2), (5, 1), (300, 7), (2, 9))):
        running = torch.zeros(c, dtype=dtype), torch.ones(c, dtype=dtype), torch.tensor(7)
        batch = randn(c, seed=i).to(accumulation(dtype)), randn(c, seed=i + 1).to(accumulation(dtype)).abs()
        given = batch if i % 2 else (torch.stack((*batch, *batch[:1] * 3)), None)  # the rows of Statistics
        moves.append(running_statistics.Move(*(t if t is None else t.to(device) for t in (*running, *given)), values))
        exact = running_statistics.Move(
            *(t.double() if t.is_floating_point() else t.clone() for t in (*running, *batch)), values
        )
        running_statistics.update([exact], momentum)
        want.append(exact)
    update(moves, momentum)
    for move, exact in zip(moves, want, strict=True):
        assert move.batches == 8
        for running, value in ((move.running_mean, exact.running_mean), (move.running_var, exact.running_var)):
            size = value.abs() + 1 + 2 * (exact.var + exact.mean.abs())
            off = 4 * UNIT_ROUNDOFF[accumulation(dtype)] * size
            if dtype.itemsize == 2:
                off += stored(size, dtype, backend) * (2 if backend == "reference" else 1)  # the batch's, too
            assert_within(running, value, off, "running")


def test_running_statistics_of_tensors_without_values() -> None:
    """No kernel is launched."""
    with FakeTensorMode():
        move = running_statistics.Move(
            *(torch.empty(4) for _ in range(2)), torch.tensor(0), torch.empty(4), torch.empty(4), 9
        )
        running_statistics._update_by_plan([move], 0.1)
