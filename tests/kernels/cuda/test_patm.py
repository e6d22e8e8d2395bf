"""The CUDA kernels of `phase_aggregate` inside the emulator."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.emulator.build import launches
from tests.kernels.cuda.support import ORDERS
from tests.ops.contract import Case, check, results
from tests.ops.test_patm import NAMES, PhaseAggregate, arguments
from tests.tolerances import DTYPES
from wavemix_kernels.ops.patm import phases


@pytest.fixture
def emulated(core: ModuleType | None) -> ModuleType:
    if core is None:
        pytest.skip("--device cuda: it looks into the emulator")
    return core


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset, form", [(0, "wide"), (1, "narrow")])
def test_slices_are_read_in_place_by_words(emulated: ModuleType, offset: int, form: str, dtype: torch.dtype) -> None:
    """Amplitudes are slices of one image, from channel `offset` on, the phases aligned ones of another."""
    name = str(dtype).removeprefix("torch.")
    case = Case(dtype=dtype, shape=(1, 16, 3, 4), layout="channels_last", way="statistics")
    given: Any = PhaseAggregate().inputs(case, "cpu")
    for names, start in ((NAMES[:3], offset), (NAMES[3:5], 0)):
        memory = torch.full((1, 3, 4, 16 * len(names) + start), math.nan, dtype=dtype).permute(0, 3, 1, 2)
        for slot, part in zip(names, memory[:, start:].split(16, 1), strict=True):
            given[slot] = part.copy_(given[slot])
    PhaseAggregate().run(case, given, "cuda")
    forward, summed, backward, sums, statistics = launches(emulated)
    assert (forward, summed) == (f"phase_forward ({form}, {name})", f"phase_sum_rows ({name})")
    assert (backward, sums) == (f"phase_backward ({form}, {name})", f"phase_sum_rows ({name})")
    assert statistics == f"phase_statistics (wide, {name})"  # the phases' slices are aligned


def test_large_batches_are_cut_into_several_launches(emulated: ModuleType) -> None:
    """The emulated core allows 8 blocks a launch instead of 2^31."""
    case = Case(dtype=torch.float32, shape=(11, 16, 9, 2), layout="channels_last", way="statistics")
    check(PhaseAggregate(), case, "cuda", "cpu")
    ran = [name.partition(" ")[0] for name in launches(emulated)]
    assert set(ran) == {"phase_forward", "phase_backward", "phase_statistics", "phase_sum_rows"}
    assert ran.count("phase_forward") > 1
    phases.phase_aggregate(*arguments((0, 4, 3, 5), torch.float32).values(), backend="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_order_of_threads(
    emulated: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    case, runs = Case(dtype=dtype, shape=(3, 24, 9, 11), layout="channels_last", way="statistics"), []
    for order in ORDERS:
        monkeypatch.setenv("WAVEMIX_EMULATOR_ORDER", order)
        runs.append(results(PhaseAggregate(), case, "cuda", "cpu")[2])
    assert all(torch.equal(runs[0][name], other[name]) for other in runs[1:] for name in runs[0])


def test_argument_errors(emulated: Any) -> None:
    with pytest.raises(ValueError, match="shape: expected an even number of channels, got 3"):
        emulated.phase_forward_cuda(1, (1, 3, 2, 2), [((), (), 0, 0, 0)] * 2, [(), ()], (), 0, 0, 132, 0)
    strided = torch.zeros(1, 4, 2, 2)
    bad = [strided.data_ptr(), *strided.stride()]
    with pytest.raises(ValueError, match="z: expected contiguous channels, got a channel stride of 4"):
        emulated.phase_forward_cuda(1, (1, 4, 2, 2), [(bad, bad, 0, 0, 0)] * 2, [(), ()], (), 0, 0, 132, 0)
    with pytest.raises(ValueError, match=r"z: an image has 65536 x 65536 pixels; up to 1073741824 would work"):
        emulated.phase_workspace_cuda((1, 2, 65536, 65536), 132, True)
