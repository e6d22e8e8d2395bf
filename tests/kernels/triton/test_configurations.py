"""Every tile configuration of the Triton kernels, by the ops' contracts; what is peculiar to some of the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import pytest
import torch

from tests.ops.contract import Case, Contract, check
from tests.ops.test_batch_norm import Apply, Backward, Stats
from tests.ops.test_deconv import Deconv, NormGradients
from tests.ops.test_haar import Analysis
from tests.ops.test_mlp import Mlp
from tests.ops.test_patm import BranchSum, PhaseAggregate
from tests.ops.test_reduce_haar import Gradients, ReduceHaar
from wavemix_kernels import _native
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.deconv import tiles as deconv_tiles
from wavemix_kernels.ops.haar import tiles as haar_tiles
from wavemix_kernels.ops.haar.tiles import MAX_LEVELS
from wavemix_kernels.ops.mlp import tiles as mlp_tiles
from wavemix_kernels.ops.reduce_haar import tiles as reduce_tiles
from wavemix_kernels.ops.reduce_haar.tiles import ReduceConfig

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from wavemix_kernels.ops.deconv import triton as deconv
from wavemix_kernels.ops.haar import triton_plan
from wavemix_kernels.ops.mlp import triton as mlp
from wavemix_kernels.ops.norm import triton_batch_norm as norm
from wavemix_kernels.ops.patm import triton_branches, triton_phases
from wavemix_kernels.ops.reduce_haar import triton as reduction
from wavemix_kernels.ops.reduce_haar import triton_backward as reduction_backward

F32, F16 = torch.float32, torch.float16
LAST = {"layout": "channels_last", "cotangents": "channels_last"}
each_half = pytest.mark.parametrize("dtype", [F32, F16], ids=str)


@pytest.fixture
def by_all(monkeypatch: pytest.MonkeyPatch, device: str) -> Callable[..., None]:
    """Runs contracts with each configuration in the place of the one that the module would take."""

    def run(module: Any, name: str, configs: Iterable[Any], *runs: tuple[Contract, Case]) -> None:
        configs = list(configs)
        assert configs
        for config in configs:
            take = mock.Mock(return_value=config)
            monkeypatch.setattr(module, name, take)
            for contract, case in runs:
                check(contract, case, "triton", device)
            assert take.called, f"nothing asks {module.__name__}.{name} for a configuration"

    return run


@pytest.mark.prove
@pytest.mark.parametrize("levels", range(1, MAX_LEVELS + 1))
@pytest.mark.parametrize("layout, memory", [("rows", "nchw"), ("channels", "channels_last")])
def test_every_haar_tile(by_all: Callable[..., None], layout: Any, memory: str, levels: int) -> None:
    configs = {(c.rows, c.cols, c.planes): c for c in haar_tiles.search_space(layout, levels, 2)}
    assert configs
    for (rows, cols, planes), config in configs.items():
        # Ends inside the tile in rows, just past it in columns or planes: two programs, and planes straddle images.
        shape = (2, planes // 2 + 1, rows - 1, cols - 2) if planes > 1 else (1, 1, rows - 1, cols + 4)
        case = Case(dtype=F16, size=(shape, levels), mode="symmetric", layout=memory)
        by_all(triton_plan, "config_for", [config], (Analysis(), case))


@pytest.mark.prove
@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
def test_every_reduction(by_all: Callable[..., None], levels: int) -> None:
    size = ((1, 6, 2**levels, 3 * 2**levels), 20, levels)
    case = Case(dtype=F32, size=size, last=True, bias=True, **LAST)
    by_all(reduction, "config_for", set(reduce_tiles.search_space(4, levels)), (ReduceHaar(), case))


@pytest.mark.prove
@pytest.mark.parametrize("levels", [1, 3, 4])
def test_every_gradient_of_the_reduction(by_all: Callable[..., None], levels: int) -> None:
    """More outputs and channels than a tile has, and more blocks than a program."""
    case = Case(dtype=F32, size=((3, 70, 2**levels, 3 * 2**levels), 20, levels), bias=True, add="nchw", **LAST)
    configs = {c.quads * c.outputs * c.channels: c for c in reduce_tiles.backward_search_space(4, levels)}
    by_all(reduction_backward, "backward_config_for", configs.values(), (Gradients(), case))


@pytest.mark.prove
@each_half
def test_every_mlp(by_all: Callable[..., None], dtype: torch.dtype) -> None:
    case = Case(dtype=dtype, size=(40, 20, 6, 70, 24), layout="channels_last", p=0.5, affine=True, bias=True,
                want_output=True)  # fmt: skip
    configs = {(c.rows, c.hidden): c for c in mlp_tiles.search_space(dtype.itemsize)}  # the interpreter has no warps
    by_all(mlp, "config_for", configs.values(), (Mlp(), case))


@each_half
@pytest.mark.parametrize("form", ["fused", "kept", "products"])
def test_every_form_of_the_mlp(
    by_all: Callable[..., None], form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows than a split has, hidden units and channels that fill no tile, with and without a second input; a kept
    layer in several steps of a program."""
    if form == "kept":
        monkeypatch.setattr(_native, "MULTIPROCESSORS", 1)
    sizes = ((70, 20, 6, 70, 24), (40, 24, 0, 68, 20))
    cases = (
        Case(dtype=dtype, size=size, layout="channels_slice", p=0.25, affine=True, bias=bias, want_output=True)
        for size, bias in zip(sizes, (True, False), strict=True)
    )
    by_all(choose, "pointwise_mlp", [form], *((Mlp(), case) for case in cases))


@pytest.mark.prove
@each_half
def test_every_deconv(by_all: Callable[..., None], dtype: torch.dtype) -> None:
    forward = Case(dtype=dtype, size=(1, 20, 36, 2, 3), bias=0, **LAST)
    backward = Case(dtype=dtype, size=(1, 20, 36, 2, 3), weighted=True, batch_stats=True, **LAST)
    configs = {(c.rows, c.columns, c.depth): c for c in deconv_tiles.search_space(dtype.itemsize)}
    by_all(deconv, "config_for", configs.values(), (Deconv(), forward), (NormGradients(), backward))


@pytest.mark.prove
def test_every_norm(by_all: Callable[..., None]) -> None:
    case = Case(dtype=F32, shape=(2, 10, 5, 13), layout="channels_last", offset=1, other="nchw", last=True,
                weighted=False, batch_stats=True)  # fmt: skip
    by_all(norm, "config_for", norm.search_space(), (Stats(), case), (Apply(), case), (Backward(), case))


@pytest.mark.prove
def test_every_tile_of_patm(by_all: Callable[..., None]) -> None:
    spaces = (*triton_phases.search_space(False), *triton_phases.search_space(True))
    configs = {(c.lines, c.channels): c for c in spaces}
    case = Case(dtype=F32, shape=(1, 20, 2, 5), layout="channels_last", way="weighted")
    by_all(triton_phases, "config_for", configs.values(), (PhaseAggregate(), case))
    case = Case(dtype=F32, shape=(2, 20, 5, 13), layout="channels_last")
    by_all(triton_branches, "config_for", triton_branches.search_space(), (BranchSum(), case))


@pytest.mark.parametrize("levels, memory", [(1, "channels_last"), (2, "nchw")])
def test_splits_of_the_reduction_s_gradients(
    by_all: Callable[..., None], levels: int, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four runs of blocks that cross images, the last one short; outputs in two chunks, every other step of which
    makes x's gradient."""
    shapes, launch = [], reduction_backward.launch

    def spy(*arguments: Any) -> Any:
        made = launch(*arguments)
        shapes.append([tuple(partial.shape) for partial in made[1:]])
        return made

    monkeypatch.setattr(_native, "MULTIPROCESSORS", 4)
    monkeypatch.setattr(reduction_backward, "launch", spy)
    case = Case(dtype=F16, size=((3, 6, 10 * levels, 14 * levels), 20, levels), layout=memory, bias=True, add=None,
                cotangents="channels_last")  # fmt: skip
    config = ReduceConfig(16, 16, 16, 4, 2)
    by_all(reduction_backward, "backward_config_for", [config], (Gradients(), case))
    assert shapes == [[(4, 20, 6), (4, 20)]]


@pytest.mark.parametrize("turned, cols", [(False, 32), (True, 32), (True, 16)])
def test_dropout_counter_is_64_bits(turned: bool, cols: int, device: str) -> None:
    import triton
    import triton.language as tl

    from wavemix_kernels.ops.mlp import reference
    from wavemix_kernels.ops.mlp.triton_philox import keep_mask

    @triton.jit
    def kernel(
        out, seed, first: tl.int64, threshold: tl.int64, mask: tl.constexpr, turned: tl.constexpr, cols: tl.constexpr
    ):
        row = tl.arange(0, 16).to(tl.int64) + first  # the interpreter takes no type from the annotation
        kept = mask(tl.load(seed), row, 32, 132, threshold, cols, turned)
        tl.store(out + tl.arange(0, 16)[:, None] * cols + tl.arange(0, cols)[None, :], kept.to(tl.int8))

    first, seed = 2**31 - 3, 2**63 - 5  # 17 groups a row: beyond 2^32
    out = torch.full((16, cols), -1, dtype=torch.int8, device=device)
    kernel[(1,)](out, torch.tensor([seed], device=device), first, 2**15 + 7, keep_mask, turned, cols)
    groups = torch.arange(first, first + 16)[:, None] * 17 + torch.arange(4, 4 + cols // 8)
    expected = reference.halves(groups, seed).reshape(16, cols) < 2**15 + 7
    tiles = cols // 8
    units = [2 * tiles * q + 2 * b + c for b in range(tiles) for q in range(4) for c in range(2)]
    assert torch.equal(out.cpu().bool(), expected[:, units] if turned else expected)
