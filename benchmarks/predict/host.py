"""The time that Python takes for a step, measured on this machine with nothing below it: see stub_gpu.py.

Steps are narrow and small (:class:`benchmarks.predict.steps.Step`), so that PyTorch's operators, which compute here on
the CPU, take about as long as their dispatch. Convolutions and matrix products would not: they only allocate. What no
stub can tell is not in these times: the driver's own part of a launch, about :data:`DRIVER_US`, and the library's
choice of a kernel. `aten.add` of two tensors of one element is the unit, measured in between.

``python -m benchmarks.predict.host STEP`` measures in a process of its own and prints JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode

from .steps import Step, narrow_choices, parameters, run, steps
from .tools import Missing

#: Microseconds that NVIDIA's driver takes for a launch, at least: estimated.
DRIVER_US = 2.0
_ROUNDS, _SECONDS = 9, 0.1
_PROVIDERS = ("ours", "eager")
_OURS = "wavemix_kernels"
_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


@dataclass(frozen=True)
class Timed:
    """A step or an operator.

    Attributes:
        us: microseconds of the thread in the fastest round: others on the machine only add to it.
        adds: multiples of one aten.add.
        kernels: launches of this package's kernels.
        library: PyTorch's operators that launch one.
    """

    us: float
    adds: float
    kernels: int = 0
    library: int = 0


def measure(names: Sequence[str]) -> dict[str, Any]:
    """Times of steps by name, each in a process of its own: beside other models one is slower, as no training is.

    Returns:
        ``machine``: processor, versions and microseconds of an aten.add; ``steps``: name -> "training" or "inference"
        -> provider -> :class:`Timed` as a dictionary; ``operators``: name -> :class:`Timed` of each operator of this
        package that the steps called, below autograd.

    Raises:
        Missing: it failed; the message has its last words.
    """
    measured = [_measured(name) for name in names]
    operators: dict[str, Any] = {}
    for one in reversed(measured):
        operators |= one["operators"]
    return {
        "machine": min((one["machine"] for one in measured), key=lambda machine: machine["add_us"]),
        "steps": {name: times for one in measured for name, times in one["steps"].items()},
        "operators": operators,
    }


def _measured(name: str) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["WAVEMIX_KERNELS_VERIFY"] = "0"  # as after the first use
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.predict.host", name]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    if done.returncode != 0:
        raise Missing(f"measuring Python's time failed:\n{done.stderr[-3000:]}")
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


# --- Below: in that process -----------------------------------------------------------------------------------


class _Calls(TorchDispatchMode):
    """Counts launches of PyTorch's operators, and keeps one call of each operator of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.library, self.ours = 0, dict[str, tuple[Any, Any, Any]]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from ..harness.traffic import PLANS, bytes_moved

        kwargs = kwargs or {}
        if func.namespace == _OURS:
            self.ours.setdefault(func._schema.name.split("::")[1], (func, args, kwargs))
            with self:  # for what its implementation calls
                return func.redispatch(_KEYS, *args, **kwargs)
        result = func(*args, **kwargs)
        self.library += bytes_moved(func, args, kwargs, result, PLANS["gpu"]) > 0
        return result


class _Launches:
    """Counts launches of this package's kernels while it is entered."""

    def __enter__(self) -> _Launches:
        from triton import knobs

        from . import core

        self.count, self._before = 0, knobs.runtime.launch_enter_hook
        knobs.runtime.launch_enter_hook = lambda *_: self._add()
        self._cuda = core.launches_to(lambda *_: self._add())
        self._cuda.__enter__()
        return self

    def _add(self) -> None:
        self.count += 1

    def __exit__(self, *error: Any) -> None:
        from triton import knobs

        knobs.runtime.launch_enter_hook = self._before
        self._cuda.__exit__(None, None, None)


def _without_products() -> torch.library.Library:
    """From here on convolutions, matrix products and joined tensors, weights of full width among them, are allocated on
    a CPU and not made, as a GPU's are not in Python's time."""
    library = torch.library.Library("aten", "IMPL")
    made: dict[Any, tuple[torch.Size, tuple[int, ...]]] = {}
    orders: dict[Any, torch.memory_format] = {}

    def convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
        key = (x.shape, x.stride(), weight.shape, weight.stride(), *stride, *padding, transposed)
        if key not in made:
            with torch.device("meta"):
                like = torch.empty(x.shape), torch.empty(weight.shape)
            one = torch.ops.aten.convolution(*like, None, stride, padding, dilation, transposed, output_padding, groups)
            one = torch.empty_like(one, memory_format=order(x, weight))
            made[key] = one.shape, one.stride()
        return x.new_empty_strided(*made[key])

    def convolution_backward(grad, x, weight, bias_sizes, *rest):
        mask, key = rest[-1], (x.shape, x.stride(), weight.shape, weight.stride())
        memory = orders.get(key) or orders.setdefault(key, order(x, weight))
        d_x = torch.empty_like(x, memory_format=memory) if mask[0] else None
        d_weight = torch.empty_like(weight, memory_format=memory) if mask[1] else None
        return d_x, d_weight, weight.new_empty(bias_sizes) if mask[2] else None

    def order(x: Tensor, weight: Tensor) -> torch.memory_format:
        """cuDNN's, of all that it makes: channels_last where either argument is."""
        either = torch.channels_last in map(suggest_memory_format, (x, weight))
        return torch.channels_last if either else torch.contiguous_format

    def mm(a: Tensor, b: Tensor) -> Tensor:
        return a.new_empty((*a.shape[:-1], b.shape[-1]))

    def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        return a.new_empty((a.shape[0], b.shape[1]))

    def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
        shape = list(tensors[0].shape)
        shape[dim] = sum(t.shape[dim] for t in tensors)
        return tensors[0].new_empty(shape)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced is meant
        for function in (convolution, convolution_backward, mm, addmm, cat):
            library.impl(function.__name__, function, "CPU")
        library.impl("bmm", mm, "CPU")
        library.impl("mm.out", lambda a, b, *, out: out, "CPU")
        library.impl("addmm.out", lambda bias, a, b, *, beta=1, alpha=1, out: out, "CPU")
        library.impl("addmm_", lambda bias, a, b, *, beta=1, alpha=1: bias, "CPU")
    return library


def _made(step: Step, provider: str, training: bool) -> Callable[[], None]:
    made = step.make(provider, training=training, narrow=True)
    order = torch.channels_last if step.channels_last else torch.contiguous_format
    x = torch.randn(step.few, dtype=torch.bfloat16).contiguous(memory_format=order)
    x.requires_grad_(training and not step.image)

    weights = parameters(made)
    return lambda: run(made, x, training=training, weights=weights)


def _seconds(call: Callable[[], object], times: int) -> float:
    begin = time.thread_time()
    for _ in range(times):
        call()
    return (time.thread_time() - begin) / times


def _timed(calls: dict[Any, Callable[[], object]]) -> dict[Any, tuple[float, float]]:
    """Microseconds of this thread and adds of each: rounds in turn, so that all meet the same machine."""
    a = torch.ones(1)

    def add() -> object:
        return torch.add(a, a)

    short = {key: min(_seconds(call, 1) for _ in range(3)) for key, call in calls.items()}
    counts = {key: max(1, int(_SECONDS / max(seconds, 1e-7))) for key, seconds in short.items()}
    times: dict[Any, list[float]] = {key: [] for key in calls}
    units = []
    for _ in range(_ROUNDS):
        for key, call in calls.items():
            units.append(_seconds(add, 3000))
            times[key].append(_seconds(call, counts[key]))
    return {key: (min(took) * 1e6, min(took) / min(units)) for key, took in times.items()}


def _choices(narrow: bool) -> AbstractContextManager[None]:
    return narrow_choices() if narrow else nullcontext()


def _main(name: str) -> dict[str, Any]:
    from ..harness.machine import environment
    from . import stub_gpu

    torch.set_num_threads(1)
    chosen = [step for step in steps() if step.name == name]
    made: dict[bool, dict[Any, Callable[[], None]]] = {True: {}, False: {}}  # narrow, or as they are
    for step, training, provider in itertools.product(chosen, (True, False), _PROVIDERS):
        narrow = step.is_narrow(training)
        with _choices(narrow):
            made[narrow][step.name, training, provider] = _made(step, provider, training)
    stub_gpu.install()
    kept = _without_products()
    counts: dict[Any, tuple[int, int]] = {}
    operators: dict[str, Any] = {}
    timed: dict[Any, tuple[float, float]] = {}
    for narrow, alike in made.items():
        with _choices(narrow):
            for key, call in alike.items():
                call()
                with _Launches() as launches, _Calls() as calls:
                    call()
                counts[key] = launches.count, calls.library
                if key[2] == "ours":
                    operators |= {name: call for name, call in calls.ours.items() if name not in operators}
            timed |= _timed(alike)
    found: dict[str, Any] = {step.name: {"training": {}, "inference": {}} for step in chosen}
    for (name, training, provider), (us, adds) in timed.items():
        kernels, library = counts[name, training, provider]
        found[name]["training" if training else "inference"][provider] = asdict(Timed(us, adds, kernels, library))
    single: dict[str, Any] = {}
    with torch.no_grad(), _choices(True):
        alone = {name: (lambda f=f, args=args, kw=kw: f(*args, **kw)) for name, (f, args, kw) in operators.items()}
        for name, call in alone.items():
            with _Launches() as launches, _Calls() as calls:
                call()
            single[name] = launches.count, calls.library
        operator_times = {name: asdict(Timed(*pair, *single[name])) for name, pair in _timed(alone).items()}
    a = torch.ones(1)
    unit = min(_seconds(lambda: torch.add(a, a), 3000) for _ in range(21)) * 1e6
    del kept
    import triton

    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    return {
        "machine": {"cpu": environment(torch.device("cpu"))["cpu"], "add_us": unit, **versions},
        "steps": found,
        "operators": operator_times,
    }


if __name__ == "__main__":
    print(json.dumps(_main(sys.argv[1])))
