"""A folder of images by class, read in an order and with random numbers that follow from the seed alone.

Which images a step takes, and what augmentation makes of each, depend neither on the number of processes, nor on that
of the loader's workers, nor on where a run was interrupted.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

LAYOUT = "expected the layout train/CLASS/*.JPEG and val/CLASS/*.JPEG, as torchvision's ImageFolder"


def classes(folder: Path) -> list[str]:
    """Names of the classes in ``folder``, which has ``train`` and ``val`` with one folder for each.

    Raises:
        ValueError: another layout, or a class of one that the other lacks; the message says which.
    """
    found: dict[str, list[str]] = {}
    for split in ("train", "val"):
        if not (folder / split).is_dir():
            raise ValueError(f"{folder}: no folder {split} there; {LAYOUT}")
        found[split] = sorted(entry.name for entry in (folder / split).iterdir() if entry.is_dir())
        if not found[split]:
            raise ValueError(f"{folder / split}: no folders of classes there; {LAYOUT}")
    if odd := sorted(set(found["train"]) ^ set(found["val"])):
        have, lack = ("train", "val") if odd[0] in found["train"] else ("val", "train")
        raise ValueError(f"{folder}: class {odd[0]} is in {have}, not in {lack} ({len(odd)} such); {LAYOUT}")
    return found["train"]


def seed_all(*numbers: int) -> None:
    """Seeds Python's, NumPy's and torch's generators from some numbers (SeedSequence: neighbours are independent)."""
    words = [int(word) for word in np.random.SeedSequence(numbers).generate_state(3, np.uint64)]
    random.seed(words[0])
    np.random.seed(words[1] % 2**32)
    torch.manual_seed(words[2] % 2**63)


class Order(Sampler[tuple[int, int, int]]):
    """A rank's images in order: (image, epoch, position in the epoch).

    An epoch takes as many images as there are, down to whole batches; each is repeated ``repeats`` times in a row and
    thus lies in different ranks, so an epoch sees one in ``repeats`` of them (repeated augmentation, arXiv:1901.09335,
    as DeiT's sampler has it).

    Args:
        images: how many there are.
        batch: images of this rank in a step.
        rank, world: number of this process, and number of processes.
        repeats: repetitions of each image.
        seed: seed of the order.
    """

    def __init__(self, images: int, batch: int, rank: int = 0, world: int = 1, repeats: int = 1, seed: int = 0) -> None:
        self.images, self.batch, self.rank, self.world = images, batch, rank, world
        self.repeats, self.seed = repeats, seed
        self.batches = images // (batch * world)
        self.epoch = self.start = 0

    def begin(self, epoch: int, start: int = 0) -> None:
        """The next iteration gives ``epoch`` from batch ``start`` on."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return (self.batches - self.start) * self.batch

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(self.images)
        first, last = self.start * self.batch, self.batches * self.batch
        for position in range(first * self.world + self.rank, last * self.world, self.world):
            yield int(order[position // self.repeats]), self.epoch, position


class Augmented(Dataset[tuple[Any, int]]):
    """Images of a data set by :class:`Order`'s entries, whose augmentation is seeded by (seed, epoch, position)."""

    def __init__(self, images: Dataset[tuple[Any, int]], seed: int) -> None:
        self.images, self.seed = images, seed

    def __getitem__(self, entry: tuple[int, int, int]) -> tuple[Any, int]:
        image, epoch, position = entry
        seed_all(self.seed, 1, epoch, position)
        return self.images[image]
