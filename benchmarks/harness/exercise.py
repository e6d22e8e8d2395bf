"""Launches every compiled kernel on small awkward inputs and checks the results, under compute-sanitizer's eyes.

``python -m benchmarks.harness.exercise [BACKEND]``; needs a GPU for the backends "cuda" (the default) and "triton".
"""

from __future__ import annotations

import itertools
import sys

import torch

import wavemix_kernels
from wavemix_kernels import ops
from wavemix_kernels.ops.haar import reference

# Odd and prime sizes, a single pixel, one tile exactly, and more than one tile.
SHAPES = ((2, 3, 17, 19), (1, 1, 1, 1), (1, 8, 32, 32), (2, 16, 40, 72))
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FORMATS = (torch.contiguous_format, torch.channels_last)


def main(backend: str = "cuda") -> int:
    """Number of calls made; raises AssertionError at a wrong result, with the case."""
    device = "cpu" if backend == "cpu" else "cuda"
    calls = 0
    for shape, dtype, layout, levels in itertools.product(SHAPES, DTYPES, FORMATS, (1, 4)):
        generator = torch.Generator().manual_seed(0)
        # Inputs of -1, 0 and 1: four levels give multiples of 1/16 up to 16, exact in every dtype, so results must
        # agree to the last bit.
        image = torch.randint(-1, 2, shape, generator=generator).to(device, dtype).contiguous(memory_format=layout)
        with wavemix_kernels.backend(backend):
            ll, highs = wavemix_kernels.haar_dwt2d(image, levels)
            back = wavemix_kernels.haar_idwt2d(ll, highs, size=shape[-2:])
        true_ll, true_highs = reference.analysis(image.double(), levels)
        pairs = [(ll, true_ll), *zip(highs, true_highs, strict=True), (back, image)]
        for got, want in pairs:
            if not torch.equal(got.double(), want.to(dtype).double()):
                raise AssertionError(f"{backend}: wrong for shape {shape}, {dtype}, {layout}, {levels} levels")
        calls += 2
    for name in ops.OPS:
        op = ops.load(name)
        if backend in op.BACKENDS:
            error, bound = op.self_test(backend, torch.device(device))
            if not error <= bound:
                raise AssertionError(f"{backend}: {name} is off by {error:.1e}, bound {bound:.1e}")
            calls += 2
    if device == "cuda":
        torch.cuda.synchronize()
    return calls


if __name__ == "__main__":
    print(f"{main(*sys.argv[1:])} calls, all right")
