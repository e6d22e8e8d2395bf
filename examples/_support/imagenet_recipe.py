"""The published recipe of Wave-MLP on ImageNet, by timm's data pipeline, augmentation, optimizer, schedule and EMA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from . import cli, image_folder
from .processes import Processes

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, scaled to 0 … 1
WARM_UP_LR, LAST_LR = 1e-6, 1e-5
AUGMENT, COLOUR_JITTER = "rand-m9-mstd0.5-inc1", 0.4


@dataclass(frozen=True)
class Recipe:
    """The parameters that decide a run's numbers; ``--resume`` needs the same ones.

    The defaults are those of the command that Wave-MLP's authors publish for all their models (README.md of
    ``wavemlp_pytorch`` in huawei-noah/Efficient-AI-Backbones), and of its script where the command is silent.

    Attributes:
        batch: images per step, of all processes together.
        lr: the schedule's peak, for this batch.
        epochs, warm_up, cool_down: epochs of the cosine, of its linear beginning (a part of them), and after it at the
            lowest rate (upstream's script adds 10).
        repeats: repetitions of each image in a row (repeated augmentation).
        drop_path: stochastic depth of the last block.
        ema: decay of the averaged weights.
        amp: dtype of the products, or "off".
    """

    model: str
    img_size: int = 224
    batch: int = 1024
    lr: float = 1e-3
    weight_decay: float = 0.05
    epochs: int = 300
    warm_up: int = 5
    cool_down: int = 10
    smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    erase: float = 0.25
    augment: bool = True
    repeats: int = 3
    drop_path: float = 0.1
    ema: float = 0.99996
    amp: str = "bfloat16"
    sync_bn: bool = False
    seed: int = 0
    backend: str = "auto"
    device: str = "cuda"


def require_timm() -> None:
    """
    Raises:
        Refused: timm is there but does not import, or its RandAugment fails on this Pillow; the message says why.
    """
    try:
        import PIL
        import timm.data  # noqa: F401 - imported to see whether it does
        from PIL import Image, ImageOps
    except (ImportError, RuntimeError) as error:
        raise cli.Refused(
            f"timm does not import ({error}); torchvision must be the build for torch {torch.__version__}"
        ) from error
    try:
        # The strongest posterisation of RandAugment, in timm 1.0 to 1.0.31 at least.
        ImageOps.posterize(Image.new("RGB", (1, 1)), 0)
    except ValueError as error:
        raise cli.Refused(
            f"Pillow {PIL.__version__} refuses what timm asks ({error}): pip install 'pillow<13'"
        ) from error


class Prepare:
    """Prepares a batch (N, 3, H, W) uint8 on the model's device: normalisation and, in training, random erasing, then
    mixup or cutmix, which turns labels (N,) into smoothed targets (N, classes)."""

    def __init__(self, recipe: Recipe, classes: int, device: torch.device) -> None:
        from timm.data import Mixup
        from timm.data.random_erasing import RandomErasing

        self.device = device
        self.mean, self.std = (torch.tensor(v, device=device).view(1, 3, 1, 1) * 255 for v in (MEAN, STD))
        self.erase = RandomErasing(recipe.erase, mode="pixel", device=device.type) if recipe.erase else None
        self.mix = (
            Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=classes)
            if recipe.mixup or recipe.cutmix
            else None
        )

    def __call__(self, images: Tensor, labels: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True).float()
        images = images.sub_(self.mean).div_(self.std)
        labels = labels.to(self.device, non_blocking=True)
        if training and self.erase is not None:
            images = self.erase(images)
        if training and self.mix is not None:
            images, labels = self.mix(images, labels)
        return images, labels


@dataclass(frozen=True)
class Data:
    """Batches of (images uint8, labels): ``train`` in the order that ``order`` gives, ``val`` this rank's part."""

    train: DataLoader[Any]
    order: image_folder.Order
    val: DataLoader[Any]


def load(folder: Path, classes: list[str], recipe: Recipe, crop: float, workers: int, processes: Processes) -> Data:
    """
    Raises:
        Refused: no images, or fewer than a batch.
    """
    from timm.data import ImageDataset, create_transform
    from timm.data.loader import fast_collate

    numbers = {name: number for number, name in enumerate(classes)}
    shared: dict[str, Any] = {"input_size": (3, recipe.img_size, recipe.img_size), "use_prefetcher": True}
    if recipe.augment:
        shared_train = {"auto_augment": AUGMENT, "color_jitter": COLOUR_JITTER, "interpolation": "random"}
        transform = create_transform(is_training=True, **shared_train, **shared)
    else:
        transform = create_transform(interpolation="bicubic", crop_pct=crop, **shared)
    try:
        train = ImageDataset(folder / "train", class_map=numbers, transform=transform)
        val = ImageDataset(
            folder / "val",
            class_map=numbers,
            transform=create_transform(interpolation="bicubic", crop_pct=crop, **shared),
        )
    except RuntimeError as error:  # timm's words for a folder without images
        raise cli.Refused(f"{error}; {image_folder.LAYOUT}") from error
    if len(train) < recipe.batch:
        raise cli.Refused(f"{folder / 'train'}: {len(train)} images make no batch of {recipe.batch}")
    batch = recipe.batch // processes.world
    order = image_folder.Order(len(train), batch, processes.rank, processes.world, recipe.repeats, recipe.seed)
    # Workers begin anew with each epoch: kept ones would go on with generators that a resumed run has not.
    common: dict[str, Any] = {
        "batch_size": batch, "num_workers": workers, "collate_fn": fast_collate,
        "pin_memory": processes.device.type == "cuda",
    }  # fmt: skip
    mine = Subset(val, range(processes.rank, len(val), processes.world))
    augmented = image_folder.Augmented(train, recipe.seed)
    return Data(DataLoader(augmented, sampler=order, **common), order, DataLoader(mine, **common))


def optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW without weight decay on biases and norms, as timm groups parameters."""
    from timm.optim import create_optimizer_v2

    made: torch.optim.Optimizer = create_optimizer_v2(
        model, opt="adamw", lr=recipe.lr, weight_decay=recipe.weight_decay
    )
    return made


def schedule(optimizer: torch.optim.Optimizer, recipe: Recipe) -> Any:
    """timm's scheduler: ``step(epoch)`` sets the rate of an epoch, as upstream does, with no state of its own."""
    from timm.scheduler import CosineLRScheduler

    return CosineLRScheduler(
        optimizer, recipe.epochs, lr_min=LAST_LR, warmup_t=recipe.warm_up, warmup_lr_init=WARM_UP_LR
    )


def average(model: nn.Module, recipe: Recipe) -> Any:
    """timm's EMA: ``update(model)``, and the averaged model as ``module``."""
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=recipe.ema)
