"""A model's calls: each operator with arguments like those that it got, and the choices that fell inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from wavemix_kernels.ops import tuned

_SEED = 0
#: Integers that say something, such as the seed of a dropout, are kept; none is larger.
_MOST_KEPT = 1024


class Choice(NamedTuple):
    """Candidates with the rules' own among them: names of backends or forms, or tiles (None: the default)."""

    key: tuned.Key
    default: Any
    candidates: tuple[Any, ...]


@dataclass(frozen=True)
class Like:
    """A tensor to be made again, without keeping it: of its shape, strides and dtype, and of values of its size."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    mean: float
    deviation: float
    positive: bool
    needs_grad: bool

    @classmethod
    def of(cls, t: Tensor) -> Like:
        values = t.detach().double() if t.numel() else t.new_zeros(1, dtype=torch.float64)
        mean, deviation = values.mean().item(), values.std(correction=0).item()
        # A constant of an example varies in training, and gradients of a constant cancel.
        deviation = max(deviation, abs(mean) / 4) or 1.0
        positive = bool((values > 0).all())
        return cls(tuple(t.shape), t.stride(), t.dtype, t.device, mean, deviation, positive, t.requires_grad)

    def make(self, generator: torch.Generator) -> Tensor:
        out = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
        values = torch.randn(self.shape, generator=generator, dtype=torch.float32) * self.deviation + self.mean
        if self.positive:
            values = values.abs() + 1e-3 * abs(self.mean)
        return out.copy_(values).requires_grad_(self.needs_grad)


@dataclass
class Unit:
    """A call that can be made again: of an operator, or of a composite with its backward pass."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: torch.device
    grad: bool  # whether gradients are made too, which an operator leaves to others
    choices: dict[tuned.Key, Choice] = field(default_factory=dict)

    def arguments(self) -> Any:
        """Tensors with values of their own, the same each time."""
        generator = torch.Generator().manual_seed(_SEED)
        return tree_map(lambda v: v.make(generator) if isinstance(v, Like) else v, (self.args, self.kwargs))

    def on(self, backend: str, arguments: Any, dtype: torch.dtype | None = None) -> Any:
        """The same arguments for a backend asked for by name; ``dtype``: for all that is floating."""

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point() and dtype is not None:
                return value.detach().to(dtype).requires_grad_(value.requires_grad)
            return dtype if isinstance(value, torch.dtype) and dtype is not None else value

        args, kwargs = tree_map(moved, arguments)
        if "backend" in kwargs:
            return args, {**kwargs, "backend": backend}
        return (*args[:-1], backend), kwargs

    def run(self, arguments: Any, function: Callable[..., Any] | None = None) -> list[Tensor]:
        """All results and, of a composite, gradients."""
        args, kwargs = arguments
        function = function or self.function
        if not self.grad:
            with torch.no_grad():
                return [t for t in tree_leaves(function(*args, **kwargs)) if isinstance(t, Tensor)]
        leaves = [t for t in tree_leaves(arguments) if isinstance(t, Tensor) and t.requires_grad]
        with torch.enable_grad():
            out = [t for t in tree_leaves(function(*args, **kwargs)) if isinstance(t, Tensor)]
        results = [t for t in out if t.requires_grad]
        grads = torch.autograd.grad(results, leaves, [_cotangent(t) for t in results], allow_unused=True)
        return [t.detach() for t in (*out, *grads) if t is not None]

    @property
    def title(self) -> str:
        """``"deconv float32 (8, 64, 16, 16), (64, 64, 4, 4)"``"""
        first, *rest = [v for v in tree_leaves((self.args, self.kwargs)) if isinstance(v, Like)][:2]
        shapes = ", ".join(str(v.shape) for v in (first, *rest))
        return f"{self.name} {str(first.dtype).removeprefix('torch.')} {shapes}"


def _cotangent(result: Tensor) -> Tensor:
    """Neither constant nor drawn, so that float64 gets the same and no state of a generator changes."""
    count = torch.arange(result.numel(), device=result.device, dtype=torch.float32).remainder_(997)
    return torch.sin(count * 1.7).to(result.dtype).reshape(result.shape)


class Recorder:
    """Notes each new call with backend "auto", and which choices it made; see :class:`tuned.Recorder`.

    Attributes:
        gives_way: whether a tile that does not fit the device makes room for the next, or the call fails.
    """

    def __init__(self) -> None:
        self.gives_way = True
        self.units: dict[str, Unit] = {}
        #: Choices outside of every call: what a module decides before it calls one operator or another.
        self.loose: dict[tuned.Key, Choice] = {}
        self._stack: list[Unit | None] = []

    def run(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._stack.append(self._unit(name, function, args, kwargs))
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if not (self.gives_way and tuned.does_not_fit(error)):
                raise
            return tuned.again(name, function, args, error)
        finally:
            self._stack.pop()

    def met(self, key: tuned.Key, default: Any, candidates: Sequence[Any]) -> None:
        found = self.loose
        if self._stack:
            if (unit := self._stack[-1]) is None:
                return
            found = unit.choices
        if len(candidates) > 1:
            found.setdefault(key, Choice(key, default, tuple(candidates)))

    def _unit(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Unit | None:
        """None where the backend was asked for by name, which leaves no choice."""
        if kwargs.get("backend", args[-1] if args else None) != "auto":
            return None
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        # Operators have their arguments by place, and are called below autograd.
        grad = bool(kwargs) and torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        call = f"{name} {grad} {tree_map(_described, (args, kwargs))}"
        if call not in self.units:
            like_args, like_kwargs = tree_map(_kept, (args, kwargs))
            self.units[call] = Unit(name, function, like_args, like_kwargs, tensors[0].device, grad)
        return self.units[call]


def _described(value: Any) -> Any:
    return (tuple(value.shape), value.stride(), value.dtype, value.device) if isinstance(value, Tensor) else value


def _kept(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point() and value.numel() <= _MOST_KEPT:
        return value.detach().clone()
    return Like.of(value)
