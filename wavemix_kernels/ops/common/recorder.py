"""Writes down what a function does with tensors, as a Python function of straight lines.

Inside ``with Recorder(tensors) as recorder`` the operators of PyTorch, the launches of Triton's kernels
(:mod:`wavemix_kernels.ops.common.triton_launch`) and the CUDA kernels' (:func:`wavemix_kernels._native.launch`) are
noted as they run. :meth:`Recorder.compiled` makes a function of them. Kernels get addresses there, so views that nothing
else looks at are left out, and Triton's compiled kernels are called past its binder.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wavemix_kernels import _native

_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
#: Operators whose function in ``torch`` takes the same arguments, in two thirds of the time.
_IN_TORCH = {
    *("add", "addmm", "bmm", "cat", "clone", "convolution", "div", "mm", "mul", "neg", "permute", "randint", "rsqrt"),
    *("softmax", "square", "stack", "sub", "sum", "sigmoid", "t", "unsqueeze"),
}


@dataclass(eq=False)
class Slot:
    """A tensor. ``root`` owns its memory; the tensor begins ``offset`` bytes further on."""

    number: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    on_gpu: bool
    start: int
    root: Slot = field(init=False)

    def __post_init__(self) -> None:
        self.root = self

    @property
    def offset(self) -> int:
        return self.start - self.root.start

    @property
    def count(self) -> int:
        return torch.Size(self.size).numel()


class Address(int):
    """An address that knows its tensor."""

    slot: Slot | None


class _At(NamedTuple):
    slot: Slot


class _Made(NamedTuple):
    """A named tuple."""

    kind: Any
    parts: list[Any]


_STREAM = object()
#: What a plan gives back where PyTorch does not as it did.
OTHERWISE = object()


@dataclass
class _Step:
    kind: str  # "allocation", "view", "call", or "launch" of a kernel compiled by Triton
    function: Any
    args: Any
    kwargs: dict[str, Any]
    out: Any = None
    owner: Any = None  # of what it calls, as long as the plan lives


class Recorder(TorchDispatchMode):
    """
    Args:
        tensors: inputs of the function, no two of them the same object.
        implementation: the function of one of this package's operators, whose parts are noted instead of it.

    Attributes:
        refused: why what was seen cannot be repeated, or None.
    """

    def __init__(self, tensors: Sequence[Tensor], implementation: Callable[[Any], Callable[..., Any]]) -> None:
        super().__init__()
        self.refused: str | None = None
        self._implementation = implementation
        self._steps: list[_Step] = []
        # By the address of the object, as long as it lives: what the function drops is to be freed.
        self._alive: dict[int, tuple[Slot, Any]] = {}
        self._count = 0
        self._inputs = [self._add(t) for t in tensors]

    def __enter__(self) -> Recorder:
        _native.recorders[threading.get_ident()] = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        del _native.recorders[threading.get_ident()]

    # --- What happens ---------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "wavemix_kernels":
            with _Again(self):
                return self._implementation(func)(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if any(isinstance(t, Tensor) and t.requires_grad for t in args):
            self.refuse("it differentiates")
        step = _Step("call", func, self._symbol(args), self._symbol(kwargs))
        result = func(*args, **kwargs)
        if func.namespace != "aten":
            self.refuse(f"{func} is no operator of PyTorch")
        view_of = None
        if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            step.kind, view_of = "view", next(t for t in args if isinstance(t, Tensor))
        elif name in _ALLOCATIONS:
            step.kind = "allocation"
        step.out = self._made(result, view_of, func)
        self._steps.append(step)
        return result

    def _made(self, result: Any, view_of: Tensor | None, func: Any) -> Any:
        if isinstance(result, Tensor):
            known = self._alive.get(id(result))
            if known is not None:  # an operator that writes to its argument
                return known[0]
            slot = self._add(result)
            if view_of is not None:
                slot.root = self._slot(view_of).root
            return slot
        if isinstance(result, (tuple, list)):
            return [self._made(one, view_of, func) for one in result]
        if result is not None:
            self.refuse(f"{func} gives a number, which depends on values")
        return None

    def address(self, tensor: Tensor) -> Address:
        made = Address(tensor.data_ptr())
        made.slot = self._slot(tensor)
        return made

    def called(self, function: Callable[..., Any], args: tuple[Any, ...], more: dict[str, Any]) -> None:
        """``function(*args, stream, **more)`` was, with :class:`Address` for tensors."""
        self._steps.append(_Step("call", function, (*self._symbol(args), _STREAM), self._symbol(more)))

    def launched(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """``kernel[grid](*args, **constants)`` was, in Triton's interpreter."""
        call = (kernel, grid, self._symbol(args), constants)
        self._steps.append(_Step("call", lambda k, g, a, c: k[g](*a, **c), call, {}))

    def launched_compiled(self, kernel: Any, again: Callable[[], Any]) -> None:
        """A kernel that Triton has compiled was launched; ``again`` does it once more."""
        with _spying:
            launcher, args = _launcher(kernel, again)
        if launcher is None:
            import triton

            self.refuse(f"Triton {triton.__version__} launches kernels in a way that plans do not know")
            return
        self._steps.append(_Step("call", launcher, (*args[:3], _STREAM, *self._pointers(args[4:])), {}, owner=kernel))

    def _pointers(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return _At(self._slot(value))
        if type(value) in (tuple, list):
            return tuple(self._pointers(one) for one in value)
        return value

    # --- Symbols --------------------------------------------------------------------------------------------

    def _add(self, tensor: Tensor) -> Slot:
        shape, on_gpu = (tuple(tensor.shape), tensor.stride()), tensor.get_device() >= 0
        slot = Slot(self._count, *shape, tensor.dtype, tensor.device, on_gpu, tensor.data_ptr())
        self._count += 1
        number, alive = id(tensor), self._alive
        alive[number] = slot, weakref.ref(tensor, lambda _: alive.pop(number, None))
        return slot

    def _slot(self, tensor: Tensor) -> Slot:
        found = self._alive.get(id(tensor))
        if found is None:
            self.refuse(f"a tensor {tuple(tensor.shape)} comes from outside")
            return self._add(tensor)
        return found[0]

    def _symbol(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._slot(value)
        if isinstance(value, Address):
            return _At(value.slot) if value.slot is not None else 0
        if isinstance(value, dict):
            return {name: self._symbol(one) for name, one in value.items()}
        if isinstance(value, list):
            return [self._symbol(one) for one in value]
        if isinstance(value, tuple):
            parts = [self._symbol(one) for one in value]
            return _Made(type(value), parts) if hasattr(value, "_fields") else tuple(parts)
        return value

    def refuse(self, reason: str) -> None:
        self.refused = self.refused or reason

    def compiled(self, result: Any) -> Callable[..., Any]:
        """A function ``(stream, *tensors)`` that does the same and returns the like of ``result``."""
        return _Writer(self._inputs, self._steps, self._symbol(result)).function()


class _Again:
    """The mode on again, inside its own handler."""

    def __init__(self, mode: Recorder) -> None:
        self._mode = mode

    def __enter__(self) -> None:
        TorchDispatchMode.__enter__(self._mode)

    def __exit__(self, *error: Any) -> None:
        TorchDispatchMode.__exit__(self._mode, *error)


_spying = threading.Lock()


def _launcher(kernel: Any, again: Callable[[], Any]) -> tuple[Callable[..., Any] | None, tuple[Any, ...]]:
    """What launches a kernel that Triton has compiled, as deep in Triton as it can be called, and its arguments: the
    grid, the stream, and others. None where Triton is made otherwise. Nothing is launched."""
    caught = _caught(kernel, "_run" if "_run" in vars(kernel) else "run", again)
    # Grid, stream, function, packed metadata, metadata for hooks, two hooks, arguments.
    if caught is None or len(caught) < 9 or caught[4] != kernel.function or not _is_launch(caught):
        return None, ()
    args = (*caught[:6], None, None, None, *caught[9:])
    launcher = kernel.run
    # Memory for the kernel itself is allocated on the way.
    if getattr(launcher, "global_scratch_size", 1) or getattr(launcher, "profile_scratch_size", 0):
        return launcher, args
    inner = _caught(launcher, "launch", lambda: launcher(*args))
    return (launcher.launch, inner) if inner is not None and inner[:5] == args[:5] else (launcher, args)


def _is_launch(args: tuple[Any, ...]) -> bool:
    return all(type(number) is int for number in args[:4])


def _caught(holder: Any, name: str, call: Callable[[], Any]) -> tuple[Any, ...] | None:
    """The arguments that ``call`` gives to a function that ``holder`` has, without a call of it; None for none."""
    real = vars(holder).get(name)
    if not callable(real):
        return None
    thread, caught = threading.get_ident(), list[tuple[Any, ...]]()

    def spy(*args: Any) -> None:
        if threading.get_ident() == thread:
            caught.append(args)
        else:
            real(*args)

    setattr(holder, name, spy)
    try:
        call()
    finally:
        setattr(holder, name, real)
    return caught[0] if len(caught) == 1 else None


# --- The function ---------------------------------------------------------------------------------------------


def _slots(value: Any) -> Iterator[tuple[bool, Slot]]:
    """Whether as a tensor, and the slot."""
    if isinstance(value, Slot):
        yield True, value
    elif isinstance(value, _At):
        yield False, value.slot.root
    elif isinstance(value, _Made):
        yield from _slots(value.parts)
    elif isinstance(value, dict):
        yield from _slots(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _slots(one)


def allocator(slot: Slot) -> Callable[..., Tensor]:
    """``(size, stride, dtype)`` -> memory where ``slot`` is, the shortest way that this PyTorch has."""
    guards = getattr(torch._C, "_dynamo", None)
    name = "_empty_strided_cuda" if slot.on_gpu else "_empty_strided_cpu"
    shortest = getattr(getattr(guards, "guards", None), name, None)
    if shortest is not None:
        return shortest
    device = slot.device
    return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device)


class _Writer:
    def __init__(self, inputs: list[Slot], steps: list[_Step], result: Any) -> None:
        self._inputs, self._result = inputs, result
        self._constants: dict[str, Any] = {}
        self._needed: set[Slot] = set()  # as tensors; the others' addresses alone
        self._steps = self._fewest(steps)
        self._lines: list[tuple[str, set[Slot]]] = []  # text and what it reads
        self._pointers: set[Slot] = set()

    def _fewest(self, steps: list[_Step]) -> list[_Step]:
        """Without views and memory that nothing looks at."""
        pointed: set[Slot] = set()
        kept = []

        def want(value: Any) -> None:
            for as_tensor, slot in _slots(value):
                (self._needed if as_tensor else pointed).add(slot)

        want(self._result)
        for step in reversed(steps):
            out = {slot for _, slot in _slots(step.out)}
            if step.kind == "view" and not out & self._needed:
                continue
            if step.kind == "allocation":
                if out & (self._needed | pointed):
                    kept.append(step)
                continue
            want((step.args, step.kwargs))
            kept.append(step)
        return self._laid_out(kept[::-1])

    def _laid_out(self, steps: list[_Step]) -> list[_Step]:
        """Memory with one view of all of it is allocated as that view."""
        readers: dict[Slot, list[_Step | None]] = {}
        for step in steps:
            if step.kind != "allocation":
                for as_tensor, slot in _slots((step.args, step.kwargs)):
                    if as_tensor:
                        readers.setdefault(slot, []).append(step)
        for as_tensor, slot in _slots(self._result):
            if as_tensor:
                readers.setdefault(slot, []).append(None)
        gone = []
        for step in steps:
            if step.kind != "allocation" or len(of := readers.get(step.out, [])) != 1:
                continue
            (view,) = of
            if view is None or view.kind != "view" or not isinstance(view.out, Slot):
                continue
            whole, part = step.out, view.out
            if part.count == whole.count and part.start == whole.start and part.dtype == whole.dtype:
                whole.size, whole.stride = part.size, part.stride
                self._alias(part, whole, steps)
                gone.append(view)
        return [step for step in steps if not any(step is one for one in gone)]

    def _alias(self, part: Slot, whole: Slot, steps: list[_Step]) -> None:
        def changed(value: Any) -> Any:
            if value is part:
                return whole
            if isinstance(value, _Made):
                return _Made(value.kind, changed(value.parts))
            if isinstance(value, dict):
                return {name: changed(one) for name, one in value.items()}
            if type(value) in (list, tuple):
                return type(value)(changed(one) for one in value)
            return value

        for step in steps:
            step.args, step.kwargs, step.out = changed(step.args), changed(step.kwargs), changed(step.out)
        self._result = changed(self._result)

    def function(self) -> Callable[..., Any]:
        for step in self._steps:
            self._write(step)
        reads: set[Slot] = set()
        text = self._text(self._result, reads)
        self._lines.append((f"return {text}", reads))
        lines = [f"def plan(stream, {', '.join(f't{slot.number}' for slot in self._inputs)}):"]
        last = {slot: i for i, (_, reads) in enumerate(self._lines) for slot in reads}
        for i, (text, reads) in enumerate(self._lines):
            lines.append(f" {text}")
            # What is done with is freed at once, as in the function.
            done = [f"t{slot.number}" for slot in reads if last[slot] == i and slot not in self._inputs]
            if done and i + 1 < len(self._lines):
                lines.append(f" del {', '.join(done)}")
        scope = {**self._constants, "OTHERWISE": OTHERWISE}
        exec(compile("\n".join(lines), "<plan>", "exec"), scope)
        made: Callable[..., Any] = scope["plan"]
        return made

    def _write(self, step: _Step) -> None:
        reads: set[Slot] = set()
        if step.kind == "allocation":
            slot: Slot = step.out
            call = f"({slot.size!r}, {slot.stride!r}, {self._constant(slot.dtype)})"
            self._lines.append((f"t{slot.number} = {self._constant(allocator(slot))}{call}", {slot}))
            return
        function, args, kwargs = _shortest(step)
        words = [self._text(one, reads) for one in args]
        words += [f"{name}={self._text(one, reads)}" for name, one in kwargs.items()]
        if step.owner is not None:
            self._constant(step.owner)
        target = self._target(step.out)
        written = {slot for _, slot in _slots(step.out)}
        self._lines.append((f"{target}{self._constant(function)}({', '.join(words)})", reads | written))
        if "convolution" in str(step.function):
            # The library chooses the order of its results, by settings that a key does not hold.
            for slot in written:
                self._lines.append((f"if t{slot.number}.stride() != {slot.stride!r}: return OTHERWISE", {slot}))

    def _target(self, out: Any) -> str:
        if isinstance(out, Slot):
            return f"t{out.number} = "
        if isinstance(out, list) and out:
            return ", ".join("_" if one is None else f"t{one.number}" for one in out) + ", = "
        return ""

    def _text(self, value: Any, reads: set[Slot]) -> str:
        if isinstance(value, Slot):
            reads.add(value)
            return f"t{value.number}"
        if isinstance(value, _At):
            root = value.slot.root
            reads.add(root)
            if root not in self._pointers:
                self._pointers.add(root)
                self._lines.append((f"p{root.number} = t{root.number}.data_ptr()", {root}))
            return f"p{root.number} + {value.slot.offset}" if value.slot.offset else f"p{root.number}"
        if value is _STREAM:
            return "stream"
        if isinstance(value, _Made):
            return f"{self._constant(value.kind)}({', '.join(self._text(one, reads) for one in value.parts)})"
        if type(value) is list:
            return f"[{', '.join(self._text(one, reads) for one in value)}]"
        if type(value) is tuple:
            return f"({''.join(self._text(one, reads) + ', ' for one in value)})"
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        return self._constant(value)

    def _constant(self, value: Any) -> str:
        for name, known in self._constants.items():
            if known is value:
                return name
        name = f"c{len(self._constants)}"
        self._constants[name] = value
        return name


def _shortest(step: _Step) -> tuple[Any, Any, dict[str, Any]]:
    """Function and arguments of an operator as Python calls it fastest."""
    function, args, kwargs = step.function, step.args, step.kwargs
    if not isinstance(function, torch._ops.OpOverload):
        return function, args, kwargs
    name = function._schema.name.split("::")[1]
    if name == "_to_copy" and list(kwargs) == ["dtype"] and kwargs["dtype"] != args[0].dtype:
        return torch.Tensor.to, (*args, kwargs["dtype"]), {}
    if name in _IN_TORCH and function._overloadname != "out":
        return getattr(torch, name), args, kwargs
    if name == "copy_":
        return torch.Tensor.copy_, args, kwargs
    return function._op, args, kwargs
