"""WTConv's wavelet functions (Finder et al., "Wavelet Convolutions for Large Receptive Fields", ECCV 2024,
arXiv:2407.05848, BGU-CS-VIL/WTConv) on the Haar kernels, for :func:`wavemix_kernels.accelerate`.

A ``WTConv2d`` keeps its frozen filters as ``wt_filter`` and ``iwt_filter``, (4C, 1, 2, 2), and transforms (N, C, H, W)
-> (N, C, 4, H/2, W/2) and back by two grouped convolutions of stride 2. With wavelet 'db1' their bands are ours, order,
signs and scale included. Until November 2024 the two were attributes, ``wt_function(x)`` and ``iwt_function(bands)``;
since then they are functions beside the class, called with the filters. For float32 on a GPU the whole forward is
one operator (:mod:`wavemix_kernels.wtconv_layer`); elsewhere it calls these functions.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from wavemix_kernels import checks, fx, log, wtconv_layer
from wavemix_kernels.ops.haar.bands import haar_bands, haar_from_bands

#: (function, its filters), both of one module.
NAMES = (("wt_function", "wt_filter"), ("iwt_function", "iwt_filter"))
NOW = "its wt_function and iwt_function on the Haar kernels"
_SIGNS = ((1, 1, 1, 1), (1, 1, -1, -1), (1, -1, 1, -1), (1, -1, -1, 1))


def _analyse(x: Tensor) -> Tensor:
    (x,) = checks.autocast(x)
    # A convolution of stride 2 leaves an odd last row or column out.
    return haar_bands(x[..., : x.shape[-2] // 2 * 2, : x.shape[-1] // 2 * 2])


def _synthesise(bands: Tensor) -> Tensor:
    (bands,) = checks.autocast(bands)
    return haar_from_bands(bands)


_KERNELS: tuple[Callable[[Tensor], Tensor], ...] = (_analyse, _synthesise)


class CannotReplace(Exception):
    """Carries the reason why a module is left as it is."""


class HaarFunction:
    """Stands for one of the two functions as long as the filters are Haar's and frozen; else calls the original.

    Args:
        original: the function of the module, bound to ``filters``.
        filters: (4C, 1, 2, 2).
        direction: 0 analysis, 1 synthesis.
    """

    def __init__(self, original: Callable[[Tensor], Tensor], filters: Tensor, direction: int) -> None:
        self.original = original
        self.filters = filters
        self.direction = direction
        self._look()

    def _look(self) -> None:
        self._seen = _version(self.filters)
        reason = why_not_haar(self.filters)
        self._why_not = None if reason is None else f"its filters {reason}"

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return self.original(x)
        # A compiled graph keeps what it was traced with; in eager mode a checkpoint may bring other filters.
        if not torch.compiler.is_compiling() and self._seen != _version(self.filters):
            self._look()
        reason = "its filters are trainable" if self.filters.requires_grad else self._why_not
        if reason is None:
            return _KERNELS[self.direction](x)
        if not torch.compiler.is_compiling() and log.enabled():
            name = NAMES[self.direction][0]
            log.once((name, reason), lambda: f"{name}: runs as its convolution: {reason}")
        return self.original(x)

    def __repr__(self) -> str:
        return f"HaarFunction({self.original!r})"


def _version(filters: Tensor) -> int | None:
    """Counts writes to ``filters``; tensors made in inference mode do not."""
    return None if filters.is_inference() else filters._version


def why_not_haar(filters: Tensor) -> str | None:
    """None for frozen filters that equal Haar's up to the rounding of their dtype, else what they are instead."""
    if filters.requires_grad:
        return "are trainable"
    if filters.dim() != 4 or filters.shape[0] % 4 or filters.shape[1:] != (1, 2, 2):
        return f"have shape {tuple(filters.shape)}, Haar's (4C, 1, 2, 2)"
    if filters.is_meta:
        return "are on the meta device, without values"
    haar = 0.5 * torch.tensor(_SIGNS, dtype=torch.float64).reshape(4, 1, 2, 2)
    values = filters.detach().double().cpu().unflatten(0, (-1, 4))
    # sqrt(1/2) is rounded, its square once more; WTConv does so in float32, and a later cast to float64 keeps that.
    eps = max(torch.finfo(filters.dtype).eps, torch.finfo(torch.float32).eps)
    if not torch.allclose(values, haar.expand_as(values), rtol=4 * eps, atol=0):
        return "are not Haar's"
    return None


class SharedFunction:
    """Stands for one of the two functions that take their filters, for every caller in the process; calls the original
    where the filters are not Haar's and frozen, and in compiled graphs, which do not see what filters hold."""

    def __init__(self, original: Callable[..., Tensor], direction: int) -> None:
        functools.update_wrapper(self, original)
        self.original = original
        self.direction = direction
        self._by_filters: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __call__(self, x: Tensor, filters: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or torch.compiler.is_compiling():
            return self.original(x, filters, *args, **kwargs)
        function = self._by_filters.get(filters)
        if function is None:
            bound = functools.partial(self._on, weakref.ref(filters))
            function = self._by_filters[filters] = HaarFunction(bound, filters.detach(), self.direction)
        function.filters.requires_grad_(filters.requires_grad)
        return function(x)

    def _on(self, filters: weakref.ref[Tensor], x: Tensor) -> Tensor:
        return self.original(x, filters())


def names_in(code: types.CodeType) -> set[str]:
    """The global names and attributes that a function's code uses, functions inside of it included."""
    inner = (names_in(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*inner)


def replacement(module: nn.Module) -> Callable[[nn.Module], str] | None:
    """How to replace the functions of a module with WTConv's filters; None for others, and where they are ours."""
    if not all(isinstance(getattr(module, filters, None), Tensor) for _, filters in NAMES):
        return None
    functions = [getattr(module, name, None) for name, _ in NAMES]
    if all(map(callable, functions)):
        if all(isinstance(f, HaarFunction) for f in functions):
            return wtconv_layer.replacement(module)
        return functools.partial(_and_forward, _replace_attributes)
    beside = [found for _, _, found in _functions_beside(module)]
    directions = {found.direction for found in beside if isinstance(found, SharedFunction)}
    if directions == {0, 1}:
        return wtconv_layer.replacement(module)
    return functools.partial(_and_forward, _replace_shared)


def _and_forward(replace: Callable[[nn.Module], str], module: nn.Module) -> str:
    """Replaces the functions, then the forward that calls them."""
    forward, now = wtconv_layer.replacement(module), replace(module)
    return now if forward is None else f"{now}, {forward(module)}"


def _functions_beside(module: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """The functions that the methods of a class name, where they are kept: (namespace, name, function)."""
    found: list[tuple[dict[str, Any], str, Any]] = []
    for kind in type(module).__mro__:
        if kind.__module__.split(".")[0] in ("torch", "builtins"):
            continue
        for method in vars(kind).values():
            if not isinstance(method, types.FunctionType):
                continue
            names = sorted(names_in(method.__code__))
            spaces = [method.__globals__]
            held = [method.__globals__.get(name) for name in names]
            spaces += [vars(m) for m in held if isinstance(m, types.ModuleType) and not m.__name__.startswith("torch")]
            found += [
                (space, name, space[name])
                for space in spaces
                for name in names
                if isinstance(space.get(name), (types.FunctionType, SharedFunction))
            ]
    return found


def _pattern(filters: Tensor) -> Tensor:
    """Small integers: their quarter sums are exact in every dtype and in TF32; only a wrong sign or order differs."""
    channels = filters.shape[0] // 4
    return (torch.arange(channels * 24) * 5 % 9 - 4).reshape(1, channels, 4, 6).to(filters)


def _agree(theirs: object, ours: Tensor) -> bool:
    return isinstance(theirs, Tensor) and theirs.shape == ours.shape and torch.allclose(theirs, ours, atol=1e-2, rtol=0)


def _check_filters(module: nn.Module) -> None:
    for _, filters in NAMES:
        if (reason := why_not_haar(getattr(module, filters))) is not None:
            raise CannotReplace(f"its {filters} {reason}")


@torch.no_grad()
def _replace_attributes(module: nn.Module) -> str:
    """Puts ours in the place of both functions; the originals stay inside for filters that change."""
    _check_filters(module)
    theirs: Any = module
    for name, _ in NAMES:
        if name not in module.__dict__:
            raise CannotReplace(f"its {name} is a method or module of its class, not an attribute that can be replaced")
    pattern = _pattern(theirs.wt_filter)
    try:
        ours = haar_bands(pattern)
        same = _agree(theirs.wt_function(pattern), ours) and _agree(theirs.iwt_function(ours), pattern)
    # Whatever a stranger's code raises, the answer is the same: these functions cannot be vouched for.
    except Exception as error:
        raise CannotReplace(
            f"its functions could not be run beside ours to compare: {type(error).__name__}: {error}"
        ) from error
    if not same:
        raise CannotReplace("its functions compute something else than WTConv's")
    for direction, (name, filters) in enumerate(NAMES):
        setattr(module, name, HaarFunction(getattr(theirs, name), getattr(theirs, filters), direction))
    return NOW


@torch.no_grad()
def _replace_shared(module: nn.Module) -> str:
    """Finds the two functions beside the class by what they compute, and puts ours in their place there."""
    _check_filters(module)
    theirs: Any = module
    pattern = _pattern(theirs.wt_filter)
    ours = haar_bands(pattern)
    tasks = ((pattern, theirs.wt_filter, ours), (ours, theirs.iwt_filter, pattern))
    beside = _functions_beside(module)
    places: list[list[tuple[dict[str, Any], str, Any]]] = [
        [place for place in beside if isinstance(place[2], SharedFunction) and place[2].direction == direction]
        or [place for place in beside if _computes(place[2], *task)]
        for direction, task in enumerate(tasks)
    ]
    if not all(places):
        raise CannotReplace(
            "no functions beside its class that compute WTConv's transforms with its filters were found"
        )
    for direction, found in enumerate(places):
        for space, name, function in found:
            if not isinstance(function, SharedFunction):
                space[name] = SharedFunction(function, direction)
    named = [f"{found[0][2].__module__}.{found[0][1]}" for found in places]
    return f"{' and '.join(named)}, for all that call them, on the Haar kernels"


def _computes(function: Callable[..., Any], given: Tensor, filters: Tensor, wanted: Tensor) -> bool:
    try:
        return _agree(function(given, filters), wanted)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError):
        return False  # most functions beside a class take other arguments
