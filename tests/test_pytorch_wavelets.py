"""The pytorch_wavelets drop-in: against PyWavelets, against the original package, and its own gradients."""

import copy
import functools
import inspect
import io
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import wavemix_kernels.pytorch_wavelets as ours
from wavemix_kernels.pytorch_wavelets import DWTForward, DWTInverse

pywt = pytest.importorskip("pywt", reason='PyWavelets is not installed: pip install "wavemix-kernels[wavelets]"')

MODES = (
    "zero",
    "constant",
    "symmetric",
    "reflect",
    "periodic",
    "smooth",
    "antisymmetric",
    "antireflect",
    "periodization",
)
ORIGINAL_MODES = ("zero", "symmetric", "reflect", "periodic", "periodization", "per")
WAVES = ("haar", "db2", "db4", "bior2.2", "bior4.4", "sym5")
SIZES = ((8, 8), (7, 9), (5, 12), (16, 17), (2, 3), (1, 6))


@pytest.fixture(scope="module")
def original():
    try:
        import pytorch_wavelets
    except ImportError as error:  # 1.3.0 imports pkg_resources, which setuptools >= 81 no longer has
        pytest.skip(f"pytorch_wavelets does not import here: {error}")
    return pytorch_wavelets


@pytest.fixture
def float64_buffers():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def path(monkeypatch):
    """Which implementation the calls took, in order."""
    taken = []

    def record(function, *args, **kwargs):
        taken.append(function.__name__.split("_")[0])
        return function(*args, **kwargs)

    for name in ("haar_dwt2d", "haar_idwt2d", "separable_dwt2d", "separable_idwt2d"):
        monkeypatch.setattr(ours, name, functools.partial(record, getattr(ours, name)))
    return taken


def image(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def outcome(function, *errors):
    """What a call returns, or None where it raises one of `errors`."""
    try:
        return function()
    except errors:
        return None


def assert_same(got, want, tolerance=1e-10):
    """Equal shapes, and values equal relative to the largest one ('smooth' extrapolates to large values)."""
    scale = max(1.0, *(float(abs(w).max()) for w in want if w.size))
    for g, w in zip(got, want, strict=True):
        assert tuple(g.shape) == tuple(w.shape)
        assert float(abs(g.detach().numpy() - w).max(initial=0)) <= tolerance * scale


# --- PyWavelets --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Level value of:UserWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wave", WAVES)
def test_equals_pywavelets(wave, mode, float64_buffers):
    for size in SIZES:
        for levels in (1, 2, 3):
            x = image(2, 3, *size)
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
        low, high = image(2, 3, *size), image(2, 3, 3, *size, seed=1)
        want = pywt.idwt2((low.numpy(), tuple(band.numpy() for band in high.unbind(2))), wave, mode=mode)
        assert_same([DWTInverse(wave, mode)((low, [high]))], [want])


@pytest.mark.parametrize("wave", WAVES)
def test_reconstructs_odd_sizes(wave, float64_buffers):
    for mode in MODES:
        for size in ((13, 17), (12, 9)):
            x = image(1, 2, *size)
            y = DWTInverse(wave, mode)(DWTForward(2, wave, mode)(x))
            torch.testing.assert_close(y[..., : size[0], : size[1]], x, rtol=0, atol=1e-9)


# --- The original package ----------------------------------------------------------------------------------


def banks():
    rng = np.random.default_rng(0)
    return {
        "haar": "haar",
        "db4": "db4",
        "bior4.4": "bior4.4",
        "two taps": tuple(rng.standard_normal((2, 2))),
        "three taps": tuple(rng.standard_normal((2, 3))),
        "axes differ": (*rng.standard_normal((2, 4)), *rng.standard_normal((2, 6))),
        "array": rng.standard_normal((2, 4)),
    }


@pytest.mark.parametrize("mode", ORIGINAL_MODES)
@pytest.mark.parametrize("bank", banks())
def test_equals_original(bank, mode, original, float64_buffers):
    wave = banks()[bank]
    # From 20 on no level is shorter than a filter, where the original errs (docs/wavelets.md).
    for size in ((24, 32), (21, 20), (20, 27)):
        x = image(2, 3, *size)
        theirs, mine = original.DWTForward(1, wave, mode)(x), DWTForward(1, wave, mode)(x)
        assert_same([mine[0], *mine[1]], [theirs[0].numpy(), *(h.numpy() for h in theirs[1])])
        low, high = image(2, 3, *size, seed=1), image(2, 3, 3, *size, seed=2)
        assert_same([DWTInverse(wave, mode)((low, [high]))], [original.DWTInverse(wave, mode)((low, [high])).numpy()])


@pytest.mark.parametrize("mode", ORIGINAL_MODES)
def test_levels_and_crops_equal_original(mode, original, float64_buffers):
    for wave in ("haar", "db2"):
        x = image(2, 2, 43, 38)
        theirs, mine = original.DWTForward(3, wave, mode)(x), DWTForward(3, wave, mode)(x)
        assert_same([mine[0], *mine[1]], [theirs[0].numpy(), *(h.numpy() for h in theirs[1])])
        assert_same([DWTInverse(wave, mode)(mine)], [original.DWTInverse(wave, mode)(theirs).numpy()])


@pytest.mark.parametrize("mode", ORIGINAL_MODES)
def test_haar_gradient_on_even_sizes_equals_original(mode, original, float64_buffers):
    gradients = []
    for package in (original, ours):
        x = image(2, 3, 16, 24).requires_grad_()
        low, highs = package.DWTForward(2, "haar", mode)(x)
        y = package.DWTInverse("haar", mode)((low, highs))
        loss = (low**2).sum() + sum((h**3).sum() for h in highs) + (y * image(2, 3, 16, 24, seed=1)).sum()
        gradients.append(torch.autograd.grad(loss, x)[0])
    assert_same(gradients[1:], [gradients[0].numpy()])


def test_signatures_equal_original(original):
    for name in ("DWTForward", "DWTInverse"):
        theirs, mine = getattr(original, name), getattr(ours, name)
        for method in ("__init__", "forward"):
            pairs = [
                [(p.name, p.default, p.kind) for p in inspect.signature(getattr(c, method)).parameters.values()]
                for c in (theirs, mine)
            ]
            assert pairs[0] == pairs[1], f"{name}.{method}"
    for alias in ("DWT", "DWT2D", "IDWT", "IDWT2D"):
        assert getattr(ours, alias).__name__ == getattr(original, alias).__name__


@pytest.mark.parametrize("bank", banks())
def test_state_dicts_load_both_ways(bank, original):
    wave = banks()[bank]
    for name, arguments in (("DWTForward", {"J": 2}), ("DWTInverse", {})):
        theirs = getattr(original, name)(wave=wave, **arguments)
        mine = getattr(ours, name)(wave=wave, **arguments)
        assert list(theirs.state_dict()) == list(mine.state_dict())
        for key, value in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[key], value)
            assert mine.state_dict()[key].dtype == value.dtype
        theirs.load_state_dict(mine.state_dict(), strict=True)
        mine.load_state_dict(theirs.state_dict(), strict=True)


# --- Gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wave", ["haar", "db2", "bior2.2"])
def test_gradient_is_true(wave, mode, float64_buffers):
    dwt, idwt = DWTForward(2, wave, mode), DWTInverse(wave, mode)
    x = image(1, 2, 5, 6).requires_grad_()
    assert gradcheck(lambda x: (lambda low, highs: (low, *highs))(*dwt(x)), (x,))
    low, highs = dwt(x.detach())
    coefficients = [t.requires_grad_() for t in (low, *highs)]
    assert gradcheck(lambda low, *highs: idwt((low, highs)), coefficients)


@pytest.mark.parametrize("wave", ["haar", "db2"])
def test_second_gradient_is_true(wave, float64_buffers):
    dwt = DWTForward(1, wave, "symmetric")
    assert gradgradcheck(lambda x: dwt(x)[1][0] ** 2, (image(1, 1, 5, 4).requires_grad_(),))


def test_learned_filters_get_their_gradient(path, float64_buffers):
    x = image(1, 1, 5, 6)
    dwt, idwt = DWTForward(2, "haar", "reflect"), DWTInverse("haar")
    coefficients = dwt(x)
    names = ("h0_col", "h1_col", "h0_row", "h1_row")

    def analysis(*filters):
        low, highs = torch.func.functional_call(dwt, dict(zip(names, filters, strict=True)), (x,))
        return low, *highs

    def synthesis(*filters):
        changed = {name.replace("h", "g"): f for name, f in zip(names, filters, strict=True)}
        return torch.func.functional_call(idwt, changed, (coefficients,))

    assert gradcheck(analysis, [b.clone().requires_grad_() for b in dwt.buffers()])
    assert gradcheck(synthesis, [b.clone().requires_grad_() for b in idwt.buffers()])

    path.clear()
    dwt.h0_col = torch.nn.Parameter(dwt.h0_col)
    dwt(x)[0].sum().backward()
    assert path == ["separable"]
    assert dwt.h0_col.grad is not None
    dwt.h0_col.requires_grad_(False)
    dwt(x)
    assert path == ["separable", "haar"]


# --- Which filters are Haar's ------------------------------------------------------------------------------

S = 0.5**0.5


@pytest.mark.parametrize(
    "wave, expected",
    [
        ("haar", "haar"),
        ("db1", "haar"),
        ("Haar", "haar"),
        ("bior1.1", "haar"),
        (pywt.Wavelet("haar"), "haar"),
        (pywt.Wavelet("db1"), "haar"),
        (([S, S], [-S, S]), "haar"),
        ((np.array([S, S]), np.array([-S, S])), "haar"),
        ((torch.tensor([S, S], dtype=torch.float64), [-S, S], [1 / 2**0.5] * 2, np.array([[-S], [S]])), "haar"),
        (([S, S], [S, -S]), "separable"),  # another sign of the detail
        (([S, S], [-S, S], [S, S], [S, -S]), "separable"),
        (([0.5, 0.5], [-0.5, 0.5]), "separable"),  # another norm
        (([S, S + 1e-6], [-S, S]), "separable"),
        (([0, S, S, 0], [0, -S, S, 0]), "separable"),  # Haar's taps, but other borders
        ("db2", "separable"),
    ],
)
def test_path_follows_the_filters(wave, expected, path, float64_buffers):
    x = image(1, 1, 6, 7)
    low, highs = DWTForward(1, wave)(x)
    assert path == [expected]
    want, (want_high,) = ours.separable_dwt2d(x, DWTForward(1, wave)._filters())
    assert_same([low, highs[0]], [want.numpy(), want_high.numpy()])


def test_synthesis_filters_of_haar(path):
    for wave in ("haar", ([S, S], [S, -S])):
        DWTInverse(wave)((image(1, 1, 2, 2), [None]))
    DWTInverse(([S, S], [-S, S]))((image(1, 1, 2, 2), [None]))
    assert path == ["haar", "haar", "separable"]


@pytest.mark.parametrize("change", ["load", "in place", "assigned", "assigning load"])
def test_path_follows_a_change_of_the_buffers(change, path, float64_buffers):
    x = image(1, 1, 6, 7)
    other = DWTForward(1, ([0.6, 0.8], [-0.8, 0.6]))
    dwt = DWTForward(1, "haar")
    haar = copy.deepcopy(dwt.state_dict())
    for state, expected in ((other.state_dict(), "separable"), (haar, "haar")):
        path.clear()
        if change == "load":
            dwt.load_state_dict(state)
        elif change == "assigning load":
            dwt.load_state_dict(state, assign=True)
        elif change == "in place":
            for name, buffer in dwt.named_buffers():
                buffer.copy_(state[name])
        else:
            for name in list(dwt.state_dict()):
                setattr(dwt, name, state[name].clone())
        low, _ = dwt(x)
        assert path == [expected]
        assert_same([low], [ours.separable_dwt2d(x, dwt._filters())[0].numpy()])


def test_loading_into_a_parent_is_noticed(path):
    model = torch.nn.Sequential(DWTForward(1, "haar"))
    state = {"0." + k: v for k, v in DWTForward(1, ([0.6, 0.8], [-0.8, 0.6])).state_dict().items()}
    model.load_state_dict(state)
    model(image(1, 1, 4, 4))
    assert path == ["separable"]


def test_haar_stays_haar_through_casts_and_copies(path):
    dwt = DWTForward(1, "haar")
    pickled = io.BytesIO()
    torch.save(dwt, pickled)
    pickled.seek(0)
    copies = [
        dwt,
        copy.deepcopy(dwt),
        pickle.loads(pickle.dumps(dwt)),
        torch.load(pickled, weights_only=False),
        copy.deepcopy(dwt).double(),
        copy.deepcopy(dwt).half(),
        copy.deepcopy(dwt).bfloat16(),
        copy.deepcopy(dwt).bfloat16().float(),
    ]
    for module in copies:
        low, _ = module(image(1, 1, 6, 7))
        assert torch.equal(low, dwt(image(1, 1, 6, 7))[0])
    assert set(path) == {"haar"}


def test_meta_device_then_load(path):
    with torch.device("meta"):
        dwt = DWTForward(1, "haar")
    assert dwt(torch.empty(1, 1, 6, 7, device="meta"))[0].shape == (1, 1, 3, 4)
    dwt.to_empty(device="cpu").load_state_dict(DWTForward(1, "haar").state_dict())
    path.clear()
    dwt(image(1, 1, 6, 7))
    assert path == ["haar"]


def test_forward_does_not_read_the_buffers(monkeypatch):
    # Each read would stall a GPU.
    dwt, idwt = DWTForward(2), DWTInverse()
    reads = []
    monkeypatch.setattr(ours._FilterBank, "_equals_haar", lambda self, filters: reads.append(filters) or True)
    for _ in range(3):
        idwt(dwt(image(1, 1, 6, 7)))
    assert reads == []
    dwt.h0_col.mul_(1)
    for _ in range(3):
        dwt(image(1, 1, 6, 7))
    assert len(reads) == 1


def test_inference_mode():
    with torch.inference_mode():
        x = image(1, 1, 6, 8)
        torch.testing.assert_close(DWTInverse()(DWTForward(2)(x)), x)


# --- Dtypes, layouts, autocast -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wave", ["haar", "db3"])
def test_dtype_follows_the_input(wave, dtype):
    x = image(2, 3, 13, 10, dtype=dtype)
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
def test_autocast_changes_nothing(wave):
    dwt, idwt = DWTForward(2, wave), DWTInverse(wave)
    results = []
    for enabled in (False, True):
        x = image(1, 2, 8, 8, dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            low, highs = dwt(x)
            y = idwt((low, highs))
            loss = (y.square() + x).sum()
        loss.backward()
        results.append((low, *highs, y, x.grad))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("wave", ["haar", "db2"])
def test_autocast_joins_mixed_dtypes(wave):
    low, high = image(1, 2, 4, 4, dtype=torch.bfloat16), image(1, 2, 3, 4, 4, dtype=torch.float32)
    idwt = DWTInverse(wave)
    with torch.autocast("cpu", torch.bfloat16):
        y = idwt((low, [high]))
    assert torch.equal(y, idwt((low.float(), [high])))
    with pytest.raises(TypeError, match=r"yh\[0\]"):
        idwt((low, [high]))


@pytest.mark.parametrize("wave", ["haar", "db2"])
def test_any_layout_and_empty_batch(wave):
    dwt, idwt = DWTForward(2, wave, "reflect"), DWTInverse(wave)
    x = image(2, 4, 11, 14)
    want = dwt(x)
    sliced = torch.full((2, 4, 13, 30), torch.nan, dtype=torch.float64)
    sliced[:, :, 1:12, 1:29:2] = x
    for same in (x.to(memory_format=torch.channels_last), sliced[:, :, 1:12, 1:29:2]):
        got = dwt(same)
        for g, w in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=1e-14)
        torch.testing.assert_close(idwt(got), idwt(want), rtol=0, atol=1e-14)
    for shape in ((0, 4, 11, 14), (2, 0, 11, 14)):
        low, highs = dwt(image(*shape))
        assert low.shape[2:] == want[0].shape[2:]
        assert idwt((low, highs)).shape == (*shape[:2], *idwt(want).shape[2:])


# --- Levels of zeros, and none at all ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("wave", ["haar", "db2"])
@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_none_is_a_level_of_zeros(missing, wave, dtype):
    # Sizes at which no level is cropped: None says nothing of its size.
    size = (40, 24) if wave == "haar" else (42, 26)
    low, highs = DWTForward(3, wave)(image(2, 3, *size, dtype=dtype))
    low.requires_grad_()
    idwt = DWTInverse(wave)
    y = idwt((low, [None if i in missing else h for i, h in enumerate(highs)]))
    want = idwt((low, [h * 0 if i in missing else h for i, h in enumerate(highs)]))
    torch.testing.assert_close(y, want)
    seed = torch.ones_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(t, low, seed)[0] for t in (y, want)))


def test_none_without_a_size_doubles(original):
    # As the original: nothing says that the finer size was odd.
    low = image(1, 1, 3, 2, dtype=torch.float32)
    for highs in ([None], [None, None], [image(1, 1, 3, 5, 4, dtype=torch.float32), None]):
        want = original.DWTInverse("haar")((low, highs))
        torch.testing.assert_close(DWTInverse("haar")((low, highs)), want)


@pytest.mark.parametrize("wave", ["haar", "db2"])
def test_no_levels_is_the_identity(wave):
    x = image(1, 1, 3, 5)
    low, highs = DWTForward(0, wave)(x)
    assert low is x
    assert highs == []
    assert torch.equal(DWTInverse(wave)((x, [])), x)


# --- Tracing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wave, levels, mode", [("haar", 2, "zero"), ("haar", 2, "reflect"), ("db2", 1, "reflect")])
def test_compiles_to_one_graph(wave, levels, mode):
    torch.compiler.reset()
    dwt, idwt = DWTForward(levels, wave, mode), DWTInverse(wave, mode)
    for module in (dwt, idwt):
        module.compile(fullgraph=True, backend="aot_eager")
    for size in ((16, 12), (13, 18)):  # the second compiles again, with dynamic sizes
        x = image(2, 3, *size).requires_grad_()
        low, highs = dwt(x)
        y = idwt((low, [None, *highs[1:]]))
        (gradient,) = torch.autograd.grad((y**2).sum(), x)
        plain_low, plain_highs = dwt.forward(x)
        plain = idwt.forward((plain_low, [None, *plain_highs[1:]]))
        torch.testing.assert_close([low, *highs, y], [plain_low, *plain_highs, plain])
        torch.testing.assert_close(gradient, torch.autograd.grad((plain**2).sum(), x)[0])


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor's CPU code needs g++, which is not installed")
def test_inductor_has_the_true_gradient_at_odd_sizes():
    # Inductor's vectorised float32 code in torch 2.13 had a wrong one where a signal was joined with its own end.
    torch.compiler.reset()
    dwt, x = DWTForward(1, "db2", "periodization"), image(2, 3, 9, 11, dtype=torch.float32).requires_grad_()
    gradients = []
    for analysis in (dwt, torch.compile(dwt, fullgraph=True, dynamic=False)):
        low, (high,) = analysis(x)
        gradients.append(torch.autograd.grad(low.square().sum() + high.square().sum(), x)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


def test_compiled_module_follows_load_state_dict():
    torch.compiler.reset()
    dwt, x = DWTForward(1, "haar"), image(1, 1, 6, 7)
    dwt.compile(fullgraph=True, backend="aot_eager")
    dwt(x)
    other = DWTForward(1, ([0.6, 0.8], [-0.8, 0.6]))
    dwt.load_state_dict(other.state_dict())
    torch.testing.assert_close(dwt(x)[0], other(x)[0])
    haar = DWTForward(1, "haar")
    for buffer, value in zip(dwt.buffers(), haar.buffers(), strict=True):
        buffer.copy_(value)
    dwt.refresh_filters()
    assert torch.equal(dwt(x)[0], haar(x)[0])


@pytest.mark.parametrize("wave", ["haar", "db2"])
def test_exports(wave):
    x = image(1, 2, 10, 12, dtype=torch.float32)
    program = torch.export.export(DWTForward(2, wave), (x,))
    torch.testing.assert_close(program.module()(x), DWTForward(2, wave)(x))


# --- Errors ------------------------------------------------------------------------------------------------

X = torch.zeros(1, 2, 4, 4)
HIGH = torch.zeros(1, 2, 3, 4, 4)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: DWTForward(mode="mirror"), ValueError, "mode='mirror'.*'zero'.*'per'"),
        (lambda: DWTInverse(mode="replicate"), ValueError, "mode='replicate'"),
        (lambda: DWTForward(J=-1), ValueError, "J: .*-1"),
        (lambda: DWTForward(J=1.5), TypeError, "J: .*1.5"),
        (lambda: DWTForward(wave="db99"), ValueError, "wave='db99'.*wavelist"),
        (lambda: DWTForward(wave="mexh"), ValueError, "wave='mexh'.*discrete"),
        (lambda: DWTForward(wave=3), TypeError, "wave: .*int"),
        (lambda: DWTForward(wave=([1, 2],)), ValueError, "wave: .*2 filters.*got 1"),
        (lambda: DWTForward(wave=([1, 2], [1, 2, 3])), ValueError, "wave: .*got 2 and 3"),
        (lambda: DWTForward(wave=([1], [1])), ValueError, "wave: .*at least 2.*got 1 and 1"),
        (lambda: DWTForward(wave=("ab", "cd")), TypeError, "wave: .*'ab'"),
        (lambda: DWTForward()(X[0]), ValueError, r"x: .*4 dimensions.*\(2, 4, 4\)"),
        (lambda: DWTForward()(X.int()), TypeError, "x: .*int32"),
        (lambda: DWTForward()(X.numpy()), TypeError, "x: "),
        (lambda: DWTForward()(X[:, :, :0]), ValueError, r"x: .*\(1, 2, 0, 4\)"),
        (lambda: DWTForward(3, "haar", "reflect")(X), ValueError, "mode='reflect'.*single sample.*use"),
        (lambda: DWTForward(1, "db2", "antireflect")(X[..., :1]), ValueError, "mode='antireflect'.*along W.*use"),
        (lambda: DWTInverse()(X), TypeError, "coeffs: .*pair"),
        (lambda: DWTInverse()((X, HIGH)), TypeError, "yh: .*list"),
        (lambda: DWTInverse()((X[0], [HIGH])), ValueError, "yl: .*4 dimensions"),
        (lambda: DWTInverse()((X, [X])), ValueError, r"yh\[0\]: .*5 dimensions"),
        (lambda: DWTInverse()((X, [HIGH[:, :, :2]])), ValueError, r"yh\[0\]: .*\(N, C, 3, h, w\)"),
        (lambda: DWTInverse()((X, [HIGH.double()])), TypeError, r"yh\[0\]: .*float32.*float64"),
        (lambda: DWTInverse()((X, [HIGH.to("meta")])), ValueError, r"yh\[0\]: .*cpu.*meta"),
        (lambda: DWTInverse()((X, [HIGH[..., :2, :]])), ValueError, r"yh\[0\]: .*\(1, 2, 3, 4, 4\).*\(1, 2, 3, 2, 4\)"),
        (lambda: DWTInverse("db2")((X[..., :3], [HIGH])), ValueError, r"yh\[0\]: .*\(1, 2, 3, 4, 3\)"),
        (lambda: DWTInverse()((X, [HIGH, HIGH])), ValueError, r"yh\[0\]: .*\(1, 2, 3, 8, 8\)"),
        (lambda: DWTInverse()((X, [HIGH[:, :1]])), ValueError, r"yh\[0\]: .*\(1, 2, 3, 4, 4\)"),
        (lambda: DWTInverse("db8")((X, [HIGH])), ValueError, r"mode='zero'.*16.*at least \(8, 8\).*\(4, 4\)"),
    ],
)
def test_errors_say_what_would_work(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_changed_mode_is_checked_again():
    dwt = DWTForward()
    dwt.mode = "mirror"
    with pytest.raises(ValueError, match="mode='mirror'"):
        dwt(X)


def test_without_pywavelets(monkeypatch, path):
    monkeypatch.setitem(sys.modules, "pywt", None)  # makes `import pywt` fail
    for wave in ("haar", "db1", ([S, S], [-S, S])):
        DWTForward(1, wave)(X)
    assert set(path) == {"haar"}
    with pytest.raises(ImportError, match=r'pip install "wavemix-kernels\[wavelets\]"'):
        DWTForward(1, "db2")
