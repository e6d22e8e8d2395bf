"""Floors under the predicted speed of each kernel: a change that makes one slower is red in ``make prove``.

``python -m benchmarks.predict.gates [PATTERN]`` predicts every kernel on an H100, holds it to its floor and prints the
table anew, for the file `floors.json`. What has not changed is read from `kept.json` (:mod:`benchmarks.predict.kept`);
``--anew`` does without, ``--renew`` writes it.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from . import kept, tools
from .chips import CHIPS, Chip
from .executed import name_of, scales
from .kernels import Recorded, cases, recorded
from .profile import SOURCES
from .share import Predicted, predicted

CHIP = "h100"
FLOORS = Path(__file__).parent / "floors.json"
KEPT = Path(__file__).parent / "kept.json"
_STEP, _FINE = 0.05, 0.01  # floors are rounded down to it; below `_LOW` to the finer one
_LOW = 0.3
_SLACK = 0.02  # a new compiler may move a prediction by this share of its floor
#: Bytes that the followed threads move, scaled to the grid, for each byte of the plan: below this the way through a
#: kernel was misread. What the samples miss is a tensor that few threads write.
LEAST_COVERED = 0.85


#: Why a floor is below :data:`HIGH`: the first pattern that matches.
REASONS = {
    "cuda haar analysis L5 channels_last 4x*": "a thread walks 64 pixels, and two blocks of a multiprocessor are all",
    "cuda haar * nchw 64x*": "words of 8 or 4 bytes: rows are no whole words of 16",
    "triton haar * nchw 64x320x14x14": "rows of 14 elements: masks and integers for one word of 4 bytes",
    "triton haar * 64x128x28x28": "rows of 28 elements fill a tile of 32 in part",
    "triton haar * 64x36x*": "36 channels fill sectors in part",
    "triton haar analysis L5 *": "few tiles for each multiprocessor, and sectors used in part",
    "triton haar *": "shared memory and integers of the deeper levels",
    "triton filter_bank synthesis *": "a load and two integers for each tap and band",
    "triton filter_bank analysis *": "eight unaligned loads from the first-level cache for each row of samples",
    "triton dwt * db20 *": "a pass for each axis; a load and two products a tap, whose slots are all taken",
    "triton dwt * bfloat16 *": "as many products as of fp32 for half the bytes, and their conversions",
    "triton dwt * periodization *": "pairs of samples begin at odd places, and coefficients wrap one by one",
    "triton dwt *": "taps, rows and loads ahead take the registers: two to five blocks of a multiprocessor",
    "triton wtconv *": "registers for a quarter of the warps, which wait for loads; deep levels have few tiles",
    "cuda reduce_haar *": "55 instructions for each 16 bytes that are copied; two blocks of a multiprocessor",
    "triton reduce_haar * nchw *": "bank conflicts: rows of pixels are turned into columns of channels",
    "triton reduce_haar gradients L1 channels_last 1024x*": "few warps of a multiprocessor, which wait for each step",
    "triton reduce_haar gradients *": "one block of a multiprocessor, waiting for each of its loads; 48 columns as 64",
    "triton reduce_haar *": "48 columns are multiplied as 64; the bands' stores fill sectors in part",
    "triton mlp * 64x8x8 pixels*": "32 blocks of pixels for 132 multiprocessors",
    "triton mlp *": "GELU's instructions and the products of a block wait for each other; weights come from L2 again",
    "triton deconv *": "BatchNorm's backward is made again for each tap; one block of a multiprocessor",
    "triton batch_norm of gelu *": "GELU's instructions between the loads of tiles",
    "triton batch_norm gradients of the pool *: _pool_line_kernel": "a microsecond on vectors of channels",
    "triton batch_norm statistics 1024x8x*": "13 MB: the places of a channel take as long to add up",
    "triton pre_norm statistics of images *": "two blocks of a multiprocessor, which is what registers allow",
    "cuda phase_aggregate *": "about 180 instructions a step, and registers for three blocks of a multiprocessor",
    "cuda patm_whole backward *: _*_kernel": "the branch weights' small MLP: few blocks",
    "cuda patm_whole moments *": "two ldmatrix for each product; 229 blocks",
    "cuda patm_whole * patm_branch_sums": "sines: issue slots",
    "cuda patm_whole * patm_mixed_gradients": "waves and weights through shared memory; each branch reads x for itself",
    "cuda patm_whole * patm_wave_gradients": "fragments and waves through shared memory; sines: issue slots",
    "cuda patm_whole * patm_image_gradients": "fragments of eleven products through shared memory",
    "cuda patm_whole * patm_mix": "waves and weights through shared memory; one block of a multiprocessor",
    "triton phase_aggregate *": "one warp a block: about 200 instructions a step; backward has no load ahead",
    "triton branch_sum*": "few blocks for each multiprocessor, which wait for their loads",
}
HIGH = 0.85


def _key(one: Recorded, chip: Chip) -> str:
    """Changes with whatever decides :func:`predicted`."""
    files = [*SOURCES, *(Path(__file__).with_name(f"{name}.py") for name in ("bound", "compiled", "share"))]
    launch = one.launch
    asked = launch.grid, launch.threads, launch.shared, launch.bytes, launch.arrays, launch.args, launch.parameters
    return kept.key(tools.key(files), chip, kept.code(launch, chip), asked, one.flops, scales(name_of(launch)))


def _of_case(name: str, chip: str, anew: bool = True) -> list[tuple[Predicted, str, bool]]:
    """Predictions with their keys, and whether they are kept ones; of :data:`CHIP` alone some are."""
    found, known = [], kept.read(KEPT) if chip == CHIP else {}
    for case in cases(name):
        for one in recorded(case, CHIPS[chip]):
            made_of, row = _key(one, CHIPS[chip]), known.get(one.name)
            if again := not kept.serves(row, made_of, anew):
                result = predicted(one, CHIPS[chip])
            else:
                result = Predicted(one.name, *row.result)
            found.append((result, made_of, not again))
    return found


def _of_cases(chip: str, pattern: str, anew: bool) -> list[tuple[Predicted, str, bool]]:
    names = [case.name for case in cases(pattern)]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        some = pool.map(_of_case, names, [chip] * len(names), [anew] * len(names))
        return [one for found in some for one in found]


def predictions(chip: str = CHIP, pattern: str = "*") -> list[Predicted]:
    """Every kernel of the cases that match, predicted anew by several processes; the first time it takes minutes.

    Raises:
        execute.NotUnderstood, tools.Missing: see :func:`benchmarks.predict.bound.predict`.
    """
    return [one for one, _, _ in _of_cases(chip, pattern, True)]


def complaints(found: Iterable[Predicted], floors: dict[str, dict[str, float]]) -> list[str]:
    """Kernels worse than their floor, without a floor, with a low one and no reason, or misread; one line each."""
    lines = []
    for one in found:
        floor = floors.get(one.name)
        if floor is None:
            lines.append(f"{one.name}: no floor; today {_floor_of(one)}")
            continue
        if floor["share"] < HIGH and not any(fnmatch.fnmatch(one.name, pattern) for pattern in REASONS):
            lines.append(f"{one.name}: its floor is {floor['share']:.2f} and gates.py has no reason")
        if one.share < floor["share"] * (1 - _SLACK):
            lines.append(
                f"{one.name}: {one.share:.2f} of the chip, its floor is {floor['share']:.2f} "
                f"({one.seconds * 1e6:.0f} us, bound by {one.bound})"
            )
        if one.waste > floor["waste"] * (1 + _SLACK):
            lines.append(f"{one.name}: {one.waste:.2f} products for each one needed, at most {floor['waste']:.2f}")
        if one.waste < 1 - _SLACK:
            lines.append(f"{one.name}: misread, or its FLOP are: {one.waste:.2f} products for each one needed")
        if one.covered < LEAST_COVERED or one.misread:
            lines.append(f"{one.name}: {one.covered:.2f} of its bytes were followed; in part: {one.misread}")
    return lines


def _floor_of(one: Predicted) -> dict[str, float]:
    step = _FINE if one.share < _LOW else _STEP
    share = math.floor(one.share / step + 1e-9) * step
    return {"share": round(share, 2), "waste": round(math.ceil(one.waste * 20 - 1e-9) / 20, 2)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict.gates", description=__doc__.split("\n")[0])
    parser.add_argument("pattern", nargs="?", default="*", help="kernels by name, as the shell has patterns")
    parser.add_argument("--anew", action="store_true", help="predict what has not changed, too")
    parser.add_argument("--renew", action="store_true", help=f"write {KEPT.name}, if no kernel is below its floor")
    options = parser.parse_args(arguments)
    made = _of_cases(CHIP, options.pattern, options.anew)
    found = [one for one, _, _ in made]
    floors = json.loads(FLOORS.read_text()) if FLOORS.exists() else {}
    lines = complaints(found, floors)
    today = {one.name for one in found}
    gone = [name for name in floors if fnmatch.fnmatch(name, options.pattern) and name not in today]
    lines += [f"{name}: has a floor, and no kernel" for name in gone]
    table = (f" {json.dumps(one.name)}: {json.dumps(_floor_of(one))}" for one in found)
    print("{\n" + ",\n".join(table) + "\n}")
    print(*lines, sep="\n", file=sys.stderr)
    if options.renew and not lines:
        kept.write(KEPT, {one.name: kept.Kept(made_of, _written(one)) for one, made_of, _ in made}, floors)
    print(f"{sum(same for *_, same in made)} of {len(made)} kernels have not changed since their prediction was kept")
    return 1 if lines else 0


def _written(one: Predicted) -> list[object]:
    numbers = [float(f"{value:.4g}") for value in (one.share, one.waste, one.covered)]
    return [float(f"{one.seconds:.4g}"), one.bound, *numbers, *([one.misread] if one.misread else [])]


if __name__ == "__main__":
    sys.exit(main())
