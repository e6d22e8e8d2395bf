"""Wave-MLP's block as two functions against the modules it is made of: what tests/models/test_every_model.py leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from wavemix_kernels.benchmarks.harness import memory

import wavemix_kernels as wk
from tests.models.subjects import BATCH, GROUP, PLAIN, TINY, Operators, assert_same_step, normal, operators, wave_block
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


def test_frozen_and_untracked_norms() -> None:
    fused, exact = blocks()
    for module in (fused, exact):
        module.norm1.eval()
        module.norm2 = nn.BatchNorm2d(8, affine=False, track_running_stats=False).double()
    assert_same_step(fused, exact, X)
    for module in (fused, exact):
        module.zero_grad()
    assert_same_step(fused.eval(), exact.eval(), X)


def test_stochastic_depth_draws_as_the_modules_do() -> None:
    fused, exact = blocks(drop_path=0.5)
    x = normal(16, 8, 3, 3)
    for seed in range(3):
        results = []
        for module in (fused, exact):
            torch.manual_seed(seed)
            results.append((module(x), torch.rand(1)))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_the_sum_in_the_inputs_dtype(dtype: torch.dtype) -> None:
    fused, _ = blocks(norm_layer=GROUP)
    fused.float()
    leaf = normal(2, 8, 6, 5).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = fused(leaf)
    assert out.dtype == dtype
    out.float().sum().backward()
    assert leaf.grad.dtype == dtype
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in fused.parameters())


def test_dtypes_must_agree() -> None:
    with pytest.raises(TypeError, match=r"x: expected the dtype of the weights, torch\.float32, got torch\.float64"):
        WaveBlock(8)(normal(2, 8, 3, 3))


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
    x = torch.randn(2, 32, 28, 28).contiguous(memory_format=torch.channels_last)
    fused = WaveBlock(32, mode=mode, norm_layer=norm_layer, recompute=recompute)
    exact = ReferenceBlock(32, mode=mode, norm_layer=norm_layer)

    def kept(module: nn.Module) -> float:
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        known = [*module.parameters(), *module.buffers()]
        return memory.saved_bytes(lambda: module(leaf), known) / (x.numel() * x.element_size())

    assert kept(fused) <= images
    assert kept(exact) > 30


def test_peak_of_a_training_step() -> None:
    """Live bytes above parameters and gradients, against upstream's order of operations."""
    x = torch.randn(2, 3, 128, 128)
    sizes = {"layers": [2, 2, 3, 2], "embed_dims": [32, 48, 64, 64], "mlp_ratios": [4, 4, 4, 4], "num_classes": 10}

    def peak(model: nn.Module) -> int:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        known = [x, *model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
        return memory.tracked_peak_bytes(lambda: model(x).square().mean().backward(), known)

    upstream = peak(WaveNet(**sizes, norm_layer=GROUP, **PLAIN))
    assert peak(WaveNet(**sizes, norm_layer=GROUP)) <= 0.45 * upstream


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
    with pytest.raises(ValueError, match=r"x: expected 4 channels \(in_features\), got shape \(1, 5, 3, 3\)"):
        mlp(torch.zeros(1, 5, 3, 3))


#: They bring a value to Python: on a GPU they wait for it.
WAITS = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero"}


@pytest.mark.parametrize("made", [lambda: wk.FusedWaveblock(level=2, final_dim=8), lambda: WaveBlock(8)])
def test_a_step_waits_for_no_value(made: Callable[[], nn.Module]) -> None:
    """Also with cumulative averages (momentum=None), which count batches on the device."""
    module = made()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    with Operators() as ran:
        module(normal(2, 8, 8, 8).float()).sum().backward()
    assert WAITS.isdisjoint(ran.others)


def test_inference_behind_a_group_norm_runs_its_kernel() -> None:
    """The library's GroupNorm would copy a channels_last image to NCHW and back."""
    form = WaveBlock(8, norm_layer=lambda dim: nn.GroupNorm(1, dim)).eval().fuse_for_inference()
    with Operators() as ran:
        form(normal(2, 8, 6, 5).float())
    assert "aten::native_group_norm" not in ran.others
    assert [name for name, _ in ran.calls].count("pre_norm_apply") == 2
