"""Backward passes that cannot be differentiated again, and say what can."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wavemix_kernels.ops.common.dtypes import WITHOUT_AUTOCAST, without_autocast

MESSAGE = (
    "this backward pass of wavemix_kernels cannot be differentiated again; run the forward pass inside of "
    '`with wavemix_kernels.backend("reference"):`, whose operations can'
)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """:func:`torch.autograd.function.once_differentiable` with :data:`MESSAGE` as its error."""

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled() and not _autocast(grads):
            return backward(ctx, *grads)
        with torch.no_grad(), without_autocast(_autocast(grads)):
            out = backward(ctx, *grads)
        if not torch.is_grad_enabled() or not any(isinstance(g, Tensor) and g.requires_grad for g in grads):
            return out
        flat = out if isinstance(out, tuple) else (out,)
        fails: Any = torch._C._functions.DelayedError(MESSAGE.encode(), len(flat))
        return fails(*(None if g is None else g.detach().requires_grad_() for g in flat))

    return wrapper


def _autocast(grads: Sequence[Any]) -> str | None:
    """The kind of device that a backward pass is called under autocast for, or None: forward has cast what it kept, and
    no more is to be cast."""
    for grad in grads:
        if isinstance(grad, Tensor):
            kind = grad.device.type
            return kind if kind not in WITHOUT_AUTOCAST and torch.is_autocast_enabled(kind) else None
    return None
