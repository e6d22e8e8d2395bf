"""Haar analysis, synthesis, pyramid and bands on every backend (kernels: tests/kernels, PyWavelets: test_dwt.py)."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import wavemix_kernels as wk
from tests.ops import each
from tests.ops.contract import LAYOUTS, Case, Contract, image, randn
from tests.tolerances import haar_bound
from wavemix_kernels import backends
from wavemix_kernels.ops.haar import bands, op, pyramid, reference

ALL_LAYOUTS = (*LAYOUTS, "expanded")
# (shape, levels): even and odd, prime, deeper than one launch takes.
SIZES = (((2, 3, 8, 32), 1), ((1, 8, 16, 48), 4), ((2, 5, 7, 11), 2), ((1, 2, 31, 17), 3), ((1, 1, 66, 34), 6))
# Thin, one pixel, more levels than halves: no mode that reflects may meet single samples.
THIN = (((3, 2, 1, 9), 2), ((1, 1, 1, 1), 1), ((2, 16, 14, 6), 5), ((2, 1, 11, 1), 2), ((1, 36, 2, 2), 2))
ODD = (((2, 3, 7, 10), 3), ((1, 2, 12, 13), 4), ((1, 4, 9, 9), 2))
#: The modes that a kernel itself extends by; for the others the border is mended afterwards.
LOCAL = ("zero", "symmetric", "antisymmetric")


def flat(out: tuple[Tensor, list[Tensor]]) -> dict[str, Tensor]:
    return {"ll": out[0], **{f"high{i}": high for i, high in enumerate(out[1])}}


def level_sizes(shape: tuple[int, ...], levels: int) -> list[tuple[int, int]]:
    sizes = [shape[-2:]]
    for _ in range(levels):
        sizes.append(tuple(reference.half_up(n) for n in sizes[-1]))
    return sizes[1:]


def is_last(case: Case) -> bool:
    """Whether results lie in channels_last order: the order of a case's input."""
    return case.layout in ("channels_last", "channels_slice") and case.size[0][1] > 1


def in_order(t: Tensor, channels_last: bool) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


class OfImage(Contract):
    """One image in, of whose peak, and the cotangents', the bounds are made."""

    differentiable = ("x",)

    def inputs(self, case: Case, device: str) -> Any:
        return {"x": image(randn(*case.size[0]), case.dtype, device, case.layout)}

    def growth(self, case: Case) -> tuple[tuple[float, int], tuple[float, int]]:
        """Factor of the peak, and roundings at the storage dtype, of outputs and of the gradient."""
        return (1, 1), (1, 1)

    def bounds(self, case: Case, tensors: Any, cotangents: Any, exact: Any, backend: str) -> Any:
        x, grads = (max(float(t.detach().abs().max()) for t in ts.values()) for ts in (tensors, cotangents))
        (out, roundings), (back, back_roundings) = self.growth(case)
        given = {name: (back * grads, back_roundings) if name == "d_x" else (out * x, roundings) for name in exact}
        return {name: haar_bound(t, case.dtype, case.size[1], *given[name], backend) for name, t in exact.items()}


class Analysis(OfImage):
    """An extrapolating mode (2a - b) triples a sample per axis and level; each launch, and the mended border, rounds
    once more. A gradient adds up to four such samples."""

    name = "haar_dwt2d"
    axes: ClassVar[Any] = {"size": (*SIZES, *THIN), "mode": LOCAL, "layout": ALL_LAYOUTS}
    interpreted: ClassVar[Any] = Contract.interpreted | {"size": (*SIZES, *THIN[:2], ODD[2])}

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        return flat(wk.haar_dwt2d(tensors["x"], case.size[1], mode=case.mode, backend=backend))

    def exact(self, case: Case, tensors: Any) -> Any:
        return flat(reference.analysis(tensors["x"], case.size[1], case.mode))

    def growth(self, case: Case) -> tuple[tuple[float, int], tuple[float, int]]:
        (_, _, *sizes), levels = case.size
        gain = 3.0 ** (2 * levels) if case.mode in ("smooth", "antireflect") else 1.0
        times = len(op._spans(sizes, levels, case.mode)) + (0 if reference.MODES[case.mode].local else 2)
        return (gain, times), (2 * gain, 2 * times + 2)

    def also(self, case: Case, tensors: Any, results: Any) -> None:
        assert in_order(results["ll"], is_last(case))
        for name, high in results.items():
            if name.startswith("high"):
                joined = high.flatten(1, 2)
                assert joined.data_ptr() == high.data_ptr(), "[LH, HL, HH of each channel] must be a free view"
                assert in_order(joined, is_last(case))
        if case.layout in ("nchw", "channels_last") and 1 not in case.size[0]:  # strides of one element mean nothing
            assert results["d_x"].stride() == tensors["x"].stride()


class Synthesis(Contract):
    """The values at most double once ((ll + 3 high) / 2 <= 2 peak); `add` is one more rounding."""

    name = "haar_idwt2d"
    axes: ClassVar[Any] = {"size": (*SIZES, *THIN), "layout": ALL_LAYOUTS, "add": (False, True)}
    interpreted: ClassVar[Any] = Analysis.interpreted
    differentiable = ("ll", *(f"high{i}" for i in range(6)), "add")

    def inputs(self, case: Case, device: str) -> Any:
        (n, c, *full), levels = case.size
        sizes = level_sizes(case.size[0], levels)
        shapes = {"ll": (n, c, *sizes[-1]), **{f"high{i}": (n, c, 3, *size) for i, size in enumerate(sizes)}}
        if case.add:
            shapes["add"] = (n, c, *full)
        return {name: image(randn(*shape, seed=i), case.dtype, device, case.layout)
                for i, (name, shape) in enumerate(shapes.items())}  # fmt: skip

    def parts(self, case: Case, tensors: Any) -> tuple[Any, ...]:
        return tensors["ll"], [tensors[f"high{i}"] for i in range(case.size[1])], tensors.get("add")

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        ll, highs, add = self.parts(case, tensors)
        return {"image": wk.haar_idwt2d(ll, highs, size=case.size[0][2:], add=add, backend=backend)}

    def exact(self, case: Case, tensors: Any) -> Any:
        ll, highs, add = self.parts(case, tensors)
        return {"image": reference.synthesis(ll, highs, case.size[0][2:], "zero", add)}

    def bounds(self, case: Case, tensors: Any, cotangents: Any, exact: Any, backend: str) -> Any:
        shape, levels = case.size
        peak = 2 * max(float(t.detach().abs().max()) for t in tensors.values())
        back = float(cotangents["image"].abs().max())
        times = len(op._spans(shape[-2:], levels, "zero"))
        return {
            name: haar_bound(t, case.dtype, levels + case.add, peak if name == "image" else back, times, backend)
            for name, t in exact.items()
        }


test_analysis = each.case(Analysis())
test_every_mode = each.case(Analysis(size=ODD, mode=op.MODES, layout=("nchw", "channels_last")))
test_synthesis = each.case(Synthesis())


class Pyramid(OfImage):
    """The pyramid keeps the LL of every level, and its gradient adds them."""

    name = "haar_pyramid"
    axes: ClassVar[Any] = {
        "size": (((2, 5, 16, 32), 4), ((2, 9, 24, 16), 3), ((1, 8, 4, 36), 2), ((3, 1, 6, 2), 1), ((1, 2, 32, 32), 5)),
        "layout": ALL_LAYOUTS,
        "last": (False, True),
        "cotangents": ("nchw", "channels_last", "channels_slice", "expanded"),
    }

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        zs = pyramid.haar_pyramid(tensors["x"], case.size[1], channels_last=case.last, backend=backend)
        return {f"z{i}": z for i, z in enumerate(zs)}

    def exact(self, case: Case, tensors: Any) -> Any:
        return {f"z{i}": z for i, z in enumerate(reference.haar_pyramid(tensors["x"], case.size[1]))}

    def growth(self, case: Case) -> tuple[tuple[float, int], tuple[float, int]]:
        return (1, 1), (case.size[1], 1)

    def also(self, case: Case, tensors: Any, results: Any) -> None:
        assert all(in_order(z, case.last) for name, z in results.items() if name.startswith("z"))


test_pyramid = each.case(Pyramid())


class Bands(OfImage):
    """One level with all four bands side by side, as WTConv has them, and back."""

    name = "haar_bands"
    axes: ClassVar[Any] = {
        "layout": ALL_LAYOUTS,
        "size": (((2, 4, 16, 40), 1), ((1, 1, 2, 6), 1), ((3, 5, 6, 2), 1), ((1, 275, 4, 2), 1)),
        "back": (False, True),
    }

    def inputs(self, case: Case, device: str) -> Any:
        n, c, h, w = case.size[0]
        shape = (n, c, 4, h // 2, w // 2) if case.back else (n, c, h, w)
        return {"x": image(randn(*shape), case.dtype, device, case.layout)}

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        return {"out": (bands.haar_from_bands if case.back else bands.haar_bands)(tensors["x"], backend=backend)}

    def exact(self, case: Case, tensors: Any) -> Any:
        if case.back:
            return {"out": reference.synthesis(tensors["x"][:, :, 0], [tensors["x"][:, :, 1:]])}
        ll, (high,) = reference.analysis(tensors["x"])
        return {"out": torch.cat((ll.unsqueeze(2), high), 2)}

    def also(self, case: Case, tensors: Any, results: Any) -> None:
        out = results["out"] if case.back else results["out"].flatten(1, 2)
        assert out.data_ptr() == results["out"].data_ptr()
        assert in_order(out, is_last(case))


test_bands = each.case(Bands())
test_repeats = each.backend_repeats(Analysis(size=SIZES[3:4], mode=("symmetric",)))
EMPTY = (((0, 3, 8, 8), 2), ((2, 0, 8, 8), 2), ((0, 4, 5, 7), 2))
test_empty_batch = each.empty_batch(
    Analysis(size=EMPTY, layout=("nchw",)), Synthesis(size=EMPTY, layout=("nchw",)),
    Pyramid(size=EMPTY[:2], layout=("nchw",)), Bands(size=EMPTY[:2], layout=("nchw",)),
)  # fmt: skip
TINY, BOTH = (((1, 2, 5, 6), 2),), ("nchw", "channels_last")
#: Each operator is the other's gradient, on every backend: contracts hold their values, and Triton's interpreter takes
#: its time for many small differences.
FAST = dict.fromkeys(("cpu", "cuda"), (torch.float64,))
TRITON, EDGES = {"triton": (torch.float64,)}, ("zero", "symmetric", "antisymmetric", "reflect", "periodic", "smooth")
test_gradients_of_every_order = each.gradient(
    Analysis(FAST, size=TINY, mode=EDGES, layout=BOTH), Synthesis(FAST, size=TINY, layout=BOTH),
    Pyramid(FAST, size=(((1, 2, 8, 4), 2),), layout=BOTH),
    Bands(FAST, size=(((1, 2, 4, 6), 1),), layout=BOTH, back=(False,)),
    Bands(FAST, size=(((1, 2, 4, 6), 1),), layout=BOTH, back=(True,)),
    Analysis(TRITON, size=TINY, mode=("symmetric", "reflect"), layout=BOTH),
    Synthesis(TRITON, size=TINY, layout=("channels_last",), add=(True,)),
)  # fmt: skip
test_operators = each.operator(
    Analysis(size=(((2, 3, 9, 12), 2),), mode=("symmetric",), layout=BOTH),
    Synthesis(size=(((2, 3, 9, 12), 2),), layout=BOTH), Pyramid(size=(((2, 3, 8, 12), 2),), layout=BOTH),
    Bands(size=(((2, 3, 8, 12), 1),), layout=BOTH),
)  # fmt: skip


def test_bands_between_neighbours(backend: str, device: str) -> None:
    """A slice of four bands among six, as a module cuts it: nothing of the neighbours is read."""
    four = image(randn(2, 4, 4, 8, 20), torch.float32, device)
    framed = torch.full((2, 4, 6, 8, 20), float("nan"), device=device)
    framed[:, :, 1:5] = four
    want = bands.haar_from_bands(four, backend=backend)
    torch.testing.assert_close(bands.haar_from_bands(framed[:, :, 1:5], backend=backend), want, rtol=0, atol=0)


# --- Values that mean something ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["zero", "symmetric", "antisymmetric", "periodic"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's NumPy: inf - inf
def test_nan_and_infinity_stay_where_they_are(backend: str, device: str, mode: str, layout: str) -> None:
    """They reach exactly the coefficients that depend on them; zero padding stays zero beside them."""
    x = image(randn(1, 3, 9, 11), torch.float32, device, layout)
    x[0, 0, 8, 10], x[0, 1, 8, 3], x[0, 2, 2, 10] = float("inf"), float("nan"), float("-inf")
    ll, highs = wk.haar_dwt2d(x, 2, mode=mode, backend=backend)
    exact = reference.analysis(x, 2, mode)
    for got, want in zip([ll, *highs], [exact[0], *exact[1]], strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)
    back = wk.haar_idwt2d(ll, highs, size=(9, 11), backend=backend)
    torch.testing.assert_close(back, reference.synthesis(*exact, (9, 11)), equal_nan=True)


# --- Gradients of every order ----------------------------------------------------------------------------


def test_gradient_of_ll_alone(backend: str, device: str) -> None:
    """Unused bands bring undefined gradients: they count as zeros."""
    x = image(randn(1, 3, 8, 8), device=device).requires_grad_()
    ll, _ = wk.haar_dwt2d(x, 2, backend=backend)
    (grad,) = torch.autograd.grad(ll.square().sum(), x)
    exact = x.detach().clone().requires_grad_()
    (want,) = torch.autograd.grad(reference.analysis(exact, 2)[0].square().sum(), exact)
    torch.testing.assert_close(grad, want)


# --- The torch ecosystem ---------------------------------------------------------------------------------


def roundtrip(x: Tensor) -> Tensor:
    ll, highs = wk.haar_dwt2d(x, 2)
    return wk.haar_idwt2d(ll, [1.5 * h for h in highs], size=x.shape[-2:], add=x)


@pytest.mark.parametrize("dynamic, layout", [(False, "nchw"), (True, "channels_last"), (True, "nchw")])
def test_compile_fullgraph(dynamic: bool, layout: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(roundtrip, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((2, 3, 8, 12), (3, 3, 16, 20), (2, 5, 11, 14)):
        x = image(randn(*shape), torch.float32, layout=layout).requires_grad_()
        out = compiled(x)
        torch.testing.assert_close(out, roundtrip(x))
        (got,) = torch.autograd.grad(out.sum(), x)
        (want,) = torch.autograd.grad(roundtrip(x).sum(), x)
        torch.testing.assert_close(got, want)


def test_compiled_code_sees_a_change_of_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    seen = []

    def spy(*tensors: Tensor) -> str | None:
        seen.append(tensors)
        return backends.reference_why_not(*tensors)

    monkeypatch.setitem(op.BACKENDS, "reference", backends.Backend(spy, {}))
    compiled = torch.compile(lambda x: wk.haar_dwt2d(x)[0], fullgraph=True, backend="eager")
    x = torch.randn(1, 1, 4, 4)
    compiled(x)
    assert not seen
    with wk.backend("reference"):
        compiled(x)
    assert seen, "the compiled graph kept the backend it was traced with"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """The transform keeps its input's dtype; mixed coefficients (a convolution's output beside them) are promoted."""
    x = image(randn(2, 4, 8, 8), torch.float32).requires_grad_()
    conv = torch.nn.Conv2d(4, 4, 1)
    with torch.autocast("cpu", dtype=dtype):
        ll, highs = wk.haar_dwt2d(x, 2)
        low = conv(ll)
        out = wk.haar_idwt2d(low, highs)
    assert (ll.dtype, low.dtype, out.dtype) == (torch.float32, dtype, torch.float32)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    with pytest.raises(TypeError, match=r"highs\[0\]: expected the dtype of ll"):
        wk.haar_idwt2d(low, highs)


def test_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return roundtrip(x)

    x, y = (image(randn(n, 3, 8, 12), torch.float32) for n in (2, 5))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Model(), (x,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(y), roundtrip(y))


def test_functional_transforms() -> None:
    x = randn(2, 3, 8, 12)
    want = x.clone().requires_grad_()
    roundtrip(want).square().sum().backward()

    def loss(t: Tensor) -> Tensor:
        return roundtrip(t).square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(x), want.grad)
    per_sample = torch.func.vmap(torch.func.grad(lambda t: loss(t[None])))(x)
    torch.testing.assert_close(per_sample, want.grad)
    tangent = torch.randn_like(x)
    _, pullback = torch.func.vjp(roundtrip, x)
    torch.testing.assert_close((pullback(tangent)[0] * x).sum(), (tangent * roundtrip(x)).sum())  # linear
    for function, leaf in ((bands.haar_bands, x), (bands.haar_from_bands, bands.haar_bands(x))):
        torch.testing.assert_close(torch.func.vmap(function)(leaf[:, None]), function(leaf)[:, None], rtol=0, atol=0)


def test_errors_of_bands() -> None:
    with pytest.raises(ValueError, match="x: W=7: expected a multiple of 2"):
        bands.haar_bands(torch.zeros(1, 1, 4, 7))
    with pytest.raises(ValueError, match=r"bands: expected shape \(N, C, 4, h, w\), got \(1, 1, 3, 4, 4\)"):
        bands.haar_from_bands(torch.zeros(1, 1, 3, 4, 4))
