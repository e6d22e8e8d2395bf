"""The Triton kernels of the Waveblock: against float64, in every configuration, and compiled for a real chip.

Run as a script (`python -m tests.test_triton_waveblock`) it prints what the compiled kernels take of an H100 as JSON.
The test runs that as a process of its own: kernels defined under TRITON_INTERPRET=1 do not compile.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import wavemix_kernels as wk
from tests.golden_models import assert_reproduces
from tests.tolerances import UNDERFLOW, UNIT_ROUNDOFF, assert_within, haar_bound
from wavemix_kernels.ops.haar import pyramid as haar_pyramid
from wavemix_kernels.ops.haar import reference as haar_reference
from wavemix_kernels.ops.mlp import op as pointwise_mlp
from wavemix_kernels.ops.mlp import reference as mlp_reference
from wavemix_kernels.ops.norm import batch_norm
from wavemix_kernels.ops.reduce_haar import op as reduce_haar
from wavemix_kernels.ops.reduce_haar import reference as reduce_haar_reference
from wavemix_kernels.reference import Waveblock

pytest.importorskip("triton", reason="Triton is not installed: pip install wavemix-kernels[triton]")

ROOT = Path(__file__).resolve().parent.parent
#: Shared memory one block may have, bytes (CUDA C++ programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
U32 = UNIT_ROUNDOFF[torch.float32]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def skip_interpreted_bfloat16(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton's interpreter multiplies the raw bits of bfloat16 in tl.dot")


def stored(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The error of rounding a result to its dtype. Triton's interpreter truncates to bfloat16: twice a rounding."""
    twice = 2 if dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1" else 1
    return twice * UNIT_ROUNDOFF[dtype] * exact.abs() + UNDERFLOW[dtype]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def image(values: Tensor, dtype: torch.dtype, device: str, memory: str) -> Tensor:
    """`values` as NCHW ("rows"), channels_last ("channels") or a slice of a larger channels_last image ("slice")."""
    values = values.to(device, dtype)
    if memory == "rows":
        return values.contiguous()
    if memory == "slice":
        larger = torch.nn.functional.pad(values, (1, 2, 1, 0, 3, 2), value=float("nan"))
        larger = larger.contiguous(memory_format=torch.channels_last)
        return larger[:, 3:-2, 1:, 1:-2]
    return values.contiguous(memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------------------- haar_pyramid


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("memory, levels", [("rows", 4), ("channels", 3), ("slice", 2), ("channels", 1)])
def test_haar_pyramid(levels: int, memory: str, dtype: torch.dtype, device: str) -> None:
    """The pyramid that keeps every level's LL, and its adjoint, which adds them."""
    x = image(randn(2, 5, 16, 32), dtype, device, memory)
    last = memory != "rows"
    peak = float(x.abs().max())
    zs = haar_pyramid.pyramid(x, levels, last, "triton")
    for z, exact in zip(zs, haar_reference.haar_pyramid(x.double(), levels), strict=True):
        bound = haar_bound(exact, dtype, levels, peak) + stored(exact, dtype) - UNDERFLOW[dtype]
        assert_within(z, exact, bound, f"{dtype} {memory}")
    # A gradient whose parts lie in another memory order than the result has no common innermost dimension.
    grads = [image(randn(*z.shape, seed=4), dtype, device, "channels" if levels < 4 else "rows") for z in zs]
    got = haar_pyramid.adjoint(grads, last, "triton")
    exact = haar_reference.haar_pyramid_adjoint([g.double() for g in grads])
    peak = max(float(g.abs().max()) for g in grads)
    bound = haar_bound(exact, dtype, levels, levels * peak) + stored(exact, dtype)
    assert_within(got, exact, bound, f"adjoint {dtype} {memory}")


def test_lows_are_checked() -> None:
    from wavemix_kernels.ops.haar import triton as kernels

    x, ll = torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 2, 2)
    highs = [torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 2, 3, 2, 2)]
    with pytest.raises(ValueError, match="lows: 2 for levels=2"):
        kernels.analysis(x, ll, highs, levels=2, lows=[ll, ll])
    with pytest.raises(ValueError, match=r"lows\[0\].shape=\(1, 2, 2, 2\): must be \(1, 2, 4, 4\)"):
        kernels.synthesis(x, ll, highs, levels=2, lows=[ll])


# ------------------------------------------------------------------------------------------------ reduce_haar


def check_reduce(
    shape: tuple[int, int, int, int], outputs: int, levels: int, dtype: torch.dtype, device: str, memory: str,
    run: Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]],
) -> None:  # fmt: skip
    x = image(randn(*shape), dtype, device, memory)
    weight = randn(outputs, shape[1], 1, 1).to(device, dtype)
    bias = randn(outputs, seed=1).to(device, dtype)
    got = run(x, weight, bias)
    exact = reduce_haar_reference.reduce_haar(x.double(), weight.double(), bias.double(), levels)
    # A sum of C products errs by gamma_C of the sum of their absolute values; the pyramid of those absolute values
    # (its LL) bounds a level's coefficients, and each level adds two roundings and the bias's own.
    sums = reduce_haar_reference.reduce_haar(x.double().abs(), weight.double().abs(), bias.double().abs(), levels)
    for level, (z, e, s) in enumerate(zip(got, exact, sums, strict=True), 1):
        largest = s[:, :outputs].repeat_interleave(3, 1)
        largest = torch.cat((s[:, :outputs], largest), 1)
        bound = (shape[1] + 2 * level + 2) * U32 * largest + stored(e, dtype)
        assert_within(z, e, bound, f"Z_{level} {dtype} {memory}")


@each_dtype
@pytest.mark.parametrize(
    "shape, outputs, levels, memory",
    [
        ((2, 20, 6, 10), 5, 1, "slice"),
        ((1, 16, 8, 12), 36, 2, "rows"),
        ((1, 16, 8, 12), 36, 2, "channels"),
        ((1, 40, 16, 8), 12, 3, "rows"),
        ((1, 8, 16, 32), 8, 4, "channels"),
    ],
)
def test_reduce_haar(
    shape: tuple[int, int, int, int], outputs: int, levels: int, memory: str, dtype: torch.dtype, device: str
) -> None:
    skip_interpreted_bfloat16(dtype)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        last = levels % 2 == 0 if memory == "rows" else None
        return reduce_haar.reduce_haar(x, weight, bias, levels, channels_last=last, backend="triton")

    check_reduce(shape, outputs, levels, dtype, device, memory, run)


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
def test_every_reduce_configuration(levels: int, device: str) -> None:
    from wavemix_kernels.ops.reduce_haar import triton as kernels

    configs = set(kernels.search_space(4, levels))
    assert configs
    for config in configs:

        def run(x: Tensor, weight: Tensor, bias: Tensor, config: Any = config) -> list[Tensor]:
            out = haar_pyramid.empty_pyramid(x, weight.shape[0], levels, True)
            kernels.forward(out, x, weight[:, :, 0, 0], bias, True, config)
            return out

        check_reduce((1, 6, 2**levels, 3 * 2**levels), 20, levels, torch.float32, device, "channels", run)


def reduced_gradients(
    grads: Sequence[Tensor], x: Tensor, weight: Tensor, add: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of x, weight and bias in float64, and bounds.

    The pyramid's adjoint adds the parts of L levels, each with two roundings; it is rounded to a half type once, as an
    operand. A product sums O terms for x and one for each of n pixels for the weight, whose sums S of absolute values
    are those of the adjoint of absolute values: it adds and subtracts the same terms with other signs.
    """
    dtype, levels, n = x.dtype, len(grads), x[:, 0].numel()
    wide_x, w = x.double(), weight.double()[:, :, 0, 0]
    made = haar_reference.haar_pyramid_adjoint([g.double() for g in grads])
    largest = torch.zeros_like(made[:, :, :1, :1]).expand(made.shape)
    for level, g in enumerate(grads, 1):
        parts = g.double().abs()
        low, bands = parts[:, : weight.shape[0]], parts[:, weight.shape[0] :].unflatten(1, (-1, 3)).sum(2)
        largest = largest + ((low + bands) / 2**level).repeat_interleave(2**level, 2).repeat_interleave(2**level, 3)
    error = 2 * (levels + 1) * U32 * largest + (UNIT_ROUNDOFF[dtype] if dtype != torch.float32 else 0.0) * made.abs()
    exact = [torch.einsum("nohw,oc->nchw", made, w), torch.einsum("nohw,nchw->oc", made, wide_x), made.sum((0, 2, 3))]
    bound = [
        torch.einsum("nohw,oc->nchw", error + (w.shape[0] + 1) * U32 * (largest + error), w.abs()),
        torch.einsum("nohw,nchw->oc", error + (n + 1) * U32 * (largest + error), wide_x.abs()),
        (2 * (levels + 1) * U32 * largest + n * U32 * largest).sum((0, 2, 3)),
    ]
    if add is not None:
        exact[0] = exact[0] + add.double()
        bound[0] = bound[0] + U32 * (exact[0].abs() + add.double().abs())
    exact[1], bound[1] = exact[1][:, :, None, None], bound[1][:, :, None, None]
    return exact, [b + stored(e, dtype) for b, e in zip(bound, exact, strict=True)]


@each_dtype
@pytest.mark.parametrize(
    "shape, outputs, levels, memory, order",
    [
        ((2, 20, 6, 10), 5, 1, "slice", "channels"),
        ((1, 16, 8, 12), 36, 2, "rows", "rows"),
        ((3, 70, 4, 4), 36, 2, "channels", "channels"),
        ((1, 40, 16, 8), 12, 3, "rows", "channels"),
        ((1, 8, 16, 32), 8, 4, "channels", "rows"),
        ((1, 6, 32, 32), 3, 5, "channels", "channels"),
    ],
)
def test_reduce_haar_gradients(
    shape: tuple[int, int, int, int], outputs: int, levels: int, memory: str, order: str, dtype: torch.dtype,
    device: str,
) -> None:  # fmt: skip
    """With and without a bias and something to add; the bands' gradients in x's order and in the other."""
    skip_interpreted_bfloat16(dtype)
    x = image(randn(*shape), dtype, device, memory)
    weight = randn(outputs, shape[1], 1, 1).to(device, dtype)
    n, _, h, w = shape
    grads = [image(randn(n, 4 * outputs, h >> i, w >> i, seed=i), dtype, device, order) for i in range(1, levels + 1)]
    for add in (None, image(randn(*shape, seed=9), dtype, device, "rows")):
        dx, dw, db = reduce_haar.gradients(grads, x, weight, add is None, add, "triton")
        assert dx.stride() == reduce_haar.layout.empty(x, x.shape, memory != "rows").stride()
        exact, bound = reduced_gradients(grads, x, weight, add)
        assert_within(dx, exact[0], bound[0], f"dx {dtype}")
        assert_within(dw, exact[1], bound[1], f"dw {dtype}")
        if db is not None:
            assert_within(db, exact[2], bound[2], f"db {dtype}")


@pytest.mark.parametrize("levels", [1, 3, 4])
def test_every_configuration_of_reduce_haar_gradients(levels: int, device: str) -> None:
    """More outputs and channels than a tile has, and more blocks than a program."""
    from wavemix_kernels.ops.reduce_haar import triton_backward as kernels

    n, c, o, size = 3, 70, 20, 2**levels
    x = image(randn(n, c, size, 3 * size), torch.float32, device, "channels")
    weight, add = randn(o, c).to(device, torch.float32), randn(*x.shape, seed=1).to(device, torch.float32)
    grads = [
        image(randn(n, 4 * o, size >> i, 3 * size >> i, seed=i), torch.float32, device, "channels")
        for i in range(1, levels + 1)
    ]
    exact, bound = reduced_gradients(grads, x, weight[:, :, None, None], add)
    configs = {c.quads * c.outputs * c.channels: c for c in kernels.search_space(4, levels)}
    assert configs
    for config in configs.values():
        dx = torch.full_like(x, float("nan"))
        dw, db = kernels.gradients(dx, grads, x, weight, add, True, config)
        assert_within(dx, exact[0], bound[0], str(config))
        assert_within(dw, exact[1][:, :, 0, 0], bound[1][:, :, 0, 0], str(config))
        assert_within(db, exact[2], bound[2], str(config))


@pytest.mark.parametrize("levels, memory", [(1, "channels"), (2, "rows")])
def test_splits_of_reduce_haar_gradients(
    levels: int, memory: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four runs of blocks that cross images, the last one short; outputs in two chunks, every other step of which
    makes x's gradient."""
    from wavemix_kernels.ops.reduce_haar import triton_backward as kernels

    monkeypatch.setattr(kernels, "_MULTIPROCESSORS", 4)
    n, c, o, h, w = 3, 6, 20, 10 * levels, 14 * levels
    x = image(randn(n, c, h, w), torch.float16, device, memory)
    weight = randn(o, c).to(device, torch.float16)
    grads = [
        image(randn(n, 4 * o, h >> i, w >> i, seed=i), torch.float16, device, "channels") for i in range(1, levels + 1)
    ]
    dx = torch.full_like(x, float("nan"))
    config = kernels.GradientConfig(16, 16, 16, 4, 2)
    launch, *partials = kernels.launch(dx, grads, x, weight, None, True, config)
    assert [p.shape for p in partials] == [(4, o, c), (4, o)]
    for partial in partials:
        partial.fill_(float("nan"))
    launch.run(x)
    exact, bound = reduced_gradients(grads, x, weight[:, :, None, None], None)
    assert_within(dx, exact[0], bound[0], "dx")
    assert_within(partials[0].sum(0), exact[1][:, :, 0, 0], bound[1][:, :, 0, 0], "dw")
    assert_within(partials[1].sum(0), exact[2], bound[2], "db")


def test_reduce_haar_gradients_are_the_same_in_every_run(device: str) -> None:
    from wavemix_kernels.ops.reduce_haar import triton_backward as kernels

    x = image(randn(2, 12, 8, 8), torch.float16, device, "channels")
    grads = [image(randn(2, 20, 4, 4), torch.float16, device, "channels")]
    weight = randn(5, 12).to(device, torch.float16)
    made = [torch.empty_like(x) for _ in range(2)]
    first, second = ((dx, *kernels.gradients(dx, grads, x, weight, None, True)) for dx in made)
    for got, again in zip(first, second, strict=True):
        assert torch.equal(got, again)


# ---------------------------------------------------------------------------------------------- pointwise_mlp


class Mlp:
    """Inputs of one shape, the float64 truth of everything and bounds made of the arithmetic.

    With |.| on every factor the same formulas give the sum S of the absolute values of all terms. A sum of k products
    in fp32 errs by k * u32 * S; an operand rounded to a half type (an affine input, the hidden layer, its gradient)
    passes its relative error u on; GELU and its derivative are within 8 * u32 of their argument's scale and have slopes
    below 1.13 and 0.8, so that the error of their argument arrives as itself at most twice.
    """

    def __init__(
        self, rows: int, a: int, b: int, k: int, o: int, dtype: torch.dtype, device: str, memory: str, p: float,
        affine: bool = True, bias: bool = True,
    ) -> None:  # fmt: skip
        n, h, w = 2, 1, rows // 2
        self.dtype, self.p = dtype, p

        def param(*shape: int) -> Tensor:
            return randn(*shape, seed=3).to(device, dtype)

        self.x = image(randn(n, a, h, w), dtype, device, memory)
        self.second = image(randn(n, b, h, w, seed=1), dtype, device, memory) if b else None
        self.scale = (1 + 0.3 * randn(b, seed=5)).to(device, torch.float32) if b and affine else None
        self.shift = randn(b, seed=6).to(device, torch.float32) if b and affine else None
        self.w1, self.w2 = param(k, a + b) / (a + b) ** 0.5, param(o, k) / k**0.5
        self.b1, self.b2 = (param(k), param(o)) if bias else (None, None)
        self.grad = image(randn(n, o, h, w, seed=2), dtype, device, memory)
        self.seed = torch.tensor([-(2**62) - 12345], device=device)
        self.keep = mlp_reference.keep_mask(rows, k, p, int(self.seed), torch.device(device)) if p else None

    def matrix(self, t: Tensor) -> Tensor:
        return t.double().permute(0, 2, 3, 1).reshape(-1, t.shape[1])

    def solve(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Exact results and bounds, matrices."""
        u = UNIT_ROUNDOFF[self.dtype] if self.dtype != torch.float32 else 0.0  # of operands
        x, g = self.matrix(self.x), self.matrix(self.grad)
        w1, w2 = self.w1.double(), self.w2.double()
        a = x.shape[1]
        if self.second is not None:
            s = self.matrix(self.second)
            if self.scale is not None:
                s = s * self.scale.double() + self.shift.double()
            x = torch.cat((x, s), 1)
        factor = 0.0 if self.p == 1 else 1 / (1 - self.p)
        keep = torch.ones(x.shape[0], w1.shape[0], device=x.device) if self.keep is None else self.keep * factor
        b1 = 0.0 if self.b1 is None else self.b1.double()
        b2 = 0.0 if self.b2 is None else self.b2.double()
        z = x @ w1.T + b1
        cdf = torch.special.ndtr(z)
        slope = cdf + z * torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5
        hidden = z * cdf * keep
        gh = g @ w2
        gz = gh * keep * slope
        exact = {
            "out": hidden @ w2.T + b2, "gx": (gz @ w1)[:, :a], "gs": (gz @ w1)[:, a:], "w1": gz.T @ x,
            "b1": gz.sum(0), "w2": g.T @ hidden, "b2": g.sum(0),
        }  # fmt: skip
        k1, k2, n = w1.shape[1], w1.shape[0], x.shape[0]
        z_sum = x.abs() @ w1.abs().T + (abs(b1) if self.b1 is not None else 0.0)
        z_error = ((k1 + 4) * U32 + u) * z_sum
        hidden_error = (1.13 * z_error + 8 * U32 * z.abs()) * keep + (u + 2 * U32) * hidden.abs()
        gh_error = (g.shape[1] + 1) * U32 * (g.abs() @ w2.abs())
        gz_error = keep * (1.13 * gh_error + gh.abs() * (0.8 * z_error + 8 * U32 * (1 + z.abs())))
        gz_error = gz_error + (u + 2 * U32) * gz.abs()
        x_error = u * x.abs() + 3 * U32 * (x.abs() + (0 if self.shift is None else self.shift.double().abs().max()))
        hidden_abs, gz_abs = hidden.abs() + hidden_error, gz.abs() + gz_error
        sum_gx = gz_error @ w1.abs() + (k2 + 1) * U32 * (gz_abs @ w1.abs())
        bound = {
            "out": hidden_error @ w2.abs().T + (k2 + 2) * U32 * (hidden_abs @ w2.abs().T + abs(b2 + 0 * exact["out"])),
            "gx": sum_gx[:, :a], "gs": sum_gx[:, a:],
            "w1": gz_error.T @ x.abs() + gz_abs.T @ x_error + (n + 1) * U32 * (gz_abs.T @ x.abs()),
            "b1": gz_error.sum(0) + n * U32 * gz_abs.sum(0),
            "w2": g.abs().T @ hidden_error + (n + 1) * U32 * (g.abs().T @ hidden_abs),
            "b2": n * U32 * g.abs().sum(0),
        }  # fmt: skip
        return exact, {name: value + stored(exact[name], self.dtype) for name, value in bound.items()}

    def check(self, got: dict[str, Tensor | None]) -> None:
        exact, bound = self.solve()
        for name, value in got.items():
            if value is not None:
                assert_within(value, exact[name], bound[name], f"{name} {self.dtype}")

    def arguments(self) -> tuple[Any, ...]:
        return (
            self.x, self.second, self.scale, self.shift, self.w1, self.b1, self.w2, self.b2, self.p,
            self.seed if self.p else None,
        )  # fmt: skip


def check_mlp_op(case: Mlp) -> None:
    arguments = case.arguments()
    out = pointwise_mlp.fused(*arguments, "triton")
    assert out.is_contiguous(memory_format=torch.channels_last)
    case.check({"out": case.matrix(out)})
    for want_output in (True, False):
        made = pointwise_mlp.backward(case.grad, *arguments, want_output, "triton")
        images = {"gx": made.x, "gs": made.second, "out": made.output}
        assert (made.output is not None) == want_output
        case.check({name: None if t is None else case.matrix(t) for name, t in images.items()})
        case.check({"w1": made.w1, "b1": made.b1, "w2": made.w2, "b2": made.b2})


@each_dtype
@pytest.mark.parametrize(
    "rows, a, b, k, o, p, affine, bias, memory",
    [
        (10, 8, 0, 20, 6, 0.0, False, True, "rows"),
        (10, 8, 3, 20, 6, 0.0, True, False, "channels"),
        (38, 20, 10, 40, 36, 0.5, True, True, "slice"),
        (34, 48, 4, 33, 5, 0.25, False, False, "rows"),
        (34, 130, 40, 66, 20, 0.5, True, True, "channels"),
        (18, 520, 16, 16, 20, 0.5, True, True, "channels"),  # no room for the output beside the inputs' gradients
        (18, 1040, 0, 16, 280, 0.0, False, True, "channels"),  # nor for all weights' gradients in one launch
    ],
)
def test_pointwise_mlp(
    rows: int, a: int, b: int, k: int, o: int, p: float, affine: bool, bias: bool, memory: str, dtype: torch.dtype,
    device: str,
) -> None:  # fmt: skip
    """Both directions; b = 0: no second input."""
    skip_interpreted_bfloat16(dtype)
    check_mlp_op(Mlp(rows, a, b, k, o, dtype, device, memory, p, affine, bias))


def test_every_mlp_configuration(device: str) -> None:
    from wavemix_kernels.ops.mlp import triton as forward
    from wavemix_kernels.ops.mlp import triton_backward as backward
    from wavemix_kernels.ops.mlp.tiles import search_space

    for dtype in (torch.float32, torch.float16):
        case = Mlp(40, 20, 6, 36, 24, dtype, device, "channels", 0.5)
        x, second, *rest = case.arguments()
        mlp = forward.Mlp(case.matrix(x).to(dtype), case.matrix(second).to(dtype), *rest)
        grad = case.matrix(case.grad).to(dtype)
        configs = {(c.rows, c.hidden): c for c in search_space(dtype.itemsize)}  # warps are nothing to the interpreter
        assert configs
        for config in configs.values():
            out, again, gx, gs = (
                torch.full((40, c), float("nan"), dtype=dtype, device=device) for c in (24, 24, 20, 6)
            )
            forward.forward(out, mlp, config)
            db2 = backward.input_gradient(gx, gs, again, grad, mlp, config)
            dw1, db1, dw2 = backward.weight_gradients(grad, mlp, config)
            case.check({"out": out, "gx": gx, "gs": gs, "w1": dw1, "b1": db1, "w2": dw2, "b2": db2})
            case.check({"out": again})


@pytest.mark.parametrize("p", [0.0, 1e-12, 0.3, 0.5, 1.0])
def test_dropout_mask_is_the_reference_s(p: float, device: str) -> None:
    """Through the op: hidden units of constant activation, told apart by an identity."""
    units = 38
    x = torch.zeros(2, 1, 5, 7, device=device)
    w1, b1 = torch.zeros(units, 1, device=device), torch.ones(units, device=device)
    seed = torch.tensor([-987654321987654321], device=device)
    w2 = torch.eye(units, device=device)
    out = pointwise_mlp.pointwise_mlp(x, w1, b1, w2, None, dropout=p, seed=seed, backend="triton")
    kept = out.permute(0, 2, 3, 1).reshape(70, units) != 0
    assert torch.equal(kept, mlp_reference.keep_mask(70, units, p, int(seed), torch.device(device)))
    if p == 1e-12:
        assert kept.all()


def test_dropout_counter_is_64_bits(device: str) -> None:
    import triton
    import triton.language as tl

    from wavemix_kernels.ops.mlp.triton_philox import keep_mask

    @triton.jit
    def kernel(out, seed, first: tl.int64, threshold: tl.int64, mask: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.arange(0, 16).to(tl.int64) + first  # the interpreter takes no type from the annotation
        kept = mask(tl.load(seed), row, 4, 26, threshold, 16)
        tl.store(out + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :], kept.to(tl.int8))

    first, seed = 2**31 - 3, 2**63 - 5  # 7 groups a row: beyond 2^32
    out = torch.full((16, 16), -1, dtype=torch.int8, device=device)
    kernel[(1,)](out, torch.tensor([seed], device=device), first, 2**31, keep_mask)
    groups = torch.arange(first, first + 16)[:, None] * 7 + torch.arange(1, 5)
    expected = mlp_reference.philox(groups, seed).reshape(16, 16) < 2**31
    assert torch.equal(out.cpu().bool(), expected)


def test_dropped_nan_is_zero(device: str) -> None:
    w1, b1 = torch.zeros(8, 1, device=device), torch.full((8,), float("nan"), device=device)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    out = pointwise_mlp.pointwise_mlp(
        torch.zeros(1, 1, 2, 2, device=device), w1, b1, torch.ones(3, 8, device=device), None, dropout=1.0, seed=seed,
        backend="triton",
    )  # fmt: skip
    assert torch.equal(out, torch.zeros_like(out))


def test_empty_batch(device: str) -> None:
    x = torch.randn(0, 8, 4, 4, device=device, requires_grad=True)
    w1, w2 = (torch.randn(8, 8, device=device, requires_grad=True) for _ in range(2))
    out = pointwise_mlp.pointwise_mlp(x, w1, None, w2, None, backend="triton")
    assert out.shape == (0, 8, 4, 4)
    out.sum().backward()
    assert torch.equal(w1.grad, torch.zeros_like(w1))
    assert torch.equal(w2.grad, torch.zeros_like(w2))
    zs = reduce_haar.reduce_haar(x, w1[:, :, None, None], None, 2, backend="triton")
    assert [tuple(z.shape) for z in zs] == [(0, 32, 2, 2), (0, 32, 1, 1)]
    dx, dw, db = reduce_haar.gradients(zs, x, w1[:, :, None, None], True, x, "triton")
    assert dx.shape == x.shape
    assert db is not None
    assert torch.equal(dw[:, :, 0, 0], torch.zeros_like(w1))
    assert torch.equal(db, torch.zeros(8, device=device))


def test_refuses_float64(device: str) -> None:
    x, weight = torch.zeros(1, 4, 2, 2, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    x, weight = x.to(device), weight.to(device)
    with pytest.raises(ValueError, match="float64"):
        reduce_haar.reduce_haar(x, weight[:, :, None, None], backend="triton")
    with pytest.raises(ValueError, match="float64"):
        pointwise_mlp.pointwise_mlp(x, weight, None, weight, None, backend="triton")


# ------------------------------------------------------------------------------------------------- batch_norm


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("memories", [("rows", "rows"), ("channels", "channels"), ("slice", "rows"), ("rows", "slice")])
@pytest.mark.parametrize("shape", [(2, 6, 3, 5), (1, 35, 2, 3), (1, 1, 9, 40)])
def test_batch_norm(
    shape: tuple[int, int, int, int], memories: tuple[str, str], dtype: torch.dtype, device: str
) -> None:
    """The four functions of the table, on inputs and outputs of different layouts."""
    functions = batch_norm.BACKENDS["triton"].functions
    x = image(randn(*shape) + 3, dtype, device, memories[0])
    other = image(randn(*shape, seed=1), dtype, device, memories[1])
    real = batch_norm.statistics_dtype(dtype)
    u, n = UNIT_ROUNDOFF[real], shape[0] * shape[2] * shape[3]
    wide, mean_all = x.double(), x.double().mean((0, 2, 3))

    def channels(t: Tensor) -> Tensor:
        return t.double()[:, None, None]

    mean, var = functions["stats"](x)
    assert mean.dtype == var.dtype == real
    exact_var = wide.var((0, 2, 3), correction=0)
    assert_within(mean, mean_all, n * u * wide.abs().mean((0, 2, 3)), "mean")
    # The mean's own error enters squared, and as that of each deviation.
    deviation = (wide - channels(mean_all)).abs().mean((0, 2, 3))
    bound = (n + 8) * u * exact_var + 4 * u * deviation * wide.abs().amax((0, 2, 3))
    assert_within(var, exact_var, bound, "var")

    a, b, d = (randn(shape[1], seed=i).to(device, real) for i in (11, 12, 13))
    for residual in (None, other):
        out = image(torch.full(shape, float("nan")), dtype, device, memories[1])
        functions["apply"](x, a, d, residual, out)
        terms = [wide * channels(a), channels(d).expand(shape)] + ([] if residual is None else [residual.double()])
        exact = torch.stack(terms).sum(0)
        assert_within(out, exact, 3 * u * torch.stack(terms).abs().sum(0) + stored(exact, dtype), "apply")

    invstd = torch.rsqrt(var + 1e-5)
    sum_g, sum_gx = functions["reduce"](other, x, mean, invstd)
    g, xhat = other.double(), (wide - channels(mean)) * channels(invstd)
    assert_within(sum_g, g.sum((0, 2, 3)), n * u * g.abs().sum((0, 2, 3)), "sum of grad")
    spread = (g * xhat).abs().sum((0, 2, 3)) + (g.abs() * wide.abs() * channels(invstd)).sum((0, 2, 3))
    assert_within(sum_gx, (g * xhat).sum((0, 2, 3)), (n + 4) * u * spread, "sum of grad * xhat")

    out = image(torch.full(shape, float("nan")), dtype, device, memories[1])
    functions["backward"](other, x, a, b, d, out)
    terms = [g * channels(a), wide * channels(b), channels(d).expand(shape)]
    exact = torch.stack(terms).sum(0)
    assert_within(out, exact, 3 * u * torch.stack(terms).abs().sum(0) + stored(exact, dtype), "backward")


def test_variance_far_from_zero(device: str) -> None:
    """|mean| a million deviations away: a sum of squares would have nothing left."""
    x = (randn(2, 2, 40, 40) + 2.0**20).to(device, torch.float32)
    mean, var = batch_norm.BACKENDS["triton"].functions["stats"](x)
    exact = x.double().var((0, 2, 3), correction=0)
    # A tile's mean is off by half a unit in its last place, 1/32, and that error enters squared.
    assert_within(var, exact, 2 * (2.0**20 * 2 * U32) ** 2 + 1e-3 * exact, "var")
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=4 * U32, atol=0)


def test_every_norm_configuration(device: str) -> None:
    from wavemix_kernels.ops.norm import triton_batch_norm as kernels

    x, grad = (image(randn(2, 10, 5, 13, seed=i), torch.float32, device, "channels") for i in (0, 1))
    wide, n = x.double(), 2 * 5 * 13
    exact_mean, exact_var = wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)
    for config in kernels.search_space():
        mean, var = kernels.stats(x, config)
        assert_within(mean, exact_mean, n * U32 * wide.abs().mean((0, 2, 3)), str(config))
        assert_within(var, exact_var, 2 * n * U32 * exact_var, str(config))
        sum_g, _ = kernels.reduce(grad, x, mean, torch.rsqrt(var), config)
        assert_within(sum_g, grad.double().sum((0, 2, 3)), n * U32 * grad.double().abs().sum((0, 2, 3)), str(config))
        out = torch.full_like(x, float("nan"))
        kernels.affine(out, x, mean, var, grad, mean, config)
        a, d = mean.double()[:, None, None], var.double()[:, None, None]
        terms = torch.stack([wide * a, d.expand_as(x), grad.double() * a])
        assert_within(out, terms.sum(0), 4 * U32 * terms.abs().sum(0), str(config))


def test_sums_are_the_same_in_every_run(device: str) -> None:
    x = torch.randn(2, 4, 30, 20, device=device)
    stats = batch_norm.BACKENDS["triton"].functions["stats"]
    first, second = stats(x), stats(x)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


# ------------------------------------------------------------------------------------------------ whole block


@pytest.mark.parametrize("recompute", ["mlp", "all"])
@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_block(level: int, recompute: str, device: str) -> None:
    """Output, all gradients and running statistics, beside the float64 reference of the same parameters."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"level": level, "mult": 2, "ff_channel": 8, "final_dim": 8, "dropout": 0.0}
    block = wk.FusedWaveblock(**options, recompute=recompute).to(device)
    truth = Waveblock(**options).double().to(device)
    truth.load_state_dict(block.state_dict())
    x = torch.randn(2, 8, 16, 16, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    wide = x.detach().double().requires_grad_()
    grad = torch.randn(x.shape, device=device)
    with wk.backend("triton"):
        out = block(x, residual=True)
    out.backward(grad)  # the choice of the forward pass holds
    exact = truth(wide) + wide
    exact.backward(grad.double())
    pairs = [("output", out, exact), ("x", x.grad, wide.grad)]
    pairs += [(name, p.grad, q.grad) for (name, p), q in zip(block.named_parameters(), truth.parameters(), strict=True)]
    pairs += [(name, b, q) for (name, b), q in zip(block.named_buffers(), truth.buffers(), strict=True)]
    # A chain of `level` parts, each five sums of at most 2*16*16 terms, normalised by batch statistics that a
    # gradient passes twice. What cancels (a bias before a BatchNorm has gradient 0) is measured by the largest.
    largest = max(float(q.double().abs().max()) for _, _, q in pairs[1:] if q.is_floating_point())
    for name, got, want in pairs:
        scale = float(want.detach().double().abs().max()) if name in ("output", "x") or "running" in name else largest
        assert_within(got, want.double(), torch.full_like(want.double(), level * 5 * 512 * U32 * scale), name)


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_block_reproduces_upstream(level: int, device: str) -> None:
    """Upstream's recorded outputs, gradients and running statistics, within what test_block allows for sums of at most
    2*16*32 terms."""
    if device != "cpu":
        pytest.skip("compares on the CPU: test_block above runs on the device")
    with wk.backend("triton"):
        assert_reproduces(f"waveblock_level{level}", wk.FusedWaveblock, torch.float32, tolerance=level * 5 * 1024 * U32)


def test_block_with_dropout_follows_torch_s_seed(device: str) -> None:
    """The same seeds, hence masks, on two backends."""
    torch.manual_seed(0)
    block = wk.FusedWaveblock(level=2, mult=2, ff_channel=8, final_dim=8, dropout=0.5).to(device)
    x = torch.randn(2, 8, 8, 12, device=device)
    results = []
    for name in ("triton", "auto"):
        torch.manual_seed(5)
        leaf = x.clone().requires_grad_()
        with wk.backend(name):
            out = block(leaf)
        out.square().mean().backward()
        results.append((out.detach(), leaf.grad))
    for got, want in zip(*results, strict=True):
        assert float((got - want).norm()) <= 1024 * U32 * float(want.norm())
