"""The dtype that arithmetic happens in."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: Types of devices on which torch refuses to say whether autocast is on. torch.amp.is_autocast_available knows them
#: too, but torch.compile of older torch versions cannot trace it.
WITHOUT_AUTOCAST = ("meta", "lazy", "vulkan", "ve", "fpga")


def _multiplied() -> set[torch.dtype]:
    probes = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if not torch.backends.mkldnn.is_available():
        return set()
    answers = {dtype: getattr(torch.ops.mkldnn, name, None) for dtype, name in probes.items()}
    return {dtype for dtype, supported in answers.items() if supported is not None and supported()}


#: Half types whose convolutions this CPU's library multiplies. For the others PyTorch has a loop over elements.
MULTIPLIED = _multiplied()


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic happens in fp32 for the half types; each output is rounded once."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def without_autocast(of: Tensor | str | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast off for a kind of device, or a tensor's, where it is on: entering it takes time, and an exported graph
    holds it as a graph within."""
    kind = of.device.type if isinstance(of, Tensor) else of
    if kind is None or kind in WITHOUT_AUTOCAST or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def cast_together(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Each tensor in its dtype, below autograd; on a GPU those that change are copied in one launch."""
    if any(t.device.type == "cuda" for t in tensors):
        return _copied_together(tensors, dtypes)
    return [t.to(dtype) for t, dtype in zip(tensors, dtypes, strict=True)]


def cast_given(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Any]:
    """:func:`cast_together` of those that are there, all in one dtype."""
    there = [t for t in tensors if t is not None]
    made = iter(cast_together(there, [dtype] * len(there)))
    return [None if t is None else next(made) for t in tensors]


def _copied_together(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    pairs = zip(tensors, dtypes, strict=True)
    made = [t if t.dtype == dtype else torch.empty_like(t, dtype=dtype) for t, dtype in pairs]
    changed = [(new, t) for new, t in zip(made, tensors, strict=True) if new is not t]
    if changed:
        torch._foreach_copy_([new for new, _ in changed], [t for _, t in changed])
    return made
