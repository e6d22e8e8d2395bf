"""The pytorch_wavelets drop-in takes some filters for Haar's, and looks again when they change."""

import copy
import functools
import io
import pickle
import sys

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from tests.clients.test_pytorch_wavelets import assert_same
from tests.ops.contract import randn
from wavemix_kernels.ops.dwt.reference import separable_dwt2d
from wavemix_kernels.pytorch_wavelets import DWTForward, DWTInverse
from wavemix_kernels.pytorch_wavelets.dwt import transform2d
from wavemix_kernels.pytorch_wavelets.dwt.bank import FilterBank

pywt = pytest.importorskip("pywt", reason="PyWavelets is not installed: pip install PyWavelets")

S = 0.5**0.5
X = torch.zeros(1, 2, 4, 4)


@pytest.fixture
def path(monkeypatch):
    """The implementations that the calls took, in order."""
    taken = []

    def record(function, *args, **kwargs):
        taken.append(function.__name__.split("_")[0])
        return function(*args, **kwargs)

    for name in ("haar_dwt2d", "haar_idwt2d", "dwt2d", "idwt2d"):
        monkeypatch.setattr(transform2d, name, functools.partial(record, getattr(transform2d, name)))
    return taken


# --- Gradients ---------------------------------------------------------------------------------------------


def test_learned_filters_get_their_gradient(path, float64_buffers):
    x = randn(1, 1, 5, 6)
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
    assert path == ["dwt2d"]
    assert dwt.h0_col.grad is not None
    dwt.h0_col.requires_grad_(False)
    dwt(x)
    assert path == ["dwt2d", "haar"]


# --- Which filters are Haar's ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wave, expected",
    [
        *((name, "haar") for name in ("haar", "db1", "Haar", "bior1.1", pywt.Wavelet("haar"), pywt.Wavelet("db1"))),
        (([S, S], [-S, S]), "haar"),
        ((np.array([S, S]), np.array([-S, S])), "haar"),
        ((torch.tensor([S, S], dtype=torch.float64), [-S, S], [1 / 2**0.5] * 2, np.array([[-S], [S]])), "haar"),
        (([S, S], [S, -S]), "dwt2d"),  # another sign of the detail
        (([S, S], [-S, S], [S, S], [S, -S]), "dwt2d"),
        (([0.5, 0.5], [-0.5, 0.5]), "dwt2d"),  # another norm
        (([S, S + 1e-6], [-S, S]), "dwt2d"),
        (([0, S, S, 0], [0, -S, S, 0]), "dwt2d"),  # Haar's taps, but other borders
        ("db2", "dwt2d"),
    ],
)
def test_path_follows_the_filters(wave, expected, path, float64_buffers):
    x = randn(1, 1, 6, 7)
    low, highs = DWTForward(1, wave)(x)
    assert path == [expected]
    want, (want_high,) = separable_dwt2d(x, DWTForward(1, wave)._filters())
    assert_same([low, highs[0]], [want.numpy(), want_high.numpy()])


def test_synthesis_filters_of_haar(path):
    for wave in ("haar", ([S, S], [S, -S])):
        DWTInverse(wave)((randn(1, 1, 2, 2), [None]))
    DWTInverse(([S, S], [-S, S]))((randn(1, 1, 2, 2), [None]))
    assert path == ["haar", "haar", "idwt2d"]


CHANGES = {
    "load": lambda dwt, state: dwt.load_state_dict(state),
    "assigning load": lambda dwt, state: dwt.load_state_dict(state, assign=True),
    "load of a parent": lambda dwt, state: torch.nn.ModuleDict({"a": dwt}).load_state_dict(
        {f"a.{name}": value for name, value in state.items()}
    ),
    "in place": lambda dwt, state: [buffer.copy_(state[name]) for name, buffer in dwt.named_buffers()],
    "assigned": lambda dwt, state: [setattr(dwt, name, value.clone()) for name, value in state.items()],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_path_follows_a_change_of_the_buffers(change, path, float64_buffers):
    x = randn(1, 1, 6, 7)
    other = DWTForward(1, ([0.6, 0.8], [-0.8, 0.6]))
    dwt = DWTForward(1, "haar")
    haar = copy.deepcopy(dwt.state_dict())
    for state, expected in ((other.state_dict(), "dwt2d"), (haar, "haar")):
        path.clear()
        change(dwt, state)
        low, _ = dwt(x)
        assert path == [expected]
        assert_same([low], [separable_dwt2d(x, dwt._filters())[0].numpy()])


def test_haar_stays_haar_through_casts_and_copies(path):
    dwt = DWTForward(1, "haar")
    pickled = io.BytesIO()
    torch.save(dwt, pickled)
    pickled.seek(0)
    copies = [dwt, copy.deepcopy(dwt), pickle.loads(pickle.dumps(dwt)), torch.load(pickled, weights_only=False)]
    copies += [copy.deepcopy(dwt).to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)]
    copies.append(copy.deepcopy(dwt).bfloat16().float())
    for module in copies:
        low, _ = module(randn(1, 1, 6, 7))
        assert torch.equal(low, dwt(randn(1, 1, 6, 7))[0])
    assert set(path) == {"haar"}


def test_meta_device_then_load(path):
    with torch.device("meta"):
        dwt = DWTForward(1, "haar")
    assert dwt(torch.empty(1, 1, 6, 7, device="meta"))[0].shape == (1, 1, 3, 4)
    dwt.to_empty(device="cpu").load_state_dict(DWTForward(1, "haar").state_dict())
    path.clear()
    dwt(randn(1, 1, 6, 7))
    assert path == ["haar"]


def test_forward_does_not_read_the_buffers(monkeypatch):
    # Each read would stall a GPU.
    dwt, idwt = DWTForward(2), DWTInverse()
    reads = []
    monkeypatch.setattr(FilterBank, "_equals_haar", lambda self, filters: reads.append(filters) or True)
    for _ in range(3):
        idwt(dwt(randn(1, 1, 6, 7)))
    assert reads == []
    dwt.h0_col.mul_(1)
    for _ in range(3):
        dwt(randn(1, 1, 6, 7))
    assert len(reads) == 1


def test_inference_mode():
    with torch.inference_mode():
        x = randn(1, 1, 6, 8)
        torch.testing.assert_close(DWTInverse()(DWTForward(2)(x)), x)


def test_without_pywavelets(monkeypatch, path):
    monkeypatch.setitem(sys.modules, "pywt", None)  # makes `import pywt` fail
    for wave in ("haar", "db1", ([S, S], [-S, S])):
        DWTForward(1, wave)(X)
    assert set(path) == {"haar"}
    with pytest.raises(ImportError, match=r"pip install PyWavelets"):
        DWTForward(1, "db2")
