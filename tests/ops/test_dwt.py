"""The separable transforms of any filter bank, by the modules that call them: PyWavelets' values, true gradients."""

import shutil

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from tests.clients.test_pytorch_wavelets import MODES, assert_same
from tests.ops.contract import LAYOUTS, image, randn
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


# --- Gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wave", ["haar", "db2", "bior2.2"])
def test_gradient_is_true(wave, mode, float64_buffers):
    dwt, idwt = DWTForward(2, wave, mode), DWTInverse(wave, mode)
    x = randn(1, 2, 5, 6).requires_grad_()
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
    # Inductor's vectorised float32 code in torch 2.13 had a wrong one where a signal was joined with its own end.
    torch.compiler.reset()
    dwt, x = DWTForward(1, "db2", "periodization"), randn(2, 3, 9, 11).float().requires_grad_()
    gradients = []
    for analysis in (dwt, torch.compile(dwt, fullgraph=True, dynamic=False)):
        low, (high,) = analysis(x)
        gradients.append(torch.autograd.grad(low.square().sum() + high.square().sum(), x)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)
