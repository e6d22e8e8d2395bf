"""Finds layers of other people's networks that compute Haar's bands in a way that
:data:`wavemix_kernels.ops.haar.CONVENTIONS` lists, and has them run on the kernels, for
:func:`wavemix_kernels.accelerate`.

A layer is judged by what a copy of it computes beside each convention. Words in its code only decide whether it is run
at all. It keeps its class as a base, its tensors and its plain forward, which goes on to serve every call that was not
compared: other dtypes and sizes, and other settings than those it was compared under.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import types
from collections.abc import Callable, Container, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from wavemix_kernels import backends, fx
from wavemix_kernels.ops.haar import blocks, conventions, joined
from wavemix_kernels.ops.haar.conventions import CONVENTIONS, Convention
from wavemix_kernels.twins import StaysOnCpu, on_cpu
from wavemix_kernels.wtconv import CannotReplace, names_in

_WORDS = re.compile(r"haar|dwt|iwt|wavelet|wave_?(un)?pool", re.IGNORECASE)
_LARGEST = 4096  # elements in all tensors of a layer of fixed filters
_ROUNDS = (1, 2, 3)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda")  # that kernels run on; layers compute the same on both
_MANAGED = frozenset(nn.Module().__dict__)  # what PyTorch itself keeps on a module
_SIMPLE = (bool, int, float, str, type(None), range)


@dataclass
class Form:
    """A layer's arithmetic, and the calls for which that was seen.

    Attributes:
        name: of the convention.
        back: synthesis.
        dtypes: those in which the layer returns what ours does.
        odd: sizes that a round does not halve are ours too.
        settings: the plain attributes of the layer and its parts when it was compared.
        filters: copies of its tensors then.
        channels: of the images, or of each band, that it was compared with.
        writes: attributes that a call sets to a number for each element of an image, and that number.
        dtype: that it was compared in; None: that of the layer's tensors.
    """

    name: str
    back: bool
    rounds: int
    dtypes: frozenset[torch.dtype] = frozenset()
    odd: bool = False
    settings: Any = None
    filters: list[Tensor] = field(default_factory=list)
    channels: int = 3
    writes: dict[str, tuple[type, float]] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)
    seen: Any = None
    dtype: torch.dtype | None = None

    def __str__(self) -> str:
        rounds = f", {self.rounds} rounds" if self.rounds > 1 else ""
        return f"Haar {'synthesis' if self.back else 'analysis'} {self.name!r}{rounds}"

    @property
    def convention(self) -> Convention:
        return CONVENTIONS[self.name]

    def __call__(self, given: Sequence[Tensor]) -> Any:
        of = self.convention
        if self.rounds == 1 and not of.first_frame:
            return self._once(given, of)
        there, back = conventions.FUNCTIONS[of.axes]
        return (back if self.back else there)(given[0], of, rounds=self.rounds)

    def _once(self, given: Sequence[Tensor], of: Convention) -> Any:
        """One round, past checks that :meth:`serves` has made already."""
        name = backends.requested()
        if self.back:
            size = [1, 1, *given[0].shape[2:]][-3:]
            size = [*size[: 3 - of.axes], *(2 * n for n in size[3 - of.axes :])]
            rule = conventions.rule_of(of, of.inverse, "zero", 0, False)
            return joined.synthesis(given, rule, size, blocks.is_channels_last(given[0]), name)
        found = joined.analysis(given[0], conventions.rule_of(of, of.weight, of.mode, 0, True), name)
        return found if of.layout == "separate" else found[0]

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """The tensors of a call whose flag, where the layer has one, is this form's."""
        if not self.flags:
            return None if kwargs else args
        ((name, value),) = self.flags.items()
        flag, *more = [*args[1:], *kwargs.values()] or [False]
        return args[:1] if flag is value and not more and kwargs.keys() <= {name} else None

    def arguments(self, given: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, bool]]:
        """The call of the layer's forward that has these tensors."""
        return tuple(given), self.flags

    def images(self, odd: bool = False, more: int = 0) -> list[tuple[int, ...]]:
        """Shapes of such tensors."""
        return _images(self, odd, more)

    def rank(self) -> int:
        """How many dimensions its tensors have."""
        return self.convention.axes + 2

    def serves(self, layer: nn.Module, given: Sequence[Any]) -> bool:
        of = self.convention
        if len(given) != (2**of.axes if self.back and of.layout == "separate" else 1):
            return False
        if not self._are_plain(layer, given, [self.rank()] * len(given)) or len({x.shape for x in given}) > 1:
            return False
        return self._fits(given[0].shape) and self._as_seen(layer)

    def _are_plain(self, layer: nn.Module, given: Sequence[Any], dims: Sequence[int]) -> bool:
        """Whether these are tensors of so many dims that kernels and the layer's tensors can meet."""
        for x, dim in zip(given, dims, strict=True):
            if not isinstance(x, Tensor) or isinstance(x, fx.Proxy) or type(x) not in (Tensor, nn.Parameter):
                return False
            if x.dim() != dim or x.dtype not in self.dtypes or x.device.type not in _DEVICES or x.numel() == 0:
                return False
        dtype, device = given[0].dtype, given[0].device
        if any(x.dtype != dtype or x.device != device for x in given[1:]) or torch.is_autocast_enabled(device.type):
            return False
        return not any(t.device != device for t in _tensors(layer))  # its own code raises

    def _fits(self, shape: Sequence[int]) -> bool:
        of, unit = self.convention, 2**self.rounds
        if self.back:
            batch, channels = (2**of.axes, 1) if of.layout == "batch" else (1, 2 ** (of.axes * self.rounds))
            return shape[0] % batch == 0 and (of.layout == "separate" or shape[1] % channels == 0)
        if self.odd:
            return True
        before = unit - 1 if of.first_frame else 0
        sizes = [shape[2] + before, *shape[3:]] if of.axes == 3 else shape[2:]
        return all(size % unit == 0 for size in sizes)

    def _as_seen(self, layer: nn.Module) -> bool:
        if torch.compiler.is_compiling():
            return True  # a compiled graph keeps what it was traced with
        if _settings(layer, self.ignored) != self.settings:
            return False
        now = _tensors(layer)
        if any(t.requires_grad for t in now):
            return False
        if any(t.is_inference() for t in now) or (versions := [(id(t), t._version) for t in now]) != self.seen:
            if any(t.is_cuda for t in now) and (any(t.is_inference() for t in now) or _capturing()):
                return False  # a look at their values at every call would wait for the GPU; a captured graph has none
            same = len(now) == len(self.filters)
            if not same or not all(
                a.shape == b.shape and torch.equal(a.detach().cpu().to(b.dtype), b)
                for a, b in zip(now, self.filters, strict=True)
            ):
                return False
            self.seen = None if any(t.is_inference() for t in now) else versions
        return True


class HaarLayer(nn.Module):
    """Mixed into the class of a layer that :func:`replacement` has found."""

    _haar: list[Form]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for form in self._haar:
            given = form.given(args, kwargs)
            if given is not None and form.serves(self, given):
                for name, (kind, ratio) in form.writes.items():
                    vars(self)[name] = kind(_rounded(kind, ratio * given[0][0].numel()))
                return form(given)
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, (type(self).__mro__[2],), self.__dict__


@functools.cache
def _class(kind: Any) -> type[nn.Module]:
    return type(kind.__name__, (HaarLayer, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _new(kind: Any) -> nn.Module:
    made = _class(kind)
    return made.__new__(made)


def replacement(module: nn.Module) -> Callable[[nn.Module], str] | None:
    """How to have a layer run on the kernels; None for layers that compute none of the conventions."""
    kind = type(module)
    if isinstance(module, HaarLayer) or kind.__module__.split(".")[0] in ("torch", "builtins"):
        return None
    if kind.forward is nn.Module.forward or not _mentions_wavelets(module):
        return None
    tensors = _tensors(module)
    if sum(t.numel() for t in tensors) > _LARGEST or any(t.is_meta for t in tensors):
        return None
    flags: list[dict[str, bool]] = [{}]
    if "rev" in inspect.signature(kind.forward).parameters:
        flags = [{"rev": False}, {"rev": True}]
    forms = [form for each in flags if (form := _recognised(module, each)) is not None]
    from wavemix_kernels import haar_derived, haar_video  # whose forms are made of the ones here

    forms += haar_video.forms(module, forms)
    holders = {name for name, value in vars(module).items() if _holds_modules(value)}
    if not forms and holders <= {"_modules"}:  # the transforms that it holds are replaced themselves
        forms = haar_derived.forms(module)
    if forms:
        return functools.partial(_replace, forms)
    bare = not holders and not any(p.requires_grad for p in tensors)
    return _leave if bare else None


def _holds_modules(value: object) -> bool:
    """Whether an attribute is a module that is not PyTorch's own, or a list, tuple or dict with one: :func:`accelerate`
    looks at those by themselves."""
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
    parts = [part for entry in entries if isinstance(entry, nn.Module) for part in entry.modules()]
    return any(type(part).__module__.split(".")[0] != "torch" for part in parts)


def _leave(module: nn.Module) -> str:
    raise CannotReplace("computes none of the conventions of Haar that are known, or could not be run beside them")


def _mentions_wavelets(module: nn.Module) -> bool:
    kind = type(module)
    if _WORDS.search(kind.__name__) or any(_WORDS.search(name) for name in kind.__dict__):
        return True
    methods = [m for m in vars(kind).values() if isinstance(m, types.FunctionType)]
    return any(_WORDS.search(name) for method in methods for name in _names_of(method))


def _replace(forms: list[Form], module: nn.Module) -> str:
    if "forward" in module.__dict__:
        raise CannotReplace("its forward is overridden on the instance")
    if any(p.requires_grad for p in module.parameters()):
        raise CannotReplace("its filters are trainable")
    filters = [t.detach().cpu().clone() for t in _tensors(module)]
    for form in forms:
        form.writes, form.filters = _written(form, module), filters
        form.odd = not form.back and agrees(form, module, form.images(odd=True))
        form.dtypes = frozenset(d for d in _DTYPES if agrees(form, module, form.images(), d))
    forms = [form for form in forms if form.dtypes]
    if not forms:
        raise CannotReplace("computes something else at other sizes")
    written = {name for form in forms for name in form.ignored}
    for form in forms:
        form.settings = _settings(module, written)
        form.ignored = written
    module.__dict__["_haar"] = forms
    kind: Any = type(module)
    module.__class__ = _class(kind)
    return "; ".join(dict.fromkeys(map(str, forms))) + ", on the kernels"


# --- Running it beside ours ------------------------------------------------------------------------------


def _tensors(module: nn.Module) -> list[Tensor]:
    if not module._modules:  # the walk through a tree costs a small call a tenth of its time
        return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    return [*module.parameters(), *module.buffers()]


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def dtype_of(module: nn.Module) -> torch.dtype:
    """One that tells conventions apart: that of the filters, or float32."""
    found = next((t.dtype for t in _tensors(module) if t.is_floating_point()), torch.float32)
    return found if found == torch.float64 else torch.float32


def _settings(module: nn.Module, ignored: Container[str] = ()) -> list[Any]:
    found: list[Any] = []
    for part in module.modules():
        for name, value in part.__dict__.items():
            if name not in _MANAGED and name != "_haar" and name not in ignored:
                found.append((name, _plain(value)))
    return found


def _plain(value: object) -> object:
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return type(value), len(value) if isinstance(value, Sized) and not isinstance(value, Tensor) else 0


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def run(
    module: nn.Module, call: tuple[tuple[Any, ...], dict[str, bool]], training: bool | None = None
) -> tuple[Any, nn.Module, tuple[Any, ...]] | None:
    """The result of a copy's forward, the copy, and its arguments as they are afterwards; None: it raises."""
    args, flags = call
    try:
        twin = on_cpu(module)
        if training is None:  # the arithmetic that is compared, whatever the dtype of the filters
            twin = twin.to(next(t.dtype for t in tree_leaves(args) if isinstance(t, Tensor)))
        twin.train(bool(training))
        with torch.no_grad(), torch.random.fork_rng([]), StaysOnCpu():
            given = tree_map_only(Tensor, Tensor.clone, args)
            return type(module).forward(twin, *given, **flags), twin, given
    except Exception:  # noqa: BLE001 whatever a stranger's code raises: it does not take such an input
        return None


def channels_of(module: nn.Module) -> list[int]:
    """Numbers of channels that a layer may want."""
    numbers = [v for v in vars(module).values() if isinstance(v, int) and 0 < v <= 256]
    numbers += [n for t in _tensors(module) if t.dim() >= 4 for n in (t.shape[0], t.shape[0] // 4) if 0 < n <= 256]
    return list(dict.fromkeys([3, *numbers]))


def _probes(module: nn.Module) -> Iterator[tuple[bool, int, list[tuple[int, ...]]]]:
    """Analysis or synthesis, channels, and shapes of the inputs; channels as the layer's numbers suggest."""
    for c in channels_of(module):
        yield False, c, [(2, c, 8, 8)]
        yield False, c, [(2, c, 9, 8, 8)]
        yield False, c, [(2, c, 8, 8, 8)]
        yield True, c, [(4, 4 * c, 2, 2)]
        yield True, c, [(2, c, 4, 4)] * 4
    yield True, 3, [(2, 3, 2, 4, 4)] * 8
    yield True, 1, [(4, 64, 2, 2)]
    yield True, 1, [(2, 512, 2, 2, 2)]


def _recognised(module: nn.Module, flags: dict[str, bool]) -> Form | None:
    takes = len(inspect.signature(type(module).forward).parameters) - 1 - len(flags)
    for back, channels, shapes in _probes(module):
        if len(shapes) > max(takes, 1):
            continue
        given = [random(*shape, dtype=dtype_of(module)) + i for i, shape in enumerate(shapes)]
        if (ran := run(module, (tuple(given), flags))) is None:
            continue
        for name, of in CONVENTIONS.items():
            if of.axes + 2 != given[0].dim() or (back and (of.layout == "separate") != (len(given) > 1)):
                continue
            for rounds in _ROUNDS if of.layout in ("bands", "channels") else (1,):
                form = Form(name, back, rounds, channels=channels, flags=flags)
                if form._fits(given[0].shape) and same(ran[0], form(given)):
                    return form
    return None


def same(theirs: Any, ours: Any, bound: float = 1e-5) -> bool:
    if ours is None:
        return theirs is None
    if isinstance(ours, (float, int)):
        return type(theirs) is type(ours) and math.isclose(theirs, ours, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(ours, (tuple, list)):
        return (
            isinstance(theirs, (tuple, list))
            and len(theirs) == len(ours)
            and all(same(a, b, bound) for a, b in zip(theirs, ours, strict=True))
        )
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return False
    return torch.allclose(theirs, ours, rtol=0, atol=bound * max(ours.abs().max().item(), 1e-6))


def _images(form: Form, odd: bool = False, more: int = 0) -> list[tuple[int, ...]]:
    of, unit = form.convention, 2**form.rounds
    if form.back:
        n = 2**of.axes if of.layout == "batch" else 3
        c = form.channels * (1 if of.layout in ("batch", "separate") else 2 ** (of.axes * form.rounds))
        c = 4 * form.channels if form.channels > 1 and of.layout == "batch" else c
        shape: tuple[int, ...] = (n, c, *(3, 4 + more, 5)[3 - of.axes :])
        return [shape] * (2**of.axes if of.layout == "separate" else 1)
    frames = unit + 1 if of.first_frame else unit
    sizes = [frames, 2 * unit, 3 * unit][3 - of.axes :]
    sizes = [s + unit * (1 + more) + odd for s in sizes[:-1]] + [sizes[-1] + 2 * unit + odd]
    return [(1, form.channels, *sizes)]


def agrees(form: Form, module: nn.Module, shapes: list[tuple[int, ...]], dtype: torch.dtype | None = None) -> bool:
    """Whether a copy in training and in evaluation, filters as they are, returns what ours does."""
    dtype = dtype or form.dtype or dtype_of(module)
    given = [random(*shape, dtype=dtype) + i for i, shape in enumerate(shapes)]
    bound = {torch.bfloat16: 0.04, torch.float16: 5e-3}.get(dtype, 1e-5)
    runs = [run(module, form.arguments(given), training) for training in (False, True)]
    try:
        ours = form(given)
    except ValueError:
        return False
    after, _ = form.arguments(given)  # some layers write to what they are given
    return all(ran is not None and same(ran[0], ours, bound) and same(ran[2], after, bound) for ran in runs)


def _written(form: Form, module: nn.Module) -> dict[str, tuple[type, float]]:
    """The attributes that a call leaves changed and others may read, each a number for each element of an image. What
    only the forward itself reads, having written it, is left alone."""
    found: list[dict[str, tuple[type, float]]] = []
    names: set[str] = set()
    for more in (0, 1):
        given = [random(*shape, dtype=form.dtype or dtype_of(module)) for shape in form.images(more=more)]
        if (ran := run(module, form.arguments(given))) is None:
            raise CannotReplace("could not be run beside ours at another size")
        before, after = _settings(module), _settings(ran[1])
        changed = {name for name, _ in [e for e in after if e not in before] + [e for e in before if e not in after]}
        tensors = zip(_tensors(module), _tensors(ran[1]), strict=True)
        if not all(a.shape == b.shape and torch.equal(a.cpu(), b) for a, b in tensors):
            raise CannotReplace("its forward writes to its tensors")
        values = {name: vars(ran[1]).get(name) for name in changed}
        found.append({n: (type(v), v / given[0][0].numel()) for n, v in values.items() if isinstance(v, (int, float))})
        names |= changed
    one, two = found
    same = {n for n in one.keys() & two.keys() if abs(one[n][1] - two[n][1]) <= 1e-12 * abs(one[n][1])}
    read = _read_elsewhere(type(module))
    if lost := sorted(n for n in names - same if n in read):
        raise CannotReplace(f"its forward sets {', '.join(lost)}, which its other methods read")
    form.ignored = names
    return {name: one[name] for name in same}


def _read_elsewhere(kind: type) -> set[str]:
    """The names in those methods of a class that its forward does not call."""
    methods = {n: m for of in reversed(kind.__mro__) for n, m in vars(of).items() if isinstance(m, types.FunctionType)}
    methods = {n: m for n, m in methods.items() if (m.__module__ or "").split(".")[0] != "torch"}
    called, waiting = {"__init__"}, ["forward"]
    while waiting:
        name = waiting.pop()
        called.add(name)
        waiting += sorted(_names_of(methods[name]) & methods.keys() - called)
    return set().union(*(_names_of(m) for n, m in methods.items() if n not in called))


def _names_of(method: types.FunctionType) -> set[str]:
    """The names that a method uses, those of a function that a decorator has wrapped included."""
    inside = (cell.cell_contents for cell in method.__closure__ or () if cell.cell_contents is not method)
    wrapped = (_names_of(f) for f in inside if isinstance(f, types.FunctionType))
    return names_in(method.__code__).union(*wrapped)


def _rounded(kind: type, value: float) -> float:
    return round(value) if kind is int else value
