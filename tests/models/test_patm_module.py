"""PATM as a module: upstream's order of operations, its BatchNorms, its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.harness.rivals import UpstreamPATM
from tests.models import subjects
from tests.models.subjects import PATM as PATMS
from tests.models.subjects import Subject, assert_same_step, normal, operators, randomised
from tests.ops.contract import image, randn
from tests.tolerances import UNIT_ROUNDOFF
from wavemix_kernels import backends
from wavemix_kernels.nn.wavemlp import reference as wavemlp_reference
from wavemix_kernels.ops import choose
from wavemix_kernels.wavemlp import PATM

modes = pytest.mark.parametrize("mode", wavemlp_reference.MODES)
FUSED = {"patm_whole", "phase_aggregate"}


@modes
# Even and odd channels (a group that reads a cosine and a sine), and images thinner than the taps.
@pytest.mark.parametrize("dim, size", [(4, (3, 21)), (5, (8, 2)), (7, (1, 1)), (6, (9, 1)), (10, (5, 13))], ids=str)
def test_is_upstreams_order_of_operations(dim: int, size: tuple[int, int], mode: str) -> None:
    """As the benchmarks have it, beside which recorded values hold the reference."""
    qkv_bias = size[0] % 2 == (mode == "fc")
    module = randomised(PATM(dim, qkv_bias=qkv_bias, mode=mode).double()).eval()
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
        for name, value in change.items():
            setattr(norm, name, value)
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


@pytest.mark.parametrize("subject", [PATMS["patm of 34"], PATMS["patm of columns"]], ids=["fc", "depthwise"])
def test_gradients_that_are_wanted(subject: Subject, either: str) -> None:
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
    upstream = saved(wavemlp_reference.PATM(32, mode=mode), order)
    assert upstream > 18 * 2 * 32 * 28 * 28 * 4
    assert saved(PATM(32, mode=mode, recompute=recompute), order) <= allowed * upstream


def test_whole_keeps_its_input_and_statistics() -> None:
    """Beside x: two BatchNorms', the branches' mean, and the moments of 32 channels."""
    image = 2 * 32 * 28 * 28 * 4
    assert saved(PATM(32), "channels_last") <= image + 8 * (32 + 32 * 32) + 4 * (2 * 2 + 2) * 32


def test_dropout() -> None:
    module = PATM(8, proj_drop=1.0)
    x = normal(1, 8, 4, 4, dtype=torch.float32)
    assert (module.train()(x) == 0).all()
    assert (module.eval()(x) != 0).any()
    mlp = wavemlp_reference.Mlp(4, 6, 5, drop=0.3)
    dropped: list[int] = []
    mlp.drop.register_forward_hook(lambda _, inputs, __: dropped.append(inputs[0].shape[1]))
    mlp(normal(1, 4, 3, 3, dtype=torch.float32))
    assert dropped == [6, 5]  # the hidden activations and the output
    assert mlp.drop.p == 0.3
