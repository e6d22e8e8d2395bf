"""The generated pages: ``python -m benchmarks publish``.

docs/results.md and the README's table are made from the committed runs, the table of docs/gpu-status.md from the list
of what a GPU has verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..harness.rivals import PEERS
from . import chart, gpu_status, published
from .published import Result, Run
from .text import NONE, duration, size

ROOT = Path(__file__).resolve().parents[2]

_GROUPS = {
    "haar": "Haar",
    "dwt": "Other wavelets",
    "transforms": "Other transforms",
    "waveblock": "Waveblock",
    "patm": "PATM",
    "wavemix": "WaveMix models",
    "wavemlp": "Wave-MLP models",
}

#: Rows of the README's table: case, and its name there.
HEADLINE = {
    "haar/J4/fp32/nchw/4x64x256x256/forward+backward": "Haar, 4 levels, 256x256",
    "waveblock/L3/fp32/nchw/4x192x64x64/training": "Waveblock, level 3, C=192",
    "patm/fc/fp32/nchw/8x64x56x56/training": "PATM, C=64, 56x56",
    "wavemix/classification-192-16-L3/fp32/nchw/2x3x224x224/training": "WaveMix 192/16, 224x224",
    "wavemix/lite-8-5/fp32/nchw/64x1x28x28/training": "WaveMix-Lite 8/5, 28x28",
    "wavemlp/T_dw/fp32/nchw/2x3x224x224/training": "Wave-MLP-T_dw, 224x224",
}


def files() -> dict[Path, str]:
    """Every generated file of the repository, and what it must contain."""
    runs = published.runs()
    headline = {name: published.latest(case, runs) for case, name in HEADLINE.items()}
    readme, status = ROOT / "README.md", ROOT / "docs/gpu-status.md"
    return {
        ROOT / "docs/results.md": page(runs),
        ROOT / "docs/assets/headline.svg": chart.svg(headline),
        readme: _between_markers(readme, "results", table(headline)),
        status: _between_markers(status, "verified", gpu_status.table()),
    }


def write() -> list[Path]:
    """Write what has changed; returns those files."""
    written = []
    for path, content in files().items():
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
            written.append(path)
    return written


def _between_markers(path: Path, name: str, content: str) -> str:
    first, last = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, begin, rest = path.read_text(encoding="utf-8").partition(first)
    _, end, tail = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"{path.name}: expected {first} and {last}, between which the table goes")
    return f"{head}{begin}\n{content}{end}{tail}"


def table(headline: dict[str, Result]) -> str:
    """The README's table; its cells are narrow, since it counts towards the page's length."""
    lines = [
        "|fp32 training step|upstream|ours|over upstream|over compile|peak memory|CPU|",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in headline.items():
        over = NONE if result.over_compile is None else f"{result.over_compile:.1f}x"
        times = (duration(result.upstream.median_ms), duration(result.ours.median_ms))
        cells = (*times, f"{result.over_upstream:.1f}x", over, _share(result), result.run.place)
        # No-break spaces keep a number and its unit on one line.
        lines.append("|".join(("", name, *(cell.replace(" ", "\u00a0") for cell in cells), "")))
    return "\n".join(lines) + "\n"


def _share(result: Result) -> str:
    assert result.ours.peak_bytes
    assert result.upstream.peak_bytes
    return f"{result.ours.peak_bytes / result.upstream.peak_bytes:.0%}"


_INTRODUCTION = """\
# Results

<!-- Generated from benchmarks/results/*.json by `python -m benchmarks publish`. A test finds edits by hand. -->

Times are medians of interleaved rounds. Each provider was compared with the float64 reference before it was timed
([how](use/benchmarks.md)). The machines are shared and noisy: read the ratios. Both sides of a ratio come from one run.

- **upstream**: pytorch_wavelets for wavelets, WTConv's grouped convolution for `wtconv`, diffusers' patcher for
  `cosmos3d`, and the published order of operations for blocks and models. A star marks the reference in its place: in
  bf16 the gradients of upstream's transforms fail under autocast.
- **ptwt**, **torchwavelets**, **PyWavelets**: other packages with the same transforms.
- **compile**: `torch.compile` of the reference in its best setting.
- **case**: operation, dtype, layout, shape and pass. With the group's name in front it is what `--cases` takes.
- **peak**: the most that a call holds above inputs, parameters and their gradients, ours of upstream's.
- **saved**: what autograd keeps for backward beside inputs and parameters, ours of upstream's.
- **memory kept**: the same with an allocator that keeps large blocks, for both sides: no fresh memory is mapped at each
  call, which is a large part of short times otherwise ([how](use/benchmarks.md#fresh-memory)).
- **run**: a row of the [last table](#runs), which has machine, commit and versions. Where several runs on one kind of
  machine timed a case, the latest stands here, and "replaces" names the others. A number in parentheses is the run
  that timed `torch.compile`, where it is another one.
"""
_NO_GPU = "No GPU is in these tables, since none has run these kernels ([GPU status](gpu-status.md)).\n"


def page(runs: Sequence[Run]) -> str:
    """docs/results.md."""
    parts = [_INTRODUCTION]
    if all(run.environment["device"] == "cpu" for run in runs):
        parts.append(_NO_GPU)
    for machine, group in reversed(published.by_machine(runs).items()):
        parts.append(f"## {machine}\n")
        results = published.results(group)
        for prefix in dict.fromkeys([*_GROUPS, *(result.group for result in results)]):
            chosen = [result for result in results if result.group == prefix]
            if chosen:
                title = f"{_GROUPS.get(prefix, prefix)}, {chosen[0].run.place}"
                parts.append(f"### {title}\n\n{_results(prefix, chosen)}")
    parts.append(f"## Runs\n\n{_runs(runs)}")
    return "\n".join(parts)


_COLUMNS = ("upstream", "compile", "ours", "over upstream", "over compile", "peak", "saved", "run")


def _results(prefix: str, results: Sequence[Result]) -> str:
    peers = [name for name in PEERS if any(name in result.run.cases[result.case] for result in results)]
    headings = ("case", _COLUMNS[0], *peers, *_COLUMNS[1:])
    return _table(headings, [(f"`{r.case.removeprefix(prefix + '/')}`", *_cells(r, peers)) for r in results])


def _cells(result: Result, peers: Sequence[str]) -> tuple[str, ...]:
    compiled, over, rows = result.compile, result.over_compile, result.run.cases[result.case]
    mark = "\\*" if result.upstream_fails else ""
    elsewhere = result.compiled is not None and result.compiled is not result.run
    run = str(result.run.number)
    if result.earlier:
        run += f", replaces {', '.join(str(earlier.number) for earlier in result.earlier)}"
    return (
        duration(result.upstream.median_ms) + mark,
        *(duration(rows[name].median_ms) if name in rows else NONE for name in peers),
        duration(compiled.median_ms) if compiled else NONE,
        duration(result.ours.median_ms),
        f"{result.over_upstream:.2f}x{mark}",
        NONE if over is None else f"{over:.2f}x" + (f" ({result.compiled.number})" if elsewhere else ""),
        _of(result.ours.peak_bytes, result.upstream.peak_bytes),
        _of(result.ours.saved_bytes, result.upstream.saved_bytes),
        run,
    )


def _of(ours: int | None, theirs: int | None) -> str:
    if ours is None or not theirs:
        return NONE
    (mine, _, unit), whole = size(ours).partition(" "), size(theirs)
    return f"{mine if whole.endswith(unit) else size(ours)} of {whole}"


def _runs(runs: Sequence[Run]) -> str:
    versions = [_versions(run) for run in runs]
    differ = len(set(versions)) > 1
    rows = []
    for run, version in zip(runs, versions, strict=True):
        facts = run.environment
        row = [str(run.number), f"`{run.name}.json`", facts["date"][:16].replace("T", " "), f"`{run.commit}`"]
        row += [facts.get("gpu") or facts["cpu"], run.kernels + (", memory kept" if run.kept else "")]
        row += [f"{facts['threads']} on {facts['cores']} cores", *([version] if differ else [])]
        rows.append(row)
    headings = ["run", "file in `benchmarks/results/`", "date, UTC", "commit", "machine", "kernels", "threads"]
    shown = _table([*headings, "versions"] if differ else headings, rows)
    return (
        shown + ("" if differ else f"\nEvery run: {versions[0]}. ") + '"-modified" is a commit with changes on top.\n'
    )


def _versions(run: Run) -> str:
    facts = run.environment
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version)
    return f"{facts['system']}, Python {facts['python']}, {packages}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
