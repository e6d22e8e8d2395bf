"""Haar analysis and synthesis on every backend against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import wavemix_kernels as wk
from tests.tolerances import DTYPES, assert_within, haar_bound, stored_roundoff
from wavemix_kernels import backends
from wavemix_kernels.ops.haar import op, reference

# Every dtype in both dense layouts, and the awkward ones once: the interpreter and the emulator are slow.
FORMS = [(layout, dtype) for layout in ("contiguous", "channels_last") for dtype in DTYPES]
FORMS += [(layout, torch.float32) for layout in ("sliced", "transposed", "expanded")]
# (shape, levels): even and odd, prime and thin, one pixel, deeper than one launch takes.
SHAPES = [
    ((2, 3, 16, 32), 1),
    ((1, 8, 32, 48), 4),
    ((2, 5, 7, 11), 2),
    ((1, 4, 31, 37), 3),
    ((3, 2, 1, 9), 2),
    ((1, 1, 1, 1), 1),
    ((2, 16, 14, 6), 5),
    ((1, 2, 80, 66), 6),
]


def make(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str, seed: int = 0) -> Tensor:
    """A random tensor of ``shape`` in an awkward memory layout."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(device)

    n, c, *rest, h, w = shape
    if layout == "channels_last":
        x = normal(n, h, w, c, *rest)
        return x.permute(0, 3, 4, 1, 2) if rest else x.permute(0, 3, 1, 2)
    if layout == "sliced":  # an odd offset and odd strides: nothing is 16-byte aligned
        return normal(n, c + 1, *rest, h + 2, 2 * w + 3)[:, 1:, ..., 1 : h + 1, 1 : 2 * w + 1 : 2]
    if layout == "transposed":
        return normal(n, c, *rest, w, h).transpose(-1, -2)
    if layout == "expanded":
        return normal(1, c, *rest, h, 1).expand(shape)
    return normal(*shape)


def launches(shape: tuple[int, ...], levels: int, mode: str) -> int:
    return len(op._spans(shape[-2:], levels, mode))


@pytest.mark.parametrize("layout, dtype", FORMS, ids=str)
@pytest.mark.parametrize("shape, levels", SHAPES, ids=str)
def test_analysis_matches_reference(
    backend: str, device: str, shape: tuple[int, ...], levels: int, layout: str, dtype: torch.dtype
) -> None:
    x = make(shape, dtype, layout, device)
    ll, highs = wk.haar_dwt2d(x, levels, backend=backend)
    exact = reference.analysis(x.double(), levels)
    peak, times = x.abs().max().item(), launches(shape, levels, "zero")
    assert ll.dtype == dtype
    assert len(highs) == levels
    for name, got, want in zip(["ll", *range(levels)], [ll, *highs], [exact[0], *exact[1]], strict=True):
        assert_within(got, want, haar_bound(want, dtype, levels, peak, times, backend), f"{name}")


@pytest.mark.parametrize("layout, dtype", FORMS, ids=str)
@pytest.mark.parametrize("shape, levels", SHAPES, ids=str)
@pytest.mark.parametrize("with_add", [False, True], ids=["plain", "add"])
def test_synthesis_matches_reference(
    backend: str, device: str, shape: tuple[int, ...], levels: int, layout: str, dtype: torch.dtype, with_add: bool
) -> None:
    n, c, h, w = shape
    sizes = op._level_sizes(h, w, levels)
    highs = [make((n, c, 3, *size), dtype, layout, device, seed) for seed, size in enumerate(sizes)]
    ll = make((n, c, *sizes[-1]), dtype, layout, device, 99)
    add = make(shape, dtype, layout, device, 100) if with_add else None
    out = wk.haar_idwt2d(ll, highs, size=(h, w), add=add, backend=backend)
    exact = reference.synthesis(
        ll.double(), [high.double() for high in highs], (h, w), "zero", None if add is None else add.double()
    )
    # Values at most double once ((ll + 3 high) / 2 <= 2 peak); `add` is one more rounding.
    peak = 2 * max(t.abs().max().item() for t in [ll, *highs] + ([add] if with_add else []))
    bound = haar_bound(exact, dtype, levels + with_add, peak, launches(shape, levels, "zero"), backend)
    assert_within(out, exact, bound)


@pytest.mark.parametrize("mode", op.MODES)
@pytest.mark.parametrize("shape, levels", [((2, 3, 7, 10), 3), ((1, 2, 12, 13), 4), ((1, 4, 9, 9), 2)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_mode_and_its_gradient(
    backend: str, device: str, mode: str, shape: tuple[int, ...], levels: int, layout: str, dtype: torch.dtype
) -> None:
    """The kernels' gradient is the exact adjoint, odd sizes included, where autograd of the reference is the judge."""
    x = make(shape, dtype, layout, device).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    out = wk.haar_dwt2d(x, levels, mode=mode, backend=backend)
    exact = reference.analysis(exact_x, levels, mode)
    cotangents = [make(tuple(t.shape), dtype, layout, device, 7 + i) for i, t in enumerate([out[0], *out[1]])]
    (grad,) = torch.autograd.grad([out[0], *out[1]], x, cotangents)
    (exact_grad,) = torch.autograd.grad([exact[0], *exact[1]], exact_x, [t.double() for t in cotangents])
    # Extrapolating modes (2a - b) triple a sample per axis and level; the mended border rounds once more.
    gain = 3.0 ** (2 * levels) if mode in ("smooth", "antireflect") else 1.0
    times = launches(shape, levels, mode) + 2
    peak = gain * x.abs().max().item()
    for got, want in zip([out[0], *out[1]], [exact[0], *exact[1]], strict=True):
        assert_within(got, want, haar_bound(want, dtype, levels, peak, times), mode)
    peak = gain * 2 * max(t.abs().max().item() for t in cotangents)
    assert_within(grad, exact_grad, haar_bound(exact_grad, dtype, levels, peak, 2 * times), f"{mode} gradient")
    assert grad.stride() == x.stride()


@pytest.mark.parametrize("mode", [m for m in op.MODES if m != "per"])
@pytest.mark.parametrize("shape", [(1, 1, 8, 12), (2, 3, 7, 9), (1, 2, 5, 14), (1, 1, 3, 3)], ids=str)
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_pywavelets_agrees(mode: str, shape: tuple[int, ...], levels: int, name: str) -> None:
    pywt = pytest.importorskip("pywt", reason="PyWavelets is not installed")
    x = make(shape, torch.float64, "contiguous", "cpu")
    with wk.backend(name):
        ll, highs = wk.haar_dwt2d(x, levels, mode=mode)
        back = wk.haar_idwt2d(ll, highs, mode=mode, size=shape[-2:])
    approx = x.numpy()
    for level in range(levels):
        approx, details = pywt.dwt2(approx, "haar", mode=mode)
        np.testing.assert_allclose(highs[level].numpy(), np.stack(details, 2), rtol=0, atol=1e-13)
    np.testing.assert_allclose(ll.numpy(), approx, rtol=0, atol=1e-13)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-13)


def test_reflecting_a_single_sample_is_refused_as_pywavelets_does() -> None:
    pywt = pytest.importorskip("pywt", reason="PyWavelets is not installed")
    for mode in reference.NEEDS_TWO:
        with pytest.raises(ValueError, match="greater than 1"):
            pywt.dwt2(np.ones((1, 4)), "haar", mode=mode)
        with pytest.raises(ValueError, match=r"level 2 meets a single sample along H"):
            wk.haar_dwt2d(torch.ones(1, 1, 2, 8), 2, mode=mode)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_roundtrip_and_layouts(backend: str, device: str, layout: str) -> None:
    x = make((2, 4, 19, 24), torch.float32, layout, device)
    ll, highs = wk.haar_dwt2d(x, 3, backend=backend)
    back = wk.haar_idwt2d(ll, highs, size=(19, 24), backend=backend)
    torch.testing.assert_close(back, x)
    assert back.stride() == x.stride()
    want = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert ll.is_contiguous(memory_format=want)
    for high in highs:
        flat = high.flatten(1, 2)
        assert flat.data_ptr() == high.data_ptr(), "[LH, HL, HH of each channel] must be a free view"
        assert flat.is_contiguous(memory_format=want)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8), (0, 4, 5, 7)], ids=str)
def test_empty_batch(backend: str, device: str, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=device, requires_grad=True)
    ll, highs = wk.haar_dwt2d(x, 2, backend=backend)
    back = wk.haar_idwt2d(ll, highs, size=shape[-2:], backend=backend)
    back.sum().backward()
    assert back.shape == x.shape == x.grad.shape


@pytest.mark.parametrize("mode", ["zero", "symmetric", "antisymmetric", "periodic"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_and_infinity_stay_where_they_are(backend: str, device: str, mode: str, layout: str) -> None:
    """They reach exactly the coefficients that depend on them; zero padding stays zero beside them."""
    x = make((1, 3, 9, 11), torch.float32, layout, device)
    x[0, 0, 8, 10], x[0, 1, 8, 3], x[0, 2, 2, 10] = float("inf"), float("nan"), float("-inf")
    ll, highs = wk.haar_dwt2d(x, 2, mode=mode, backend=backend)
    exact = reference.analysis(x, 2, mode)
    for got, want in zip([ll, *highs], [exact[0], *exact[1]], strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)
    back = wk.haar_idwt2d(ll, highs, size=(9, 11), backend=backend)
    torch.testing.assert_close(back, reference.synthesis(*exact, (9, 11)), equal_nan=True)


def test_offsets_beyond_32_bits(backend: str, device: str) -> None:
    """A batch whose samples lie more than 2**31 elements apart (the pages between are never touched)."""
    apart = 2**31 + 64
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 2 * (apart + 4096):
        pytest.skip("not enough free GPU memory for 2**31 elements")
    block = torch.empty(apart + 4096, dtype=torch.bfloat16, device=device)
    x = block.as_strided((2, 2, 16, 16), (apart, 256, 16, 1))
    x.copy_(make((2, 2, 16, 16), torch.bfloat16, "contiguous", device))
    ll, highs = wk.haar_dwt2d(x, 2, backend=backend)
    exact = reference.analysis(x.double(), 2)
    for got, want in zip([ll, *highs], [exact[0], *exact[1]], strict=True):
        assert_within(got, want, haar_bound(want, x.dtype, 2, x.abs().max().item(), 1, backend))


def test_inputs_are_left_alone(backend: str, device: str) -> None:
    x = make((1, 4, 9, 8), torch.float32, "contiguous", device)
    before = x.clone()
    ll, highs = wk.haar_dwt2d(x, 2, backend=backend)
    kept = [t.clone() for t in (ll, *highs)]
    wk.haar_idwt2d(ll, highs, size=(9, 8), add=x, backend=backend)
    for a, b in zip([x, ll, *highs], [before, *kept], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# --- Gradients of every order ----------------------------------------------------------------------------


def analysis_of(mode: str, levels: int, name: str) -> Callable[[Tensor], tuple[Tensor, ...]]:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        ll, highs = wk.haar_dwt2d(x, levels, mode=mode, backend=name)
        return (ll, *highs)

    return function


@pytest.mark.parametrize("mode", ["zero", "symmetric", "antisymmetric", "reflect", "periodic", "smooth"])
def test_gradcheck_analysis(backend: str, device: str, mode: str) -> None:
    x = make((1, 2, 5, 6), torch.float64, "contiguous", device).requires_grad_()
    function = analysis_of(mode, 2, backend)
    assert torch.autograd.gradcheck(function, x, fast_mode=True)
    # Linear, so the second derivative must vanish in x and be the transform itself in the cotangent.
    assert torch.autograd.gradgradcheck(function, x, fast_mode=True)


def test_gradcheck_synthesis(backend: str, device: str) -> None:
    sizes = op._level_sizes(5, 6, 2)
    highs = [
        make((1, 2, 3, *s), torch.float64, "channels_last", device, i).requires_grad_() for i, s in enumerate(sizes)
    ]
    ll = make((1, 2, *sizes[-1]), torch.float64, "contiguous", device, 5).requires_grad_()
    add = make((1, 2, 5, 6), torch.float64, "contiguous", device, 6).requires_grad_()

    def function(ll: Tensor, add: Tensor, *highs: Tensor) -> Tensor:
        return wk.haar_idwt2d(ll, list(highs), size=(5, 6), add=add, backend=backend)

    assert torch.autograd.gradcheck(function, (ll, add, *highs), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (ll, add, *highs), fast_mode=True)


def test_gradient_of_ll_alone(backend: str, device: str) -> None:
    """Unused bands bring undefined gradients: they count as zeros."""
    x = make((1, 3, 8, 8), torch.float64, "contiguous", device).requires_grad_()
    ll, _ = wk.haar_dwt2d(x, 2, backend=backend)
    (grad,) = torch.autograd.grad(ll.square().sum(), x)
    exact = x.detach().clone().requires_grad_()
    (want,) = torch.autograd.grad(reference.analysis(exact, 2)[0].square().sum(), exact)
    torch.testing.assert_close(grad, want)


# --- The torch ecosystem ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(name: str, layout: str) -> None:
    x = make((2, 3, 9, 12), torch.float32, layout, "cpu").requires_grad_()
    torch.library.opcheck(torch.ops.wavemix_kernels.haar_analysis, (x, 2, "symmetric", name))
    ll, highs = wk.haar_dwt2d(x.detach(), 2)
    leaves = [t.requires_grad_() for t in (ll, *highs)]
    add = make((2, 3, 9, 12), torch.float32, layout, "cpu").requires_grad_()
    arguments = (leaves[0], leaves[1:], [9, 12], "zero", add, layout == "channels_last", name)
    torch.library.opcheck(torch.ops.wavemix_kernels.haar_synthesis, arguments)


def roundtrip(x: Tensor) -> Tensor:
    ll, highs = wk.haar_dwt2d(x, 2)
    return wk.haar_idwt2d(ll, [1.5 * h for h in highs], size=x.shape[-2:], add=x)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compile_fullgraph(dynamic: bool, layout: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(roundtrip, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((2, 3, 8, 12), (3, 3, 16, 20), (2, 5, 11, 14)):
        x = make(shape, torch.float32, layout, "cpu").requires_grad_()
        (got,) = torch.autograd.grad(compiled(x).sum(), x)
        (want,) = torch.autograd.grad(roundtrip(x).sum(), x)
        torch.testing.assert_close(compiled(x), roundtrip(x))
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
    x = make((2, 4, 8, 8), torch.float32, "contiguous", "cpu").requires_grad_()
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

    x = make((2, 3, 8, 12), torch.float32, "contiguous", "cpu")
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Model(), (x,), dynamic_shapes=({0: batch},))
    y = make((5, 3, 8, 12), torch.float32, "contiguous", "cpu", 3)
    torch.testing.assert_close(program.module()(y), roundtrip(y))


def test_functional_transforms() -> None:
    x = make((2, 3, 8, 12), torch.float64, "contiguous", "cpu")
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


def test_half_types_keep_fp32_between_levels(backend: str, device: str) -> None:
    """Storing LL in bf16 between levels would show: the error bound of one rounding is then broken."""
    x = make((1, 2, 64, 64), torch.bfloat16, "contiguous", device).abs()
    ll, _ = wk.haar_dwt2d(x, 5, backend=backend)
    exact, _ = reference.analysis(x.double(), 5)
    assert ((ll.double() - exact).abs() <= 1.01 * stored_roundoff(torch.bfloat16, backend) * exact.abs()).all()
