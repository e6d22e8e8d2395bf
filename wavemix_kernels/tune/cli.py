"""``python -m wavemix_kernels tune``."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import wavemix_kernels
from wavemix_kernels import cache
from wavemix_kernels._version import __version__
from wavemix_kernels.nn.wavemix.block import FusedWaveblock
from wavemix_kernels.nn.wavemlp.block import FusedWaveBlock
from wavemix_kernels.ops.haar import haar_dwt2d, haar_idwt2d
from wavemix_kernels.ops.tuned import SHIPPED
from wavemix_kernels.tune import PREDICTOR, Report, record, tune
from wavemix_kernels.tune.record import Recorder
from wavemix_kernels.tune.settle import name_of

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
_SHAPES = {"ops": "8,64,56,56", "model": "8,3,224,224"}


class Ops(nn.Module):
    """Every family of operators on one image: Haar there and back, Waveblocks of one to three levels, a Wave-MLP block.

    Args:
        channels: a multiple of 4.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                *(FusedWaveblock(level=n, final_dim=channels, ff_channel=channels) for n in (1, 2, 3)),
                FusedWaveBlock(channels),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for levels in (1, 3):
            out = out + haar_idwt2d(*haar_dwt2d(x, levels), size=(x.shape[2], x.shape[3]))
        for block in self.blocks:
            out = out + block(x)
        return out


def model_of(text: str) -> nn.Module:
    """The model that a line names: ``wavemlp.WaveMLP_T``, ``wavemix.classification.WaveMix(depth=16, level=3)`` of this
    package, or ``module:function(...)``; arguments are literals.

    Raises:
        ValueError: there is no such thing, or it makes no module.
    """
    path, _, rest = text.partition("(")
    module, _, name = path.rpartition(":" if ":" in path else ".")
    try:
        call = ast.parse(f"f({rest or ')'}", mode="eval").body
        if not isinstance(call, ast.Call):
            raise ValueError("it is no call")
        args = [ast.literal_eval(node) for node in call.args]
        kwargs = {str(node.arg): ast.literal_eval(node.value) for node in call.keywords}
        where = module if ":" in path else f"wavemix_kernels.{module}".rstrip(".")
        made = getattr(importlib.import_module(where), name)(*args, **kwargs)
    except (SyntaxError, ValueError, ImportError, AttributeError, TypeError) as error:
        raise ValueError(
            f"MODEL={text!r}: {error}; for example wavemlp.WaveMLP_T, or my_module:build(depth=8)"
        ) from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"MODEL={text!r}: expected a torch.nn.Module, got {type(made).__name__}")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m wavemix_kernels tune",
        description="Measure which backend, and which tile of Triton's kernels, is fastest on this device.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="wavemlp.WaveMLP_T, or module:function(argument=1)")
    parser.add_argument("--ops", action="store_true", help="every operator on images of --shape, instead of a model")
    parser.add_argument("--shape", help=f"N,C,H,W; default {_SHAPES['model']}, or {_SHAPES['ops']} with --ops")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of model and images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--channels-last", action="store_true", help="images in torch.channels_last")
    parser.add_argument("--inference", action="store_true", help="without a training step's backward pass")
    parser.add_argument("--seconds", type=float, default=1.0, help="for timing one choice")
    parser.add_argument("--dry-run", action="store_true", help="list the candidates and time nothing")
    parser.add_argument("--export", type=Path, metavar="FILE", help="also write a table to ship for the architecture")
    given = parser.parse_args(argv)
    if (given.model is None) != given.ops:
        parser.error("give a MODEL or --ops")
    try:
        shape = _shape(given.shape or _SHAPES["ops" if given.ops else "model"])
        model = Ops(shape[1]) if given.ops else model_of(given.model)
    except ValueError as error:
        parser.error(str(error))
    device, dtype = torch.device(given.device), _DTYPES[given.dtype]
    model = model.to(device, dtype)
    x = torch.randn(shape, device=device, dtype=dtype)
    x = x.to(memory_format=torch.channels_last) if given.channels_last else x
    if given.dry_run:
        _list(record(model, x, train=not given.inference))
        return 0
    report = tune(
        model, x, train=not given.inference, seconds=given.seconds, progress=lambda result: print(result, flush=True)
    )
    print(str(report).splitlines()[-1])
    if not report.results:
        return 1
    if given.export is not None:
        export(report, given.export)
    return 0


def _shape(text: str) -> list[int]:
    sizes = [int(part) if part.isdigit() else 0 for part in text.split(",")]
    if len(sizes) != 4 or min(sizes) < 1:
        raise ValueError(f"--shape={text!r}: expected N,C,H,W, four positive numbers")
    return sizes


def _list(recorder: Recorder) -> None:
    """Candidates of what the model calls now; a backend that is not taken now shows its tiles when it is timed."""
    if PREDICTOR is None:
        print("no predictor is installed (wavemix_kernels.tune.PREDICTOR): candidates without predicted times")
    for unit in recorder.units.values():
        for choice in unit.choices.values():
            print(f"{unit.title}: {choice.key[0]}")
            for candidate in choice.candidates:
                seconds = None if PREDICTOR is None else PREDICTOR(unit, choice, candidate)
                predicted = "" if seconds is None else f", predicted {seconds * 1e6:.4g} us"
                print(f"    {name_of(candidate)}{' (default)' if candidate == choice.default else ''}{predicted}")


def export(report: Report, file: Path) -> None:
    """Writes what a report kept as a table for all devices of its architecture (:data:`tuned.SHIPPED`).

    Raises:
        ValueError: the report is of several devices.
    """
    if len(report.entries) != 1:
        raise ValueError(f"a table is of one device, this report of {len(report.entries)}")
    ((device, entries),) = report.entries.items()
    table: dict[str, Any] = {
        "architecture": cache.architecture(device), "measured on": cache.key(device), "version": __version__,
        "entries": entries,
    }  # fmt: skip
    file.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{file}: to ship it, put it at {SHIPPED.relative_to(Path(wavemix_kernels.__file__).parent.parent)}/"
          f"{table['architecture']}.json")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
