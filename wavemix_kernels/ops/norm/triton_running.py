"""Running statistics of BatchNorms in Triton: those of several norms move in one launch, where each would take four
operators of PyTorch's."""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels.ops.common.triton_launch import Launch

MOST = 4  # norms of a launch
_CHANNELS = 256  # of a program


class Move(NamedTuple):
    """Running statistics and the batch that moves them, (C) each and contiguous, of any dtypes; ``batches`` is int64,
    ``factor`` what makes the batch's variance unbiased."""

    running_mean: Tensor
    running_var: Tensor
    batches: Tensor
    mean: Tensor
    var: Tensor
    factor: float


@triton.jit
def _towards(running, batch, at, inside, factor, momentum):
    before = tl.load(running + at, mask=inside, other=0.0).to(tl.float32)
    seen = tl.load(batch + at, mask=inside, other=0.0).to(tl.float32) * factor
    # Like torch.lerp: exact at both ends.
    near, far = before + momentum * (seen - before), seen - (seen - before) * (1.0 - momentum)
    tl.store(running + at, tl.where(momentum < 0.5, near, far).to(running.dtype.element_ty), mask=inside)


@triton.jit
def _move(running_mean, running_var, batches, mean, var, channels, factor, momentum, CHANNELS: tl.constexpr):
    at = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = at < channels
    _towards(running_mean, mean, at, inside, 1.0, momentum)
    _towards(running_var, var, at, inside, factor, momentum)
    if tl.program_id(0) == 0:
        tl.store(batches, tl.load(batches) + 1)


@triton.jit(do_not_specialize=("factor0", "factor1", "factor2", "factor3", "momentum"))
def _running_kernel(
    running_mean0, running_var0, batches0, mean0, var0, channels0, factor0,
    running_mean1, running_var1, batches1, mean1, var1, channels1, factor1,
    running_mean2, running_var2, batches2, mean2, var2, channels2, factor2,
    running_mean3, running_var3, batches3, mean3, var3, channels3, factor3,
    momentum, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A row of programs for each norm."""
    norm = tl.program_id(1)
    if norm == 0:
        _move(running_mean0, running_var0, batches0, mean0, var0, channels0, factor0, momentum, CHANNELS)
    elif norm == 1:
        _move(running_mean1, running_var1, batches1, mean1, var1, channels1, factor1, momentum, CHANNELS)
    elif norm == 2:
        _move(running_mean2, running_var2, batches2, mean2, var2, channels2, factor2, momentum, CHANNELS)
    else:
        _move(running_mean3, running_var3, batches3, mean3, var3, channels3, factor3, momentum, CHANNELS)


def move_launch(moves: Sequence[Move], momentum: float) -> Launch:
    """Moves the statistics of different norms, one to :data:`MOST` of them."""
    args: list[Any] = []
    for i in range(MOST):
        *tensors, factor = moves[min(i, len(moves) - 1)]
        args += [*tensors, tensors[0].numel(), factor]
    most = max(move.running_mean.numel() for move in moves)
    constants = {"CHANNELS": _CHANNELS, "num_warps": 4, "enable_fp_fusion": True}
    return Launch(_running_kernel, (triton.cdiv(most, _CHANNELS), len(moves)), (*args, momentum), constants)


def move(moves: Sequence[Move], momentum: float) -> None:
    """Moves the running statistics towards their batches by ``momentum``."""
    for start in range(0, len(moves), MOST):
        here = moves[start : start + MOST]
        move_launch(here, momentum).run(here[0].mean)
