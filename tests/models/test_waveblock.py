"""The Waveblock, reference and fused: its arguments, its dropout, and torch's own machinery around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wavemix_kernels as wk
from tests.models.subjects import Operators
from tests.tolerances import UNIT_ROUNDOFF
from wavemix_kernels.nn.wavemix.reference import UPSAMPLES
from wavemix_kernels.reference import Waveblock

BLOCKS = {"reference": Waveblock, "fused": wk.FusedWaveblock}
both = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())


def small(block: type[nn.Module], level: int = 2, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return block(**{"level": level, "mult": 2, "ff_channel": 8, "final_dim": 8, "dropout": 0.0} | options)


def test_level_4_runs_four_dwt_levels() -> None:
    where = {"haar_analysis": 1, "haar_pyramid": 1, "reduce_haar": 3}
    with Operators() as ran:
        small(wk.FusedWaveblock, level=4)(torch.randn(1, 8, 32, 16))
    assert sum(args[where[name]] for name, args in ran.calls if name in where) == 4


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

    def run(enabled: bool) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = module(leaf)
        out.float().square().sum().backward()
        assert leaf.grad is not None
        return out.detach(), leaf.grad

    exact, exact_grad = run(False)
    out, grad = run(True)
    assert out.dtype == torch.bfloat16
    assert grad.dtype == torch.float32
    # Five roundings one after the other (reduction, bands, three convolutions), each relative to its values; what comes
    # up from coarser levels is rounded as often and adds at most as much again. The backward pass doubles the chain.
    bound = 2 * 5 * UNIT_ROUNDOFF[torch.bfloat16]
    assert (out.float() - exact).norm() <= bound * exact.norm()
    assert (grad - exact_grad).norm() <= 2 * bound * exact_grad.norm()
    module.train()
    run(True)


@both
def test_dropout_acts_in_training_only(block: type[nn.Module]) -> None:
    module = small(block, dropout=0.5)
    x = torch.randn(1, 8, 8, 8)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_upsamplings_compute_what_they_say() -> None:
    torch.manual_seed(0)
    z = torch.randn(1, 8, 5, 6)

    def upsampling(upsample: str) -> nn.Module:
        return small(Waveblock, level=1, upsample=upsample).get_submodule("feedforward.4")

    nearest = upsampling("nearest")(z)
    torch.testing.assert_close(nearest, z.repeat_interleave(2, 2).repeat_interleave(2, 3), rtol=0, atol=0)
    # Bilinear by two, centres aligned: 3/4 and 1/4 of the neighbours, replicated at the border.
    padded = nn.functional.pad(z, (1, 1, 1, 1), mode="replicate")
    even = 0.75 * z + 0.25 * padded[:, :, :-2, 1:-1]
    even_padded = 0.75 * padded[:, :, 1:-1] + 0.25 * padded[:, :, :-2]
    even_even = 0.75 * even + 0.25 * even_padded[..., :-2]
    torch.testing.assert_close(upsampling("bilinear")(z)[:, :, ::2, ::2], even_even, rtol=1e-5, atol=1e-6)
    shuffle = upsampling("pixelshuffle")
    n, c, h, w = z.shape
    interleaved = z.reshape(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)
    convolution = shuffle[1]
    expected = nn.functional.conv2d(interleaved, convolution.weight, convolution.bias, padding=1)
    torch.testing.assert_close(shuffle(z), expected, rtol=0, atol=0)
    assert not list(upsampling("nearest").parameters()) + list(upsampling("bilinear").parameters())


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"level": 5}, "level=5"),
        ({"level": 2.0}, "level=2.0"),
        ({"final_dim": 6}, "4 or 8"),
        ({"upsample": "cubic"}, "'deconv', 'bilinear', 'nearest', 'pixelshuffle'"),
        ({"upsample": "pixelshuffle", "ff_channel": 6}, "ff_channel=6"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"mult": 0}, "mult"),
    ],
)
@both
def test_rejects_arguments(block: type[nn.Module], arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        block(**arguments)


@both
def test_rejects_inputs(block: type[nn.Module]) -> None:
    module = small(block, level=3)
    with pytest.raises(ValueError, match=r"H=28.*24 or 32"):
        module(torch.randn(1, 8, 28, 32))
    with pytest.raises(ValueError, match="8 channels"):
        module(torch.randn(1, 4, 32, 32))
    with pytest.raises(ValueError, match="4 dimensions"):
        module(torch.randn(8, 32, 32))


@pytest.mark.parametrize("recompute, share", [("mlp", 0.52), ("all", 0.27)])
@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_saves_half_or_a_quarter_of_what_upstream_saves(level: int, recompute: str, share: float) -> None:
    pytest.importorskip("pytorch_wavelets", reason="upstream's transform is not installed", exc_type=ImportError)
    from benchmarks.harness.memory import saved_bytes
    from benchmarks.harness.rivals import UpstreamWaveblock

    config = {"level": level, "final_dim": 16, "ff_channel": 16, "mult": 2, "dropout": 0.5}
    x = torch.randn(2, 16, 32, 32, requires_grad=True)
    before = x * 1  # the block's input is an activation that it decides to keep, not a leaf that lives anyway

    def saved(block: nn.Module) -> int:
        return saved_bytes(lambda: block(before), [*block.parameters(), *block.buffers()])

    assert saved(wk.FusedWaveblock(**config, recompute=recompute)) <= share * saved(UpstreamWaveblock(**config))


def test_dropout_is_reproducible_and_its_mask_the_same_in_backward() -> None:
    block = small(wk.FusedWaveblock, level=2, dropout=0.5).double()
    x = torch.randn(2, 8, 8, 12, dtype=torch.float64, requires_grad=True)

    def step(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(seed)
        out = block(x)
        return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]

    (first, grad), (again, same), (other, _) = step(1), step(1), step(2)
    assert torch.equal(first, again)
    assert torch.equal(grad, same)
    assert not torch.equal(first, other)

    def function(t: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return block(t)

    # A finite difference of the same masked function: a mask drawn anew in backward could not match it.
    assert torch.autograd.gradcheck(function, x, fast_mode=True)
    torch.manual_seed(4)
    plain = block(x)
    torch.manual_seed(4)
    kept = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    g = torch.randn_like(plain)
    (want,), (got,) = torch.autograd.grad(plain, x, g), torch.autograd.grad(kept, x, g)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_residual_frozen_statistics_and_synchronised_ones() -> None:
    block, twin = small(wk.FusedWaveblock, level=2).double(), small(Waveblock, level=2).double()
    twin.load_state_dict(block.state_dict())
    x = torch.randn(2, 8, 8, 12, dtype=torch.float64)
    torch.testing.assert_close(block(x, residual=True), x + twin(x), rtol=1e-10, atol=1e-10)
    for module in (block, twin):
        module.feedforward1[5].eval()  # frozen while the rest trains
        module.feedforward2[5].momentum = None
    torch.testing.assert_close(block(x), twin(x), rtol=1e-10, atol=1e-10)
    for (name, got), want in zip(block.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    synchronised = torch.nn.SyncBatchNorm.convert_sync_batchnorm(small(wk.FusedWaveblock)).double()
    torch.testing.assert_close(synchronised.eval()(x), small(Waveblock).double().eval()(x), rtol=1e-10, atol=1e-10)
