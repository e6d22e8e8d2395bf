"""Bars of speed and memory, one figure per group and kind. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .measure import Row
from .providers import PROVIDERS
from .results import Results


@dataclass(frozen=True)
class Theme:
    """Colours of a figure.

    Attributes:
        providers: one colour each, told apart by readers with any colour vision (Okabe and Ito's palette).
    """

    ground: str
    ink: str
    faint: str
    providers: dict[str, str]


_LIGHT_BARS = {
    "upstream": "#9aa0a6",
    "reference": "#c9b458",
    "compile": "#e69f00",
    "auto": "#0072b2",
    "cpu": "#56b4e9",
    "triton": "#009e73",
    "cuda": "#cc79a7",
}
LIGHT = Theme("#ffffff", "#1f2328", "#d8dee4", _LIGHT_BARS)
DARK = Theme("#0d1117", "#e6edf3", "#30363d", _LIGHT_BARS | {"auto": "#3d9be0", "upstream": "#7d858e"})


def figures(results: Results) -> list[tuple[str, str, Callable[[Theme], bytes]]]:
    """(file name without ending, caption, what draws it as PNG) of every figure that has something to show."""
    found = []
    for group in results.groups():
        rows = [row for row in results.rows if row.group == group and row.status == "ok"]
        if any(row.speedup is not None for row in rows):
            baseline = next(row.baseline for row in rows if row.baseline is not None)
            caption = f"{group}: speed-up over {baseline} (ratio of medians, longer is better)"
            found.append((f"speed-{group}", caption, _drawer(rows, caption, lambda row: row.speedup, "{:.2f}x", 1.0)))
        if any(row.peak_bytes is not None for row in rows):
            caption = f"{group}: peak memory above inputs (MiB, shorter is better)"
            drawer = _drawer(rows, caption, _mebibytes("peak_bytes"), "{:.4g}", None)
            found.append((f"memory-{group}", caption, drawer))
        if any(row.saved_bytes is not None for row in rows):
            caption = f"{group}: kept for backward, beside inputs and parameters (MiB, shorter is better)"
            trained = [row for row in rows if row.saved_bytes is not None]
            drawer = _drawer(trained, caption, _mebibytes("saved_bytes"), "{:.4g}", None)
            found.append((f"saved-{group}", caption, drawer))
    return found


def _mebibytes(field: str) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        count = getattr(row, field)
        return None if count is None else count / 2**20

    return value


def _drawer(
    rows: Sequence[Row], title: str, value: Callable[[Row], float | None], form: str, line: float | None
) -> Callable[[Theme], bytes]:
    return lambda theme: _bars(rows, title, value, form, line, theme)


def _bars(
    rows: Sequence[Row],
    title: str,
    value: Callable[[Row], float | None],
    form: str,
    line: float | None,
    theme: Theme,
) -> bytes:
    """Horizontal bars, a block per case, a bar per provider that has a value in it."""
    cases = list(dict.fromkeys(row.case for row in rows))
    providers = [name for name in PROVIDERS if any(row.provider == name for row in rows)]
    bar, gap = 0.21, 0.42  # inches
    heights = {case: sum(1 for row in rows if row.case == case) * bar + gap for case in cases}
    total = sum(heights.values())
    figure = Figure(figsize=(9.0, total + 1.25), dpi=150, facecolor=theme.ground)
    axes: Axes = figure.add_axes((0.02, 0.42 / (total + 1.25), 0.96, total / (total + 1.25)), facecolor=theme.ground)
    longest = max((value(row) or 0.0 for row in rows), default=0.0) or 1.0
    position = 0.0
    for case in cases:
        rest = case.partition("/")[2]
        axes.text(0, position + 0.3, rest.replace("/", "  "), color=theme.ink, fontsize=8.5, weight="bold", va="center")
        position += gap
        for row in (row for row in rows if row.case == case):
            length = value(row)
            if length is None:
                continue
            centre = position + bar / 2
            axes.barh(centre, length, height=bar * 0.84, color=theme.providers[row.provider])
            axes.text(length + longest * 0.008, centre, form.format(length), color=theme.ink, fontsize=7.5, va="center")
            position += bar
    if line is not None:
        axes.axvline(line, color=theme.ink, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.6)
    axes.set_xlim(0, longest * 1.1)
    axes.set_ylim(total, 0)
    axes.set_yticks([])
    axes.tick_params(colors=theme.ink, labelsize=8, length=0)
    axes.grid(axis="x", color=theme.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.text(0.02, 1 - 0.22 / (total + 1.25), title, color=theme.ink, fontsize=11, weight="bold", va="center")
    handles = [axes.barh(0, 0, color=theme.providers[name]) for name in providers]
    legend = figure.legend(
        handles,
        providers,
        loc="center left",
        bbox_to_anchor=(0.012, 1 - 0.52 / (total + 1.25)),
        ncols=len(providers),
        frameon=False,
        fontsize=8.5,
        handlelength=1,
        handleheight=0.9,
        columnspacing=1.4,
    )
    for label in legend.get_texts():
        label.set_color(theme.ink)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=theme.ground)
    return buffer.getvalue()
