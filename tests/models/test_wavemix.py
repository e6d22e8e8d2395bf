"""WaveMix's models and Waveblock beside the original package: parameter counts, published weights, dropout, memory."""

from __future__ import annotations

import inspect
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import wavemix_kernels as wk
from benchmarks.harness.rivals import UpstreamWaveblock, upstream_wavelets
from tests.models import subjects
from tests.models.subjects import assert_same_step, autocast_step, calls, peak_bytes, saved_bytes
from tests.ops.contract import image, randn
from tests.tolerances import UNIT_ROUNDOFF
from wavemix_kernels import wavemix
from wavemix_kernels.nn.wavemix.expansion import FusedExpansion
from wavemix_kernels.nn.wavemix.reference import UPSAMPLES
from wavemix_kernels.ops import choose
from wavemix_kernels.reference import Expansion, Waveblock
from wavemix_kernels.wavemix import SemSegment, backbone, classification, sisr

SMALL = {"depth": 2, "mult": 2, "ff_channel": 8, "final_dim": 8}


@pytest.mark.parametrize(
    "module, arguments",
    [
        ("classification", {"level": 2, "initial_conv": "pachify", "patch_size": 2, "num_classes": 3}),
        ("classification", {"level": 1, "initial_conv": "strided", "stride": 1, "num_classes": 3}),
        ("SemSegment", {"level": 3, "stride": 1, "num_classes": 5}),
        ("sisr", {"level": 4}),
    ],
)
def test_trades_places_with_the_original(original: ModuleType, module: str, arguments: dict[str, Any]) -> None:
    """Checkpoints load strictly both ways, the same seed initialises alike, and the results agree."""
    arguments = arguments | SMALL
    theirs_class, ours_class = getattr(original, module).WaveMix, getattr(wavemix, module).WaveMix
    defaults = {
        kind: {k: p.default for k, p in inspect.signature(kind).parameters.items()}
        for kind in (theirs_class, ours_class)
    }
    assert defaults[theirs_class].items() <= defaults[ours_class].items()
    torch.manual_seed(3)
    theirs = theirs_class(**arguments).eval()
    torch.manual_seed(3)
    ours = ours_class(**arguments).eval()
    assert list(theirs.state_dict()) == list(ours.state_dict())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    x = torch.randn(2, 3, 32, 48)
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours_class(**arguments).state_dict(), strict=True)


def test_the_package_offers_what_the_original_does(original: ModuleType) -> None:
    for name in [f"Level{level}Waveblock" for level in (1, 2, 3, 4)] + ["DWTForward"]:
        theirs, ours = (inspect.signature(getattr(package, name)) for package in (original, wavemix))
        assert [(p.name, p.default) for p in theirs.parameters.values()] == [
            (p.name, p.default) for p in ours.parameters.values()
        ]


def test_submodules_are_attributes_of_a_fresh_import() -> None:
    code = "import wavemix_kernels.wavemix as w; print(w.classification.WaveMix, w.SemSegment.WaveMix, w.sisr.WaveMix)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_patchify_is_pachify() -> None:
    state = classification.WaveMix(**SMALL, initial_conv="patchify").state_dict()
    other = classification.WaveMix(**SMALL, initial_conv="pachify").state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in other.items()}


# --- Lite ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "width, depth, in_channels, upsample, count",
    [
        (8, 10, 1, "bilinear", 3_566), (8, 10, 1, "nearest", 3_566), (8, 5, 1, "deconv", 7_156),
        (32, 7, 3, "bilinear", 37_058), (64, 6, 3, "deconv", 520_106),
    ],
)  # fmt: skip
def test_lite_parameter_counts(width: int, depth: int, in_channels: int, upsample: str, count: int) -> None:
    model = classification.WaveMixLite(final_dim=width, depth=depth, in_channels=in_channels, upsample=upsample)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model(torch.randn(2, in_channels, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("model", [classification, SemSegment, sisr])
def test_upsample_reaches_the_blocks(model: ModuleType) -> None:
    built = model.WaveMix(**SMALL, level=2, upsample="nearest", block=Waveblock)
    assert all(type(block) is Waveblock and block.upsample == "nearest" for block in built.layers)
    assert not any(isinstance(m, nn.ConvTranspose2d) for m in built.layers.modules())


@pytest.mark.parametrize("model", [SemSegment.WaveMix, sisr.WaveMix])
def test_models_take_the_head_of_their_blocks(model: type[nn.Module]) -> None:
    """A reference model has the standard one. Results come in the images' memory format."""
    fused, reference = (model(depth=1, ff_channel=8, final_dim=64, **more) for more in ({}, {"block": Waveblock}))
    assert (type(fused.expand), type(reference.expand)) == (FusedExpansion, Expansion)
    for layout in ("nchw", "channels_last"):
        x = image(randn(2, 3, 64, 64), torch.float32, layout=layout)
        assert fused.eval()(x).stride() == reference.eval()(x).stride()


# --- Sizes of images -------------------------------------------------------------------------------------


def test_the_sizes_it_names_work() -> None:
    model = classification.WaveMix(**SMALL).eval()
    for size in (227, 256):
        assert model(torch.randn(1, 3, 32, size)).shape == (1, 1000)


def test_another_stem_is_the_owners_affair() -> None:
    model = classification.WaveMix(**SMALL, level=1, num_classes=3).eval()
    model.conv = nn.Sequential(nn.Conv2d(1, 8, 1), nn.AvgPool2d(3))
    assert model(torch.randn(1, 1, 12, 12)).shape == (1, 3)
    with pytest.raises(ValueError, match="x: H=3"):
        model(torch.randn(1, 1, 9, 12))


# --- The stem's memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stem, way", [("strided", "folded"), ("strided", "apart"), ("pachify", "apart")])
def test_a_wide_stem_forgets_its_first_activations(stem: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are never made, or again, once, in backward; results are the standard stem's, hooks on its layers run."""
    monkeypatch.setattr(choose, "stem", lambda *_: way)
    torch.manual_seed(0)
    arguments = {"depth": 1, "final_dim": 128, "ff_channel": 8, "num_classes": 3, "dropout": 0.0, "level": 1}
    ours = classification.WaveMix(**arguments, initial_conv=stem).double()
    reference = classification.WaveMix(**arguments, initial_conv=stem, block=Waveblock).double()
    reference.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert_same_step(ours, reference, x)

    def kept(model: nn.Module) -> list[torch.Size]:
        shapes: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (shapes.append(t.shape), t)[1], lambda t: t):
            model(x)
        return shapes

    first = ours.conv[0](x).shape
    assert first in kept(reference)
    assert first not in kept(ours)
    called: list[int] = []
    ours.conv[0].register_forward_hook(lambda *_: called.append(1))
    ours(x).sum().backward()
    assert called == [1]


def watch(conv: nn.Sequential) -> None:
    conv[3].register_forward_hook(lambda *_: None)


def freeze(conv: nn.Sequential) -> None:
    conv[4].eval()


def approximate(conv: nn.Sequential) -> None:
    conv[3].approximate = "tanh"


def average(conv: nn.Sequential) -> None:
    conv[4].momentum = None


@pytest.mark.parametrize(
    "change, joined", [(None, True), (average, True), (watch, False), (freeze, False), (approximate, False)]
)
def test_a_stem_s_gelu_and_norm_are_one(device: str, change: Any, joined: bool) -> None:
    """Where kernels make GELU as they read; results, gradients and running statistics are the modules'."""
    stems = []
    for _ in range(2):
        torch.manual_seed(0)
        stems.append(classification.WaveMix(num_classes=2, depth=1, final_dim=16, patch_size=2).conv.to(device))
        if change is not None:
            change(stems[-1])
    img, made = torch.randn(2, 3, 12, 8, device=device), []
    for stem, run in zip(stems, (backbone.run_stem, lambda stem, img: stem(img)), strict=True):
        with choose.watched() as calls, wk.backend("triton"):
            out = run(stem, img)
            out.backward(randn(*out.shape).to(out))
        assert ("gelu_batch_norm" in {call[0] for call in calls}) == (joined and run is backbone.run_stem)
        named = {name: p.grad for name, p in stem.named_parameters()}
        made.append({"output": out.detach(), **named, **dict(stem.named_buffers())})
    largest = max(float(t.abs().max()) for name, t in made[1].items() if name.endswith((".weight", ".bias")))
    for name, want in made[1].items():
        scale = largest if name.endswith((".weight", ".bias")) else 1.0
        torch.testing.assert_close(made[0][name], want, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.prove
def test_peak_of_a_training_step() -> None:
    """Live bytes of WaveMix 192/16 level 3 at 224x224, beside upstream's order of operations; nothing is computed."""
    pytest.importorskip("pytorch_wavelets", reason="upstream's wavelets are not installed: pip install -e .[bench]")
    upstream_wavelets()  # imported outside of the fake tensors

    def peak(**block: Any) -> int:
        with FakeTensorMode():
            return peak_bytes(classification.WaveMix(**block), torch.empty(2, 3, 224, 224))

    assert peak() <= 0.45 * peak(block=UpstreamWaveblock)  # 0.441; 0.55 is what was asked for


# --- The Waveblock ---------------------------------------------------------------------------------------


BLOCKS = {"reference": Waveblock, "fused": wk.FusedWaveblock}
both = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())


def small(block: type[nn.Module], level: int = 2, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return block(**{"level": level, "mult": 2, "ff_channel": 8, "final_dim": 8, "dropout": 0.0} | options)


def test_level_4_runs_four_dwt_levels() -> None:
    where = {"haar_analysis": 1, "haar_pyramid": 1, "reduce_haar": 3}
    ran = calls(small(wk.FusedWaveblock, level=4), torch.randn(1, 8, 32, 16))
    assert sum(args[where[name]] for name, args in ran if name in where) == 4


@both
@pytest.mark.parametrize("level, name", [(1, "feedforward.5"), (3, "feedforward1.5")])
def test_batch_norm_ends_every_form(block: type[nn.Module], level: int, name: str) -> None:
    """At the same index, so that running statistics keep their names."""
    for upsample in UPSAMPLES:
        assert isinstance(small(block, level=level, upsample=upsample).get_submodule(name), nn.BatchNorm2d)


def test_keeps_channels_last() -> None:
    block = small(wk.FusedWaveblock).to(memory_format=torch.channels_last)  # float32: oneDNN has it, float64 has not
    out = block(torch.randn(2, 8, 12, 20).to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)


@both
@pytest.mark.parametrize("level", [1, 3])
def test_autocast_bfloat16(block: type[nn.Module], level: int) -> None:
    """Forward and backward. In eval mode, where rounding is not divided by a batch's own small variance."""
    module = small(block, level=level).eval()
    x = torch.randn(2, 8, 16, 24)
    (exact, exact_grad, *_), (out, grad, *_) = (autocast_step(module, x, dtype) for dtype in (None, torch.bfloat16))
    assert out.dtype == torch.bfloat16
    # Five roundings one after the other (reduction, bands, three convolutions), each relative to its values; what comes
    # up from coarser levels is rounded as often and adds at most as much again. The backward pass doubles the chain.
    bound = 2 * 5 * UNIT_ROUNDOFF[torch.bfloat16]
    assert (out.float() - exact).norm() <= bound * exact.norm()
    assert (grad - exact_grad).norm() <= 2 * bound * exact_grad.norm()
    autocast_step(module.train(), x, torch.bfloat16)


def test_upsamplings_compute_what_they_say() -> None:
    """Bilinear by two with the pixels' centres aligned, not their corners."""
    z, made = torch.randn(1, 8, 5, 6), {}
    for upsample in ("nearest", "bilinear", "pixelshuffle"):
        made[upsample] = small(Waveblock, level=1, upsample=upsample).get_submodule("feedforward.4")
    convolution = made["pixelshuffle"][1]
    shuffled = F.conv2d(F.pixel_shuffle(z, 2), convolution.weight, convolution.bias, padding=1)
    assert torch.equal(made["pixelshuffle"](z), shuffled)
    assert torch.equal(made["nearest"](z), z.repeat_interleave(2, 2).repeat_interleave(2, 3))
    bilinear = F.interpolate(z, scale_factor=2, mode="bilinear", align_corners=False)
    assert torch.equal(made["bilinear"](z), bilinear)
    assert not [*made["nearest"].parameters(), *made["bilinear"].parameters()]


@pytest.mark.parametrize("recompute, share", [("hidden", 0.63), ("mlp", 0.52), ("all", 0.27)])
@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_saves_half_or_a_quarter_of_what_upstream_saves(level: int, recompute: str, share: float) -> None:
    pytest.importorskip("pytorch_wavelets", reason="upstream's transform is not installed", exc_type=ImportError)
    config = {"level": level, "final_dim": 16, "ff_channel": 16, "mult": 2, "dropout": 0.5}
    x = torch.randn(2, 16, 32, 32)
    ours = saved_bytes(wk.FusedWaveblock(**config, recompute=recompute), x)
    assert ours <= share * saved_bytes(UpstreamWaveblock(**config), x)


@both
def test_dropout_is_reproducible_and_its_mask_the_same_in_backward(block: type[nn.Module]) -> None:
    module = small(block, level=2, dropout=0.5).double()
    x = torch.randn(2, 8, 8, 12, dtype=torch.float64, requires_grad=True)

    def step(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        out = module(x)
        return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]

    (first, grad), (again, same), (other, _) = step(1), step(1), step(2)
    assert torch.equal(first, again)
    assert torch.equal(grad, same)
    assert not torch.equal(first, other)

    def function(t: Tensor) -> Tensor:
        torch.manual_seed(3)
        return module(t)

    # A finite difference of the same masked function: a mask drawn anew in backward could not match it.
    assert torch.autograd.gradcheck(function, x, fast_mode=True)
    torch.manual_seed(4)
    plain = module(x)
    torch.manual_seed(4)
    kept = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    g = torch.randn_like(plain)
    (want,), (got,) = torch.autograd.grad(plain, x, g), torch.autograd.grad(kept, x, g)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    module.eval()
    assert torch.equal(module(x), module(x))


def test_frozen_cumulative_and_synchronised_statistics() -> None:
    pair, x = subjects.waveblock(2).pair(), subjects.waveblock(2).x()
    for module in pair:
        module.feedforward1[5].eval()  # frozen while the rest trains
        module.feedforward2[5].momentum = None
    subjects.assert_same_step(*pair, x)
    fused, exact = (module.eval() for module in pair)
    torch.testing.assert_close(fused(x, residual=True), x + exact(x), rtol=1e-10, atol=1e-10)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    torch.testing.assert_close(synchronised(x), exact(x), rtol=1e-10, atol=1e-10)
