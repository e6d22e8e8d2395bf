"""Haar in 1-D and 3-D beside PyWavelets, and the table of conventions."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch
from torch import Tensor

from tests.ops.contract import image, pairwise, randn
from tests.tolerances import DTYPES
from wavemix_kernels.ops.common import selftest
from wavemix_kernels.ops.haar import (
    BANDS3D,
    CONVENTIONS,
    Convention,
    blocks,
    haar_bands2d,
    haar_bands3d,
    haar_dwt1d,
    haar_dwt3d,
    haar_from_bands2d,
    haar_from_bands3d,
    haar_idwt1d,
    haar_idwt3d,
)  # fmt: skip

MODES = ("zero", "constant", "symmetric", "periodic", "periodization", "reflect", "smooth", "antisymmetric",
         "antireflect")  # fmt: skip
BACKENDS = ("cpu", "reference")
ORDERS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}


def functions(of: Convention) -> tuple[object, object]:
    return (haar_bands2d, haar_from_bands2d) if of.axes == 2 else (haar_bands3d, haar_from_bands3d)


@pytest.mark.parametrize(
    "case", pairwise(mode=MODES, size=((5, 7, 9), (4, 6, 8), (3, 4, 5), (2, 5, 3)), order=tuple(ORDERS)), ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dwt3d_is_pywavelets(case: object, backend: str) -> None:
    x = randn(2, 3, *case.size).contiguous(memory_format=ORDERS[case.order])
    want = pywt.dwtn(x.numpy(), "haar", mode=case.mode, axes=(2, 3, 4))
    lll, (high,) = haar_dwt3d(x, mode=case.mode, backend=backend)
    for name, band in zip(BANDS3D, (lll, *high.unbind(2)), strict=True):
        np.testing.assert_allclose(band.numpy(), want[name], rtol=0, atol=1e-13)
    back = haar_idwt3d(lll, [high], size=case.size, add=x, backend=backend)
    torch.testing.assert_close(back, 2 * x, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "case", pairwise(mode=MODES, dim=(0, 1, 2, -1), order=("nchw", "channels_last", "sliced", "transposed")), ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dwt1d_is_pywavelets(case: object, backend: str) -> None:
    x = image(randn(3, 4, 5, 7), layout=case.order)
    low, highs = haar_dwt1d(x, 2, dim=case.dim, mode=case.mode, backend=backend)
    want_low, *want = pywt.wavedec(x.numpy(), "haar", mode=case.mode, level=2, axis=case.dim)
    for got, exact in zip((low, *reversed(highs)), (want_low, *want), strict=True):
        np.testing.assert_allclose(got.numpy(), exact, rtol=0, atol=1e-13)
    back = haar_idwt1d(low, highs, dim=case.dim, size=x.shape[case.dim], backend=backend)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-13)


def taps(of: Convention, band: int) -> Tensor:
    """The block of +-weight whose products with a block of samples sum to a band, from its bits alone."""
    block = torch.full((2,) * of.axes, of.weight[band], dtype=torch.float64)
    for axis in range(of.axes):
        if of.order[band] >> (of.axes - 1 - axis) & 1:
            block.select(axis, 1).neg_()
    return block


def band(bands: Tensor | tuple[Tensor, ...], of: Convention, k: int, n: int, c: int) -> Tensor:
    if of.layout == "channels":
        return bands[:, k :: 2**of.axes]
    if of.layout == "bands":
        return bands[:, c * k : c * k + c]
    return bands[k] if of.layout == "separate" else bands[n * k : n * k + n]


@pytest.mark.parametrize("name", CONVENTIONS)
def test_bands_are_the_tables(name: str) -> None:
    of = CONVENTIONS[name]
    there, back = functions(of)
    x = randn(2, 3, *(5, 4, 6)[3 - of.axes :])
    got = there(x, name)
    seen = torch.cat((x[:, :, :1], x), 2) if of.first_frame else x
    seen = seen if seen.shape[2] % 2 == 0 else torch.nn.functional.pad(seen, [0, 0] * (of.axes - 1) + [0, 1])
    for k in range(2**of.axes):
        conv = torch.nn.functional.conv2d if of.axes == 2 else torch.nn.functional.conv3d
        want = conv(seen, taps(of, k).expand(3, 1, *(2,) * of.axes), stride=2, groups=3)
        torch.testing.assert_close(band(got, of, k, 2, 3), want, rtol=0, atol=1e-13)
    gain = sum(w * b for w, b in zip(of.weight, of.inverse, strict=True))
    torch.testing.assert_close(back(got, name, size=x.shape[2:]), gain * x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", [n for n, of in CONVENTIONS.items() if of.layout in ("bands", "channels")])
def test_rounds_are_packets(name: str) -> None:
    of = CONVENTIONS[name]
    there, back = functions(of)
    x = randn(1, 2, *(9, 7, 10)[3 - of.axes :])
    front = x[:, :, :1].repeat(1, 1, 2, *[1] * (of.axes - 1))
    twice = there(there(torch.cat((front, x), 2), name), Convention(**{**vars(of), "first_frame": False}))
    got = there(x, name, rounds=2)
    if not of.first_frame:
        twice = there(there(x, name), name)
    torch.testing.assert_close(got, twice, rtol=0, atol=1e-13)
    gain = sum(w * b for w, b in zip(of.weight, of.inverse, strict=True))
    torch.testing.assert_close(back(got, name, rounds=2, size=x.shape[2:]), gain**2 * x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["cosmos3d", "wfvae3d", "mwcnn", "diffll", "wavecnet", "freia"])
def test_gradients_of_every_order(name: str) -> None:
    of = CONVENTIONS[name]
    there, back = functions(of)
    x = randn(1, 2, *(2, 3, 3)[3 - of.axes :]).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: there(x, name), x, check_forward_ad=True)
    assert torch.autograd.gradcheck(lambda x: back(there(x, name), name, size=x.shape[2:]), x)
    square = lambda x: [b.square() for b in there(x, name)]  # noqa: E731
    assert torch.autograd.gradgradcheck(square, x)
    mapped = torch.func.vmap(lambda x: there(x, name))(x.expand(2, *x.shape))
    first = mapped[1] if isinstance(mapped, Tensor) else [b[1] for b in mapped]
    torch.testing.assert_close(first, there(x, name) if isinstance(mapped, Tensor) else list(there(x, name)))


@pytest.mark.parametrize("mode", ["smooth", "reflect", "periodic", "symmetric"])
def test_gradients_at_borders(mode: str) -> None:
    x = randn(1, 1, 3, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: haar_dwt3d(x, 2, mode=mode)[1], x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, backend: str) -> None:
    device = torch.device("cpu")
    error, bound = blocks.self_test(backend, device, dtype)
    assert error <= selftest.half_bound(bound, blocks.self_test("reference", device, dtype)[0], dtype)


def test_nothing_reaches_across_a_zero_border() -> None:
    x = torch.full((1, 1, 3, 3, 3), float("inf"))
    lll, (high,) = haar_dwt3d(x)
    assert lll[0, 0, 1, 1, 1] == float("inf")
    assert not high[0, 0, :, 1, 1, 1].isnan().any()


def test_empty() -> None:
    assert haar_dwt3d(torch.zeros(0, 2, 3, 4, 4))[0].shape == (0, 2, 2, 2, 2)


def test_errors() -> None:
    x = torch.zeros(1, 4, 4, 4)
    with pytest.raises(ValueError, match="convention='haar': expected one of 'wtconv'"):
        haar_bands2d(x, "haar")
    with pytest.raises(ValueError, match="expected one of 2 axes"):
        haar_bands2d(x, "cosmos3d")
    with pytest.raises(ValueError, match="rounds=2: layout 'separate' takes one round"):
        haar_bands2d(x, "wavecnet", rounds=2)
    with pytest.raises(IndexError, match="dim=4: expected -4 to 3"):
        haar_dwt1d(x, dim=4)
    with pytest.raises(ValueError, match="size=5"):
        haar_idwt1d(x, [x], size=5)
    with pytest.raises(TypeError, match="expected float64, float32, float16 or bfloat16"):
        haar_dwt1d(x.int())
