"""The CUDA reduce_haar kernel on host memory, every element written and none around: one case per call, numpy only.

tests/ops/test_reduce_haar.py proves the values. This is for the sanitized run:
    python -m tests.emulator.reduce_haar_cases <path of _emulated*.so>
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from tests.emulator.haar_cases import DTYPES, Array, Poisoned, argument, load_core, place, run_all

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


def run(core: ModuleType, case: Case) -> None:
    n, c, h, w = case.shape
    o = case.outputs
    x, weight, bias = (
        place(case.random(*shape), layout, case.dtype)[0]
        for shape, layout in ((case.shape, case.x), ((o, c, 1, 1), case.weight), ((o, 1, 1, 1), "nchw"))
    )
    zs = [Poisoned((n, 4 * o, h >> level, w >> level), case.z, case.dtype) for level in range(1, case.levels + 1)]
    core.reduce_haar_cuda(
        DTYPES[case.dtype][0], case.levels, case.shape, o, argument(x), argument(weight)[:3],
        argument(bias)[:2] if case.bias else [], [argument(z.view) for z in zs], case.kind == "tf32", 0, 0,
    )  # fmt: skip
    assert all(np.isfinite(z.take()).all() for z in zs)


def cases(kind: str) -> Iterator[Case]:
    """Channels, outputs, levels, layouts and edges of tiles for one kind of arithmetic."""
    # Edges of tiles in both directions, every shape of tile, several images.
    for levels, size in ((1, (6, 70)), (2, (12, 20)), (3, (24, 40)), (4, (16, 48)), (5, (32, 32))):
        for layout in ("nchw", "nhwc"):
            yield Case(kind, levels, (2, 8, *size), 8, layout, layout, bias=levels % 2 == 0)
    # Channels and outputs that fill neither words nor tiles; more outputs than one block takes.
    for c, o in ((19, 5), (12, 70)):
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


if __name__ == "__main__":
    run_all(load_core(sys.argv[1]), ((run, cases(kind)) for kind in KINDS))
