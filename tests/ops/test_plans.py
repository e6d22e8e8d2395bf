"""Plans give what the functions that they were made of give, for other values at other addresses."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import pytest
import torch

from wavemix_kernels import FusedPATM, FusedWaveblock, _native, backends, ops
from wavemix_kernels.nn.wavemlp.block import FusedWaveBlock
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import plan, selftest
from wavemix_kernels.ops.common.plan_lines import Slot
from wavemix_kernels.ops.norm import running as running_statistics
from wavemix_kernels.wavemlp import MyNorm

_OPERATORS = [
    (name, backend) for name in ops.OPS for backend in ("triton", "cuda") if backend in ops.load(name).BACKENDS
]


class _Refused:
    """The CPU's core, whose calls no recorder sees."""

    def __init__(self, core: Any) -> None:
        self._core = core

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._core, name)
        if callable(value) and (recorder := _native.recorder()) is not None:
            recorder.refuse(f"it calls {name}")
        return value


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_native, "core", _Refused(_native.core))
    with plan.everywhere():
        yield


def _plans() -> int:
    return sum(isinstance(made, FunctionType) for table in plan.tables.values() for made in table.plans.values())


@pytest.mark.prove
@pytest.mark.parametrize("name, backend", _OPERATORS, indirect=["backend"])
def test_operators(plans: None, monkeypatch: pytest.MonkeyPatch, device: str, name: str, backend: str) -> None:
    if device != "cpu":
        pytest.skip("plans are made there anyway")
    pattern, test, dtype = selftest.pattern, ops.load(name).self_test, ops.load(name).BACKENDS[backend].dtype
    with torch.device(device):
        for phase in range(3):
            shifted = functools.partial(_shifted, pattern, phase)
            monkeypatch.setattr(selftest, "pattern", shifted)
            error, bound = selftest.run(test, backend, torch.device(device), dtype)
            assert error <= bound
    assert _plans() > 0


def _shifted(pattern: Any, by: float, *shape: int, phase: float = 0.0) -> torch.Tensor:
    return pattern(*shape, phase=phase + by)


def _steps(module: torch.nn.Module, shape: tuple[int, ...], autocast: bool) -> list[torch.Tensor]:
    """Outputs, gradients and buffers of three steps, each on another image."""
    module = copy.deepcopy(module)
    made: list[torch.Tensor] = []
    for step in range(3):
        torch.manual_seed(step)
        x = torch.randn(shape).requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            out = module(x)
        made += [out, *torch.autograd.grad(out, [x, *module.parameters()], torch.randn_like(out))]
    return [*made, *module.buffers()]


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize(
    "module, shape",
    [
        (lambda: FusedWaveblock(level=2, final_dim=8, ff_channel=8), (2, 8, 8, 8)),
        pytest.param(
            lambda: FusedWaveblock(level=1, final_dim=8, ff_channel=8, recompute="all"),
            (2, 8, 4, 4),
            marks=pytest.mark.prove,
        ),
        (lambda: FusedPATM(8), (2, 8, 5, 6)),
        pytest.param(lambda: FusedWaveBlock(8), (2, 8, 5, 6), marks=pytest.mark.prove),
    ],
    ids=["waveblock", "waveblock_all", "patm", "wave_mlp_block"],
)
@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.prove)])
def test_blocks(
    plans: None, monkeypatch: pytest.MonkeyPatch, device: str, backend: str, module: Any, shape: tuple[int, ...],
    autocast: bool,
) -> None:  # fmt: skip
    if device != "cpu":
        pytest.skip("plans are made there anyway")
    for choice in ("product", "product_backward_weight"):  # as on a GPU
        monkeypatch.setattr(choose, choice, lambda *_: "convolution")
    made = module()
    with backends.backend(backend):
        with plan.paused():
            want = _steps(made, shape, autocast)
        got = _steps(made, shape, autocast)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert a.stride() == b.stride()
    passes = [table.plans for name, table in plan.tables.items() if "." in name and table.plans]
    assert len(passes) >= 2
    assert all(isinstance(made, FunctionType) for table in passes for made in table.values())


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("norm_layer", [torch.nn.BatchNorm2d, MyNorm])
def test_a_wave_block_in_evaluation(
    plans: None, monkeypatch: pytest.MonkeyPatch, device: str, backend: str, norm_layer: Any
) -> None:
    """One plan, for norms that fold and for those that stay."""
    if device != "cpu":
        pytest.skip("plans are made there anyway")
    monkeypatch.setattr(choose, "product", lambda *_: "convolution")  # as on a GPU
    block = FusedWaveBlock(8, norm_layer=norm_layer).eval()
    for name, buffer in block.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
    form = block.fuse_for_inference()
    with backends.backend(backend):
        for step in range(3):
            x = torch.randn(2, 8, 5, 6) + step
            made = form(x)
            with plan.paused():
                assert torch.equal(form(x), made)
        torch.testing.assert_close(made, block(x), rtol=1e-4, atol=1e-4)
    assert [isinstance(of, FunctionType) for of in plan.tables["wave_block_evaluate"].plans.values()] == [True]


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_running_statistics(plans: None, backend: str) -> None:
    """The plan writes to the caller's tensors, and PyTorch knows of each time."""
    runs = [[torch.zeros(4), torch.ones(4), torch.tensor(0)] for _ in range(2)]
    for step in range(4):
        mean, var = torch.randn(4), torch.rand(4)
        moves = [running_statistics.Move(*running, mean, var, 30) for running in runs]
        with plan.paused():
            running_statistics._update_by_plan(moves[:1], 0.3)
        before = [t._version for t in runs[1]]
        running_statistics._update_by_plan(moves[1:], 0.3)
        assert all(map(torch.equal, *runs)), step
        assert all(t._version > version for t, version in zip(runs[1], before, strict=True)), step
    assert _plans() == 1


def test_addresses_are_a_part_of_the_question(plans: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels use wider accesses at multiples of 16. Tensors at others are asked for as fast."""
    twice = plan.planned("twice", lambda x: x * 2)
    row = torch.arange(12.0)
    keys: list[Any] = []
    monkeypatch.setattr(plan, "_key", lambda *args, own=plan._key: (keys.append(1), own(*args))[1])
    for start, asked in ((2, 3), (0, 3), (2, 0), (0, 0), (1, 3)):
        keys.clear()
        for _ in range(5):
            assert torch.equal(twice(row[start : start + 4]), 2 * row[start : start + 4])
        assert len(keys) == asked, start
    assert len(plan.tables["twice"].plans) == 3


def _views(x: torch.Tensor, w: torch.Tensor) -> Any:
    """Memory that is seen through views alone, as a whole and in parts; views of arguments, one of them a result; views
    that overlap, of another dtype, of what an operator gave, and itself."""
    memory = x.new_empty(2, 6, 4)
    torch.mul(x.t().reshape(2, 24), 2, out=memory.view(2, 24))
    first, second = memory.permute(0, 2, 1).unbind(0)
    second[1:3, 2].add_(1)
    row = w[1:2].expand(3, 4)
    few = x.new_empty(4)
    thrice = few.as_strided((2, 2), (1, 1))
    few.view(2, 2).copy_(w[:2, :2])
    more = (x + 1).to(torch.float32)
    words = (x * 1).view(torch.int32)[:, 1::2]
    return first + second, memory[1, 2:].t(), x.t()[2:], row * row.t().sum(), 2 * thrice, words, more[0], more * 2


def test_views(plans: None) -> None:
    """Values, order and memory are the function's."""
    run = plan.planned("views", _views)
    for step in range(4):
        x, w = torch.randn(12, 4) + step, torch.randn(3, 4)
        made, want = run(x, w), _views(x, w)
        for a, b in zip(made, want, strict=True):
            assert torch.equal(a, b)
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        assert made[2].data_ptr() == want[2].data_ptr()
        assert made[2]._is_view()
    assert _plans() == 1


@pytest.mark.parametrize(
    ("size", "stride", "dense"), [((2, 3), (3, 1), 6), ((2, 3), (1, 2), 6), ((2, 2), (1, 1), 0), ((2, 2), (4, 1), 0)]
)
def test_memory_is_laid_out_as_views_of_all_of_it(size: Any, stride: Any, dense: int) -> None:
    """A view with two elements in one place needs less memory than others of the same size."""
    assert Slot(0, size, stride, torch.float32, torch.device("cpu"), False, 0).dense == dense
