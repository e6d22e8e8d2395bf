"""PATM's kernels on a CPU: threads and moments."""

from __future__ import annotations

import pytest
import torch

from tests.models import subjects
from tests.models.subjects import assert_same_step, threads, training_step
from tests.ops.contract import randn
from tests.ops.test_patm import arguments
from tests.tolerances import UNIT_ROUNDOFF, assert_within
from wavemix_kernels import _native
from wavemix_kernels.ops.patm import phases, whole

if (reason := _native.cpu_reason()) is not None:
    pytest.skip(f"CPU kernels: {reason}", allow_module_level=True)


@pytest.mark.parametrize("count", [1, 3])
def test_same_bits_for_any_number_of_threads(count: int) -> None:
    """The sums of an image add up in an order of their own. (Sums over the batch follow the threads.)"""
    inputs = arguments((3, 12, 40, 33), torch.float32).values()
    expected = phases.phase_aggregate(*inputs, backend="cpu")
    with threads(count):
        actual = phases.phase_aggregate(*inputs, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("batch", [1, 3])
def test_bands_of_rows(batch: int, count: int) -> None:
    """Fewer images than threads: a thread takes some rows of one, and its neighbours' where taps reach."""
    fused, exact = subjects.patm(16, (37, 56)).pair()
    x = randn(batch, 16, 37, 56)
    with threads(count):
        assert_same_step(fused, exact, x)
        steps = [training_step(fused, x) for _ in range(2)]
    assert all(torch.equal(steps[0][name], steps[1][name]) for name, _ in fused.named_parameters())


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("count", [1, 3])
def test_moments(offset: float, count: int) -> None:
    """In float64 whatever the input; a large mean cancels before anything is squared."""
    x = (offset + randn(3, 6, 9, 15)).float()
    with threads(count):
        mean, covariance = whole.moments(whole.Image(x, None, None), "cpu")
    rows = x.double().permute(1, 0, 2, 3).flatten(1)
    # Sums of 405 terms, of differences from one of the pixels that are at most 10.
    unit = UNIT_ROUNDOFF[torch.float64] * rows.shape[1] * 10**2
    assert_within(mean, rows.mean(1), unit + UNIT_ROUNDOFF[torch.float64] * rows.mean(1).abs(), "mean")
    assert_within(covariance, torch.cov(rows, correction=0), torch.full((6, 6), 4 * unit), "covariance")
    assert torch.equal(covariance, covariance.t())
