"""A process with a GPU that is none (benchmarks/predict/stub_gpu.py): what Python does for a step that goes by plans.

Prints JSON: by step, the calls of Python functions and of C functions that one takes, and whether the launches are
those of a step without plans.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.nvidia.driver import CudaLauncher

from benchmarks.predict import host, stub_gpu
from benchmarks.predict.steps import narrow_choices, steps
from wavemix_kernels.ops.common import plan


def calls(step: Callable[[], object]) -> tuple[int, int]:
    """Counts calls of functions in Python and in C."""
    counts = {"call": 0, "c_call": 0}

    def count(frame: Any, event: str, argument: Any) -> None:
        if event in counts:
            counts[event] += 1

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return counts["call"], counts["c_call"]


def launches(step: Callable[[], object]) -> list[Any]:
    """The launches that reach Triton's launcher in C in three steps, as written, recorded and by plans: grid, function,
    and the arguments that are no addresses."""
    made: list[Any] = []
    real = {launcher: launcher.launch for launcher in gc.get_objects() if isinstance(launcher, CudaLauncher)}

    def spy(*args: Any) -> None:
        # Since Triton 3.7 the kernel's arguments are one tuple, the last; before, all behind two hooks.
        given = args[-1] if isinstance(args[-1], tuple) else args[13:]
        made.append(([*args[:3]], args[4], [_plain(arg) for arg in given]))

    for launcher in real:
        launcher.launch = spy
    try:
        plan.forget()
        for _ in range(3):
            step()
    finally:
        for launcher, function in real.items():
            launcher.launch = function
    return made


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    if isinstance(value, torch.Tensor):
        value = value.data_ptr()
    if isinstance(value, int) and value > 1 << 32:
        return "address"
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def main(names: list[str]) -> dict[str, Any]:
    torch.set_num_threads(1)
    chosen = [(step, training) for step in steps() if step.name in names for training in (True, False)]
    made = {(step.name, training): host._made(step, "ours", training) for step, training in chosen}
    stub_gpu.install()
    kept = host._without_products()
    found = {}
    for (name, training), step in made.items():
        for _ in range(3):
            step()
        python, c = calls(step)
        thrice = launches(step)
        third = len(thrice) // 3
        found[f"{name} {'training' if training else 'inference'}"] = {
            "python": python, "c": c, "launches": third, "alike": thrice[:third] == thrice[-third:],
        }  # fmt: skip
    del kept
    return found


if __name__ == "__main__":
    with narrow_choices():
        print(json.dumps(main(sys.argv[1:])))
