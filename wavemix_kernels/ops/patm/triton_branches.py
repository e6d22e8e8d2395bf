"""PATM's three branches in Triton, weighted per image and channel: one pass over memory, with the gradient of the
weights on the way where it is asked for. Sums are partial sums of fixed parts added in a fixed order."""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels import _native
from wavemix_kernels.ops import tuned
from wavemix_kernels.ops.common.triton_launch import Launch, pow2_at_least
from wavemix_kernels.ops.norm.triton_batch_norm import geometry

_PROGRAMS = 4  # for each multiprocessor, to hide the latency of a pass over memory


@dataclass(frozen=True)
class SumConfig:
    """A tile of positions x channels, a power of two each."""

    positions: int
    channels: int
    num_warps: int = 4


def config_for(run: int, channels: int) -> SumConfig:
    """The default: 2048 values, two 16-byte vectors of a half type in each thread."""
    across = min(64, pow2_at_least(channels))
    return SumConfig(min(2048 // across, pow2_at_least(run)), across)


def search_space() -> list[SumConfig]:
    """Tiles worth timing."""
    return [SumConfig(2048 // channels, channels) for channels in (16, 32, 64, 128)]


_STRIDES = tuple(f"{t}_{d}" for t in ("out", "grad", "h", "w", "c") for d in "nrp")


@triton.jit
def _tile(base, image, row, position, channel, s_n, s_r, s_p, ALIGN: tl.constexpr):
    start = image * (s_n * ALIGN) + row * (s_r * ALIGN)
    return base + start + (position * (s_p * ALIGN))[:, None] + channel[None, :]


@triton.jit(do_not_specialize=("images", "tiles", "run", "rows", "channels", "splits", *_STRIDES))
def _branch_sum_kernel(
    out, partial, grad, h, w, c, a, images: tl.int64, tiles, run, rows, channels, splits,
    out_n: tl.int64, out_r: tl.int64, out_p: tl.int64, grad_n: tl.int64, grad_r: tl.int64, grad_p: tl.int64,
    h_n: tl.int64, h_r: tl.int64, h_p: tl.int64, w_n: tl.int64, w_r: tl.int64, w_p: tl.int64,
    c_n: tl.int64, c_r: tl.int64, c_p: tl.int64,
    GRADIENT: tl.constexpr, ALIGN: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """An image is `rows` rows of `run` positions, in `tiles` tiles that `splits` programs share; `a` (3, images, C).

    `partial` (splits, 3, images, C) gets the sums of grad * branch.
    """
    channels *= ALIGN
    blocks = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    block = program % blocks
    split = program // blocks % splits
    image = (program // blocks // splits).to(tl.int64)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    in_channels = channel < channels
    per_branch = images * channels
    at = a + image * channels + channel
    a_h = tl.load(at, mask=in_channels, other=0.0)[None, :]
    a_w = tl.load(at + per_branch, mask=in_channels, other=0.0)[None, :]
    a_c = tl.load(at + 2 * per_branch, mask=in_channels, other=0.0)[None, :]
    d_h = tl.zeros((POSITIONS, CHANNELS), REAL)
    d_w = tl.zeros((POSITIONS, CHANNELS), REAL)
    d_c = tl.zeros((POSITIONS, CHANNELS), REAL)
    per_row = tl.cdiv(run, POSITIONS)
    for tile in range(split, tiles, splits):
        row = tile // per_row
        position = (tile - row * per_row) * POSITIONS + tl.arange(0, POSITIONS)
        mask = (position < run)[:, None] & in_channels[None, :]
        position = position.to(tl.int64)
        from_h = tl.load(_tile(h, image, row, position, channel, h_n, h_r, h_p, ALIGN), mask=mask, other=0.0).to(REAL)
        from_w = tl.load(_tile(w, image, row, position, channel, w_n, w_r, w_p, ALIGN), mask=mask, other=0.0).to(REAL)
        from_c = tl.load(_tile(c, image, row, position, channel, c_n, c_r, c_p, ALIGN), mask=mask, other=0.0).to(REAL)
        if GRADIENT:  # before the store, which no load passes
            of = _tile(grad, image, row, position, channel, grad_n, grad_r, grad_p, ALIGN)
            g = tl.load(of, mask=mask, other=0.0).to(REAL)
            d_h += g * from_h
            d_w += g * from_w
            d_c += g * from_c
        value = from_h * a_h + from_w * a_w + from_c * a_c
        to = _tile(out, image, row, position, channel, out_n, out_r, out_p, ALIGN)
        tl.store(to, value.to(out.dtype.element_ty), mask=mask)
    if GRADIENT:
        at = partial + (split * 3 * images + image) * channels + channel
        tl.store(at, tl.sum(d_h, 0), mask=in_channels)
        tl.store(at + per_branch, tl.sum(d_w, 0), mask=in_channels)
        tl.store(at + 2 * per_branch, tl.sum(d_c, 0), mask=in_channels)


def launch(
    out: Tensor, branches: Sequence[Tensor], a: Tensor, grad: Tensor | None = None, config: SumConfig | None = None
) -> tuple[Launch, Tensor]:
    """A launch and, with ``grad``, the (splits, 3, N, C) partial sums it fills."""
    tensors = [out, out if grad is None else grad, *branches]
    # Weights are an image's own, so positions run over one image.
    made = geometry([t[:1] for t in tensors])
    config = config or tuned.tile("branch_sum tile", SumConfig, search_space, out, extra=(grad is not None,))
    config = config or config_for(made.run, made.channels)
    tiles = made.runs * triton.cdiv(made.run, config.positions)
    blocks, n = triton.cdiv(made.channels, config.channels), out.shape[0]
    splits = tiles
    if grad is not None:
        splits = max(1, min(tiles, triton.cdiv(_PROGRAMS * _native.multiprocessors(out.device), max(1, n * blocks))))
    partial = a.new_empty((splits if grad is not None else 0, 3, n, made.channels))
    strides = [s for t, of in zip(tensors, made.strides, strict=True) for s in (t.stride(0), of[1], of[2])]
    align = 8 if all(s % 8 == 0 for s in (made.channels, *strides)) else 1
    sizes = (n, tiles, made.run, made.runs, made.channels // align, splits)
    constants = {
        "GRADIENT": grad is not None, "ALIGN": align, "POSITIONS": config.positions, "CHANNELS": config.channels,
        "REAL": tl.float64 if out.dtype == torch.float64 else tl.float32, "num_warps": config.num_warps,
        "enable_fp_fusion": True,
    }  # fmt: skip
    args = (out, partial, *tensors[1:], a, *sizes, *(s // align for s in strides))
    return Launch(_branch_sum_kernel, (n * splits * blocks,), args, constants), partial


def forward(out: Tensor, branches: Sequence[Tensor], a: Tensor, config: SumConfig | None = None) -> None:
    """out = sum of branches[i] * a[i]: images (N, C, H, W) with contiguous channels, a (3, N, C) contiguous and fp32
    (fp64 for fp64)."""
    launch(out, branches, a, None, config)[0].run(out)


def backward(
    out: Tensor, branches: Sequence[Tensor], a: Tensor, grad: Tensor, config: SumConfig | None = None
) -> Tensor:
    """The same, and the gradient of ``a``: sums of grad * branches[i] over each image."""
    made, partial = launch(out, branches, a, grad, config)
    made.run(out)
    return partial.sum(0)
