"""The CUDA reduce_haar kernel on host memory against float64: one case per call, numpy only.

Shared by the tests in this process and by the sanitized run:
    python -m tests.emulator.reduce_haar_cases <path of _emulated*.so>
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from tests.emulator.haar_cases import DTYPES, Array, Poisoned, analysis, argument, assert_close, load_core, place

#: The kernels' five kinds of arithmetic: a dtype, or float32 rounded to tf32.
KINDS = (*DTYPES, "tf32")


@dataclass(frozen=True)
class Case:
    kind: str
    levels: int
    shape: tuple[int, int, int, int]
    outputs: int
    x: str = "nchw"  # layouts
    z: str = "nchw"
    weight: str = "nchw"
    bias: bool = True

    @property
    def dtype(self) -> str:
        return "float32" if self.kind == "tf32" else self.kind

    def random(self, *shape: int) -> Array:
        return np.random.default_rng([self.levels, len(shape), *shape]).standard_normal(shape)

    def steps(self, level: int) -> int:
        """Roundings to fp32 (fp64) that an output of `level` has behind it, each of at most the sum of magnitudes."""
        steps = self.shape[1] + 1 + 2 * level
        if self.kind == "float64":
            return 2 * steps  # the reference sums in float64 too
        if self.kind == "float32":
            return steps
        steps *= 2  # tensor cores may cut their sums off instead of rounding them
        return steps + (2**14 if self.kind == "tf32" else 0)  # both factors rounded to 11 bits: 2 * 2^-11


def check(core: ModuleType, case: Case, device: int = 0) -> list[Array]:
    """Runs one case on poisoned outputs, compares all levels, returns them."""
    n, c, h, w = case.shape
    o = case.outputs
    x, x_values = place(case.random(*case.shape), case.x, case.dtype)
    # Weights of unit size: sums grow with c, and cancel.
    weight, weight_values = place(case.random(o, c, 1, 1), case.weight, case.dtype)
    bias, bias_values = place(case.random(o, 1, 1, 1), "nchw", case.dtype)
    zs = [Poisoned((n, 4 * o, h >> level, w >> level), case.z, case.dtype) for level in range(1, case.levels + 1)]
    core.reduce_haar_cuda(
        DTYPES[case.dtype][0], case.levels, case.shape, o, argument(x), argument(weight)[:3],
        argument(bias)[:2] if case.bias else [], [argument(z.view) for z in zs], case.kind == "tf32", device, 0,
    )  # fmt: skip
    flat = weight_values[:, :, 0, 0]
    offset = bias_values.reshape(1, o, 1, 1) * case.bias
    exact = np.einsum("nchw,oc->nohw", x_values, flat) + offset
    size = np.einsum("nchw,oc->nohw", np.abs(x_values), np.abs(flat)) + np.abs(offset)
    got = []
    for level, z in enumerate(zs, 1):
        exact, (high,) = analysis(exact, 1, 0.0)
        size, _ = analysis(size, 1, 0.0)
        values = z.take()
        got.append(values)
        steps = case.steps(level)
        assert_close(f"LL {level}", values[:, :o], exact, size, steps, case.dtype)
        bands = values[:, o:].reshape(high.shape)
        assert_close(f"bands {level}", bands, high, size[:, :, None], steps, case.dtype)
    return got


def cases(kind: str, *, thorough: bool = True) -> Iterator[Case]:
    """Channels, outputs, levels, layouts and edges of tiles for one kind of arithmetic."""
    # The blocks in use: C / 4 outputs, at every depth.
    if thorough:
        for (c, levels), layout in itertools.product(((16, 2), (144, 3), (192, 1), (256, 4)), ("nchw", "nhwc")):
            yield Case(kind, levels, (1, c, 16, 16), c // 4, layout, layout)
    # Edges of tiles in both directions, every shape of tile, several images.
    for levels, size in ((1, (6, 70)), (2, (12, 20)), (3, (24, 40)), (4, (16, 48)), (5, (32, 32))):
        for layout in ("nchw", "nhwc"):
            yield Case(kind, levels, (2, 8, *size), 8, layout, layout, bias=levels % 2 == 0)
    # Channels and outputs that fill neither words nor tiles; more outputs than one block takes.
    for c, o in ((1, 1), (19, 5), (35, 17), (12, 70)) if thorough else ((19, 5), (12, 70)):
        for layout in ("nchw", "nhwc"):
            yield Case(kind, 2, (1, c, 8, 20), o, layout, layout)
    # Every width of access, and mixed layouts.
    mixed = (
        ("nchw", "nhwc"), ("nhwc", "nchw"), ("misaligned", "misaligned"), ("nhwc_misaligned", "nhwc_misaligned"),
        ("sliced", "sliced"), ("transposed", "transposed"), ("padded_rows", "padded_rows"),
    )  # fmt: skip
    for x, z in mixed:
        yield Case(kind, 2, (1, 16, 8, 16), 8, x, z, weight="misaligned" if x == "misaligned" else "nchw")
    yield Case(kind, 1, (1, 16, 8, 18), 4, weight="transposed")
    yield Case(kind, 1, (1, 16, 8, 18), 4, weight="nhwc")
    yield Case(kind, 1, (0, 4, 8, 8), 4)


def main(path: str) -> None:
    core = load_core(path)
    count = 0
    for kind in KINDS:
        for case in cases(kind, thorough=False):
            try:
                check(core, case)
            except Exception:
                print(case, file=sys.stderr, flush=True)
                raise
            count += 1
    print(f"{count} cases passed")


if __name__ == "__main__":
    main(sys.argv[1])
