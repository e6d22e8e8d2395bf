"""The pytorch_wavelets drop-in's transforms of lines: against PyWavelets and against the original package."""

import itertools

import pytest
import torch

import wavemix_kernels.pytorch_wavelets as ours
from tests.clients.test_pytorch_wavelets import MODES, ORIGINAL_MODES, assert_same
from tests.ops.contract import randn

pywt = pytest.importorskip("pywt", reason="PyWavelets is not installed: pip install PyWavelets")

S = 0.5**0.5
X = torch.zeros(1, 2, 4, 4)


@pytest.fixture(scope="module")
def original():
    return pytest.importorskip("pytorch_wavelets", exc_type=ImportError)


@pytest.mark.filterwarnings("ignore:Level value of:UserWarning")
@pytest.mark.parametrize("mode", MODES)
def test_lines_equal_pywavelets(mode, float64_buffers):
    for wave, length in (("haar", 13), ("db3", 40), ("bior2.2", 7)):
        x = randn(2, 3, length)
        low, *details = pywt.wavedec(x.numpy(), wave, mode=mode, level=2)
        got = ours.DWT1DForward(2, wave, mode)(x)
        assert_same([got[0], *got[1]], [low, *details[::-1]])
        assert_same([ours.DWT1DInverse(wave, mode)(got)], [pywt.waverec([low, *details], wave, mode=mode)])
        without = [low, *(None if i else d for i, d in enumerate(details))]
        assert_same(
            [ours.DWT1DInverse(wave, mode)((got[0], [None, got[1][1]]))], [pywt.waverec(without, wave, mode=mode)]
        )


def test_lines_equal_the_original(original, float64_buffers):
    for wave, mode in itertools.product(("haar", "db4", ([0.5, 0.5, 0.1], [0.3, -0.5, 0.2])), ORIGINAL_MODES):
        theirs, mine = (package.DWT1DForward(2, wave, mode) for package in (original, ours))
        assert [(n, b.shape) for n, b in theirs.named_buffers()] == [(n, b.shape) for n, b in mine.named_buffers()]
        mine.load_state_dict(theirs.state_dict())
        x = randn(2, 3, 37)
        want, got = theirs(x), mine(x)
        assert_same([got[0], *got[1]], [want[0].numpy(), *(high.numpy() for high in want[1])])
        back = (package.DWT1DInverse(wave, mode) for package in (original, ours))
        want, got = (inverse(want) for inverse in back)
        assert_same([got], [want.numpy()])


def test_lines_are_checked_and_learned():
    with pytest.raises(ValueError, match="wave: expected 2 filters, got 4"):
        ours.DWT1DForward(1, ([S, S],) * 4)
    with pytest.raises(ValueError, match=r"\(N, C, L\)"):
        ours.DWT1D()(randn(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"yh\[0\].*\(N, C, l\)"):
        ours.IDWT1D()((randn(1, 1, 4), [randn(1, 1, 3, 4, 4)]))
    assert ours.DWT1D(0)(X[0])[1] == []
    learned = ours.DWT1D(2, "db2")
    learned.h0 = torch.nn.Parameter(learned.h0)
    learned(randn(1, 2, 20).float())[0].sum().backward()
    assert learned.h0.grad is not None
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(ours.DWT1D(2, "db2")))
    torch.testing.assert_close(traced(X[0])[0], ours.DWT1D(2, "db2")(X[0])[0])
