"""The Waveblock, reference and fused: its arguments, its dropout, and torch's own machinery around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wavemix_kernels as wk
from benchmarks.harness.rivals import UpstreamWaveblock
from tests.models import subjects
from tests.models.subjects import autocast_step, calls, saved_bytes
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


@pytest.mark.parametrize("recompute, share", [("mlp", 0.52), ("all", 0.27)])
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
