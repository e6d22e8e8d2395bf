"""The Triton kernels of PATM alone: every tile, and sine and cosine of all numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.ops.contract import Case, check
from tests.ops.test_patm import BranchSum, PhaseAggregate
from tests.tolerances import UNIT_ROUNDOFF, assert_within

pytest.importorskip("triton", reason="Triton is not installed: pip install wavemix-kernels[triton]")

import triton
import triton.language as tl

from tests.kernels.triton import search_spaces
from wavemix_kernels.ops.patm import triton_branches, triton_phases, triton_waves


def tiles(device: str) -> list[Any]:
    configs = {*search_spaces.phase_aggregate(False), *search_spaces.phase_aggregate(True)}
    if device == "cpu":  # warps are nothing to the interpreter
        return list({(c.lines, c.channels): c for c in configs}.values())
    return list(configs)


@pytest.mark.prove
def test_every_tile_of_phases(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiles(device)
    for config in tiles(device):
        monkeypatch.setattr(triton_phases, "config_for", lambda *_, config=config: config)
        case = Case(dtype=torch.float32, shape=(1, 20, 2, 5), layout="channels_last", way="weighted")
        check(PhaseAggregate(), case, "triton", device)


@pytest.mark.prove
def test_every_tile_of_sums(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for config in search_spaces.branch_sum():
        monkeypatch.setattr(triton_branches, "config_for", lambda *_, config=config: config)
        check(BranchSum(), Case(dtype=torch.float32, shape=(2, 20, 5, 13), layout="channels_last"), "triton", device)


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
