"""The CUDA Haar kernels on host memory against a float64 reference: one case per call, numpy only.

Shared by the tests in this process and by the sanitized run, which must not import torch (its libraries are not
built for AddressSanitizer):  python -m tests.emulator.haar_cases <path of _emulated*.so>
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np

Array = np.ndarray

# dtype -> (code in haar.h, storage, its unit roundoff, its smallest subnormal, unit roundoff of the sums)
DTYPES = {
    "float64": (0, np.dtype(np.float64), 2.0**-53, 2.0**-1074, 2.0**-53),
    "float32": (1, np.dtype(np.float32), 2.0**-24, 2.0**-149, 2.0**-24),
    "float16": (2, np.dtype(np.float16), 2.0**-11, 2.0**-24, 2.0**-24),
    "bfloat16": (3, np.dtype(np.uint16), 2.0**-8, 2.0**-133, 2.0**-24),
}
BANDS = 3
LAYOUTS = ("nchw", "nhwc", "misaligned", "nhwc_misaligned", "padded_rows", "sliced", "transposed")


def encode(x: Array, dtype: str) -> Array:
    """`x` in the dtype's storage, rounded to nearest even."""
    if dtype != "bfloat16":
        return x.astype(DTYPES[dtype][1])
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode(x: Array, dtype: str) -> Array:
    if dtype != "bfloat16":
        return x.astype(np.float64)
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


# --- The reference: the formula of one level, in float64 --------------------------------------------------


def halves(size: int, levels: int) -> list[int]:
    return list(itertools.accumulate(range(levels), lambda s, _: -(-s // 2), initial=size))


def analysis(x: Array, levels: int, edge: float) -> tuple[Array, list[Array]]:
    highs = []
    for _ in range(levels):
        for axis in (2, 3):
            if x.shape[axis] % 2:
                x = np.concatenate([x, edge * np.take(x, [-1], axis)], axis)
        a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
        highs.append(np.stack([a + b - c - d, a - b + c - d, a - b - c + d], 2) / 2)
        x = (a + b + c + d) / 2
    return x, highs


def synthesis(
    ll: Array,
    highs: list[Array],
    size: tuple[int, int],
    edge: float,
    signs: float = -1,
    lows: list[Array | float] | None = None,
) -> Array:
    """The adjoint of `analysis`; with signs=+1 and the inputs' magnitudes, a bound of its partial sums.

    `lows[l - 1]` is added to the LL of level l.
    """
    sizes = list(zip(halves(size[0], len(highs)), halves(size[1], len(highs)), strict=True))
    for level in range(len(highs) - 1, -1, -1):
        if lows and level < len(lows):
            ll = ll + lows[level]
        lh, hl, hh = highs[level][:, :, 0], highs[level][:, :, 1], highs[level][:, :, 2]
        n, c, h, w = ll.shape
        x = np.empty((n, c, 2 * h, 2 * w))
        x[..., ::2, ::2] = (ll + lh + hl + hh) / 2
        x[..., ::2, 1::2] = (ll + lh + signs * (hl + hh)) / 2
        x[..., 1::2, ::2] = (ll + hl + signs * (lh + hh)) / 2
        x[..., 1::2, 1::2] = (ll + hh + signs * (lh + hl)) / 2
        for axis, full in zip((2, 3), sizes[level], strict=True):
            if full % 2:
                x, virtual = np.split(x, [full], axis)
                np.moveaxis(x, axis, 0)[-1] += edge * np.moveaxis(virtual, axis, 0)[0]
        ll = x
    return ll


# --- Views ------------------------------------------------------------------------------------------------


def allocate(shape: tuple[int, ...], layout: str, storage: np.dtype) -> tuple[Array, Array]:
    """(whole, view): `view` has `shape` and lies in `whole` as `layout` says; all bytes 0xff, which is NaN.

    `shape` is (n, c, h, w), or (n, c, 3, h, w) for high bands. Whole and view are of one size where the layout
    allows it, so that AddressSanitizer sees one element too far.
    """
    n, c, *bands, h, w = shape
    misaligned = layout.endswith("misaligned")
    if layout.startswith("nhwc"):
        inner: tuple[int, ...] = (n, h, w, c, *bands)
    elif layout == "padded_rows":
        inner = (n, c, *bands, h, w + 32 - w % 16)  # rows stay whole words apart
    elif layout == "sliced":
        inner = (n + 1, c + 2, *bands, 2 * h + 1, 2 * w + 2)
    elif layout == "transposed":
        inner = (n, c, *bands, w, h)
    else:
        inner = shape
    whole = np.full(int(np.prod(inner)) * storage.itemsize + misaligned * storage.itemsize, 0xFF, np.uint8)
    view = whole[misaligned * storage.itemsize :].view(storage).reshape(inner)
    if layout.startswith("nhwc"):
        view = view.transpose((0, 3, 4, 1, 2) if bands else (0, 3, 1, 2))
    elif layout == "padded_rows":
        view = view[..., :w]
    elif layout == "sliced":
        view = view[1:, 1 : 1 + c, ..., 1 : 1 + 2 * h : 2, 2::2]
    elif layout == "transposed":
        view = view.swapaxes(-1, -2)
    assert view.shape == tuple(shape), (layout, view.shape, shape)
    return whole, view


def place(values: Array, layout: str, dtype: str) -> tuple[Array, Array]:
    """`values` rounded to `dtype` in a view of `layout`, and read back as float64."""
    storage = DTYPES[dtype][1]
    _, view = allocate(values.shape, layout, storage)
    view[...] = encode(values, dtype)
    return view, decode(view, dtype)


def argument(view: Array | None) -> list[int]:
    """What the core takes for a tensor: its address and strides in elements."""
    if view is None:
        return []
    return [view.__array_interface__["data"][0], *(s // view.itemsize for s in view.strides)]


class Poisoned:
    """An output view that remembers to check that nothing around it was written."""

    def __init__(self, shape: tuple[int, ...], layout: str, dtype: str) -> None:
        self.dtype = dtype
        self.whole, self.view = allocate(shape, layout, DTYPES[dtype][1])

    def take(self) -> Array:
        values = decode(self.view, self.dtype)
        self.view[...] = np.full((), 0xFF, np.uint8).repeat(self.view.itemsize).view(self.view.dtype)[0]
        if (self.whole != 0xFF).any():
            raise AssertionError("elements outside the output view were written")
        return values


# --- Cases ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    dtype: str
    levels: int
    shape: tuple[int, int, int, int]
    edge: float = 0.0
    image: str = "nchw"  # layouts
    bands: str = "nchw"
    add: str | None = None
    null: tuple[int, ...] = ()  # synthesis: levels whose high bands are absent
    low: str | None = None  # layout of the LL of the levels above the last, where it is kept
    no_low: tuple[int, ...] = ()  # but not of these levels

    def sizes(self) -> list[tuple[int, int]]:
        return list(zip(halves(self.shape[2], self.levels), halves(self.shape[3], self.levels), strict=True))

    def low_levels(self) -> list[int]:
        """Levels above the last, from 1; of `no_low` only the place is kept."""
        return list(range(1, self.levels)) if self.low else []

    def random(self, *shape: int) -> Array:
        seed = [self.levels, *self.shape, len(shape), *shape]
        return np.random.default_rng(seed).standard_normal(shape)


def assert_close(name: str, got: Array, expected: Array, bound: Array, steps: int, dtype: str) -> None:
    """|got - expected| is within `steps` roundings of sums below `bound` and one rounding of the result."""
    _, _, storage_unit, subnormal, sum_unit = DTYPES[dtype]
    sums = steps * sum_unit * bound * (1 + 2.0**-8)  # the factor covers the second-order terms
    error, allowed = np.abs(got - expected), sums + storage_unit * (np.abs(expected) + sums) + subnormal
    good = error <= allowed  # false for NaN
    if not good.all():
        worst = tuple(int(i) for i in np.argwhere(~good)[0])
        raise AssertionError(
            f"{name}: {np.count_nonzero(~good)} of {good.size} wrong, first at {worst}: "
            f"got {got[worst]!r}, expected {expected[worst]!r}, allowed error {allowed[worst]!r}"
        )


# Per level: two sums along the columns, two along the rows, and the reference's own two.
STEPS_PER_LEVEL = 6


def check_analysis(core: ModuleType, case: Case, device: int = 0) -> list[Array]:
    n, c, _, _ = case.shape
    image, x = place(case.random(*case.shape), case.image, case.dtype)
    sizes = case.sizes()
    ll = Poisoned((n, c, *sizes[-1]), case.bands, case.dtype)
    highs = [Poisoned((n, c, BANDS, *size), case.bands, case.dtype) for size in sizes[1:]]
    lows = {
        level: Poisoned((n, c, *sizes[level]), case.low or "", case.dtype)
        for level in case.low_levels()
        if level not in case.no_low
    }
    code = DTYPES[case.dtype][0]
    core.haar_analysis_cuda(
        code, case.levels, case.shape, case.edge, argument(image), argument(ll.view),
        [argument(high.view) for high in highs], device, 0,
        [argument(lows[level].view if level in lows else None) for level in case.low_levels()],
    )  # fmt: skip
    got = [ll.take(), *(high.take() for high in highs)]
    expected_ll, expected_highs = analysis(x, case.levels, case.edge)
    bounds = [analysis(np.abs(x), level, abs(case.edge))[0] for level in range(1, case.levels + 1)]
    steps = STEPS_PER_LEVEL * case.levels
    assert_close("ll", got[0], expected_ll, bounds[-1], steps, case.dtype)
    for level, (high, expected) in enumerate(zip(got[1:], expected_highs, strict=True), 1):
        assert_close(f"high {level}", high, expected, bounds[level - 1][:, :, None], steps, case.dtype)
    for level, low in lows.items():
        expected = analysis(x, level, case.edge)[0]
        assert_close(f"low {level}", low.take(), expected, bounds[level - 1], steps, case.dtype)
    return got


def check_synthesis(core: ModuleType, case: Case, device: int = 0) -> Array:
    n, c, h, w = case.shape
    sizes = case.sizes()
    ll, ll_values = place(case.random(n, c, *sizes[-1]), case.bands, case.dtype)
    highs: list[Array | None] = []
    high_values = []
    for level, size in enumerate(sizes[1:], 1):
        view, values = place(case.random(n, c, BANDS, *size), case.bands, case.dtype)
        absent = level in case.null
        highs.append(None if absent else view)
        high_values.append(np.zeros_like(values) if absent else values)
    add: Array | None = None
    add_values: Array | float = 0.0
    if case.add:
        add, add_values = place(case.random(n, c, h, w, 1)[..., 0], case.add, case.dtype)
    low_arguments: list[list[int]] = []
    low_values: list[Array | float] = []
    kept = []  # alive until the launch
    for level in case.low_levels():
        if level in case.no_low:
            low_arguments.append(argument(None))
            low_values.append(0.0)
            continue
        view, values = place(case.random(n, c, *sizes[level], 1)[..., 0], case.low or "", case.dtype)
        kept.append(view)
        low_arguments.append(argument(view))
        low_values.append(values)
    image = Poisoned(case.shape, case.image, case.dtype)
    code = DTYPES[case.dtype][0]
    core.haar_synthesis_cuda(
        code, case.levels, case.shape, case.edge, argument(image.view), argument(add), argument(ll),
        [argument(high) for high in highs], device, 0, low_arguments,
    )  # fmt: skip
    got = image.take()
    expected = synthesis(ll_values, high_values, (h, w), case.edge, lows=low_values) + add_values
    high_sizes, low_sizes = [np.abs(values) for values in high_values], [np.abs(values) for values in low_values]
    bound = synthesis(np.abs(ll_values), high_sizes, (h, w), abs(case.edge), 1, low_sizes) + np.abs(add_values)
    assert_close("image", got, expected, bound, (STEPS_PER_LEVEL + 1) * case.levels + 1, case.dtype)
    return got


def cases(dtype: str, levels: int, *, thorough: bool = True) -> Iterator[Case]:
    """Shapes by layouts by edges for one instantiation of the kernels."""
    # Whole 16-byte words of columns and of channels in every type; rows odd at the first or a later level.
    wide = (2, 8, 37, 48)
    for image, bands in (("nchw", "nchw"), ("nhwc", "nhwc"), ("padded_rows", "padded_rows"), ("nchw", "nhwc")):
        for edge in (0.0, 1.0, -1.0):
            yield Case(dtype, levels, wide, edge, image, bands)
    for layout in LAYOUTS:
        for edge in (0.0, 1.0, -1.0) if thorough else (-1.0,):
            yield Case(dtype, levels, (1, 3, 29, 31), edge, layout, layout)
    mixed = (("sliced", "nhwc"), ("nhwc", "nchw"), ("nchw", "misaligned"), ("nhwc", "nhwc_misaligned"))
    for image, bands in mixed:
        yield Case(dtype, levels, (2, 8, 16, 32), 1.0, image, bands)
    if levels > 1:  # the LL of every level, as a Waveblock wants it, and of all but one
        for layout in ("nchw", "nhwc", "sliced") if thorough else ("nchw", "nhwc"):
            yield Case(dtype, levels, (1, 8, 37, 48), 1.0, layout, layout, low=layout)
        yield Case(dtype, levels, (1, 8, 16, 32), 0.0, "nchw", "nchw", low="misaligned")
        yield Case(dtype, levels, (1, 8, 16, 32), 0.0, "nhwc", "nhwc", low="nhwc", no_low=(levels - 1,))
    thin = ((1, 1, 1, 1), (2, 3, 1, 1), (1, 1, 1, 67), (1, 2, 67, 1), (3, 1, 33, 2))
    for shape in (*thin, (2, 16, 5, 7), (0, 3, 4, 4)):
        for layout in ("nchw", "nhwc"):
            for edge in (0.0, 1.0, -1.0) if thorough else (1.0,):
                yield Case(dtype, levels, shape, edge, layout, layout)


def synthesis_cases(dtype: str, levels: int, *, thorough: bool = True) -> Iterator[Case]:
    """The same, and the addend and absent high bands that only synthesis has."""
    yield from cases(dtype, levels, thorough=thorough)
    shapes = (((2, 8, 35, 48), "nchw"), ((2, 8, 19, 21), "nhwc"), ((1, 3, 17, 19), "sliced"))
    for shape, layout in shapes:
        yield Case(dtype, levels, shape, -1.0, layout, layout, add=layout)
        yield Case(dtype, levels, shape, 1.0, layout, layout, add="misaligned", null=(1,))
        yield Case(dtype, levels, shape, 0.0, layout, layout, null=tuple(range(1, levels + 1)))
        yield Case(dtype, levels, shape, 1.0, layout, layout, null=(levels,))


def launches(core: ModuleType) -> list[str]:
    """The emulated launches since the last call, by name."""
    ask = ctypes.CDLL(core.__file__).wavemix_emulator_launches
    ask.restype = ctypes.c_char_p
    return ask().decode().splitlines()


def load_core(path: str) -> ModuleType:
    """The emulated core from its file, without the package (which imports torch)."""
    spec = importlib.util.spec_from_file_location("_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    return core


def main(path: str) -> None:
    core = load_core(path)
    count = 0
    for dtype, levels in itertools.product(DTYPES, range(1, core.MAX_HAAR_LEVELS + 1)):
        for check, some in ((check_analysis, cases), (check_synthesis, synthesis_cases)):
            for case in some(dtype, levels, thorough=False):
                try:
                    check(core, case)
                except Exception:
                    print(f"{check.__name__}: {case}", file=sys.stderr, flush=True)
                    raise
                count += 1
    print(f"{count} cases passed")


if __name__ == "__main__":
    main(sys.argv[1])
