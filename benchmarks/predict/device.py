"""The time of a whole step on a chip: its launches one after the other, ours by machine code, others by rivals.py."""

from __future__ import annotations

import functools
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from . import executed, rivals
from .bound import predict
from .chips import CHIPS, Chip
from .record import Array, Launch, image, recording
from .steps import PROVIDERS, Step, run, steps
from .tools import CACHE, ROOT, key

_BASE = 1 << 44


@dataclass(frozen=True)
class Device:
    """A step of one provider on one chip.

    Attributes:
        seconds: of all launches, and between them.
        launches: by kind: "cuda" and "triton" are this package's, "library" the others.
        seconds_by: of our kernels by name, of the library's together.
        bounds: seconds in launches that this bound holds; "launch": between launches.
        bytes: that device memory moves.
    """

    seconds: float
    launches: dict[str, int]
    seconds_by: dict[str, float]
    bounds: dict[str, float]
    bytes: float


def record(step: Step, provider: str, training: bool, chip: Chip) -> tuple[list[Launch], list[Launch]]:
    """Launches of a forward pass, and of its gradients."""
    with recording(chip.capability) as found:
        made = step.make(provider, training=training)
        x = image(step.size, torch.bfloat16, step.channels_last, grad=training and not step.image)
        if not training and provider == "ours":
            run(made, x, training=False)  # an inference form folds what it keeps
        found.clear()
        ends: list[int] = []
        run(made, x, training=training, between=lambda: ends.append(len(found.launches)))
        launches = list(found.launches)
    end = ends[0] if ends else len(launches)
    return launches[:end], launches[end:]


def device(step: Step, provider: str, training: bool, chip: Chip) -> Device:
    """The prediction for a step.

    Raises:
        execute.NotUnderstood, tools.Missing: see :func:`benchmarks.predict.bound.predict`.
    """
    forward, backward = record(step, provider, training, chip)
    if provider == "compile":
        return _sum(rivals.compiled(forward, backward), chip)
    return _sum([rivals.operator(one) if one.kind == "aten" else one for one in (*forward, *backward)], chip)


@dataclass(frozen=True)
class Known:
    """The part of a prediction that a step needs, see :class:`benchmarks.predict.bound.Prediction`."""

    seconds: float
    bound: str
    bytes: float
    share: float
    executed: bool = False


def known(one: Launch, chip: Chip) -> Known:
    """The prediction for one launch of a step, ours or the library's.

    Raises:
        execute.NotUnderstood, tools.Missing: see :func:`benchmarks.predict.bound.predict`.
    """
    if one.kind != "aten":
        return _predicted(one, chip)
    return _of_pass(rivals.operator(one), chip)


def _of_pass(one: rivals.Pass, chip: Chip) -> Known:
    seconds, bound = one.seconds(chip), one.bound(chip)
    ideal = max(one.bytes / chip.copy_bandwidth, one.flops / chip.peak_flops(one.dtype) if one.flops else 0.0)
    return Known(seconds, bound, one.bytes, ideal / seconds)


def _sum(launches: Sequence[Launch | rivals.Pass], chip: Chip) -> Device:
    kinds: Counter[str] = Counter()
    by: dict[str, float] = {}
    bounds: dict[str, float] = {"launch": len(launches) * chip.launch}
    moved = 0.0
    for one in launches:
        if isinstance(one, rivals.Pass):
            kind, name, found = "library", "library", _of_pass(one, chip)
        else:
            kind, name, found = one.kind, one.operator, _predicted(one, chip)
        kinds[kind] += 1
        by[name] = by.get(name, 0.0) + found.seconds
        bounds[found.bound] = bounds.get(found.bound, 0.0) + found.seconds
        moved += found.bytes
    return Device(sum(bounds.values()), dict(kinds), by, bounds, moved)


_known: dict[str, Known] = {}


@functools.cache
def _sources() -> str:
    """Changes with whatever decides a prediction."""
    import triton

    here = [p for p in Path(__file__).parent.rglob("*") if p.suffix in (".py", ".cpp") and p.name not in _ABOVE]
    kernels = [*(ROOT / "wavemix_kernels" / "ops").rglob("*.py"), *(ROOT / "csrc" / "cuda").rglob("*.cu*")]
    headers = (ROOT / "csrc" / "include").rglob("*.h")
    return key([*here, *kernels, *headers, *filter(Path.exists, [executed.DATA])], triton.__version__)


# Modules that do not decide the prediction of a launch.
_ABOVE = {
    f"{name}.py"
    for name in (
        *("breakdown", "calibration", "cli", "device", "gates", "host", "kept", "kernels"),
        *("report", "rivals", "share", "steps", "stub_gpu", "terminal"),
    )
}


def _predicted(launch: Launch, chip: Chip) -> Known:
    """Blocks of a model repeat themselves elsewhere in memory, and the next run asks the same."""
    moved = relocated(launch)
    asked = (moved.name, moved.grid, moved.threads, moved.shared, moved.arrays, moved.args, moved.constants)
    name = key((), _sources(), [part.name for part in fields(Known)], chip, asked, moved.parameters)
    if name not in _known:
        file = CACHE / "launches" / f"{name}.json"
        if file.exists():
            _known[name] = Known(**json.loads(file.read_text()))
        else:
            found = predict(moved, chip)
            _known[name] = Known(found.seconds, found.bound, found.bytes, found.share, found.executed)
            file.parent.mkdir(parents=True, exist_ok=True)
            own = file.with_suffix(f".{os.getpid()}")
            own.write_text(json.dumps(asdict(_known[name])))
            own.rename(file)
    return _known[name]


def relocated(launch: Launch) -> Launch:
    """The launch with its tensors at addresses that follow from their order alone; what overlaps stays together."""
    spans: list[list[int]] = []  # begin, end
    for begin, end in sorted((a.address, a.address + _span(a)) for a in launch.arrays):
        if spans and begin < spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([begin, end])
    moves: dict[int, int] = {}  # of each span, by its begin
    free = _BASE

    def moved(address: int) -> int:
        nonlocal free
        for begin, end in spans:
            if begin <= address < end:
                if begin not in moves:
                    inside = begin % 4096
                    moves[begin] = free + inside - begin
                    free += (inside + end - begin + 4095) // 4096 * 4096 + 4096
                return address + moves[begin]
        return address

    def at(value: Any) -> Any:
        return replace(value, address=moved(value.address)) if isinstance(value, Array) else value

    arrays, args = tuple(map(at, launch.arrays)), tree_map(at, launch.args)
    words = [launch.parameters[i : i + 8] for i in range(0, len(launch.parameters), 8)]
    parameters = b"".join(
        moved(int.from_bytes(word, "little")).to_bytes(8, "little") if len(word) == 8 else word for word in words
    )
    return replace(launch, arrays=arrays, args=args, parameters=parameters)


def _span(array: Array) -> int:
    last = sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True) if n > 0)
    return max((last + 1) * torch.empty((), dtype=array.dtype).element_size() if math.prod(array.shape) else 0, 1)


def _of_step(name: str, chip: str) -> list[dict[str, Any]]:
    step = next(one for one in steps() if one.name == name)
    return [
        {"provider": provider, "training": training, **asdict(device(step, provider, training, CHIPS[chip]))}
        for training in (True, False)
        for provider in PROVIDERS
    ]


def devices(names: Iterable[str], chip: str) -> dict[str, list[dict[str, Any]]]:
    """Every prediction of these steps on a chip, by several processes; the first time it takes many minutes."""
    names = list(names)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return dict(zip(names, pool.map(functools.partial(_of_step, chip=chip), names), strict=True))
