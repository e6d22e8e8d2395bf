"""The transposed convolution, its gradients and the BatchNorm around it on every backend (kernels: tests/kernels)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.cpu import minimal_filtering
from tests.ops import each
from tests.ops.contract import LAYOUTS, SHORT, Case, Contract, image, randn
from tests.ops.test_batch_norm import Backward
from tests.tolerances import UNDERFLOW, UNIT_ROUNDOFF, accumulation, stored, sum_bound
from wavemix_kernels import _native
from wavemix_kernels.ops.deconv import op

# n, f, o, h, w: odd, thin, one pixel, two blocks of pixels, of channels.
NARROW = ((1, 1, 1, 1, 1), (2, 2, 3, 3, 5), (1, 5, 2, 20, 1), (2, 20, 12, 5, 7), (1, 8, 31, 3, 2), (3, 5, 6, 1, 4))
#: Wide enough for the CPU's minimal filtering.
WIDE = ((2, 48, 40, 3, 5), (1, 67, 33, 7, 2), (3, 36, 70, 1, 2), (2, 16, 80, 8, 8))
BACKENDS = {name: types for name, types in Contract.dtypes.items() if name != "cuda"}


def transposed(u: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv_transpose2d(u, weight, bias, 2, 1)


def filtered(case: Case, backend: str) -> bool:
    """Whether the CPU's minimal filtering runs: its sums have more terms than the definition's."""
    return backend == "cpu" and case.size[1] * case.size[2] > _native.core.DECONV_NARROW


def roundings(case: Case, backend: str) -> tuple[int, int, int]:
    """Terms of an output, of a gradient of u and of one of the weight. Minimal filtering has a quarter of the products,
    between sums of up to 12 terms."""
    n, f, o, h, w = case.size
    return (f + 12, 4 * o + 12, n * h * w + 12) if filtered(case, backend) else (4 * f + 1, 16 * o + 1, n * h * w + 1)


class Deconv(Contract):
    """Forward with all gradients, with statistics, and with an image added."""

    name = "deconv"
    dtypes = BACKENDS
    axes: ClassVar[Any] = {
        "size": NARROW, "layout": tuple(LAYOUTS), "bias": (None, 0, 100),  # 100: far from 0 is hard for a variance
        "cotangents": ("nchw", "channels_last", "channels_slice"),
    }  # fmt: skip
    interpreted: ClassVar[Any] = Contract.interpreted | {"size": (*NARROW, *WIDE[1:3])}
    products = True
    differentiable = ("u", "weight", "bias")

    def inputs(self, case: Case, device: str) -> Any:
        n, f, o, h, w = case.size
        bias = None if case.bias is None else (case.bias + randn(o)).to(device, case.dtype)
        order = case.layout if case.layout == "channels_last" else "nchw"
        return {
            "u": image(randn(n, f, h, w), case.dtype, device, case.layout),
            "weight": image(randn(f, o, 4, 4) / f**0.5, case.dtype, device, order), "bias": bias,
            "residual": image(randn(n, o, 2 * h, 2 * w, seed=8), case.dtype, device, case.cotangents),
        }  # fmt: skip

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        leaves = [tensors[name] for name in self.differentiable]
        y = op.fused(*leaves, backend)
        with torch.no_grad():
            plus = op.plus_residual(*leaves, tensors["residual"], backend)
            same, (mean, var, *_) = torch.ops.wavemix_kernels.deconv_stats(*leaves, None, None, 1e-5, backend)
        assert torch.equal(same, y)
        # Statistics of the values before or after they are stored: here compared with those of the stored.
        wide = y.detach().double()
        exact_var, exact_mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, plus))
        return {"y": y, "plus": plus, "mean_off": (mean - exact_mean).to(mean.dtype),
                "var_off": (var - exact_var).to(var.dtype)}  # fmt: skip

    def exact(self, case: Case, tensors: Any) -> Any:
        y = transposed(*(tensors[name] for name in self.differentiable))
        nothing = 0 * y.detach().mean((0, 2, 3))  # NaN for no pixels
        return {"y": y, "plus": y + tensors["residual"], "mean_off": nothing, "var_off": nothing}

    def bounds(self, case: Case, tensors: Any, cotangents: Any, exact: Any, backend: str) -> Any:
        n, _, _, h, w = case.size
        u, weight = tensors["u"].detach(), tensors["weight"].detach()
        offset = 0 if tensors["bias"] is None else tensors["bias"].detach().abs()[:, None, None]
        g = cotangents["y"].abs()
        if filtered(case, backend):
            size = minimal_filtering.forward(u, weight, sizes=True) + offset
            size_u, size_weight = minimal_filtering.gradient_sizes(u, weight, g)
        else:
            size = transposed(u.abs(), weight.abs()) + offset
            size_u = F.conv2d(g, weight.abs(), None, 2, 1)
            size_weight = weight_gradient(g, u.abs(), weight)
        terms, terms_u, terms_weight = roundings(case, backend)
        parts = {
            "y": (terms, size), "plus": (terms + 1, size + tensors["residual"].detach().abs()),
            "d_u": (terms_u, size_u), "d_weight": (terms_weight, size_weight),
            "d_bias": (4 * n * h * w, g.sum((0, 2, 3))),
        }  # fmt: skip
        bounds = {
            name: sum_bound(exact[name].detach(), s, terms, case.dtype, backend=backend)
            for name, (terms, s) in parts.items() if name in exact
        }  # fmt: skip
        if backend != "cpu":
            bounds["plus"] = bounds["plus"] + stored(exact["y"].detach(), case.dtype)  # the sum of two stored images
        # A part's mean errs by its roundings of the largest value, which enters the variance squared and as twice its
        # product with the deviations.
        y, count, r = exact["y"].detach(), 4 * n * h * w, UNIT_ROUNDOFF[accumulation(case.dtype)]
        stored_y = bounds["y"] if accumulation(case.dtype) != case.dtype else torch.zeros_like(y)
        largest, spread = y.abs().amax((0, 2, 3)), y.var((0, 2, 3), correction=0).sqrt()
        bounds["mean_off"] = (count + 2) * r * largest + stored_y.amax((0, 2, 3))
        error = (min(count, 256) + 2) * r * largest + stored_y.amax((0, 2, 3))
        bounds["var_off"] = (count + 8) * r * spread**2 + 2 * error * (2 * spread + error)
        return bounds

    def also(self, case: Case, tensors: Any, results: Any) -> None:
        if "d_weight" in results and tensors["weight"].shape[1] > 1:
            assert results["d_weight"].stride() == tensors["weight"].stride()


def weight_gradient(g: Tensor, u: Tensor, weight: Tensor) -> Tensor:
    weight = weight.detach().clone().requires_grad_()
    return torch.autograd.grad(transposed(u, weight), weight, g)[0]


class NormGradients(Contract):
    """All gradients from that of the BatchNorm's output: `a grad + b (y - mean) + d` is made where it is read."""

    name = "deconv_norm_backward"
    axes: ClassVar[Any] = {
        "size": NARROW, "layout": ("nchw", "channels_last", "channels_slice"), "weighted": (False, True),
        "batch_stats": (False, True), "cotangents": ("channels_last", "channels_slice", "nchw"),
    }  # fmt: skip
    dtypes: ClassVar[Any] = {"cpu": BACKENDS["cpu"], "triton": BACKENDS["triton"]}
    interpreted: ClassVar[Any] = Deconv.interpreted
    products = True

    def inputs(self, case: Case, device: str) -> Any:
        (n, f, o, h, w), wide = case.size, accumulation(case.dtype)
        y = image(randn(n, o, 2 * h, 2 * w, seed=2) + 1, case.dtype, device, "channels_last")
        return {
            "grad": image(randn(n, o, 2 * h, 2 * w), case.dtype, device, case.cotangents), "y": y,
            "mean": y.double().mean((0, 2, 3)).to(wide), "invstd": (0.5 + randn(o, seed=3).abs()).to(device, wide),
            "norm_weight": randn(o, seed=4).to(device, wide) if case.weighted else None,
            "u": image(randn(n, f, h, w, seed=1), case.dtype, device, case.layout),
            "weight": image(
                randn(f, o, 4, 4) / f**0.5, case.dtype, device, "channels_last" if case.weighted else "nchw"
            ),
        }  # fmt: skip

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        *norm, u, weight = tensors.values()
        assert op.folds(backend, u.shape[1], tensors["grad"])
        made = op.norm_backward(*norm, case.batch_stats, u, weight, backend)
        assert made.weight.shape[1] <= 1 or made.weight.stride() == weight.stride()
        return made._asdict()

    def solve(self, case: Case, t: Any, backend: str = "") -> tuple[Any, Any]:
        """The BatchNorm's gradients, exact and their errors."""
        norm = dict(zip(("grad", "x", "mean", "invstd", "weight"), t.values(), strict=False))
        return Backward().solve(case, norm, backend)

    def exact(self, case: Case, tensors: Any) -> Any:
        norm, u, weight = self.solve(case, tensors)[0], tensors["u"], tensors["weight"]
        return {"u": F.conv2d(norm["x"], weight, None, 2, 1), "weight": weight_gradient(norm["x"], u, weight),
                "norm_weight": norm["weight"], "norm_bias": norm["bias"]}  # fmt: skip

    def bounds(self, case: Case, tensors: Any, cotangents: Any, exact: Any, backend: str) -> Any:
        norm, errors = self.solve(case, tensors, backend)
        made, error, dtype = norm["x"], errors["x"], case.dtype
        u, weight = tensors["u"], tensors["weight"].abs()
        if accumulation(dtype) != dtype:  # rounded as an operand
            error = error + UNIT_ROUNDOFF[dtype] * made.abs() + UNDERFLOW[dtype]
        if filtered(case, backend):
            passed, size = (minimal_filtering.gradient_sizes(u, weight, x) for x in (error, made.abs() + error))
        else:
            passed, size = (
                (F.conv2d(x, weight, None, 2, 1), weight_gradient(x, u.abs(), weight))
                for x in (error, made.abs() + error)
            )
        bounds = {
            name: p + sum_bound(exact[name], s, k, dtype, backend=backend) + stored(p, dtype)
            for name, p, s, k in zip(("u", "weight"), passed, size, roundings(case, backend)[1:], strict=True)
        }
        return bounds | {"norm_weight": errors["weight"], "norm_bias": errors["bias"]}


#: Narrow images show what memory orders do to Triton's kernels; these have several blocks of channels.
INTERPRETED = Deconv.interpreted | {"layout": ("channels_last", "channels_slice"),
                                    "cotangents": ("channels_last", "channels_slice")}  # fmt: skip


class Wide(Deconv):
    interpreted: ClassVar[Any] = INTERPRETED


class WideGradients(NormGradients):
    interpreted: ClassVar[Any] = INTERPRETED


ONE = {"layout": ("channels_slice",), "cotangents": ("channels_last",)}
MANY = ((40, 8, 8, 7, 9), (1, 3, 5, 1, 301))
test_contract = each.case(Deconv(), NormGradients())
test_wide = each.case(Wide(size=WIDE, layout=("nchw", "channels_last", "channels_slice")), WideGradients(size=WIDE))
test_repeats = each.backend_repeats(*(of(size=WIDE[:1], **ONE) for of in (Deconv, NormGradients)))
test_threads = each.thread_count(Deconv(size=MANY, bias=(100,), **ONE))
test_threads_of_sums = each.thread_count(
    Deconv(size=((2, 64, 40, 24, 22),), bias=(100,), **ONE), NormGradients(size=MANY, **ONE), same=False
)
# |mean| 1e4 standard deviations: a difference of squares would err by 1e4^2 u = 6 of a variance of 1.
test_statistics_far_from_zero = each.case(
    Deconv({"triton": (torch.float32,), "cpu": (torch.float32,)}, size=((1, 16, 20, 9, 23),), bias=(1e4,), **ONE)
)
test_empty_batch = each.empty_batch(
    Deconv(size=((0, 8, 36, 3, 4), (0, 40, 36, 3, 4)), layout=("nchw",), bias=(0, None))
)
FAR = {"layout": ("far",), "cotangents": ("channels_last",), "bias": (None,)}
test_offsets_beyond_32_bits = each.case(
    Deconv({b: SHORT[b] for b in BACKENDS if b in SHORT}, size=((2, 4, 2, 2, 3),), **FAR)
)
FEW: Any = {"size": ((2, 40, 36, 3, 4), (2, 8, 36, 3, 4)), "layout": ("channels_last",)}
test_operators = each.operator(
    Deconv(bias=(0,), cotangents=("channels_last",), **FEW),
    NormGradients(weighted=(True,), batch_stats=(True,), cotangents=("channels_last", "nchw"), **FEW),
)


def test_minimal_filtering_is_the_transposed_convolution() -> None:
    u, weight, grad = randn(2, 3, 5, 4), randn(3, 2, 4, 4), randn(2, 2, 10, 8)
    made = minimal_filtering.forward(u, weight), minimal_filtering.input_gradient(grad, weight)
    torch.testing.assert_close(made, (transposed(u, weight), F.conv2d(grad, weight, None, 2, 1)))
