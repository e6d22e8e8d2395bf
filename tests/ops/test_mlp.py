"""The pointwise MLP and its dropout on every backend (the kernels alone: tests/kernels)."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.ops import each
from tests.ops.contract import Case, Contract, image, on, randn
from tests.tolerances import DTYPES, UNIT_ROUNDOFF, accumulation, assert_within, stored
from wavemix_kernels import _native
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.mlp import op, reference

# rows (two images), channels of x, of second (0: none), of the hidden layer, of the output.
SIZES = (
    (10, 8, 3, 20, 6),
    (38, 20, 10, 40, 36),
    (34, 48, 4, 33, 5),
    (2, 1, 0, 1, 1),
    (16, 13, 0, 67, 50),
)
#: Half types: more rows than a program of all gradients takes, the hidden layer kept, and products of the library;
#: fp32: all weights' gradients not in one launch.
LARGE = ((530, 8, 0, 16, 8), (34, 160, 80, 66, 40), (18, 520, 16, 16, 20), (18, 1040, 0, 16, 280))
SEED = -(2**62) - 12345
NAMES = ("x", "second", "w1", "b1", "w2", "b2", "output")


def matrix(t: Tensor) -> Tensor:
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


class Mlp(Contract):
    """Output, all gradients and the output made again by backward.

    With |.| on every factor the same formulas give the sum S of the absolute values of all terms. A sum of k products
    errs by k * u * S; an operand rounded to a half type (an affine input, the hidden layer, its gradient) passes its
    relative error on, and so does what the library's products leave in memory: what precedes the activation, once for
    each input, and the gradient of what follows it. GELU and its derivative are within 8 u of their argument's scale
    and have slopes below 1.13 and 0.8. In float64 the reference errs as much.
    """

    name = "pointwise_mlp"
    axes: ClassVar[Any] = {
        "size": SIZES, "layout": ("nchw", "channels_last", "channels_slice"), "p": (0.0, 0.25, 0.5, 1.0),
        "affine": (False, True), "bias": (False, True), "want_output": (False, True),
    }  # fmt: skip
    dtypes: ClassVar[Any] = {name: types for name, types in Contract.dtypes.items() if name != "cuda"}
    products = True

    def sides(self, rows: int) -> tuple[int, int]:
        """Images, and columns of each."""
        return min(rows, 2), max(rows // 2, 1)

    def inputs(self, case: Case, device: str) -> Any:
        (rows, a, b, k, o), dtype = case.size, case.dtype
        wide = accumulation(dtype)

        def images(channels: int, seed: int) -> Tensor | None:
            n, w = self.sides(rows)
            values = randn(n, channels, 1, w, seed=seed)
            return image(values, dtype, device, case.layout) if channels else None

        affine = b and case.affine
        return {
            "x": images(a, 0), "second": images(b, 1),
            "scale": (1 + 0.3 * randn(b, seed=5)).to(device, wide) if affine else None,
            "shift": randn(b, seed=6).to(device, wide) if affine else None,
            "w1": (randn(k, a + b, seed=3) / (a + b) ** 0.5).to(device, dtype),
            "b1": randn(k, seed=3).to(device, dtype) if case.bias else None,
            "w2": (randn(o, k, seed=4) / k**0.5).to(device, dtype),
            "b2": randn(o, seed=4).to(device, dtype) if case.bias else None,
            "grad": images(o, 2), "seed": torch.tensor([SEED], device=device),
        }  # fmt: skip

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        *arguments, grad, seed = tensors.values()
        arguments += [case.p, seed if case.p else None]
        out = op.fused(*arguments, backend)
        assert out.is_contiguous(memory_format=torch.channels_last)
        made = op.backward(grad, *arguments, case.want_output, backend)
        assert (made.output is not None) == case.want_output
        if backend == "cpu" and made.output is not None:
            assert torch.equal(made.output, out), "backward's output differs from forward's"
        return {"out": out, **{f"made_{name}": t for name, t in zip(NAMES, made, strict=True)}}

    def solve(
        self, case: Case, t: Any, dtype: torch.dtype, forms: tuple[str, str] = ("fused", "fused"), gelu: float = 0.0
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Exact results and the gradient before the activation, and errors before they are stored: the larger ones of
        the forms of both directions. ``gelu``: its kernel's relative error."""
        wide = accumulation(dtype)
        u = UNIT_ROUNDOFF[wide] * (2 if dtype == torch.float64 else 1)
        half = UNIT_ROUNDOFF[dtype] if wide != dtype else 0.0  # of operands
        x, g, w1, w2 = matrix(t["x"]), matrix(t["grad"]), t["w1"], t["w2"]
        a, largest_shift = x.shape[1], 0.0
        if t["second"] is not None:
            second = matrix(t["second"])
            if t["scale"] is not None:
                second, largest_shift = second * t["scale"] + t["shift"], float(t["shift"].abs().max())
            x = torch.cat((x, second), 1)
        b1, b2 = (x.new_zeros(w.shape[0]) if b is None else b for w, b in ((w1, t["b1"]), (w2, t["b2"])))
        threshold = round((1 - case.p) * 2**16)
        factor = 2**16 / threshold if threshold else 0.0
        keep = torch.ones(x.shape[0], w1.shape[0], dtype=torch.float64)
        if case.p:
            keep = reference.keep_mask(*keep.shape, case.p, SEED, torch.device("cpu")).double() * factor
        z = x @ w1.T + b1
        cdf = torch.special.ndtr(z)
        slope = cdf + z * torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5
        hidden = z * cdf * keep
        gh = g @ w2
        gz = gh * keep * slope
        exact = {
            "output": hidden @ w2.T + b2, "x": (gz @ w1)[:, :a], "second": (gz @ w1)[:, a:], "w1": gz.T @ x,
            "b1": gz.sum(0), "w2": g.T @ hidden, "b2": g.sum(0), "before_activation": gz,
        }  # fmt: skip
        k1, k2, n = w1.shape[1], w1.shape[0], x.shape[0]
        stored_z, stored_gh = (half * (1 + (t["second"] is not None)), half) if "products" in forms else (0.0, 0.0)
        z_error = ((k1 + 4) * u + half + stored_z) * (x.abs() @ w1.abs().T + b1.abs())
        hidden_error = (1.13 * z_error + 8 * u * z.abs()) * keep + (half + gelu + 2 * u) * hidden.abs()
        gh_error = ((g.shape[1] + 1) * u + stored_gh) * (g.abs() @ w2.abs())
        gz_error = keep * (1.13 * gh_error + gh.abs() * (0.8 * z_error + (8 * u + gelu) * (1 + z.abs())))
        gz_error = gz_error + (half + 2 * u) * gz.abs()
        x_error = half * x.abs() + 3 * u * (x.abs() + largest_shift)
        hidden_abs, gz_abs = hidden.abs() + hidden_error, gz.abs() + gz_error
        of_inputs = gz_error @ w1.abs() + (k2 + 1) * u * (gz_abs @ w1.abs())
        error = {
            "output": hidden_error @ w2.abs().T + (k2 + 2) * u * (hidden_abs @ w2.abs().T + b2.abs()),
            "x": of_inputs[:, :a], "second": of_inputs[:, a:],
            "w1": gz_error.T @ x.abs() + gz_abs.T @ x_error + (n + 4) * u * (gz_abs.T @ x.abs()),
            "b1": gz_error.sum(0) + (n + 4) * u * gz_abs.sum(0),
            "w2": g.abs().T @ hidden_error + (n + 4) * u * (g.abs().T @ hidden_abs),
            "b2": (n + 4) * u * g.abs().sum(0), "before_activation": gz_error,
        }  # fmt: skip
        return exact, error

    def named(self, case: Case, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Matrices of results as the images they are, by the names of `run`."""
        n, w = self.sides(case.size[0])
        shaped = {
            name: t.reshape(n, 1, w, t.shape[1]).permute(0, 3, 1, 2) if name in ("x", "second", "output") else t
            for name, t in values.items()
            if name in NAMES
        }
        return {"out": shaped["output"], **{f"made_{name}": t for name, t in shaped.items()}}

    def exact(self, case: Case, tensors: Any) -> Any:
        return self.named(case, self.solve(case, tensors, case.dtype)[0])

    def bounds(self, case: Case, tensors: Any, cotangents: Any, exact: Any, backend: str) -> Any:
        _, a, b, _, o = case.size
        made = (choose.pointwise_mlp(case.dtype, a + b, o, backward) for backward in (False, True))
        forms = tuple(made) if backend == "triton" else ("fused", "fused")
        gelu = 2.0**-12.9 if backend == "cpu" and _native.by_matrix_units(case.dtype) else 0.0
        error = self.named(case, self.solve(case, tensors, case.dtype, forms, gelu)[1])
        return {name: error[name] + stored(t, case.dtype, backend) for name, t in exact.items()}


EVERYTHING = {"layout": ("channels_slice",), "affine": (True,), "bias": (True,), "want_output": (True,)}
MANY_ROWS = ((514, 64, 32, 128, 64), (600, 12, 6, 24, 8), (80, 33, 17, 516, 3))
test_contract = each.case(Mlp(), Mlp(size=LARGE, p=(0.5,), **EVERYTHING))
SMALL = ((8, 3, 2, 5, 4),)
test_empty_batch = each.empty_batch(Mlp(size=((0, 8, 3, 20, 6),), p=(0.5,), **EVERYTHING))
test_operators = each.operator(
    Mlp({"cpu": DTYPES}, size=SMALL, p=(0.0, 0.5), **EVERYTHING | {"layout": ("channels_last",)})
)


class Pixels(Mlp):
    """Images of one pixel: rows as far apart as the images, which kernels read in place."""

    def sides(self, rows: int) -> tuple[int, int]:
        return rows, 1


test_offsets_beyond_32_bits = each.case(
    Pixels({"cpu": (torch.float16,), "triton": (torch.float32, torch.float16)}, p=(0.5,),
           size=tuple((5, *size[1:]) for size in (SIZES[0], *LARGE[:3])), **EVERYTHING | {"layout": ("far",)})
)  # fmt: skip
test_repeats = each.backend_repeats(Mlp(size=SIZES[1:2], p=(0.5,), **EVERYTHING))
test_threads = each.thread_count(Mlp(size=MANY_ROWS, p=(0.25, 0.0), **EVERYTHING), same=False)


def case(dtype: torch.dtype) -> Case:
    return Case(dtype=dtype, size=(12, 5, 4, 9, 7), layout="channels_last", p=0.5, affine=True, bias=True,
                want_output=False)  # fmt: skip


@on("cpu", "triton")
def test_autograd_is_the_backward_op(backend: str, device: str) -> None:
    """The gradients of second, scale and shift follow from that of their affine map."""
    *arguments, grad, seed = Mlp().inputs(case(torch.float32), device).values()
    leaves = [t.requires_grad_() for t in arguments]
    got = torch.autograd.grad(op.fused(*leaves, 0.5, seed, backend), leaves, grad)
    want = op.backward(grad, *(t.detach() for t in leaves), 0.5, seed, False, backend)
    for index, other in ((0, want.x), (4, want.w1), (5, want.b1), (6, want.w2), (7, want.b2)):
        assert torch.equal(got[index], other)
    _, second, scale, *_ = arguments
    torch.testing.assert_close(got[1], want.second * scale.detach()[:, None, None])
    torch.testing.assert_close(got[2], (want.second * second.detach()).sum((0, 2, 3)))
    torch.testing.assert_close(got[3], want.second.sum((0, 2, 3)))


def test_gradcheck(device: str) -> None:
    """The formula of the contract's truth is torch's own gradient, and the op's in float64 is right by differences."""
    *arguments, _, seed = Mlp().inputs(case(torch.float64), "cpu").values()
    leaves = [t.requires_grad_() for t in arguments]
    assert torch.autograd.gradcheck(lambda *t: op.fused(*t, 0.5, seed, "cpu"), leaves, fast_mode=True)


@on("cpu", "triton")
@pytest.mark.parametrize("p", [0.0, 1e-12, 0.3, 0.5, 1.0])
def test_dropout_mask_is_the_reference_s(backend: str, p: float, device: str) -> None:
    """Forward and backward drop the same units: an identity shows hidden units of constant activation."""
    units, seed = 38, torch.tensor([-987654321987654321], device=device)
    x = torch.zeros(2, 1, 5, 7, device=device)
    w1, b1 = torch.zeros(units, 1, device=device), torch.ones(units, device=device)
    w2 = torch.eye(units, device=device)
    out = op.pointwise_mlp(x, w1, b1, w2, None, dropout=p, seed=seed, backend=backend)
    keep = reference.keep_mask(70, units, p, int(seed), torch.device(device))
    assert torch.equal(matrix(out) != 0, keep)
    assert p != 1e-12 or keep.all()
    # The gradient of one pixel's outputs by the first bias shows which units backward keeps.
    grad = torch.zeros(70, units, device=device)
    grad[41] = 1
    image_grad = grad.view(2, 5, 7, units).permute(0, 3, 1, 2)
    made = op.backward(image_grad, x, None, None, None, w1, b1, w2, None, p, seed, False, backend)
    assert torch.equal(made.b1 != 0, keep[41])


@on("cpu", "triton")
@pytest.mark.parametrize("outputs, joined", [(64, False), (72, True)])
def test_inputs_gradients_are_one_product_where_the_hidden_layer_is_kept(
    backend: str, device: str, outputs: int, joined: bool
) -> None:
    """The library then reads the hidden layer's gradient once, and the two gradients lie side by side."""
    tensors = [randn(2, c, 3, 4, seed=c).to(device, torch.float16) for c in (128, 64, outputs)]
    x, second, grad = (t.contiguous(memory_format=torch.channels_last) for t in tensors)
    w1, w2 = (randn(*shape).to(device, torch.float16) for shape in ((32, 192), (outputs, 32)))
    made = op.backward(grad, x, second, None, None, w1, None, w2, None, 0.0, None, False, backend)
    step = 192 if joined and backend == "triton" else 128
    assert made.x.stride() == (12 * step, 1, 4 * step, step)
    assert made.second is not None
    assert made.second.shape == second.shape
    wanted = op.backward(grad, x, second, None, None, w1, None, w2, None, 0.0, None, False, "reference")
    assert wanted.second is not None
    for got, want in ((made.x, wanted.x), (made.second, wanted.second)):
        bound = 4 * UNIT_ROUNDOFF[torch.float16] * want.double().abs().max()
        assert_within(got, want.double(), bound.expand(want.shape))


@on("cpu", "triton")
def test_dropped_nan_is_zero(backend: str, device: str) -> None:
    w1, b1 = torch.zeros(8, 1, device=device), torch.full((8,), float("nan"), device=device)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    x, w2 = torch.zeros(1, 1, 2, 2, device=device), torch.ones(3, 8, device=device)
    out = op.pointwise_mlp(x, w1, b1, w2, None, dropout=1.0, seed=seed, backend=backend)
    assert torch.equal(out, torch.zeros_like(out))
