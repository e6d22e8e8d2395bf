"""docs/predicted.md, from predicted.json: ``python -m benchmarks predict --write`` makes both."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..report.text import NONE, duration
from .chips import CHIPS
from .host import DRIVER_US
from .steps import Step, steps

ROOT = Path(__file__).resolve().parents[2]
DATA, PAGE = Path(__file__).parent / "predicted.json", ROOT / "docs" / "predicted.md"
_PASSES = {True: "training", False: "inference"}

_INTRODUCTION = """\
# Predicted speed on GPUs

<!-- Generated from benchmarks/predict/predicted.json by `python -m benchmarks predict --write`. A test finds edits by
hand. -->

**Nothing on this page was measured on a GPU.** The times of our kernels follow from their machine code and a table of
chips (`benchmarks/predict/`), those of other operators from their bytes and products. Expect errors of 20 to 30 %, and
more below 20 us; the [last table](#calibration) has the errors for published numbers of other kernels.
`benchmarks/gpu.sh` measures on your card, and what it finds replaces this page ([GPU status](gpu-status.md)).

- **device**: all kernels of a step one after the other, with {launch:.1f} us between two. A CUDA graph takes this long.
- **host**: Python and PyTorch's dispatch, measured on one core ({cpu}) with a stub in place of the driver, where one
  `aten.add` takes {add:.1f} us, and {driver:.0f} us a launch for the driver itself, which is estimated. What cuDNN and
  cuBLAS do before a launch is in nobody's. Steps are timed with few channels, so that what the library computes on the
  CPU is small; Wave-MLP's and PATM's are not, as their kernels serve certain widths alone: theirs are upper bounds.
  Batches of 1 and 16 take the same way through Python, and have the largest batch's.
- **step**: the longer of the two, as without a CUDA graph.
- **eager**: upstream's order of operations, each operator at a library's best rate, one pass over its tensors.
- **compile**: an ideal torch.compile. Every chain of pointwise operators is one pass, products are the library's,
  normalisation is two passes. Its host time is a launch and an `aten.add` for each kernel. No compiler reaches it.
- **bound**: what the longest part of our device time waits for, with its share, or `Python` where the host takes
  longer.
- All in bf16. Training is the output and all gradients, without an optimizer.
- Rows are made one at a time, by `--case`: neighbours may come from neighbouring commits, and host times from a machine
  that did other work meanwhile. A step or chip without a row has not been predicted yet.
"""


@dataclass(frozen=True)
class Line:
    """A step on a chip: seconds of device and host by provider, and what bounds ours."""

    step: Step
    training: bool
    device: dict[str, float]
    host: dict[str, float]
    bound: str

    def step_of(self, provider: str) -> float:
        return max(self.device[provider], self.host.get(provider, 0.0))


def lines(data: dict[str, Any], chip: str) -> list[Line]:
    """The predictions for a chip, in the order of the steps."""
    found, machine = [], data["machine"]
    for step in steps():
        predicted, measured = data["chips"].get(chip, {}).get(step.name), data["host"].get(step.name)
        if predicted is None:
            continue
        for training in (True, False):
            one = {p["provider"]: p for p in predicted if p["training"] == training}
            host = {
                provider: (timed["us"] + DRIVER_US * (timed["kernels"] + timed["library"])) * 1e-6
                for provider, timed in (measured or {}).get(_PASSES[training], {}).items()
            }
            if measured:
                host["compile"] = sum(one["compile"]["launches"].values()) * (machine["add_us"] + DRIVER_US) * 1e-6
            device = {provider: p["seconds"] for provider, p in one.items()}
            bounds = one["ours"]["bounds"]
            largest = max(bounds, key=lambda name: bounds[name])
            slow = host.get("ours", 0.0) > device["ours"]
            bound = "Python" if slow else f"{largest} {bounds[largest] / device['ours']:.0%}"
            found.append(Line(step, training, device, host, bound))
    return found


def rows(found: Iterable[Line]) -> list[tuple[str, ...]]:
    """Cells of a table, see :data:`HEADINGS`."""
    return [
        (
            line.step.title,
            *(_ms(line.device[provider]) for provider in ("ours", "eager", "compile")),
            f"{line.device['compile'] / line.device['ours']:.2f}x",
            *(_ms(line.host.get(provider)) for provider in ("ours", "eager", "compile")),
            *(f"{line.step_of(p) / line.step_of('ours'):.2f}x" for p in ("eager", "compile")),
            line.bound,
        )
        for line in found
    ]


HEADINGS = (
    "", "ours, device", "eager, device", "compile, device", "over compile, device", "ours, host", "eager, host",
    "compile, host", "over eager, step", "over compile, step", "bound",
)  # fmt: skip


def _ms(seconds: float | None) -> str:
    return NONE if seconds is None else duration(seconds * 1e3)


def page(data: dict[str, Any]) -> str:
    """docs/predicted.md."""
    machine = data["machine"]
    launch = 1e6 * next(iter(CHIPS.values())).launch
    parts = [_INTRODUCTION.format(launch=launch, cpu=machine["cpu"], add=machine["add_us"], driver=DRIVER_US)]
    for name, chip in CHIPS.items():
        found = lines(data, name)
        if found:
            parts.append(f"## Steps on an {chip.name}\n" if chip.name[0] in "AH" else f"## Steps on a {chip.name}\n")
            for training, title in _PASSES.items():
                parts.append(f"### {title.capitalize()}, {chip.name}\n")
                parts.append(_table(HEADINGS, rows(line for line in found if line.training == training)))
    if any(data["kernels"].values()):
        parts.append(_KERNELS)
        parts.append(_kernels(data["kernels"]))
    if data["operators"]:
        parts.append(_OPERATORS)
        operators = data["operators"].items()
        cells = [
            (f"`{name}`", f"{t['us']:.0f}", f"{t['adds']:.0f}", str(t["kernels"]), str(t["library"]))
            for name, t in operators
        ]
        parts.append(_table(("operator", "us", "in `aten.add`", "our kernels", "PyTorch's"), cells))
    parts.append(_CALIBRATION)
    parts.append(_calibration(data["calibration"], data["notes"]))
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "triton"))
    parts.append(f"Made with {versions}.\n")
    return "\n".join(parts)


_KERNELS = """\
## Kernels

Microseconds, the share of what the chip can do (bytes at the speed of a copy, or products at tensor peak), and the
bound.
"""
_OPERATORS = """\
## Python for an operator

One call below autograd, by the host's measure above without the driver's part.
"""
_CALIBRATION = """\
## Calibration

Published times of kernels that stream are given less a fixed time of their measurement: that of the straight line
through the two largest sizes.
"""


def _kernels(kernels: dict[str, dict[str, Any]]) -> str:
    chips = [name for name in CHIPS if name in kernels]
    names = dict.fromkeys(name for chip in chips for name in kernels[chip])
    cells = []
    for name in names:
        found = [kernels[chip].get(name) for chip in chips]
        cells.append((f"`{name}`", *(f"{k['us']:.0f}, {k['share']:.2f}, {k['bound']}" if k else NONE for k in found)))
    return _table(("kernel", *(CHIPS[chip].name for chip in chips)), cells)


def _calibration(calibration: Sequence[dict[str, Any]], notes: Sequence[str]) -> str:
    if not calibration:
        return "None was made.\n"
    cells = [
        (c["name"], CHIPS[c["chip"]].name, f"{c['published'] * 1e6:.1f}", f"{c['predicted'] * 1e6:.1f}",
         f"{c['error']:+.0%}", c["source"])
        for c in calibration
    ]  # fmt: skip
    table = _table(("kernel", "chip", "published, us", "predicted, us", "error", "source"), cells)
    return f"{table}\n" + "".join(f"- {note}\n" for note in notes)


def _table(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (headings, ["---"] * len(headings), *cells))


def load() -> dict[str, Any]:
    """All predictions so far."""
    empty: dict[str, Any] = {"machine": {}, "host": {}, "operators": {}, "chips": {}, "kernels": {}, "calibration": []}
    return {**empty, "notes": [], **(json.loads(DATA.read_text()) if DATA.exists() else {})}


def save(data: dict[str, Any]) -> None:
    """Both files; numbers of four digits."""
    data = _rounded(data)
    DATA.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(data), encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
