"""Shared parts of the examples' command lines: errors of one line, and the options of the machine."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch

import wavemix_kernels

EXTRAS = {"rich": "rich", "matplotlib": "matplotlib", "skimage": "scikit-image", "safetensors": "safetensors"}


class Refused(Exception):
    """Arguments that cannot be served; the message is the one line to print."""


class Parser(argparse.ArgumentParser):
    """Errors of one line; none where ``silent``, which all but one of a run's processes are."""

    silent = False

    def error(self, message: str) -> NoReturn:
        self.exit(2, None if self.silent else f"{self.prog}: {message}\n")


def run(parser: Parser, argv: Sequence[str] | None, extras: Mapping[str, str] = EXTRAS) -> int:
    """Parse, run the command that the parser's defaults name, and turn refusals into status 2.

    Args:
        extras: packages that the command needs, by module.
    """
    try:
        arguments = parser.parse_args(argv)
        command: Callable[[argparse.Namespace], int] = arguments.command
        missing = [package for module, package in extras.items() if importlib.util.find_spec(module) is None]
        if missing:
            raise Refused(f"{' and '.join(missing)} missing: pip install {' '.join(missing)}")
        return command(arguments)
    except Refused as refused:
        if not parser.silent:
            print(f"{parser.prog}: {refused}", file=sys.stderr)
        return 2
    except SystemExit as ended:
        return int(ended.code or 0)


def first_line(text: str | None) -> str:
    """The first line of a docstring, or nothing under python -OO."""
    return (text or "").partition("\n")[0]


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return number


def add_machine_options(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("--backend", choices=("auto", "reference"), default="auto", help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=positive, metavar="N", help="default: PyTorch's own choice")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path(out), help="default: %(default)s")


@contextlib.contextmanager
def machine(arguments: argparse.Namespace) -> Iterator[torch.device]:
    """The device asked for, with the threads and the backend asked for as long as the context lasts."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise Refused("--device cuda: torch sees no GPU here; --device cpu works")
    threads = torch.get_num_threads()
    torch.set_num_threads(arguments.threads or threads)
    try:
        with wavemix_kernels.backend(arguments.backend):
            yield torch.device(arguments.device)
    finally:
        torch.set_num_threads(threads)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"--out {folder}: cannot be made ({error.strerror})") from error
