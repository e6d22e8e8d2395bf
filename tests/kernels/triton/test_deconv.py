"""The Triton kernels of the transposed convolution below their ops: one launch for both gradients, statistics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops.contract import image, randn, workspaces_hold_nan
from tests.tolerances import UNIT_ROUNDOFF, assert_within

pytest.importorskip("triton", reason="Triton is not installed: pip install wavemix-kernels[triton]")

from wavemix_kernels.ops.deconv import tiles as deconv_config
from wavemix_kernels.ops.deconv import triton as kernels
from wavemix_kernels.ops.deconv import triton_backward as deconv_backward
from wavemix_kernels.ops.norm import triton_batch_norm as batch_norm

NAN, U32 = float("nan"), UNIT_ROUNDOFF[torch.float32]


@pytest.fixture(autouse=True)
def poisoned_workspaces() -> Iterator[None]:
    with workspaces_hold_nan():
        yield


class Run:
    """Tensors of one shape, and float64 results with bounds made of the arithmetic (all on the CPU).

    A sum of k products in fp32 errs by k * u32 of the sum S of their absolute values, in whatever order; S is the same
    operation on absolute values. An operand that is made and rounded (the norm's gradient) passes its error on.
    """

    def __init__(self, size: tuple[int, ...], dtype: torch.dtype, device: str, memory: str, offset: float = 0) -> None:
        n, f, o, h, w = size
        self.dtype, self.device, self.memory = dtype, device, memory
        self.u = image(randn(n, f, h, w), dtype, device, memory)
        self.weight = (randn(f, o, 4, 4) / (4 * f) ** 0.5).to(device, dtype)
        self.bias = (randn(o) + offset).to(device, dtype)
        self.g = image(randn(n, o, 2 * h, 2 * w, seed=1), dtype, device, memory)
        y = image(randn(n, o, 2 * h, 2 * w, seed=2) + 1, dtype, device, memory)
        self.norm = deconv_backward.Norm(y, *(randn(o, seed=s).to(device, torch.float32) for s in (3, 4, 5, 6)))

    def empty(self, like: Tensor) -> Tensor:
        return image(torch.full(like.shape, NAN), self.dtype, self.device, self.memory)

    def forward(self) -> tuple[Tensor, ...]:
        y, stats = self.empty(self.g), [torch.full((self.g.shape[1],), NAN, device=self.device) for _ in range(2)]
        kernels.forward(y, self.u, self.weight, self.bias, tuple(stats), None)
        return (y, *stats)

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


def test_statistics_far_from_zero(device: str) -> None:
    """|mean| 1e4 standard deviations: 1e4^2 * u32 = 6 is what a difference of squares would err by, of 1."""
    case = Run((2, 16, 20, 17, 23), torch.float32, device, "channels_last", offset=1e4)
    y, mean, var = case.forward()
    assert float(var.min()) > 0.3
    # Those of y as it was stored. A part's mean errs by its rows' roundings of the largest value, which enters the
    # variance squared and as twice its product with the deviations, once there and once combining.
    wide = y.cpu().double()
    n, largest = wide[:, 0].numel(), wide.abs().amax((0, 2, 3))
    exact, exact_mean = wide.var((0, 2, 3), correction=0), wide.mean((0, 2, 3))
    assert_within(mean, exact_mean, (n + 2) * U32 * largest, "mean")
    error = (min(n, 256) + 2) * U32 * largest
    deviation = (wide - exact_mean[:, None, None]).abs().mean((0, 2, 3))
    assert_within(var, exact, (n + 8) * U32 * exact + 2 * error * (2 * deviation + error), "var")
    assert float((var.cpu() - exact).abs().max()) < 0.05


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
    launch, out = batch_norm.combine_launch(merged)
    launch.run(out)
    every = values.flatten(0, 1)[:-2].double()
    # 4 values a part, 33 parts a group and 128 groups are summed one after the other at worst.
    roundings = 4 + each + 128 + 8
    assert_within(out[0], every.mean(0), roundings * U32 * every.abs().amax(0), "mean")
    exact, error = every.var(0, correction=0), roundings * U32 * every.abs().amax(0)
    assert_within(out[1], exact, roundings * U32 * exact + 2 * error * (2 * exact.sqrt() + error), "var")


def far(t: Tensor, device: str) -> Tensor:
    """The same images, more than 2^31 elements from each other: untouched pages of a CPU's memory are free."""
    apart, (_, c, _, w) = 2**31 + 64, t.shape
    size = apart * (t.shape[0] - 1) + t[0].numel()
    flat = torch.from_numpy(np.empty(size, np.float16)) if device == "cpu" else t.new_zeros(size)
    return flat.as_strided(t.shape, (apart, 1, w * c, c)).copy_(t)


def test_offsets_beyond_32_bits(device: str) -> None:
    case = Run((2, 8, 16, 2, 3), torch.float16, device, "channels_last")
    near = case.forward(), case.backward_x(), case.backward_weight(), case.norm_backward()
    case.u, case.g, case.norm = far(case.u, device), far(case.g, device), case.norm._replace(y=far(case.norm.y, device))
    y, du = far(near[0][0] * NAN, device), far(near[1] * NAN, device)
    kernels.forward(y, case.u, case.weight, case.bias, None)
    deconv_backward.backward_x(du, case.g, case.norm, case.weight)
    assert torch.equal(y, near[0][0])
    assert torch.equal(du, near[1])
    assert all(map(torch.equal, case.backward_weight(), near[2]))
    du, dw = du.fill_(NAN), torch.full_like(case.weight, NAN)
    deconv_backward.norm_backward(du, dw, case.g, case.norm, case.u, case.weight)
    assert all(map(torch.equal, (du, dw), near[3]))


def test_refuses_an_image_that_32_bits_do_not_count() -> None:
    u, y = (torch.empty(1, 1, 2**k, 2**k, device="meta") for k in (15, 16))
    weight, norm = u.new_empty(1, 1, 4, 4), deconv_backward.Norm(y, *(u.new_empty(1),) * 4)
    refused = pytest.raises(ValueError, match=r"32768 x 32768 pixels.*fewer than 2\*\*30")
    with refused:
        kernels.forward_launch(y, u, weight, None, False)
    with refused:
        deconv_backward.norm_backward_launch(u, y, norm, u, weight)
