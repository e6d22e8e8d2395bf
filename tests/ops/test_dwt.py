"""The separable transforms of any filter bank: every backend beside the reference, and by the modules that call them
PyWavelets' values and true gradients."""

from __future__ import annotations

import functools
import shutil
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tests.clients.test_pytorch_wavelets import MODES, assert_same
from tests.ops import each
from tests.ops.contract import EVERY_AXIS, LAYOUTS, WITHOUT_CUDA, Case, Contract, image, randn
from wavemix_kernels.ops.dwt import op
from wavemix_kernels.ops.dwt.border import border
from wavemix_kernels.ops.dwt.reference import (
    Filters,
    coefficient_size,
    extend,
    sample_size,
    separable_dwt1d,
    separable_dwt2d,
    separable_idwt1d,
    separable_idwt2d,
)
from wavemix_kernels.pytorch_wavelets import DWTForward, DWTInverse

pywt = pytest.importorskip("pywt", reason="PyWavelets is not installed: pip install PyWavelets")

WAVES = ("haar", "db2", "db4", "bior2.2", "bior4.4", "sym5")
SIZES = ((8, 8), (7, 9), (5, 12), (16, 17), (2, 3), (1, 6))


def outcome(function, *errors):
    """The result of a call, or None where it raises one of `errors`."""
    try:
        return function()
    except errors:
        return None


# --- Every backend ---------------------------------------------------------------------------------------

#: Taps along W and H, then shapes: odd and even, shorter than the filters, wider than a vector, thin.
TAPS = ((8, 8), (2, 5), (5, 6), (18, 3), (3, 40))
SHAPES = ((2, 3, 16, 33), (1, 2, 7, 40), (3, 1, 1, 9), (1, 2, 11, 6), (1, 1, 70, 131))


def bank(taps: tuple[int, int], dtype: torch.dtype, device: str) -> Filters:
    """Filters without symmetry, of norm 1 or so."""
    sizes = (taps[0], taps[0], taps[1], taps[1])
    return Filters(*((randn(n, seed=i) / n**0.5).to(device, dtype) for i, n in enumerate(sizes)))


def line_sizes(x: Tensor, low: Tensor, high: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """One level along the last axis in which no two terms cancel."""
    n, taps = x.shape[-1], low.numel()
    start, count = op.first_sample(taps, mode), coefficient_size(n, taps, mode)
    after = max(0, start + 2 * (count - 1) + taps - n)
    wide = x @ extend(torch.eye(n, dtype=x.dtype), -1, -start, after, mode).abs()
    windows = wide.narrow(-1, 0, 2 * (count - 1) + taps).unfold(-1, taps, 2)
    return windows @ low.abs(), windows @ high.abs()


def analyse_sizes(x: Tensor, filters: Filters, mode: str) -> tuple[Tensor, Tensor]:
    along_w = line_sizes(x, filters.low_w, filters.high_w, mode)
    (ll, lh), (hl, hh) = ([b.mT for b in line_sizes(rows.mT, filters.low_h, filters.high_h, mode)] for rows in along_w)
    return ll, torch.stack((lh, hl, hh), 2)


class AnyFilters(Contract):
    """A level sums `taps` products along either axis; a sample past an end is a sum of at most three."""

    axes: ClassVar[Any] = {
        "shape": SHAPES, "taps": TAPS, "mode": MODES, "levels": (1, 2),
        "layout": ("nchw", "channels_last", "sliced", "expanded"),
    }  # fmt: skip
    dtypes: ClassVar[Any] = {b: Contract.dtypes[b] for b in ("reference", "cpu", "triton")}
    few: ClassVar[Any] = {
        "shape": ((1, 2, 5, 6), (2, 1, 4, 5)), "taps": ((4, 2), (2, 5), (3, 6)), "layout": ("nchw", "sliced"),
        "levels": (1,),
    }  # fmt: skip

    def terms(self, case: Case, name: str, backend: str) -> float:
        return case.levels * (sum(case.taps) + 8)

    def filters(self, case: Case, tensors: Any) -> Filters:
        first = next(t for t in tensors.values() if t is not None)
        exact = first.dtype if first.dtype == torch.float64 else torch.float32
        # The numbers that float32 holds, in the float64 truth too.
        return Filters(*(f.to(exact) for f in bank(case.taps, torch.float32, str(first.device))))

    def skip(self, case: Case) -> None:
        if case.mode in ("reflect", "antireflect") and min(case.shape[-2:]) == 1:
            pytest.skip("a single sample has nothing to reflect: tests/tools/test_errors.py")


class Analysis(AnyFilters):
    name = "dwt2d"
    differentiable = ("x",)

    def inputs(self, case: Case, device: str) -> Any:
        self.skip(case)
        return {"x": image(randn(*case.shape), case.dtype, device, case.layout)}

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        ll, highs = op.dwt2d(
            tensors["x"], self.filters(case, tensors), case.levels, mode=case.mode, backend=backend
        )  # fmt: skip
        assert all(t.is_contiguous() for t in (ll, *highs))
        return {"ll": ll, **{f"high{i}": high for i, high in enumerate(highs)}}

    def exact(self, case: Case, tensors: Any) -> Any:
        ll, highs = separable_dwt2d(tensors["x"], self.filters(case, tensors), case.levels, mode=case.mode)
        return {"ll": ll, **{f"high{i}": high for i, high in enumerate(highs)}}

    def sizes(self, case: Case, tensors: Any, backend: str) -> Any:
        ll, highs = tensors["x"], []
        for _ in range(case.levels):
            ll, high = analyse_sizes(ll, self.filters(case, tensors), case.mode)
            highs.append(high)
        return {"ll": ll, **{f"high{i}": high for i, high in enumerate(highs)}}


class BetweenPairs(Analysis):
    """A dense image that begins at the second sample of an aligned pair."""

    def inputs(self, case: Case, device: str) -> Any:
        (x,) = super().inputs(case, device).values()
        return {"x": torch.cat((x.new_full((1,), torch.nan), x.flatten()))[1:].view(case.shape)}


class Synthesis(AnyFilters):
    name = "idwt2d"
    differentiable = ("ll", "high0", "high1")
    axes: ClassVar[Any] = AnyFilters.axes | {
        "mode": ("zero", "periodization"), "levels": (1, 2), "odd": (0, 1), "missing": (False, True),
        "shape": ((2, 3, 24, 21), (1, 2, 21, 70), (1, 1, 40, 23)), "taps": (*TAPS[:4], (3, 10)),
    }  # fmt: skip
    few: ClassVar[Any] = AnyFilters.few | {
        "shape": ((1, 1, 5, 4), (2, 1, 4, 5)),
        "taps": ((4, 2), (2, 5), (3, 4)),
        "levels": (1, 2),
    }

    def inputs(self, case: Case, device: str) -> Any:
        """The coarser level's coefficients, and finer ones to go with them, one fewer where `odd`."""
        n, c, *size = case.shape
        tensors: Any = {"ll": randn(n, c, *size)}
        for level in reversed(range(case.levels)):
            tensors[f"high{level}"] = None if case.missing and level else randn(n, c, 3, *size, seed=level + 1)
            size = [sample_size(s, t, case.mode) - case.odd for s, t in zip(size, case.taps[::-1], strict=True)]
        return {k: t if t is None else image(t, case.dtype, device, case.layout) for k, t in tensors.items()}

    def parts(self, case: Case, tensors: Any) -> Any:
        return tensors["ll"], [tensors.get(f"high{i}") for i in range(case.levels)], self.filters(case, tensors)

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        return {"image": op.idwt2d(*self.parts(case, tensors), mode=case.mode, backend=backend)}

    def exact(self, case: Case, tensors: Any) -> Any:
        return {"image": separable_idwt2d(*self.parts(case, tensors), mode=case.mode)}

    def sizes(self, case: Case, tensors: Any, backend: str) -> Any:
        ll, highs, filters = self.parts(case, tensors)
        return {"image": separable_idwt2d(ll, highs, Filters(*(f.abs() for f in filters)), mode=case.mode)}


class Lines(AnyFilters):
    """There and, by other filters and from other coefficients, back."""

    name = "dwt1d"
    differentiable = ("x", "low", "high0", "high1")
    axes: ClassVar[Any] = {
        "length": (33, 40, 7), "taps": (8, 5, 2, 12), "mode": MODES, "levels": (1, 2), "step": (1, 3),
        "missing": (False, True), "dim": (-1, 1, 0),
    }  # fmt: skip
    few: ClassVar[Any] = {"length": (7, 8), "taps": (5, 2), "levels": (1,)}

    def inputs(self, case: Case, device: str) -> Any:
        length = 40 + case.length
        tensors: Any = {
            "x": randn(2, 3, case.length * case.step)[..., :: case.step],
            "low": randn(2, 3, length, seed=1),
        }
        for level in reversed(range(case.levels)):
            tensors[f"high{level}"] = None if case.missing and level else randn(2, 3, length, seed=level + 2)
            length = sample_size(length, case.taps, case.mode) - 1
        moved = {k: t if t is None else t.movedim(-1, case.dim) for k, t in tensors.items()}
        return {k: t if t is None else t.to(device, case.dtype) for k, t in moved.items()}

    def both(self, case: Case, tensors: Any, there: Any, back: Any) -> Any:
        filters = bank((case.taps, case.taps), torch.float32, str(tensors["x"].device))
        exact = [f.to(torch.float64 if tensors["x"].dtype == torch.float64 else torch.float32) for f in filters]
        low, highs = there(tensors["x"], exact[:2], case.levels, dim=case.dim, mode=case.mode)
        details = [tensors.get(f"high{i}") for i in range(case.levels)]
        made = {"low": low, **{f"high{i}": high for i, high in enumerate(highs)}}
        return made | {"line": back(tensors["low"], details, exact[2:], dim=case.dim, mode=case.mode)}

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        functions = (functools.partial(f, backend=backend) for f in (op.dwt1d, op.idwt1d))
        return self.both(case, tensors, *functions)

    def exact(self, case: Case, tensors: Any) -> Any:
        return self.both(case, tensors, *(functools.partial(self.last, f) for f in (separable_dwt1d, separable_idwt1d)))

    def last(self, function: Any, x: Tensor, *given: Any, dim: int, mode: str) -> Any:
        """`function` of lines (N, C, L) along any axis."""

        def lines(t: Any) -> Any:
            return t.movedim(dim, -1) if isinstance(t, Tensor) and t.ndim == 3 else t

        first, *rest = ([lines(t) for t in g] if isinstance(g, list) else g for g in given)
        out = function(lines(x), first, *rest, mode=mode)
        return (
            out.movedim(-1, dim)
            if isinstance(out, Tensor)
            else (out[0].movedim(-1, dim), [t.movedim(-1, dim) for t in out[1]])
        )

    def terms(self, case: Case, name: str, backend: str) -> float:
        return case.levels * (case.taps + 8)

    def sizes(self, case: Case, tensors: Any, backend: str) -> Any:
        def there(x: Tensor, filters: Any, levels: int, *, mode: str) -> Any:
            highs = []
            for _ in range(levels):
                x, high = line_sizes(x, *filters, mode)
                highs.append(high)
            return x, highs

        def back(low: Tensor, highs: Any, filters: Any, *, mode: str) -> Tensor:
            return separable_idwt1d(low, highs, [f.abs() for f in filters], mode=mode)

        return self.both(case, tensors, *(functools.partial(self.last, f) for f in (there, back)))


test_analysis = each.case(Analysis())
test_synthesis = each.case(Synthesis())
test_lines = each.case(Lines())
test_analysis_between_pairs = each.case(
    BetweenPairs(
        dict.fromkeys(("cpu", "triton"), (torch.bfloat16,)),
        shape=((1, 2, 5, 6),), taps=((4, 2), (5, 6)), levels=(1,), layout=("nchw",),
        mode=("zero", "symmetric", "periodization"),
    )
)  # fmt: skip
FARTHER: Any = {"shape": ((2, 2, 5, 6),), "taps": ((4, 2),), "mode": ("symmetric",), "levels": (1,),
                "layout": EVERY_AXIS}  # fmt: skip
test_offsets_beyond_32_bits = each.case(Analysis(WITHOUT_CUDA, **FARTHER), Synthesis(WITHOUT_CUDA, **FARTHER))
test_operators = each.operator(
    Analysis(shape=SHAPES[1:4], taps=TAPS[1:4], layout=("nchw", "channels_last"), mode=("zero", "periodic")),
    Synthesis(taps=TAPS[1:4], layout=("nchw",)),
    Lines(mode=("symmetric", "periodization"), length=(33,), taps=(5, 12)),
    backends=("auto",),
)
test_threads_change_nothing = each.thread_count(Analysis(shape=((1, 2, 150, 131), (2, 3, 90, 70)), levels=(1,)))
# Each operator is the other's gradient, on every backend: one shows that they close.
CPU = {"cpu": (torch.float64,)}
test_derivatives = each.gradient(
    Analysis(CPU, shape=((1, 2, 7, 10),), taps=((5, 6), (8, 2)), layout=("nchw",)),
    Synthesis(CPU, shape=((1, 2, 6, 7),), taps=((5, 6), (8, 2)), layout=("nchw",)),
    Lines(CPU, length=(7,), taps=(5, 8)),
)


def test_learned_filters_get_their_gradient_or_an_error():
    x, filters = randn(1, 1, 8, 8), Filters(*(f.requires_grad_() for f in bank((4, 4), torch.float64, "cpu")))
    op.dwt2d(x, filters)[0].sum().backward()
    assert all(f.grad is not None for f in filters if f is not filters.high_h and f is not filters.high_w)
    with pytest.raises(ValueError, match="backend='cpu' has no gradient for filters"):
        op.dwt2d(x, filters, backend="cpu")


def test_border_of_a_long_line_is_that_of_a_short_one():
    for mode in MODES:
        for n in (400, 401):
            whole = extend(torch.eye(n, dtype=torch.float64), -1, 7, 8, mode)
            table = border(n, 7, 8, mode)
            dense = torch.zeros(table.before + table.after, n, dtype=torch.float64)
            for i, (a, b) in enumerate(zip(table.begin[:-1], table.begin[1:], strict=True)):
                dense[i, table.sample[a:b]] = table.weight[a:b]
            want = torch.cat((whole[:, :7], whole[:, n + 7 :]), 1).T
            assert torch.equal(dense, want[: len(dense)])
            assert len(dense) or not want.any()


def test_columns_are_lines_whatever_their_number():
    x, filters = randn(1, 11, 4500).float(), bank((6, 6), torch.float32, "cpu")[:2]  # in more than one run of columns
    low, (high,) = op.dwt1d(x, filters, dim=1, mode="symmetric", backend="cpu")
    want, (want_high,) = op.dwt1d(x.mT, filters, mode="symmetric", backend="cpu")
    torch.testing.assert_close(low, want.mT)
    torch.testing.assert_close(high, want_high.mT)
    back = op.idwt1d(low, [high], filters, dim=1, backend="cpu")
    torch.testing.assert_close(back, op.idwt1d(want, [want_high], filters, backend="cpu").mT)


def test_taps_of_infinity_meet_no_sample_they_do_not_read():
    # A filter of odd length has no further tap of zero, which would make NaN of an infinity beside its window.
    x = torch.full((1, 1, 3, 8), 1.0)
    x[..., 5] = float("inf")
    filters = bank((3, 3), torch.float32, "cpu")
    got, want = (f(x, filters, mode="zero")[0] for f in (op.dwt2d, separable_dwt2d))
    assert torch.equal(got.isfinite(), want.isfinite())


# --- PyWavelets --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Level value of:UserWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wave", WAVES)
def test_equals_pywavelets(wave, mode, float64_buffers):
    for size in SIZES:
        for levels in (1, 2, 3):
            x = randn(2, 3, *size)
            want = outcome(lambda: pywt.wavedec2(x.numpy(), wave, mode=mode, level=levels), ValueError)  # noqa: B023
            got = outcome(lambda: DWTForward(levels, wave, mode)(x), ValueError)  # noqa: B023
            assert (got is None) == (want is None), f"{size}, {levels} levels: only one of the two raises"
            if want is None:
                assert mode in ("reflect", "antireflect")  # a single sample has nothing to reflect
                continue
            low, *details = want
            assert_same(
                [got[0], *(band for high in got[1] for band in high.unbind(2))],
                [low, *(band for bands in details[::-1] for band in bands)],
            )
            assert_same([DWTInverse(wave, mode)(got)], [pywt.waverec2(want, wave, mode=mode)])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wave", WAVES)
def test_inverse_of_any_coefficients_equals_pywavelets(wave, mode, float64_buffers):
    # Not only of coefficients that a transform made; 5 is the fewest that filters of 10 taps take.
    for size in ((6, 5), (5, 9)):
        low, high = randn(2, 3, *size), randn(2, 3, 3, *size, seed=1)
        want = pywt.idwt2((low.numpy(), tuple(band.numpy() for band in high.unbind(2))), wave, mode=mode)
        assert_same([DWTInverse(wave, mode)((low, [high]))], [want])


def test_vmap_over_images_and_over_filters():
    x, filters = randn(3, 2, 4, 9, 10), bank((4, 4), torch.float64, "cpu")
    many = Filters(*(torch.stack((f, f.flip(0), f * 2)) for f in filters))

    def there_and_back(x, *filters):
        ll, highs = op.dwt2d(x, Filters(*filters), mode="symmetric")
        return ll, op.idwt2d(ll, highs, Filters(*filters))

    for dims, banks in ((None, [filters] * 3), (0, [Filters(*(f[i] for f in many)) for i in range(3)])):
        got = torch.func.vmap(there_and_back, (0, *[dims] * 4))(x, *(filters if dims is None else many))
        for i in range(3):
            for g, w in zip(got, there_and_back(x[i], *banks[i]), strict=True):
                torch.testing.assert_close(g[i], w)


# --- Gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wave", ["haar", "db2", "bior2.2"])
def test_gradient_is_true(wave, mode, float64_buffers):
    dwt, idwt = DWTForward(2, wave, mode), DWTInverse(wave, mode)
    x = randn(1, 1, 5, 6).requires_grad_()
    assert gradcheck(lambda x: (lambda low, highs: (low, *highs))(*dwt(x)), (x,))
    low, highs = dwt(x.detach())
    coefficients = [t.requires_grad_() for t in (low, *highs)]
    assert gradcheck(lambda low, *highs: idwt((low, highs)), coefficients)


@pytest.mark.parametrize("wave", ["haar", "db2"])
def test_second_gradient_is_true(wave, float64_buffers):
    dwt = DWTForward(1, wave, "symmetric")
    assert gradgradcheck(lambda x: dwt(x)[1][0] ** 2, (randn(1, 1, 5, 4).requires_grad_(),))


# --- Dtypes, layouts, autocast -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wave", ["haar", "db3"])
def test_dtype_follows_the_input(wave, dtype):
    x = randn(2, 3, 13, 10).to(dtype)
    low, highs = DWTForward(2, wave, "symmetric")(x)
    y = DWTInverse(wave, "symmetric")((low, highs))
    assert {t.dtype for t in (low, *highs, y)} == {dtype}
    want_low, want_highs = DWTForward(2, wave, "symmetric")(x.double())
    want_y = DWTInverse(wave, "symmetric")((low.double(), [h.double() for h in highs]))
    # fp32 arithmetic: 2 levels of 2 passes of at most 6 products, whose absolute sum grows by at most 2 a
    # level (1.7 a pass for db3); then one rounding to the dtype.
    arithmetic = 0 if dtype == torch.float64 else 2 * 2 * 7 * 2.0**-24
    for got, want in zip((low, *highs, y), (want_low, *want_highs, want_y), strict=True):
        allowed = arithmetic * 3**2 * float(x.abs().max()) + torch.finfo(dtype).eps / 2 * want.abs()
        assert ((got.double() - want).abs() <= allowed).all()


@pytest.mark.parametrize("wave", ["haar", "db2"])
def test_any_layout_and_empty_batch(wave):
    dwt, idwt = DWTForward(2, wave, "reflect"), DWTInverse(wave)
    x = randn(2, 4, 11, 14)
    want = dwt(x)
    for layout in LAYOUTS:
        got = dwt(image(x, layout=layout))
        for g, w in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=1e-14)
        torch.testing.assert_close(idwt(got), idwt(want), rtol=0, atol=1e-14)
    for shape in ((0, 4, 11, 14), (2, 0, 11, 14)):
        low, highs = dwt(randn(*shape))
        assert low.shape[2:] == want[0].shape[2:]
        assert idwt((low, highs)).shape == (*shape[:2], *idwt(want).shape[2:])


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor's CPU code needs g++, which is not installed")
def test_inductor_has_the_true_gradient_at_odd_sizes():
    torch.compiler.reset()
    dwt, x = DWTForward(1, "db2", "periodization"), randn(2, 3, 9, 11).float().requires_grad_()
    gradients = []
    for analysis in (dwt, torch.compile(dwt, fullgraph=True, dynamic=False)):
        low, (high,) = analysis(x)
        gradients.append(torch.autograd.grad(low.square().sum() + high.square().sum(), x)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor's CPU code needs g++, which is not installed")
@pytest.mark.parametrize(("mode", "shape"), [("periodization", (2, 3, 9, 11)), ("symmetric", (2, 4, 64, 64))])
def test_inductor_has_the_true_gradient_of_the_reference(mode, shape):
    # In torch 2.13 its vectorised float32 code had a wrong one where a signal was joined with its own end, and wrote
    # out of bounds, in code for several threads, where borders were taken by an index.
    torch.compiler.reset()
    reference = functools.partial(separable_dwt2d, filters=DWTForward(1, "db4")._filters(), levels=1, mode=mode)
    x, gradients, threads = randn(*shape).float().requires_grad_(), [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for analysis in (reference, torch.compile(reference, fullgraph=True, dynamic=False)):
            low, (high,) = analysis(x)
            gradients.append(torch.autograd.grad(low.square().sum() + high.square().sum(), x)[0])
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)
