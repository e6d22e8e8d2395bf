"""Wave-MLP's block as two functions against the modules it is made of: what tests/models/test_every_model.py leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.models import subjects
from tests.models.subjects import BATCH, GROUP, PLAIN, TINY, assert_same_step, normal, operators, wave_block
from tests.ops.contract import image, randn
from tests.tolerances import UNIT_ROUNDOFF
from wavemix_kernels.nn.wavemlp import reference as patm
from wavemix_kernels.nn.wavemlp.reference import WaveBlock as ReferenceBlock
from wavemix_kernels.ops.common import layout
from wavemix_kernels.wavemlp import PATM, Mlp, WaveBlock, WaveNet

X = normal(4, 8, 5, 4)
norms = pytest.mark.parametrize("norm_layer", [BATCH, GROUP])
modes = pytest.mark.parametrize("mode", patm.MODES)


def blocks(norm_layer: Callable[..., nn.Module] = BATCH, **more: Any) -> tuple[nn.Module, nn.Module]:
    return wave_block((5, 4), norm_layer, **more).pair()


@norms
def test_far_from_zero_mean(norm_layer: Callable[..., nn.Module]) -> None:
    """Statistics in fp32 do not cancel: a mean of 1000 deviations costs 1000 roundings, not their square."""
    fused, exact = blocks(norm_layer=norm_layer)
    x = 1000 + normal(2, 8, 6, 5)
    out = fused.float()(x.float()) - x.float()
    want = exact(x) - x
    # The norm reads an x that is off by u |x|, and the sum is rounded at the size of x; ten layers follow.
    assert (out - want).abs().max() <= 20 * 1000 * UNIT_ROUNDOFF[torch.float32] * want.abs().max()


@pytest.mark.parametrize("order", ["channels_last", "nchw"])
@pytest.mark.parametrize("frozen", [(), ("norm1",), ("attn",), ("norm1", "attn")], ids=str)
@norms
def test_frozen_norms(norm_layer: Callable[..., nn.Module], frozen: tuple[str, ...], order: str, either: str) -> None:
    """In front of the mixer, in its phases, or both, beside stochastic depth."""
    pair = blocks(norm_layer, drop_path=0.5, qkv_bias=True)
    for module in pair:
        for part in frozen:
            module.get_submodule(part).eval()
    assert_same_step(*pair, image(1 + randn(4, 8, 5, 12), layout=order))


def test_untracked_norms() -> None:
    fused, exact = blocks()
    for module in (fused, exact):
        module.norm2 = nn.BatchNorm2d(8, affine=False, track_running_stats=False).double()
    assert_same_step(fused, exact, X)
    assert_same_step(fused.eval(), exact.eval(), X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_the_sum_in_the_inputs_dtype(dtype: torch.dtype) -> None:
    fused, _ = blocks(norm_layer=GROUP)
    fused.float()
    assert subjects.autocast_step(fused, normal(2, 8, 6, 5, dtype=dtype), torch.bfloat16)[0].dtype == dtype


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(
    "part, branches",
    [
        ("norm1", "channels"), ("attn", "channels"), ("attn.proj_drop", "channels"), ("attn.fc_c", "channels"),
        ("norm2", "tokens"), ("mlp", "tokens"), ("mlp.act", "tokens"), ("drop_path", ""), ("", "tokens channels"),
    ],
)  # fmt: skip
def test_hooks_send_their_branch_to_the_modules(part: str, branches: str) -> None:
    """A branch that runs as one function ends in the operator of the sum."""
    fused, exact = blocks(drop_path=0.5)
    seen: list[nn.Module] = []
    fused.get_submodule(part).register_forward_hook(lambda module, *_: seen.append(module))
    assert_same_step(fused, exact, X)
    assert seen
    ran = operators(fused, X)
    before = [ran[i - 1] for i, name in enumerate(ran) if name == "pre_norm_join"]
    assert before == [{"tokens": "branch_sum", "channels": "channel_mlp"}[name] for name in branches.split()]


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "norm2", nn.GroupNorm(2, 8).double()),
        lambda block: setattr(block, "norm1", nn.InstanceNorm2d(8).double()),
        lambda block: setattr(block.mlp, "act", nn.GELU(approximate="tanh")),
        lambda block: setattr(block.mlp, "act", nn.ReLU()),
        lambda block: setattr(block, "attn", nn.Conv2d(8, 8, 3, padding=1).double()),
    ],
    ids=["two groups", "instance norm", "tanh", "relu", "convolution"],
)
def test_other_parts_run_themselves(change: Callable[[nn.Module], None]) -> None:
    fused, exact = blocks()
    for module in (fused, exact):
        torch.manual_seed(0)
        change(module)
    assert_same_step(fused, exact, X)


@norms
@modes
@pytest.mark.parametrize("recompute, images", [("amplitudes", 4.2), ("all", 2.2)])
def test_images_kept_for_backward(
    recompute: str, images: float, mode: str, norm_layer: Callable[..., nn.Module]
) -> None:
    x = image(randn(2, 32, 28, 28), torch.float32, layout="channels_last")
    fused = WaveBlock(32, mode=mode, norm_layer=norm_layer, recompute=recompute)
    assert subjects.saved_bytes(fused, x) <= images * x.nbytes
    assert subjects.saved_bytes(ReferenceBlock(32, mode=mode, norm_layer=norm_layer), x) > 30 * x.nbytes


def test_peak_of_a_training_step() -> None:
    """Live bytes above parameters and gradients, against upstream's order of operations."""
    x = torch.randn(2, 3, 128, 128)
    sizes = {"layers": [2, 2, 3, 2], "embed_dims": [32, 48, 64, 64], "mlp_ratios": [4, 4, 4, 4], "num_classes": 10}
    upstream = subjects.peak_bytes(WaveNet(**sizes, norm_layer=GROUP, **PLAIN), x)
    assert subjects.peak_bytes(WaveNet(**sizes, norm_layer=GROUP), x) <= 0.45 * upstream


def test_models_choose_their_block() -> None:
    def kinds(**kwargs: Any) -> set[type]:
        return {type(m) for m in WaveNet(**TINY, **kwargs).modules() if isinstance(m, ReferenceBlock)}

    assert kinds() == {WaveBlock}
    assert {type(block.attn) for block in WaveNet(**TINY).modules() if isinstance(block, WaveBlock)} == {PATM}
    assert kinds(token_mixer=patm.PATM) == {ReferenceBlock}  # upstream's order of operations throughout
    assert kinds(token_mixer=patm.PATM, block=WaveBlock) == {WaveBlock}


def test_works_in_channels_last() -> None:
    """One conversion, at the stem; feature maps come back in the image's own format."""
    model = WaveNet(**TINY, fork_feat=True).eval()
    between: list[bool] = []
    for stage in model.network:
        stage.register_forward_hook(lambda _, inputs, out: between.append(layout.is_channels_last(out)))
    x = normal(2, 3, 96, 80, dtype=torch.float32)
    assert not any(layout.is_channels_last(out) for out in model(x))
    assert all(layout.is_channels_last(out) for out in model(x.contiguous(memory_format=torch.channels_last)))
    assert len(between) == 2 * 7
    assert all(between)


# --- The channel MLP -------------------------------------------------------------------------------------


def test_mlp_in_autocast_and_with_dropout() -> None:
    """Dropout runs the modules."""
    with torch.autocast("cpu", torch.bfloat16):
        assert Mlp(6, 20, 10)(normal(2, 6, 9, 8).float()).dtype == torch.bfloat16
    mlp = Mlp(4, 6, drop=1.0)
    assert torch.equal(mlp(torch.ones(1, 4, 3, 3)), torch.zeros(1, 4, 3, 3))
    assert mlp.eval()(torch.ones(1, 4, 3, 3)).any()
