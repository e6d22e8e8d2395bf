"""The filters of the dual-tree transform: built in, read from a package that has them, or given."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import wavemix_kernels.pytorch_wavelets as ours
from tests.ops.contract import randn
from wavemix_kernels.pytorch_wavelets.dtcwt import coeffs

S = 0.5**0.5
#: In the form of `qshift`: orthonormal, those of tree b the mirror images of tree a's.
HAAR = (S, S), (S, S), (S, -S), (-S, S)
#: In the form of `biort`: analysis, synthesis.
BY_HAND = ((-1, 2, 6, 2, -1), (-1, 2, -1)), ((1 / 32, 2 / 32, 1 / 32), (-1 / 32, -2 / 32, 6 / 32, -2 / 32, -1 / 32))


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(coeffs, "PathFinder", SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setitem(sys.modules, "pywt", None)  # makes `import pywt` fail


@pytest.mark.parametrize("name", ["near_sym_a", "legall", "antonini"])
def test_level_1_reconstructs_perfectly(name):
    if name != "near_sym_a":
        pytest.importorskip("pywt", reason="PyWavelets is not installed: pip install PyWavelets")
    low, back, high, high_back = (f.ravel() for f in coeffs.biort(name))
    digits = 1e-11 if name == "antonini" else 1e-14  # PyWavelets has 12 digits of bior4.4
    total = np.convolve(low, back) + np.convolve(high, high_back)
    np.testing.assert_allclose(total, np.arange(total.size) == total.size // 2, atol=digits)
    alternating = (-1.0) ** np.arange(low.size)
    np.testing.assert_allclose([low.sum(), back.sum(), low @ alternating, high.sum()], [1, 1, 0, 0], atol=digits)


def test_filters_equal_the_originals():
    theirs = pytest.importorskip("pytorch_wavelets.dtcwt.coeffs", exc_type=ImportError)
    for function, names in (
        ("biort", ("legall", "near_sym_a", "near_sym_b", "near_sym_b_bp")),
        ("qshift", ("qshift_06", "qshift_32", "qshift_a", "qshift_b", "qshift_c", "qshift_d", "qshift_b_bp")),
        ("level1", ("farras", "near_sym_a2")),
    ):
        for name in names:
            for got, want in zip(getattr(coeffs, function)(name), getattr(theirs, function)(name), strict=True):
                assert got.shape == want.shape
                assert abs(got - want).max() < 2e-14
    np.testing.assert_allclose(coeffs.biort("antonini")[0], theirs.biort("antonini")[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("package, folder", [("dtcwt", "data"), ("pytorch_wavelets", "dtcwt/data")])
def test_reads_what_an_installed_package_has(package, folder, tmp_path, monkeypatch):
    place = tmp_path / package / folder
    place.mkdir(parents=True)
    (tmp_path / package / "__init__.py").write_text("raise AssertionError('imported')")
    keys = [f"{kind}{band}{tree}" for band in "01" for kind in "hg" for tree in "ab"]
    np.savez(place / "qshift_a.npz", **{key: np.full((10, 1), i) for i, key in enumerate(keys)})
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setitem(sys.modules, package, ours)  # as where this package stands in
    for _ in range(2):
        read = coeffs.qshift("qshift_a")
        assert [float(f[0, 0]) for f in read] == list(range(8))
        read[0][:] = 9  # the caller's own copy
    with pytest.raises(ImportError, match="qshift='qshift_b'"):
        coeffs.qshift("qshift_b")


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: ours.DTCWTForward(),
            r"qshift='qshift_a'.*pip install dtcwt \(or .*, or give .* the filters",
        ),
        (lambda: ours.ScatLayer("near_sym_b"), "biort='near_sym_b'.*pip install dtcwt"),
        (lambda: coeffs.level1("farras"), "name='farras'.*pip install pytorch_wavelets"),
        (lambda: ours.DTCWTInverse("legall"), "biort='legall'.*pip install PyWavelets"),
    ],
)
def test_without_a_package_the_error_says_what_would_work(call, words, nothing_installed):
    ours.ScatLayer()  # near_sym_a
    with pytest.raises(ImportError, match=words):
        call()


def test_filters_are_taken_as_arrays(nothing_installed, float64_buffers):
    x = randn(1, 2, 16, 24)
    (h0o, h1o), back = BY_HAND
    transform = ours.DTCWTForward((np.array(h0o), torch.tensor(h1o)), HAAR, 2)
    inverse = ours.DTCWTInverse(back, [np.array(f)[::-1] for f in HAAR])
    torch.testing.assert_close(inverse(transform(x)), x)


@pytest.mark.parametrize(
    "kind, argument", list(itertools.product(("DTCWTForward", "DTCWTInverse"), ("biort", "qshift")))
)
def test_errors_about_given_filters(kind, argument):
    letter = "h" if kind == "DTCWTForward" else "g"
    names = (f"{letter}0o, {letter}1o", f"{letter}0a, {letter}0b, {letter}1a, {letter}1b")[argument == "qshift"]
    options = {"biort": BY_HAND[0], "qshift": HAAR}
    for bad, error, got in (((HAAR[0],), ValueError, "got 1"), (3, TypeError, "got 3")):
        with pytest.raises(error, match=rf"{argument}: expected a name or the filters \({names}\), {got}"):
            getattr(ours, kind)(**options | {argument: bad})
