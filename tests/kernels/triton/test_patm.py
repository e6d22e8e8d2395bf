"""The sines and cosines of PATM's Triton kernels, of all numbers."""

from __future__ import annotations

import math

import pytest
import torch

from tests.tolerances import UNIT_ROUNDOFF, assert_within

pytest.importorskip("triton", reason="Triton is not installed: pip install wavemix-kernels[triton]")

import triton
import triton.language as tl

from wavemix_kernels.ops.patm import triton_waves


@triton.jit
def both(sine, cosine, x, of: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * 64 + tl.arange(0, 64)[None, :]
    s, c = of(tl.load(x + at))
    tl.store(sine + at, s)
    tl.store(cosine + at, c)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NaN and infinity, interpreted
def test_sincos(device: str) -> None:
    """All sizes of fp32: within 1.32 roundoffs below 8192, where every number was tried (csrc/cpu/sincos.h); beyond,
    the rest after whole quarter turns is as exact and goes through the same polynomials."""
    bits = torch.randint(0, 0x7F800000, (64 * 40,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    small = torch.linspace(0, 9000, 64 * 20)
    # The closest of all to a multiple of pi/2, the two ends of the reductions, none at all, and no number.
    special = [16367173.0 * 2.0**72, 8192.0, 8192.001, 3.4028234663852886e38, 0.0, -1.0, 1e-40, 16367173.0 * 2.0**104]
    special = torch.tensor([*special, float("inf"), float("nan")]).repeat(7)[:64]
    x = torch.cat((bits.view(torch.float32), small, special)).to(device)
    sine, cosine = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    both[(x.numel() // 64,)](sine, cosine, x, triton_waves.sincos)
    phases = x.cpu().relu().double().tolist()
    for got, function in ((sine, math.sin), (cosine, math.cos)):
        exact = torch.tensor([function(p) if math.isfinite(p) else math.nan for p in phases], dtype=torch.float64)
        assert_within(got, exact, torch.full_like(exact, 1.32 * UNIT_ROUNDOFF[torch.float32]), function.__name__)
