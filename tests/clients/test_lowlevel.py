"""The undecimated transform beside PyWavelets, and `dwt.lowlevel` beside the original."""

from __future__ import annotations

import importlib
import itertools

import numpy as np
import pytest
import torch

import wavemix_kernels.pytorch_wavelets as ours
from tests.ops.contract import randn
from wavemix_kernels.pytorch_wavelets.dwt import lowlevel

original = pytest.importorskip("pytorch_wavelets", exc_type=ImportError)
pywt = pytest.importorskip("pywt", reason="PyWavelets is not installed: pip install PyWavelets")
pytestmark = pytest.mark.usefixtures("float64_buffers")

MODES = ("zero", "symmetric", "reflect", "periodic", "periodization")


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("wave", ["haar", "db4", "bior2.2"])
def test_undecimated_transform_equals_pywavelets(wave):
    x = randn(2, 3, 32, 16)
    coefficients = ours.SWTForward(3, wave)(x)
    want = pywt.swt2(x.numpy(), wave, 3, axes=(-2, -1))
    for bands, (low, high) in zip(coefficients, want[::-1], strict=True):
        assert_same(bands, torch.tensor(np.stack((low, *high), 2)))
    inverse = ours.SWTInverse(wave)
    assert_same(inverse(coefficients), x)
    others = [randn(*bands.shape, seed=i) for i, bands in enumerate(coefficients)]
    given = [(b[:, :, 0].numpy(), tuple(b[:, :, i].numpy() for i in (1, 2, 3))) for b in others[::-1]]
    assert_same(inverse(others), torch.tensor(pywt.iswt2(given, wave, axes=(-2, -1))))


def test_undecimated_level_equals_the_original():
    # More levels than one fail there, as the bands lie on the channel axis.
    from pytorch_wavelets.dwt.transform2d import SWTForward

    x = randn(2, 3, 19, 22)
    for mode, wave in itertools.product(
        ("zero", "symmetric", "reflect", "periodic", "constant", "replicate"), ("haar", "db3")
    ):
        theirs, mine = SWTForward(1, wave, mode), ours.SWTForward(1, wave, mode)
        mine.load_state_dict(theirs.state_dict(), strict=True)
        assert_same(mine(x)[0].flatten(1, 2), theirs(x)[0])


def test_undecimated_gradients_types_and_errors():
    forward, inverse = ours.SWTForward(2, "db2"), ours.SWTInverse("db2")
    x = randn(1, 2, 8, 12).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: inverse(forward(x)), (x,), fast_mode=True)
    learned = ours.SWTForward(1, "db2")
    learned.h0_col = torch.nn.Parameter(learned.h0_col)
    learned(x)[0].sum().backward()
    assert learned.h0_col.grad is not None
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(forward, inverse))
    assert_same(traced(x), x)
    half = forward(x.detach().bfloat16())
    assert half[1].dtype == torch.bfloat16
    torch.testing.assert_close(half[1].double(), forward(x)[1].detach(), rtol=2**-6, atol=2**-5)
    with pytest.raises(ValueError, match="mode='zero': the undecimated transform has an inverse in periodization"):
        ours.SWTInverse(mode="zero")
    with pytest.raises(ValueError, match=r"mode='mirror'"):
        ours.SWTForward(mode="mirror")
    with pytest.raises(TypeError, match=r"coeffs: .*list of tensors \(N, C, 4, H, W\)"):
        inverse(x)
    with pytest.raises(ValueError, match=r"coeffs\[1\]: .*in all levels the same"):
        inverse([randn(1, 1, 4, 8, 8), randn(1, 1, 4, 4, 4)])


def test_size_of_the_inverse():
    for wave, size in itertools.product(("haar", "db2"), ((13, 18), (12, 17), (11, 11))):
        x = randn(1, 2, *size)
        coefficients = ours.DWTForward(2, wave, "symmetric")(x)
        y = ours.DWTInverse(wave, "symmetric")(coefficients, size=size)
        assert y.is_contiguous()
        assert_same(y, x)
    with pytest.raises(
        ValueError, match=r"size: expected \(H, W\), each that of \(12, 12\) or one less, got \(10, 11\)"
    ):
        ours.DWTInverse("db2")(coefficients, size=(10, 11))


@pytest.mark.parametrize("mode", MODES)
def test_lowlevel_equals_the_original(mode):
    from pytorch_wavelets.dwt import lowlevel as theirs

    db3, other = pywt.Wavelet("db3"), (np.arange(4.0), np.arange(4.0) ** 2)
    x, code = randn(2, 3, 24, 21), theirs.mode_to_int(mode)
    assert lowlevel.mode_to_int(mode) == code
    assert lowlevel.int_to_mode(code) == theirs.int_to_mode(code)

    def both(name, *args):
        """The same call of the two; what the original returns."""
        want = getattr(theirs, name)(*args)
        assert_same(getattr(lowlevel, name)(*args), want)
        return want

    def applied(name, *args):
        want = getattr(theirs, name).apply(*args)
        assert_same(getattr(lowlevel, name).apply(*args), want)
        return want

    h = both("prep_filt_afb2d", db3.dec_lo, db3.dec_hi, *other)
    g = both("prep_filt_sfb2d", db3.rec_lo, db3.rec_hi, *other)
    for dim in (2, 3):
        bands = both("afb1d", x, h[0], h[1], mode, dim)
        both("sfb1d", bands[:, ::2], bands[:, 1::2], g[0], g[1], mode, dim)
        if mode != "periodization":  # the original raises
            both("afb1d_atrous", x, h[0], h[1], mode, dim, 2)
    bands = both("afb2d", x, h, mode)
    both("afb2d", x, h[:2], mode)
    both("sfb2d", *(bands[:, i::4] for i in range(4)), g, mode)
    if mode != "periodization":
        both("afb2d_atrous", x, h, mode, 2)
    low, high = applied("AFB2D", x, *h[2:], *h[:2], code)
    applied("SFB2D", low, high, *g[2:], *g[:2], code)
    low, high = applied("AFB1D", x[:, :, 0], *both("prep_filt_afb1d", db3.dec_lo, db3.dec_hi), code)
    applied("SFB1D", low, high, *both("prep_filt_sfb1d", db3.rec_lo, db3.rec_hi), code)
    if mode != "periodic":  # the original raises
        h = both("prep_filt_afb2d_nonsep", db3.dec_lo, db3.dec_hi)
        g = both("prep_filt_sfb2d_nonsep", db3.rec_lo, db3.rec_hi)
        bands = both("afb2d_nonsep", x[..., :20], h, mode).unflatten(1, (3, 4))
        both("sfb2d_nonsep", bands, g, mode)


def test_lowlevel_takes_lists_and_says_what_it_expects():
    db2, x = pywt.Wavelet("db2"), randn(1, 2, 8, 10)
    prepared = lowlevel.prep_filt_afb2d(db2.dec_lo, db2.dec_hi)
    for filters in ([db2.dec_lo, db2.dec_hi], [db2.dec_lo, db2.dec_hi] * 2):
        assert_same(lowlevel.afb2d(x, filters), lowlevel.afb2d(x, prepared))
        assert_same(lowlevel.afb2d_nonsep(x, filters), lowlevel.afb2d(x, prepared))
    with pytest.raises(ValueError, match=r"filts: .*got 3 filters"):
        lowlevel.afb2d(x, prepared[:3])
    with pytest.raises(ValueError, match=r"mode='mirror'"):
        lowlevel.mode_to_int("mirror")
    with pytest.raises(ValueError, match=r"mode: expected 0 to 6.*got 7"):
        lowlevel.int_to_mode(7)


def test_borders_and_indices_equal_the_original():
    from pytorch_wavelets import utils as theirs
    from pytorch_wavelets.dwt import lowlevel as low

    from wavemix_kernels.pytorch_wavelets import utils

    x = randn(2, 3, 9, 8)
    modes = (*MODES[:-1], "constant", "replicate")
    for mode, pad in itertools.product(modes, ((2, 3, 1, 4), (0, 0, 2, 2), (3, 1, 0, 0))):
        assert_same(lowlevel.mypad(x, pad, mode), low.mypad(x, pad, mode))
    for dim, n, even in itertools.product((2, 3), (-3, 2, 3), (False, True)):
        assert_same(lowlevel.roll(x, n, dim, even), low.roll(x, n, dim, even))
    for values in (np.arange(-20, 30), np.linspace(-9, 9, 77)):
        got, want = utils.reflect(values, -0.5, 6.5), theirs.reflect(values, -0.5, 6.5)
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, atol=1e-12)
    np.testing.assert_array_equal(utils.symm_pad_1d(5, 12), theirs.symm_pad_1d(5, 12))


def test_modules_export_what_is_imported_from_them():
    """Names that public code imports by path."""
    named = {
        "dwt.transform2d": ("DWTForward", "DWTInverse", "SWTForward", "SWTInverse"),
        "dwt.lowlevel": ("mypad", "roll", "reflect", "int_to_mode", "afb2d", "sfb2d_nonsep", "prep_filt_sfb2d_nonsep"),
        "utils": ("reflect", "symm_pad_1d"),
    }
    for path, names in named.items():
        module = importlib.import_module(f"{ours.__name__}.{path}")
        assert [name for name in names if not hasattr(module, name)] == []
