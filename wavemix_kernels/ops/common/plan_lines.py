"""The function of a plan: steps that :mod:`wavemix_kernels.ops.common.recorder` has noted, as lines of Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

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

    @property
    def dense(self) -> int:
        """:attr:`count` where that many elements lie one behind the other, else 0."""
        last = sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        return self.count if last + 1 == self.count else 0


class At(NamedTuple):
    """The address of a tensor."""

    slot: Slot


class Made(NamedTuple):
    """A named tuple."""

    kind: Any
    parts: list[Any]


STREAM = object()
#: A plan gives this back where PyTorch does not as it did.
OTHERWISE = object()


@dataclass
class Step:
    """One call. ``kind``: "allocation", "view", or "call" for all else."""

    kind: str
    function: Any
    args: Any
    kwargs: dict[str, Any]
    out: Any = None
    owner: Any = None  # of what it calls, as long as the plan lives


def _slots(value: Any) -> Iterator[tuple[bool, Slot]]:
    """Whether as a tensor, and the slot."""
    if isinstance(value, Slot):
        yield True, value
    elif isinstance(value, At):
        yield False, value.slot.root
    elif isinstance(value, Made):
        yield from _slots(value.parts)
    elif isinstance(value, dict):
        yield from _slots(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _slots(one)


def _depends(value: Any) -> bool:
    """Whether a call's argument is another one in each call."""
    if isinstance(value, (Slot, At, Made, dict)) or value is STREAM:
        return True
    return isinstance(value, (list, tuple)) and any(map(_depends, value))


def allocator(slot: Slot) -> Callable[..., Tensor]:
    """``(size, stride, dtype)`` -> memory where ``slot`` is, the shortest way that this PyTorch has."""
    guards = getattr(torch._C, "_dynamo", None)
    name = "_empty_strided_cuda" if slot.on_gpu else "_empty_strided_cpu"
    shortest = getattr(getattr(guards, "guards", None), name, None)
    if shortest is not None:
        return shortest
    device = slot.device
    return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device)


def _viewer() -> Callable[..., Tensor]:
    """``(tensor, size, stride, elements further on)`` -> a view of its memory, the shortest way that this PyTorch has.
    Plans run without autograd."""
    guards = getattr(torch._C, "_dynamo", None)
    shortest = getattr(getattr(guards, "guards", None), "_reinterpret_tensor", None)
    if shortest is not None:
        return shortest

    def view(base: Tensor, size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Tensor:
        return base.as_strided(size, stride, base.storage_offset() + offset)

    return view


_VIEW = _viewer()


class Writer:
    """Makes the function of steps; ``result`` has a :class:`Slot` for each tensor.

    Views are made of the memory itself, whatever chain of operators led to them, where something looks at them as
    tensors. Memory that is looked at through views alone is allocated as the first of them that has all of it.
    """

    def __init__(self, inputs: list[Slot], steps: list[Step], result: Any) -> None:
        self._inputs, self._result = inputs, result
        self._constants: dict[str, Any] = {}
        self._of_result = {slot for _, slot in _slots(result)}
        self._views: dict[Slot, None] = {}  # that are made of their memory, in order
        self._same: dict[Slot, Slot] = {}  # views that are the tensor their memory was allocated as
        self._steps = self._fewest(steps)
        self._lines: list[tuple[str, set[Slot]]] = []  # text and what it reads
        self._written: set[Slot] = set()  # of views and addresses

    def _fewest(self, steps: list[Step]) -> list[Step]:
        """Without views, and without memory that nothing looks at."""
        tensors: set[Slot] = set()  # looked at as tensors
        pointed: set[Slot] = set()  # looked at by address, or through a view
        kept = []

        def want(value: Any) -> None:
            for as_tensor, slot in _slots(value):
                (tensors if as_tensor else pointed).add(slot)

        want(self._result)
        for step in reversed(steps):
            out = {slot for _, slot in _slots(step.out)}
            if step.kind == "view":
                out = {slot for slot in out if slot.root is not slot}  # an argument given back is none
                seen = {slot for slot in out & tensors if not self._is_of_memory(slot)}
                for slot in sorted(out & tensors - seen, key=lambda slot: slot.number):
                    self._views[slot] = None
                    pointed.add(slot.root)
                if not seen:
                    continue
            if step.kind == "allocation":
                if out & (tensors | pointed):
                    self._lay_out(step.out, tensors)
                    kept.append(step)
                continue
            want((step.args, step.kwargs))
            kept.append(step)
        return kept[::-1]

    def _is_of_memory(self, view: Slot) -> bool:
        """Whether a view can be made of its memory. A result that is a view of an argument stays one to PyTorch."""
        root = view.root
        if view.dtype != root.dtype or view.offset % view.dtype.itemsize:
            return False
        return root not in self._inputs or view not in self._of_result

    def _lay_out(self, memory: Slot, tensors: set[Slot]) -> None:
        if memory in tensors:
            return
        views = (view for view in self._views if view.root is memory)
        whole = [view for view in views if view.offset == 0 and view.dense == memory.count]
        if whole:
            first = min(whole, key=lambda view: view.number)
            memory.size, memory.stride = first.size, first.stride
            del self._views[first]
            self._same[first] = memory

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
            # Tensors are freed after their last use, as in the function.
            done = [f"t{slot.number}" for slot in reads if last[slot] == i and slot not in self._inputs]
            if done and i + 1 < len(self._lines):
                lines.append(f" del {', '.join(done)}")
        scope = {**self._constants, "OTHERWISE": OTHERWISE}
        exec(compile("\n".join(lines), "<plan>", "exec"), scope)
        made: Callable[..., Any] = scope["plan"]
        return made

    def _write(self, step: Step) -> None:
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
        written = {self._same.get(slot, slot) for _, slot in _slots(step.out)}
        self._lines.append((f"{target}{self._constant(function)}({', '.join(words)})", reads | written))
        if "convolution" in str(step.function):
            # The library chooses the order of its results, by settings that a key does not hold.
            for slot in written:
                self._lines.append((f"if t{slot.number}.stride() != {slot.stride!r}: return OTHERWISE", {slot}))

    def _target(self, out: Any) -> str:
        """Nothing for what is written to and known."""
        known = self._same.keys() | self._views.keys()
        if isinstance(out, Slot):
            return "" if out in known else f"t{out.number} = "
        if isinstance(out, list) and out:
            return ", ".join("_" if one is None or one in known else f"t{one.number}" for one in out) + ", = "
        return ""

    def _text(self, value: Any, reads: set[Slot]) -> str:
        if isinstance(value, Slot):
            slot = self._same.get(value, value)
            if slot in self._views and slot not in self._written:
                self._written.add(slot)
                root, further = slot.root, slot.offset // slot.dtype.itemsize
                made = f"{self._constant(_VIEW)}(t{root.number}, {slot.size!r}, {slot.stride!r}, {further})"
                self._lines.append((f"t{slot.number} = {made}", {slot, root}))
            reads.add(slot)
            return f"t{slot.number}"
        if isinstance(value, At):
            root = value.slot.root
            reads.add(root)
            if root not in self._written:
                self._written.add(root)
                self._lines.append((f"p{root.number} = t{root.number}.data_ptr()", {root}))
            return f"p{root.number} + {value.slot.offset}" if value.slot.offset else f"p{root.number}"
        if value is STREAM:
            return "stream"
        if isinstance(value, Made):
            return f"{self._constant(value.kind)}({', '.join(self._text(one, reads) for one in value.parts)})"
        if type(value) is list:
            return f"[{', '.join(self._text(one, reads) for one in value)}]"
        if type(value) is tuple:
            if value and not _depends(value):
                return self._constant(value)
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


def _shortest(step: Step) -> tuple[Any, Any, dict[str, Any]]:
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
