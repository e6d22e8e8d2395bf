"""Every kernel of an op on small awkward inputs, its results checked: the self-tests, and what sanitizers watch.

``python -m benchmarks.gpu.exercise BACKEND [OP ...]`` prints a line of JSON per op, as it is done.
"""

from __future__ import annotations

import itertools
import json
import sys

import torch

import wavemix_kernels
from benchmarks.gpu.jobs import End, Job, Verdict, by_status, verdict
from wavemix_kernels import ops
from wavemix_kernels.ops import verify
from wavemix_kernels.ops.haar import reference

# Odd and prime sizes, a single pixel, one tile exactly, and more than one tile.
SHAPES = ((2, 3, 17, 19), (1, 1, 1, 1), (1, 8, 32, 32), (2, 16, 40, 72))
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FORMATS = (torch.contiguous_format, torch.channels_last)
#: Seconds for the self-test of an op: Triton compiles, a kernel may hang.
LIMIT_S = 120.0


def exact_haar(backend: str, device: torch.device) -> None:
    """Raises AssertionError where Haar in any dtype and layout is off by a bit, with the case."""
    cases = list(itertools.product(SHAPES, DTYPES, FORMATS, (1, 4)))
    # Triton compiles two kernels for nearly each: a step that shares no factor with the axes meets every value.
    for shape, dtype, layout, levels in cases[:: 5 if backend == "triton" else 1]:
        generator = torch.Generator().manual_seed(0)
        # Inputs of -1, 0 and 1: four levels give multiples of 1/16 up to 16, exact in every dtype.
        image = torch.randint(-1, 2, shape, generator=generator).to(device, dtype).contiguous(memory_format=layout)
        ll, highs = wavemix_kernels.haar_dwt2d(image, levels, backend=backend)
        back = wavemix_kernels.haar_idwt2d(ll, highs, size=shape[-2:], backend=backend)
        true_ll, true_highs = reference.analysis(image.cpu().double(), levels)
        for got, want in [(ll, true_ll), *zip(highs, true_highs, strict=True), (back, image)]:
            if not torch.equal(got.double().cpu(), want.cpu().to(dtype).double()):
                raise AssertionError(f"haar on {backend}: wrong for shape {shape}, {dtype}, {layout}, {levels} levels")


def ops_of(backend: str) -> list[str]:
    """Ops with kernels of this kind."""
    return [name for name in ops.OPS if backend in ops.load(name).BACKENDS]


def main(backend: str, *names: str) -> int:
    """1 if an op is wrong or raises, in any dtype. The process ends there: an error of the device stays."""
    device = torch.device("cpu" if backend == "cpu" or not torch.cuda.is_available() else "cuda")
    for name in names or ops_of(backend):
        if name == "haar":
            exact_haar(backend, device)
        table = ops.load(name).BACKENDS
        served = [
            t
            for t in DTYPES[:3]
            if table[backend].why_not(torch.empty(table[backend].example, dtype=t, device=device)) is None
        ]
        for dtype in served or DTYPES[:1]:  # none: the self-test says why
            made = verify.examine(name, backend, device, dtype)
            if made.error is not None:
                print(json.dumps({"op": name, "error": made.error, "bound": made.bound}), flush=True)
            if made.fault is not None:
                print(made.fault, file=sys.stderr)
                return 1
    return 0


def job(backend: str, name: str) -> Job:
    """The self-test of one op."""
    command = [sys.executable, "-m", "benchmarks.gpu.exercise", backend, name]
    needs = [{"cuda": "core"}.get(backend, backend)]
    return Job(f"self-test-{backend}-{name}", command, name, backend, needs, seconds=LIMIT_S, read=read)


def read(job: Job, end: End) -> tuple[list[Verdict], list[Job]]:
    """Its error and bound; where it has none, how it ended."""
    if job.op not in (found := measured(end)):
        last = by_status(job, end)
        return [verdict(job, end, "FAIL", "no result") if last.verdict == "PASS" else last], []
    error, bound = found[job.op]
    right = error <= bound
    note = "" if right else "beyond the bound"
    return [verdict(job, end, "PASS" if right else "FAIL", note, error=error, bound=bound)], []


def measured(end: End) -> dict[str, tuple[float, float]]:
    """Op -> error and bound of the dtype that used the largest share of it, of the ops that came to an end."""
    lines = [line for line in end.said.splitlines() if line.startswith('{"op": ')]
    # A NaN goes last.
    rows = sorted(map(json.loads, lines), key=lambda one: (one["error"] != one["error"], one["error"] / one["bound"]))
    return {one["op"]: (one["error"], one["bound"]) for one in rows}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
