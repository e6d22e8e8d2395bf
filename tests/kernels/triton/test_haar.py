"""The Triton Haar kernels' plans and errors (tests/kernels/test_haar_outputs.py runs them)."""

from __future__ import annotations

import pytest
import torch

from wavemix_kernels.ops.haar import tiles
from wavemix_kernels.ops.haar.tiles import TileConfig

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from wavemix_kernels.ops.haar import triton_analysis, triton_plan, triton_synthesis  # they import triton

LL = torch.zeros(1, 2, 2, 2)
TWO_LEVELS = {"levels": 2, "ll": LL, "highs": [torch.zeros(1, 2, 3, n, n) for n in (4, 2)]}


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
        ({**TWO_LEVELS, "lows": [LL, LL]}, ValueError, "lows: 2 for levels=2"),
        ({**TWO_LEVELS, "lows": [LL]}, ValueError, r"lows\[0\].shape=\(1, 2, 2, 2\): must be \(1, 2, 4, 4\)"),
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
    for run in (triton_analysis.analysis, triton_synthesis.synthesis):
        with pytest.raises(error, match=words):
            run(**{**arguments, **change})


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

    for expected, made in (
        (("rows", 16), plan((2, 3, 8, 64), (1536, 512, 64, 1), (384, 128, 32, 1), (1152, 384, 128, 32, 1))),
        (("rows", 4), plan((2, 3, 8, 64), (1632, 544, 68, 1), (384, 128, 32, 1), (1152, 384, 128, 32, 1))),  # pitched
        (("channels", 4), plan((2, 36, 8, 8), (2304, 1, 288, 36), (576, 1, 144, 36), (1728, 3, 1, 432, 108))),
        (("strided", 1), plan((2, 36, 8, 8), (2304, 1, 288, 36), (576, 16, 4, 1), (1728, 48, 16, 4, 1))),
    ):
        assert (made.layout, made.align) == expected
