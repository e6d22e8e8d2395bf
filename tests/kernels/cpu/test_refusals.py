"""Calls that the CPU's kernels refuse: each message names the argument and its value."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from wavemix_kernels import _native

if (reason := _native.cpu_reason()) is not None:
    pytest.skip(f"CPU kernels: {reason}", allow_module_level=True)
core: Any = _native.core

ROWS, WEIGHT = torch.zeros(1, 4, 2, 2), torch.zeros(2, 4)
X, Z, ODD = (torch.zeros(1, c, 2, 2).contiguous(memory_format=torch.channels_last) for c in (4, 8, 3))
AT, LAST, ODD_AT = (_native.address(t) for t in (ROWS, X, ODD))
IMAGE = (1, X.shape, LAST, 0, 0, False)
MLP: dict[str, Any] = {
    "dtype": 1, "size": (2, 2, 0, 2, 2), "x": (AT[0], 2), "second": (0, 0), "tensors": (0, 0, AT[0], 0, AT[0], 0),
    "p": 0.5, "seed": 0, "first_row": 0, "out": (AT[0], 2), "threads": 1,
}  # fmt: skip


def mlp(**change: Any) -> Callable[[], None]:
    return lambda: core.mlp_forward_cpu(**MLP | change)


def reduce_haar(x: torch.Tensor, z: torch.Tensor) -> Callable[[], None]:
    address = _native.address
    return lambda: core.reduce_haar_cpu(1, 1, (1, 4, 4, 4), 2, address(x), address(WEIGHT), [], [address(z)], 1)


@pytest.mark.parametrize("call, message", [
    (mlp(p=1.5), "p: expected a probability, 0 to 1, got 1.5"),
    (mlp(p=math.nan), "p: expected a probability"),
    (mlp(threads=0), "threads: expected at least 1, got 0"),
    (mlp(dtype=9), "dtype: unknown code 9"),
    (mlp(size=(1, 2, 3)), "size: expected"),
    (mlp(x=(0, 1, 1)), "x: expected an address and a row stride, got 3 integers"),
    (mlp(tensors=(0,)), "tensors: expected"),
    (reduce_haar(torch.zeros(1, 4, 4, 8)[..., ::2], Z), "x: expected contiguous channels or pixels"),
    (reduce_haar(torch.zeros(1, 4, 4, 4), torch.zeros(1, 8, 2, 2)), "zs: expected contiguous channels"),
    (lambda: core.branch_sum_cpu(1, ROWS.shape, [AT] * 3, 0, AT, 1),
     "branches: expected contiguous channels, got a channel stride of 4"),
    (lambda: core.phase_forward_cpu(1, ODD.shape, True, (ODD_AT, ODD_AT, 0, 0, 0), (), (), 0, 1),
     "shape: expected an even number of channels, got 3"),
    (lambda: core.patm_forward_cpu(IMAGE, [0], 1, False, 0, LAST, 0, 1), "weights: expected 22 addresses, got 1"),
    (lambda: core.patm_moments_cpu((*IMAGE[:3], 1, 0, False), 0, 0, 1), "scale, shift: expected both or neither"),
    (lambda: core.patm_moments_cpu((1, X.shape, AT, 0, 0, False), 0, 0, 1),
     "x: expected contiguous channels, got a channel stride of 4"),
])  # fmt: skip
def test_errors_name_argument_and_value(call: Callable[[], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("call, message", [
    (mlp(threads=1.5), "mlp_forward_cpu: threads: expected an integer, got 1.5 of type float"),
    (mlp(dtype=1 << 40), "dtype: expected an integer of 32 bits, got 1099511627776 of type int"),
    (mlp(seed=-1), r"seed: expected an integer of 0 to 2\^64 - 1, got -1 of type int"),
    (mlp(p="half"), "p: expected a number, got 'half' of type str"),
    (mlp(x=7), "x: expected a sequence, got 7 of type int"),
    (mlp(x=("a", 1)), "x: expected an integer, got 'a' of type str"),
    (mlp(rows=2), r"mlp_forward_cpu\(dtype, size, .*: it has no parameter rows"),
    (lambda: core.mlp_forward_cpu(1, dtype=1), "got dtype twice"),
    (lambda: core.mlp_forward_cpu(1), "needs size"),
    (lambda: core.philox4x32_cpu((1,) * 4, (1, 2), 3), "got 3 arguments"),
    (lambda: core.phase_forward_cpu(1, X.shape, 1, (LAST, LAST, 0, 0, 0), (), (), 0, 1),
     "along_h: expected True or False, got 1 of type int"),
    (lambda: core.phase_forward_cpu(1, X.shape, True, (LAST, 0), (), (), 0, 1),
     "branch: expected a sequence of 5, got 2"),
])  # fmt: skip
def test_arguments_of_other_types(call: Callable[[], None], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_signatures() -> None:
    parameters = inspect.signature(core.haar_analysis_cpu).parameters
    assert [*parameters] == ["dtype", "levels", "shape", "edge", "image", "ll", "highs", "threads", "lows"]
    assert parameters["lows"].default == ()
