"""Plans give what the functions that they were made of give, for other values at other addresses."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import pytest
import torch

from wavemix_kernels import _native, ops
from wavemix_kernels.ops.common import plan, selftest

_OPERATORS = [
    (name, backend) for name in ops.OPS for backend in ("triton", "cuda") if backend in ops.load(name).BACKENDS
]


class _Refused:
    """The CPU's core, whose calls no recorder sees."""

    def __init__(self, core: Any) -> None:
        self._core = core

    def __getattr__(self, name: str) -> Any:
        if (recorder := _native.recorder()) is not None:
            recorder.refuse("it calls the CPU's kernels")
        return getattr(self._core, name)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_native, "core", _Refused(_native.core))
    with plan.everywhere():
        yield


def _plans() -> int:
    return sum(isinstance(made, FunctionType) for table in plan._tables for made in table.values())


@pytest.mark.parametrize("name, backend", _OPERATORS, indirect=["backend"])
def test_operators(plans: None, monkeypatch: pytest.MonkeyPatch, device: str, name: str, backend: str) -> None:
    if device != "cpu":
        pytest.skip("plans are made there anyway")
    pattern, test = selftest.pattern, ops.load(name).self_test
    with torch.device(device):
        for phase in range(3):
            shifted = functools.partial(_shifted, pattern, phase)
            monkeypatch.setattr(selftest, "pattern", shifted)
            error, bound = test(backend, torch.device(device), torch.float32)
            assert error <= bound
    assert _plans() > 0


def _shifted(pattern: Any, by: float, *shape: int, phase: float = 0.0) -> torch.Tensor:
    return pattern(*shape, phase=phase + by)
