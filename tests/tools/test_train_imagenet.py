"""The ImageNet program: its order of images, training on one and two processes, interruption, a killed rank, refusals.

Without timm the loop runs on loaders made here; with timm the whole program runs under torchrun on images made here.
"""

from __future__ import annotations

import copy
import csv
import random
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from examples import train_imagenet
from examples._support import image_folder, imagenet_recipe, processes
from tests.tolerances import UNIT_ROUNDOFF
from tests.tools.helpers import needs, python, why_no_timm
from tests.tools.imagenet_runner import tiny
from tests.tools.two_processes import WORLD, TwoProcesses

RUNNER = Path(__file__).with_name("imagenet_runner.py")
IMAGES, BATCH, CLASSES = 64, 16, 4
needs_extras = needs("train", train_imagenet.EXTRAS)


def why_no_recipe() -> str | None:
    try:
        imagenet_recipe.require_timm()
    except train_imagenet.cli.Refused as refused:
        return str(refused)
    return None


needs_timm = pytest.mark.skipif(why_no_recipe() is not None, reason=str(why_no_recipe()))


# --- The order of images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", [1, 3])
def test_ranks_share_the_batches_of_one_process(repeats: int) -> None:
    def order(batch: int, rank: int, world: int) -> list[tuple[int, int, int]]:
        made = image_folder.Order(IMAGES + 5, batch, rank, world, repeats, seed=3)
        made.begin(2)
        return list(made)

    whole = order(BATCH, 0, 1)
    halves = [order(BATCH // 2, rank, 2) for rank in range(2)]
    assert len(whole) == IMAGES // BATCH * BATCH
    for k in range(len(whole) // BATCH):
        together = [e for half in halves for e in half[k * BATCH // 2 : (k + 1) * BATCH // 2]]
        assert sorted(together) == sorted(whole[k * BATCH : (k + 1) * BATCH])
    counts = np.bincount([image for image, _, _ in whole])
    assert counts.max() == repeats


def test_order_goes_on_from_any_batch_and_changes_with_epoch_and_seed() -> None:
    order = image_folder.Order(IMAGES, BATCH)
    whole = list(order)
    order.begin(0, 2)
    assert list(order) == whole[2 * BATCH :]
    assert len(order) == len(whole) - 2 * BATCH
    order.begin(1)
    images = [image for image, _, _ in whole]
    assert [image for image, _, _ in order] != images
    assert [image for image, _, _ in image_folder.Order(IMAGES, BATCH, seed=1)] != images


class Drawing:
    """A data set whose item is a number drawn by each generator that augmentation uses."""

    def __getitem__(self, index: int) -> tuple[float, int]:
        return random.random() + 10 * np.random.rand() + 100 * float(torch.rand(())), index


def test_augmentation_follows_from_seed_epoch_and_position() -> None:
    augmented = image_folder.Augmented(Drawing(), seed=0)
    assert augmented[5, 0, 7] == augmented[5, 0, 7]
    drawn = {augmented[5, epoch, position][0] for epoch in range(3) for position in range(3)}
    drawn.add(image_folder.Augmented(Drawing(), seed=1)[5, 0, 0][0])
    assert len(drawn) == 10


# --- The loop, without timm ----------------------------------------------------------------------------------


class Schedule:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer  # whose groups load_state_dict replaces

    def step(self, epoch: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3 / (1 + epoch)


class Ema:
    def __init__(self, model: nn.Module) -> None:
        self.module = copy.deepcopy(model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), 0.1)


def plain(images: Tensor, labels: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    return images.float() / 255 - 0.5, labels


def made(them: processes.Processes, drop_path: float = 0.0) -> train_imagenet.Training:
    recipe = imagenet_recipe.Recipe("tiny", batch=BATCH, epochs=2, cool_down=0, amp="off", device="cpu")
    images = torch.randint(256, (IMAGES, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dataset: Any = TensorDataset(images, torch.arange(IMAGES) % CLASSES)
    each = BATCH // them.world
    order = image_folder.Order(IMAGES, each, them.rank, them.world, repeats=2)
    loader = DataLoader(image_folder.Augmented(dataset, 0), each, sampler=order)
    data = imagenet_recipe.Data(loader, order, DataLoader(Subset(dataset, range(them.rank, 30, them.world)), each))
    torch.manual_seed(0)
    model = tiny(CLASSES, drop_path)
    optimizer = torch.optim.AdamW(model.parameters())
    return train_imagenet.Training(recipe, model, data, plain, optimizer, Schedule(optimizer), Ema(model), them)


ALONE = processes.Processes(0, 1, torch.device("cpu"), None)


def trained(training: train_imagenet.Training) -> dict[str, Any]:
    while training.epoch < training.epochs:
        for _ in training.steps():
            pass
        training.end_epoch()
    return training.state_dict()


def assert_alike(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in ("model", "ema"):
        assert all(torch.equal(found[key][name], value) for name, value in wanted[key].items())


def one_epoch_together() -> tuple[list[float], float, list[float]]:
    them = processes.Processes(dist.get_rank(), WORLD, torch.device("cpu"), dist.group.WORLD)
    training = made(them)
    losses = [them.sums(float(loss))[0] / WORLD for loss in training.steps()]
    assert [them.any(rank == them.rank) for rank in (0, 1, 2)] == [True, True, False]
    row = training.end_epoch()
    return losses, row["train_loss"], [row["test_accuracy"], row["ema_accuracy"]]


@pytest.mark.prove
def test_two_processes_train_as_one(two: TwoProcesses) -> None:
    """The first loss within its rounding: a sum over 16 images of a network of some 10 layers, each of some hundred
    terms, in two orders. Later ones have AdamW's first steps in between, which are signs of gradients: where a gradient
    is 0 but for rounding, a weight moves by twice the rate, 1e-3 relative to weights of size 0.02 to 0.5."""
    training = made(ALONE)
    losses = [float(loss) for loss in training.steps()]
    row = training.end_epoch()
    for its_losses, mean, accuracies in two.run(one_epoch_together):
        assert abs(its_losses[0] - losses[0]) <= 1000 * UNIT_ROUNDOFF[torch.float32] * losses[0]
        assert its_losses == pytest.approx(losses, rel=1e-3)
        assert mean == pytest.approx(row["train_loss"], rel=1e-3)
        wanted = (row["test_accuracy"], row["ema_accuracy"])
        assert all(abs(a - b) <= 100 / 30 for a, b in zip(accuracies, wanted, strict=True))


@pytest.mark.parametrize("batches", [1, 3])
def test_a_run_put_back_goes_on_bit_for_bit(batches: int) -> None:
    """Stochastic depth included, whose generator is no part of the state."""
    whole = trained(made(ALONE, 0.5))
    stopped = made(ALONE, 0.5)
    for _ in stopped.steps():
        if stopped.batch == batches:
            break
    state = copy.deepcopy(stopped.state_dict())
    torch.manual_seed(99)
    again = made(ALONE, 0.5)
    again.load_state_dict(state)
    assert (again.epoch, again.batch) == (0, batches)
    found = trained(again)
    assert_alike(found, whole)
    for line in (*found["rows"], *whole["rows"]):
        del line["seconds"]
    assert found["rows"] == whole["rows"]


def test_a_loss_that_is_no_number_ends_training() -> None:
    training = made(ALONE)
    with torch.no_grad():
        next(training.model.parameters()).fill_(float("nan"))
    for _ in training.steps():
        pass
    with pytest.raises(train_imagenet.Diverged, match="epoch 1 is nan"):
        training.end_epoch()


# --- Refusals ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of noise in colours of their own."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", IMAGES // CLASSES), ("val", 5)):
        for number in range(CLASSES):
            place = root / split / f"class{number}"
            place.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 100, (20, 24, 3)) + 150 * (number == np.arange(3))
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    return root


def test_refusals_are_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused) -> None:
    monkeypatch.setattr(train_imagenet, "EXTRAS", {})

    def said(place: Path, *more: str) -> str:
        return refused(train_imagenet.main, [str(place), "--out", str(tmp_path / "out"), *more])

    assert "no folder train there; expected the layout" in said(tmp_path)
    (tmp_path / "train").mkdir()
    assert "no folders of classes there" in said(tmp_path)
    for place in ("train/a", "train/b", "val/b"):
        (tmp_path / place).mkdir(parents=True)
    assert "class a is in train, not in val" in said(tmp_path)
    for given, why in {
        "--model WaveMix --drop-path 0.1": "WaveMix has no stochastic depth",
        "--device cpu --sync-bn": "on GPUs alone",
        "--mixup -1": "--mixup -1: expected 0 or more",
        "--ema 1": "--ema 1: expected",
        "--model resnet50": "invalid choice",
    }.items():
        assert why in said(folder, *given.split())
    monkeypatch.setattr(train_imagenet, "EXTRAS", {"no_such_module": "timm"})
    assert "timm missing: pip install timm" in said(folder)


def test_what_is_no_torchrun_is_named() -> None:
    with pytest.raises(train_imagenet.cli.Refused, match="LOCAL_RANK=None: expected the numbers that torchrun"):
        processes.joined("cpu", {"RANK": "0", "WORLD_SIZE": "2"}).__enter__()


@pytest.mark.skipif(why_no_timm() is None, reason="timm is here, so nothing has to say that it is not")
def test_without_timm_the_program_says_so(folder: Path, tmp_path: Path, refused) -> None:
    assert "timm" in refused(train_imagenet.main, [str(folder), "--device", "cpu", "--out", str(tmp_path / "out")])


# --- The whole program, with timm ----------------------------------------------------------------------------

USUAL = "--model tiny --device cpu --threads 1 --img-size 16 --warm-up 1 --cool-down 0 --workers 1 --lr 1e-3 --batch 16"
#: Without what one process draws for the whole batch and two for its halves.
ALIKE = "--mixup 0 --cutmix 0 --erase 0 --drop-path 0"


def run(world: int, folder: Path, out: Path, more: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Two epochs of four batches by torchrun, or with 0 by one process alone; ``more`` overrides USUAL."""
    start = f"-m torch.distributed.run --standalone --nproc_per_node {world}".split() if world else []
    given = [str(RUNNER), str(folder), "--out", str(out), *f"{USUAL} --epochs 2 {more}".split()]
    return python(*start, *given, OMP_NUM_THREADS="1", **environment)


def log(out: Path) -> list[dict[str, float]]:
    with (out / train_imagenet.LOG).open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.prove
@needs_timm
@needs_extras
def test_torchrun_trains_as_one_process(folder: Path, tmp_path: Path) -> None:
    logs = []
    for world in (0, 2):
        done = run(world, folder, tmp_path / str(world), ALIKE)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("epoch 1  ") == 1  # only rank 0 prints
        logs.append(log(tmp_path / str(world)))
        assert [row["epoch"] for row in logs[-1]] == [1, 2]
    left, right = logs
    # The first epoch's rate is the warm-up's, 1e-6, so its losses differ by rounding alone.
    assert left[0]["train_loss"] == pytest.approx(right[0]["train_loss"], rel=1e-5)
    assert left[1]["train_loss"] == pytest.approx(right[1]["train_loss"], rel=1e-2)


@pytest.mark.prove
@needs_timm
@needs_extras
def test_two_processes_go_on_bit_for_bit_after_ctrl_c_or_a_killed_rank(folder: Path, tmp_path: Path) -> None:
    """With everything drawn that the recipe draws. Only one rank is asked to stop, or dies, in the second epoch."""
    assert run(2, folder, tmp_path / "whole").returncode == 0
    wanted = torch.load(tmp_path / "whole" / train_imagenet.CHECKPOINT, weights_only=True)
    for name in ("SIGINT", "SIGKILL"):
        out = tmp_path / name
        stopped = run(2, folder, out, SIGNAL_AT=f"{name}:1:5")
        assert stopped.returncode != 0
        assert len(log(out)) == 1
        if name == "SIGINT":
            said, where = ("interrupted in epoch 2, nothing is lost", "--resume"), stopped.stdout
        else:  # torchrun's summary names the rank; nobody waited for the dead one
            said, where = ("SIGKILL", "rank      : 1", "lost another process"), stopped.stderr
            assert "Timed out" not in stopped.stderr
        assert not [words for words in said if words not in where]
        resumed = run(2, folder, out, "--resume")
        assert resumed.returncode == 0, resumed.stderr
        assert [row["epoch"] for row in log(out)] == [1, 2]
        assert_alike(torch.load(out / train_imagenet.CHECKPOINT, weights_only=True), wanted)


@pytest.mark.prove
@needs_timm
@needs_extras
def test_a_batch_that_cannot_be_shared_is_refused(folder: Path, tmp_path: Path) -> None:
    done = run(2, folder, tmp_path, "--batch 18")
    assert done.returncode != 0
    assert done.stderr.count("--batch 18: expected a multiple of 2 processes") == 1
