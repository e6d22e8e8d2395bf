"""The dtype that arithmetic happens in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic happens in fp32 for the half types; each output is rounded once."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def cast_together(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Each tensor in its dtype, below autograd; on a GPU those that change are copied in one launch."""
    if tensors[0].device.type != "cuda":
        return [t.to(dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
    made = [
        t if t.dtype == dtype else torch.empty_like(t, dtype=dtype) for t, dtype in zip(tensors, dtypes, strict=True)
    ]
    pairs = [(new, t) for new, t in zip(made, tensors, strict=True) if new is not t]
    if pairs:
        torch._foreach_copy_([new for new, _ in pairs], [t for _, t in pairs])
    return made
