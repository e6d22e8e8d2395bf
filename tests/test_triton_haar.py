"""The Triton Haar kernels themselves: tiles, layouts and preallocated outputs (tests/test_haar.py has the op)."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from tests.tolerances import DTYPES, UNIT_ROUNDOFF, assert_within, haar_bound
from wavemix_kernels.ops.haar import reference, tiles
from wavemix_kernels.ops.haar.tiles import TileConfig

pytest.importorskip("triton", reason="Triton is not installed: pip install wavemix-kernels[triton]")

from tests.kernels.triton import search_spaces  # imports triton
from wavemix_kernels.ops.haar import triton_plan
from wavemix_kernels.ops.haar.triton_analysis import analysis
from wavemix_kernels.ops.haar.triton_synthesis import synthesis

MODE = {0: "zero", 1: "symmetric", -1: "antisymmetric"}
#: Memory orders of (n, c, h, w) and (n, c, band, h, w), slowest first.
ORDERS = {"rows": ((0, 1, 2, 3), (0, 1, 2, 3, 4)), "channels": ((0, 2, 3, 1), (0, 3, 4, 1, 2))}


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: str, memory: str) -> Tensor:
    """A NaN-filled tensor: dense in `rows` or `channels` order, or a view, `strided` or `cropped`."""
    nan = float("nan")
    if memory == "strided":
        *outer, h, w = shape
        return torch.full((*outer, h + 2, 2 * w + 1), nan, dtype=dtype, device=device)[..., 1 : h + 1, 1 : 2 * w : 2]
    if memory == "cropped":  # unit stride along w, nothing aligned
        *outer, h, w = shape
        return torch.full((*outer, h + 2, w + 3), nan, dtype=dtype, device=device)[..., 1 : h + 1, 1 : w + 1]
    order = ORDERS[memory][len(shape) - 4]
    dense = torch.full([shape[axis] for axis in order], nan, dtype=dtype, device=device)
    return dense.permute([order.index(axis) for axis in range(len(shape))])


class Case:
    """Random input, poisoned outputs and the float64 truth of one shape."""

    def __init__(
        self, shape: tuple[int, int, int, int], levels: int, dtype: torch.dtype, device: str, memory: str, edge: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(levels)

        def like(shape: tuple[int, ...]) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            return allocate(shape, dtype, device, memory).copy_(values)

        self.levels, self.dtype, self.edge, self.shape = levels, dtype, edge, shape
        bands = [triton_plan.band_shape(shape, level) for level in range(1, levels + 1)]
        low = (*shape[:2], *bands[-1][3:])
        self.x, self.ll_in, self.highs_in = like(shape), like(low), [like(band) for band in bands]
        self.add = like(shape)
        self.out = allocate(shape, dtype, device, memory)
        self.ll = allocate(low, dtype, device, memory)
        self.highs = [allocate(band, dtype, device, memory) for band in bands]

    def bound(self, exact: Tensor, inputs: list[Tensor]) -> Tensor:
        peak = max([float(t.abs().max()) for t in inputs if t.numel()], default=0.0)
        allowed = haar_bound(exact, self.dtype, self.levels, peak)
        if self.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
            # Triton's interpreter truncates fp32 to bf16 where a GPU rounds: twice the error of a rounding.
            allowed = allowed + UNIT_ROUNDOFF[torch.bfloat16] * exact.abs()
        return allowed

    def check_analysis(self, config: TileConfig | None = None) -> None:
        analysis(self.x, self.ll, self.highs, levels=self.levels, edge=self.edge, config=config)
        ll, highs = reference.analysis(self.x.double(), self.levels, MODE[self.edge])
        for name, got, exact in [("ll", self.ll, ll), *zip(("high",) * self.levels, self.highs, highs, strict=True)]:
            assert_within(got, exact, self.bound(exact, [self.x]), f"{name} {tuple(exact.shape)} {config}")

    def check_synthesis(
        self, config: TileConfig | None = None, add: bool = False, without: tuple[int, ...] = ()
    ) -> None:
        given = [None if i in without else high for i, high in enumerate(self.highs_in)]
        extra = self.add if add else None
        synthesis(self.out, self.ll_in, given, levels=self.levels, edge=self.edge, add=extra, config=config)
        zeroed = [high.double() if i not in without else torch.zeros_like(high, dtype=torch.float64)
                  for i, high in enumerate(self.highs_in)]  # fmt: skip
        exact = reference.synthesis(
            self.ll_in.double(), zeroed, self.shape[2:], MODE[self.edge], self.add.double() if add else None
        )
        inputs = [self.ll_in, *self.highs_in, self.add]
        assert_within(self.out, exact, self.bound(exact, inputs), f"image {config}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory", ["rows", "channels", "strided", "cropped"])
@pytest.mark.parametrize(
    "shape, levels, edge",
    [
        ((1, 8, 16, 16), 1, 0),
        ((1, 3, 13, 7), 3, 1),
        ((2, 12, 9, 6), 2, -1),
        ((1, 1, 37, 31), 5, 1),
        ((1, 4, 16, 16), 4, 0),
    ],
)
def test_against_reference(
    shape: tuple[int, int, int, int], levels: int, edge: int, memory: str, dtype: torch.dtype, device: str
) -> None:
    case = Case(shape, levels, dtype, device, memory, edge)
    case.check_analysis()
    case.check_synthesis(add=levels % 2 == 0)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 1, 1), (1, 4, 1, 9), (2, 1, 11, 1), (1, 36, 2, 2)])
@pytest.mark.parametrize("edge", [0, 1, -1])
@pytest.mark.parametrize("memory", ["rows", "channels"])
def test_thin_images(shape: tuple[int, int, int, int], edge: int, memory: str, device: str) -> None:
    case = Case(shape, 2, torch.float64, device, memory, edge)
    case.check_analysis()
    case.check_synthesis()


@pytest.mark.parametrize("levels", range(1, tiles.MAX_LEVELS + 1))
@pytest.mark.parametrize("layout", ["rows", "channels"])
def test_every_tile(layout: str, levels: int, device: str) -> None:
    configs = {(c.rows, c.cols, c.planes): c for c in search_spaces.haar(layout, levels, 2)}
    assert configs, f"no tile to try for {layout}, {levels} levels"
    for rows, cols, planes in configs:
        # Ends inside the tile in rows, just past it in columns or planes: two programs, and planes straddle images.
        shape = (2, planes // 2 + 1, rows - 1, cols - 2) if planes > 1 else (1, 1, rows - 1, cols + 4)
        case = Case(shape, levels, torch.float16, device, layout, edge=1)
        case.check_analysis(configs[rows, cols, planes])
        case.check_synthesis(configs[rows, cols, planes])


@pytest.mark.parametrize("memory", ["rows", "channels"])
@pytest.mark.parametrize("without", [(0,), (1, 2), (0, 1, 2)])
def test_missing_levels_are_zeros(without: tuple[int, ...], memory: str, device: str) -> None:
    Case((1, 8, 13, 24), 3, torch.float32, device, memory, edge=-1).check_synthesis(without=without, add=True)


def test_add_may_be_the_output_itself(device: str) -> None:
    case = Case((1, 4, 8, 16), 1, torch.float64, device, "rows")
    case.out.copy_(case.add)
    synthesis(case.out, case.ll_in, case.highs_in, levels=1, add=case.out)
    exact = reference.synthesis(case.ll_in, case.highs_in, (8, 16), add=case.add)
    torch.testing.assert_close(case.out, exact, rtol=1e-14, atol=1e-14)


def test_mixed_layouts(device: str) -> None:
    """Image channels-last, bands row-major: no common innermost dimension, still right."""
    case = Case((2, 8, 10, 12), 2, torch.float32, device, "rows", edge=1)
    case.x = case.x.contiguous(memory_format=torch.channels_last)
    case.check_analysis()
    case.out = case.out.contiguous(memory_format=torch.channels_last)
    case.check_synthesis(add=True)


def test_expanded_input(device: str) -> None:
    case = Case((3, 8, 9, 16), 2, torch.float32, device, "rows")
    case.x = case.x[:1, :, :1].expand(3, 8, 9, 16)
    case.check_analysis()


@pytest.mark.parametrize("edge", [0, 1, -1])
@pytest.mark.parametrize("memory", ["rows", "channels"])
def test_adjoint(edge: int, memory: str, device: str) -> None:
    """<analysis(x), y> = <x, synthesis(y)>"""
    case = Case((2, 4, 11, 21), 3, torch.float64, device, memory, edge)
    case.check_analysis()
    case.check_synthesis()
    left = (case.ll * case.ll_in).sum() + sum((a * b).sum() for a, b in zip(case.highs, case.highs_in, strict=True))
    torch.testing.assert_close(left, (case.x * case.out).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8), (2, 3, 0, 8)])
def test_empty(shape: tuple[int, int, int, int], device: str) -> None:
    case = Case(shape, 2, torch.float32, device, "rows")
    case.check_analysis()
    case.check_synthesis(add=True)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"levels": 6}, ValueError, "levels=6"),
        ({"edge": 2}, ValueError, "edge=2"),
        ({"image": torch.zeros(1, 2, 8, 8, dtype=torch.int32)}, TypeError, "image.dtype=torch.int32"),
        ({"image": torch.zeros(2, 8, 8)}, ValueError, r"image.shape=\(2, 8, 8\)"),
        ({"ll": torch.zeros(1, 2, 4, 5)}, ValueError, r"ll.shape=\(1, 2, 4, 5\): must be \(1, 2, 4, 4\)"),
        ({"highs": []}, ValueError, "highs: 0 levels"),
        ({"highs": [torch.zeros(1, 2, 4, 4, 3)]}, ValueError, r"highs\[0\].shape"),
        ({"ll": torch.zeros(1, 2, 4, 4, dtype=torch.float16)}, TypeError, "ll is torch.float16"),
        ({"config": TileConfig(2, 24, 1, 4)}, ValueError, "cols=24 must be a power of two"),
        ({"config": TileConfig(1, 32, 1, 4)}, ValueError, "rows=1, cols=32 must hold a whole block"),
        ({"config": TileConfig(256, 256, 1, 4)}, ValueError, "more warps or a smaller tile"),
    ],
)
def test_errors_name_argument_and_value(change: dict[str, object], error: type[Exception], words: str) -> None:
    arguments: dict[str, object] = {
        "image": torch.zeros(1, 2, 8, 8), "ll": torch.zeros(1, 2, 4, 4), "highs": [torch.zeros(1, 2, 3, 4, 4)],
        "levels": 1, "edge": 0,
    }  # fmt: skip
    with pytest.raises(error, match=words):
        analysis(**{**arguments, **change})


@pytest.mark.parametrize("layout", tiles.LAYOUTS)
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_default_tiles_are_legal(layout: str, itemsize: int) -> None:
    shapes = [(1, 1, 1, 1), (64, 192, 64, 64), (1, 3, 1080, 1920), (256, 512, 7, 7), (2, 36, 56, 56), (1, 1, 3, 100000)]
    for shape in shapes:
        for levels in range(1, tiles.MAX_LEVELS + 1):
            config = tiles.config_for(layout, levels, itemsize, shape)
            assert tiles.why_invalid(config, levels, itemsize) is None, (shape, levels)
            assert config == tiles.config_for(layout, levels, itemsize, shape)


def test_alignment_follows_from_sizes_and_strides() -> None:
    def plan(shape: tuple[int, int, int, int], strides: tuple[int, ...], low: tuple[int, ...], high: tuple[int, ...]):
        return triton_plan.plan(torch.float16, shape, strides, None, low, (high,), 0, False)

    dense = plan((2, 3, 8, 64), (1536, 512, 64, 1), (384, 128, 32, 1), (1152, 384, 128, 32, 1))
    assert (dense.layout, dense.align) == ("rows", 16)  # 8 halves a vector, in the image and at level 1
    pitched = plan((2, 3, 8, 64), (1632, 544, 68, 1), (384, 128, 32, 1), (1152, 384, 128, 32, 1))
    assert (pitched.layout, pitched.align) == ("rows", 4)
    last = plan((2, 36, 8, 8), (2304, 1, 288, 36), (576, 1, 144, 36), (1728, 3, 1, 432, 108))
    assert (last.layout, last.align) == ("channels", 4)
    mixed = plan((2, 36, 8, 8), (2304, 1, 288, 36), (576, 16, 4, 1), (1728, 48, 16, 4, 1))
    assert (mixed.layout, mixed.align) == ("strided", 1)
