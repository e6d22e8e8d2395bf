"""Memory of one step: its peak above what was there before, and what autograd keeps for backward.

Three observers, since none sees everything:

- `LiveBytes` counts in a dispatch mode. Device-independent: the same program gives the same number on a CPU
  and on a GPU. It sees what PyTorch operators return; temporaries inside a C++ or custom operator, and code
  made by ``torch.compile``, pass it by.
- `AllocatorLog` replays the CPU allocator's own log (through the profiler), so it sees those too.
- ``torch.cuda.max_memory_allocated`` is the same thing on a GPU.
"""

from __future__ import annotations

import contextlib
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages that operators made while the mode was active.

    Args:
        known: tensors that were there before; their storages do not count.

    Attributes:
        live: bytes of storages alive now.
        peak: the largest value `live` has had.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        # Keys are storages' addresses in C++: a view's storage object compares unequal to its base's. References are
        # weak: strong ones would keep alive what is being counted.
        self._sizes: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self._known = tuple(tensor.untyped_storage() for tensor in known)
        self._excluded = {storage._cdata for storage in self._known}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._observe(leaf)
        self.peak = max(self.peak, self.live)
        return result

    def _observe(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._excluded:
            return
        size = storage.nbytes()
        if key in self._sizes:
            reference, before = self._sizes[key]
            if size != before:  # resized in place
                self._sizes[key] = (reference, size)
                self.live += size - before
            return

        def freed(_: weakref.ref[torch.UntypedStorage]) -> None:
            self.live -= self._sizes.pop(key)[1]

        self._sizes[key] = (weakref.ref(storage, freed), size)
        self.live += size


class AllocatorLog:
    """Replays every allocation of PyTorch's CPU allocator made inside the ``with`` block.

    Attributes:
        peak: largest number of bytes held above the start, after the block.
        left: bytes held at its end.
        events: number of allocations and frees seen; 0 means that this PyTorch logs none.
    """

    def __init__(self) -> None:
        self.peak = 0
        self.left = 0
        self.events = 0
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> AllocatorLog:
        with _profiler_chatter_off():
            self._profile.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        with _profiler_chatter_off():
            self._profile.__exit__(*exception)
        profiler = self._profile.profiler
        results = profiler.kineto_results if profiler is not None else None
        log = [event for event in results.events() if event.name() == "[memory]"] if results is not None else []
        log.sort(key=lambda event: event.start_ns())
        self.events = len(log)
        for event in log:
            if event.device_type() == torch.profiler.DeviceType.CPU:
                self.left += event.nbytes()
                self.peak = max(self.peak, self.left)


@contextlib.contextmanager
def _profiler_chatter_off() -> Iterator[None]:
    """Some builds of the profiler print two trace lines from C++ at each start and stop, whatever the log level."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # no standard error at all: nothing to keep clean
        yield
        return
    with open(os.devnull, "wb") as sink:
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Largest number of bytes that `step` held on `device` above those held when it began, its result included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = step()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    with AllocatorLog() as log:
        result = step()
    del result
    if log.events == 0:
        raise RuntimeError(f"PyTorch {torch.__version__} logged no allocation; its profiler has no memory events")
    return log.peak


def tracked_peak_bytes(step: Callable[[], object], known: Iterable[torch.Tensor]) -> int:
    """The peak of `peak_bytes`, counted by `LiveBytes`; `known` are the tensors that `step` starts from."""
    with LiveBytes(known) as live:
        result = step()
    del result
    return live.peak


def saved_bytes(forward: Callable[[], object], known: Iterable[torch.Tensor]) -> int:
    """Bytes of the unique storages that autograd keeps for the backward of `forward`.

    Args:
        forward: runs the forward pass and returns its outputs.
        known: inputs and parameters; they exist anyway, so keeping them costs nothing and is not counted.
    """
    excluded = {tensor.untyped_storage()._cdata for tensor in known}
    # The tensors are held until the end: an address must not be given out twice.
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in excluded)
    del result
    return total
