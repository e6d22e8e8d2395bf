"""Tensors made of weights alone, kept from call to call, for a model that trains no more."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from wavemix_kernels import checks
from wavemix_kernels.ops.common.transforms import standard_wanted

#: Kinds that are kept: a stem's weights differ at the border alone by the image's size, and most models see one.
MOST = 4


class Kept:
    """Folded or converted weights, which serve as long as the tensors that they were made of are the same and
    unchanged.

    A write through ``Tensor.data`` is not seen: PyTorch does not count it. A copy of a model makes its own.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[list[Any], list[Tensor], tuple[Tensor, ...]]] = {}
        self._of_graphs: list[tuple[Tensor, ...]] = []  # captured CUDA graphs read them for as long as they exist

    def get(
        self, kind: Hashable, sources: Sequence[Tensor], make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What ``make`` gave for this kind and these sources, or gives now."""
        if any(t.is_inference() for t in sources):  # which tell no change
            return make()
        state = [(t.untyped_storage()._cdata, t._version, t.dtype) for t in sources]
        captured = sources[0].is_cuda and torch.cuda.is_current_stream_capturing()
        found = self._made.get(kind)
        if found is not None and found[0] == state:
            if captured:
                self._of_graphs.append(found[2])
            return found[2]
        with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode serves no gradient
            made = make()
        if not captured:  # a graph fills its tensors when it runs, and they are its own
            if len(self._made) >= MOST:
                self._made.clear()
            settle(made[0])
            # A storage that is held cannot become another tensor's.
            self._made[kind] = state, [t.detach() for t in sources], made
        return made

    def autocast(self, first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
        """:func:`wavemix_kernels.checks.autocast` whose ``others``, weights without gradient, are converted once."""
        dtype, there = checks.autocast_dtype(first), [t for t in others if t is not None]
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in there)
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or standard_wanted() is not None
        if dtype is None or not there or learns or traced:
            return checks.autocast(first, *others)
        made = iter(self.get(dtype, there, lambda: checks.autocast(first.new_empty(0), *there)[1:]))
        return first.to(dtype), *(None if t is None else next(made) for t in others)

    def __deepcopy__(self, memo: Any) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, ()


def settle(made: Tensor) -> None:
    """Waits until it is there, once: calls on other streams read it too."""
    if made.is_cuda:
        torch.cuda.current_stream(made.device).synchronize()
