"""``warmup``: everything that a model's first call would have to wait for, beforehand."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from wavemix_kernels.ops import choose, verify

__all__ = ["Ran", "Report", "warmup"]


@dataclass(frozen=True)
class Ran:
    """An operator of this package that a model called, and the backend that served it."""

    op: str
    backend: str
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Report:
    """The report of :func:`warmup`. Printing it lists the operators by backend.

    Attributes:
        seconds: of the run, with everything that was verified, loaded and compiled.
        ran: each operator called, once for each backend, dtype and device.
        refused: kernels that failed their self-test on these devices, in words.
    """

    seconds: float
    train: bool
    ran: tuple[Ran, ...]
    refused: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"warmup: {'forward and backward' if self.train else 'forward'} in {self.seconds:.1f} s"]
        rows: dict[str, list[str]] = {}
        for ran in self.ran:
            dtype = str(ran.dtype).removeprefix("torch.")
            rows.setdefault(f"{ran.backend} on {ran.device}, {dtype}", []).append(ran.op)
        lines += [f"  {where}: {', '.join(ops)}" for where, ops in rows.items()]
        if not self.ran:
            lines.append("  no operator of wavemix_kernels was called; accelerate(model) first?")
        return "\n".join(lines + [f"  refused: {fault}" for fault in self.refused])


def warmup(model: nn.Module, *example: Any, train: bool = False) -> Report:
    """Verifies, loads and compiles every kernel that ``model`` needs for inputs like ``example``, by running it once.

    For programs that time their first step, and for whoever captures a CUDA graph: kernels that no GPU of this kind has
    verified prove themselves at first use, which a capture does not allow. Later processes find the verdicts in the
    user's cache. Triton compiles for dtypes and alignments, not for sizes.

    A copy of the model runs on copies of the tensors: parameters, buffers, gradients and torch's random state stay as
    they are. Call it under the same ``torch.autocast`` and :class:`wavemix_kernels.backend` as the model itself.

    Args:
        model: any module. Under DistributedDataParallel pass what it wraps.
        example: the arguments of a call; tensors in nested containers are copied too.
        train: run in training mode, with backward through every output; else in evaluation mode without gradient.

    Returns:
        What ran, on which backend, and what was refused.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``train`` with a model none of whose outputs has a gradient.
        RuntimeError: a CUDA graph is being captured.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("warmup: a CUDA graph is being captured; call it before")
    started = time.perf_counter()
    twin = copy.deepcopy(model).train(train)
    arguments = tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), example)
    tensors = [*twin.parameters(), *twin.buffers(), *(t for t in tree_leaves(arguments) if isinstance(t, Tensor))]
    devices = {t.device for t in tensors}
    gpus = [d.index for d in devices if d.type == "cuda"]
    with torch.random.fork_rng(gpus, device_type="cuda"), choose.watched() as calls:
        with torch.set_grad_enabled(train):
            out = twin(*arguments)
        if train:
            _backward(out, [t for t in tensors if t.requires_grad])
        for index in gpus:
            torch.cuda.synchronize(index)
    ran = tuple(Ran(*call) for call in calls)
    return Report(time.perf_counter() - started, train, ran, tuple(verify.refused({r.device for r in ran})))


def _backward(out: Any, inputs: list[Tensor]) -> None:
    results = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
    if not results:
        raise ValueError("warmup: train=True, but no output of the model has a gradient; leave it out for inference")
    # Not backward(): hooks that wait for accumulated gradients, such as an optimizer's, are not to run.
    torch.autograd.grad(results, inputs, [torch.ones_like(t) for t in results], allow_unused=True)
