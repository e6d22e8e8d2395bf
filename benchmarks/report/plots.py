"""Bars of speed and memory, one figure per group and kind. Needs matplotlib."""

from __future__ import annotations

import io
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..harness.measure import Row
from ..harness.providers import PROVIDERS
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
    "ptwt": "#b8a1c9",
    "torchwavelets": "#8f7aa8",
    "PyWavelets": "#66527f",
    "reference": "#c9b458",
    "compile": "#e69f00",
    "reduce-overhead": "#d55e00",
    "ours": "#0072b2",
    "ours+compile": "#004b75",
    "ours+graph": "#5b8db8",
    "cpu": "#56b4e9",
    "triton": "#009e73",
    "cuda": "#cc79a7",
}
LIGHT = Theme("#ffffff", "#1f2328", "#d8dee4", _LIGHT_BARS)
DARK = Theme(
    "#0d1117", "#e6edf3", "#30363d", _LIGHT_BARS | {"ours": "#2f81f7", "cpu": "#9ad7ff", "upstream": "#7d858e"}
)


@dataclass(frozen=True)
class Chart:
    """The content of one figure.

    Attributes:
        name: of its file, without ending.
        caption: its title.
        bars: length of each row's bar.
        form: how a length is written beside its bar.
        line: where the baseline is, if it is no bar.
    """

    name: str
    caption: str
    bars: list[tuple[Row, float]]
    form: str
    line: float | None = None


def charts(results: Results) -> list[Chart]:
    """Every figure that has something to show."""
    found = []
    for group in results.groups():
        rows = [row for row in results.rows if row.group == group and row.status == "ok"]
        faster = [(row, row.speedup) for row in rows if row.speedup is not None and row.provider != row.baseline]
        if faster:
            over = f"{group}: speed-up over {faster[0][0].baseline} (the dashed line; longer is better)"
            found.append(Chart(f"speed-{group}", over, faster, "{:.2f}x", line=1.0))
        held = [(row, row.peak_bytes / 2**20) for row in rows if row.peak_bytes is not None]
        if held:
            peak = f"{group}: peak memory above inputs, MiB (shorter is better)"
            found.append(Chart(f"memory-{group}", peak, held, "{:.3g}"))
        kept = [(row, row.saved_bytes / 2**20) for row in rows if row.saved_bytes is not None]
        if any(length > 0 for _, length in kept):
            saved = f"{group}: kept for backward beside inputs and parameters, MiB (shorter is better)"
            found.append(Chart(f"saved-{group}", saved, kept, "{:.3g}"))
    return found


_BAR, _GAP, _HEAD, _FOOT = 0.2, 0.4, 0.8, 0.35  # inches
_WIDTH, _DPI = 10.0, 140


def draw(what: Chart, theme: Theme) -> bytes:
    """The figure as PNG: a column per pass, a block per case, a bar per provider."""
    passes = list(dict.fromkeys(_pass(row) for row, _ in what.bars))
    blocks = list(dict.fromkeys(_block(row) for row, _ in what.bars))
    providers = [name for name in PROVIDERS if any(row.provider == name for row, _ in what.bars)]
    heights = {
        block: _GAP
        + _BAR * max(sum(1 for row, _ in what.bars if (_block(row), _pass(row)) == (block, name)) for name in passes)
        for block in blocks
    }
    inside = sum(heights.values())
    height = _HEAD + inside + _FOOT
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor=theme.ground)
    share = 0.96 / len(passes)
    longest = max((*(length for _, length in what.bars), what.line or 0.0)) or 1.0
    for column, name in enumerate(passes):
        position = (0.02 + column * share, _FOOT / height, share - 0.02, inside / height)
        axes = figure.add_axes(position, facecolor=theme.ground)
        bars = [(row, length) for row, length in what.bars if _pass(row) == name]
        _column(axes, bars, heights, inside, longest, what.form, theme)
        if what.line is not None:
            axes.axvline(what.line, color=theme.ink, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.6, zorder=2.5)
        # One scale for all columns, with room for labels beside the longest bar.
        axes.set_xlim(0, longest * (1.16 if len(passes) > 1 else 1.5))
    figure.text(0.02, 1 - 0.22 / height, what.caption, color=theme.ink, fontsize=11.5, weight="bold", va="center")
    legend = figure.legend(
        [Patch(color=theme.providers[name]) for name in providers],
        providers,
        loc="center left",
        bbox_to_anchor=(0.013, 1 - 0.52 / height),
        ncols=len(providers),
        frameon=False,
        fontsize=9,
        handlelength=1,
        handleheight=0.9,
        columnspacing=1.4,
    )
    for label in legend.get_texts():
        label.set_color(theme.ink)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=theme.ground)
    return buffer.getvalue()


def _column(
    axes: Axes,
    bars: list[tuple[Row, float]],
    heights: dict[str, float],
    inside: float,
    longest: float,
    form: str,
    theme: Theme,
) -> None:
    top = 0.0
    # Labels cover the grid behind them instead of being struck through by it.
    cover = {"facecolor": theme.ground, "edgecolor": "none", "pad": 1.2}
    for block, height in heights.items():
        mine = [(row, length) for row, length in bars if _block(row) == block]
        if mine:
            title = f"{block}  {_pass(mine[0][0])}"
            axes.text(0, top + 0.27, title, color=theme.ink, fontsize=8.5, weight="bold", va="center", bbox=cover)
        for number, (row, length) in enumerate(mine):
            centre = top + _GAP + (number + 0.5) * _BAR
            axes.barh(centre, length, height=_BAR * 0.84, color=theme.providers[row.provider])
            label = form.format(length)
            axes.text(
                length + longest * 0.012, centre, label, color=theme.ink, fontsize=7.5, va="center_baseline", bbox=cover
            )
        top += height
    axes.set_ylim(inside, 0)
    axes.set_yticks([])
    axes.tick_params(colors=theme.ink, labelsize=8, length=0)
    axes.grid(axis="x", color=theme.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def _pass(row: Row) -> str:
    return row.case.rpartition("/")[2]


def _block(row: Row) -> str:
    """A case without its group and pass, as a heading."""
    return "  ".join(row.case.split("/")[1:-1])
