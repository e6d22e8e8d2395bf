"""A process with a GPU that is none: Triton compiles for sm_80, and a stub in the place of its driver launches.

Run by test_tune_gpu.py, without Triton's interpreter. The stub knows what :func:`branch_sum` computes, and has clocks
and limits of its own. Prints what the tuner found, as JSON.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from wavemix_kernels import backends
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.patm import branches
from wavemix_kernels.tune import tune

#: By the channels of a tile.
SECONDS = {16: 3e-6, 32: 2e-6, 64: 4e-6, 128: 1e-6}
SPILLS = {128: 12}
TOO_MANY_THREADS: set[int] = set(map(int, sys.argv[1:]))


class Stub:
    """The part of a driver that compiling, loading and launching ask for."""

    def __init__(self) -> None:
        self.clock, self.launched, self.channels = 0.0, 0, 0
        self.utils = SimpleNamespace(
            load_binary=self.load_binary,
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 99 * 1024, "multiprocessor_count": 108},
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        names = source.fn.arg_names
        constants = {names[at[0]]: value for at, value in source.constants.items()}
        self.channels = channels = constants["CHANNELS"]

        def run(x: int, y: int, z: int, stream: int, function: Any, packed: Any, launch: Any, enter: Any, leave: Any,
                *args: Any) -> None:  # fmt: skip
            given = dict(zip(names, args, strict=False))
            images = zip((given["h"], given["w"], given["c"]), given["a"], strict=True)
            given["out"].copy_(sum(image * weight[:, :, None, None] for image, weight in images))
            self.launched += 1
            self.clock += SECONDS[channels]

        return run

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        threads = 64 if self.channels in TOO_MANY_THREADS else 1024
        return object(), object(), 64, SPILLS.get(self.channels, 0), threads


class Clock:
    """Device time: the stub's, or of what launches nothing the library's."""

    def __init__(self, stub: Stub) -> None:
        self.stub = stub

    def repeats(self, step: Callable[[], object]) -> int:
        return 1

    def sample(self, step: Callable[[], object], repeats: int) -> float:
        before, launched = self.stub.clock, self.stub.launched
        step()
        return self.stub.clock - before if self.stub.launched > launched else 9e-6


class Sum(nn.Module):
    def forward(self, h: Tensor, w: Tensor, c: Tensor, a: Tensor) -> Tensor:
        return branches.branch_sum(h, w, c, a, "auto")


def main() -> None:
    stub = Stub()
    driver.set_active(stub)
    backends.triton_interpreted = lambda: True  # its probes then take CPU tensors
    choose.AUTO["cpu"] = ("triton", "reference")
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("wavemix_kernels").addHandler(handler)
    images = [torch.randn(2, 40, 3, 5).contiguous(memory_format=torch.channels_last) for _ in range(3)]
    arguments = (*images, torch.randn(3, 2, 40))
    report = tune(Sum(), *arguments, train=False, clock=Clock(stub))
    before = stub.clock
    Sum()(*arguments)
    json.dump({
        "chosen": {r.key[0]: str(r.chosen) for r in report.results},
        "timed": {r.key[0]: sorted(map(str, r.times)) for r in report.results},
        "left out": {str(c): why for r in report.results for c, why in r.left_out.items()},
        "lines": lines,
        "seconds of a call": stub.clock - before,
    }, sys.stdout)  # fmt: skip


if __name__ == "__main__":
    main()
