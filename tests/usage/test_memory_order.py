"""Memory order that people rely on: what the originals return contiguous is contiguous here."""

import itertools

import pytest
import torch

from wavemix_kernels import backend, wavemlp
from wavemix_kernels.pytorch_wavelets import DWTForward, DWTInverse
from wavemix_kernels.wavemix import SemSegment, sisr

pytest.importorskip("pywt", reason="PyWavelets is not installed: pip install PyWavelets")

WAVES = ("haar", "db2", "db4", "bior2.4")
MODES = ("zero", "symmetric", "reflect", "periodic", "periodization", "constant")


def images(batch: int) -> dict[str, torch.Tensor]:
    """The orders that a batch of images comes in."""
    x = torch.randn(batch, 20, 24, 3)
    wide = torch.randn(batch, 3, 22, 50)
    return {
        "nchw": x.permute(0, 3, 1, 2).contiguous(),
        "an NHWC batch": x.permute(0, 3, 1, 2),
        "channels_last": x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last),
        "a crop": wide[:, :, 1:21, 1:25],
        "every second column": wide[:, :, :20, :48:2],
        "transposed": x.permute(0, 3, 2, 1),
        "broadcast": wide[:1, :, :20, :24].expand(batch, -1, -1, -1),
        "gray": x[..., :1].permute(0, 3, 1, 2),
    }


@pytest.mark.parametrize("wave", WAVES)
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_dwt_of_any_image_gives_bands_that_can_be_viewed(wave, name):
    """An image loader yields NHWC; after the DWT somebody calls .view, a kernel of their own reads data_ptr."""
    for batch, mode in itertools.product((1, 2), MODES):
        with backend(name):
            for kind, x in images(batch).items():
                low, high = DWTForward(2, wave, mode)(x)
                for t in (low, *high):
                    assert t.is_contiguous(), (batch, mode, kind)
                    t.view(batch, -1)


@pytest.mark.parametrize("wave", WAVES)
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_inverse_dwt_of_any_bands_is_contiguous(wave, name):
    """Bands that a channels_last network made go through the inverse, whose image is viewed as patches."""
    for batch, mode in itertools.product((1, 2), MODES):
        with backend(name):
            low, high = DWTForward(2, wave, mode)(images(batch)["nchw"])
            last = low.contiguous(memory_format=torch.channels_last)
            bands = [t.flatten(1, 2).contiguous(memory_format=torch.channels_last).unflatten(1, (3, 3)) for t in high]
            for yl, yh in ((low, high), (last, bands), (last, high), (low, bands), (low, [None, bands[1]])):
                y = DWTInverse(wave, mode)((yl, yh))
                assert y.is_contiguous(), mode
                y.view(batch, -1)


def test_compiled_dwt_is_contiguous_too():
    """The same in a compiled model: strides of eager and compiled results agree."""
    x = images(2)["an NHWC batch"]
    dwt, idwt = DWTForward(1, "haar"), DWTInverse("haar")

    def there_and_back(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = dwt(x)
        return high[0].view(2, -1), idwt((low, high))

    for t in torch.compile(there_and_back, fullgraph=True, backend="aot_eager")(x):
        assert t.is_contiguous()


def test_gradients_of_an_nhwc_batch_reach_it():
    """A copy inside must not cut the gradient of the image that it was made of."""
    x = images(2)["an NHWC batch"].clone().requires_grad_()
    low, (high,) = DWTForward(1, "haar")(x)
    (2 * low.sum() + high.view(2, -1).sum()).backward()
    y = x.detach().contiguous().requires_grad_()
    low, (high,) = DWTForward(1, "haar")(y)
    (2 * low.sum() + high.sum()).backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_models_that_give_images_keep_the_order_of_theirs():
    """A super-resolution or segmentation model of an NCHW image is followed by .view, as upstream's allows."""
    options = {"depth": 1, "ff_channel": 8, "final_dim": 8, "level": 1}
    features = wavemlp.WaveNet([1, 1], embed_dims=[4, 8], mlp_ratios=[2, 2], fork_feat=True)
    for model in (sisr.WaveMix(**options), SemSegment.WaveMix(num_classes=3, **options), features):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            out = model(torch.randn(2, 3, 32, 32).contiguous(memory_format=memory_format))
            for t in out if isinstance(out, list) else [out]:
                assert t.is_contiguous(memory_format=memory_format)
