"""The pytorch_wavelets drop-in: against PyWavelets, against the original package, and its own gradients."""

import inspect

import numpy as np
import pytest
import torch

import wavemix_kernels.pytorch_wavelets as ours
from tests.ops.contract import randn
from wavemix_kernels.pytorch_wavelets import DWTForward, DWTInverse

pywt = pytest.importorskip("pywt", reason="PyWavelets is not installed: pip install PyWavelets")

MODES = (
    "zero", "constant", "symmetric", "reflect", "periodic", "smooth", "antisymmetric", "antireflect", "periodization",
)  # fmt: skip
ORIGINAL_MODES = ("zero", "symmetric", "reflect", "periodic", "periodization", "per")


@pytest.fixture(scope="module")
def original():
    # 1.3.0 imports pkg_resources, which setuptools >= 81 no longer has.
    return pytest.importorskip("pytorch_wavelets", exc_type=ImportError)


def assert_same(got, want, tolerance=1e-10):
    """Equal shapes, and values equal relative to the largest one ('smooth' extrapolates to large values)."""
    scale = max(1.0, *(float(abs(w).max()) for w in want if w.size))
    for g, w in zip(got, want, strict=True):
        assert tuple(g.shape) == tuple(w.shape)
        assert float(abs(g.detach().numpy() - w).max(initial=0)) <= tolerance * scale


# --- The original package ----------------------------------------------------------------------------------


def banks():
    rng = np.random.default_rng(0)
    return {name: name for name in ("haar", "db4", "bior4.4")} | {
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
    for levels, size in ((1, (24, 32)), (1, (21, 20)), (1, (20, 27)), (3, (87, 78))):
        x, low, high = randn(2, 3, *size), randn(2, 3, *size, seed=1), randn(2, 3, 3, *size, seed=2)
        results = []
        for package in (original, ours):
            made = package.DWTForward(levels, wave, mode)(x)
            idwt = package.DWTInverse(wave, mode)
            results.append([made[0], *made[1], idwt((low, [high])), idwt(made)])
        assert_same(results[1], [t.numpy() for t in results[0]])


def test_signatures_equal_original(original):
    for name in ("DWTForward", "DWTInverse"):
        theirs, mine = getattr(original, name), getattr(ours, name)
        for method in ("__init__", "forward"):
            pairs = [
                [(p.name, p.default, p.kind) for p in inspect.signature(getattr(c, method)).parameters.values()]
                for c in (theirs, mine)
            ]
            ours_alone = [p for p in pairs[1] if p[0] == "size"]  # a keyword more, at the end
            assert [*pairs[0], *ours_alone] == pairs[1], f"{name}.{method}"
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


# --- Dtypes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wave", ["haar", "db2"])
def test_autocast_changes_nothing(wave):
    dwt, idwt = DWTForward(2, wave), DWTInverse(wave)
    results = []
    for enabled in (False, True):
        x = randn(1, 2, 8, 8).to(torch.float32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            low, highs = dwt(x)
            y = idwt((low, highs))
            loss = (y.square() + x).sum()
        loss.backward()
        results.append((low, *highs, y, x.grad))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("wave", ["haar", "db2"])
def test_autocast_joins_mixed_dtypes(wave):
    low, high = randn(1, 2, 4, 4).to(torch.bfloat16), randn(1, 2, 3, 4, 4).to(torch.float32)
    idwt = DWTInverse(wave)
    with torch.autocast("cpu", torch.bfloat16):
        y = idwt((low, [high]))
    assert torch.equal(y, idwt((low.float(), [high])))
    with pytest.raises(TypeError, match=r"yh\[0\]"):
        idwt((low, [high]))


# --- Levels of zeros, and none at all ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("wave", ["haar", "db2"])
@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_none_is_a_level_of_zeros(missing, wave, dtype):
    # Sizes at which no level is cropped: None says nothing of its size.
    size = (40, 24) if wave == "haar" else (42, 26)
    low, highs = DWTForward(3, wave)(randn(2, 3, *size).to(dtype))
    low.requires_grad_()
    idwt = DWTInverse(wave)
    y = idwt((low, [None if i in missing else h for i, h in enumerate(highs)]))
    want = idwt((low, [h * 0 if i in missing else h for i, h in enumerate(highs)]))
    torch.testing.assert_close(y, want)
    seed = torch.ones_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(t, low, seed)[0] for t in (y, want)))


def test_none_without_a_size_doubles(original):
    # The original does the same: nothing says that the finer size was odd.
    low = randn(1, 1, 3, 2).to(torch.float32)
    for highs in ([None], [None, None], [randn(1, 1, 3, 5, 4).to(torch.float32), None]):
        want = original.DWTInverse("haar")((low, highs))
        torch.testing.assert_close(DWTInverse("haar")((low, highs)), want)


@pytest.mark.parametrize("wave", ["haar", "db2"])
def test_no_levels_is_the_identity(wave):
    x = randn(1, 1, 3, 5)
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
        x = randn(2, 3, *size).requires_grad_()
        low, highs = dwt(x)
        y = idwt((low, [None, *highs[1:]]))
        (gradient,) = torch.autograd.grad((y**2).sum(), x)
        plain_low, plain_highs = dwt.forward(x)
        plain = idwt.forward((plain_low, [None, *plain_highs[1:]]))
        torch.testing.assert_close([low, *highs, y], [plain_low, *plain_highs, plain])
        torch.testing.assert_close(gradient, torch.autograd.grad((plain**2).sum(), x)[0])


def test_compiled_module_follows_load_state_dict():
    torch.compiler.reset()
    dwt, x = DWTForward(1, "haar"), randn(1, 1, 6, 7)
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
    x = randn(1, 2, 10, 12).to(torch.float32)
    program = torch.export.export(DWTForward(2, wave), (x,))
    torch.testing.assert_close(program.module()(x), DWTForward(2, wave)(x))


# --- Errors ------------------------------------------------------------------------------------------------

X = torch.zeros(1, 2, 4, 4)
HIGH = torch.zeros(1, 2, 3, 4, 4)


def changed_mode(mode):
    dwt = DWTForward()
    dwt.mode = mode
    return dwt


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: DWTForward(mode="mirror"), ValueError, "mode='mirror'.*'zero'.*'per'"),
        (lambda: changed_mode("mirror")(X), ValueError, "mode='mirror'"),
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
