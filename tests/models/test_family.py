"""WaveMix V3, the blocks that shuffle pixels, and WavePaint, beside values recorded from their published code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import wavemix_kernels as wk
from tests import golden_models
from tests.models import subjects
from wavemix_kernels.nn.wavemix.shuffle import FusedShuffleWaveblock
from wavemix_kernels.reference import ShuffleWaveblock, Waveblock
from wavemix_kernels.wavemix.v3 import WaveMixV3, WaveMixV3Block
from wavemix_kernels.wavemix.wavepaint import WavePaint

V3 = {"fused": WaveMixV3Block, "reference": partial(ShuffleWaveblock, second=False)}
PUBLISHED_WEIGHTS = {"num_modules": 8, "blocks_per_module": 4, "mult": 4, "ff_channel": 128, "final_dim": 128}


@pytest.mark.parametrize("name", ["wavemix_v3", "wavemix_v3_strided"])
@pytest.mark.parametrize("block", V3.values(), ids=V3.keys())
def test_v3_reproduces_the_published_code(name: str, block: Callable[..., nn.Module]) -> None:
    golden_models.assert_reproduces(name, partial(WaveMixV3, block=block))


@pytest.mark.parametrize("name, mask_channel", [("wavepaint", True), ("wavepaint_image", False)])
@pytest.mark.parametrize("block", [wk.FusedWaveblock, Waveblock])
def test_wavepaint_reproduces_the_published_code(name: str, mask_channel: bool, block: type[nn.Module]) -> None:
    golden_models.assert_reproduces(name, partial(subjects.WavePaintOfOne, mask_channel=mask_channel, block=block))


@pytest.mark.parametrize(
    "model, arguments, parameters",
    [
        (WaveMixV3, {"final_dim": 144}, 4_748_464),
        (WavePaint, PUBLISHED_WEIGHTS, 15_486_560),
    ],
)
def test_parameters_are_as_many_as_the_published_code_has(
    model: Callable[..., nn.Module], arguments: dict[str, int], parameters: int
) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in model(**arguments).parameters()) == parameters


class Theirs(ShuffleWaveblock):
    """Somebody else's class of the same layers."""


class Scaled(ShuffleWaveblock):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("second", [True, False], ids=["SR-V2", "V3"])
def test_accelerate_takes_a_published_block_and_leaves_another(second: bool) -> None:
    options = {"mult": 4, "ff_channel": 32, "final_dim": 8, "second": second, "dropout": 0.0}
    block, x = Theirs(**options).double(), subjects.normal(2, 8, 4, 6)
    twin = copy.deepcopy(block)
    assert [entry.now.rpartition(".")[2] for entry in wk.accelerate(block).replaced] == ["FusedShuffleWaveblock"]
    subjects.assert_same_step(block, twin, x)
    (left,) = wk.accelerate(Scaled(**options)).left
    assert "computes something else" in left.reason
    block.feedforward[1] = nn.ReLU()  # another layer later on
    twin.feedforward[1] = nn.ReLU()
    subjects.assert_same_step(block, twin, x)


def test_a_foreign_decoder_is_fused_and_one_with_other_layers_is_not() -> None:
    decoder = nn.Sequential(nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)).double()
    other = nn.Sequential(nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.ReLU())
    twin, model = copy.deepcopy(decoder), nn.ModuleList([decoder, other])
    assert [entry.path for entry in wk.accelerate(model).replaced] == ["0"]
    subjects.assert_same_step(decoder, twin, subjects.normal(2, 8, 3, 5))


@pytest.mark.parametrize("second", [True, False], ids=["SR-V2", "V3"])
def test_dropout_in_a_shuffling_block(second: bool) -> None:
    """Half of the hidden layer is dropped in training, backward drops the same half, and nothing else is drawn."""
    options = {"mult": 4, "ff_channel": 32, "final_dim": 8, "second": second}
    block = FusedShuffleWaveblock(**options, dropout=0.5).double()
    x = subjects.normal(2, 8, 8, 8).requires_grad_()

    def run(t: Tensor) -> Tensor:
        torch.manual_seed(3)
        return block(t)

    assert torch.equal(run(x), run(x))
    assert not torch.equal(block(x), block(x))
    assert torch.autograd.gradcheck(lambda t: run(t).square().sum(), subjects.normal(1, 8, 2, 2).requires_grad_())
    block.feedforward[2].p = 1.0
    with torch.no_grad():
        everything = block.eval()(x)
        assert not torch.equal(everything, block.train()(x))
        assert torch.equal(block(x), block(2 * x))  # nothing of x is left


@pytest.mark.parametrize("second", [True, False], ids=["SR-V2", "V3"])
def test_a_shuffling_block_keeps_less_than_its_modules(second: bool) -> None:
    options = {"mult": 2 if second else 4, "ff_channel": 64, "final_dim": 16, "second": second}
    x = torch.randn(2, 16, 32, 32)
    kept = [subjects.saved_bytes(kind(**options), x) for kind in (FusedShuffleWaveblock, ShuffleWaveblock)]
    assert kept[0] <= 0.52 * kept[1]


@pytest.mark.prove
def test_shuffling_blocks_under_autocast_compile_and_export() -> None:
    model = WaveMixV3(depth=1, final_dim=8, num_classes=3, dropout=0.0).eval()
    x = torch.randn(2, 3, 16, 16)
    want = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x).float() - want).norm() <= 8 * 2**-8 * want.norm()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want, rtol=1e-5, atol=1e-5)
    assert not subjects.operators(wk.export_form(model), x)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: WaveMixV3Block(mult=2), r"mult=2: expected 4"),
        (lambda: WaveMixV3(initial_conv="pachify"), r"initial_conv='pachify': expected one of 'patch', 'strided'"),
        (lambda: WavePaint(blocks_per_module=1)(torch.ones(1, 3, 6, 8), torch.ones(1, 1, 6, 8)), r"img: H=6"),
        (lambda: WavePaint(blocks_per_module=1)(torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8)), r"mask: .*1, 1, 8, 8"),
    ],
)
def test_what_does_not_fit_is_named(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
