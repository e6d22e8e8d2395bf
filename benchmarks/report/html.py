"""One self-contained HTML page: no script, no second file, light or dark as the reader's system is."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ..harness.providers import OURS, PROVIDERS
from .results import Results
from .text import columns, refusal


@dataclass(frozen=True)
class Picture:
    """One figure in both themes, as PNG."""

    caption: str
    light: bytes
    dark: bytes


_STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1f2328; --soft: #59636e; --line: #d8dee4;
        --band: #f6f8fa; --ours: #0969da; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #0d1117; --ink: #e6edf3; --soft: #9198a1; --line: #30363d; --band: #161b22; --ours: #58a6ff;
          --bad: #ff8a80; } }
body { margin: 0 auto; max-width: 68rem; padding: 2rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
       font: 15px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .8rem; }
h3 { font: 600 .95rem ui-monospace, monospace; margin: 1.6rem 0 .4rem; overflow-wrap: anywhere; }
p, li { max-width: 46rem; } .soft { color: var(--soft); } code { font-family: ui-monospace, monospace; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; } th:first-child, td:first-child { text-align: left; }
tr.ours td:first-child { color: var(--ours); font-weight: 600; }
tr.best td { background: var(--band); font-weight: 600; }
td.why { text-align: left; white-space: normal; color: var(--soft); } tr.bad td.why { color: var(--bad); }
img { max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 6px; margin: .4rem 0 1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; } dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
"""

_METHOD = """
<ul>
<li>Inputs are crops of real photographs (scikit-image's; where "inputs" below says so, noise with their spectrum),
through one fixed random 3x3 convolution where an operation takes feature maps. Everything is seeded.</li>
<li>Every provider is compared with the same computation in float64 before it is timed, gradients included; a wrong
one gets no number. <b>error</b> is the largest deviation in units of what rounding explains: above 1 is refused. For
whole models that unit follows from the reference's own error in the same arithmetic. Dropout is off when compared and
on when timed.</li>
<li>All providers of a case are timed in interleaved rounds, each round in another order. Shown are the median and
the 20% and 80% quantiles; <b>speed-up</b> is the ratio of two medians from the same rounds. Forward runs without
autograd; forward+backward is <code>torch.autograd.grad</code> with fixed cotangents, the same for all.</li>
<li>On a GPU a time is between two device events, the L2 cache filled with other data before each call.</li>
<li><b>GB/s</b> counts the bytes an ideal implementation moves: inputs, parameters and cotangents read once, outputs
and gradients written once. <b>roofline</b> is the time of the roof over the median; the roof is a copy of as many
bytes, in the same rounds, into memory that exists already, and for blocks of convolutions also their arithmetic
at the rate of a large matrix product on this machine. Small inputs live in caches, and so does their copy.</li>
<li><b>peak</b> is what the allocator handed out at most above inputs, parameters and their gradients (to which a step
adds, as every step of a training but the first), the result included; an input's gradient is a result.
<b>saved</b> is what autograd keeps for the backward beside them. results.json has a second, device-independent
count of the peak, made from operators' results.</li>
</ul>
"""


def page(results: Results, pictures: Sequence[Picture]) -> str:
    """The whole page."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>wavemix-kernels benchmarks</title><style>{_STYLE}</style></head><body>",
        "<h1>wavemix-kernels benchmarks</h1>",
        f"<p class='soft'>{escape(_headline(results))}</p>",
    ]
    if not results.complete:
        parts.append("<p><b>This run was interrupted; what follows is what it had measured.</b></p>")
    skipped = [case for case in dict.fromkeys(row.case for row in results.rows) if not _ran(results, case)]
    if skipped:
        names = ", ".join(f"<code>{escape(case)}</code>" for case in skipped)
        parts.append(f"<p class='soft'>Not run, since the time was over: {names}</p>")
    parts += [_summary(results)]
    if pictures:
        parts.append("<h2>Pictures</h2>")
        parts += [_picture(picture) for picture in pictures]
    for group in results.groups():
        cases = [case for case in results.cases(group) if case not in skipped]
        if cases:
            parts += [f"<h2>{escape(group)}</h2>", *(_case(results, case) for case in cases)]
    parts += ["<h2>How it was measured</h2>", _METHOD, "<h2>Providers</h2><dl>"]
    parts += [f"<dt>{name}</dt><dd>{escape(meaning)}</dd>" for name, meaning in PROVIDERS.items()]
    parts += ["</dl><h2>Environment</h2><dl>", *_environment(results), "</dl></body></html>\n"]
    return "\n".join(parts)


def _ran(results: Results, case: str) -> bool:
    return any(row.status != "skipped" for row in results.rows if row.case == case)


def _headline(results: Results) -> str:
    facts = results.environment
    device = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
    commit = f", commit {facts['commit'][:12]}" if facts.get("commit") else ""
    return f"{device}; torch {facts['packages']['torch']}; {facts['date']}{commit}; {results.seconds:.0f} s in all"


def _summary(results: Results) -> str:
    """Ratios only, a line per case."""
    names = [name for name in PROVIDERS if any(row.provider == name and row.status == "ok" for row in results.rows)]
    if not names:
        return "<p>No provider has been timed.</p>"
    head = "".join(f"<th>{name}</th>" for name in names)
    lines = []
    for group in results.groups():
        for case in results.cases(group):
            ratios = {row.provider: row.speedup for row in results.rows if row.case == case and row.speedup is not None}
            if not ratios:
                continue
            best = max(ratios.values())
            cells = (_ratio(ratios.get(name), best) for name in names)
            lines.append(f"<tr><td><code>{escape(case)}</code></td>{''.join(cells)}</tr>")
    return (
        f"<h2>Speed-up</h2><div class='scroll'><table><tr><th>case</th>{head}</tr>{''.join(lines)}</table></div>"
        "<p class='soft'>Over upstream, or over the reference where upstream cannot run.</p>"
    )


def _ratio(value: float | None, best: float | None) -> str:
    if value is None:
        return "<td class='soft'>–</td>"
    text = f"{value:.2f}x"
    return f"<td><b>{text}</b></td>" if value == best else f"<td>{text}</td>"


def _picture(picture: Picture) -> str:
    light, dark = (base64.b64encode(data).decode() for data in (picture.light, picture.dark))
    return (
        "<picture>"
        f"<source media='(prefers-color-scheme: dark)' srcset='data:image/png;base64,{dark}'>"
        f"<img alt='{escape(picture.caption, quote=True)}' src='data:image/png;base64,{light}'></picture>"
    )


def _case(results: Results, case: str) -> str:
    rows = [row for row in results.rows if row.case == case]
    best = max((row.speedup or 0.0 for row in rows), default=0.0)
    shown = columns(rows)
    lines = []
    for row in rows:
        kinds = ["ours"] if row.provider in OURS else []
        if row.status != "ok":
            kinds += ["bad"] if row.status in ("wrong", "failed") else []
            span = f"<td class='why' colspan='{max(1, len(shown) - 1)}'>{escape(refusal(row))}</td>"
            lines.append(f"<tr class='{' '.join(kinds)}'><td>{row.provider}</td>{span}</tr>")
            continue
        kinds += ["best"] if row.speedup == best else []
        cells = "".join(f"<td>{escape(cell(row))}</td>" for _, cell in shown)
        lines.append(f"<tr class='{' '.join(kinds)}'>{cells}</tr>")
    head = "".join(f"<th>{escape(heading)}</th>" for heading, _ in shown)
    return f"<h3>{escape(case)}</h3><div class='scroll'><table><tr>{head}</tr>{''.join(lines)}</table></div>"


def _environment(results: Results) -> list[str]:
    flat: dict[str, Any] = {}
    for key, value in (results.environment | results.machine | results.options).items():
        if isinstance(value, dict):
            flat |= {f"{key} {inner}": item for inner, item in value.items()}
        else:
            flat[key] = value
    return [
        f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(_value(value))}</dd>"
        for key, value in flat.items()
        if value is not None
    ]


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
