"""Running statistics of BatchNorms, of several in one launch where they lie on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wavemix_kernels import backends
from wavemix_kernels.ops.common import plan
from wavemix_kernels.ops.common.library import Library

_library = Library()
_library.define(
    "running_statistics(Tensor(a!)[] running, Tensor[] batch, int[] values, float momentum) -> ()"  # of several norms
)


class Move(NamedTuple):
    """Running statistics, and the batch of so many values per channel that moves them.

    Attributes:
        batches: seen so far.
        mean, var: (C) each, the variance biased; or the rows of :class:`.batch_norm.Statistics`, and None.
    """

    running_mean: Tensor
    running_var: Tensor
    batches: Tensor
    mean: Tensor
    var: Tensor | None
    values: int

    def moments(self) -> tuple[Tensor, Tensor]:
        if self.var is None:
            mean, var, *_ = self.mean.unbind(0)
            return mean, var
        return self.mean, self.var

    def factor(self) -> float:
        """Makes the variance unbiased."""
        return self.values / max(self.values - 1, 1)


def update(moves: Sequence[Move], momentum: float | None) -> None:
    """Moves the running statistics of different norms towards a batch by ``momentum``; None: towards the average of all
    batches, whose number stays on its device."""
    with torch.no_grad():
        if momentum is not None and moves[0].mean.is_cuda:
            (_by_operators if torch.compiler.is_compiling() else _update_by_plan)(moves, momentum)
            return
        for move in moves:
            move.batches.add_(1)
            mean, var = move.moments()
            for running, batch in ((move.running_mean, mean), (move.running_var, var * move.factor())):
                average = move.batches.double().reciprocal().to(running.dtype) if momentum is None else momentum
                running.lerp_(batch.to(running.dtype), average)


def _update_by_plan(moves: Sequence[Move], momentum: float) -> None:
    running = [t for move in moves for t in move[:3]]
    batch = [t for move in moves for t in move[3:5] if t is not None]
    args = running, batch, [move.values for move in moves], momentum
    if plan.unseen(args):
        plan.operators["running_statistics"](*args)
    else:
        torch.ops.wavemix_kernels.running_statistics(*args)
    torch.autograd.graph.increment_version(running)  # kernels do not


def _running_statistics(running: list[Tensor], batch: list[Tensor], values: list[int], momentum: float) -> None:
    """In one launch of Triton's, which has arithmetic in float32. ``batch``: means and variances, or rows."""
    given = iter(batch)
    moments = ((t, None if t.dim() == 2 else next(given)) for t in given)
    tensors = zip(running[::3], running[1::3], running[2::3], moments, values, strict=True)
    moves = [Move(*of_norm[:3], *of_norm[3], of_norm[4]) for of_norm in tensors]
    narrow = all(t.is_contiguous() and t.dtype != torch.float64 for t in (*running, *batch))
    if not narrow or backends.triton_why_not(batch[0]) is not None:
        _by_operators(moves, momentum)
        return
    from wavemix_kernels.ops.norm import triton_running as kernels

    kernels.move([kernels.Move(*move[:3], *move.moments(), move.factor()) for move in moves], momentum)


def _by_operators(moves: Sequence[Move], momentum: float) -> None:
    """In three launches, and a fourth where the running statistics are of another dtype."""
    torch._foreach_add_([move.batches for move in moves], 1)
    running = [*(move.running_mean for move in moves), *(move.running_var for move in moves)]
    means, variances = zip(*(move.moments() for move in moves), strict=True)
    batch = [*means, *torch._foreach_mul(variances, [move.factor() for move in moves])]
    if any(to.dtype != t.dtype for to, t in zip(running, batch, strict=True)):
        wide, batch = batch, [torch.empty_like(t) for t in running]
        torch._foreach_copy_(batch, wide)
    torch._foreach_lerp_(running, batch, momentum)


_library.impl("running_statistics", _running_statistics, "CompositeExplicitAutograd")
torch.library.register_fake("wavemix_kernels::running_statistics", lambda *_: None, lib=_library)
