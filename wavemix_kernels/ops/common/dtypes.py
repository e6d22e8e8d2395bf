"""The dtype that arithmetic happens in."""

from __future__ import annotations

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic happens in fp32 for the half types; each output is rounded once."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
