"""The wavelet loss is the sum of losses between the bands of two transforms, as trainers write it."""

import pytest
import torch
import torch.nn.functional as F

from wavemix_kernels import wavelet_loss as module
from wavemix_kernels.pytorch_wavelets import DWTForward, SWTForward
from wavemix_kernels.wavelet_loss import wavelet_loss

LOSSES = {"l1": F.l1_loss, "mse": F.mse_loss, "huber": lambda a, b: F.huber_loss(a, b, delta=0.3)}


def by_bands(pred, target, wavelet, levels, kind, weights, mode):
    """Two transforms and a loss for each band."""
    transform = DWTForward(levels, wavelet, mode).double()
    (low, highs), (low_target, highs_target) = transform(pred), transform(target)
    total = weights[0] * LOSSES[kind](low, low_target)
    for high, other, weight in zip(highs, highs_target, weights[1:], strict=True):
        each = weight if isinstance(weight, list) else [weight] * 3
        total = total + sum(w * LOSSES[kind](high[:, :, b], other[:, :, b]) for b, w in enumerate(each)) / 3
    return total


def images(dtype=torch.float64, shape=(2, 3, 17, 14)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2)]


@pytest.fixture(autouse=True)
def _double_filters():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("wavelet", "kind", "mode", "weights"),
    [
        ("haar", "l1", "zero", [1.0, 0.5, 2.0]),
        ("haar", "mse", "periodization", [0.0, [1.0, 2.0, 4.0], 0.0]),
        ("sym7", "huber", "symmetric", [0.1, [1.0, 0.0, 3.0], 1.0]),
        ("bior4.4", "l1", "per", [1.0, 1.0, 1.0]),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_two_transforms_and_a_loss_for_each_band(monkeypatch, wavelet, kind, mode, weights, memory_format):
    if wavelet != "haar":
        pytest.importorskip("pywt")
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * 17 * 14 * 8)  # 4 and 2 of the 6 planes, or an image at a time
    pred, target = images()
    ours = wavelet_loss(
        pred.to(memory_format=memory_format), target.to(memory_format=memory_format), wavelet, 2,
        kind=kind, weights=weights, mode=mode, delta=0.3,
    )  # fmt: skip
    expected = by_bands(pred, target, wavelet, 2, kind, weights, mode)
    torch.testing.assert_close(ours, expected)
    for mine, theirs in zip(
        torch.autograd.grad(3 * ours, (pred, target)), torch.autograd.grad(3 * expected, (pred, target)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_whole_bands_agree_with_chunks():
    pred, target = images()
    loss = module._BandLoss("haar", 2, "l1", [[1.0]] * 3, "zero", 1.0, False, torch.float64, pred.device)
    torch.testing.assert_close(loss.total(pred - target) / 6, wavelet_loss(pred, target, "haar", 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype):
    pred, target = images(dtype)
    loss = wavelet_loss(pred, target, "haar", 2)
    assert loss.dtype == torch.float32
    loss.backward()
    assert pred.grad.dtype == dtype
    torch.testing.assert_close(loss, wavelet_loss(pred.float(), target.float(), "haar", 2))


def test_only_what_needs_a_gradient_gets_one_and_nothing_is_kept_without():
    pred, target = images()
    wavelet_loss(pred, target.detach(), "haar").backward()
    assert pred.grad is not None
    assert target.grad is None
    assert not wavelet_loss(pred.detach(), target.detach(), "haar").requires_grad
    with torch.inference_mode():
        assert wavelet_loss(pred, target, "haar").is_inference()


def test_every_backward_gives_a_gradient_of_its_own():
    pred, target = images()
    loss = wavelet_loss(pred, target, "haar", 2)
    first = torch.autograd.grad(loss, (pred, target), torch.tensor(2.0), retain_graph=True)
    want = [g.clone() for g in first]
    first[0].zero_()  # an optimizer's clipping writes to it
    for got, exact in zip(torch.autograd.grad(loss, (pred, target), retain_graph=True), want, strict=True):
        torch.testing.assert_close(2 * got, exact)
    (batched,) = torch.autograd.grad(loss, pred, torch.tensor([2.0, 4.0]), is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack((want[0], 2 * want[0])))


def test_torch_func():
    pred, target = images()
    (expected,) = torch.autograd.grad(wavelet_loss(pred, target), pred)
    torch.testing.assert_close(torch.func.grad(wavelet_loss)(pred.detach(), target.detach()), expected)
    each = torch.func.vmap(lambda p, t: wavelet_loss(p[None], t[None]))(pred.detach(), target.detach())
    torch.testing.assert_close(each.mean(), wavelet_loss(pred, target).detach())


def test_second_derivatives():
    pred, target = images(shape=(1, 2, 6, 5))
    arguments = (pred, target)
    assert torch.autograd.gradgradcheck(lambda p, t: wavelet_loss(p, t, levels=2, kind="mse"), arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "l2"}, ValueError, "kind='l2'"),
        ({"levels": 0}, ValueError, "levels"),
        ({"weights": [1.0]}, ValueError, r"1 \+ levels = 2"),
        ({"weights": [1.0, [1.0, 2.0]]}, ValueError, "three for LH, HL, HH"),
        ({"mode": "mirror"}, ValueError, "mode='mirror'"),
        ({"delta": 0.0}, ValueError, "delta"),
        ({"target": torch.zeros(2, 3, 17, 15)}, ValueError, "shape of pred"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, error, message):
    pred, target = images()
    with pytest.raises(error, match=message):
        wavelet_loss(**({"pred": pred, "target": target} | change))


def test_bands_of_the_undecimated_transform():
    pred, target = images(shape=(2, 3, 16, 12))
    weights = [0.5, 1.0, [0.0, 2.0, 3.0]]
    for wavelet, mode in (("haar", None), ("haar", "zero")):
        ours = wavelet_loss(pred, target, wavelet, 2, weights=weights, mode=mode, undecimated=True)
        both = zip(*(SWTForward(2, wavelet, mode or "periodization")(x) for x in (pred, target)), strict=True)
        (fine, fine_target), (coarse, coarse_target) = both
        expected = weights[0] * F.l1_loss(coarse[:, :, 0], coarse_target[:, :, 0])
        expected = expected + F.l1_loss(fine[:, :, 1:], fine_target[:, :, 1:])
        for band, weight in enumerate(weights[2], 1):
            expected = expected + weight * F.l1_loss(coarse[:, :, band], coarse_target[:, :, band]) / 3
        torch.testing.assert_close(ours, expected)
        gradients = (torch.autograd.grad(loss, (pred, target)) for loss in (ours, expected))
        torch.testing.assert_close(*gradients)
