"""PATM's branch weights in Triton: the MLP of an image's mean and the softmax over its three branches, one launch; for
their gradients one by image, and one for the weights. Sums are in a fixed order: the same in every run.

A program keeps an image's few hidden units in registers: weights come from a GPU's L2 cache.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels import _native
from wavemix_kernels.ops.common.triton_gelu import gelu
from wavemix_kernels.ops.common.triton_launch import Launch, pow2_at_least

#: Hidden units that a program holds.
MOST_HIDDEN = 256
_TILE = 8192  # bytes of a tile of weights, three of which are a step
#: Steps on their way at once, since weights come from L2; backward, one more would spill. 99 KB of shared memory hold
#: them.
_FORWARD_STAGES, _BACKWARD_STAGES = 4, 3
_FEW, _FEW_WEIGHTS = 128, 4096  # up to so many channels a program has few steps, of larger tiles that it waits for
_IMAGES, _ROWS, _COLUMNS = 16, 8, 64  # of a tile of a weight's gradient


@triton.jit
def _pre(
    mean, fc1, bias, image, channels, units, factor, UNITS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr
):
    """fc1 times ``factor mean`` of an image, plus the bias: (UNITS)."""
    unit = tl.arange(0, UNITS)
    total = tl.zeros((UNITS, CHANNELS), tl.float32)
    for start in tl.range(0, channels, CHANNELS, num_stages=STAGES):
        channel = start + tl.arange(0, CHANNELS)
        value = tl.load(mean + image * channels + channel, mask=channel < channels, other=0.0) * factor
        mask = (unit < units)[:, None] & (channel < channels)[None, :]
        weight = tl.load(fc1 + unit[:, None] * channels + channel[None, :], mask=mask, other=0.0)
        total += weight.to(tl.float32) * value[None, :]
    return tl.sum(total, 1) + tl.load(bias + unit, mask=unit < units, other=0.0).to(tl.float32)


@triton.jit
def _logit(fc2, bias, hidden, channel, channels, units, BRANCH: tl.constexpr, UNITS: tl.constexpr):
    """One branch's, of some channels."""
    unit, row = tl.arange(0, UNITS), 3 * channel + BRANCH
    mask = (channel < channels)[:, None] & (unit < units)[None, :]
    weight = tl.load(fc2 + row[:, None] * units + unit[None, :], mask=mask, other=0.0).to(tl.float32)
    of_bias = tl.load(bias + row, mask=channel < channels, other=0.0).to(tl.float32)
    return tl.sum(weight * hidden[None, :], 1) + of_bias


@triton.jit(do_not_specialize=("images", "factor", "each"))
def _forward_kernel(
    a, mean, sums, fc1, fc1_bias, fc2, fc2_bias, images, channels, units, factor, each,
    UNITS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """mean (images, channels) is ``factor sums``; a (3, images, channels). A program has the hidden units of an image
    and the results of ``each`` channels."""
    image = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * each
    hidden, _ = gelu(_pre(sums, fc1, fc1_bias, image, channels, units, factor, UNITS, CHANNELS, STAGES))
    per_branch = images.to(tl.int64) * channels
    for start in tl.range(begin, tl.minimum(begin + each, channels), CHANNELS, num_stages=STAGES):
        channel = start + tl.arange(0, CHANNELS)
        inside, at = channel < channels, image * channels + channel
        tl.store(mean + at, tl.load(sums + at, mask=inside, other=0.0) * factor, mask=inside)
        of_h = _logit(fc2, fc2_bias, hidden, channel, channels, units, 0, UNITS)
        of_w = _logit(fc2, fc2_bias, hidden, channel, channels, units, 1, UNITS)
        of_c = _logit(fc2, fc2_bias, hidden, channel, channels, units, 2, UNITS)
        most = tl.maximum(tl.maximum(of_h, of_w), of_c)
        of_h, of_w, of_c = tl.exp(of_h - most), tl.exp(of_w - most), tl.exp(of_c - most)
        total = of_h + of_w + of_c
        tl.store(a + at, of_h / total, mask=inside)
        tl.store(a + per_branch + at, of_w / total, mask=inside)
        tl.store(a + 2 * per_branch + at, of_c / total, mask=inside)


@triton.jit
def _through(total, d_logits, fc2, d, image, channel, channels, units, BRANCH: tl.constexpr, UNITS: tl.constexpr):
    """Stores the gradient of one branch's logits, and adds what it gives to the hidden units'."""
    unit, row = tl.arange(0, UNITS), 3 * channel + BRANCH
    tl.store(d_logits + image * (3 * channels) + row, d, mask=channel < channels)
    mask = (channel < channels)[:, None] & (unit < units)[None, :]
    weight = tl.load(fc2 + row[:, None] * units + unit[None, :], mask=mask, other=0.0).to(tl.float32)
    return total + weight * d[:, None]


@triton.jit(do_not_specialize=("images", "factor"))
def _backward_kernel(
    d_sums, d_logits, d_pre, hidden, a, d_a, mean, fc1, fc1_bias, fc2, images, channels, units, factor,
    UNITS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """d_sums (images, channels); d_logits (images, 3 channels) as fc2's rows lie; d_pre and hidden (images, units)."""
    image = tl.program_id(0).to(tl.int64)
    unit = tl.arange(0, UNITS)
    value, slope = gelu(_pre(mean, fc1, fc1_bias, image, channels, units, 1.0, UNITS, CHANNELS, STAGES))
    per_branch = images.to(tl.int64) * channels
    total = tl.zeros((CHANNELS, UNITS), tl.float32)
    for start in tl.range(0, channels, CHANNELS, num_stages=STAGES):
        channel = start + tl.arange(0, CHANNELS)
        inside, at = channel < channels, image * channels + channel
        a_h = tl.load(a + at, mask=inside, other=0.0)
        a_w = tl.load(a + per_branch + at, mask=inside, other=0.0)
        a_c = tl.load(a + 2 * per_branch + at, mask=inside, other=0.0)
        d_h = tl.load(d_a + at, mask=inside, other=0.0)
        d_w = tl.load(d_a + per_branch + at, mask=inside, other=0.0)
        d_c = tl.load(d_a + 2 * per_branch + at, mask=inside, other=0.0)
        common = a_h * d_h + a_w * d_w + a_c * d_c
        total = _through(total, d_logits, fc2, a_h * (d_h - common), image, channel, channels, units, 0, UNITS)
        total = _through(total, d_logits, fc2, a_w * (d_w - common), image, channel, channels, units, 1, UNITS)
        total = _through(total, d_logits, fc2, a_c * (d_c - common), image, channel, channels, units, 2, UNITS)
    of_pre = tl.sum(total, 0) * slope
    tl.store(d_pre + image * units + unit, of_pre, mask=unit < units)
    tl.store(hidden + image * units + unit, value, mask=unit < units)
    for start in tl.range(0, channels, CHANNELS, num_stages=STAGES):
        channel = start + tl.arange(0, CHANNELS)
        mask = (channel < channels)[:, None] & (unit < units)[None, :]
        weight = tl.load(fc1 + unit[None, :] * channels + channel[:, None], mask=mask, other=0.0).to(tl.float32)
        d = tl.sum(weight * of_pre[None, :], 1) * factor
        tl.store(d_sums + image * channels + channel, d, mask=channel < channels)


@triton.jit
def _product(
    d_weight, d_bias, left, right, program, images, rows, columns,
    IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of left (images, rows) transposed times right (images, columns), and of left's sums over images."""
    across = tl.cdiv(columns, COLUMNS)
    row = program // across * ROWS + tl.arange(0, ROWS)
    column = program % across * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    of_bias = tl.zeros((ROWS,), tl.float32)
    for start in range(0, images, IMAGES):
        image = start + tl.arange(0, IMAGES)
        at, there = image.to(tl.int64)[:, None], (image < images)[:, None]
        of_row = tl.load(left + at * rows + row[None, :], mask=there & (row < rows)[None, :], other=0.0)
        of_column = tl.load(right + at * columns + column[None, :], mask=there & (column < columns)[None, :], other=0.0)
        total += tl.sum(of_row[:, :, None] * of_column[:, None, :], 0)
        of_bias += tl.sum(of_row, 0)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(d_weight + row[:, None] * columns + column[None, :], total.to(d_weight.dtype.element_ty), mask=mask)
    if program % across == 0:
        tl.store(d_bias + row, of_bias.to(d_bias.dtype.element_ty), mask=row < rows)


@triton.jit(do_not_specialize=("images",))
def _weights_kernel(
    d_fc1, d_fc1_bias, d_fc2, d_fc2_bias, mean, d_pre, hidden, d_logits, images, channels, units,
    IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """The first programs make fc2's gradients, the others fc1's. UNITS: columns of a tile of fc2."""
    program = tl.program_id(0)
    first = tl.cdiv(3 * channels, ROWS) * tl.cdiv(units, UNITS)
    if program < first:
        _product(d_fc2, d_fc2_bias, d_logits, hidden, program, images, 3 * channels, units, IMAGES, ROWS, UNITS)
    else:
        _product(d_fc1, d_fc1_bias, d_pre, mean, program - first, images, units, channels, IMAGES, ROWS, COLUMNS)


# --------------------------------------------------------------------------------------------------- launch


def _constants(channels: int, units: int, weight: Tensor, stages: int) -> dict[str, Any]:
    held, few = pow2_at_least(units), channels <= _FEW
    across = min(pow2_at_least(channels), max((_FEW_WEIGHTS if few else _TILE // weight.itemsize) // held, 16))
    return {
        "UNITS": held, "CHANNELS": across, "STAGES": 1 if few else stages, "num_warps": 4 if few else 8,
        "enable_fp_fusion": True,
    }  # fmt: skip


def forward_launch(s: Tensor, factor: float, weights: tuple[Tensor, ...]) -> tuple[Launch, Tensor, Tensor]:
    """A launch and what it fills: the branch weights (3, N, C) and the mean (N, C).

    Args:
        s: (N, C) fp32, contiguous, as all tensors are; ``factor s`` is the mean.
        weights: fc1 (K, C), its bias, fc2 (3C, K), its bias, of any dtypes.
    """
    (images, channels), units = s.shape, weights[0].shape[0]
    a, mean = s.new_empty((3, images, channels)), s.new_empty((images, channels))
    constants = _constants(channels, units, weights[0], _FORWARD_STAGES)
    # Few images leave multiprocessors idle: several programs make an image's hidden units, each some of its results.
    tiles = triton.cdiv(channels, constants["CHANNELS"])
    parts = max(1, min(tiles, _native.multiprocessors(s.device) // max(images, 1)))
    each = triton.cdiv(tiles, parts) * constants["CHANNELS"]
    args = (a, mean, s, *weights, images, channels, units, factor, each)
    return Launch(_forward_kernel, (images, triton.cdiv(channels, each)), args, constants), a, mean


def forward(s: Tensor, factor: float, weights: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """See :func:`forward_launch`."""
    launch, a, mean = forward_launch(s, factor, weights)
    launch.run(s)
    return a, mean


def backward_launches(
    d_a: Tensor, a: Tensor, mean: Tensor, factor: float, weights: tuple[Tensor, ...]
) -> tuple[list[Launch], Tensor, list[Tensor]]:
    """Two launches and what they fill: the gradients of s, and of the weights in their dtypes. ``d_a`` and ``a``:
    (3, N, C); see :func:`forward_launch`."""
    (images, channels), units = mean.shape, weights[0].shape[0]
    d_s, d_logits = mean.new_empty((images, channels)), mean.new_empty((images, 3 * channels))
    d_pre, hidden = (mean.new_empty((images, units)) for _ in range(2))
    grads = [w.new_empty(w.shape) for w in weights]
    args = (d_s, d_logits, d_pre, hidden, a, d_a, mean, *weights[:3], images, channels, units, factor)
    constants = _constants(channels, units, weights[0], _BACKWARD_STAGES)
    by_image = Launch(_backward_kernel, (images,), args, constants)
    across = min(pow2_at_least(units), _COLUMNS)
    programs = triton.cdiv(3 * channels, _ROWS) * triton.cdiv(units, across)
    programs += triton.cdiv(units, _ROWS) * triton.cdiv(channels, _COLUMNS)
    constants = {
        "IMAGES": _IMAGES, "ROWS": _ROWS, "COLUMNS": _COLUMNS, "UNITS": across, "num_warps": 4,
        "enable_fp_fusion": True,
    }  # fmt: skip
    args = (*grads, mean, d_pre, hidden, d_logits, images, channels, units)
    return [by_image, Launch(_weights_kernel, (programs,), args, constants)], d_s, grads


def backward(
    d_a: Tensor, a: Tensor, mean: Tensor, factor: float, weights: tuple[Tensor, ...]
) -> tuple[Tensor, list[Tensor]]:
    """See :func:`backward_launches`."""
    launches, d_s, grads = backward_launches(d_a, a, mean, factor, weights)
    for launch in launches:
        launch.run(mean)
    return d_s, grads
