"""Makes an operator of the library differentiable: under eager autograd, torch.compile, export and torch.func, forwards
too.

``torch.library.register_autograd`` does the same in twice the time (43 against 20 us a call, which small
launches feel) and refuses torch.func.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

from wavemix_kernels.ops.common import plan
from wavemix_kernels.ops.common.once import once_differentiable
from wavemix_kernels.ops.common.transforms import in_transform, standard_wanted

Setup = Callable[[Any, tuple[Any, ...], Any], None]
Backward = Callable[..., Sequence[Any]]


_KEYS = ("AutogradFunctionality", "ADInplaceOrView", "AutogradOther", "AutogradCPU", "AutogradCUDA")


@contextmanager
def recorded() -> Iterator[None]:
    """Autograd records inside an operator's implementation, also where a dispatch mode (FlopCounterMode, selective
    checkpointing) called it, below autograd."""
    core: Any = torch._C
    excluded = core._dispatch_tls_local_exclude_set()
    for key in _KEYS:
        excluded = excluded.remove(getattr(core.DispatchKey, key))
    with core._ForceDispatchKeyGuard(core._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


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


class _Call:
    """The arguments of a call without its tensors: one leaf to torch.func, which looks into lists."""

    def __init__(self, flat: Sequence[Any], lengths: list[int]) -> None:
        self.lengths = lengths
        self.is_tensor = [isinstance(a, Tensor) for a in flat]
        self.shapes = [tuple(a.shape) for a in flat if isinstance(a, Tensor)]
        self.rest = [None if isinstance(a, Tensor) else a for a in flat]

    def arguments(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        given = iter(tensors)
        return _unflatten(
            [next(given) if of_tensor else a for of_tensor, a in zip(self.is_tensor, self.rest, strict=True)],
            self.lengths,
        )


def _as_outputs(out: Any) -> Any:
    return tuple(out) if isinstance(out, list) else out


def differentiable(
    library: torch.library.Library,
    name: str,
    setup: Setup,
    backward: Backward,
    *,
    standard: Callable[..., Any],
    linear: bool = False,
    once: bool = False,
) -> Callable[..., Any]:
    """Registers the gradient of ``library``'s operator ``name`` and returns the function to call it by.

    Args:
        setup: ``(ctx, inputs, output)``, stores what ``backward`` needs (as ``autograd.Function.setup_context``).
        backward: ``(ctx, *output gradients)`` -> one gradient per input, a list for a list of tensors. Built from
            differentiable operations, it makes every higher derivative work.
        standard: the same function of the same arguments by standard operators. It runs where
            :func:`~wavemix_kernels.ops.common.transforms.standard_wanted` has a reason.
        linear: in all its tensors together. Then its tangent is itself of the tangents, and with a rule for vmap too
            (``torch.library.register_vmap``) the operator serves the transforms of torch.func; only a transform inside
            of a compiled function takes ``standard``.
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

    def tangents_of(made: _Call, given: Sequence[Tensor | None]) -> Any:
        """Tangents of a linear operator's outputs; an input without a tangent does not change."""
        like = next(t for t in given if t is not None)
        filled = [like.new_zeros(s) if t is None else t for t, s in zip(given, made.shapes, strict=True)]
        return _as_outputs(call(*made.arguments(filled)))

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: FunctionCtx, keyset: Any, lengths: list[int], *flat: Any) -> Any:
            inputs = _unflatten(flat, lengths)
            out = below(keyset, inputs)
            setup(ctx, inputs, out)
            ctx.lengths = lengths  # type: ignore[attr-defined]
            if forward_ad._current_level >= 0:
                ctx.call = _Call(flat, lengths)  # type: ignore[attr-defined]
            return _as_outputs(out)

        @staticmethod
        def jvp(ctx: Any, _keyset: None, _lengths: None, *tangents: Tensor | None) -> Any:
            given = (t for t, of_tensor in zip(tangents, ctx.call.is_tensor, strict=True) if of_tensor)
            return tangents_of(ctx.call, list(given))

        backward = staticmethod(flat_backward)

    class Functional(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(made: _Call, *tensors: Tensor) -> Any:
            return _as_outputs(op(*made.arguments(tensors)))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.call, *tensors = inputs
            ctx.lengths = ctx.call.lengths
            setup(ctx, ctx.call.arguments(tensors), output)

        @staticmethod
        def jvp(ctx: Any, _call: None, *tangents: Tensor | None) -> Any:
            return tangents_of(ctx.call, tangents)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            _, _, *flat = flat_backward(ctx, *grads)
            return (None, *(g for g, of_tensor in zip(flat, ctx.call.is_tensor, strict=True) if of_tensor))

    Eager.__name__ = Eager.__qualname__ = Functional.__name__ = Functional.__qualname__ = name

    def autograd_kernel(keyset: Any, *args: Any) -> Any:
        flat, lengths = _flatten(args)
        forwards = forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()
        if forwards and not linear:
            return standard(*args)
        if forwards or (torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in flat)):
            out = Eager.apply(keyset, lengths, *flat)
            return list(out) if isinstance(out, tuple) else out
        return below(keyset, args)

    library.impl(name, autograd_kernel, "Autograd", with_keyset=True)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args) if standard_wanted() is None else standard(*args)
        if plan.unseen(args):
            return autograd_kernel(None, *args)
        if not linear and standard_wanted() is not None:
            return standard(*args)
        if in_transform():  # it wants an autograd.Function of its own kind around the operator
            flat, lengths = _flatten(args)
            out = Functional.apply(_Call(flat, lengths), *(a for a in flat if isinstance(a, Tensor)))
            return list(out) if isinstance(out, tuple) else out
        return op(*args)

    return call


def again(x: Tensor) -> Tensor:
    """``x`` as the input of a recomputation. AOTAutograd merges equal calls of forward and backward and keeps their
    results, which voids a recomputation; a call on this view equals none of the forward pass. Outside tracing: x."""
    if not torch.compiler.is_compiling() and type(x) in (Tensor, torch.nn.Parameter):
        return x
    return x.as_strided(x.size(), x.stride())
