"""Plans: what an operator does on a GPU for tensors of one kind, written down once and repeated without its Python.

Checks, probes, tiles, grids and the order of launches follow from shapes, strides, dtypes and numbers alone. The first
call of a kind runs as it is written, and verifies, tunes and compiles what is new; the second is recorded
(:mod:`wavemix_kernels.ops.common.recorder`); from the third on the record runs. It allocates, calls PyTorch's operators
and launches as the function did, and holds no memory. A function is fit for it if it depends on nothing but its
arguments' metadata and on what :func:`_kind` adds; what it returns must be made of its arguments.

Calls on a CPU, calls that somebody watches (a dispatch mode, a tracer, a hook of Triton's, ``tune``) and
``WAVEMIX_KERNELS_PLANS=0`` run the function itself.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter, or_
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from wavemix_kernels import _native, log
from wavemix_kernels.ops.common import precision, triton_launch
from wavemix_kernels.ops.common.once import once_differentiable
from wavemix_kernels.ops.common.plan_lines import OTHERWISE
from wavemix_kernels.ops.common.recorder import Recorder

VARIABLE = "WAVEMIX_KERNELS_PLANS"
#: Plans that are kept; then they are made anew.
MOST = 4096

_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state
_profiled: Any = torch.autograd._profiler_enabled
_forward_mode = torch.autograd.forward_ad
_unwrapped: Any = getattr(getattr(torch._C, "_functorch", None), "unwrap_if_dead", None)


def _on() -> bool:
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE}={value!r}: expected '0' or '1'")
    return value != "0"


class State:
    """
    Attributes:
        on: plans are made, where this PyTorch has GPUs.
        everywhere: for tensors on a CPU too, whose kernels must be Triton's or an emulator's then (for tests).
        paused: somebody has to see every call.
    """

    on: bool = _on() and (torch.version.cuda is not None or torch.version.hip is not None)
    everywhere: bool = False
    paused: int = 0


#: Implementations of this package's operators by name, as they are written.
implementations: dict[str, Callable[..., Any]] = {}
#: The same, as they are called.
operators: dict[str, Callable[..., Any]] = {}
#: Plans by what they are of.
tables: dict[str, _Table] = {}
_RECENT = 4
_ONCE, _REFUSED = object(), object()


class _Words(tuple[Any, ...]):
    """A tuple without tensors."""


#: Values of these types are a part of a key.
_WORDS: set[type] = {type(None), int, str, float, bool, _Words}

_Kind = TypeVar("_Kind", bound=type)


def words(kind: _Kind) -> _Kind:
    """Decorates a named tuple that never holds a tensor: arguments of that kind are not looked into."""
    _WORDS.add(kind)
    return kind


class _Table:
    """The plans of one function.

    Attributes:
        plans: by all that they depend on (:func:`_key`).
        recent: the last ones by the arguments that are no tensors, each behind a check of its tensors in C++.
        sorters: what tells tensors from the rest, by the arguments' types; None where it has to look into some.
    """

    def __init__(self) -> None:
        self.plans: dict[Any, Any] = {}
        self.recent: dict[Any, list[tuple[Callable[..., bool], Any]]] = {}
        self.sorters: dict[tuple[type, ...], Any] = {}

    def clear(self) -> None:
        self.plans.clear()
        self.recent.clear()

    def sorted(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Sequence[Tensor]] | None:
        """The arguments that a plan depends on beside its tensors, and these; None where there can be no plan."""
        types = (*map(type, args),)
        sorter = self.sorters.get(types, self)
        if sorter is self:
            sorter = self.sorters[types] = _sorter(types)
        if sorter is not None:
            tensors, rest = sorter
            return (types, rest(args)), tensors(args)
        parts: list[Any] = []
        found: list[Tensor] = []
        return (tuple(parts), found) if _collect(args, parts, found) and found else None


def _sorter(types: tuple[type, ...]) -> tuple[Callable[[Any], Any], Callable[[Any], Any]] | None:
    tensors = [i for i, kind in enumerate(types) if kind is Tensor or kind is Parameter]
    rest = [i for i in range(len(types)) if i not in tensors]
    if not tensors or any(issubclass(types[i], (Tensor, tuple, list)) and types[i] not in _WORDS for i in rest):
        return None
    return _picker(tensors), _picker(rest)


def _picker(places: list[int]) -> Callable[[Any], tuple[Any, ...]]:
    if len(places) > 1:
        return itemgetter(*places)
    return lambda args: tuple(args[i] for i in places)


def planned(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which from its third call of a kind on goes by a plan.

    Args:
        function: of tensors, None, numbers and words, also in lists and tuples. It runs without autograd.
    """
    table = tables.setdefault(name, _Table())

    def run(*args: Any) -> Any:
        if not State.on or torch.compiler.is_compiling() or _watched():
            return function(*args)
        sorted_ = table.sorted(args)
        if sorted_ is None or (kind := _kind(*sorted_)) is None:
            return function(*args)
        tensors = sorted_[1]
        recent = table.recent.get(kind, ())
        for fits, known in recent:
            if fits(*tensors):
                plan = known
                break
        else:
            key = _key(kind, tensors)
            plan = table.plans.get(key)
            if plan is None:
                result = function(*args)
                table.plans[key] = _ONCE
                return result
            if plan is _REFUSED:
                return function(*args)
            if plan is _ONCE:
                result, table.plans[key] = _recorded(name, function, args, tensors)
                return result
            if (check := _check(tensors)) is not None:
                table.recent[kind] = [(check, plan), *recent[: _RECENT - 1]]
        device = tensors[0].device
        if device.type == "cuda" and device.index != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                result = plan(_native.stream(device), *tensors)
        else:
            result = plan(_native.stream(device), *tensors)
        if result is OTHERWISE:
            table.clear()
            return function(*args)
        return result

    return run


def operator(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """:func:`planned`, for the implementation of one of this package's operators: it may be a part of other plans."""
    implementations[name] = function
    operators[name] = planned(name, function)
    return operators[name]


def unseen(args: Any) -> bool:
    """Whether nobody would notice that a call of an operator does not come from PyTorch's dispatcher: its tensors are
    plain ones, and neither a mode, a transform, a tracer nor a profiler is at work."""
    if _modes() or _transforms() or _tracing() is not None or _profiled() or _forward_mode._current_level >= 0:
        return False
    for value in args:
        kind = type(value)
        if kind is Tensor or kind is Parameter or kind is int or kind is str or value is None:
            continue
        if isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and not unseen(value)):
            return False
    return True


class _Context:
    """Takes what a forward pass gives its context, and gives it to the backward pass."""

    def __init__(self, saved: Any = (), needs: tuple[bool, ...] = (), attributes: Any = ()) -> None:
        self.__dict__.update(attributes)
        self.saved_tensors, self.needs_input_grad = saved, needs
        self.marked: tuple[Tensor, ...] = ()
        self.materialize = True

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.marked = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize = value

    def attributes(self) -> tuple[tuple[str, Any], ...]:
        own = ("saved_tensors", "needs_input_grad", "marked", "materialize")
        return tuple((name, value) for name, value in vars(self).items() if name not in own)


def function(of: Any) -> Any:
    """Decorates an autograd.Function of this package's operators, differentiable once: its passes go by plans. What it
    keeps beside its saved tensors is free of tensors."""
    forward, backward = of.forward, inspect.unwrap(of.backward)

    def forward_alone(*args: Any) -> Any:
        context = _Context()
        made = forward(context, *args)
        return made, context.saved_tensors, context.marked, context.materialize, context.attributes()

    def backward_alone(context: Any, *tensors: Any) -> Any:
        count, needs, attributes = context
        return backward(_Context(tensors[:count], needs, attributes), *tensors[count:])

    planned_forward = planned(f"{of.__name__}.forward", forward_alone)
    planned_backward = planned(f"{of.__name__}.backward", backward_alone)

    def forward_by_plan(ctx: Any, *args: Any) -> Any:
        if torch.compiler.is_compiling() or not State.on:
            return forward(ctx, *args)
        made, saved, marked, materialize, attributes = planned_forward(*args)
        ctx.attributes = _Words(attributes)
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(*marked)
        ctx.set_materialize_grads(materialize)
        return made

    def backward_by_plan(ctx: Any, *grads: Any) -> Any:
        if torch.compiler.is_compiling() or not hasattr(ctx, "attributes"):
            return backward(ctx, *grads)
        saved = ctx.saved_tensors
        return planned_backward(_Words((len(saved), ctx.needs_input_grad, ctx.attributes)), *saved, *grads)

    def apply(cls: Any, *args: Any) -> Any:
        """autograd.Function's own, which looks at all arguments for wrappers of torch.func's transforms that have
        ended; parameters are none."""
        if _unwrapped is None or torch.compiler.is_compiling() or _transforms():
            return super(of, cls).apply(*args)
        args = (*[_unwrapped(a) if type(a) is Tensor else a for a in args],)
        return super(torch.autograd.Function, cls).apply(*args)

    of.apply = classmethod(apply)
    of.forward = staticmethod(forward_by_plan)
    of.backward = staticmethod(once_differentiable(backward_by_plan))
    return of


def _watched() -> bool:
    if State.paused or triton_launch.observers or _modes() or _transforms() or _tracing() is not None:
        return True
    if _forward_mode._current_level >= 0:
        return True
    if (triton := sys.modules.get("triton.knobs")) is None:
        return False
    return _hooked(triton.runtime.launch_enter_hook) or _hooked(triton.runtime.launch_exit_hook)


def _hooked(hook: Any) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))


def _kind(rest: tuple[Any, ...], tensors: Sequence[Tensor]) -> tuple[Any, ...] | None:
    """``rest``, and what else a plan depends on beside its tensors; None where there can be no plan."""
    first = tensors[0]
    if not (first.is_cuda or State.everywhere):
        return None
    kind = "cuda" if first.is_cuda else "cpu"
    if torch.is_autocast_enabled(kind):
        rest = (*rest, torch.get_autocast_dtype(kind))
    return (*rest, precision.tf32()) if first.dtype is torch.float32 else rest


def _collect(values: Any, parts: list[Any], tensors: list[Tensor]) -> bool:
    part, tensor = parts.append, tensors.append
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            tensor(value)
            part(Tensor)
        elif kind in _WORDS:
            part(value)
        elif isinstance(value, (tuple, list)):
            part((kind, len(value)))
            if not _collect(value, parts, tensors):
                return False
        elif isinstance(value, Tensor):
            return False
        else:
            part(value)
    return True


def _key(kind: tuple[Any, ...], tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """All that a plan depends on. Kernels use wider accesses for addresses that are multiples of 16."""
    of_tensors = ((t.dtype, t.shape, t.stride(), t.get_device(), t.data_ptr() & 15) for t in tensors)
    return (*kind, *(part for parts in of_tensors for part in parts))


def _check(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """Whether tensors are as these by :func:`_key`, asked in a fraction of its time; None where this PyTorch has no
    such question."""
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    kind = getattr(guards, "TensorGuards", None)
    if kind is None:
        return None
    try:
        alike = kind(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    except TypeError:  # another PyTorch's takes other arguments
        return None
    address = Tensor.data_ptr
    places = [address(t) & 15 for t in tensors]

    def fits(*others: Tensor) -> bool:
        return alike(*others) and not functools.reduce(or_, map(address, others)) & 15

    def fits_elsewhere(*others: Tensor) -> bool:
        return alike(*others) and [address(t) & 15 for t in others] == places

    return fits_elsewhere if any(places) else fits


def _recorded(name: str, function: Callable[..., Any], args: Any, tensors: Sequence[Tensor]) -> tuple[Any, Any]:
    """The result of a call, and the plan that it made."""
    # Objects of their own: a tensor given twice is two tensors next time.
    inputs = [t.detach() for t in tensors]
    recorder = Recorder(inputs, lambda op: implementations[op._schema.name.split("::")[1]])
    fresh = iter(inputs)
    with recorder:
        result = function(*_replaced(args, fresh))
    plan: Any = _REFUSED
    if recorder.refused is None:
        if sum(len(table.plans) for table in tables.values()) > MOST:
            forget()
        plan = recorder.compiled(result)
    else:
        log.once((name, recorder.refused), lambda: f"{name}: runs without a plan, since {recorder.refused}")
    given = {id(mine): theirs for mine, theirs in zip(inputs, tensors, strict=True)}
    return _given_back(result, given), plan


def _replaced(value: Any, fresh: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(fresh)
    if isinstance(value, (tuple, list)):
        return _like(value, [_replaced(one, fresh) for one in value])
    return value


def _given_back(value: Any, given: dict[int, Tensor]) -> Any:
    """A result with the caller's own tensors, where the function returns an argument."""
    if isinstance(value, Tensor):
        return given.get(id(value), value)
    if isinstance(value, (tuple, list)):
        return _like(value, [_given_back(one, given) for one in value])
    return value


def _like(value: Any, parts: list[Any]) -> Any:
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def forget() -> None:
    """Drops all plans, since something that they depend on has changed."""
    for table in tables.values():
        table.clear()


@contextmanager
def paused() -> Iterator[None]:
    """Inside, every call runs as it is written."""
    State.paused += 1
    try:
        yield
    finally:
        State.paused -= 1


@contextmanager
def everywhere() -> Iterator[None]:
    """Inside, calls on a CPU go by plans too (for tests, on backends "triton" and "cuda")."""
    before, State.on, State.everywhere = (State.on, State.everywhere), True, True
    try:
        yield
    finally:
        State.on, State.everywhere = before
        forget()
