"""The residual branch's norm, its gradient and the sum behind it: every backend against the formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import each
from tests.ops.contract import Case, image, pairwise, randn
from tests.tolerances import UNIT_ROUNDOFF, accumulation, assert_within, stored, sum_bound
from wavemix_kernels.ops.common import layout
from wavemix_kernels.ops.norm import pre_norm

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
#: dtype around the branch and in it.
TYPES = ((F64, F64), (F32, F32), (F16, F16), (BF16, BF16), (F32, F16), (F32, BF16))
LAYOUTS = ("channels_last", "nchw", "channels_slice", "sliced")
BACKENDS = ("cpu", "triton", "reference")
CASES = pairwise(
    types=TYPES,
    # Images of one pixel, narrow ones whose pixels share a row, ones of several tiles, and odd sizes throughout.
    shape=((3, 6, 5, 7), (2, 35, 1, 1), (1, 130, 9, 11), (2, 3, 37, 29)),
    kind=("channel", "image", "frozen", "no affine"),
    around=LAYOUTS,
    inside=LAYOUTS,
)
SUMS = pairwise(types=TYPES, shape=((3, 6, 5, 7), (2, 35, 1, 1)), layout=LAYOUTS, kept=(None, 1.25))
each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
by_image = pytest.mark.parametrize("by_image", [False, True], ids=["channel", "image"])


def exact(t: Tensor) -> Tensor:
    return t.detach().double().cpu()


def spread(t: Tensor | None, by_image: bool, default: float = 1.0) -> Tensor:
    """A vector beside images, in float64."""
    if t is None:
        return torch.full((1, 1, 1, 1), default, dtype=F64)
    return exact(t)[:, None, None, None] if by_image else exact(t)[:, None, None]


@each_backend
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_formulas(case: Case, backend: str, device: str) -> None:
    """The statistics that the pass before made are taken as they are: each pass answers for its own roundings."""
    (around, inside), shape, by_image, own = case.types, case.shape, case.kind == "image", case.kind != "frozen"
    n, c, h, w = shape
    wide = accumulation(around)
    u, terms = UNIT_ROUNDOFF[wide], c * h * w if by_image else n * h * w
    x, residual = (image(randn(*shape, seed=i) + 2 - i, around, device, case.around) for i in (0, 1))
    grad = image(randn(*shape, seed=2), inside, device, case.inside)
    weight, bias, mean, deviation = (randn(c, seed=i).to(device, wide) for i in range(3, 7))
    affine = (None, None) if case.kind == "no affine" else (weight, bias)
    norm = pre_norm.Norm(*affine, *((None, None) if own else (mean, deviation.square() + 0.5)))
    kind = pre_norm.Kind(1e-5, by_image)
    stats = pre_norm.statistics(x, norm, kind, backend)
    mean, invstd = spread(stats.mean, by_image), spread(stats.invstd, by_image)
    weight, bias = spread(norm.weight, False), spread(norm.bias, False, 0.0)

    xhat = (exact(x) - mean) * invstd
    got = pre_norm.normalise(x, norm, kind, stats, backend, inside)
    assert got.dtype == inside
    assert layout.is_channels_last(got) or c == 1
    want = xhat * weight + bias
    # x - mean, invstd * weight, their product, the sum.
    bound = 4 * u * ((xhat * weight).abs() + want.abs())
    assert_within(got, want, bound + stored(want, inside, backend), "normalise")

    dx, d_weight, d_bias = pre_norm.backward(grad, x, residual, norm, kind, stats, backend)
    assert dx.dtype == around
    assert layout.is_channels_last(dx) == layout.is_channels_last(x)
    for got_sum, product, name in ((d_weight, exact(grad) * xhat, "weight"), (d_bias, exact(grad), "bias")):
        if norm.weight is None:
            assert got_sum is None
            continue
        bound = (n * h * w + 4) * u * product.abs().sum((0, 2, 3))
        assert_within(got_sum, product.sum((0, 2, 3)), bound, name)
    g = exact(grad) * weight
    axes = (1, 2, 3) if by_image else (0, 2, 3)

    def mean_of(t: Tensor) -> Tensor:
        return t.sum(axes, keepdim=True) / terms if own else torch.zeros(1, dtype=F64)

    want = invstd * (g - mean_of(g) - xhat * mean_of(g * xhat)) + exact(residual)
    # A handful of roundings for each term; for those with a sum also one per summand.
    direct = 8 * u * ((invstd * g).abs() + exact(residual).abs() + want.abs())
    through = (terms + 12) * u * invstd * (mean_of(g.abs()) + xhat.abs() * mean_of((g * xhat).abs()))
    assert_within(dx, want, direct + through + stored(want, around, backend), "x")


@each_backend
@pytest.mark.parametrize("case", SUMS, ids=str)
def test_sum_and_branch_gradient(case: Case, backend: str, device: str) -> None:
    around, inside = case.types
    x = image(randn(*case.shape), around, device, case.layout)
    branch = image(randn(*case.shape, seed=1), inside, device, "channels_last")
    path: Any = None
    if case.kept is not None:
        path = torch.full((case.shape[0], 1, 1, 1), case.kept, dtype=around, device=device)
        path[-1] = 0
    factor = torch.ones(1, dtype=F64) if path is None else exact(path)
    out = pre_norm.join(x, branch, path, backend)
    assert out.dtype == around
    assert layout.is_channels_last(out) == layout.is_channels_last(x)
    added = factor * exact(branch)
    want = exact(x) + added
    bound = 2 * UNIT_ROUNDOFF[accumulation(around)] * (added.abs() + want.abs())
    assert_within(out, want, bound + stored(want, around, backend), "sum")
    got = pre_norm.join_backward(x, path, branch, backend)
    assert got.dtype == inside
    assert got.is_contiguous(memory_format=torch.channels_last)
    want = factor * exact(x)
    assert_within(got, want, sum_bound(want, want.abs(), 2, inside, backend=backend), "gradient")


@each_backend
@by_image
@pytest.mark.parametrize("order", LAYOUTS)
def test_statistics_are_centred(by_image: bool, order: str, backend: str, device: str) -> None:
    """A mean of 1000 deviations costs 1000 roundings, not their square."""
    x = image(randn(3, 20, 9, 7) + 1000, F32, device, order)
    norm, kind = pre_norm.Norm(None, None, None, None), pre_norm.Kind(1e-5, by_image)
    stats = pre_norm.statistics(x, norm, kind, backend)
    var, mean = torch.var_mean(exact(x), (1, 2, 3) if by_image else (0, 2, 3), correction=0)
    u, terms = UNIT_ROUNDOFF[F32], x.numel() // mean.numel()
    # A mean is a sum by a tree, divided and merged with others.
    off = (math.log2(terms) + 4) * u * mean.abs()
    assert_within(stats.mean, mean, off, "mean")
    # Deviations inside parts and between their means, each from a mean that is off.
    bound = (terms + 4) * u * var + 2 * off * var.sqrt() + off.square()
    assert_within(stats.var, var, bound, "variance")
    want = torch.rsqrt(var + kind.eps)
    assert_within(stats.invstd, want, want * (bound / var + 4 * u), "inverse deviation")


@each_backend
@by_image
def test_empty_batch(by_image: bool, backend: str, device: str) -> None:
    x, weight = torch.empty(0, 4, 3, 5, device=device), torch.ones(4, device=device)
    own = (None, None) if by_image else (weight, weight)
    norm, kind = pre_norm.Norm(weight, weight, *own), pre_norm.Kind(1e-5, by_image)
    stats = pre_norm.statistics(x, norm, kind, backend)
    assert pre_norm.normalise(x, norm, kind, stats, backend).shape == x.shape
    dx, *sums = pre_norm.backward(x, x, x, norm, kind, stats, backend)
    assert dx.shape == x.shape
    assert all(torch.equal(t, torch.zeros_like(weight)) for t in sums)
    assert pre_norm.join(x, x, torch.ones(0, 1, 1, 1, device=device), backend).shape == x.shape


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_unserved_types_are_named(backend: str) -> None:
    x, branch = torch.zeros(1, 2, 3, 3, dtype=F16), torch.zeros(1, 2, 3, 3)
    with pytest.raises(ValueError, match=r"takes a branch of x's dtype, or a half type in float32, got torch\.float32"):
        pre_norm.join(x, branch, None, backend)
    assert pre_norm.join(x, branch, None).dtype == F16  # the reference's


@by_image
def test_operators(by_image: bool) -> None:
    x, weight = image(randn(2, 4, 3, 5), F32, layout="channels_last"), torch.ones(4)
    norm, kind = pre_norm.Norm(weight, None, None, None), pre_norm.Kind(1e-5, by_image)

    def calls() -> None:
        stats = pre_norm.statistics(x, norm, kind, "auto")
        pre_norm.normalise(x, norm, kind, stats, "auto", BF16)
        pre_norm.backward(x, x.contiguous(), x, norm, kind, stats, "auto")
        pre_norm.join(x, x, torch.ones(2, 1, 1, 1), "auto")
        pre_norm.join_backward(x, None, x, "auto")

    each.opcheck(calls)
