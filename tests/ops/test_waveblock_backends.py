"""The whole Waveblock on each kernel backend against the float64 reference, which tests/models holds to upstream's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import wavemix_kernels as wk
from tests.emulator.build import launches
from tests.ops.contract import image, randn
from tests.tolerances import UNIT_ROUNDOFF, assert_within
from wavemix_kernels import _native
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.deconv import op as deconv
from wavemix_kernels.ops.mlp import normed
from wavemix_kernels.reference import Waveblock

U32 = UNIT_ROUNDOFF[torch.float32]
CASES = [(1, "mlp", "nchw"), (2, "all", "channels_last"), (3, "hidden", "nchw"), (4, "all", "channels_last")]


def ran(backend: str, device: str) -> None:
    """On the emulator: the reduction's and the synthesis' kernels, and no other, were launched."""
    if backend == "cuda" and device == "cpu":
        names = launches(_native.cuda_core)
        kernels = ("reduce_haar", "haar_synthesis")
        assert all(name.startswith(kernels) for name in names), names
        assert all(any(name.startswith(kernel) for name in names) for kernel in kernels), names


@pytest.mark.parametrize("level, recompute, layout", CASES)
def test_block(backend: str, device: str, level: int, recompute: str, layout: str) -> None:
    """Output, all gradients and running statistics, beside the float64 reference of the same parameters."""
    torch.manual_seed(0)
    dtype = torch.float32 if backend == "triton" else torch.float64
    options: dict[str, Any] = {"level": level, "mult": 2, "ff_channel": 8, "final_dim": 8, "dropout": 0.0}
    block = wk.FusedWaveblock(**options, recompute=recompute).to(device, dtype)
    truth = Waveblock(**options).double()
    truth.load_state_dict(block.state_dict())
    x = image(randn(2, 8, 16, 16), dtype, device, layout).requires_grad_()
    wide = x.detach().cpu().double().requires_grad_()
    grad = randn(*x.shape, seed=1).to(device, dtype)
    if backend == "cuda" and device == "cpu":
        launches(_native.cuda_core)  # forgets those of tests before
    with wk.backend(backend):
        out = block(x, residual=True)
    out.backward(grad)  # the choice of the forward pass holds
    ran(backend, device)
    exact = truth(wide) + wide
    exact.backward(grad.cpu().double())
    with wk.backend(backend):
        evaluated = block.eval()(x, residual=True)
    pairs = [("output", out, exact), ("inference", evaluated, truth.eval()(wide) + wide), ("x", x.grad, wide.grad)]
    pairs += [(name, p.grad, q.grad) for (name, p), q in zip(block.named_parameters(), truth.parameters(), strict=True)]
    pairs += [(name, b, q) for (name, b), q in zip(block.named_buffers(), truth.buffers(), strict=True)]
    # A chain of `level` parts, each five sums of at most 2*16*16 terms, normalised by batch statistics that a
    # gradient passes twice. What cancels (a bias before a BatchNorm has gradient 0) is measured by the largest.
    largest = max(float(q.double().abs().max()) for _, _, q in pairs[2:] if q.is_floating_point())
    u = UNIT_ROUNDOFF[dtype] * (2 if dtype == torch.float64 else 1)
    for name, got, want in pairs:
        own = name in ("output", "inference", "x") or "running" in name
        scale = float(want.detach().double().abs().max()) if own else largest
        assert_within(got, want.double(), torch.full_like(want.double(), level * 5 * 512 * u * scale), name)


def test_block_with_dropout_follows_torch_s_seed(device: str) -> None:
    """The same seeds, hence masks, on two backends."""
    torch.manual_seed(0)
    block = wk.FusedWaveblock(level=2, mult=2, ff_channel=8, final_dim=8, dropout=0.5).to(device)
    x = torch.randn(2, 8, 8, 12, device=device)
    results = []
    for name in ("triton", "auto"):
        torch.manual_seed(5)
        leaf = x.clone().requires_grad_()
        with wk.backend(name):
            out = block(leaf)
        out.square().mean().backward()
        results.append((out.detach(), leaf.grad))
    for got, want in zip(*results, strict=True):
        assert float((got - want).norm()) <= 1024 * U32 * float(want.norm())


def test_each_level_s_upsampling_is_chosen_by_its_own_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the finest level's has all the block's channels."""
    asked, folds = [], deconv.folds

    def recorded(backend: str, u_channels: int, grad: torch.Tensor) -> bool:
        asked.append(tuple(grad.shape))
        return folds(backend, u_channels, grad)

    monkeypatch.setattr(deconv, "folds", recorded)
    block = wk.FusedWaveblock(level=2, final_dim=8, ff_channel=8)
    block(torch.randn(1, 8, 8, 8)).sum().backward()
    assert asked == [(1, 8, 8, 8), (1, 4, 4, 4)]


@pytest.mark.parametrize("recompute", ["hidden", "mlp"])
def test_gradients_go_through_the_norm_below(device: str, recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half types take that way where MLPs keep their hidden layers; parts give the same but for roundings."""
    monkeypatch.setattr(choose, "MLP_WEIGHTS_HELD", 0)  # as wide blocks do
    results, serves = [], normed.serves
    for joined in (True, False):
        monkeypatch.setattr(normed, "serves", lambda *args, joined=joined: joined and serves(*args))
        torch.manual_seed(0)
        block = wk.FusedWaveblock(level=3, final_dim=16, ff_channel=16, upsample="bilinear", recompute=recompute)
        block = block.to(device, torch.float16)
        x = image(randn(2, 16, 8, 16), torch.float16, device, "channels_last").requires_grad_()
        with choose.watched() as calls:
            with wk.backend("triton"):
                out = block(x, residual=True)
            out.backward(image(randn(*out.shape, seed=1), torch.float16, device, "channels_last"))
        asked = {call[0] for call in calls}
        assert ("normed_mlp_backward" in asked) == joined
        results.append({"x": x.grad, **{name: p.grad for name, p in block.named_parameters()}})
    largest = max(float(t.abs().max()) for t in results[1].values())
    for name, want in results[1].items():
        bound = torch.full_like(want, 8 * UNIT_ROUNDOFF[torch.float16] * largest, dtype=torch.float64)
        assert_within(results[0][name], want.double(), bound, name)
