"""Numbers as the table and the report show them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..harness.measure import Row

NONE = "–"

# Heading, and how a row's cell is made.
_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("provider", lambda row: row.provider),
    ("median", lambda row: duration(row.median_ms)),
    ("p20 – p80", lambda row: spread(row.median_ms, row.p20_ms, row.p80_ms)),
    ("speed-up", lambda row: f"{row.speedup:.2f}x" if row.speedup is not None else NONE),
    ("frames/s", lambda row: _three(row.frames_per_second) if row.frames_per_second is not None else NONE),
    ("GB/s", lambda row: _three(row.gbps) if row.gbps is not None else NONE),
    ("roofline", lambda row: f"{row.roofline_share:.0%}" if row.roofline_share is not None else NONE),
    ("peak", lambda row: size(row.peak_bytes)),
    ("saved", lambda row: size(row.saved_bytes)),
    ("error", lambda row: f"{row.error:.2f}" if row.error is not None else NONE),
)


def columns(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    """Headings and cells of a table of `rows`, in the terminal and in the report: columns that would be empty are left
    out."""
    timed = [row for row in rows if row.status == "ok"]
    return [(heading, cell) for heading, cell in _COLUMNS if any(cell(row) != NONE for row in timed)]


def duration(milliseconds: float | None) -> str:
    """Three significant digits in the unit that reads best."""
    if milliseconds is None:
        return NONE
    unit, scale = _unit(milliseconds)
    return f"{_three(milliseconds * scale)} {unit}"


def spread(median: float | None, low: float | None, high: float | None) -> str:
    """Two quantiles in the unit of the median."""
    if median is None or low is None or high is None:
        return NONE
    scale = _unit(median)[1]
    return f"{_three(low * scale)} – {_three(high * scale)}"


def _unit(milliseconds: float) -> tuple[str, float]:
    if milliseconds < 1:
        return "us", 1e3
    return ("ms", 1.0) if milliseconds < 1e3 else ("s", 1e-3)


def size(count: int | None) -> str:
    """Bytes in binary units."""
    if count is None:
        return NONE
    if count < 1 << 20:
        return f"{_three(count / 2**10)} KiB" if count else "0"
    return f"{_three(count / 2**20)} MiB" if count < 1 << 30 else f"{_three(count / 2**30)} GiB"


def refusal(row: Row) -> str:
    """The words in place of numbers, for a row that has none."""
    return f"{row.status}: {row.reason}" if row.reason else row.status


def refusals(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """The rows that have no numbers, those in the same words as one: providers' names, and the first row of them."""
    alike: dict[str, list[Row]] = {}
    for row in rows:
        if row.status != "ok":
            alike.setdefault(refusal(row), []).append(row)
    return [(", ".join(row.provider for row in same), same[0]) for same in alike.values()]


def _three(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
