"""Inputs cut from real photographs, so that bands have the magnitudes and edges that images have.

The photographs are those inside scikit-image's wheel; nothing is downloaded. Where that is not installed, noise with
the mean spectrum of photographs takes their place, which `source` says and a run records. Everything is seeded: the
same arguments give the same tensors on every machine.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

# Colour photographs shipped inside the wheel, in the order in which crops go round.
NAMES = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "retina.jpg",
)


def source() -> str:
    """Names the images that inputs are cut from on this machine."""
    return "photographs" if _folder() is not None else "noise with the spectrum of photographs"


def _folder() -> Path | None:
    """The photographs' folder. The package is found, not imported, since importing it pulls in scipy."""
    package = importlib.util.find_spec("skimage")
    if package is None or not package.submodule_search_locations:
        return None
    return Path(package.submodule_search_locations[0]) / "data"


def _photograph(name: str) -> torch.Tensor:
    """One photograph, (3, H, W) float32 in [0, 1]."""
    folder = _folder()
    return _noise(NAMES.index(name)) if folder is None else _read(folder / name)


@functools.cache
def _read(path: Path) -> torch.Tensor:
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


@functools.cache
def _noise(seed: int, side: int = 512) -> torch.Tensor:
    """Amplitudes falling as 1 / frequency, as they do on the average of photographs [Field, 1987]."""
    white = torch.randn(3, side, side, generator=torch.Generator().manual_seed(seed))
    frequency = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)[None])
    amplitude = 1 / frequency.clamp_min(1 / side)
    image = torch.fft.irfft2(torch.fft.rfft2(white) * amplitude, s=(side, side))
    low, high = image.amin((1, 2), keepdim=True), image.amax((1, 2), keepdim=True)
    return (image - low) / (high - low)


def crops(count: int, height: int, width: int, *, seed: int = 0) -> torch.Tensor:
    """Random crops of the photographs.

    Returns:
        (count, 3, height, width) float32 in [0, 1]. A crop larger than its photograph continues by mirroring.
    """
    rng = np.random.default_rng(seed)
    batch = []
    for index in range(count):
        photograph = _photograph(NAMES[index % len(NAMES)])
        rows, columns = (
            _mirrored(int(rng.integers(max(1, have - want + 1))), want, have)
            for want, have in zip((height, width), photograph.shape[1:], strict=True)
        )
        batch.append(photograph[:, rows][:, :, columns])
    return torch.stack(batch) if batch else torch.empty(0, 3, height, width)


def _mirrored(start: int, length: int, size: int) -> torch.Tensor:
    """`length` indices from `start` on, reflected at the borders of 0 … size-1."""
    position = torch.arange(start, start + length) % (2 * size)
    return torch.where(position < size, position, 2 * size - 1 - position)


def feature_maps(count: int, channels: int, height: int, width: int, *, seed: int = 0) -> torch.Tensor:
    """Feature maps of `channels` channels: crops through one random 3x3 convolution, as a network's stem makes them.

    Returns:
        (count, channels, height, width) float32, every channel of zero mean and unit variance over the batch.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(channels, 3, 3, 3, generator=generator)
    maps = F.conv2d(crops(count, height + 2, width + 2, seed=seed), weight)
    mean = maps.mean((0, 2, 3), keepdim=True)
    deviation = maps.std((0, 2, 3), keepdim=True, unbiased=False)
    return (maps - mean) / deviation.clamp_min(1e-6)
