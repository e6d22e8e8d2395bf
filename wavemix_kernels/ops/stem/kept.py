"""Folded weights from call to call, for a model that trains no more."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

#: Kinds of images whose weights are kept: sizes differ at the border alone, so most models see one.
MOST = 4


class Kept:
    """Folded weights, which serve as long as the tensors that they were made of are the same and unchanged.

    A write through ``Tensor.data`` is not seen: PyTorch does not count it. A copy of a model folds anew.
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
        made = make()
        if not captured:  # a graph fills its tensors when it runs, and they are its own
            if len(self._made) >= MOST:
                self._made.clear()
            settle(made[0])
            # A storage that is held cannot become another tensor's.
            self._made[kind] = state, [t.detach() for t in sources], made
        return made

    def __deepcopy__(self, memo: Any) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, ()


def settle(made: Tensor) -> None:
    """Waits until it is there, once: calls on other streams read it too."""
    if made.is_cuda:
        torch.cuda.current_stream(made.device).synchronize()
