"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from wavemix_kernels.clock import Effort
from wavemix_kernels.ops.verify import device_is_lost

from .cases import registry
from .harness import traffic
from .harness.case import Case
from .harness.machine import copy_bandwidth, environment
from .harness.measure import Meter, Row
from .harness.providers import COMPILED, ON_CPU, OURS, PROVIDERS
from .report import html as report
from .report.results import Results
from .report.terminal import Terminal

#: Module -> its package, and what a run is without.
EXTRAS = {
    "rich": ("rich", "no progress bar"),
    "matplotlib": ("matplotlib", "no pictures"),
    "skimage": ("scikit-image", "inputs are made up"),
}
#: Exit status of a run whose GPU was lost: an error stays in it, and another process has to go on.
LOST = 86
DEFAULT_OUT = "bench-results"

# Seconds of rounds per case, and of wall time for the run; past the latter no compilation and no case is begun.
FULL, QUICK = Effort(seconds=3.0, fewest=5, most=200), Effort(seconds=1.0, fewest=3, most=50)
FULL_LIMIT_S, QUICK_LIMIT_S, ALL_LIMIT_S = 330.0, 65.0, 2400.0
#: Kept for each case to come: torch.compile has only what is left, so that it leaves no case out.
OTHERS_S = 3.0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


class _Refused(Exception):
    """Arguments that cannot be served; the message is the one line to print."""


def main(argv: Sequence[str] | None = None, cases: Sequence[Case] | None = None) -> int:
    """Run the benchmarks.

    Args:
        argv: arguments, ``sys.argv[1:]`` if None.
        cases: what to choose from, the registry if None.

    Returns:
        0; 1 where one of our own implementations was wrong or raised; 2 for arguments that cannot be served; 86 where
        an error stayed in the GPU; 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["predict"]:
        if importlib.util.find_spec(f"{__package__}.predict") is None:
            print("benchmarks: predict compiles the kernels' sources; run it in a checkout", file=sys.stderr)
            return 2
        from .predict import cli as predict

        return predict.main(argv[1:])
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
        if arguments.command == "traffic":
            print(traffic.report())
            return 0
        if arguments.files and arguments.command != "publish":
            raise _Refused(f"{arguments.files[0]}: only publish takes files")
        if arguments.command == "publish":
            return _publish(arguments.files)
        chosen, left_out, providers = _select(arguments, registry() if cases is None else cases)
        if arguments.list:
            _list(chosen)
            return 0
        _make_folder(arguments.out)
    except _Refused as refused:
        print(f"{parser.prog}: {refused}", file=sys.stderr)
        return 2
    except SystemExit as ended:
        return int(ended.code or 0)
    status = _run(arguments, chosen, providers)
    if left_out and arguments.cases is None:
        groups = ", ".join(dict.fromkeys(case.group for case in left_out))
        print(f"left out of this run: {len(left_out)} of {groups}; --list names them, --all or --cases runs them")
    return status


def _publish(files: Sequence[Path]) -> int:
    from .report import pages, published

    if not (pages.ROOT / "docs").is_dir():
        raise _Refused("publish: there is no docs/ beside the benchmarks; run it in a checkout")
    runs = []
    for file in files:
        try:
            runs.append(Results.load(file))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _Refused(f"publish {file}: no results.json of a run ({type(error).__name__}: {error})") from error
        if not runs[-1].complete:
            raise _Refused(f"publish {file}: the run was interrupted")
    for run in runs:
        for path in _write_report(run)[1:]:
            print(f"wrote {path}")
    for path in published.take(files):
        print(f"deleted {path}, since later runs have all its cases")
    for path in pages.write():
        print(f"wrote {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="benchmarks",
        description="Times every implementation side by side in one run, each checked against float64 first.",
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=("traffic", "publish", "predict"),
        help="traffic: count each operator's memory traffic; publish [results.json ...]: put these runs into "
        "benchmarks/results/ and make docs/results.md, the README's table and chart, and the table of "
        "docs/gpu-status.md; predict: what a GPU will do, without one (options: predict --help)",
    )
    parser.add_argument("files", nargs="*", metavar="results.json", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="a case of each family, without torch.compile (a minute)")
    parser.add_argument("--cases", metavar="GLOB[,GLOB]", help="only cases with such names, for example 'haar/*bf16*'")
    parser.add_argument("--all", action="store_true", help="whole models and more sizes too (more than half an hour)")
    parser.add_argument("--providers", metavar="A,B", help=f"only these of {', '.join(PROVIDERS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path(DEFAULT_OUT), help="default: %(default)s")
    parser.add_argument("--limit", metavar="SECONDS", type=float, help="wall time to stay within, roughly")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    return parser


def _select(arguments: argparse.Namespace, cases: Sequence[Case]) -> tuple[list[Case], list[Case], list[str]]:
    """Cases to run, cases of the device that are not run, and providers."""
    if arguments.device is None:
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise _Refused("--device cuda: torch sees no GPU here; --device cpu works")
    if arguments.limit is not None and not arguments.limit > 0:
        raise _Refused(f"--limit {arguments.limit:g}: expected a positive number of seconds")
    providers = [*PROVIDERS] if arguments.device != "cpu" else [*ON_CPU]
    if arguments.quick:
        providers = [name for name in providers if name not in COMPILED]
    if arguments.providers is not None:
        asked = [name.strip() for name in arguments.providers.split(",") if name.strip()]
        unknown = [name for name in asked if name not in PROVIDERS]
        if unknown or not asked:
            raise _Refused(f"--providers {arguments.providers!r}: expected some of {', '.join(PROVIDERS)}")
        providers = [name for name in PROVIDERS if name in asked]
    here = [case for case in cases if arguments.device in case.devices]
    if arguments.cases is None:
        if arguments.quick and not arguments.all:
            chosen = [case for case in here if case.quick]
        else:
            chosen = [case for case in here if arguments.all or arguments.list or not case.extra]
        if not chosen:
            raise _Refused(f"no {'quick ' if arguments.quick else ''}case runs on {arguments.device}")
        return chosen, [case for case in here if case not in chosen], providers
    patterns = [pattern.strip() for pattern in arguments.cases.split(",") if pattern.strip()]
    for pattern in patterns or [arguments.cases]:
        if not any(fnmatch.fnmatchcase(case.name, pattern) for case in here):
            names = ", ".join(case.name for case in here)
            raise _Refused(f"--cases {pattern!r}: no case on {arguments.device} matches; there are {names}")
    # Named cases run whether or not they are part of --quick or --all; the former then only means fewer rounds.
    chosen = [case for case in here if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)]
    return chosen, [case for case in here if case not in chosen], providers


def _list(cases: Sequence[Case]) -> None:
    width = max(len(case.name) for case in cases)
    for case in cases:
        print(f"{case.name:<{width}}  {'quick' if case.quick else 'extra' if case.extra else ''}".rstrip())
    print("\nproviders")
    for name, meaning in PROVIDERS.items():
        print(f"  {name:<16} {meaning}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").touch()
    except OSError as error:
        raise _Refused(f"--out {folder}: cannot be written ({error.strerror})") from error


def _run(arguments: argparse.Namespace, cases: Sequence[Case], providers: Sequence[str]) -> int:
    terminal = _terminal()
    begin = time.monotonic()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    effort = QUICK if arguments.quick else FULL
    usual_limit = ALL_LIMIT_S if arguments.all else QUICK_LIMIT_S if arguments.quick else FULL_LIMIT_S
    limit = arguments.limit or usual_limit
    results = Results(
        path=arguments.out / "results.json",
        environment=environment(device),
        machine={},
        options={"quick": arguments.quick, "cases": arguments.cases, "providers": list(providers), "limit_s": limit},
    )
    results.save()
    said: set[str] = set()
    try:
        with terminal.progress(len(cases)) as progress:
            progress.doing("this machine's copy bandwidth")
            results.machine = {"copy_gbps": copy_bandwidth(device)}
            meter = Meter(device, effort)
            for number, case in enumerate(cases):
                left = begin + limit - time.monotonic()
                if left <= 0:
                    why = f"--limit {limit:g} seconds were over before this case"
                    skipped = [name for name in providers if case.takes(name)]
                    results.add([Row(case.name, case.group, name, "skipped", why) for name in skipped])
                    continue
                # Rounds get at most half of the case's share; the rest is for checks and compilation.
                share = left / (len(cases) - number) / 2
                meter.effort = dataclasses.replace(effort, seconds=min(effort.seconds, share))
                meter.may_compile = _within(begin + limit - OTHERS_S * (len(cases) - number - 1))
                meter.announce = lambda doing, name=case.name: progress.doing(f"{name}  {doing}")
                rows: list[Row] = []
                try:
                    for row in meter.measure(case, providers):
                        rows.append(row)
                except RuntimeError:
                    if not device_is_lost(device):
                        raise
                finally:
                    results.seconds = time.monotonic() - begin
                    results.add(rows)
                if shown := _first_time_only(rows, said):
                    terminal.show(case.name, shown)
                else:
                    terminal.say(f"{case.name}: unavailable, as above\n")
                progress.advance()
                if device_is_lost(device):
                    results.lost = case.name
                    break
        results.complete = results.lost is None
        late = sorted({row.case for row in results.rows if row.status == "skipped" and row.provider not in COMPILED})
        if late:
            terminal.say(f"skipped, since --limit {limit:g} seconds were over: {', '.join(late)}")
        if results.lost is not None:
            terminal.say(f"an error stays in the GPU since {results.lost}: nothing after it can be measured here")
    except KeyboardInterrupt:
        terminal.say("interrupted: what was measured so far is written")
    results.seconds = time.monotonic() - begin
    results.save()
    for path in _write_report(results):
        terminal.say(f"wrote {path}")
    if results.lost is not None:
        return LOST
    if not results.complete:
        return 130
    return int(any(row.provider in OURS and row.status in ("wrong", "failed") for row in results.rows))


def _terminal() -> Terminal:
    """Rich's where it is installed. What is missing is said once, with the line that installs it."""
    missing = {package: without for module, (package, without) in EXTRAS.items() if not _there(module)}
    if missing:
        names, without = " and ".join(missing), ", ".join(missing.values())
        print(f"{names} missing: {without} (pip install {' '.join(missing)})")
    if "rich" in missing:
        return Terminal()
    from .report.table import RichTerminal

    return RichTerminal()


def _there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _within(deadline: float) -> Callable[[float], bool]:
    return lambda seconds: time.monotonic() + seconds < deadline


def _first_time_only(rows: Sequence[Row], said: set[str]) -> list[Row]:
    """Rows without those of a provider whose absence was explained, in the same words, under an earlier case."""
    shown = []
    for row in rows:
        if row.status in ("unavailable", "skipped"):
            words = f"{row.provider}: {row.reason}"
            if words in said:
                continue
            said.add(words)
        shown.append(row)
    return shown


def _write_report(results: Results) -> list[Path]:
    """The page, and its pictures where there is matplotlib."""
    folder = results.path.parent
    written = [results.path]
    drawn = []
    if _there("matplotlib"):
        from .report import plots

        for chart in plots.charts(results):
            light = plots.draw(chart, plots.LIGHT)
            path = folder / f"{chart.name}.png"
            path.write_bytes(light)
            written.append(path)
            drawn.append(report.Picture(chart.caption, light, plots.draw(chart, plots.DARK)))
    page = folder / "report.html"
    page.write_text(report.page(results, drawn), encoding="utf-8")
    return [*written, page]
