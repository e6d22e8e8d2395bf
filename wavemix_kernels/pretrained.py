"""The weights that WaveMix's authors publish, by name: where they are, what model they are of, and fetching them.

Where a commit is on record the URL names it, so the file behind it cannot change; otherwise it is the one in the
authors' script. Where the file's SHA-256 is on record it is verified when the file arrives, and where its size is, that
is the size of the parameters and buffers which the arguments give (tests/models/test_pretrained.py).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

__all__ = ["WEIGHTS", "Weights", "load_model", "load_state_dict", "weights"]


@dataclass(frozen=True)
class Weights:
    """One published state dict.

    Attributes:
        url: of the file.
        arguments: of the model, where they are not the defaults.
        sha256: of the file in hexadecimal, or None where it is not on record.
        model: the class in :mod:`wavemix_kernels.wavemix`, as module and name.
        claim: what the authors say that it reaches; not measured here.
    """

    url: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    sha256: str | None = None
    model: str = "classification.WaveMix"
    claim: str = ""

    @property
    def file_name(self) -> str:
        """Its name in the cache. ``torch.hub`` reads the hash to verify between the "-" and the "."."""
        path = PurePosixPath(urlparse(self.url).path)
        return f"{path.stem}-{self.sha256}{path.suffix}" if self.sha256 else path.name

    @property
    def pinned(self) -> bool:
        """Whether the URL names a commit, so that the file behind it cannot change."""
        return re.search(r"/[0-9a-f]{40}/", self.url) is not None

    def build(self) -> nn.Module:
        """The model of these weights, with weights of its own."""
        module, _, kind = self.model.rpartition(".")
        model: nn.Module = getattr(importlib.import_module(f"wavemix_kernels.wavemix.{module}"), kind)(**self.arguments)
        return model


_HUB = "https://huggingface.co/cloudwalker/wavemix/resolve"
_FOLDER = f"{_HUB}/e423d646e1fe98bd5117cd8985cbdb27a105ca66/Saved_Models_Weights"
_MAIN = f"{_HUB}/main"
_PAINT = "https://github.com/pranavphoenix/WavePaint/raw/56c27c6951d92e30337373f962d62f2ff195823c/wavepaint"
_SR = "https://github.com/pranavphoenix/WaveMixSR/raw/5cbb91a154814bc301ce344899c10d887aabaf4f/saved_model_weights"
_STRIDED: dict[str, Any] = {"level": 1, "initial_conv": "strided", "stride": 1}


def _classifier(
    data: str, accuracy: str, url: str, sha256: str | None = None, width: int = 192, **arguments: Any
) -> tuple[str, Weights]:
    """An entry by data set and the accuracy (top-1, percent) that the authors report."""
    if width != 192:
        arguments |= {"ff_channel": width, "final_dim": width}
    return f"{data}_{accuracy}", Weights(url, arguments, sha256, claim=f"{accuracy} % top-1")


def _painter(name: str, url: str, modules: int, **arguments: Any) -> tuple[str, Weights]:
    arguments = {"num_modules": modules, "blocks_per_module": 4, "ff_channel": 128, "final_dim": 128} | arguments
    return f"wavepaint_{name}", Weights(url, arguments, model="wavepaint.WavePaint")


def _enlarger(data: str, decibels: str, interpolation: str) -> tuple[str, Weights]:
    arguments = {"depth": 4, "ff_channel": 144, "final_dim": 144, "interpolation": interpolation}
    url = f"{_SR}/bsd100_2x_y_{data}_{decibels}.pth"
    claim = f"{decibels} dB PSNR of the luminance, BSD100 x2"
    return f"sr_bsd100_x2_{data}_{decibels}", Weights(url, arguments, model="sr.WaveMixSR", claim=claim)


def _in_celebhq(modules: int) -> str:
    return f"{_PAINT}/CelebHQ/WavePaint_blocks4_dim128_modules{modules}_depthconv_celebhq.pth"


#: By data set and what the authors report: the accuracy of classifiers (top-1, percent), the mean IoU of Cityscapes
#: (percent), the PSNR of super-resolution (dB).
WEIGHTS: dict[str, Weights] = dict(
    (
        _classifier(
            "imagenet",
            "75.06",
            f"{_FOLDER}/ImageNet/wavemix_192_16_75.06.pth",
            "3850715dbe77d6eca0bf63be2f4c41bcac3c22be0f7cd5d53850126d0aabafca",
        ),
        _classifier("imagenet", "75.04", f"{_FOLDER}/ImageNet/wavemix_192_16_75.04.pth"),
        _classifier("imagenet", "73.03", f"{_FOLDER}/ImageNet/ImageNet73.03.pth", width=256),
        _classifier("imagenet", "71.49", f"{_FOLDER}/ImageNet/imagenet_71.49.pth"),
        _classifier("imagenet", "71.18", f"{_MAIN}/Saved_Models_Weights/ImageNet/wavemixlite_71.18.pth", level=1),
        _classifier(
            "imagenet",
            "70.66",
            f"{_FOLDER}/wavemix_192_16_level1_70.66.pth",
            "4e893b03bdbc6e8745ba2f94c503b71f39656ebe9c4ebb1d6480fa18c85724c1",
            level=1,
        ),
        _classifier(
            "imagenet",
            "70.42",
            f"{_FOLDER}/ImageNet/imagenet4level_70.42.pth",
            width=256,
            level=4,
            initial_conv="strided",
        ),
        _classifier(
            "places365",
            "54.94",
            f"{_FOLDER}/Places365/places365_54.94.pth",
            width=256,
            num_classes=365,
            depth=12,
            level=2,
            patch_size=8,
        ),
        _classifier(
            "cifar10", "95.37", f"{_FOLDER}/cifar10/cifar10_95.37.pth", width=320, num_classes=10, depth=8, **_STRIDED
        ),
        _classifier(
            "cifar10", "94.58", f"{_FOLDER}/cifar10/cifar10_94.58.pth", width=144, num_classes=10, depth=7, **_STRIDED
        ),
        _classifier(
            "cifar100",
            "78.81",
            f"{_FOLDER}/cifar100/cifar100_78.81.pth",
            width=256,
            num_classes=100,
            depth=10,
            **_STRIDED,
        ),
        _classifier(
            "cifar100",
            "77.82",
            f"{_FOLDER}/cifar100/cifar100_77.82.pth",
            "e491823e217f7e26c8d74659bd34afea84092d9046960c89a9a8aec33dc894ed",
            width=256,
            num_classes=100,
            depth=8,
            **_STRIDED,
        ),
        _classifier(
            "tinyimagenet", "78.76", f"{_MAIN}/Saved_Models_Weights/tinyimagenet/tiny_78.76.pth", num_classes=200
        ),
        _classifier(
            "tinyimagenet", "71.69", f"{_MAIN}/Saved_Models_Weights/tinyimagenet/tiny_71.69.pth", num_classes=200
        ),
        # Its script says depth 12; the file has the size of 10.
        _classifier(
            "tinyimagenet",
            "62.51",
            f"{_FOLDER}/tinyimagenet/tinyimagenet_62.51.pth",
            "fc01c44c20a450df8cbca7d4e31382d7ed09cf33b281653bb9aeb5fedb6a3585",
            width=256,
            num_classes=200,
            depth=10,
            **_STRIDED,
        ),
        _classifier(
            "galaxy10",
            "95.42",
            f"{_HUB}/b852776082d0c7492ef7f0c1367d9b74fbb6f33e/Saved_Models_Weights/galaxy10/galaxy_95.42.pth",
            num_classes=10,
        ),
        _classifier(
            "galaxy10", "90.23", f"{_MAIN}/Saved_Models_Weights/galaxy10/galaxy_90.23.pth", num_classes=10, level=1
        ),
        (
            "cityscapes_83.04",
            Weights(
                f"{_FOLDER}/cityscapes_83.04.pth",
                sha256="47223e3a5ffb5d87bd0e6443d5055893ffcc7ac5d7cdbb3bf79e0b2df1cb533a",
                model="SemSegment.CityscapesWaveMix",
                claim="83.04 % single-scale mIoU",
            ),
        ),
        _enlarger("df2k", "33.2", "bicubic"),
        _enlarger("div2k", "33.08", "bilinear"),
        *(
            _painter(
                f"{data}_{mask}",
                f"{_MAIN}/Weights/WavePaint_{underscore}blocks4_dim128_modules8_{file}_{mask}_mask.pth",
                8,
                mult=4,
                mask_channel=False,
            )
            for data, underscore, file in (("places", "_", "places256"), ("celebahq", "", "celebhq"))
            for mask in ("medium", "thick")
        ),
        *(_painter(f"celebahq_{modules}_modules", _in_celebhq(modules), modules, mult=2) for modules in (2, 3, 5, 6)),
        _painter("celebahq_3_modules_level2", _in_celebhq(3).replace("3_depth", "3level2_depth"), 3, mult=2, level=2),
        _painter(
            "imagenet_2_modules",
            f"{_PAINT}/weights/WavePaint_blocks4_dim128_modules2imagenet_depthconv.pth",
            2,
            mult=2,
        ),
    )
)


def weights(name: str) -> Weights:
    """The entry of :data:`WEIGHTS`, or a ValueError that names them all."""
    if name not in WEIGHTS:
        raise ValueError(f"pretrained={name!r}: expected one of {', '.join(map(repr, WEIGHTS))}")
    return WEIGHTS[name]


def load_state_dict(name: str, *, progress: bool = True) -> dict[str, Tensor]:
    """The published state dict, on the CPU, from ``torch.hub``'s cache or else fetched into it.

    Only tensors are read from the file (``weights_only=True``).

    Args:
        name: a key of :data:`WEIGHTS`.
        progress: whether to show the download on stderr.

    Raises:
        ValueError: unknown name.
        RuntimeError: the file could not be fetched, or is not the one published.
    """
    entry = weights(name)
    cached = f"{torch.hub.get_dir()}/checkpoints/{entry.file_name}"
    try:
        return torch.hub.load_state_dict_from_url(
            entry.url,
            map_location="cpu",
            progress=progress,
            check_hash=entry.sha256 is not None,
            file_name=entry.file_name,
            weights_only=True,
        )
    except (URLError, TimeoutError, ConnectionError) as error:
        raise RuntimeError(
            f"pretrained={name!r}: could not fetch {entry.url} ({error}), and {cached} does not exist. With the file "
            "from elsewhere, save it there, or build the model without pretrained= and call "
            "model.load_state_dict(torch.load(path, weights_only=True))"
        ) from error
    except RuntimeError as error:
        if "hash" not in str(error):
            raise
        raise RuntimeError(
            f"pretrained={name!r}: what {entry.url} sent is not the published file ({error}); nothing was kept"
        ) from error


def load_model(name: str, *, progress: bool = True) -> nn.Module:
    """The model of published weights, with these, on the CPU and in training mode, as models are built.

    Args:
        name: a key of :data:`WEIGHTS`.
        progress: whether to show the download on stderr.

    Raises:
        ValueError: unknown name.
        RuntimeError: the file could not be fetched, or is not the one published.
    """
    model = weights(name).build()
    model.load_state_dict(load_state_dict(name, progress=progress), strict=True)
    return model
