"""Compiles what a case needs of Triton, into Triton's cache, by running one step of ours, and one by Triton alone.

``python -m benchmarks.gpu.warm CASE``. Compiling is a CPU's work, one thread each: many cases at once, beside CUDA's
proofs, where the timings would do one after the other.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.cases import registry
from benchmarks.gpu.jobs import Job
from benchmarks.harness.case import Case, Setting
from benchmarks.harness.providers import make
from benchmarks.harness.rivals import Unavailable

LIMIT_S = 150.0


def job(case: str) -> Job:
    command = [sys.executable, "-m", "benchmarks.gpu.warm", case]
    return Job(f"compile-{case}", command, case.split("/")[0], "triton", ("triton",), seconds=LIMIT_S)


def step(case: Case, device: torch.device, provider: str) -> str:
    """One step of a provider, or why there is none."""
    inputs = [x.to(device, case.dtype).requires_grad_(case.backward and not case.image) for x in case.inputs()]
    try:
        subject = make(case, provider, Setting(device, case.dtype), inputs)
    except Unavailable as reason:
        return f"nothing to compile: {reason}"
    with subject.scope(), torch.set_grad_enabled(case.backward):
        outputs = subject.forward(*inputs)
        if case.backward:
            torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
    if device.type == "cuda":
        torch.cuda.synchronize()
    return "compiled"


def main(name: str) -> None:
    (case,) = (case for case in registry() if case.name == name)
    for provider in ("ours", "triton"):
        print(step(case, torch.device("cuda" if torch.cuda.is_available() else "cpu"), provider), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
