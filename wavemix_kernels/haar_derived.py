"""Derives from one run of a layer which of Haar's bands it returns or takes: their order, weights, layout and places in
the arguments and results. Serves the layers that no entry of :data:`wavemix_kernels.ops.haar.CONVENTIONS` describes:
one axis, some of the bands, tuples and lists of joined bands, numbers beside them (a log-determinant), and inputs that
the layer scales in place.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from wavemix_kernels import backends, haar_layers
from wavemix_kernels.haar_layers import Form
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.haar import blocks, joined

#: (dims of a tensor, axes of the volume (N, C, D, H, W) that are transformed); a frame of a video is an image.
_PLACES = ((4, (3, 4)), (3, (4,)), (5, (2, 3, 4)), (5, (3, 4)))
_MOST_FLAGS = 3
#: Where bands of a layout lie side by side in memory; others lie each by itself.
_INSIDE = {"channels": "channels", "inside": "channels", "bands": "bands", "around": "bands"}
_DTYPES = (torch.float64, torch.float32)  # some layers take one of the two alone


@dataclass(frozen=True)
class Piece:
    """A tensor with some of the bands of a block (N, C, K, ...).

    Attributes:
        layout: "alone": one band; "bands", "channels", "batch": joined as in
            :class:`wavemix_kernels.ops.haar.Convention`; "inside": (N, C, count, ...); "around": (N, count, C, ...).
    """

    layout: str
    count: int
    first: int = 0

    def of(self, block: Tensor) -> Tensor:
        if self.layout == "alone":
            return block[:, :, self.first]
        part = block[:, :, self.first : self.first + self.count]
        if self.layout == "channels":
            return part.flatten(1, 2)
        if self.layout == "batch":
            return part.movedim(2, 0).flatten(0, 1)
        if self.layout == "inside":
            return part
        part = part.transpose(1, 2)
        return part.flatten(1, 2) if self.layout == "bands" else part

    def bands(self, x: Tensor) -> Tensor:
        """(N, C, count, ...) of a tensor in this layout: a view."""
        if self.layout == "alone":
            return x.unsqueeze(2)
        if self.layout == "channels":
            return x.unflatten(1, (-1, self.count))
        if self.layout == "batch":
            return x.unflatten(0, (self.count, -1)).movedim(0, 2)
        if self.layout == "inside":
            return x
        return (x.unflatten(1, (self.count, -1)) if self.layout == "bands" else x).transpose(1, 2)

    def one(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """The shape of one band of a tensor in this layout; None: there is no such tensor of that shape."""
        m, (n, c, *sizes) = self.count, shape
        if self.layout == "alone":
            return (n, c, *sizes)
        if self.layout in ("channels", "bands"):
            return None if c % m else (n, c // m, *sizes)
        if self.layout == "batch":
            return None if n % m else (n // m, c, *sizes)
        kept, count = (c, sizes[0]) if self.layout == "inside" else (sizes[0], c)
        return (n, kept, *sizes[1:]) if count == m else None

    def shape(self, n: int, c: int, *sizes: int) -> tuple[int, ...]:
        """The shape of a tensor in this layout."""
        m = self.count
        return {
            "alone": (n, c, *sizes), "channels": (n, c * m, *sizes), "bands": (n, c * m, *sizes),
            "batch": (n * m, c, *sizes), "inside": (n, c, m, *sizes), "around": (n, m, c, *sizes),
        }[self.layout]  # fmt: skip


_WHOLE = (Piece("alone", 1),)


@dataclass(frozen=True)
class Number:
    """A number for each element of a sample."""

    kind: type
    ratio: float


@dataclass
class Derived(Form):
    """A form that the layer itself has shown.

    Attributes:
        dims: of the images.
        axes: of the volume (N, C, D, H, W) that are transformed.
        order, weight: of the bands of the block (N, C, K, ...), as :func:`wavemix_kernels.ops.haar.blocks.split`.
        pieces: what the layer takes (synthesis), or what it returns one after the other.
        taken: how the tensors lie in the arguments: for each its count in a tuple or list, 0 for a tensor by itself.
        result: the result, with pieces and numbers in place of tensors and numbers.
        inside: the block's layout in memory, that of the largest piece.
        pooled: not 0: the result is the low band, a pool with this divisor.
        scales: what the layer multiplies the tensor it is given by, in place; 1: nothing.
        only: the layer takes images of ``channels`` channels only.
        names, defaults: of the arguments of its forward.
        idle: its flags that change nothing.
    """

    dims: int = 4
    axes: tuple[int, ...] = (3, 4)
    order: tuple[int, ...] = ()
    weight: tuple[float, ...] = ()
    pieces: tuple[Piece, ...] = ()
    taken: tuple[int, ...] = (0,)
    result: Any = None
    scales: float = 1.0
    inside: str = "batch"
    pooled: int = 0
    only: bool = False
    names: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()

    def __str__(self) -> str:
        bands = "".join(f" {p:0{len(self.axes)}b}*{w:.6g}" for p, w in zip(self.order, self.weight, strict=True))
        return f"Haar {'synthesis' if self.back else 'analysis'} of bands{bands}"

    # --- A call ---

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        if len(args) > len(self.names) or any(name in self.names[: len(args)] for name in kwargs):
            return None
        values = {**dict(zip(self.names, args, strict=False)), **kwargs}
        found: list[Any] = []
        for name, count in zip(self.names, self.taken, strict=False):
            value = values.pop(name, None)
            if count and (not isinstance(value, (tuple, list)) or len(value) != count):
                return None
            found += value if count else [value]
        for name, value in values.items():
            if name in self.idle and isinstance(value, bool):
                continue
            if name not in self.defaults or value is not self.flags.get(name, self.defaults[name]):
                return None
        if any(name not in values and flag is not self.defaults[name] for name, flag in self.flags.items()):
            return None
        return tuple(found)

    def arguments(self, given: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        waiting = iter(given)
        return tuple(tuple(itertools.islice(waiting, n)) if n else next(waiting) for n in self.taken), self.flags

    def serves(self, layer: nn.Module, given: Sequence[Any]) -> bool:
        tensors = self.pieces if self.back else _WHOLE
        if len(given) != len(tensors):
            return False
        dims = [self.dims + (piece.layout in ("inside", "around")) for piece in tensors]
        if not self._are_plain(layer, given, dims):
            return False
        first, *others = (piece.one(x.shape) for piece, x in zip(tensors, given, strict=True))
        if first is None or any(other != first for other in others) or (self.only and first[1] != self.channels):
            return False
        return self._fits(given[0].shape) and self._as_seen(layer)

    def _fits(self, shape: Sequence[int]) -> bool:
        return self.back or self.odd or all(shape[a - 5] % 2 == 0 for a in self.axes)

    def images(self, odd: bool = False, more: int = 0) -> list[tuple[int, ...]]:
        sizes = [s + more for s in (3, 5, 4)[5 - self.dims :]]
        if not self.back:
            sizes = [2 * s + odd if i in self.axes else s for i, s in zip(range(7 - self.dims, 5), sizes, strict=True)]
        n, c = 1 + more, self.channels if self.only else self.channels + more
        return [piece.shape(n, c, *sizes) for piece in (self.pieces if self.back else _WHOLE)]

    def __call__(self, given: Sequence[Tensor]) -> Any:
        elements = given[0][0].numel()
        if self.scales != 1:
            for x in given:
                x.mul_(self.scales)
        if self.back:
            return _filled(self.result, [self._image(given)], elements)
        if self.pooled and choose.low_band(given[0].device.type) == "pool":
            return _filled(self.result, [F.avg_pool2d(given[0], 2, divisor_override=self.pooled)], elements)
        if self._rule is not None:
            return _filled(self.result, [*joined.analysis(given[0], self._rule, _backend())], elements)
        block = blocks.split(
            joined.volume(given[0], 2), self.axes, self.order, self.weight, layout=self.inside, backend=_backend()
        )
        whole = joined.flat(block, self.dims, 3)
        return _filled(self.result, [piece.of(whole) for piece in self.pieces], elements)

    @functools.cached_property
    def _rule(self) -> joined.Rule | None:
        """The round that takes or returns just these pieces; None: there is none."""
        alone = all(piece.layout == "alone" and piece.first == k for k, piece in enumerate(self.pieces))
        if not alone and (len(self.pieces) > 1 or self.pieces[0].first):
            return None
        layout, count = ("separate", len(self.pieces)) if alone else (self.pieces[0].layout, self.pieces[0].count)
        return joined.Rule(self.axes, self.order, self.weight, layout, count)

    def _image(self, given: Sequence[Tensor]) -> Tensor:
        first = self.pieces[0].one(given[0].shape)
        assert first is not None  # serves() has asked
        size = [1] * (5 - self.dims) + [*first[2:]]
        size = [2 * n if axis in self.axes else n for axis, n in enumerate(size, 2)]
        if self._rule is not None:
            last = blocks.is_channels_last(self.pieces[0].bands(given[0])[:, :, 0])
            return joined.synthesis(given, self._rule, size, last, _backend())
        parts = [piece.bands(x) for piece, x in zip(self.pieces, given, strict=True)]
        # Joined around the channels, whole bands are copied.
        block = joined.volume(torch.cat([p.transpose(1, 2) for p in parts], 1).transpose(1, 2), 3)
        image = blocks.join(
            block, self.axes, self.order, self.weight, size, layout=self.inside,
            channels_last=blocks.is_channels_last(block[:, :, 0]), backend=_backend(),
        )  # fmt: skip
        return joined.flat(image, self.dims, 2)


def _backend() -> str:
    return backends.requested(None)


def _filled(result: Any, tensors: list[Tensor], elements: int) -> Any:
    if isinstance(result, Piece):
        return tensors.pop(0)
    if isinstance(result, Number):
        return result.kind(result.ratio * elements)
    if isinstance(result, (tuple, list)):
        return type(result)(_filled(part, tensors, elements) for part in result)
    return result


# --- Deriving it -----------------------------------------------------------------------------------------


def forms(module: nn.Module) -> list[Form]:
    """The forms of a layer for each setting of its flags that it was seen to compute Haar under; empty: none."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return []
    names = tuple(p.name for p in parameters)
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    flags = [name for name, value in defaults.items() if isinstance(value, bool)][:_MOST_FLAGS]
    takes = len(names) - len(defaults)
    found: list[Form] = []
    idle: frozenset[str] = frozenset()
    for values in itertools.product(*((defaults[name], not defaults[name]) for name in flags)):
        set_flags = dict(zip(flags, values, strict=True))
        if any(set_flags[name] is not defaults[name] for name in idle):
            continue
        form = _derived(module, {n: v for n, v in set_flags.items() if v is not defaults[n]}, max(takes, 1))
        if form is None:
            continue
        form.names, form.defaults, form.flags = names, defaults, {n: v for n, v in set_flags.items() if n not in idle}
        if not found:
            idle = frozenset(n for n in flags if _is_idle(form, module, n))
            form.flags = {n: v for n, v in set_flags.items() if n not in idle}
        form.idle = idle
        form.only = not haar_layers.agrees(form, module, form.images(more=1))
        found.append(form)
    return found


def _derived(module: nn.Module, flags: dict[str, bool], takes: int) -> Derived | None:
    for (dims, axes), c, dtype in itertools.product(_PLACES, haar_layers.channels_of(module), _DTYPES):
        for back, taken, pieces in _probes(len(axes), takes):
            probe = Derived("derived", back, 1, channels=c, flags=flags, dtype=dtype, dims=dims, axes=axes)
            probe.pieces, probe.taken = pieces, taken
            n, *sizes = (2, 3, 4, 2)[: dims - 1]
            if not back:
                sizes = [2 * s if i in axes else s for i, s in zip(range(7 - dims, 5), sizes, strict=True)]
            shapes = [p.shape(n, c, *sizes) for p in (pieces if back else _WHOLE * len(taken))]
            given = [haar_layers.random(*shape, dtype=dtype) + i for i, shape in enumerate(shapes)]
            ran = haar_layers.run(module, probe.arguments(given))
            if ran is not None and _understood(probe, ran[0], given, tree_flatten(ran[2])[0]):
                for kept in (haar_layers.dtype_of(module), *_DTYPES):
                    probe.dtype, given = kept, [x.to(kept) for x in given]
                    if haar_layers.run(module, probe.arguments(given), training=False) is not None:
                        return probe
    return None


def _probes(axes: int, takes: int) -> Iterator[tuple[bool, tuple[int, ...], tuple[Piece, ...]]]:
    """Analysis or synthesis, how tensors lie in the arguments, and which bands each has, in the synthesis."""
    count, alone = 2**axes, Piece("alone", 1)
    joined = [Piece(layout, count) for layout in ("bands", "channels", "batch", "inside", "around")]
    rest = [Piece(layout, count - 1) for layout in ("bands", "channels", "inside", "around")]
    if takes == 1:
        for taken in ((0,), (1,)):
            yield False, taken, ()
            yield from ((True, taken, (piece,)) for piece in joined)
        yield True, (count,), (alone,) * count
    if takes == count:
        yield True, (0,) * count, (alone,) * count
    if count > 2 and takes < 3:
        yield from ((True, (2,) if takes == 1 else (0, 0), (alone, piece)) for piece in rest)


def _understood(form: Derived, out: Any, given: list[Tensor], after: list[Any]) -> bool:
    """Whether the result has Haar's bands of ``given``, or is made of them; fills ``form``."""
    ratios = [_ratio(a, b) for a, b in zip(after, given, strict=True)]
    if any(ratio is None or ratio != ratios[0] for ratio in ratios):
        return False
    form.scales, count = ratios[0] or 1.0, 2 ** len(form.axes)
    elements = given[0][0].numel()
    tensors = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
    if any(t.dtype != given[0].dtype or not t.isfinite().all() for t in tensors):
        return False
    if not form.back:
        whole = _plain_bands(form, given[0])
        seen = [_seen(t, whole) for t in tensors]
        if not seen or not (pieces := _arranged(form, seen, count)):
            return False
        form.pieces = tuple(pieces)
    elif len(tensors) == 1 and tensors[0].dim() == form.dims:
        parts = torch.cat([piece.bands(x) for piece, x in zip(form.pieces, given, strict=True)], 2)
        image = tensors[0]
        if image.shape != (*parts.shape[:2], *(2 * s if i in form.axes else s for i, s in _places(form, parts))):
            return False
        bands = _plain_bands(form, image) / count
        found = [_which(bands[:, :, k], parts) for k in range(count)]
        places = [entry[0] for entry in found if entry is not None]
        if sorted(places) != [*range(count)]:
            return False
        form.order = tuple(places.index(j) for j in range(count))
        form.weight = tuple(found[k][1] for k in form.order)  # type: ignore[index]
    else:
        return False
    form.weight = tuple(_nice(w / form.scales) for w in form.weight)
    largest = max(form.pieces, key=lambda piece: piece.count).layout
    form.inside = _INSIDE.get(largest, "batch")
    waiting = iter(form.pieces if not form.back else _WHOLE)
    form.result, clear = _spec(out, waiting, elements)
    once = form.pieces == _WHOLE and form.order[0] == 0 and form.dims == 4 and not form.back
    if once and abs(1 / form.weight[0] - round(1 / form.weight[0])) < 1e-12 and form.weight[0] > 0:
        form.pooled = round(1 / form.weight[0])
    return clear


def _places(form: Derived, parts: Tensor) -> Iterator[tuple[int, int]]:
    return zip(range(7 - form.dims, 5), parts.shape[3:], strict=True)


def _ratio(after: Any, before: Tensor) -> float | None:
    """The factor of ``before`` in place, where nothing else was done to it."""
    if torch.equal(after, before):
        return 1.0
    ratio = _nice(((after.double() * before).sum() / before.double().square().sum()).item())
    return ratio if torch.allclose(after, before * ratio, rtol=1e-6, atol=1e-6) else None


def _nice(value: float) -> float:
    """A power of the root of two that the value is up to rounding of filters in float32, or the value."""
    power = round(2 * math.log2(abs(value))) if value else 0
    near = math.copysign(math.sqrt(2.0) ** (power % 2) * 2.0 ** (power // 2), value)
    return near if abs(value - near) < 1e-6 * abs(near) else value


def _plain_bands(form: Derived, x: Tensor) -> Tensor:
    """(N, C, K, ...): sums and differences, band k along the axes that are bits of k."""
    count = 2 ** len(form.axes)
    block = blocks.split(joined.volume(x, 2), form.axes, range(count), [1.0] * count, backend="reference")
    return joined.flat(block, form.dims, 3)


def _which(band: Tensor, among: Tensor) -> tuple[int, float] | None:
    """Which of (N, C, K, ...) a band is a multiple of, and which multiple."""
    for k in range(among.shape[2]):
        one = among[:, :, k]
        weight = ((band.double() * one).sum() / one.double().square().sum()).item()
        if abs(weight) > 1e-3 and torch.allclose(band, one * weight, rtol=0, atol=1e-5 * band.abs().max().item()):
            return k, weight
    return None


def _seen(t: Tensor, whole: Tensor) -> tuple[str, list[tuple[int, float]]] | None:
    """The layout of a tensor and its bands, each with its weight."""
    n, c, count, *sizes = whole.shape
    candidates: list[Piece] = []
    if t.shape == (n, c, *sizes):
        candidates = [Piece("alone", 1)]
    elif list(t.shape[2:]) == sizes and t.shape[0] == n and t.shape[1] % c == 0:
        candidates = [Piece("bands", t.shape[1] // c), Piece("channels", t.shape[1] // c)]
    elif list(t.shape[2:]) == sizes and t.shape[1] == c and t.shape[0] % n == 0:
        candidates = [Piece("batch", t.shape[0] // n)]
    elif list(t.shape[3:]) == sizes and t.shape[0] == n:
        candidates = [Piece("inside", t.shape[2])] if t.shape[1] == c else []
        candidates += [Piece("around", t.shape[1])] if t.shape[2] == c else []
    for piece in candidates:
        if piece.count <= count:
            bands = piece.bands(t)
            found = [_which(bands[:, :, j], whole) for j in range(piece.count)]
            if all(entry is not None for entry in found):
                return piece.layout, [entry for entry in found if entry is not None]
    return None


def _arranged(form: Derived, seen: Sequence[tuple[str, list[tuple[int, float]]] | None], count: int) -> list[Piece]:
    """Puts the bands in an order in which those of each tensor follow one another; empty: there is none."""
    order: list[tuple[int, float]] = []
    pieces: dict[int, Piece] = {}
    for i, entry in sorted(enumerate(seen), key=lambda item: -len(item[1][1]) if item[1] else 0):
        if entry is None:
            return []
        layout, bands = entry
        run, known = [(k, _nice(w)) for k, w in bands], [k for k, _ in order]
        starts = [s for s in range(len(order)) if order[s : s + len(run)] == run]
        if not starts and (len({k for k, _ in run}) < len(run) or any(k in known for k, _ in run)):
            return []
        pieces[i] = Piece(layout, len(run), starts[0] if starts else len(order))
        order += [] if starts else run
    used = [k for k, _ in order]
    order += [(k, order[0][1]) for k in range(count) if k not in used]
    form.order, form.weight = tuple(k for k, _ in order), tuple(w for _, w in order)
    return [pieces[i] for i in range(len(seen))]


def _spec(out: Any, pieces: Iterator[Piece], elements: int) -> tuple[Any, bool]:
    """The result with pieces and numbers in place of values, and whether it has nothing else in it."""
    if isinstance(out, Tensor):
        return next(pieces), True
    if type(out) in (tuple, list):
        parts = [_spec(part, pieces, elements) for part in out]
        return type(out)(part for part, _ in parts), all(clear for _, clear in parts)
    if isinstance(out, (int, float)) and not isinstance(out, bool):
        return Number(type(out), float(out) / elements), True
    return None, out is None


def _is_idle(form: Derived, module: nn.Module, name: str) -> bool:
    given = [haar_layers.random(*shape, dtype=form.dtype or torch.float32) for shape in form.images()]
    args, flags = form.arguments(given)
    runs = [haar_layers.run(module, (args, {**flags, name: value})) for value in (False, True)]
    return None not in runs and haar_layers.same(runs[0][0], runs[1][0], 0.0)  # type: ignore[index]
