"""Backward passes that cannot be differentiated again, and say what can."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MESSAGE = (
    "this backward pass of wavemix_kernels cannot be differentiated again; run the forward pass inside of "
    '`with wavemix_kernels.backend("reference"):`, whose operations can'
)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """:func:`torch.autograd.function.once_differentiable` with :data:`MESSAGE` as its error."""

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            out = backward(ctx, *grads)
        if not torch.is_grad_enabled() or not any(isinstance(g, Tensor) and g.requires_grad for g in grads):
            return out
        flat = out if isinstance(out, tuple) else (out,)
        fails: Any = torch._C._functions.DelayedError(MESSAGE.encode(), len(flat))
        return fails(*(None if g is None else g.detach().requires_grad_() for g in flat))

    return wrapper
