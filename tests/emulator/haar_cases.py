"""The CUDA Haar kernels on host memory, every element written and none around: one case per call, numpy only.

tests/ops/test_haar.py proves the values. This is for the sanitized run, which must not import torch (its libraries are
not built for AddressSanitizer):  python -m tests.emulator.haar_cases <path of _emulated*.so>
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

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


def halves(size: int, levels: int) -> list[int]:
    return list(itertools.accumulate(range(levels), lambda s, _: -(-s // 2), initial=size))


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


def run_analysis(core: ModuleType, case: Case) -> None:
    n, c, _, _ = case.shape
    image, _ = place(case.random(*case.shape), case.image, case.dtype)
    sizes = case.sizes()
    ll = Poisoned((n, c, *sizes[-1]), case.bands, case.dtype)
    highs = [Poisoned((n, c, BANDS, *size), case.bands, case.dtype) for size in sizes[1:]]
    lows = [
        None if level in case.no_low else Poisoned((n, c, *sizes[level]), case.low or "", case.dtype)
        for level in case.low_levels()
    ]
    core.haar_analysis_cuda(
        DTYPES[case.dtype][0], case.levels, case.shape, case.edge, argument(image), argument(ll.view),
        [argument(high.view) for high in highs], 0, 0, [argument(low and low.view) for low in lows],
    )  # fmt: skip
    for written in (ll, *highs, *lows):
        assert written is None or np.isfinite(written.take()).all()


def run_synthesis(core: ModuleType, case: Case) -> None:
    n, c, h, w = case.shape
    sizes = case.sizes()
    ll, _ = place(case.random(n, c, *sizes[-1]), case.bands, case.dtype)
    highs = [
        None if level in case.null else place(case.random(n, c, BANDS, *size), case.bands, case.dtype)[0]
        for level, size in enumerate(sizes[1:], 1)
    ]
    add = place(case.random(n, c, h, w), case.add, case.dtype)[0] if case.add else None
    lows = [
        None if level in case.no_low else place(case.random(n, c, *sizes[level]), case.low or "", case.dtype)[0]
        for level in case.low_levels()
    ]
    image = Poisoned(case.shape, case.image, case.dtype)
    core.haar_synthesis_cuda(
        DTYPES[case.dtype][0], case.levels, case.shape, case.edge, argument(image.view), argument(add), argument(ll),
        [argument(high) for high in highs], 0, 0, [argument(low) for low in lows],
    )  # fmt: skip
    assert np.isfinite(image.take()).all()


def cases(dtype: str, levels: int) -> Iterator[Case]:
    """Shapes by layouts by edges for one instantiation of the kernels."""
    # Whole 16-byte words of columns and of channels in every type; rows odd at the first or a later level.
    for image, bands in (("nchw", "nchw"), ("nhwc", "nhwc"), ("padded_rows", "padded_rows"), ("nchw", "nhwc")):
        for edge in (0.0, 1.0, -1.0):
            yield Case(dtype, levels, (2, 8, 37, 48), edge, image, bands)
    for layout in LAYOUTS:
        yield Case(dtype, levels, (1, 3, 29, 31), -1.0, layout, layout)
    for image, bands in (("sliced", "nhwc"), ("nhwc", "nchw"), ("nchw", "misaligned"), ("nhwc", "nhwc_misaligned")):
        yield Case(dtype, levels, (2, 8, 16, 32), 1.0, image, bands)
    if levels > 1:  # the LL of every level, as a Waveblock wants it, and of all but one
        for layout in ("nchw", "nhwc"):
            yield Case(dtype, levels, (1, 8, 37, 48), 1.0, layout, layout, low=layout)
        yield Case(dtype, levels, (1, 8, 16, 32), 0.0, "nchw", "nchw", low="misaligned")
        yield Case(dtype, levels, (1, 8, 16, 32), 0.0, "nhwc", "nhwc", low="nhwc", no_low=(levels - 1,))
    for shape in ((1, 1, 1, 1), (2, 3, 1, 1), (1, 1, 1, 67), (1, 2, 67, 1), (3, 1, 33, 2), (2, 16, 5, 7), (0, 3, 4, 4)):
        for layout in ("nchw", "nhwc"):
            yield Case(dtype, levels, shape, 1.0, layout, layout)


def synthesis_cases(dtype: str, levels: int) -> Iterator[Case]:
    """The same, and the addend and absent high bands that only synthesis has."""
    yield from cases(dtype, levels)
    for shape, layout in (((2, 8, 35, 48), "nchw"), ((2, 8, 19, 21), "nhwc"), ((1, 3, 17, 19), "sliced")):
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


def run_all(core: ModuleType, runs: Iterable[tuple[Callable[[ModuleType, Any], object], Iterable[Any]]]) -> None:
    """Runs the cases and prints how many there were; the one that fails is named."""
    count = 0
    for run, cases in runs:
        for case in cases:
            try:
                run(core, case)
            except Exception:
                print(f"{run.__name__}: {case}", file=sys.stderr, flush=True)
                raise
            count += 1
    print(f"{count} cases passed")


def all_runs(core: ModuleType) -> Iterator[tuple[Callable[[ModuleType, Case], None], Iterator[Case]]]:
    for dtype, levels in itertools.product(DTYPES, range(1, core.MAX_HAAR_LEVELS + 1)):
        yield run_analysis, cases(dtype, levels)
        yield run_synthesis, synthesis_cases(dtype, levels)


if __name__ == "__main__":
    loaded = load_core(sys.argv[1])
    run_all(loaded, all_runs(loaded))
