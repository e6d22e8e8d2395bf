"""reduce_haar and its gradients on every backend (the kernels alone: tests/kernels)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops import each
from tests.ops.contract import LAYOUTS, SHORT, Case, Contract, image, randn
from tests.tolerances import DTYPES, assert_within, sum_bound
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.common.precision import products_in
from wavemix_kernels.ops.norm.batch_norm import Affine
from wavemix_kernels.ops.reduce_haar import norm_reduce_haar, op, reference
from wavemix_kernels.ops.reduce_haar.tiles import is_narrow

# (n, c, h, w), outputs, levels: odd counts, thin, C / 4 outputs, more outputs than a block takes.
SIZES = (
    ((2, 20, 6, 10), 5, 1),
    ((1, 16, 8, 12), 36, 2),
    ((1, 1, 2, 2), 1, 1),
    ((3, 19, 8, 16), 4, 3),
    ((1, 8, 16, 32), 2, 4),
    ((1, 5, 60, 4), 3, 2),
    ((2, 12, 4, 4), 70, 1),
    ((1, 6, 32, 32), 3, 5),
)
HALF = (torch.float16, torch.bfloat16)
#: What the joined CUDA kernels take, each number of levels, tiles filled in part, and two that their parts take.
NORMED = (
    ((2, 16, 6, 10), 4, 1),
    ((1, 104, 8, 12), 26, 2),
    ((1, 136, 8, 24), 48, 3),
    ((1, 200, 16, 16), 64, 4),
    ((1, 8, 32, 32), 2, 5),
    ((2, 20, 4, 4), 5, 1),
    ((1, 8, 4, 4), 70, 1),
)


def absolute_pyramid(r: Tensor, levels: int) -> list[Tensor]:
    """The pyramid with plus signs only, all four bands alike."""
    out = []
    for _ in range(levels):
        r = F.avg_pool2d(r, 2) * 2
        out.append(torch.cat((r, r.repeat_interleave(3, 1)), 1))
    return out


class ReduceHaar(Contract):
    """C products and the bias for a pixel, then two additions a level. Tensor cores may cut a sum off instead of
    rounding it. The CPU stores the reduced image of half types between product and pyramid; every backend stores its
    gradient so."""

    name = "reduce_haar"
    axes: ClassVar[Any] = {
        "size": SIZES, "layout": tuple(LAYOUTS), "last": (False, True), "bias": (False, True),
        "cotangents": ("nchw", "channels_last", "channels_slice"),
    }  # fmt: skip
    products = True
    differentiable = ("x", "weight", "bias")

    def inputs(self, case: Case, device: str) -> Any:
        shape, outputs, _ = case.size
        weight = randn(outputs, shape[1], 1, 1).to(device, case.dtype)
        bias = randn(outputs, seed=1).to(device, case.dtype)
        x = image(randn(*shape), case.dtype, device, case.layout)
        return {"x": x, "weight": weight, "bias": bias if case.bias else None}

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        x, weight, bias = (tensors[name] for name in ("x", "weight", "bias"))
        zs = op.reduce_haar(x, weight, bias, case.size[2], channels_last=case.last, backend=backend)
        return {f"z{i}": z for i, z in enumerate(zs, 1)}

    def exact(self, case: Case, tensors: Any) -> Any:
        zs = reference.reduce_haar(tensors["x"], tensors["weight"], tensors["bias"], case.size[2])
        return {f"z{i}": z for i, z in enumerate(zs, 1)}

    def sizes(self, case: Case, tensors: Any, backend: str) -> Any:
        reduced = F.conv2d(tensors["x"], tensors["weight"], tensors["bias"])
        return {f"z{i}": z for i, z in enumerate(absolute_pyramid(reduced, case.size[2]), 1)}

    def terms(self, case: Case, name: str, backend: str) -> float:
        (n, c, h, w), outputs, levels = case.size
        products = {"d_x": outputs, "d_weight": n * h * w, "d_bias": n * h * w}.get(name, c)
        if backend == "triton" and is_narrow(case.dtype.itemsize, levels, outputs, c):
            products *= 4  # one sum over a quad's pixels
        cut_off = 2 if backend == "cuda" and case.dtype in HALF else 1
        return cut_off * (products + 1) + 4 * levels + 2

    def operands(self, case: Case, name: str, backend: str) -> float:
        return 1 if backend == "cpu" or name.startswith("d_") else 0

    def also(self, case: Case, tensors: Any, results: Any) -> None:
        order = torch.channels_last if case.last else torch.contiguous_format
        assert all(z.is_contiguous(memory_format=order) for name, z in results.items() if name.startswith("z"))


class Gradients(ReduceHaar):
    """All gradients by the op that makes them in one pass, with something to add to that of x."""

    name = "reduce_haar_backward"
    axes: ClassVar[Any] = {
        "size": SIZES, "layout": tuple(LAYOUTS), "bias": (False, True),
        "add": (None, "nchw", "channels_last", "by_image"),
        "cotangents": ("nchw", "channels_last", "channels_slice"),
    }  # fmt: skip
    differentiable = ()

    def inputs(self, case: Case, device: str) -> Any:
        (n, c, h, w), outputs, levels = case.size
        given = super().inputs(case, device)
        for i in range(1, levels + 1):
            values = randn(n, 4 * outputs, h >> i, w >> i, seed=i)
            given[f"g{i}"] = image(values, case.dtype, device, case.cotangents)
        if case.add == "by_image":  # one value for all pixels of a channel
            given["add"] = randn(n, c, 1, 1, seed=9).to(device, case.dtype).expand(n, c, h, w)
        else:
            given["add"] = image(randn(n, c, h, w, seed=9), case.dtype, device, case.add) if case.add else None
        return given

    def parts(self, case: Case, tensors: Any) -> tuple[Any, ...]:
        return [tensors[f"g{i}"] for i in range(1, case.size[2] + 1)], tensors["add"]

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        grads, add = self.parts(case, tensors)
        dx, dw, db = op.backward(grads, tensors["x"], tensors["weight"], case.bias, add, backend)
        return {"d_x": dx, "d_weight": dw, "d_bias": db}

    def differentiated(self, case: Case, tensors: Any, function: Callable[..., list[Tensor]]) -> Any:
        grads, add = self.parts(case, tensors)
        bias = tensors["x"].new_zeros(case.size[1]) if tensors["bias"] is None else tensors["bias"]
        leaves = [t.detach().requires_grad_() for t in (tensors["x"], tensors["weight"], bias)]
        made = dict(
            zip(("d_x", "d_weight", "d_bias"), torch.autograd.grad(function(*leaves), leaves, grads), strict=True)
        )
        if add is not None:
            made["d_x"] = made["d_x"] + add
        return made

    def exact(self, case: Case, tensors: Any) -> Any:
        return self.differentiated(case, tensors, lambda *leaves: reference.reduce_haar(*leaves, case.size[2]))

    def sizes(self, case: Case, tensors: Any, backend: str) -> Any:
        return self.differentiated(
            case, tensors, lambda *leaves: absolute_pyramid(F.conv2d(*leaves), case.size[2])
        )  # fmt: skip

    def also(self, case: Case, tensors: Any, results: Any) -> None:
        last = case.layout in ("channels_last", "channels_slice", "far") and case.size[0][1] > 1
        assert results["d_x"].is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def image_of(tensors: Any) -> Tensor:
    scale, shift = (tensors[name][:, None, None] for name in ("scale", "shift"))
    return tensors["y"] * scale + shift + tensors["x"]


class NormReduceHaar(ReduceHaar):
    """reduce_haar of an image that is made on the way, and rounded once."""

    name = "norm_reduce_haar"
    dtypes: ClassVar[Any] = {"reference": DTYPES[:2], "cpu": DTYPES, "cuda": HALF}
    axes: ClassVar[Any] = {"size": NORMED, "layout": ("channels_last", "channels_slice"), "bias": (False, True)}
    differentiable = ()

    def inputs(self, case: Case, device: str) -> Any:
        shape = case.size[0]
        values = {name: randn(shape[1], seed=i) for i, name in enumerate(("scale", "shift"), 3)}
        small = {name: v.to(device, accumulate_dtype(case.dtype)) for name, v in values.items()}
        y = image(randn(*shape, seed=2) + 2, case.dtype, device, case.layout)
        return super().inputs(case, device) | small | {"y": y}

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        of = Affine(tensors["scale"], tensors["shift"])
        given = (tensors[name] for name in ("x", "weight", "bias"))
        made, zs = norm_reduce_haar.forward(tensors["y"], of, *given, case.size[2], backend)
        return {"image": made, **{f"z{i}": z for i, z in enumerate(zs, 1)}}

    def exact(self, case: Case, tensors: Any) -> Any:
        made = image_of(tensors)
        return {"image": made, **super().exact(case, tensors | {"x": made})}

    def sizes(self, case: Case, tensors: Any, backend: str) -> Any:
        made = image_of(tensors)
        return {"image": made, **super().sizes(case, tensors | {"x": made}, backend)}

    def terms(self, case: Case, name: str, backend: str) -> float:
        return 3 if name == "image" else super().terms(case, name, backend) + 3

    def operands(self, case: Case, name: str, backend: str) -> float:
        return 0 if name == "image" else 1 + super().operands(case, name, backend)

    def also(self, case: Case, tensors: Any, results: Any) -> None:
        assert all(made.is_contiguous(memory_format=torch.channels_last) for made in results.values())


class NormGradients(Gradients):
    """All gradients of reduce_haar, and behind them those of the BatchNorm before it, whose sums are made on the way;
    x is the image, and its gradient is rounded before BatchNorm's reads it."""

    name = "norm_reduce_haar_backward"
    dtypes: ClassVar[Any] = {"reference": DTYPES[:2], "cpu": DTYPES, "cuda": HALF}
    axes: ClassVar[Any] = {
        "size": NORMED, "layout": ("channels_last", "channels_slice"), "bias": (False, True),
        "add": (None, "channels_last", "nchw", "by_image"), "cotangents": ("channels_last", "nchw"),
        "weighted": (False, True),
    }  # fmt: skip

    def inputs(self, case: Case, device: str) -> Any:
        shape = case.size[0]
        y = randn(*shape, seed=2) + 20  # a mean far from zero, which is taken off first
        var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
        small = {"mean": mean, "invstd": (var + 1e-2).rsqrt()}
        given = {name: v.to(device, accumulate_dtype(case.dtype)) for name, v in small.items()}
        given["norm_weight"] = randn(shape[1], seed=3).to(device, case.dtype) if case.weighted else None
        return super().inputs(case, device) | given | {"y": image(y, case.dtype, device, case.layout)}

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        grads, add = self.parts(case, tensors)
        given = (tensors[name] for name in ("y", "mean", "invstd", "norm_weight"))
        made = norm_reduce_haar.backward(grads, add, tensors["x"], tensors["weight"], case.bias, *given, backend)
        return dict(zip(("d_x", "d_y", "d_norm_weight", "d_norm_bias", "d_weight", "d_bias"), made, strict=True))

    def behind(self, d_x: Tensor, tensors: Any, sign: int) -> Any:
        """BatchNorm's gradients; `sign` 1: of absolute values, with plus signs only."""
        mean, invstd, weight = (tensors[name] for name in ("mean", "invstd", "norm_weight"))
        centred = tensors["y"] - mean[:, None, None]  # both positive, and so the same of absolute values
        xhat = (centred.abs() if sign > 0 else centred) * invstd[:, None, None]
        a = invstd if weight is None else invstd * weight
        both = d_x.mean((0, 2, 3), keepdim=True) + xhat * (d_x * xhat).mean((0, 2, 3), keepdim=True)
        d_y = a[:, None, None] * (d_x + sign * both)
        return {"d_y": d_y, "d_norm_weight": (d_x * xhat).sum((0, 2, 3)), "d_norm_bias": d_x.sum((0, 2, 3))}

    def exact(self, case: Case, tensors: Any) -> Any:
        made = super().exact(case, tensors)
        return made | self.behind(made["d_x"], tensors, -1)

    def sizes(self, case: Case, tensors: Any, backend: str) -> Any:
        made = super().sizes(case, tensors, backend)
        return made | self.behind(made["d_x"], tensors, 1)

    def terms(self, case: Case, name: str, backend: str) -> float:
        if name in ("d_x", "d_weight", "d_bias"):
            return super().terms(case, name, backend)
        n, _, h, w = case.size[0]
        return super().terms(case, "d_x", backend) + n * h * w + 8 + 2 * 24  # y's own rounding, 24 times its deviation

    def also(self, case: Case, tensors: Any, results: Any) -> None:
        assert all(results[name].is_contiguous(memory_format=torch.channels_last) for name in ("d_x", "d_y"))


MANY = {"layout": ("nchw", "channels_slice"), "bias": (True,), "add": ("nchw",), "cotangents": ("channels_last",)}
SMALL: Any = {"size": (((2, 4, 4, 8), 2, 2),), "cotangents": ("channels_last",)}
#: Cases that the CUDA kernel of the gradients takes: each of its sizes, each number of levels, tiles filled in part.
TAKEN: Any = {
    "size": (
        ((1, 16, 6, 10), 4, 1), ((3, 104, 4, 4), 26, 2), ((1, 136, 8, 8), 48, 3), ((1, 8, 16, 16), 34, 4),
        ((1, 200, 4, 2), 2, 1), ((1, 8, 32, 32), 2, 5),
    ),
    "layout": ("channels_last", "channels_slice"), "bias": (True,), "add": (None, "channels_last", "by_image"),
    "cotangents": ("channels_last",),
}  # fmt: skip
#: The same along W: rows of whole words of eight pixels, also across tiles, and of four and two.
TAKEN_ROWS: Any = TAKEN | {
    "size": (
        ((2, 8, 4, 24), 6, 1), ((1, 72, 4, 12), 18, 1), ((1, 200, 4, 6), 2, 1), ((2, 8, 8, 56), 2, 2),
        ((3, 104, 4, 4), 26, 2), ((2, 136, 8, 8), 48, 3), ((1, 8, 16, 32), 34, 4), ((1, 8, 32, 32), 2, 5),
    ),
    "layout": ("nchw",), "add": (None, "nchw", "channels_last"),
}  # fmt: skip
#: Each size and dtype of the joined kernels, where a slice may have been that of a pair of values.
TAKEN_BEHIND_NORM: Any = {"size": NORMED[:5], "layout": ("channels_last",)}
#: Cases of Triton's kernels for narrow images: each width, columns of no output, and more quads than a program takes.
NARROW: Any = {
    "size": (((1, 16, 2, 2), 3, 1), ((2, 32, 4, 6), 8, 1), ((5, 8, 16, 18), 2, 1)),
    "layout": ("channels_last",), "bias": (False, True), "cotangents": ("channels_last",),
}  # fmt: skip
test_contract = each.case(ReduceHaar(), ReduceHaar({"triton": HALF}, last=(True,), **NARROW))
test_gradients = each.case(Gradients(), Gradients({"triton": HALF}, add=(None, "nchw", "channels_last"), **NARROW))
test_gradients_taken_by_cuda = each.case(*(Gradients({"cuda": HALF}, **of) for of in (TAKEN, TAKEN_ROWS)))
test_contract_behind_norm = each.case(NormReduceHaar(), NormReduceHaar({"cuda": HALF}, **TAKEN_BEHIND_NORM))
test_gradients_behind_norm = each.case(NormGradients(), NormGradients({"cuda": HALF}, **TAKEN_BEHIND_NORM))
test_repeats = each.backend_repeats(ReduceHaar(), Gradients(), NormReduceHaar(), NormGradients())
test_threads = each.thread_count(
    Gradients(size=(((2, 64, 24, 32), 16, 3), ((1, 8, 8, 1032), 2, 3)), **MANY), same=False
)
test_threads_with_one_level = each.thread_count(
    Gradients(size=(((40, 8, 14, 10), 2, 1), ((1, 3, 2, 602), 2, 1)), **MANY)
)
test_empty_batch = each.empty_batch(
    *(of(size=(((0, 8, 4, 4), 8, 2),), layout=("nchw",)) for of in (ReduceHaar, Gradients))
)
test_empty_batch_behind_norm = each.empty_batch(NormReduceHaar(size=(((0, 8, 4, 4), 8, 2),)))
test_offsets_beyond_32_bits = each.case(*(of(SHORT, layout=("far",), **SMALL) for of in (ReduceHaar, Gradients)))
test_gradients_of_every_order = each.gradient(ReduceHaar(size=(((1, 3, 4, 4), 2, 2),), layout=("channels_last",)))
test_operators = each.operator(*(of(layout=("nchw", "channels_last"), **SMALL) for of in (ReduceHaar, Gradients)))
test_operators_behind_norm = each.operator(
    *(of(size=(((2, 8, 4, 8), 2, 2),), layout=("channels_last",)) for of in (NormReduceHaar, NormGradients))
)


@pytest.mark.usefixtures("core")
def test_rounds_to_tf32_only_when_allowed(device: str) -> None:
    x, weight = (randn(*shape).to(device, torch.float32) for shape in ((1, 32, 8, 16), (8, 32, 1, 1)))
    wide = [t.double().cpu() for t in (x, weight)]
    (exact,) = reference.reduce_haar(*wide, None, 1)
    (size,) = absolute_pyramid(F.conv2d(*(t.abs() for t in wide)), 1)
    bound = sum_bound(exact, size, 32 + 2, torch.float32)
    made = []
    for precision in ("ieee", "tf32"):
        with products_in(precision):
            made += op.reduce_haar(x, weight, backend="cuda")
    assert_within(made[0], exact, bound)
    with pytest.raises(AssertionError, match="beyond the bound"):
        assert_within(made[1], exact, bound)
    of_both = 2**14  # 2 * 2^-11 of both factors
    assert_within(made[1], exact, sum_bound(exact, size, 2 * 32 + 2 + of_both, torch.float32))
