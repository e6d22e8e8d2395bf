"""torch.compile keeps no more for backward than eager autograd: AOTAutograd may not merge a recomputation with what it
repeats."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import wavemix_kernels as wk
from benchmarks.harness.memory import saved_bytes
from wavemix_kernels.nn.wavemlp.block import FusedWaveBlock

C = 32
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    **{
        f"Waveblock {level} {upsample} {recompute}": lambda level=level, upsample=upsample, recompute=recompute: (
            wk.FusedWaveblock(level=level, ff_channel=C, final_dim=C, upsample=upsample, recompute=recompute)
        )
        for level, upsample, recompute in (
            (1, "deconv", "mlp"), (2, "bilinear", "all"), (3, "deconv", "all"), (4, "pixelshuffle", "hidden"),
        )
    },
    **{
        f"{made.__name__} {mode} {recompute}": lambda made=made, mode=mode, recompute=recompute: made(
            C, mode=mode, recompute=recompute
        )
        for made, mode, recompute in (
            (wk.FusedPATM, "fc", "all"), (wk.FusedPATM, "depthwise", "amplitudes"),
            (FusedWaveBlock, "depthwise", "all"),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.prove)])
@pytest.mark.parametrize(
    "block", [name if i % 2 == 0 else pytest.param(name, marks=pytest.mark.prove) for i, name in enumerate(BLOCKS)]
)
def test_saved_bytes_are_those_of_eager(block: str, compiler: str, parts: None) -> None:
    """Within 5 %, and copies of weights, which do not grow with the image."""
    torch._dynamo.reset()
    module = BLOCKS[block]()
    x = torch.randn(4, C, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
    known = [x, *module.parameters(), *module.buffers()]
    eager = saved_bytes(lambda: module(x), known)
    compiled = torch.compile(module, backend=compiler, fullgraph=True)
    compiled(x)  # tracing keeps tensors of its own
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    assert saved_bytes(lambda: compiled(x), known) <= 1.05 * eager + 3 * weights
