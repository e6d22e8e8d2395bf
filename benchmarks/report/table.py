"""The terminal by rich: a progress bar and coloured tables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from rich import progress as bars
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..harness.measure import Row
from ..harness.providers import OURS
from .terminal import Progress, Terminal
from .text import columns, refusal, refusals


class _Bar(Progress):
    def __init__(self, bar: bars.Progress, total: int) -> None:
        self._bar = bar
        self._task = bar.add_task("benchmarks", total=total, doing="")

    def doing(self, what: str) -> None:
        self._bar.update(self._task, doing=what)

    def advance(self) -> None:
        self._bar.advance(self._task)


class RichTerminal(Terminal):
    """Colours, and a bar that vanishes at the end."""

    def __init__(self) -> None:
        self._console = Console()

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    @contextlib.contextmanager
    def progress(self, total: int) -> Iterator[Progress]:
        parts = (
            bars.TextColumn("[bold]{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("[dim]{task.fields[doing]}"),
        )
        with bars.Progress(*parts, console=self._console, transient=True) as bar:
            yield _Bar(bar, total)

    def show(self, case: str, rows: Sequence[Row]) -> None:
        table = Table(title=case, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
        shown = columns(rows)
        for heading, _ in shown:
            table.add_column(heading, justify="left" if heading == "provider" else "right", no_wrap=True)
        refused = refusals(rows)
        fastest = max((row.speedup or 0.0 for row in rows), default=0.0)
        for row in rows:
            if row.status != "ok":
                continue
            style = "cyan" if row.provider in OURS else ""
            bold = f"bold {style}" if row.speedup == fastest else style
            table.add_row(*(cell(row) for _, cell in shown), style=bold)
        if any(row.status == "ok" for row in rows):
            self._console.print(table)
        else:
            self._console.print(Text(case, "bold"))
        for names, row in refused:
            bad = row.status in ("wrong", "failed")
            self._console.print(Text(f"{names:<16} {refusal(row)}", "red" if bad else "dim"))
        self._console.print()
