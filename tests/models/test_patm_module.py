"""PATM as a module: the formula written out with loops, its BatchNorms, its memory, its errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness import memory
from tests.models import subjects
from tests.models.subjects import PATM as PATMS
from tests.models.subjects import Subject, assert_same_step, normal, operators, randomised
from tests.tolerances import UNIT_ROUNDOFF
from wavemix_kernels import backends, wavemlp
from wavemix_kernels.nn.wavemlp import reference as wavemlp_reference
from wavemix_kernels.ops import choose
from wavemix_kernels.wavemlp import PATM

modes = pytest.mark.parametrize("mode", wavemlp_reference.MODES)
FUSED = {"patm_whole", "phase_aggregate"}


def seven_taps(u: np.ndarray, weight: np.ndarray, axis: int) -> np.ndarray:
    """u (2C, H, W) convolved along ``axis`` in C groups, group g reading channels 2g and 2g+1; weight (C, 2, 7)."""
    groups, length = weight.shape[0], u.shape[axis]
    out = np.zeros((groups, *u.shape[1:]))
    for g in range(groups):
        for k in range(2):
            for tap in range(7):
                for i in range(length):
                    if 0 <= i + tap - 3 < length:
                        at, source = (slice(None),) * (axis - 1) + (i,), (slice(None),) * (axis - 1) + (i + tap - 3,)
                        out[g][at] += weight[g, k, tap] * u[2 * g + k][source]
    return out


def formula(module: PATM, x: np.ndarray) -> np.ndarray:
    """PATM of one image x (C, H, W) in evaluation, from the parameters by name, in NumPy loops."""
    p = {name: value.detach().double().numpy() for name, value in module.state_dict().items()}

    def pointwise(name: str, value: np.ndarray) -> np.ndarray:
        out = np.einsum("oi,i...->o...", p[f"{name}.weight"][:, :, 0, 0], value)
        bias = p.get(f"{name}.bias", np.zeros(len(out)))
        return out + bias.reshape(-1, *(1,) * (value.ndim - 1))

    def phase(name: str) -> np.ndarray:
        if module.mode == "fc":
            theta = pointwise(f"{name}.0", x)
        else:
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
            weight = p[f"{name}.0.weight"][:, 0, :, :, None, None]
            theta = sum(
                weight[:, i, j] * padded[:, i : i + x.shape[1], j : j + x.shape[2]] for i in range(3) for j in range(3)
            )
        norm = {key: p[f"{name}.1.{key}"][:, None, None] for key in ("weight", "bias", "running_mean", "running_var")}
        theta = (theta - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-5) * norm["weight"] + norm["bias"]
        return np.maximum(theta, 0)

    def branch(axis_name: str, taps: np.ndarray, axis: int) -> np.ndarray:
        z, theta = pointwise(f"fc_{axis_name}", x), phase(f"theta_{axis_name}_conv")
        return seven_taps(np.concatenate((z * np.cos(theta), z * np.sin(theta))), taps, axis)

    h = branch("h", p["tfc_h.weight"][:, :, 0, :], 2)
    w = branch("w", p["tfc_w.weight"][:, :, :, 0], 1)
    c = pointwise("fc_c", x)
    hidden = pointwise("reweight.fc1", (h + w + c).mean((1, 2)))
    hidden = hidden * 0.5 * np.array([1 + math.erf(value / math.sqrt(2)) for value in hidden])
    a = np.exp(pointwise("reweight.fc2", hidden)).reshape(-1, 3)
    a = (a / a.sum(1, keepdims=True))[:, :, None, None]
    return pointwise("proj", h * a[:, 0] + w * a[:, 1] + c * a[:, 2])


@modes
# Even and odd channels (a group that reads a cosine and a sine), and images thinner than the taps.
@pytest.mark.parametrize("dim, size", [(4, (3, 21)), (5, (8, 2)), (7, (1, 1)), (6, (9, 1)), (10, (5, 13))], ids=str)
def test_matches_the_formula(dim: int, size: tuple[int, int], mode: str) -> None:
    module = randomised(PATM(dim, qkv_bias=size[0] % 2 == (mode == "fc"), mode=mode).double()).eval()
    x = normal(2, dim, *size)
    expected = torch.from_numpy(np.stack([formula(module, image) for image in x.numpy()]))
    torch.testing.assert_close(module(x).detach(), expected, rtol=1e-12, atol=1e-12)


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


class Branch(nn.Module):
    """x + path mixer(norm(x)), in one function or of the modules."""

    def __init__(self, mixer: nn.Module, norm: nn.Module, path: Tensor) -> None:
        super().__init__()
        self.mixer, self.norm, self.path = mixer, norm, path

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.mixer, PATM):
            return self.mixer.residual(x, self.norm, self.path, "auto")
        return x + self.path * self.mixer(self.norm(x))


@pytest.mark.parametrize("order", ["channels_last", "contiguous"])
@pytest.mark.parametrize("frozen", ["none", "norm", "phases", "all"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_norm_in_front_and_sum_behind(norm: str, frozen: str, order: str, either: str) -> None:
    branches = []
    for mixer in subjects.patm(8, (5, 12), "fc", True).pair():
        in_front = randomised(nn.BatchNorm2d(8) if norm == "batch" else nn.GroupNorm(1, 8)).double()
        branches.append(Branch(mixer, in_front, torch.tensor([0.0, 1.25, 1.25]).double().reshape(3, 1, 1, 1)))
        in_front.train(frozen not in ("norm", "all"))
        mixer.train(frozen not in ("phases", "all"))
    assert_same_step(*branches, subjects.laid_out(1 + normal(3, 8, 5, 12), order))


# --- Which kernels run -----------------------------------------------------------------------------------


def test_runs_whole_up_to_a_width() -> None:
    """From end to end: no depthwise phases, no odd channels, and no weights larger than the cache."""
    x, wide = torch.randn(2, 8, 5, 4), choose.WHOLE + 2
    for module in (PATM(8), PATM(8).eval().fuse_for_inference()):
        assert "patm_whole" in operators(module, x)
    for module, image in (
        (PATM(8, mode="depthwise"), x), (PATM(5), torch.randn(2, 5, 5, 4)), (PATM(wide), torch.randn(2, wide, 2, 2)),
    ):  # fmt: skip
        assert "patm_whole" not in operators(module, image)
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

    def run(module: nn.Module, x: Tensor, enabled: bool) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=enabled):
            out = module(leaf)
        out.float().square().sum().backward()
        return [out, leaf.grad, *(p.grad for p in module.parameters())]

    got, want = run(fused, x, True), run(exact, x.double(), False)
    assert got[0].dtype == dtype
    assert all(g.dtype == torch.float32 for g in got[1:])
    # These are rounded one after the other: x and weights, theta (which turns waves by phase times that), z, h, the
    # weighted sum, the output. The backward pass doubles the chain, and squares double the error of the output's
    # gradient.
    phase = fused.theta_h_conv(x).abs().max().item() + fused.theta_w_conv(x).abs().max().item()
    unit = UNIT_ROUNDOFF[dtype] * (6 + phase)
    for i, (value, exact_value) in enumerate(zip(got, want, strict=True)):
        assert (value.double() - exact_value).norm() <= (2 if i == 0 else 6) * unit * exact_value.norm(), i


def saved(module: nn.Module, order: str) -> int:
    """Bytes of distinct storages that a step keeps, parameters and buffers excluded."""
    x = subjects.laid_out(torch.randn(2, 32, 28, 28), order).requires_grad_()
    return memory.saved_bytes(lambda: module(x), [*module.parameters(), *module.buffers()])


@pytest.mark.usefixtures("parts")
@modes
@pytest.mark.parametrize("recompute, allowed", [("amplitudes", 0.20), ("all", 0.06)])
@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
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


# --- Errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        *(((dim,), f"dim={dim}: expected at least 4") for dim in (1, 2, 3)),
        ((8, False, None, 0.0, 0.0, "conv"), "mode='conv': expected one of 'fc', 'depthwise'"),
    ],
)
def test_rejects_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PATM(*arguments)


def test_rejects_a_choice_of_what_is_made_again() -> None:
    for kind, choice in ((PATM, "some"), (wavemlp.WaveBlock, "none")):
        with pytest.raises(ValueError, match=f"recompute='{choice}': expected one of 'amplitudes', 'all'"):
            kind(8, recompute=choice)


@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.zeros(1, 4, 5, 5), ValueError, r"x: expected 8 channels \(dim\), got shape \(1, 4, 5, 5\)"),
        (torch.zeros(1, 8, 5, 5, dtype=torch.int64), TypeError, "x: expected float64, float32, float16 or bfloat16"),
        (torch.zeros(1, 8, 1, 1), ValueError, "expected more than one value per channel in training"),
        (
            torch.zeros(2, 8, 1, 1).double(), TypeError,
            r"x: expected the dtype of the weights, torch\.float32, got torch\.float64",
        ),
    ],
    ids=["channels", "integers", "one value", "dtype"],
)  # fmt: skip
def test_rejects_inputs(x: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PATM(8)(x)


@pytest.mark.parametrize("argument", [{"qk_scale": 0.5}, {"attn_drop": 0.1}], ids=str)
def test_arguments_without_effect_warn(argument: dict[str, float]) -> None:
    (name,) = argument
    with pytest.warns(UserWarning, match=f"{name}=.* has no effect"):
        PATM(8, **argument)
