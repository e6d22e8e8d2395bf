"""results.json: written after every case, so that whatever ends a run loses nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from ..harness.measure import Row

FORMAT = 1  # raised when a reader of older files would misread a newer one


@dataclasses.dataclass
class Results:
    """A run so far.

    Attributes:
        complete: False until the last case is in, and for good after an interrupt.
        lost: the case in which an error stayed in the GPU, which ends a run.
    """

    path: Path
    environment: dict[str, Any]
    machine: dict[str, Any]
    options: dict[str, Any]
    rows: list[Row] = dataclasses.field(default_factory=list)
    complete: bool = False
    lost: str | None = None
    seconds: float = 0.0

    @classmethod
    def load(cls, path: Path) -> Results:
        """The results that :meth:`save` wrote.

        Raises:
            OSError, ValueError, KeyError, TypeError: it is no such file.
        """
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        return cls(path, **content | {"rows": [Row(**fields) for fields in content["rows"]]})

    def add(self, rows: list[Row]) -> None:
        self.rows += rows
        self.save()

    def save(self) -> None:
        content = {
            "format": FORMAT,
            "complete": self.complete,
            "lost": self.lost,
            "seconds": round(self.seconds, 1),
            "environment": self.environment,
            "machine": self.machine,
            "options": self.options,
            "rows": [_finite(dataclasses.asdict(row)) for row in self.rows],
        }
        # Written beside it, then renamed: a reader never sees half a file.
        draft = self.path.with_suffix(".json.part")
        draft.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        os.replace(draft, self.path)

    def groups(self) -> list[str]:
        return list(dict.fromkeys(row.group for row in self.rows))

    def cases(self, group: str) -> list[str]:
        return list(dict.fromkeys(row.case for row in self.rows if row.group == group))


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: an error beyond measure becomes null, and the reason says what it was."""
    return {key: None if isinstance(value, float) and math.isinf(value) else value for key, value in row.items()}
