"""The residual branch's norm, its gradient and the sum behind it: every backend against the formulas in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.tolerances import UNDERFLOW, UNIT_ROUNDOFF, accumulation, assert_within, stored_roundoff
from wavemix_kernels import backends
from wavemix_kernels.ops.common import layout
from wavemix_kernels.ops.norm import pre_norm

#: Images of one pixel, narrow ones whose pixels share a row, ones of several tiles, and odd sizes throughout.
SHAPES = ((3, 6, 5, 7), (2, 35, 1, 1), (1, 130, 9, 11), (2, 3, 37, 29))
#: dtype around the branch and in it.
TYPES = (
    (torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16), (torch.float32, torch.bfloat16),
)  # fmt: skip
LAYOUTS = ("channels_last", "contiguous", "slices")


@pytest.fixture(params=("cpu", "triton", "reference"))
def backend(request: pytest.FixtureRequest, device: str) -> str:
    name = request.param
    if name == "cpu" and device != "cpu":
        pytest.skip("the CPU kernels take CPU tensors")
    if (reason := pre_norm.BACKENDS[name].why_not()) is not None:
        pytest.skip(f"{name}: {reason}")
    return name


def image(
    shape: tuple[int, ...], dtype: torch.dtype, order: str, device: str, seed: int, offset: float = 0.0
) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset
    values = values.to(device, dtype)
    if order == "contiguous":
        return values
    if order == "channels_last":
        return layout.laid_out(values, True)
    n, c, h, w = shape
    return values.new_zeros((n, h + 1, w, c + 3)).permute(0, 3, 1, 2)[:, 2:-1, 1:].copy_(values)


class Given(NamedTuple):
    """A step's tensors, and what its results depend on in float64."""

    x: Tensor
    grad: Tensor
    around: Tensor
    norm: pre_norm.Norm
    kind: pre_norm.Kind
    stats: pre_norm.Statistics


def given(
    shape: tuple[int, ...], types: tuple[torch.dtype, torch.dtype], orders: tuple[str, str], by_image: bool,
    affine: bool, frozen: bool, backend: str, device: str,
) -> Given:  # fmt: skip
    x, around = (image(shape, types[0], orders[0], device, seed, 2 - seed) for seed in (0, 1))
    grad = image(shape, types[1], orders[1], device, 2)
    wide = accumulation(types[0])
    vectors = [image((1, shape[1], 1, 1), wide, "contiguous", device, seed).flatten() for seed in range(3, 7)]
    weight, bias = vectors[:2] if affine else (None, None)
    own = (vectors[2], vectors[3].square() + 0.5) if frozen else (None, None)
    norm, kind = pre_norm.Norm(weight, bias, *own), pre_norm.Kind(1e-5, by_image)
    return Given(x, grad, around, norm, kind, pre_norm.statistics(x, norm, kind, backend))


def exact(t: Tensor) -> Tensor:
    return t.double().cpu()


def spread(t: Tensor | None, by_image: bool, default: float = 1.0) -> Tensor:
    """A vector beside images, in float64."""
    if t is None:
        return torch.full((1, 1, 1, 1), default, dtype=torch.float64)
    return exact(t)[:, None, None, None] if by_image else exact(t)[:, None, None]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("types", TYPES, ids=lambda types: "-".join(str(t).removeprefix("torch.") for t in types))
@pytest.mark.parametrize("kind", ["channel", "image", "frozen"])
def test_matches_the_formulas(
    kind: str, types: tuple[torch.dtype, torch.dtype], shape: tuple[int, int, int, int], backend: str, device: str
) -> None:
    """The statistics that the pass before made are taken as they are: each pass answers for its own roundings."""
    by_image, own = kind == "image", kind != "frozen"
    u = UNIT_ROUNDOFF[accumulation(types[0])]
    n, c, h, w = shape
    terms = c * h * w if by_image else n * h * w
    index = SHAPES.index(shape)
    orders = LAYOUTS[index % 3], LAYOUTS[(index + (kind == "frozen")) % 3]
    made = given(shape, types, orders, by_image, affine=index != 2, frozen=not own, backend=backend, device=device)
    x, grad, around = exact(made.x), exact(made.grad), exact(made.around)
    mean, invstd = spread(made.stats.mean, by_image), spread(made.stats.invstd, by_image)
    weight, bias = spread(made.norm.weight, False), spread(made.norm.bias, False, 0.0)

    def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
        return stored_roundoff(dtype, backend) * value.abs() + UNDERFLOW[dtype]

    xhat = (x - mean) * invstd
    got = pre_norm.normalise(made.x, made.norm, made.kind, made.stats, backend, types[1])
    assert got.dtype == types[1]
    assert layout.is_channels_last(got) or c == 1
    want = xhat * weight + bias
    # x - mean, invstd * weight, their product, the sum.
    assert_within(got, want, 4 * u * ((xhat * weight).abs() + want.abs()) + rounded(want, types[1]), "normalise")

    dx, d_weight, d_bias = pre_norm.backward(made.grad, made.x, made.around, made.norm, made.kind, made.stats, backend)
    assert dx.dtype == types[0]
    assert layout.is_channels_last(dx) == layout.is_channels_last(made.x)
    per_channel = n * h * w
    for got_sum, product, name in ((d_weight, grad * xhat, "weight"), (d_bias, grad, "bias")):
        if made.norm.weight is None:
            assert got_sum is None
            continue
        bound = (per_channel + 4) * u * product.abs().sum((0, 2, 3))
        assert_within(got_sum, product.sum((0, 2, 3)), bound, name)
    g = grad * weight
    axes = (1, 2, 3) if by_image else (0, 2, 3)

    def mean_of(t: Tensor) -> Tensor:
        return t.sum(axes, keepdim=True) / terms if own else torch.zeros(1, dtype=torch.float64)

    want = invstd * (g - mean_of(g) - xhat * mean_of(g * xhat)) + around
    # A handful of roundings for each term; for those with a sum also one per summand.
    direct = 8 * u * ((invstd * g).abs() + around.abs() + want.abs())
    through = (terms + 12) * u * invstd * (mean_of(g.abs()) + xhat.abs() * mean_of((g * xhat).abs()))
    assert_within(dx, want, direct + through + rounded(want, types[0]), "x")


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("types", TYPES, ids=lambda types: "-".join(str(t).removeprefix("torch.") for t in types))
def test_sum_and_branch_gradient(
    types: tuple[torch.dtype, torch.dtype], shape: tuple[int, int, int, int], backend: str, device: str
) -> None:
    u = UNIT_ROUNDOFF[accumulation(types[0])]
    for order, kept in ((order, kept) for order in LAYOUTS for kept in (None, 1.25)):
        x = image(shape, types[0], order, device, 0)
        branch = image(shape, types[1], "channels_last", device, 1)
        path = None
        if kept is not None:
            path = torch.full((shape[0], 1, 1, 1), kept, dtype=types[0], device=device)
            path[-1] = 0
        factor = torch.ones(1, dtype=torch.float64) if path is None else exact(path)
        out = pre_norm.join(x, branch, path, backend)
        assert out.dtype == types[0]
        assert layout.is_channels_last(out) == layout.is_channels_last(x)
        want = exact(x) + factor * exact(branch)
        bound = 2 * u * ((factor * exact(branch)).abs() + want.abs())
        stored = stored_roundoff(types[0], backend) * want.abs() + UNDERFLOW[types[0]]
        assert_within(out, want, bound + stored, f"sum, {order}")

        got = pre_norm.join_backward(x, path, branch, backend)
        assert got.dtype == types[1]
        assert got.is_contiguous(memory_format=torch.channels_last)
        want = factor * exact(x)
        stored = stored_roundoff(types[1], backend) * want.abs() + UNDERFLOW[types[1]]
        assert_within(got, want, 2 * u * want.abs() + stored, f"gradient, {order}")


@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize("by_image", [False, True], ids=["channel", "image"])
def test_statistics_are_centred(by_image: bool, order: str, backend: str, device: str) -> None:
    """A mean of 1000 deviations costs 1000 roundings, not their square."""
    x = image((3, 20, 9, 7), torch.float32, order, device, 0, 1000.0)
    norm, kind = pre_norm.Norm(None, None, None, None), pre_norm.Kind(1e-5, by_image)
    stats = pre_norm.statistics(x, norm, kind, backend)
    axes = (1, 2, 3) if by_image else (0, 2, 3)
    var, mean = torch.var_mean(exact(x), axes, correction=0)
    u, terms = UNIT_ROUNDOFF[torch.float32], x.numel() // mean.numel()
    # A mean is a sum by a tree, divided and merged with others.
    off = (math.log2(terms) + 4) * u * mean.abs()
    assert_within(stats.mean, mean, off, "mean")
    # Deviations inside parts and between their means, each from a mean that is off.
    bound = (terms + 4) * u * var + 2 * off * var.sqrt() + off.square()
    assert_within(stats.var, var, bound, "variance")
    want = torch.rsqrt(var + kind.eps)
    assert_within(stats.invstd, want, want * (bound / var + 4 * u), "inverse deviation")


@pytest.mark.parametrize("by_image", [False, True], ids=["channel", "image"])
def test_empty_batch(by_image: bool, backend: str, device: str) -> None:
    x = torch.empty(0, 4, 3, 5, device=device)
    weight = torch.ones(4, device=device)
    norm, kind = pre_norm.Norm(weight, weight, weight, weight), pre_norm.Kind(1e-5, by_image)
    if by_image:
        norm = norm._replace(mean=None, var=None)
    stats = pre_norm.statistics(x, norm, kind, backend)
    assert pre_norm.normalise(x, norm, kind, stats, backend).shape == x.shape
    dx, d_weight, d_bias = pre_norm.backward(x, x, x, norm, kind, stats, backend)
    assert dx.shape == x.shape
    assert d_weight is not None
    assert d_bias is not None
    assert torch.equal(d_weight, torch.zeros_like(weight))
    assert torch.equal(d_bias, torch.zeros_like(weight))
    assert pre_norm.join(x, x, torch.ones(0, 1, 1, 1, device=device), backend).shape == x.shape


def test_unserved_types_are_named() -> None:
    x, branch = torch.zeros(1, 2, 3, 3, dtype=torch.float16), torch.zeros(1, 2, 3, 3)
    if (reason := backends.cpu_why_not()) is not None:
        pytest.skip(reason)
    with pytest.raises(ValueError, match=r"takes a branch of x's dtype, or a half type in float32, got torch\.float32"):
        pre_norm.join(x, branch, None, "cpu")
    assert pre_norm.join(x, branch, None).dtype == torch.float16  # the reference's


@pytest.mark.parametrize("by_image", [False, True], ids=["channel", "image"])
def test_operators_are_sound(by_image: bool) -> None:
    ops = torch.ops.wavemix_kernels
    x = image((2, 4, 3, 5), torch.float32, "channels_last", "cpu", 0)
    mean, invstd, _ = ops.pre_norm_stats(x, 1e-5, by_image, "auto")
    weight = torch.ones(4)
    for name, arguments in (
        ("pre_norm_stats", (x, 1e-5, by_image, "auto")),
        ("pre_norm_apply", (x, mean, invstd, weight, None, by_image, torch.bfloat16, "auto")),
        ("pre_norm_backward", (x, x.contiguous(), x, mean, invstd, weight, by_image, True, "auto")),
        ("pre_norm_join", (x, x, torch.ones(2, 1, 1, 1), "auto")),
    ):
        torch.library.opcheck(getattr(ops, name).default, arguments, test_utils=("test_schema", "test_faketensor"))
