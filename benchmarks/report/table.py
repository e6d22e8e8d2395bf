"""The terminal: progress while it runs, a table per case as it is done. Needs rich."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..harness.measure import Row
from ..harness.providers import OURS
from .text import columns, refusal


def progress(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[doing]}"),
        console=console,
        transient=True,
    )


def show(console: Console, case: str, rows: Sequence[Row]) -> None:
    """Print one case."""
    table = Table(title=case, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    shown = columns(rows)
    for heading, _ in shown:
        table.add_column(heading, justify="left" if heading == "provider" else "right", no_wrap=True)
    refused = []
    fastest = max((row.speedup or 0.0 for row in rows), default=0.0)
    for row in rows:
        if row.status != "ok":
            refused.append(row)
            continue
        style = "cyan" if row.provider in OURS else ""
        table.add_row(*(cell(row) for _, cell in shown), style=f"bold {style}" if row.speedup == fastest else style)
    if len(refused) < len(rows):
        console.print(table)
    else:
        console.print(Text(case, "bold"))
    for row in refused:
        bad = row.status in ("wrong", "failed")
        console.print(Text(f"{row.provider:<10}{refusal(row)}", "red" if bad else "dim"))
    console.print()
