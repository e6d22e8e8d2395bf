"""Forms of Haar layers that take videos (N, C, T, H, W): conventions of images frame by frame, and those that part the
first frame from the others. :mod:`wavemix_kernels.haar_layers` asks for them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wavemix_kernels import haar_layers
from wavemix_kernels.haar_layers import Form
from wavemix_kernels.ops.haar.conventions import (
    CONVENTIONS,
    haar_bands2d,
    haar_bands3d,
    haar_from_bands2d,
    haar_from_bands3d,
)

#: Conventions that a layer may use for its frames, by their axes.
_JOINED = {axes: [n for n, of in CONVENTIONS.items() if of.axes == axes and of.layout == "bands"] for axes in (2, 3)}


@dataclass
class Frames(Form):
    """A convention of images, which each frame of a video is."""

    def __str__(self) -> str:
        return f"{super().__str__()} of frames"

    def rank(self) -> int:
        return 5

    def images(self, odd: bool = False, more: int = 0) -> list[tuple[int, ...]]:
        return [(n, c, 3 + more, *sizes) for n, c, *sizes in super().images(odd, more)]

    def _fits(self, shape: Sequence[int]) -> bool:
        return super()._fits((*shape[:2], *shape[3:]))


@dataclass
class FirstFrame(Form):
    """A pair: the first frame by a convention of images, the frames after it by one of volumes. An even number of
    frames has no first, one frame has none after it, and None stands for what is missing.

    Attributes:
        volume: the convention of the frames after the first.
        first, rest: which of the two the calls have that this form serves.
        argument: the name of the forward's argument.
    """

    volume: str = ""
    first: bool = True
    rest: bool = True
    argument: str = ""

    def __str__(self) -> str:
        return f"{super().__str__()} of the first frame, {self.volume!r} of the others"

    def __call__(self, given: Sequence[Tensor]) -> Any:
        if self.back:
            one = haar_from_bands2d(given[0], self.name) if self.first else None
            if not self.rest:
                return one.squeeze(2) if one is not None else None
            more = haar_from_bands3d(given[-1], self.volume)
            return more if one is None else torch.cat((one, more), 2)
        (x,) = given
        parts = x.split([1, x.shape[2] - 1], 2) if self.first and self.rest else (x, x)
        return (
            haar_bands2d(parts[0], self.name) if self.first else None,
            haar_bands3d(parts[1], self.volume) if self.rest else None,
        )

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        if len(args) + len(kwargs) != 1 or kwargs.keys() - {self.argument}:
            return None
        (value,) = (*args, *kwargs.values())
        if not self.back:
            return (value,)
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            return None
        held = [part is not None for part in value]
        return tuple(part for part in value if part is not None) if held == [self.first, self.rest] else None

    def arguments(self, given: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, bool]]:
        if not self.back:
            return tuple(given), {}
        return ((given[0] if self.first else None, given[-1] if self.rest else None),), {}

    def images(self, odd: bool = False, more: int = 0) -> list[tuple[int, ...]]:
        c, h, w = self.channels, 2 + more, 3
        if self.back:
            held: list[tuple[int, ...]] = [(2, 4 * c, 1, h, w)] * self.first
            return held + [(2, 8 * c, 2 + more, h, w)] * self.rest
        return [(2, c, self.first + 2 * (2 + more) * self.rest, 2 * h + odd, 2 * w + odd)]

    def serves(self, layer: nn.Module, given: Sequence[Any]) -> bool:
        if len(given) != (self.first + self.rest if self.back else 1):
            return False
        if not self._are_plain(layer, given, [5] * len(given)):
            return False
        fits = self._pair_fits([x.shape for x in given]) if self.back else self._fits(given[0].shape)
        return fits and self._as_seen(layer)

    def _fits(self, shape: Sequence[int]) -> bool:
        _, _, frames, *sizes = shape
        as_wanted = frames % 2 == self.first and (frames > 1) == self.rest
        return as_wanted and (self.odd or all(size % 2 == 0 for size in sizes))

    def _pair_fits(self, shapes: Sequence[Sequence[int]]) -> bool:
        counts = [4] * self.first + [8] * self.rest
        if self.first and shapes[0][2] != 1:
            return False
        images = {(n, c // k, *sizes) for (n, c, _, *sizes), k in zip(shapes, counts, strict=True)}
        return len(images) == 1 and all(s[1] % k == 0 for s, k in zip(shapes, counts, strict=True))


def forms(module: nn.Module, known: Sequence[Form]) -> list[Form]:
    """Those forms of a layer that take videos, beside the ``known`` ones of images."""
    found: list[Form] = []
    if known:
        of_images = [form for form in known if type(form) is Form and form.convention.axes == 2]
        found += [Frames(f.name, f.back, f.rounds, channels=f.channels, flags=f.flags) for f in of_images]
    else:
        found += _first_frame(module) or _frames(module)
    return [form for form in found if haar_layers.agrees(form, module, form.images())]


def _frames(module: nn.Module) -> Iterator[Form]:
    for back, shape in ((False, (2, 3, 3, 8, 8)), (True, (2, 12, 3, 4, 4))):
        x = _made(module, shape)
        if (ran := haar_layers.run(module, ((x,), {}))) is not None:
            transform = haar_from_bands2d if back else haar_bands2d
            name = next((n for n in _JOINED[2] if haar_layers.same(ran[0], transform(x, n))), None)
            if name is not None:
                yield Frames(name, back, 1)
                return


def _first_frame(module: nn.Module) -> list[Form]:
    """The forms of a layer whose call has a first frame and others, alone and together."""
    argument = next(iter(list(inspect.signature(type(module).forward).parameters)[1:]), "")
    found: list[Form] = []
    wanted: list[tuple[Tensor, Any, Any]]
    x = _made(module, (2, 3, 5, 8, 8))
    ran = haar_layers.run(module, ((x,), {}))
    if ran is not None and isinstance(ran[0], (tuple, list)) and len(ran[0]) == 2:
        wanted = [(x[:, :, :1], haar_bands2d, ran[0][0]), (x[:, :, 1:], haar_bands3d, ran[0][1])]
        found = _named(wanted, False, argument)
    pair = (_made(module, (2, 12, 1, 4, 4)), _made(module, (2, 24, 2, 4, 4)))
    ran = None if found else haar_layers.run(module, ((pair,), {}))
    if ran is not None and isinstance(ran[0], Tensor) and ran[0].shape == x.shape:
        wanted = [(pair[0], haar_from_bands2d, ran[0][:, :, :1]), (pair[1], haar_from_bands3d, ran[0][:, :, 1:])]
        found = _named(wanted, True, argument)
    return found


def _named(wanted: Sequence[tuple[Tensor, Any, Any]], back: bool, argument: str) -> list[Form]:
    names = [
        next((name for name in _JOINED[axes] if haar_layers.same(theirs, transform(given, name))), "")
        for axes, (given, transform, theirs) in zip((2, 3), wanted, strict=True)
    ]
    if not all(names):
        return []
    held = ((True, True), (True, False), (False, True))
    return [FirstFrame(names[0], back, 1, volume=names[1], first=a, rest=b, argument=argument) for a, b in held]


def _made(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    return haar_layers.random(*shape, dtype=haar_layers.dtype_of(module))
