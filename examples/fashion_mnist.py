"""WaveMix-Lite on Fashion-MNIST: 7,156 parameters to the published 90 % on a CPU, within the hour.

``python -m examples.fashion_mnist train`` and ``plot``; docs/use/training.md says what to expect.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels.wavemix.classification import WaveMixLite

from ._support import cli, files
from ._support.idx import read_idx
from ._support.interrupt import Interrupt
from ._support.progress import Progress

FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("data/FashionMNIST/raw"))  # Debian's, torchvision's
REMEDY = "install it with `apt install dataset-fashion-mnist`, or name the folder of its four files by --data DIR"
SIDE, CLASSES = 28, 10
MEAN, STD = 0.2860, 0.3530  # of the training pixels, scaled to 0 … 1

#: From upstream's table of parameter efficiency: 7,156 parameters (Fashion-MNIST 90 %) and 3,566 (MNIST 99 %).
VARIANTS: dict[str, dict[str, Any]] = {
    "deconv": {"final_dim": 8, "depth": 5, "upsample": "deconv"},
    "upsample": {"final_dim": 8, "depth": 10, "upsample": "bilinear"},
}
PUBLISHED_ACCURACY = 90.0  # percent, arXiv:2205.14375

BATCH = 64
WARM_UP = 0.2  # of the run, to the peak learning rate; then down along a cosine
WEIGHT_DECAY = 1e-2
CHECKPOINT, LOG, BEST, CURVES = "checkpoint.pt", "log.csv", "best.safetensors", "curves.png"
COLUMNS = ("epoch", "seconds", "train_loss", "test_accuracy", "lr")


@dataclass(frozen=True)
class Recipe:
    """The parameters that decide a run's numbers; ``--resume`` needs the same ones.

    Attributes:
        lr: the one-cycle schedule's peak.
        dropout: probability in the blocks; 7,156 parameters cannot overfit 60,000 images.
        limit: use only the first so many images of each split.
    """

    variant: str
    epochs: int
    lr: float
    dropout: float
    limit: int | None
    seed: int
    backend: str
    device: str


@dataclass(frozen=True)
class Split:
    """Images (N, 28, 28) uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor


def find_data(folder: Path | None) -> Path:
    """The folder with the four files, the given one or one of the system's.

    Raises:
        FileNotFoundError: a file is missing; the message says where it was sought and what helps.
    """
    for candidate in FOLDERS if folder is None else (folder,):
        missing = [name for name in _FILES if _file(candidate, name) is None]
        if not missing:
            return candidate
        if folder is not None:
            raise FileNotFoundError(f"--data {folder}: no {', '.join(missing)} there, plain or .gz; {REMEDY}")
    raise FileNotFoundError(f"Fashion-MNIST is not in {' or '.join(map(str, FOLDERS))}; {REMEDY}")


_FILES = tuple(f"{split}-{what}-ubyte" for split in ("train", "t10k") for what in ("images-idx3", "labels-idx1"))


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def load(folder: Path, limit: int | None = None) -> tuple[Split, Split]:
    """Training and test images.

    Raises:
        OSError, ValueError: a file cannot be read, or does not hold what it should.
    """
    tensors = [read_idx(_file(folder, name) or folder / name) for name in _FILES]
    splits = []
    for images, labels in (tensors[:2], tensors[2:]):
        if images.shape[1:] != (SIDE, SIDE) or labels.shape != images.shape[:1] or labels.max() >= CLASSES:
            raise ValueError(
                f"{folder}: expected images (N, {SIDE}, {SIDE}) and labels (N,) below {CLASSES}, got images "
                f"{tuple(images.shape)} and labels {tuple(labels.shape)} up to {int(labels.max())}"
            )
        splits.append(Split(images[:limit], labels[:limit].long()))
    return splits[0], splits[1]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored with probability one half. Shifts gain nothing: so small a model underfits."""
    mirrored = torch.rand(len(images), 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, images.flip(2), images)


def pixels(images: Tensor) -> Tensor:
    """uint8 (N, 28, 28) to the model's input: float32 (N, 1, 28, 28), normalised."""
    return ((images.float() / 255 - MEAN) / STD).unsqueeze(1)


class Training:
    """Everything that a run consists of: its state dict, put back, continues it bit for bit on the same device.

    Attributes:
        epoch: number of complete epochs.
        rows: their lines of the log; seconds are wall time of training and test, lr is the rate reached.
        batch: batches done of the epoch that runs.
        order: the training images in the order of that epoch.
        loss_sum, seconds: totals of its batches so far; the loss is summed over images.
    """

    def __init__(self, recipe: Recipe, train: Split, test: Split) -> None:
        self.recipe, self.train, self.test = recipe, train, test
        self.device = torch.device(recipe.device)
        self.batches = math.ceil(len(train.images) / BATCH)
        torch.manual_seed(recipe.seed)
        model = WaveMixLite(in_channels=1, num_classes=CLASSES, dropout=recipe.dropout, **VARIANTS[recipe.variant])
        self.model = model.to(memory_format=torch.channels_last).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=WEIGHT_DECAY)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, recipe.lr, total_steps=recipe.epochs * self.batches, pct_start=WARM_UP
        )
        self.generator = torch.Generator().manual_seed(recipe.seed)  # of order and augmentation
        self.epoch = 0
        self.rows: list[dict[str, float]] = []
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.batch, self.loss_sum, self.seconds = 0, 0.0, 0.0
        self.order = torch.randperm(len(self.train.images), generator=self.generator)

    def step(self) -> float:
        """One batch; its mean loss."""
        begin = time.perf_counter()
        chosen = self.order[self.batch * BATCH : (self.batch + 1) * BATCH]
        images = pixels(augment(self.train.images[chosen], self.generator)).to(self.device)
        self.model.train()
        loss = F.cross_entropy(self.model(images), self.train.labels[chosen].to(self.device))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        mean = loss.item()
        self.loss_sum += mean * len(chosen)
        self.batch += 1
        self.seconds += time.perf_counter() - begin
        return mean

    def end_epoch(self) -> dict[str, float]:
        """Tests the model and adds the epoch's line of the log."""
        begin = time.perf_counter()
        accuracy = self.accuracy()
        row: dict[str, float] = {
            "epoch": self.epoch + 1,
            "seconds": round(self.seconds + time.perf_counter() - begin, 2),
            "train_loss": round(self.loss_sum / len(self.train.images), 5),
            "test_accuracy": round(accuracy, 2),
            "lr": float(self.scheduler.get_last_lr()[0]),
        }
        self.rows.append(row)
        self.epoch += 1
        self._begin_epoch()
        return row

    @torch.inference_mode()
    def accuracy(self) -> float:
        """Percentage of the test images that the model names rightly."""
        self.model.eval()
        right = 0
        for images, labels in zip(self.test.images.split(1000), self.test.labels.split(1000), strict=True):
            right += int((self.model(pixels(images).to(self.device)).argmax(1).cpu() == labels).sum())
        return 100 * right / len(self.test.labels)

    def best(self) -> dict[str, float]:
        """The line of the first epoch with the best test accuracy."""
        return max(self.rows, key=lambda row: row["test_accuracy"])

    def state_dict(self) -> dict[str, Any]:
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch,
            "rows": self.rows,
            "batch": self.batch,
            "order": self.order,
            "loss_sum": self.loss_sum,
            "seconds": self.seconds,
            "generator": self.generator.get_state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.rows = state["epoch"], state["rows"]
        self.batch, self.order = state["batch"], state["order"]
        self.loss_sum, self.seconds = state["loss_sum"], state["seconds"]
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"])


def main(argv: Sequence[str] | None = None) -> int:
    """Train, or plot logs.

    Args:
        argv: arguments, ``sys.argv[1:]`` if None.

    Returns:
        0; 2 for arguments or data that cannot be served; 130 after Ctrl-C.
    """
    parser = _parser()
    given = sys.argv[1:] if argv is None else argv
    parser.set_defaults(again=shlex.join(["python", "-m", "examples.fashion_mnist", *given]))
    return cli.run(parser, given)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="fashion_mnist", description=cli.first_line(__doc__))
    commands = parser.add_subparsers(required=True, metavar="train | plot", parser_class=cli.Parser)
    train = commands.add_parser("train", help="train, test after every epoch, keep the best weights")
    train.set_defaults(command=_train)
    train.add_argument("--data", metavar="DIR", type=Path, help="folder of the four IDX files, plain or .gz")
    train.add_argument("--variant", choices=tuple(VARIANTS), default="deconv", help="default: %(default)s")
    train.add_argument("--epochs", type=cli.positive, default=40, metavar="N", help="default: %(default)s")
    train.add_argument("--lr", type=float, default=1e-2, metavar="RATE", help="at its peak; default: %(default)s")
    train.add_argument("--dropout", type=float, default=0.0, metavar="P", help="default: %(default)s")
    train.add_argument("--limit", type=cli.positive, metavar="N", help="only the first N images of each split")
    train.add_argument("--resume", action="store_true", help="continue the run in --out where it was left")
    cli.add_machine_options(train, "fashion-mnist-results")
    plot = commands.add_parser("plot", help="draw the curves of logs into one picture")
    plot.set_defaults(command=_plot)
    plot.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="log.csv of a run; its folder's name labels it")
    plot.add_argument("--out", type=Path, default=Path(CURVES), metavar="PNG", help="default: %(default)s")
    return parser


def _train(arguments: argparse.Namespace) -> int:
    try:
        train, test = load(find_data(arguments.data), arguments.limit)
    except (OSError, ValueError) as error:
        raise cli.Refused(str(error)) from error
    if not 0 <= arguments.dropout < 1:
        raise cli.Refused(f"--dropout {arguments.dropout:g}: expected a probability below 1")
    if not 0 < arguments.lr < math.inf:
        raise cli.Refused(f"--lr {arguments.lr:g}: expected a positive number")
    recipe = Recipe(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Recipe)})
    cli.make_folder(arguments.out)
    with cli.machine(arguments):
        training = Training(recipe, train, test)
        _continue_or_begin(training, arguments.out / CHECKPOINT, arguments.resume)
        return _run(training, arguments.out, arguments.again)


def _continue_or_begin(training: Training, checkpoint: Path, resume: bool) -> None:
    if not resume:
        if checkpoint.exists():
            raise cli.Refused(f"{checkpoint} is of an earlier run: --resume continues it, another --out begins anew")
        return
    try:
        state = torch.load(checkpoint, weights_only=True)
    except FileNotFoundError as error:
        raise cli.Refused(f"--resume: there is no {checkpoint}; leave --resume out to begin") from error
    for name, now in dataclasses.asdict(training.recipe).items():
        if (begun := state["recipe"][name]) != now:
            raise cli.Refused(f"--{name} {now}: the run in {checkpoint} was begun with {begun}")
    training.load_state_dict(state)


def _run(training: Training, out: Path, again: str) -> int:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    epochs, batches = training.recipe.epochs, training.batches
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    chosen = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(training.recipe).items())
    console.print(f"{parameters:,} parameters, {len(training.train.images):,} images; {chosen}")
    done = training.epoch * batches + training.batch
    bar = Progress(console, epochs * batches, done, batches)
    with Interrupt() as interrupt, bar:
        while training.epoch < epochs and not interrupt.asked:
            loss = training.step()
            bar.advance(f"epoch {training.epoch + 1}", f"loss {loss:.3f}")
            if training.batch == batches:
                row = training.end_epoch()
                console.print(_line(row, epochs))
                _keep(training, out)
        if training.epoch < epochs:
            files.save_checkpoint(out / CHECKPOINT, training.state_dict())
    if training.epoch < epochs:
        again = again if again.endswith(" --resume") else f"{again} --resume"
        console.print(f"interrupted in epoch {training.epoch + 1}, nothing is lost; it goes on with\n  {again}")
        return 130
    from ._support import curves

    curves.save(out / CURVES, {out.name: training.rows}, PUBLISHED_ACCURACY)
    best = training.best()
    console.print(f"after the last epoch {training.rows[-1]['test_accuracy']:.2f} % of the test images are right")
    console.print(f"best: {best['test_accuracy']:.2f} %, epoch {best['epoch']}, chosen by the test images themselves")
    console.print(f"wrote {', '.join(str(out / name) for name in (LOG, BEST, CURVES, CHECKPOINT))}")
    return 0


def _line(row: Mapping[str, float], epochs: int) -> str:
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}  {row['seconds']:6.1f} s  train loss {row['train_loss']:.4f}  "
        f"test accuracy {row['test_accuracy']:5.2f} %  lr {row['lr']:.1e}"
    )


def _keep(training: Training, out: Path) -> None:
    """The files of an epoch. The checkpoint comes last: a crash before it repeats the epoch, with its files."""
    row = training.rows[-1]
    files.save_table(out / LOG, COLUMNS, training.rows)
    if row is training.best():
        about = {"variant": training.recipe.variant, **{name: str(row[name]) for name in ("epoch", "test_accuracy")}}
        files.save_safetensors(out / BEST, training.model.state_dict(), about)
    files.save_checkpoint(out / CHECKPOINT, training.state_dict())


def _plot(arguments: argparse.Namespace) -> int:
    from ._support import curves

    try:
        runs = {path.resolve().parent.name: curves.read(path) for path in arguments.logs}
        if len(runs) < len(arguments.logs):
            raise ValueError("the folders of the logs label the curves, so their names must differ")
        curves.save(arguments.out, runs, PUBLISHED_ACCURACY)
    except (OSError, ValueError) as error:
        raise cli.Refused(str(error)) from error
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
