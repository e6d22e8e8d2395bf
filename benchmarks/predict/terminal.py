"""Predictions as lines of a terminal: whole tables where they fit, what matters of them where they do not."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

from ..report.text import duration
from . import report
from .breakdown import Part
from .chips import CHIPS, Chip
from .measured import Compared

_NARROW = ("us or ms", "ours", "eager", "compile", "host", "bound")


def steps(data: dict[str, Any], chip: str, wide: bool) -> list[str]:
    """Tables of steps, training and inference. Where the terminal is too narrow for all columns and `wide` is not
    asked for: the device times, our host time and the bound."""
    printed = []
    found = report.lines(data, chip)
    for training, title in ((True, "training"), (False, "inference")):
        chosen = [line for line in found if line.training == training]
        if not chosen:
            continue
        lines = _columns([report.HEADINGS, *report.rows(chosen)])
        if not wide and max(map(len, lines)) > shutil.get_terminal_size().columns:
            keep = (0, 1, 2, 3, 5, 10)
            lines = _columns([_NARROW, *(tuple(row[i] for i in keep) for row in report.rows(chosen))])
        printed += ["", f"{CHIPS[chip].name}, {title}, predicted", *lines]
    return printed


def kernels(found: dict[str, dict[str, Any]], chip: str) -> list[str]:
    """A line for each kernel at one shape: microseconds, share of what the chip can do, bound."""
    rows = [(f"{one['us']:.0f}", f"{one['share']:.2f}", one["bound"], name) for name, one in found.items()]
    lines = _columns([("us", "share", "bound", "kernel"), *rows], last=True)
    return ["", f"{CHIPS[chip].name}, kernels, predicted", *lines]


def breakdown(parts: Sequence[Part], title: str, chip: Chip) -> list[str]:
    """A line for each kernel of a step: microseconds in all, share of the step, launches, microseconds each, share of
    what the chip can do, bound, and whether sectors and bank conflicts are those that ran from PTX, or counted."""
    between = chip.launch * sum(part.launches for part in parts)
    whole = sum(part.seconds for part in parts) + between
    rows = [
        (
            f"{part.seconds * 1e6:.0f}", f"{part.seconds / whole:.0%}", str(part.launches),
            f"{part.seconds / part.launches * 1e6:.1f}", f"{part.share:.2f}", part.counts, part.bound, part.name,
        )
        for part in parts
    ]  # fmt: skip
    rows.append(
        (f"{between * 1e6:.0f}", f"{between / whole:.0%}", "", f"{chip.launch * 1e6:.1f}", "", "", "", "launches")
    )
    headings = ("us in all", "of step", "launches", "us each", "of chip", "accesses", "bound", "kernel")
    lines = _columns([headings, *rows], last=True)
    return ["", f"{chip.name}, {title}, device {duration(whole * 1e3)}, predicted", *lines]


def compared(found: Compared, chip: Chip, gpu: str) -> list[str]:
    """A line for each kernel of a step: microseconds predicted and measured, the second over the first, launches of
    both."""

    def row(predicted: float, measured: float, launches: str, name: str) -> tuple[str, ...]:
        ratio = f"{measured / predicted:.2f}x" if predicted and measured else ""
        return f"{predicted * 1e6:.1f}", f"{measured * 1e6:.1f}", ratio, launches, name

    rows = [
        row(pair.predicted, pair.measured, " / ".join(f"{count:.3g}" for count in pair.launches), pair.name)
        for pair in found.pairs
    ]
    predicted = sum(pair.predicted for pair in found.pairs)
    rows.append(row(predicted, sum(pair.measured for pair in found.pairs), "", "all kernels"))
    rows.append(("", f"{found.host * 1e6:.1f}", "", "", "host, until all is queued"))
    rows.append(("", f"{found.whole * 1e6:.1f}", "", "", "step"))
    lines = _columns([("us predicted", "measured", "ratio", "launches", "kernel"), *rows])
    what = "training" if found.training else "inference"
    return ["", f"{found.step.title}, {what}: predicted for {chip.name}, measured on {gpu}", *lines]


def _columns(rows: Sequence[Sequence[str]], last: bool = False) -> list[str]:
    """Cells to the right, the names to the left: of the first column, or of the last two."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = (len(widths) - 2, len(widths) - 1) if last else (0, len(widths) - 1)
    return [
        " ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
