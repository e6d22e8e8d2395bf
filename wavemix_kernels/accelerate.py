"""``accelerate``: puts the fused modules in place of the ones a model already holds."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from wavemix_kernels import lookalikes

__all__ = ["Left", "Replaced", "Report", "accelerate"]


@dataclass(frozen=True)
class Replaced:
    """A module that :func:`accelerate` has turned into one of ours."""

    path: str
    was: str
    now: str


@dataclass(frozen=True)
class Left:
    """A module that looks like one that :func:`accelerate` replaces, left as it was, and why."""

    path: str
    what: str
    reason: str


@dataclass(frozen=True)
class Report:
    """The report of :func:`accelerate` on ``model``. Printing it lists every module, a line each."""

    model: nn.Module
    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        lines = [f"accelerate: {len(self.replaced)} replaced, {len(self.left)} left"]
        lines += [f"  {r.path or '(the model itself)'}: {r.was} -> {r.now}" for r in self.replaced]
        lines += [f"  {entry.path or '(the model itself)'}: {entry.what} left: {entry.reason}" for entry in self.left]
        return "\n".join(lines)


def accelerate(model: nn.Module, *, verbose: bool = False) -> Report:
    """Turns the modules of ``model`` that this package has a faster form of into that form, in place.

    Replaced are Waveblocks of WaveMix, WaveMixSR-V2 and WaveMix V3, an ``nn.Sequential`` of 4x4 transposed convolutions
    (BatchNorm and 1x1 convolutions may be among them), Wave-MLP's ``PATM``, ``Mlp`` and ``WaveBlock``,
    ``pytorch_wavelets``' ``DWTForward`` and ``DWTInverse``, layers that compute Haar's bands in one of the ways that
    :data:`wavemix_kernels.ops.haar.CONVENTIONS` lists or return and take some of them otherwise
    (:mod:`wavemix_kernels.haar_derived`), and this package's own reference modules. They are found by
    their parts, whatever their classes are called and wherever they come from, and judged by their layers and by what
    a copy of them computes beside ours. WTConv, where its filters are Haar's and frozen, gets other wavelet
    functions (:mod:`wavemix_kernels.wtconv`) and a class derived from its own, whose forward is one operator for
    float32 on a GPU (:mod:`wavemix_kernels.wtconv_layer`). A Haar layer gets a class derived from its own, whose
    forward goes on to serve every call that was not compared: in other dtypes, at sizes and under settings where the
    two may differ, and on a GPU those whose filters were made in inference mode (:mod:`wavemix_kernels.haar_layers`).
    The model may lie on any device; a layer is compared by a copy on the CPU.

    It looks at the model's submodules, modules in its plain attributes, lists, tuples and dicts, and those in global
    variables that its methods name, which other models may share. What a forward makes anew, holds in other objects or
    in closures, or writes in plain operations is not found.

    Each stays the object it was and only changes class, as ``torch.nn.utils.parametrize`` and FSDP2 do: parameters,
    buffers, submodules, hooks and their handles, training mode and whoever holds a reference stay valid, so
    optimizers, DistributedDataParallel and state dicts go on as before. Even the model itself may be such a module.
    A second call changes nothing. Call it before ``torch.compile``, ``torch.jit`` or ``torch.export`` see the model.

    Args:
        model: any module.
        verbose: print the report.

    Returns:
        The report; ``report.model`` is ``model``.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    replaced: list[Replaced] = []
    left: list[Left] = []
    seen: set[int] = set()
    for held in (_own, _global):  # what is replaced names no global variables any more
        for path, module in list(held(model, seen)):
            replace = lookalikes.replacement(module)
            if replace is None:
                continue
            was = f"{type(module).__module__}.{type(module).__qualname__}"
            try:
                replaced.append(Replaced(path, was, replace(module)))
            except lookalikes.CannotReplace as reason:
                left.append(Left(path, was, str(reason)))
    report = Report(model, tuple(replaced), tuple(left))
    if verbose:
        print(report)
    return report


_MANAGED = nn.Module().__dict__.keys()


def _own(model: nn.Module, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """The submodules of ``model``, and those in plain attributes, lists, tuples and dicts of theirs, by their paths."""
    waiting = [("", model)]
    while waiting:
        path, root = waiting.pop(0)
        for here, module in _not_seen(path, root, seen):
            yield here, module
            for attribute, value in module.__dict__.items():
                if attribute not in _MANAGED:
                    waiting += _in(value, f"{here}.{attribute}" if here else attribute)


def _global(model: nn.Module, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """The modules in global variables that the methods of ``model``'s modules name, by the variables' names."""
    kinds = dict.fromkeys(kind for _, module in _own(model, set()) for kind in type(module).__mro__)
    for kind in kinds:
        if kind.__module__.split(".")[0] not in ("torch", "builtins", __package__):
            for path, root in _globals(kind):
                yield from _not_seen(path, root, seen)


def _not_seen(path: str, root: nn.Module, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    for name, module in root.named_modules():
        if id(module) not in seen:
            seen.add(id(module))
            yield ".".join(part for part in (path, name) if part), module


def _in(value: object, path: str) -> list[tuple[str, nn.Module]]:
    """The modules in a plain attribute."""
    if isinstance(value, nn.Module):
        return [(path, value)]
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return [(f"{path}[{key!r}]", entry) for key, entry in entries if isinstance(entry, nn.Module)]


def _globals(kind: type) -> Iterator[tuple[str, nn.Module]]:
    """The modules in global variables that the methods of a class name, and the functions beside it which they call."""
    waiting: list[object] = list(vars(kind).values())
    seen: set[object] = set()
    while waiting:
        value = waiting.pop(0)
        function = getattr(value, "__func__", value)
        if not isinstance(function, types.FunctionType) or function in seen:
            continue
        seen.add(function)
        for name in sorted(lookalikes.names_in(function.__code__)):
            found = function.__globals__.get(name)
            yield from _in(found, f"{function.__module__}.{name}")
            if isinstance(found, types.FunctionType) and found.__module__ == function.__module__:
                waiting.append(found)
