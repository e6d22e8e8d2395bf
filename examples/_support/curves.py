"""Curves of training runs, drawn from their logs."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from . import files

_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")  # Okabe and Ito's: told apart with any colour vision
_INK, _FAINT = "#1f2328", "#d8dee4"

Rows = Sequence[Mapping[str, float]]


def read(path: Path) -> list[dict[str, float]]:
    """The lines of a log.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no log, or has no line yet.
    """
    with path.open(newline="") as file:
        try:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a log of numbers ({error})") from error
    if not rows or not {"epoch", "seconds", "train_loss", "test_accuracy"} <= rows[0].keys():
        raise ValueError(f"{path}: no lines with epoch, seconds, train_loss and test_accuracy")
    return rows


def save(path: Path, runs: Mapping[str, Rows], published: float) -> None:
    """Training loss and test accuracy by epoch, and test accuracy by minutes, as PNG.

    Args:
        runs: the lines of each log, by label.
        published: accuracy in percent to mark.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), dpi=140, layout="constrained")
    loss, by_epoch, by_time = figure.subplots(1, 3)
    for number, (label, rows) in enumerate(runs.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        epochs = [row["epoch"] for row in rows]
        minutes = list(accumulate(row["seconds"] / 60 for row in rows))
        accuracy = [row["test_accuracy"] for row in rows]
        loss.plot(epochs, [row["train_loss"] for row in rows], color=colour, label=label)
        by_epoch.plot(epochs, accuracy, color=colour, label=label)
        by_time.plot(minutes, accuracy, color=colour, label=label)
    titles = {loss: "training loss", by_epoch: "test accuracy, %", by_time: "test accuracy, %"}
    for axes, title in titles.items():
        axes.set_title(title, color=_INK, fontsize=10, loc="left")
        axes.set_xlabel("minutes" if axes is by_time else "epoch", color=_INK, fontsize=9)
        axes.tick_params(colors=_INK, labelsize=8)
        axes.grid(color=_FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (by_epoch, by_time):
        axes.axhline(published, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)), label=f"published: {published:g} %")
    by_epoch.legend(fontsize=8, frameon=False, loc="lower right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    files.replace(path, buffer.getvalue())
