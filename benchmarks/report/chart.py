"""The README's chart as SVG text: time and peak memory of torch.compile and ours as shares of upstream's."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import NamedTuple

from .published import Result
from .text import duration, size

_WIDTH, _LEFT, _PANEL, _BETWEEN = 940, 176, 250, 138
_TOP, _BAR, _STEP, _BLOCK = 66, 15, 18, 70

_STYLE = """\
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; }
.title { font-size: 15px; font-weight: 600; } .name { font-weight: 600; } .small { font-size: 12px; fill: #59636e; }
.upstream { fill: #9aa0a6; } .compile { fill: #e69f00; } .ours { fill: #0072b2; } .axis { stroke: #d1d9e0; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .small { fill: #9198a1; } .ours { fill: #2f81f7; } .axis { stroke: #3d444d; }
}"""


class _Bar(NamedTuple):
    style: str
    share: float  # of upstream's
    label: str


_LEGEND = (("upstream", "upstream"), ("compile", "torch.compile"), ("ours", "wavemix_kernels"))


def svg(headline: dict[str, Result]) -> str:
    """A block of bars per case, in two panels; shorter is better in both."""
    height = _TOP + _BLOCK * len(headline) + 10
    second = _LEFT + _PANEL + _BETWEEN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'role="img" aria-label="Time and peak memory of a training step, ours beside upstream and torch.compile">',
        f"<style>\n{_STYLE}\n</style>",
        *_legend(),
        _text(_LEFT, 52, "Time of a training step", "title"),
        _text(second, 52, "Peak memory", "title"),
    ]
    for number, (name, result) in enumerate(headline.items()):
        y = _TOP + number * _BLOCK
        title, _, detail = name.partition(", ")
        lines += [_text(12, y + 24, title, "name"), _text(12, y + 41, detail, "small")]
        lines += _bars(_LEFT, y, _times(result))
        lines += _bars(second, y, _peaks(result))
    for x in (_LEFT, second):
        lines.append(f'<line class="axis" x1="{x}" y1="{_TOP}" x2="{x}" y2="{height - 14}"/>')
    return "\n".join([*lines, "</svg>", ""])


def _legend() -> Iterator[str]:
    x = _LEFT
    for style, words in _LEGEND:
        yield f'<rect class="{style}" x="{x}" y="12" width="13" height="13" rx="2"/>'
        yield _text(x + 19, 23, words, "")
        x += 44 + 8 * len(words)
    yield _text(x + 8, 23, "shorter is better", "small")


def _times(result: Result) -> list[_Bar]:
    base = result.upstream.median_ms
    assert base
    bars = [_Bar("upstream", 1.0, duration(base))]
    if result.compiled is not None:
        rows = result.compiled.cases[result.case]
        # Both from one run, which need not be that of the other bars.
        if "upstream" in rows:
            bars.append(_percent("compile", rows["compile"].median_ms, rows["upstream"].median_ms))
    ours = _percent("ours", result.ours.median_ms, base)
    return [*bars, ours._replace(label=f"{ours.label}  {result.over_upstream:.1f}x faster")]


def _peaks(result: Result) -> list[_Bar]:
    base = result.upstream.peak_bytes
    bars = [_Bar("upstream", 1.0, size(base))]
    if result.compile is not None:
        bars.append(_percent("compile", result.compile.peak_bytes, base))
    return [*bars, _percent("ours", result.ours.peak_bytes, base)]


def _percent(style: str, part: float | None, whole: float | None) -> _Bar:
    assert part
    assert whole
    return _Bar(style, part / whole, f"{part / whole:.0%}")


def _bars(x: int, y: int, bars: list[_Bar]) -> Iterator[str]:
    # A block without torch.compile stays in the middle of its space.
    y += (_BLOCK - _STEP * len(bars)) // 2 - 2
    for number, bar in enumerate(bars):
        top = y + number * _STEP
        width = max(bar.share * _PANEL, 1.5)
        yield f'<rect class="{bar.style}" x="{x}" y="{top}" width="{width:.1f}" height="{_BAR}" rx="2"/>'
        yield _text(x + width + 7, top + 12, bar.label, "name" if bar.style == "ours" else "small")


def _text(x: float, y: float, words: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y}" xml:space="preserve">{escape(words)}</text>' if words else ""
