"""The residual branch's norm, its gradient and the sum behind it: every backend against the formulas in float64."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.ops import each
from tests.ops.contract import EVERY_AXIS, WITHOUT_CUDA, Case, Contract, image, pairwise, randn
from tests.tolerances import DTYPES, UNIT_ROUNDOFF, accumulation, stored
from wavemix_kernels.ops.common import layout
from wavemix_kernels.ops.norm import pre_norm

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
#: dtype around the branch and in it.
TYPES = ((F64, F64), (F32, F32), (F16, F16), (BF16, BF16), (F32, F16), (F32, BF16))
LAYOUTS = ("channels_last", "nchw", "channels_slice", "sliced")


def statistics(x: Tensor, by_image: bool) -> tuple[Tensor, Tensor]:
    """Variance and mean in float64."""
    return torch.var_mean(x.double(), (1, 2, 3) if by_image else (0, 2, 3), correction=0)


def spread(t: Tensor | None, by_image: bool, default: float = 1.0) -> Tensor:
    """A vector beside images."""
    if t is None:
        return torch.full((1, 1, 1, 1), default, dtype=F64)
    return t[:, None, None, None] if by_image else t[:, None, None]


class PreNorm(Contract):
    """By statistics that are given: each pass answers for its own roundings."""

    name = "pre_norm"
    dtypes: ClassVar[Any] = dict.fromkeys(("cpu", "triton", "reference"), DTYPES)
    axes: ClassVar[Any] = {
        "types": TYPES,
        # Images of one pixel, narrow ones whose pixels share a row, ones of several tiles, and odd sizes throughout.
        "shape": ((3, 6, 5, 7), (2, 35, 1, 1), (1, 130, 9, 11), (2, 3, 37, 29)),
        "kind": ("channel", "image", "frozen", "no affine"),
        "layout": LAYOUTS,
        "inside": LAYOUTS,
        "path": (False, True),
    }

    def cases(self, backend: str) -> list[Case]:
        return [Case(**vars(case), dtype=case.types[0]) for case in pairwise(**self.axes)]

    def inputs(self, case: Case, device: str) -> Any:
        (n, c, *_), (around, inside), by_image = case.shape, case.types, case.kind == "image"
        wide, affine = accumulation(around), case.kind != "no affine"
        x, residual = (image(randn(*case.shape, seed=i) + 2 - i, around, device, case.layout) for i in (0, 1))
        var, mean = (randn(c).square(), randn(c, seed=1)) if case.kind == "frozen" else statistics(x, by_image)
        weight, bias = (randn(c, seed=i).to(device, around) if affine else None for i in (3, 4))
        path = torch.full((n, 1, 1, 1), 1.25, dtype=around, device=device)
        path[-1:] = 0
        return {
            "x": x, "residual": residual, "branch": image(randn(*case.shape, seed=2), inside, device, case.inside),
            "mean": mean.to(device, wide), "invstd": (var + 0.5).rsqrt().to(device, wide), "weight": weight,
            "bias": bias, "path": path if case.path else None,
        }  # fmt: skip

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        x, residual, branch, mean, invstd, weight, bias, path = tensors.values()
        norm = pre_norm.Norm(weight, bias, *(mean if case.kind == "frozen" else None,) * 2)
        given = norm, pre_norm.Kind(1e-5, case.kind == "image"), pre_norm.Statistics(mean, mean, invstd), backend
        made = {"normal": pre_norm.normalise(x, *given, branch.dtype), "sum": pre_norm.join(x, branch, path, backend)}
        made["d_branch"] = pre_norm.join_backward(x, path, branch, backend)
        gradients = pre_norm.backward(branch, x, residual, *given)
        assert [d is None for d in gradients[1:]] == [weight is None] * 2
        made |= dict(zip(("d_x", "d_weight", "d_bias"), gradients, strict=True))
        for name, like in (("normal", branch), ("d_branch", branch), ("sum", x), ("d_x", x)):
            t = made[name]
            assert t.dtype == like.dtype
            last = like is branch or layout.is_channels_last(x)
            assert t.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format), name
            made[name] = t.to(x.dtype)
        return made

    def solve(self, case: Case, t: Any) -> tuple[Any, Any]:
        """Exact results and errors, before those of the branch and around it are stored."""
        x, branch, residual, u = t["x"], t["branch"], t["residual"], UNIT_ROUNDOFF[accumulation(case.dtype)]
        n, c, h, w = case.shape
        by_image, own = case.kind == "image", case.kind != "frozen"
        axes, terms = ((1, 2, 3), c * h * w) if by_image else ((0, 2, 3), n * h * w)
        mean, invstd = spread(t["mean"], by_image), spread(t["invstd"], by_image)
        weight, bias, factor = spread(t["weight"], False), spread(t["bias"], False, 0.0), 1.0
        if t["path"] is not None:
            factor = t["path"]
        xhat, g, added = (x - mean) * invstd, branch * weight, factor * branch
        of_weight = branch * xhat

        def mean_of(t: Tensor) -> Tensor:
            return t.sum(axes, keepdim=True) / terms if own else torch.zeros(1, dtype=F64)

        exact = {
            "normal": xhat * weight + bias, "sum": x + added, "d_branch": factor * x,
            "d_x": invstd * (g - mean_of(g) - xhat * mean_of(g * xhat)) + residual,
            "d_weight": of_weight.sum((0, 2, 3)), "d_bias": branch.sum((0, 2, 3)),
        }  # fmt: skip
        # A handful of roundings for each term; for those with a sum also one per summand.
        direct = 8 * u * ((invstd * g).abs() + residual.abs() + exact["d_x"].abs())
        through = (terms + 12) * u * invstd * (mean_of(g.abs()) + xhat.abs() * mean_of((g * xhat).abs()))
        return exact, {
            # x - mean, invstd * weight, their product, the sum.
            "normal": 4 * u * ((xhat * weight).abs() + exact["normal"].abs()),
            "sum": 2 * u * (added.abs() + exact["sum"].abs()), "d_branch": 2 * u * exact["d_branch"].abs(),
            "d_x": direct + through, "d_weight": (n * h * w + 4) * u * of_weight.abs().sum((0, 2, 3)),
            "d_bias": (n * h * w + 4) * u * branch.abs().sum((0, 2, 3)),
        }  # fmt: skip

    def exact(self, case: Case, tensors: Any) -> Any:
        return self.solve(case, tensors)[0]

    def bounds(self, case: Case, tensors: Any, cotangents: Any, exact: Any, backend: str) -> Any:
        around, inside = case.types
        kept = dict.fromkeys(("normal", "d_branch"), inside)
        kept |= dict.fromkeys(("d_x", "sum", "d_weight", "d_bias"), around)
        errors = {name: error for name, error in self.solve(case, tensors)[1].items() if name in exact}
        return {name: off + stored(exact[name].abs() + off, kept[name], backend) for name, off in errors.items()}


class Statistics(Contract):
    """A mean of 1000 deviations costs 1000 roundings, not their square."""

    name = "pre_norm_stats"
    dtypes: ClassVar[Any] = dict.fromkeys(("cpu", "triton", "reference"), (F32,))
    axes: ClassVar[Any] = {"by_image": (False, True), "layout": LAYOUTS, "shape": ((3, 20, 9, 7),)}

    def inputs(self, case: Case, device: str) -> Any:
        return {"x": image(randn(*case.shape) + 1000, case.dtype, device, case.layout)}

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        norm, kind = pre_norm.Norm(None, None, None, None), pre_norm.Kind(1e-5, case.by_image)
        return pre_norm.statistics(tensors["x"], norm, kind, backend)._asdict()

    def exact(self, case: Case, tensors: Any) -> Any:
        var, mean = statistics(tensors["x"], case.by_image)
        return {"mean": mean, "var": var, "invstd": torch.rsqrt(var + 1e-5)}

    def bounds(self, case: Case, tensors: Any, cotangents: Any, exact: Any, backend: str) -> Any:
        """A mean is a sum by a tree, divided and merged with others; deviations are inside parts and between their
        means, each from a mean that is off."""
        (mean, var, invstd), u = exact.values(), UNIT_ROUNDOFF[case.dtype]
        terms = tensors["x"].numel() // mean.numel()
        off = (math.log2(terms) + 4) * u * mean.abs()
        bound = (terms + 4) * u * var + 2 * off * var.sqrt() + off.square()
        return {"mean": off, "var": bound, "invstd": invstd * (bound / var + 4 * u)}


test_contract = each.case(PreNorm(), Statistics())
FARTHER: Any = {"shape": ((2, 4, 3, 5),), "layout": EVERY_AXIS}
test_offsets_beyond_32_bits = each.case(
    PreNorm(
        WITHOUT_CUDA, types=((F16, F16),), kind=("channel", "image"), inside=("far_channels",), path=(True,), **FARTHER
    ),
    Statistics(WITHOUT_CUDA, **FARTHER),
)
EMPTY: Any = {"shape": ((0, 4, 3, 5),), "layout": ("nchw",), "inside": ("nchw",), "types": ((F32, F32),)}
test_empty_batch = each.empty_batch(PreNorm(**EMPTY))
FEW: Any = {"shape": ((2, 4, 3, 5),), "layout": ("channels_last",)}
test_operators = each.operator(
    PreNorm(types=((F32, BF16),), kind=("channel", "image"), inside=("nchw",), **FEW), Statistics(**FEW)
)
