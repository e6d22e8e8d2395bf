"""How far training is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

from types import TracebackType
from typing import Any

#: Lines in an epoch, where there is no terminal.
LINES = 10


class Progress:
    """While the context lasts, shows the steps that :meth:`advance` counts.

    Args:
        console: rich's; a quiet one shows nothing.
        total: steps in all.
        done: steps before this run.
        epoch: steps between which :data:`LINES` lines are printed.
    """

    def __init__(self, console: Any, total: int, done: int = 0, epoch: int | None = None) -> None:
        from rich import progress

        self.console, self.total, self.done = console, total, done
        self.every = max(1, (epoch or total) // LINES)
        self.tail = ""
        self.bar = progress.Progress(
            progress.TextColumn("[bold]{task.fields[head]}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("[dim]{task.fields[tail]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=total, completed=done, head="", tail="")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def advance(self, head: str, tail: str | None = None) -> None:
        """A step more, of what ``head`` names; ``tail`` is its result, None the one before."""
        self.done += 1
        self.tail = self.tail if tail is None else tail
        self.bar.update(self.task, completed=self.done, head=head, tail=self.tail)
        if not self.console.is_terminal and self.done % self.every == 0:
            self.console.print(f"{head}: {self.done} of {self.total} steps{self.tail and f', {self.tail}'}")
