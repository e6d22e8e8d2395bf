"""The terminal: what is being done, and a table per case as it is done. Plain text; `table` has it by rich."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from ..harness.measure import Row
from .text import columns, refusal, refusals


class Progress:
    """How far a run is: nothing to see here, where a log may be what keeps the output."""

    def doing(self, what: str) -> None:
        """`what` has begun."""

    def advance(self) -> None:
        """A case is done."""


class Terminal:
    """Plain text."""

    def say(self, line: str) -> None:
        print(line, flush=True)

    @contextlib.contextmanager
    def progress(self, total: int) -> Iterator[Progress]:
        yield Progress()

    def show(self, case: str, rows: Sequence[Row]) -> None:
        """Print one case."""
        self.say(case)
        shown = columns(rows)
        timed = [row for row in rows if row.status == "ok"]
        lines = [[heading for heading, _ in shown], *([cell(row) for _, cell in shown] for row in timed)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)] if timed else []
        for line in lines if timed else []:
            first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            self.say("  ".join([first.strip().ljust(widths[0]), *others]))
        for names, row in refusals(rows):
            self.say(f"{names:<16} {refusal(row)}")
        self.say("")
