"""The weights that WaveMix's authors publish, by name: where they are, what model they are of, and fetching them.

Every URL names a commit of the repository, so the file behind it cannot change. Where the file's SHA-256 is on record
too it is verified when the file arrives. An entry is in the table only if the published file's size is that of the
parameters and buffers its arguments give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from torch import Tensor

__all__ = ["WEIGHTS", "Weights", "load_state_dict", "weights"]


@dataclass(frozen=True)
class Weights:
    """One published state dict.

    Attributes:
        url: of the file.
        arguments: of :class:`wavemix_kernels.wavemix.classification.WaveMix`, where they are not the defaults.
        sha256: of the file in hexadecimal, or None where it is not on record.
    """

    url: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    sha256: str | None = None

    @property
    def file_name(self) -> str:
        """Its name in the cache. ``torch.hub`` reads the hash to verify between the "-" and the "."."""
        path = PurePosixPath(urlparse(self.url).path)
        return f"{path.stem}-{self.sha256}{path.suffix}" if self.sha256 else path.name


_FOLDER = (
    "https://huggingface.co/cloudwalker/wavemix/resolve/e423d646e1fe98bd5117cd8985cbdb27a105ca66/Saved_Models_Weights"
)

#: Named by data set and the accuracy (top-1, percent) that upstream reports.
WEIGHTS: dict[str, Weights] = {
    "imagenet_75.06": Weights(
        f"{_FOLDER}/ImageNet/wavemix_192_16_75.06.pth",
        sha256="3850715dbe77d6eca0bf63be2f4c41bcac3c22be0f7cd5d53850126d0aabafca",
    ),
    "imagenet_75.04": Weights(f"{_FOLDER}/ImageNet/wavemix_192_16_75.04.pth"),
    "imagenet_73.03": Weights(f"{_FOLDER}/ImageNet/ImageNet73.03.pth", {"ff_channel": 256, "final_dim": 256}),
    "imagenet_71.49": Weights(f"{_FOLDER}/ImageNet/imagenet_71.49.pth"),
    "imagenet_70.66": Weights(
        f"{_FOLDER}/wavemix_192_16_level1_70.66.pth",
        {"level": 1},
        sha256="4e893b03bdbc6e8745ba2f94c503b71f39656ebe9c4ebb1d6480fa18c85724c1",
    ),
    "imagenet_70.42": Weights(
        f"{_FOLDER}/ImageNet/imagenet4level_70.42.pth",
        {"ff_channel": 256, "final_dim": 256, "level": 4, "initial_conv": "strided"},
    ),
    "places365_54.94": Weights(
        f"{_FOLDER}/Places365/places365_54.94.pth",
        {"num_classes": 365, "depth": 12, "ff_channel": 256, "final_dim": 256, "level": 2, "patch_size": 8},
    ),
    "cifar10_95.37": Weights(
        f"{_FOLDER}/cifar10/cifar10_95.37.pth",
        {"num_classes": 10, "depth": 8, "ff_channel": 320, "final_dim": 320, "level": 1, "initial_conv": "strided"}
        | {"stride": 1},
    ),
}


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
