"""The Haar kernels of every backend on outputs that the caller lays out, with all that only some of the ops ask for:
the LL of every level kept and added, absent bands, an image to add."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.contract import FAR, LAYOUTS, Case, image, pairwise, randn, untouched, workspaces_hold_nan
from tests.ops.test_haar import level_sizes
from tests.tolerances import DTYPES, assert_within, haar_bound
from wavemix_kernels.ops.haar import pyramid, reference

NAN = float("nan")
MODE = {0.0: "zero", 1.0: "symmetric", -1.0: "antisymmetric"}
SIZES = (
    ((2, 8, 9, 16), 2), ((1, 3, 13, 7), 3), ((2, 12, 9, 6), 2), ((1, 1, 37, 15), 5), ((1, 4, 16, 16), 4),
    ((1, 1, 1, 1), 2), ((3, 5, 1, 1), 2), ((1, 4, 1, 9), 2), ((2, 1, 11, 1), 1), ((1, 36, 2, 2), 2), ((0, 3, 8, 8), 2),
)  # fmt: skip
#: The interpreter is slow: fewer for Triton.
CASES = {
    backend: pairwise(
        dtype=DTYPES, size=SIZES[::step], edge=tuple(MODE), layout=tuple(LAYOUTS)[::step],
        bands=tuple(LAYOUTS)[::step], add=(False, True), lows=(False, True), absent=("", "first", "last", "all"),
    )
    for backend, step in (("cpu", 1), ("cuda", 1), ("triton", 2))
}  # fmt: skip


def far_case(layout: str, bands: str) -> Case:
    """Two elements along the axis whose stride is huge, or a kernel's words along another."""
    axis = FAR[layout if layout in FAR else bands][0]
    two = 4 if bands in FAR and axis in "hw" else 2  # of the image
    shape = tuple(two if name == axis else size for name, size in zip("nchw", (2, 8, 4, 16), strict=True))
    return Case(dtype=torch.float16, size=(shape, 2), edge=1.0, layout=layout, bands=bands, add=True, lows=True,
                absent="")  # fmt: skip


for backend, cases in CASES.items():
    # Interpreted, a stride counted in words is an int32: images far apart are all that Triton's kernels can show.
    places = FAR if backend != "triton" else ("far", "far_nchw")
    pairs = [pair for far in places for pair in ((far, "nchw"), ("nchw", far))]
    cases += [far_case(*pair) for pair in pairs if pair[0] != "far_bands"]


def peak(tensors: list[Tensor]) -> float:
    return max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0)


def check_outputs(case: Case, backend: str, device: str) -> None:
    """Both transforms, every output within its bound, nothing around it written."""
    shape, levels = case.size
    n, c, *_ = shape
    sizes, mode = [shape[2:], *level_sizes(shape, levels)], MODE[case.edge]
    functions = pyramid.BACKENDS[backend].functions

    def made(shape: tuple[int, ...], layout: str, seed: int | None = None) -> Tensor:
        values = torch.full(shape, NAN) if seed is None else randn(*shape, seed=seed)
        return image(values, case.dtype, device, layout)

    def bands(seed: int | None) -> tuple[list[Tensor], list[Tensor]]:
        seeds = [seed if seed is None else seed + i for i in range(2 * levels)]
        lows = [made((n, c, *size), case.bands, s) for size, s in zip(sizes[1:], seeds, strict=False)]
        return lows, [made((n, c, 3, *size), case.bands, s) for size, s in zip(sizes[1:], seeds[levels:], strict=False)]

    x, (lows, highs) = made(shape, case.layout, 1), bands(None)
    with workspaces_hold_nan():
        functions["analysis"](x, lows[-1], highs, case.edge, lows[:-1] if case.lows else [])
    largest, low = peak([x]), x.double()
    for level in range(1, levels + 1):
        low, (high,) = reference.analysis(low, 1, mode)
        assert_within(highs[level - 1], high, haar_bound(high, case.dtype, level, largest, 1, backend), f"high {level}")
        if level == levels or case.lows:
            assert_within(lows[level - 1], low, haar_bound(low, case.dtype, level, largest, 1, backend), f"low {level}")

    out, (lows_in, highs_in) = made(shape, case.layout), bands(20)
    add = made(shape, case.layout, 99) if case.add else None
    gone = {"": (), "first": (0,), "last": (levels - 1,), "all": range(levels)}[case.absent]
    given = [None if i in gone else high for i, high in enumerate(highs_in)]
    with workspaces_hold_nan():
        functions["synthesis"](out, lows_in[-1], given, case.edge, add, lows_in[:-1] if case.lows else [])
    want = lows_in[-1].double()
    for level in reversed(range(levels)):
        if level < levels - 1 and case.lows:
            want = want + lows_in[level].double()
        high = highs_in[level].double() * (level not in gone)
        want = reference.synthesis(want, [high], sizes[level], mode)
    want = want if add is None else want + add.double()
    largest = (levels if case.lows else 1) * 2 * peak([*lows_in, *highs_in, x])
    assert_within(out, want, haar_bound(want, case.dtype, levels + 1, largest, 1, backend), "image")
    assert all(untouched(t) for t in (out, *highs, lows[-1], *(lows if case.lows else [])))


@pytest.mark.parametrize(
    "backend, case", [(b, case) for b, cases in CASES.items() for case in cases], indirect=["backend"], ids=str
)
def test_outputs_of_any_layout(backend: str, device: str, case: Case) -> None:
    check_outputs(case, backend, device)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_add_may_be_the_output_itself(backend: str, device: str, layout: str) -> None:
    values = [image(randn(1, 4, *shape), device=device, layout=layout) for shape in ((4, 8), (3, 4, 8), (8, 16))]
    ll, high, out = values
    exact = reference.synthesis(ll, [high], (8, 16), add=out)
    pyramid.BACKENDS[backend].functions["synthesis"](out, ll, [high], 0.0, out)
    torch.testing.assert_close(out, exact, rtol=1e-14, atol=1e-14)
