"""Backward passes that cannot be differentiated again, and say what can."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wavemix_kernels.ops.common.dtypes import WITHOUT_AUTOCAST

MESSAGE = (
    "this backward pass of wavemix_kernels cannot be differentiated again; run the forward pass inside of "
    '`with wavemix_kernels.backend("reference"):`, whose operations can'
)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """:func:`torch.autograd.function.once_differentiable` with :data:`MESSAGE` as its error."""

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad(), _without_autocast(grads):
            out = backward(ctx, *grads)
        if not torch.is_grad_enabled() or not any(isinstance(g, Tensor) and g.requires_grad for g in grads):
            return out
        flat = out if isinstance(out, tuple) else (out,)
        fails: Any = torch._C._functions.DelayedError(MESSAGE.encode(), len(flat))
        return fails(*(None if g is None else g.detach().requires_grad_() for g in flat))

    return wrapper


def _without_autocast(grads: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """For a backward pass that is called under autocast: forward has cast what it kept, no more is to be cast."""
    kind = next((g.device.type for g in grads if isinstance(g, Tensor)), "meta")
    if kind in WITHOUT_AUTOCAST or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)
