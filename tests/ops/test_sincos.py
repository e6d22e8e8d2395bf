"""Sine and cosine of phases of any size, on every backend: those of few radians are in test_patm.py."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import Tensor

from tests.ops.contract import SHORT, randn
from tests.ops.test_patm import KERNELS, sine, some_weights, split
from tests.tolerances import UNIT_ROUNDOFF, assert_within
from wavemix_kernels.ops.patm import phases, whole


def waves(theta: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """cos theta | sin theta of the even channels by the taps along W, of the odd ones by those along H: taps that pass
    one channel through show them."""
    c = theta.shape[1]
    z, zero, one = torch.ones_like(theta), theta.new_zeros(c), theta.new_ones(c)
    taps_h, taps_w = theta.new_zeros(c, 2, 1, 7), theta.new_zeros(c, 2, 7, 1)
    taps_h[:, 0, 0, 3] = taps_w[:, 1, 3, 0] = 1
    return phases.phase_aggregate(z, z, z, theta, theta, one, zero, one, zero, taps_h, taps_w, backend=backend)[:2]


def unrounded_waves(theta: Tensor, backend: str) -> Tensor:
    """cos theta | sin theta as the sums over images of one pixel, which no rounding to a half type follows."""
    theta = theta.reshape(1, -1, 1, 1).repeat_interleave(2, 1)  # of a pair of channels the first passes through
    c = theta.shape[1]
    z, zero, one = torch.ones_like(theta), theta.new_zeros(c).float(), theta.new_ones(c).float()
    taps_h, taps_w = zero.new_zeros(c, 2, 1, 7), zero.new_zeros(c, 2, 7, 1)
    taps_h[:, 0, 0, 3] = 1
    given = (z, z, 0 * z, theta, theta, one, zero, one, zero, taps_h, taps_w)
    return phases.phase_aggregate(*given, backend=backend)[2].view(2, -1)


def numbers_of_any_size(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """3840 numbers of all sizes, dense below 9000, near multiples of pi/2, where most of the phase cancels, and on both
    sides of where reductions begin; cosine and sine of what ReLU leaves of them."""
    bits = torch.randint(0, 0x7F800000, (2500,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    numbers = torch.cat((bits.view(torch.float32).double(), torch.linspace(0, 9000, 1286, dtype=torch.float64)))
    if dtype == torch.float64:
        numbers *= 1 + 2.0**-30  # more digits than float32 has
    special = [math.pi / 2 * k * 10.0**power for power in (0, 3.5, 4, 5, 6, 12, 30) for k in range(1, 7)]
    special += [16367173 * 2.0**72, 16367173 * 2.0**104, 8192.0, 8192.001, 8193.0, 1048576.0, 1048577.0, 0.0, 1e-40]
    special += [-1.0, -1e30, torch.finfo(dtype).max]  # of which ReLU leaves nothing, and all
    theta = torch.cat((numbers, torch.tensor(special, dtype=torch.float64))).to(dtype)
    theta[theta.isinf()] = torch.finfo(dtype).max
    with mpmath.workprec(1200):
        phases = theta.double().relu()
        cosine, sine = (phases.clone().apply_(lambda x, f=f: float(f(mpmath.mpf(x)))) for f in (mpmath.cos, mpmath.sin))
    return theta, cosine, sine


@pytest.mark.parametrize(
    "backend, dtype", [*((name, torch.float32) for name in SHORT), ("cuda", torch.float64)], indirect=["backend"]
)
def test_phases_of_any_size(backend: str, dtype: torch.dtype, device: str) -> None:
    """Sine's and cosine's own error alone: products with 1 are exact."""
    theta, *exact = numbers_of_any_size(dtype)
    want = torch.stack(exact).view(1, 2, 40, 96)
    bound = torch.full_like(want, sine(backend, dtype) * UNIT_ROUNDOFF[dtype])
    for out in waves(theta.view(1, 1, 40, 96).repeat(1, 2, 1, 1).to(device), backend):
        assert_within(out, want, bound, "waves")


@pytest.mark.parametrize("backend", ["cuda", pytest.param("triton", marks=pytest.mark.prove)], indirect=True)
def test_phases_of_any_size_in_half_types(backend: str, device: str) -> None:
    """Likewise, before they are rounded."""
    theta, *exact = numbers_of_any_size(torch.bfloat16)
    want = torch.stack(exact)
    bound = torch.full_like(want, sine(backend, torch.bfloat16) * UNIT_ROUNDOFF[torch.float32])
    assert_within(unrounded_waves(theta.to(device), backend), want, bound, "waves")


@pytest.mark.parametrize("power", [3, 4, 6])
def test_large_phases_from_end_to_end(power: int) -> None:
    """Where weights pass one channel through, the output is the cosine itself: its own roundoffs, and those of two sums
    with zeros, which are none."""
    c, u = 32, UNIT_ROUNDOFF[torch.float32]
    x = (10.0**power * (1 + randn(2, c, 3, 5).abs())).float()
    w = some_weights(c, torch.float32)
    values = {name: torch.zeros_like(t) for name, t in w.items()}
    eye, one = torch.eye(c)[:, :, None, None], torch.ones(c)
    for b, at in (("h", (0, 3)), ("w", (3, 0))):
        values |= {f"z_{b}_bias": one, f"theta_{b}": eye, f"scale_{b}": one}
        values[f"taps_{b}"][:, 0, at[0], at[1]] = 1
    choose = torch.tensor([200.0, 0.0, 0.0]).repeat(c)  # the branch along W, to the last bit
    given = split(values | {"fc2_bias": choose, "proj": eye})
    out, _ = whole.forward(whole.Image(x, None, None), None, False, *given, "cpu")
    exact = x.double()[:, ::2]
    assert_within(out, torch.cat((exact.cos(), exact.sin()), 1), torch.full(x.shape, 1.32 * u), "waves")


@KERNELS
def test_phases_without_a_sine_stay_in_reach_of_their_taps(backend: str, device: str) -> None:
    """Infinity and NaN, three pixels to each side, in the outputs of the one pair of channels."""
    given = [torch.ones(1, 8, 3, 20) for _ in range(5)]
    given[3][0, 0, 0, 4], given[3][0, 2, 1, 10] = math.inf, math.nan
    given += [torch.ones(8)] * 4 + [torch.ones(8, 2, 1, 7), torch.ones(8, 2, 7, 1)]
    h, w, _ = phases.phase_aggregate(*(t.to(device) for t in given), backend=backend)
    expected = torch.zeros(h.shape, dtype=torch.bool)
    expected[0, [0, 4], 0, 1:8] = True
    expected[0, [1, 5], 1, 7:14] = True
    assert torch.equal(h.isnan().cpu(), expected)
    assert not w.isnan().any()
