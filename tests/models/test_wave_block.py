"""Wave-MLP's block and its mixer, PATM: their norms, kernels, hooks, memory (tests/models/test_every_model.py has the
values)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import wavemix_kernels as wk
from benchmarks.harness.rivals import UpstreamPATM
from tests.models import subjects
from tests.models.subjects import BATCH, GROUP, PLAIN, TINY, assert_same_step, changed, normal, operators, wave_block
from tests.ops.contract import image, randn
from tests.ops.each import Calls
from tests.tolerances import UNIT_ROUNDOFF
from wavemix_kernels import backends
from wavemix_kernels.nn.wavemlp import reference
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import layout
from wavemix_kernels.wavemlp import PATM, Mlp, WaveBlock, WaveNet

X = normal(4, 8, 5, 4)
norms = pytest.mark.parametrize("norm_layer", [BATCH, GROUP])
modes = pytest.mark.parametrize("mode", reference.MODES)


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
    assert subjects.saved_bytes(reference.WaveBlock(32, mode=mode, norm_layer=norm_layer), x) > 30 * x.nbytes


def test_peak_of_a_training_step() -> None:
    """Live bytes above parameters and gradients, against upstream's order of operations."""
    x = torch.randn(2, 3, 128, 128)
    sizes = {"layers": [2, 2, 3, 2], "embed_dims": [32, 48, 64, 64], "mlp_ratios": [4, 4, 4, 4], "num_classes": 10}
    upstream = subjects.peak_bytes(WaveNet(**sizes, norm_layer=GROUP, **PLAIN), x)
    assert subjects.peak_bytes(WaveNet(**sizes, norm_layer=GROUP), x) <= 0.45 * upstream


def test_models_choose_their_block() -> None:
    def kinds(**kwargs: Any) -> set[type]:
        return {type(m) for m in WaveNet(**TINY, **kwargs).modules() if isinstance(m, reference.WaveBlock)}

    assert kinds() == {WaveBlock}
    assert {type(block.attn) for block in WaveNet(**TINY).modules() if isinstance(block, WaveBlock)} == {PATM}
    assert kinds(token_mixer=reference.PATM) == {reference.WaveBlock}  # upstream's order of operations throughout
    assert kinds(token_mixer=reference.PATM, block=WaveBlock) == {WaveBlock}


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


# --- PATM ------------------------------------------------------------------------------------------------


FUSED = {"patm_whole", "phase_aggregate"}


@modes
# Even and odd channels (a group that reads a cosine and a sine), and images thinner than the taps.
@pytest.mark.parametrize("dim, size", [(4, (3, 21)), (5, (8, 2)), (7, (1, 1)), (6, (9, 1)), (10, (5, 13))], ids=str)
def test_is_upstreams_order_of_operations(dim: int, size: tuple[int, int], mode: str) -> None:
    """The benchmarks run this order; recorded values hold the reference."""
    qkv_bias = size[0] % 2 == (mode == "fc")
    module = subjects.randomised(PATM(dim, qkv_bias=qkv_bias, mode=mode).double()).eval()
    theirs = UpstreamPATM(dim, qkv_bias, mode=mode).double().eval()
    theirs.load_state_dict(module.state_dict())
    x = normal(2, dim, *size)
    torch.testing.assert_close(module(x), theirs(x), rtol=1e-12, atol=1e-12)


# --- BatchNorms ------------------------------------------------------------------------------------------

FC = subjects.patm(6, (5, 4), "fc", True)


def phase_norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [module.theta_h_conv[1], module.theta_w_conv[1]]


@pytest.mark.parametrize(
    "change",
    [
        {"momentum": None},
        {"momentum": 0.5, "eps": 1e-2},
        {"running_mean": None, "running_var": None, "num_batches_tracked": None, "track_running_stats": False},
        {"weight": None, "bias": None},
    ],
    ids=["cumulative", "eps", "untracked", "no affine"],
)
def test_batch_norm_options(change: dict[str, Any], either: str) -> None:
    fused, exact = FC.pair()
    for norm in (*phase_norms(fused), *phase_norms(exact)):
        changed(norm, **change)
    for seed in range(2):
        assert_same_step(fused, exact, normal(2, 6, 5, 4, seed=seed))
    assert_same_step(fused.eval(), exact.eval(), normal(2, 6, 5, 4))


@pytest.mark.parametrize("frozen, runs", [((0, 1), True), ((0,), False)], ids=["both", "one"])
def test_frozen_norms_train_the_rest(frozen: tuple[int, ...], runs: bool, either: str) -> None:
    """There is no kernel for one BatchNorm frozen beside one in training."""
    fused, exact = FC.pair()
    for module in (fused, exact):
        for i in frozen:
            phase_norms(module)[i].eval()
    assert_same_step(fused, exact, FC.x())
    assert bool(FUSED & set(operators(fused, FC.x()))) == runs


# --- Which kernels run -----------------------------------------------------------------------------------


def test_runs_whole_up_to_a_width() -> None:
    """From end to end: no depthwise phases, no odd channels, and no weights larger than the cache."""
    x, wide = torch.randn(2, 8, 5, 4), choose.WHOLE + 2
    for module in (PATM(8), PATM(8).eval().fuse_for_inference()):
        assert "patm_whole" in operators(module, x)
    for module, other in (
        (PATM(8, mode="depthwise"), x), (PATM(5), torch.randn(2, 5, 5, 4)), (PATM(wide), torch.randn(2, wide, 2, 2)),
    ):  # fmt: skip
        assert "patm_whole" not in operators(module, other)
    with backends.backend("cpu"):
        assert "patm_whole" in operators(PATM(8), x)
    assert operators(PATM(5), torch.randn(2, 5, 5, 4)).count("phase_aggregate") == 1


def test_other_parts_run_as_modules(either: str) -> None:
    module = PATM(8)
    nn.utils.parametrizations.weight_norm(module.fc_h)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(PATM(8)).eval()
    assert type(synchronised.theta_h_conv[1]) is nn.SyncBatchNorm
    x = torch.randn(2, 8, 5, 4)
    assert FUSED & set(operators(PATM(8), x))
    for other in (module, synchronised):
        assert not FUSED & set(operators(other, x))
    with backends.backend("reference"):
        assert not operators(PATM(8), x)


# --- Gradients, dtypes, memory ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "subject", [subjects.PATM["patm of 34"], subjects.PATM["patm of columns"]], ids=["fc", "depthwise"]
)
def test_gradients_that_are_wanted(subject: subjects.Subject, either: str) -> None:
    """Those of parameters do not depend on whether x wants one, nor x's on the parameters; none in inference mode."""
    fused, exact = subject.pair()
    x, grads = subject.x(), []
    for leaf in (x, x.clone().requires_grad_()):
        fused.zero_grad()
        fused(leaf).square().sum().backward()
        grads.append([p.grad.clone() for p in fused.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    fused.load_state_dict(exact.state_dict())
    fused.eval(), exact.eval()
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), exact(x), rtol=1e-10, atol=1e-10)
    fused.requires_grad_(False)
    x.requires_grad_()
    fused(x).sum().backward()
    assert x.grad is not None


@modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(mode: str, dtype: torch.dtype, either: str) -> None:
    fused, exact = subjects.patm(8, (6, 7), mode).pair(torch.float32)
    for module in (fused, exact):
        with torch.no_grad():
            for name, value in module.state_dict().items():
                if "theta" in name and name.endswith("0.weight"):
                    value.mul_(0.5)  # phases of about one radian: what a half type makes of many says nothing
        module.eval()
    x = normal(2, 8, 6, 7, dtype=torch.float32)

    got, want = subjects.autocast_step(fused, x, dtype), subjects.autocast_step(exact, x.double(), None)
    assert got[0].dtype == dtype
    # These are rounded one after the other: x and weights, theta (which turns waves by phase times that), z, h, the
    # weighted sum, the output. The backward pass doubles the chain, and squares double the error of the output's
    # gradient.
    phase = fused.theta_h_conv(x).abs().max().item() + fused.theta_w_conv(x).abs().max().item()
    unit = UNIT_ROUNDOFF[dtype] * (6 + phase)
    for i, (value, exact_value) in enumerate(zip(got, want, strict=True)):
        assert (value.double() - exact_value).norm() <= (2 if i == 0 else 6) * unit * exact_value.norm(), i


def saved(module: nn.Module, order: str) -> int:
    return subjects.saved_bytes(module, image(randn(2, 32, 28, 28), torch.float32, layout=order))


@pytest.mark.usefixtures("parts")
@modes
@pytest.mark.parametrize("recompute, allowed", [("amplitudes", 0.20), ("all", 0.06)])
@pytest.mark.parametrize("order", ["nchw", "channels_last"])
def test_memory_saved_for_backward(mode: str, recompute: str, allowed: float, order: str) -> None:
    """Against upstream's order of operations."""
    upstream = saved(reference.PATM(32, mode=mode), order)
    assert upstream > 18 * 2 * 32 * 28 * 28 * 4
    assert saved(PATM(32, mode=mode, recompute=recompute), order) <= allowed * upstream


def test_whole_keeps_its_input_and_statistics() -> None:
    """Beside x: two BatchNorms' statistics and affine maps, the branches' mean, and the moments of 32 channels."""
    image = 2 * 32 * 28 * 28 * 4
    assert saved(PATM(32), "channels_last") <= image + 8 * (32 + 32 * 32) + 4 * (5 * 2 + 2) * 32


def test_dropout() -> None:
    module = PATM(8, proj_drop=1.0)
    x = normal(1, 8, 4, 4, dtype=torch.float32)
    assert (module.train()(x) == 0).all()
    assert (module.eval()(x) != 0).any()
    mlp = reference.Mlp(4, 6, 5, drop=0.3)
    dropped: list[int] = []
    mlp.drop.register_forward_hook(lambda _, inputs, __: dropped.append(inputs[0].shape[1]))
    mlp(normal(1, 4, 3, 3, dtype=torch.float32))
    assert dropped == [6, 5]  # the hidden activations and the output
    assert mlp.drop.p == 0.3


#: They bring a value to Python: on a GPU they wait for it.
WAITS = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero"}


@pytest.mark.parametrize("made", [lambda: wk.FusedWaveblock(level=2, final_dim=8), lambda: WaveBlock(8)])
def test_a_step_waits_for_no_value(made: Callable[[], nn.Module]) -> None:
    """Also with cumulative averages (momentum=None), which count batches on the device."""
    module = made()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    with Calls() as ran:
        module(normal(2, 8, 8, 8).float()).sum().backward()
    assert WAITS.isdisjoint(ran.others)


def test_inference_behind_a_group_norm_runs_its_kernel() -> None:
    """The library's GroupNorm would copy a channels_last image to NCHW and back."""
    form = WaveBlock(8, norm_layer=lambda dim: nn.GroupNorm(1, dim)).eval().fuse_for_inference()
    with Calls() as ran:
        form(normal(2, 8, 6, 5).float())
    assert "aten::native_group_norm" not in ran.others
    assert [op._schema.name for op, _ in ran.made].count("wavemix_kernels::pre_norm_apply") == 2
