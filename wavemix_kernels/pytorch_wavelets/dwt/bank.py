"""Filters as buffers of a module."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wavemix_kernels import log
from wavemix_kernels.ops.dwt.reference import Filters
from wavemix_kernels.pytorch_wavelets.checked import mode_of

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_S = math.sqrt(0.5)
# Haar's coefficient as each dtype rounds it: a buffer that went through a cast still means Haar.
_ROUNDED = tuple(torch.tensor(_S, dtype=dtype).item() for dtype in _DTYPES)


class FilterBuffers(nn.Module):
    """Four filter buffers: low and high of the "col" pair, then of the "row" pair."""

    _names: tuple[str, str, str, str]

    def __init__(self, filters: Sequence[Sequence[float]]) -> None:
        super().__init__()
        for name, taps in zip(self._names, filters, strict=True):
            shape = (1, 1, -1, 1) if name.endswith("col") else (1, 1, 1, -1)
            self.register_buffer(name, torch.tensor(taps, dtype=torch.get_default_dtype()).reshape(shape))

    def _filters(self) -> Filters:
        # The original hands its "col" filters to the pass along W and its "row" filters to the one along H.
        low_col, high_col, low_row, high_row = self._buffers_in_order()
        return Filters(low_w=low_col, high_w=high_col, low_h=low_row, high_h=high_row)

    def _buffers_in_order(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        low_col, high_col, low_row, high_row = self._names
        return getattr(self, low_col), getattr(self, high_col), getattr(self, low_row), getattr(self, high_row)


class FilterBank(FilterBuffers):
    """Filter buffers, and whether they hold Haar's as a plain attribute: forward need not read them."""

    def __init__(self, filters: Sequence[Sequence[float]], mode: str) -> None:
        super().__init__(filters)
        self.mode = mode
        mode_of(mode)
        # The numbers given decide, not the buffers: under a meta device these hold none.
        self._haar = self._equals_haar(filters)
        self._remember()

    def refresh_filters(self) -> None:
        """Read the buffers again to decide whether they hold Haar's filters.

        Happens by itself after load_state_dict, a move or cast, an assignment, and a write in place on the
        CPU. Call it after a write in place on another device: forward does not look for those, as
        DistributedDataParallel broadcasts buffers in place at every step and each look would stall the
        device. Call it too after an assignment or write in place where torch.compile has compiled the module.
        """
        self._remember()
        filters = self._buffers_in_order()
        # Meta and fake tensors hold no numbers yet; what is loaded into them later is read then.
        if not any(f.is_meta or type(f) not in (Tensor, nn.Parameter) for f in filters):
            self._haar = self._equals_haar([f.detach().flatten().tolist() for f in filters])

    def _remember(self) -> None:
        # The tensors themselves, not their ids: an id is given again once its tensor is gone. The count of writes
        # only on the CPU, as refresh_filters says; inference tensors keep none, and a compiler sees none.
        compiled = torch.compiler.is_compiling()
        self._seen = [
            (f, None if compiled or f.device.type != "cpu" or f.is_inference() else f._version)
            for f in self._buffers_in_order()
        ]

    def _runs_haar(self) -> bool:
        """Whether the Haar kernels run."""
        low_col, high_col, low_row, high_row = filters = self._buffers_in_order()
        if low_col.requires_grad or high_col.requires_grad or low_row.requires_grad or high_row.requires_grad:
            log.fallback(self, "its filters are learned and need a gradient of their own", "plain convolutions")
            return False
        if not torch.compiler.is_compiling():
            for now, (then, version) in zip(filters, self._seen, strict=True):
                if now is not then or (version is not None and now._version != version):
                    self.refresh_filters()
                    break
        return self._haar

    def _how(self) -> tuple[str, Filters | None]:
        """The mode, and the filters, None for Haar's."""
        return mode_of(self.mode), None if self._runs_haar() else self._filters()

    def _equals_haar(self, filters: Sequence[Sequence[float]]) -> bool:
        def equal(taps: Sequence[float], signs: tuple[float, float]) -> bool:
            return len(taps) == 2 and all(
                any(abs(tap * sign - s) <= 2**-52 for s in _ROUNDED) for tap, sign in zip(taps, signs, strict=True)
            )

        low, high = (1.0, 1.0), (1.0, -1.0)  # mirrored for analysis or not for synthesis: the same in both
        return all(map(equal, filters, (low, high, low, high)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FilterBank":
        super()._apply(fn, recurse)
        self.refresh_filters()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.refresh_filters()


def hold(module: nn.Module, names: Sequence[str], filters: Sequence[Sequence[float]]) -> None:
    for name, taps in zip(names, filters, strict=True):
        module.register_buffer(name, torch.tensor(taps, dtype=torch.get_default_dtype()).reshape(1, 1, -1))
