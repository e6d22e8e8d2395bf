"""The CUDA kernels of phase_aggregate on host memory, all elements written: one case per call, numpy only.

tests/test_cuda_patm.py proves the values. This is for the sanitized run, which must not import torch:
    python -m tests.emulator.phase_cases <path of _emulated*.so>
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from tests.emulator.haar_cases import DTYPES, Array, Poisoned, argument, load_core, place

TAPS = 7


@dataclass(frozen=True)
class Case:
    dtype: str
    shape: tuple[int, int, int, int]
    layout: str = "nhwc"
    weighted: bool = True  # the gradients by a, and that of the third branch
    far: bool = False  # phases beyond the short reduction


def run(core: ModuleType, case: Case) -> list[Array]:
    """Outputs, sums and gradients, as forward, backward and the pass for batch statistics leave them."""
    n, c, h, w = case.shape
    code = DTYPES[case.dtype][0]
    wide = np.dtype(np.float64 if case.dtype == "float64" else np.float32)
    random = np.random.default_rng([n, c, h, w])

    def image(scale: float = 1.0) -> Array:
        return place(scale * random.standard_normal(case.shape), case.layout, case.dtype)[0]

    def vector(*shape: int) -> Array:
        return random.standard_normal(shape).astype(wide)

    def sums(*shape: int) -> Array:
        return np.full(shape, np.nan, wide)

    def address(array: Array) -> int:
        return array.__array_interface__["data"][0]

    images = [(image(), image(1e4 if case.far else 1.0)) for _ in range(2)]
    vectors = [(vector(c), vector(c), vector(c, 2, TAPS)) for _ in range(2)]
    branches = [
        (argument(z), argument(theta), *map(address, of)) for (z, theta), of in zip(images, vectors, strict=True)
    ]
    third, s = image(), sums(n, c)
    outputs = [Poisoned(case.shape, case.layout, case.dtype) for _ in range(2)]
    workspace = sums(core.phase_workspace_cuda(case.shape, False))
    core.phase_forward_cuda(
        code, case.shape, branches, [argument(out.view) for out in outputs], argument(third), address(s),
        address(workspace), 0, 0,
    )  # fmt: skip

    grads = [image() for _ in range(2)]
    d_images = [Poisoned(case.shape, case.layout, case.dtype) for _ in range(5)]
    a, b, center = vector(3, n, c), vector(n, c), vector(2, c)
    d_sums = [(sums(c, 2, TAPS), sums(c), sums(c)) for _ in range(2)]
    workspace = sums(core.phase_workspace_cuda(case.shape, True))
    gradients = [
        (
            argument(grads[i]), address(a[i]) if case.weighted else 0, address(b), address(center[i]),
            argument(d_images[i].view), argument(d_images[2 + i].view), *map(address, d_sums[i]),
        )
        for i in range(2)
    ]  # fmt: skip
    d_c = argument(d_images[4].view) if case.weighted else []
    core.phase_backward_cuda(code, case.shape, branches, gradients, address(a[2]), d_c, address(workspace), 0, 0)
    lines = vector(2, c), vector(2, c)
    core.phase_statistics_cuda(
        code, case.shape, branches, [argument(d.view) for d in d_images[2:4]],
        *([address(line[i]) for i in range(2)] for line in lines), 0, 0,
    )  # fmt: skip
    written = d_images if case.weighted else d_images[:4]
    return [*(out.take() for out in outputs), s, *(d.take() for d in written), *(x for of in d_sums for x in of)]


def cases(dtype: str) -> Iterator[Case]:
    """Whole words and single elements; thin, long and odd images; several blocks, images and segments."""
    shapes = ((2, 8, 7, 9), (1, 6, 3, 21), (3, 4, 1, 1), (1, 16, 2, 61), (9, 72, 3, 2), (0, 4, 3, 3))
    for shape, layout in itertools.product(shapes, ("nhwc", "nhwc_misaligned")):
        yield Case(dtype, shape, layout)
    yield Case(dtype, (2, 8, 7, 9), weighted=False)
    yield Case(dtype, (2, 8, 7, 9), far=True)


def main(path: str) -> None:
    core = load_core(path)
    count = 0
    for dtype in DTYPES:
        for case in cases(dtype):
            try:
                assert all(np.isfinite(values).all() for values in run(core, case))
            except Exception:
                print(case, file=sys.stderr, flush=True)
                raise
            count += 1
    print(f"{count} cases passed")


if __name__ == "__main__":
    main(sys.argv[1])
