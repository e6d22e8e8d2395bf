"""Parameters cast together: what one launch does on a GPU is what a cast of each does."""

from __future__ import annotations

import pytest
import torch

from tests.ops.contract import randn
from wavemix_kernels import checks
from wavemix_kernels.ops.common import dtypes

HALF = torch.bfloat16


@pytest.fixture(params=["one by one", "together"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "together":
        monkeypatch.setattr(checks, "cast_together", dtypes._copied_together)


@pytest.mark.usefixtures("way")
def test_values_gradients_and_strides() -> None:
    leaves = [randn(3, 4).float(), randn(2, 3, 4, 4).float().to(memory_format=torch.channels_last), randn(5)]
    leaves = [t.requires_grad_() for t in leaves]
    made, wanted = checks._Cast.apply(HALF, *leaves), [t.to(HALF) for t in leaves]
    for got, want in zip(made, wanted, strict=True):
        assert torch.equal(got, want)
        assert got.stride() == want.stride()
    # The last is used by nobody; the gradient of the first goes through its cast twice.
    got, want = (
        torch.autograd.grad(a.square().sum() + b.sum(), leaves, allow_unused=True, create_graph=True)
        for a, b, _ in (made, wanted)
    )
    assert (got[2], want[2]) == (None, None)
    for one, other in zip(got[:2], want[:2], strict=True):
        assert torch.equal(one, other)
        assert one.dtype == torch.float32
    twice = (torch.autograd.grad(g[0].sum(), leaves[0], retain_graph=True)[0] for g in (got, want))
    assert torch.equal(*twice)
    gradient = torch.ones_like(made[1])
    plain = torch.autograd.grad(made[1], leaves[1], gradient)[0]
    assert plain.dtype == torch.float32
    assert plain.stride() == gradient.stride() == leaves[1].stride()


def test_what_has_its_dtype_stays() -> None:
    a, b = randn(4).float(), randn(2, 2)
    kept, changed = dtypes._copied_together([a, b], [torch.float32, torch.float32])
    assert kept is a
    assert torch.equal(changed, b.float())
