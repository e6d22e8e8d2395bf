"""Waveblocks in a row as one operator (:mod:`wavemix_kernels.ops.waveblocks`), where that serves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wavemix_kernels import backends, log
from wavemix_kernels.nn.parts import update
from wavemix_kernels.nn.wavemix.block import FusedWaveblock
from wavemix_kernels.ops import waveblocks
from wavemix_kernels.ops.mlp import op as pointwise_mlp
from wavemix_kernels.ops.waveblock import Block


def through(blocks: Sequence[nn.Module] | nn.ModuleList, x: Tensor, pooled: bool = False) -> Tensor | None:
    """x through the blocks, each of which adds its residual; None where they run one after the other, for a reason that
    the log gives on a GPU.

    Args:
        blocks: each :meth:`~wavemix_kernels.FusedWaveblock.why_not_joined` is None.
        x: (N, C, H, W), channels_last.
        pooled: the average over all pixels in place of the image, (N, C, 1, 1).
    """
    backend = backends.requested()
    if backend == "reference" or (x.device.type == "cpu" and backend != "cuda"):
        return None
    stack = [block for block in blocks if type(block) is FusedWaveblock]
    if len(stack) < max(len(blocks), 2):
        return None
    apart = "one block after the other"
    reason = waveblocks.why_not_here(x, backend) if stack[0].training else "it is in evaluation"
    if log.fallback(stack[0], reason, apart):
        return None
    prepared = [block.prepared(x) for block in stack]
    given = [block for _, block in prepared]
    reason = "autocast converts x" if any(cast is not x for cast, _ in prepared) else None
    if log.fallback(stack[0], reason or waveblocks.why_not(x, given, backend), apart):
        return None
    out, statistics = waveblocks.waveblocks(x, _with_seeds(given, x.device), backend, pooled)
    update(*(batch for block, stats in zip(stack, statistics, strict=True) for batch in block.batches(x, stats)))
    return out


def _with_seeds(blocks: list[Block], device: torch.device) -> list[Block]:
    """All blocks' seeds come from one draw; each block's begin at a multiple of 16 bytes, which plans are quick for."""
    counts = [len(block.levels) if any(block.dropout) else 0 for block in blocks]
    if not any(counts):
        return blocks
    even = [count + count % 2 for count in counts]
    seeds = pointwise_mlp.draw_seed(device, sum(even)).split(even)
    each = zip(blocks, counts, seeds, strict=True)
    return [block._replace(seeds=own[:count]) if count else block for block, count, own in each]
