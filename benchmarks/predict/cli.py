"""``python -m benchmarks predict``."""

from __future__ import annotations

import argparse
import fnmatch
import operator
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from . import breakdown, measured, report, terminal
from .chips import CHIPS
from .execute import NotUnderstood
from .kernels import cases
from .steps import steps
from .tools import Missing


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str]) -> int:
    """Predicts, and prints or writes.

    Returns:
        0; 1 where a prediction cannot be made; 2 for arguments that cannot be served.
    """
    parser = _Parser(
        prog="benchmarks predict",
        description="What a GPU will do, without one. The first time takes many minutes; build/predict/ keeps it.",
    )
    parser.add_argument("--gpu", choices=tuple(CHIPS), help="default: h100, with --write all")
    parser.add_argument("--case", metavar="GLOB", default="*", help="only steps and kernels with such names")
    parser.add_argument("--write", action="store_true", help="put these into docs/predicted.md and its data")
    parser.add_argument("--kernels", action="store_true", help="each step of ours kernel by kernel, the longest first")
    parser.add_argument(
        "--measured", metavar="KERNELS.json", type=Path, help="beside what benchmarks/gpu.sh measured, on that chip"
    )
    parser.add_argument("--wide", action="store_true", help="all columns, however narrow the terminal is")
    parser.add_argument("--list", action="store_true", help="print the names of steps and kernels and stop")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as ended:
        return int(ended.code or 0)
    names = [step.name for step in steps() if fnmatch.fnmatchcase(step.name, arguments.case)]
    of_kernels = [case.name for case in cases(arguments.case)]
    if not names and not of_kernels:
        print(
            f"benchmarks predict: --case {arguments.case!r}: nothing has such a name; --list names all", file=sys.stderr
        )
        return 2
    if arguments.list:
        print(*names, *of_kernels, sep="\n")
        return 0
    if arguments.kernels and (arguments.write or not names):
        wrong = "--write has no place for it" if arguments.write else f"--case {arguments.case!r} names no step"
        print(f"benchmarks predict: --kernels: {wrong}", file=sys.stderr)
        return 2
    if arguments.measured and (arguments.write or arguments.kernels):
        print("benchmarks predict: --measured: goes with --gpu and --case alone", file=sys.stderr)
        return 2
    chips = [arguments.gpu] if arguments.gpu else list(CHIPS) if arguments.write else ["h100"]
    try:
        if arguments.measured:
            return _beside(arguments.measured, names, arguments.gpu)
        if arguments.kernels:
            _break_down(names, chips[0])
            return 0
        data = _predicted(names, arguments.case if of_kernels else None, chips)
    except (Missing, NotUnderstood, RuntimeError) as error:
        print(f"benchmarks predict: {error}", file=sys.stderr)
        return 1
    if arguments.write:
        report.save(_merged(report.load(), data))
        print(f"wrote {report.DATA}\nwrote {report.PAGE}")
        return 0
    for chip in chips:
        if data["chips"][chip]:
            print(*terminal.steps(data, chip, arguments.wide), sep="\n")
        if data["kernels"][chip]:
            print(*terminal.kernels(data["kernels"][chip], chip), sep="\n")
    return 0


def _beside(path: Path, names: Sequence[str], gpu: str | None) -> int:
    """Each step of a file beside its prediction for `gpu`, or for the chip that was measured."""
    try:
        facts, rows = measured.load(path)
        chip = CHIPS[gpu or measured.chip_of(facts)]
    except ValueError as error:
        print(f"benchmarks predict: {error}", file=sys.stderr)
        return 2
    known = {one.name: one for one in steps() if one.name in names}
    for row in (row for row in rows if row["step"] in known):
        found = measured.compare(known[row["step"]], row, chip)
        print(*terminal.compared(found, chip, str(facts.get("gpu"))), sep="\n", flush=True)
    return 0


def _break_down(names: Sequence[str], chip: str) -> None:
    for step in (one for one in steps() if one.name in names):
        for training, what in ((True, "training"), (False, "inference")):
            found = breakdown.parts(step, training, CHIPS[chip])
            print(*terminal.breakdown(found, f"{step.title}, {what}", CHIPS[chip]), sep="\n", flush=True)


def _predicted(names: Sequence[str], kernels: str | None, chips: Sequence[str]) -> dict[str, Any]:
    from . import calibration, gates, host
    from .device import devices

    data: dict[str, Any] = {"chips": {}, "kernels": {}}
    if names:
        measured = host.measure(names)
        data |= {"machine": measured["machine"], "host": measured["steps"], "operators": measured["operators"]}
    for chip in chips:
        data["chips"][chip] = devices(names, chip) if names else {}
        found = gates.predictions(chip, kernels) if kernels else []
        data["kernels"][chip] = {
            one.name: {"us": one.seconds * 1e6, "share": one.share, "bound": one.bound} for one in found
        }
    _same_way(data)
    data["calibration"] = [asdict(row) | {"error": row.error} for row in calibration.rows()]
    data["notes"] = list(calibration.NOTES)
    return data


def _same_way(data: dict[str, Any]) -> None:
    """Raises RuntimeError where a narrow step, whose Python was timed, launches a tenth more or fewer kernels than the
    real one. A training step of Wave-MLP launches 6 % more."""
    for predicted in data["chips"].values():
        for name, found in predicted.items():
            for one in (one for one in found if one["provider"] == "ours"):
                real = one["launches"].get("cuda", 0) + one["launches"].get("triton", 0)
                timed = data["host"][name]["training" if one["training"] else "inference"]["ours"]["kernels"]
                if abs(timed - real) > 0.1 * real:
                    raise RuntimeError(
                        f"{name}: its Python was timed with {timed} of our kernels, the real one has {real}"
                    )


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """New ones in place of old ones, and what no longer exists gone."""
    merged = old | {name: new[name] for name in ("machine", "calibration", "notes") if name in new}
    known = {step.name for step in steps()}
    merged["host"] = {k: v for k, v in (old["host"] | new.get("host", {})).items() if k in known}
    merged["operators"] = old["operators"] | new.get("operators", {})
    for part, join in (("chips", operator.or_), ("kernels", _kernels)):
        merged[part] = {
            chip: join(old[part].get(chip, {}), new[part].get(chip, {}))
            for chip in CHIPS
            if chip in old[part] or chip in new[part]
        }
    return merged


def _kernels(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Rows of kernels, ``case`` or ``case: kernel``, in the order of the cases. A case's new rows take the place of all
    its old ones."""
    order = {case.name: i for i, case in enumerate(cases("*"))}
    made = {name.partition(": ")[0] for name in new}
    rows = {name: row for name, row in old.items() if name.partition(": ")[0] not in made} | new
    known = [name for name in rows if name.partition(": ")[0] in order]
    return {name: rows[name] for name in sorted(known, key=lambda name: order[name.partition(": ")[0]])}
