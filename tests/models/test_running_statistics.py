"""A model's BatchNorms move together, as each would by itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.ops.contract import randn
from wavemix_kernels.nn import parts
from wavemix_kernels.nn.wavemlp.block import FusedWaveBlock
from wavemix_kernels.ops.norm import running as running_statistics


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many norms each call moves."""
    made, real = list[int](), running_statistics.update

    def update(moves: list[running_statistics.Move], momentum: float | None) -> None:
        made.append(len(moves))
        real(moves, momentum)

    monkeypatch.setattr(running_statistics, "update", update)
    return made


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(FusedWaveBlock(8), FusedWaveBlock(8)).double()
    made[1].norm2.momentum = 0.3
    return made


def test_move_together_at_the_end(moved: list[int]) -> None:
    """One call a momentum, with the values that each block's own would give."""
    apart, x = blocks(), randn(2, 8, 4, 5)
    joined = copy.deepcopy(apart)
    before = {name: t.clone() for name, t in joined.named_buffers()}
    apart(x)
    assert moved == [3, 1, 3, 1]
    moved.clear()
    with parts.together(), parts.together():
        joined(x)
        assert all(torch.equal(t, before[name]) for name, t in joined.named_buffers())
    assert moved == [7, 1]
    for (name, a), b in zip(joined.named_buffers(), apart.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_nothing_is_left_after_an_error(moved: list[int]) -> None:
    made, x = blocks(), randn(2, 8, 4, 5)

    @parts.together()
    def step() -> None:
        made(x)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step()
    assert moved == []
    made(x)
    assert moved == [3, 1, 3, 1]
