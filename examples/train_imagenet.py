"""Wave-MLP and WaveMix on ImageNet, by the published recipe, on one GPU or many.

``torchrun --nproc_per_node 8 -m examples.train_imagenet DIR``; docs/use/training.md says what to expect.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel

from wavemix_kernels import wavemlp
from wavemix_kernels.wavemix.classification import WaveMix

from ._support import cli, files, image_folder, imagenet_recipe
from ._support.imagenet_recipe import Data, Recipe
from ._support.interrupt import Interrupt
from ._support.processes import Processes, is_first, joined, leave_the_word_to_the_first
from ._support.progress import Progress

MODELS: dict[str, Callable[..., nn.Module]] = {
    **{f"WaveMLP_{size}": getattr(wavemlp, f"WaveMLP_{size}") for size in ("T_dw", "T", "S", "M", "B")},
    "WaveMix": WaveMix,
}
WAVEMIX_CROP = 1.0  # of the image in validation, as upstream's timm model says; Wave-MLP's models say theirs
EXTRAS = {name: name for name in ("rich", "safetensors", "timm", "torchvision")}
CHECKPOINT, LOG, BEST = "checkpoint.pt", "log.csv", "best.safetensors"
COLUMNS = ("epoch", "seconds", "train_loss", "test_accuracy", "ema_accuracy", "lr")
SHOWN_EVERY = 20  # steps: to read the loss waits for the GPU

Prepare = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]


class Diverged(Exception):
    """The loss is no number any more."""


class Training:
    """Everything that a run consists of: its state dict, put back, continues it bit for bit.

    No generator's state is part of it: each rank seeds all generators before each batch, by (seed, epoch, batch, rank).

    Args:
        recipe: the hyper-parameters.
        model: on its device.
        data: batches, and the order of the training images.
        prepare: called on a batch on the device; its targets are labels, or a distribution over classes.
        optimizer: holds the model's parameters.
        schedule: ``step(epoch)`` sets the learning rate of an epoch.
        ema: ``update(model)``, ``module``.
        processes: this process among all of the run.
        compiled: whether to run the model by torch.compile.

    Attributes:
        epoch, batch: complete epochs, and batches done of the one that runs.
        rows: lines of the log.
        loss: sum over the batches of this epoch, on the device, of this rank's mean losses.
        seconds: time of this epoch so far.
    """

    def __init__(
        self, recipe: Recipe, model: nn.Module, data: Data, prepare: Prepare, optimizer: torch.optim.Optimizer,
        schedule: Any, ema: Any, processes: Processes, compiled: bool = False,
    ) -> None:  # fmt: skip
        self.recipe, self.model, self.data, self.prepare = recipe, model, data, prepare
        self.optimizer, self.schedule, self.ema, self.processes = optimizer, schedule, ema, processes
        self.epochs = recipe.epochs + recipe.cool_down
        self.batches = data.order.batches
        network = model
        if processes.control is not None:
            # Buffers are rank 0's before each forward pass (DDP's default): its checkpoint speaks for all ranks.
            ids = [processes.device.index] if processes.device.type == "cuda" else None
            network = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        self.network: Any = torch.compile(network) if compiled else network
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=recipe.amp == "float16")
        self.epoch = self.batch = 0
        self.rows: list[dict[str, float]] = []
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.batch, self.seconds = 0, 0.0
        self.loss = torch.zeros((), device=self.processes.device)

    def _autocast(self) -> torch.autocast:
        amp = self.recipe.amp
        dtype = torch.bfloat16 if amp == "off" else getattr(torch, amp)
        return torch.autocast(self.processes.device.type, dtype, enabled=amp != "off")

    def steps(self) -> Iterator[Tensor]:
        """The loss of each batch that is left of this epoch, a tensor on the device."""
        self.schedule.step(self.epoch)
        self.data.order.begin(self.epoch, self.batch)
        self.model.train()
        begin = time.perf_counter()
        for images, labels in self.data.train:
            loss = self._step(images, labels)
            now = time.perf_counter()
            self.seconds, begin = self.seconds + now - begin, now
            yield loss

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        image_folder.seed_all(self.recipe.seed, 2, self.epoch, self.batch, self.processes.rank)
        inputs, targets = self.prepare(images, labels, True)
        smoothing = 0.0 if targets.is_floating_point() else self.recipe.smoothing  # mixing smooths by itself
        with self._autocast():
            loss = F.cross_entropy(self.network(inputs).float(), targets, label_smoothing=smoothing)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update(self.model)
        self.loss += loss.detach()
        self.batch += 1
        return loss.detach()

    def end_epoch(self) -> dict[str, float]:
        """Tests the model and its average, and adds the epoch's line of the log.

        Raises:
            Diverged: the epoch's loss is not finite.
        """
        begin = time.perf_counter()
        loss = self._total_loss() / (self.batches * self.processes.world)
        if not math.isfinite(loss):
            raise Diverged(f"the training loss of epoch {self.epoch + 1} is {loss}: a lower --lr may help")
        row: dict[str, float] = {
            "epoch": self.epoch + 1,
            "train_loss": round(loss, 6),
            "test_accuracy": round(self.accuracy(self.model), 3),
            "ema_accuracy": round(self.accuracy(self.ema.module), 3),
            "lr": float(self.optimizer.param_groups[0]["lr"]),
        }
        row["seconds"] = round(self.seconds + time.perf_counter() - begin, 2)
        self.rows.append(row)
        self.epoch += 1
        self._begin_epoch()
        return row

    def _total_loss(self) -> float:
        return self.processes.sums(float(self.loss))[0]

    @torch.inference_mode()
    def accuracy(self, model: nn.Module) -> float:
        """Percentage of the validation images, each counted once, that the model names rightly."""
        self.processes.same_buffers(model)
        model.eval()
        right = torch.zeros((), device=self.processes.device)
        count = 0
        for images, labels in self.data.val:
            inputs, targets = self.prepare(images, labels, False)
            with self._autocast():
                right += (model(inputs).argmax(1) == targets).sum()
            count += len(labels)
        all_right, all_count = self.processes.sums(float(right), count)
        return 100 * all_right / all_count

    def best(self) -> dict[str, float]:
        """The line of the first epoch whose averaged weights did best."""
        return max(self.rows, key=lambda row: row["ema_accuracy"])

    def state_dict(self) -> dict[str, Any]:
        """Called on all ranks, and equal on all except for buffers, of which rank 0's count."""
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.module.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "loss": self._total_loss(),
            "seconds": self.seconds,
            "rows": self.rows,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.ema.module.load_state_dict(state["ema"])
        self.epoch, self.batch, self.rows = state["epoch"], state["batch"], state["rows"]
        self.seconds = state["seconds"]
        self.loss.fill_(state["loss"] if self.processes.rank == 0 else 0.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Train.

    Args:
        argv: arguments, ``sys.argv[1:]`` if None.

    Returns:
        0; 1 where training diverged or a process of the run was lost; 2 for arguments or data that cannot be served;
        130 after Ctrl-C.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    parser.silent = not is_first()
    parser.set_defaults(given=given)
    status = cli.run(parser, given, EXTRAS)
    if status in (1, 2):
        leave_the_word_to_the_first()
    return status


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="train_imagenet", description=cli.first_line(__doc__))
    parser.set_defaults(command=_train)
    add = parser.add_argument
    shown = "default: %(default)s"
    add("data", metavar="DIR", type=Path, help="folder with train/CLASS/ and val/CLASS/")
    add("--model", choices=tuple(MODELS), default="WaveMLP_T_dw", help=shown)
    add("--img-size", type=cli.positive, default=Recipe.img_size, metavar="N", help=shown)
    add("--batch", type=cli.positive, default=Recipe.batch, metavar="N", help=f"of all processes together; {shown}")
    add("--lr", type=float, metavar="RATE", help="the peak; default: 0.001 for each 1024 images of a batch")
    add("--weight-decay", type=float, default=Recipe.weight_decay, metavar="W", help=shown)
    add("--epochs", type=cli.positive, default=Recipe.epochs, metavar="N", help=shown)
    add("--warm-up", type=int, default=Recipe.warm_up, metavar="N", help=f"epochs of these; {shown}")
    add("--cool-down", type=int, default=Recipe.cool_down, metavar="N", help=f"epochs after these; {shown}")
    for name in ("smoothing", "mixup", "cutmix", "erase", "ema"):
        add(f"--{name}", type=float, default=getattr(Recipe, name), metavar="X", help=shown)
    add("--no-augment", dest="augment", action="store_false", help="centre crops instead of RandAugment")
    add("--repeats", type=cli.positive, default=Recipe.repeats, metavar="N", help=f"of each image in a row; {shown}")
    add("--drop-path", type=float, metavar="P", help="stochastic depth, Wave-MLP's; default: 0.1")
    add("--amp", choices=("bfloat16", "float16", "off"), help="default: bfloat16 on a GPU, off on a CPU")
    add("--sync-bn", action="store_true", help="BatchNorm's statistics of all processes' images; the plain modules run")
    add("--compile", action="store_true", help="torch.compile")
    add("--workers", type=int, default=8, metavar="N", help=f"that read images, per process; {shown}")
    add("--resume", action="store_true", help="continue the run in --out where it was left")
    cli.add_machine_options(parser, "imagenet-results")
    parser.set_defaults(device="cuda")
    return parser


def _train(arguments: argparse.Namespace) -> int:
    try:
        classes = image_folder.classes(arguments.data)
    except (OSError, ValueError) as error:
        raise cli.Refused(str(error)) from error
    recipe = _recipe(arguments)
    imagenet_recipe.require_timm()
    cli.make_folder(arguments.out)
    with cli.machine(arguments), joined(arguments.device) as processes:
        each = recipe.batch // processes.world
        if recipe.batch % processes.world or ((recipe.mixup or recipe.cutmix) and each % 2):
            raise cli.Refused(
                f"--batch {recipe.batch}: expected a multiple of {processes.world} processes, and for --mixup and "
                "--cutmix, which mix pairs, of twice as many"
            )
        torch.manual_seed(recipe.seed)
        model = _model(recipe, len(classes)).to(processes.device, memory_format=torch.channels_last)
        crop = getattr(model, "default_cfg", {}).get("crop_pct", WAVEMIX_CROP)
        ema = imagenet_recipe.average(model, recipe)
        if recipe.sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        optimizer = imagenet_recipe.optimizer(model, recipe)
        training = Training(
            recipe,
            model,
            imagenet_recipe.load(arguments.data, classes, recipe, crop, arguments.workers, processes),
            imagenet_recipe.Prepare(recipe, len(classes), processes.device),
            optimizer,
            imagenet_recipe.schedule(optimizer, recipe),
            ema,
            processes,
            arguments.compile,
        )
        _continue_or_begin(training, arguments.out / CHECKPOINT, arguments.resume)
        return _run(training, arguments.out, arguments.given)


def _recipe(arguments: argparse.Namespace) -> Recipe:
    if arguments.lr is None:
        arguments.lr = Recipe.lr * arguments.batch / Recipe.batch
    if arguments.amp is None:
        arguments.amp = "bfloat16" if arguments.device == "cuda" else "off"
    if arguments.drop_path is None:
        arguments.drop_path = 0.0 if arguments.model == "WaveMix" else Recipe.drop_path
    if arguments.model == "WaveMix" and arguments.drop_path:
        raise cli.Refused(f"--drop-path {arguments.drop_path:g}: WaveMix has no stochastic depth; leave it out")
    if arguments.sync_bn and arguments.device == "cpu":
        raise cli.Refused("--sync-bn --device cpu: PyTorch synchronises BatchNorm on GPUs alone")
    for name in ("lr", "weight_decay"):
        if not 0 <= getattr(arguments, name) < math.inf:
            raise cli.Refused(f"--{name.replace('_', '-')} {getattr(arguments, name):g}: expected a number from 0 on")
    for name in ("smoothing", "erase", "drop_path", "ema"):
        if not 0 <= getattr(arguments, name) < 1:
            raise cli.Refused(f"--{name.replace('_', '-')} {getattr(arguments, name):g}: expected 0 or more, below 1")
    for name in ("mixup", "cutmix", "warm_up", "cool_down", "workers"):
        if getattr(arguments, name) < 0:
            raise cli.Refused(f"--{name.replace('_', '-')} {getattr(arguments, name):g}: expected 0 or more")
    return Recipe(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Recipe)})


def _model(recipe: Recipe, classes: int) -> nn.Module:
    more = {"drop_path_rate": recipe.drop_path} if recipe.drop_path else {}
    return MODELS[recipe.model](num_classes=classes, **more)


def _continue_or_begin(training: Training, checkpoint: Path, resume: bool) -> None:
    if not resume:
        if checkpoint.exists():
            raise cli.Refused(f"{checkpoint} is of an earlier run: --resume continues it, another --out begins anew")
        return
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise cli.Refused(f"--resume: there is no {checkpoint}; leave --resume out to begin") from error
    for name, now in dataclasses.asdict(training.recipe).items():
        if (begun := state["recipe"][name]) != now:
            raise cli.Refused(f"--{name.replace('_', '-')} {now}: the run in {checkpoint} was begun with {begun}")
    training.load_state_dict(state)


def _run(training: Training, out: Path, given: Sequence[str]) -> int:
    # To the last line: after the first end torchrun sends SIGTERM to all, which must not cut off what they say.
    with Interrupt(patient=training.processes.control is not None) as interrupt:
        return _trained(training, out, given, interrupt)


def _trained(training: Training, out: Path, given: Sequence[str], interrupt: Interrupt) -> int:
    from rich.console import Console

    processes = training.processes
    console = Console(highlight=False, soft_wrap=True, quiet=processes.rank > 0)
    try:
        done = _epochs(training, out, console, interrupt)
    except Diverged as diverged:
        console.print(f"train_imagenet: {diverged}")
        return 1
    except RuntimeError as error:
        if processes.control is None or (lost := _loss_of_a_process(error, interrupt.asked)) is None:
            raise
        print(
            f"train_imagenet: rank {processes.rank} lost another process ({str(lost).splitlines()[0]}); --resume goes "
            f"on from {out / CHECKPOINT}, if an epoch was complete",
            file=sys.stderr,
        )
        return 1
    if not done:
        again = shlex.join([*given, *([] if "--resume" in given else ["--resume"])])
        start = "python" if processes.control is None else f"torchrun --nproc_per_node {processes.world}"
        console.print(f"interrupted in epoch {training.epoch + 1}, nothing is lost; it goes on with")
        console.print(f"  {start} -m examples.train_imagenet {again}")
        processes.any(True)  # torchrun ends all after the first end: none before rank 0 has saved and said so
        return 130
    best = training.best()
    console.print(f"after the last epoch {training.rows[-1]['ema_accuracy']:.2f} % of the validation images are right")
    console.print(f"best: {best['ema_accuracy']:.2f} %, epoch {best['epoch']:g}, chosen by the validation images")
    console.print(f"wrote {', '.join(str(out / name) for name in (LOG, BEST, CHECKPOINT))}")
    return 0


def _epochs(training: Training, out: Path, console: Any, interrupt: Interrupt) -> bool:
    """Trains to the end, or to where any rank was asked to stop; whether the end was reached."""
    processes = training.processes
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    chosen = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(training.recipe).items())
    console.print(f"{parameters:,} parameters, {processes.world} x {processes.device.type}; {chosen}")
    done = training.epoch * training.batches + training.batch
    with Progress(console, training.epochs * training.batches, done, training.batches) as bar:
        while training.epoch < training.epochs:
            for loss in training.steps():
                shown = f"loss {float(loss):.3f}" if training.batch % SHOWN_EVERY == 0 else None
                bar.advance(f"epoch {training.epoch + 1}", shown)
                if training.batch < training.batches and processes.any(interrupt.asked):
                    _save(training, out)
                    return False
            row = training.end_epoch()
            console.print(_line(row, training.epochs))
            _keep(training, out)
            if training.epoch < training.epochs and processes.any(interrupt.asked):
                return False
    return True


def _loss_of_a_process(error: BaseException | None, stopped: bool) -> BaseException | None:
    """The error that tells of it, or None: one of the connection, or what came while one was handled; where torchrun's
    SIGTERM has ``stopped`` the run, a loader's worker that it ended too."""
    while error is not None:
        if isinstance(error, dist.DistError) or "gloo" in str(error) or (stopped and "DataLoader worker" in str(error)):
            return error
        error = error.__context__
    return None


def _line(row: Mapping[str, float], epochs: int) -> str:
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}  {row['seconds']:6.1f} s  train loss {row['train_loss']:.4f}  "
        f"validation {row['test_accuracy']:5.2f} %, averaged weights {row['ema_accuracy']:5.2f} %  lr {row['lr']:.1e}"
    )


def _save(training: Training, out: Path) -> None:
    state = training.state_dict()
    if training.processes.rank == 0:
        files.save_checkpoint(out / CHECKPOINT, state)


def _keep(training: Training, out: Path) -> None:
    """The files of an epoch. The checkpoint comes last: a crash before it repeats the epoch, with its files."""
    row = training.rows[-1]
    if training.processes.rank == 0:
        files.save_table(out / LOG, COLUMNS, training.rows)
        if row is training.best():
            about = {"model": training.recipe.model, "epoch": str(row["epoch"]), "accuracy": str(row["ema_accuracy"])}
            files.save_safetensors(out / BEST, training.ema.module.state_dict(), about)
    _save(training, out)


if __name__ == "__main__":
    raise SystemExit(record(main)())
