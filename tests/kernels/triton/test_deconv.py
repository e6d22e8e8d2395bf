"""The Triton kernels of the transposed convolution below their ops: one launch for both gradients, statistics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.contract import image, randn, workspaces_hold_nan
from tests.tolerances import UNIT_ROUNDOFF, assert_within

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from wavemix_kernels.ops.deconv import tiles as deconv_config
from wavemix_kernels.ops.deconv import triton as kernels
from wavemix_kernels.ops.deconv import triton_backward as deconv_backward
from wavemix_kernels.ops.norm import triton_finish as finish

NAN, U32 = float("nan"), UNIT_ROUNDOFF[torch.float32]


@pytest.fixture(autouse=True)
def poisoned_workspaces() -> Iterator[None]:
    with workspaces_hold_nan():
        yield


class Run:
    """Tensors of one shape, and what kernels make of them in memory of the same layout."""

    def __init__(self, size: tuple[int, ...], dtype: torch.dtype, device: str, memory: str) -> None:
        n, f, o, h, w = size
        self.image = lambda values: image(values, dtype, device, memory)
        self.u, self.g = self.image(randn(n, f, h, w)), self.image(randn(n, o, 2 * h, 2 * w, seed=1))
        self.weight, self.bias = (randn(f, o, 4, 4) / (4 * f) ** 0.5).to(device, dtype), randn(o).to(device, dtype)
        y, parts = self.image(randn(*self.g.shape, seed=2) + 1), (randn(o, seed=s).to(device).float() for s in range(4))
        self.norm = deconv_backward.Norm(y, *parts)

    def empty(self, like: Tensor) -> Tensor:
        return self.image(torch.full(like.shape, NAN))

    def forward(self) -> Tensor:
        y = self.empty(self.g)
        kernels.forward(y, self.u, self.weight, self.bias)
        return y

    def backward_x(self, config: Any = None) -> Tensor:
        du = self.empty(self.u)
        deconv_backward.backward_x(du, self.g, self.norm, self.weight, config)
        return du

    def backward_weight(self) -> tuple[Tensor, Tensor]:
        dw, db = torch.full_like(self.weight, NAN), torch.full_like(self.bias, NAN)
        deconv_backward.backward_weight(dw, db, self.g, self.norm, self.u, None)
        return dw, db

    def norm_backward(self, configs: Any = (None, None), least: int | None = None) -> tuple[Tensor, Tensor]:
        du, dw = self.empty(self.u), torch.full_like(self.weight, NAN)
        deconv_backward.norm_backward(du, dw, self.g, self.norm, self.u, self.weight, configs, least)
        return du, dw


@pytest.mark.parametrize("size", [(2, 8, 16, 2, 3), (1, 20, 12, 5, 7)], ids=str)
def test_weights_in_channels_last_are_read_as_they_lie(size: tuple[int, ...], device: str) -> None:
    case = Run(size, torch.float32, device, "channels_last")
    y = case.forward()
    case.weight = case.weight.contiguous(memory_format=torch.channels_last)
    launch, _ = kernels.forward_launch(case.empty(case.g), case.u, case.weight, case.bias, False)
    assert any(isinstance(t, Tensor) and t.data_ptr() == case.weight.data_ptr() for t in launch.args), "a copy"
    assert torch.equal(case.forward(), y)


def test_bias_gradient_behind_a_norm(device: str) -> None:
    """Pixels beyond the image's edge, where the norm makes something of zeros, count for nothing."""
    case = Run((2, 8, 48, 5, 7), torch.float32, device, "channels_slice")
    _, got = case.backward_weight()
    a, b, mean, d = (t.cpu().double()[:, None, None] for t in case.norm[1:])
    g, y = case.g.cpu().double(), case.norm.y.cpu().double()
    exact = (a * g + b * (y - mean) + d).sum((0, 2, 3))
    size = ((a * g).abs() + b.abs() * (y.abs() + mean.abs()) + d.abs()).sum((0, 2, 3))
    assert_within(got, exact, (4 + 4 * case.u[:, 0].numel()) * U32 * size, "db")


# Input pixels in runs of 16 (or 64) by blocks of 16 (or 32) channels, the weight's patches of 2 x 8.
SMALL, WIDE = deconv_config.DeconvConfig(16, 16, 16, 4, 2), deconv_config.DeconvConfig(64, 64, 16, 4, 2)


# 5: of 2, 2, 2, 2 and 1 patches, and 3, 3, 3, 3 and 2 of the input's programs; 9: most without a program of the input's
@pytest.mark.parametrize("config, least, splits", [(SMALL, 5, 5), (WIDE, 1, 3), (WIDE, 100, 9)])
def test_gradients_of_one_launch(config: Any, least: int, splits: int, device: str) -> None:
    """Bit for bit those of two, in tiles of the input's own (tests/ops/test_deconv.py has their values)."""
    case = Run((3, 20, 12, 5, 7), torch.float32, device, "channels_slice")
    launch, partial, _ = deconv_backward.backward_weight_launch(case.g, case.norm, case.u, False, WIDE, least)
    launch.run(case.u)
    assert partial.shape[0] == splits
    dw = torch.full_like(case.weight, NAN)
    deconv_backward.reduce_launch(dw, partial).run(case.u)
    du, dw_beside = case.norm_backward((config, WIDE), least)
    assert torch.equal(du, case.backward_x(config))
    assert torch.equal(dw_beside, dw)


def test_programs_of_the_same_pixels_are_neighbours(device: str) -> None:
    """Programs at the start of the launch serve 3 patches of 16 pixels each split, or the 1 that is left."""
    case = Run((5, 8, 12, 4, 8), torch.float32, device, "channels_last")
    du = case.empty(case.u)
    tensors = du, case.g, case.norm, case.u, case.weight
    launch, partial = deconv_backward.norm_backward_launch(*tensors, (SMALL, SMALL), 4)
    assert partial.shape[0] == 4
    for splits in (1, 3, 4):
        du.fill_(NAN)
        partial.fill_(NAN)
        launch._replace(grid=(launch.grid[0] // 4 * splits,)).run(du)
        there = torch.arange(5 * 4 * 8, device=device) < 3 * 16 * splits
        assert torch.equal(~du.isnan(), there.view(5, 1, 4, 8).expand_as(du))
        assert not partial[:splits].isnan().any()
        assert partial[splits:].isnan().all()


@pytest.mark.parametrize("n, splits", [(64, 11), (256, 32)])
def test_splits_stay_in_the_cache(n: int, splits: int) -> None:
    u, g = (torch.empty(n, 192, s, s, dtype=torch.float16, device="meta") for s in (32, 64))
    u, g = (t.to(memory_format=torch.channels_last) for t in (u, g))
    weight = torch.empty(192, 192, 4, 4, dtype=torch.float16, device="meta")
    norm = deconv_backward.Norm(g, *(torch.empty(192, device="meta"),) * 4)
    _, partial = deconv_backward.norm_backward_launch(u, g, norm, u, weight)
    assert partial.shape == (splits, 4, 4, 192, 192)
    assert 2 * g.numel() * 2 / splits <= 24 * 2**20


def test_statistics_of_many_parts(device: str) -> None:
    """More of them than one combination takes: 127 groups of 33, of which a tile holds 32, and a short one, whose last
    part has half as many values. The 33rd of each group lies apart from the others."""
    parts, each, channels = 4200, 33, 20
    values = randn(parts, 4, channels) + 100 + 8.0 * (torch.arange(parts) % each == each - 1)[:, None, None]
    values[-1, 2:] = values[-1, :2]  # twice the same: of mean and variance as of two
    values = values.float()
    counts = torch.full((parts, channels), 4.0)
    counts[-1] = 2
    partial = torch.stack([values.mean(1), values.var(1, correction=0) * counts, counts]).to(device)
    launch, merged = kernels.merge_launch(partial)
    launch.run(merged)
    assert merged.shape == (3, 128, channels)
    out = finish.statistics(merged, None, None, 0.0)
    every = values.flatten(0, 1)[:-2].double()
    # 4 values a part, 33 parts a group and 128 groups are summed one after the other at worst.
    roundings = 4 + each + 128 + 8
    assert_within(out[0], every.mean(0), roundings * U32 * every.abs().amax(0), "mean")
    exact, error = every.var(0, correction=0), roundings * U32 * every.abs().amax(0)
    assert_within(out[1], exact, roundings * U32 * exact + 2 * error * (2 * exact.sqrt() + error), "var")


def test_offsets_beyond_32_bits(device: str) -> None:
    """The same bits wherever the images lie."""
    runs = []
    for memory in ("channels_last", "far"):
        case = Run((2, 8, 16, 2, 3), torch.float16, device, memory)
        runs.append((case.forward(), case.backward_x(), *case.backward_weight(), *case.norm_backward()))
    assert all(map(torch.equal, *runs))


def test_refuses_an_image_that_32_bits_do_not_count() -> None:
    u, y = (torch.empty(1, 1, 2**k, 2**k, device="meta") for k in (15, 16))
    weight, norm = u.new_empty(1, 1, 4, 4), deconv_backward.Norm(y, *(u.new_empty(1),) * 4)
    refused = pytest.raises(ValueError, match=r"32768 x 32768 pixels.*fewer than 2\*\*30")
    with refused:
        kernels.forward_launch(y, u, weight, None, False)
    with refused:
        deconv_backward.norm_backward_launch(u, y, norm, u, weight)
