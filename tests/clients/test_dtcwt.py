"""The dual-tree transform and the scattering layers beside the originals."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradgradcheck

import wavemix_kernels.pytorch_wavelets as ours
from tests.ops.contract import randn
from wavemix_kernels.pytorch_wavelets.dtcwt import coeffs, lowlevel
from wavemix_kernels.pytorch_wavelets.scatternet import layers

original = pytest.importorskip("pytorch_wavelets", exc_type=ImportError)
pytestmark = pytest.mark.usefixtures("float64_buffers")

PAIRS = {"near_sym_a": "qshift_a", "near_sym_b": "qshift_b", "near_sym_b_bp": "qshift_b_bp"}


def assert_same(got, want):
    """Equal up to rounding, None and empty scalars too."""
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def gradients(module, x, flat):
    """Outputs, and the gradient by x of their sum with fixed weights."""
    x = x.clone().requires_grad_()
    out = [t for t in flat(module(x)) if t.ndim]
    return [*out, *torch.autograd.grad(out, x, [randn(*t.shape, seed=3) for t in out])]


def flat(out):
    low, highs = out
    return [*(low if isinstance(low, list) else [low]), *highs]


@pytest.mark.parametrize(
    "biort, qshift, levels, size, options",
    [
        ("near_sym_a", "qshift_a", 3, (32, 48), {}),
        ("near_sym_b", "qshift_b", 3, (29, 44), {}),  # odd, and low-passes that 4 does not divide
        ("legall", "qshift_06", 2, (21, 30), {"o_dim": 1, "ri_dim": 2}),
        ("antonini", "qshift_c", 2, (64, 36), {"o_dim": 1}),
        ("near_sym_a", "qshift_d", 2, (16, 18), {"mode": "zero"}),
        ("near_sym_a", "qshift_a", 3, (8, 12), {"skip_hps": [True, False, True], "include_scale": [False, True, True]}),
        (((-1.0, 2, 6, 2, -1), (0.5, 1.0, 0.5)), ((0.6, 0.8), (0.8, 0.6), (0.8, -0.6), (-0.6, 0.8)), 2, (10, 8), {}),
    ],
)  # fmt: skip
def test_transform_equals_the_original(biort, qshift, levels, size, options):
    x = randn(2, 3, *size)
    theirs, mine = (p.DTCWTForward(biort, qshift, levels, **options) for p in (original, ours))
    mine.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    assert_same(mine(x), theirs(x))
    assert_same(gradients(mine, x, flat), gradients(theirs, x, flat))

    low, highs = theirs(x)
    low = low[-1] if isinstance(low, list) else low
    options = {k: v for k, v in options.items() if k in ("o_dim", "ri_dim", "mode")}
    back = [p.DTCWTInverse(biort, qshift, **options) for p in (original, ours)]
    back[1].load_state_dict(back[0].state_dict(), strict=True)
    leaves = [low.detach(), *(h.detach() for h in highs)]
    results = []
    for inverse in back:
        given = [t.clone().requires_grad_() for t in leaves]
        y = inverse((given[0], given[1:]))
        used = [t for t in given if t.ndim]
        results.append([y, *torch.autograd.grad(y, used, randn(*y.shape, seed=5))])
    assert_same(results[1], results[0])


def test_inverse_reconstructs_and_takes_none():
    for biort, qshift, size in (("near_sym_a", "qshift_a", (29, 44)), ("antonini", "qshift_d", (24, 40))):
        x = randn(1, 2, *size)
        low, highs = ours.DTCWT(biort, qshift, 3, o_dim=4, ri_dim=1)(x)
        inverse = ours.IDTCWT(biort, qshift, o_dim=4, ri_dim=1)
        assert_same(inverse((low, highs))[..., : size[0], : size[1]], x)
        for missing in ({0}, {1}, {2}, {0, 1}):
            some = [None if i in missing else h for i, h in enumerate(highs)]
            zeros = [h * 0 if i in missing else h for i, h in enumerate(highs)]
            if size == (24, 40):  # a None says nothing of the size of its level
                assert_same(inverse((low, some)), inverse((low, zeros)))
        assert_same(inverse((None, highs)), inverse((low * 0, highs)))


SCATTERING = [
    (name, biort, colour, mode)
    for name, biort, colour, mode in itertools.product(
        ("ScatLayer", "ScatLayerj2"), PAIRS, (False, True), ("symmetric", "zero")
    )
    if mode == "symmetric" or (name == "ScatLayer" and not colour)  # the original raises for ScatLayerj2 in 'zero'
]


@pytest.mark.parametrize("name, biort, colour, mode", SCATTERING)
def test_scattering_equals_the_original(name, biort, colour, mode):
    options = {"qshift": PAIRS[biort]} if name == "ScatLayerj2" else {}
    theirs, mine = (
        getattr(p, name)(biort=biort, mode=mode, combine_colour=colour, **options) for p in (original, ours)
    )
    mine.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    assert repr(mine) == repr(theirs)
    for size in ((16, 13), (8, 12)):
        x = randn(2, 3, *size)
        results = [gradients(module, x, lambda out: [out]) for module in (theirs, mine)]
        assert_same(results[1], results[0])


@pytest.mark.parametrize("name", ["ScatLayer", "ScatLayerj2"])
def test_images_in_parts_are_scattered_alike(name, monkeypatch):
    module, x, met = getattr(ours, name)(), randn(5, 3, 16, 13), []
    whole = gradients(module, x, lambda out: [out])
    scatter = module._scatter
    monkeypatch.setattr(module, "_scatter", lambda part: met.append(len(part)) or scatter(part))
    bands = 4 * 3 * 16 * (14 if name == "ScatLayer" else 16) * x.element_size()
    monkeypatch.setattr(layers, "_AT_ONCE", 2 * bands)
    assert_same(gradients(module, x, lambda out: [out]), whole)
    assert met == [2, 2, 1]


def test_passes_along_an_axis_equal_the_originals():
    from pytorch_wavelets.dtcwt import lowlevel as theirs

    x = randn(2, 3, 16, 24)
    for name in ("qshift_a", "qshift_c"):  # halves of odd and of even length
        h0a, h0b = (lowlevel.prep_filt(f, 1) for f in coeffs.qshift(name)[:2])
        assert_same(h0a, theirs.prep_filt(coeffs.qshift(name)[0], 1))
        for function, high in itertools.product(("coldfilt", "rowdfilt", "colifilt", "rowifilt"), (False, True)):
            assert_same(getattr(lowlevel, function)(x, h0a, h0b, high), getattr(theirs, function)(x, h0a, h0b, high))
    filters = lowlevel.prep_filt(coeffs.biort("near_sym_b")[0], 1)
    for function, mode in itertools.product(("colfilter", "rowfilter"), ("symmetric", "zero")):
        assert_same(getattr(lowlevel, function)(x, filters, mode), getattr(theirs, function)(x, filters, mode))
    assert_same(lowlevel.c2q(*lowlevel.q2c(x)), x)
    assert_same(lowlevel.q2c(x), theirs.q2c(x))
    with pytest.raises(ValueError, match="a number of rows that 4 divides"):
        lowlevel.coldfilt(x[:, :, :6], h0a, h0b)


def test_second_derivatives_and_transforms():
    layer = ours.ScatLayerj2()
    x = randn(1, 1, 8, 8).requires_grad_()
    assert gradgradcheck(layer, (x,), fast_mode=True)
    (want,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(torch.func.grad(lambda x: layer(x).sum())(x.detach()), want)

    def there_and_back(x):
        return ours.DTCWTInverse()(ours.DTCWTForward(J=2)(x))

    x = randn(1, 2, 8, 16)
    torch.testing.assert_close(torch.func.vmap(there_and_back)(x[None])[0], x)


@pytest.mark.prove
def test_compiles_to_one_graph():
    torch.compiler.reset()
    layer, x = ours.ScatLayerj2(), randn(1, 3, 16, 16).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (y, layer(x))))


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: ours.DTCWTForward(o_dim=2, ri_dim=-4), ValueError, "o_dim, ri_dim: .*2 and -4"),
        (lambda: ours.DTCWTForward("haar"), ValueError, "biort='haar'.*'legall'"),
        (lambda: ours.DTCWTForward(qshift="db2"), ValueError, "qshift='db2'.*'qshift_06'"),
        (lambda: ours.DTCWTForward(mode="mirror"), ValueError, "mode='mirror'"),
        (lambda: ours.DTCWTForward(J=-1), ValueError, "J: .*-1"),
        (lambda: ours.DTCWTForward()(randn(3, 8, 8)), ValueError, r"x: .*4 dimensions"),
        (lambda: ours.DTCWTForward(([1, 1], [1, -1]), J=1)(randn(1, 1, 8, 8)), ValueError, "biort: .*odd.*2 taps"),
        (lambda: ours.DTCWTInverse()(randn(1, 1, 8, 8)), TypeError, "coeffs: .*pair"),
        (lambda: ours.DTCWTInverse()((None, [None])), ValueError, "yl: .*got none"),
        (lambda: ours.DTCWTInverse()((randn(1, 1, 8, 8), [])), ValueError, "yh: .*got none"),
        (lambda: ours.DTCWTInverse()((randn(1, 1, 8, 8), [randn(1, 1, 5, 4, 4, 2)])), ValueError, r"yh\[0\]: .*6 ori"),
        (lambda: ours.DTCWTInverse()((randn(1, 1, 8, 8), [randn(1, 1, 6, 5, 4, 2)])), ValueError, r"yh\[0\]: .*half"),
        (lambda: ours.ScatLayer(combine_colour=True)(randn(1, 2, 8, 8)), ValueError, "x: expected 3 channels"),
        (lambda: ours.ScatLayerj2("near_sym_b_bp"), ValueError, "qshift='qshift_a'.*'qshift_b_bp'"),
    ],
)  # fmt: skip
def test_errors_say_what_would_work(call, error, words):
    with pytest.raises(error, match=words):
        call()
