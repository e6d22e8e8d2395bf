"""Makes an operator of the library differentiable: under eager autograd, torch.compile, export and torch.func.

``torch.library.register_autograd`` does the same in twice the time (43 against 20 us a call, which small
launches feel) and refuses torch.func.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from wavemix_kernels.ops.common import plan

Setup = Callable[[Any, tuple[Any, ...], Any], None]
Backward = Callable[..., Sequence[Any]]


def _flatten(values: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """autograd.Function tracks tensors only at the top level of its arguments: lists of them are spread out, and
    remembered by their lengths (-1: no list)."""
    flat: list[Any] = []
    lengths = []
    for value in values:
        if isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], Tensor):
            flat += value
            lengths.append(len(value))
        else:
            flat.append(value)
            lengths.append(-1)
    return flat, lengths


def _unflatten(flat: Sequence[Any], lengths: Sequence[int]) -> tuple[Any, ...]:
    values: list[Any] = []
    start = 0
    for length in lengths:
        values.append(flat[start] if length < 0 else list(flat[start : start + length]))
        start += 1 if length < 0 else length
    return tuple(values)


def _as_outputs(out: Any) -> Any:
    return tuple(out) if isinstance(out, list) else out


def differentiable(
    library: torch.library.Library, name: str, setup: Setup, backward: Backward, *, once: bool = False
) -> Callable[..., Any]:
    """Registers the gradient of ``library``'s operator ``name`` and returns the function to call it by.

    Args:
        setup: ``(ctx, inputs, output)``, stores what ``backward`` needs (as ``autograd.Function.setup_context``).
        backward: ``(ctx, *output gradients)`` -> one gradient per input, a list for a list of tensors. Built from
            differentiable operations, it makes every higher derivative work.
        once: the backward pass is not differentiable again; asking for it raises instead of returning nonsense.
    """
    op = getattr(getattr(torch.ops, library.ns), name).default
    after_autograd = torch._C._after_autograd_keyset

    def below(keyset: Any, inputs: Sequence[Any]) -> Any:
        """The operator below autograd: by the dispatcher, or past it where there is no keyset."""
        with torch._C._AutoDispatchBelowAutograd():
            if keyset is not None:
                return op.redispatch(keyset & after_autograd, *inputs)
            return plan.operators[name](*inputs)

    def spread_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        out: list[Any] = []
        for grad, length in zip(backward(ctx, *grads), ctx.lengths, strict=True):
            out += [grad] if length < 0 else [None] * length if grad is None else list(grad)
        return (None, None, *out)

    flat_backward: Any = once_differentiable(spread_backward) if once else spread_backward

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: FunctionCtx, keyset: Any, lengths: list[int], *flat: Any) -> Any:
            inputs = _unflatten(flat, lengths)
            out = below(keyset, inputs)
            setup(ctx, inputs, out)
            ctx.lengths = lengths  # type: ignore[attr-defined]
            return _as_outputs(out)

        backward = staticmethod(flat_backward)

    class Functional(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(_: None, lengths: list[int], *flat: Any) -> Any:
            return _as_outputs(op(*_unflatten(flat, lengths)))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            _, ctx.lengths, *flat = inputs
            setup(ctx, _unflatten(flat, ctx.lengths), output)

        backward = staticmethod(flat_backward)

    Eager.__name__ = Eager.__qualname__ = Functional.__name__ = Functional.__qualname__ = name

    def autograd_kernel(keyset: Any, *args: Any) -> Any:
        flat, lengths = _flatten(args)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in flat):
            out = Eager.apply(keyset, lengths, *flat)
            return list(out) if isinstance(out, tuple) else out
        return below(keyset, args)

    library.impl(name, autograd_kernel, "Autograd", with_keyset=True)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        if plan.unseen(args):
            return autograd_kernel(None, *args)
        # grad, vjp and vmap of torch.func want an autograd.Function of their own kind around the operator.
        if torch._C._are_functorch_transforms_active():
            flat, lengths = _flatten(args)
            out = Functional.apply(None, lengths, *flat)
            return list(out) if isinstance(out, tuple) else out
        return op(*args)

    return call


def again(x: Tensor) -> Tensor:
    """``x`` as the input of a recomputation. AOTAutograd merges equal calls of forward and backward and keeps their
    results, which voids a recomputation; a call on this view equals none of the forward pass. Outside tracing: x."""
    if not torch.compiler.is_compiling() and type(x) in (Tensor, torch.nn.Parameter):
        return x
    return x.as_strided(x.size(), x.stride())
