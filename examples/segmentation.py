"""Segmentation of mosaics of photographed textures: WaveMix against the majority class, trained on a CPU in minutes.

``python -m examples.segmentation``; docs/use/training.md says what to expect.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavemix_kernels.wavemix.SemSegment import WaveMix

from ._support import cli, files
from ._support.interrupt import Interrupt
from ._support.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

# Photographs inside scikit-image's wheel: nothing is downloaded.
TEXTURES = ("brick", "grass", "gravel", "moon", "immunohistochemistry", "hubble_deep_field")
HELD_OUT = 0.4  # of each photograph, its lower part: never trained on

BATCH, SIDE = 16, 96  # mosaics of a step, and their side
CELLS = (3, 6)  # regions of a mosaic
PEAK_LR, WARM_UP = 4e-3, 0.1
LEVEL = 2
TESTS, TEST_SIDE = 12, 192
CHECKPOINT = "checkpoint.pt"
COLUMNS = ("class", "share", "iou")


class Scores(NamedTuple):
    """Shares of pixels classified rightly in all test mosaics, and IoU of each class."""

    accuracy: float
    majority: float
    iou: list[float]
    share: list[float]


def texture(name: str, test: bool) -> Tensor:
    """The upper or, for ``test``, the lower part of ``skimage.data``.``name`` in grey, (H, W).

    Its mean is 0 and its deviation 1, so that brightness and contrast alone tell no class.
    """
    import skimage.data
    from skimage.color import rgb2gray

    image = getattr(skimage.data, name)()
    grey = torch.from_numpy(np.ascontiguousarray(rgb2gray(image) if image.ndim == 3 else image)).float()
    cut = round((1 - HELD_OUT) * grey.shape[0])
    part = grey[cut:] if test else grey[:cut]
    return (part - part.mean()) / part.std()


def mosaics(textures: Sequence[Tensor], count: int, side: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random mosaics and their classes: (count, 3, side, side) float32 and (count, side, side) int64.

    The regions are those of the nearest of a few random points. Each shows a random square of a random texture in a
    random one of the eight orientations.
    """
    rows, columns = np.mgrid[:side, :side]
    images, labels = torch.empty(count, side, side), torch.empty(count, side, side, dtype=torch.int64)
    for i in range(count):
        cells = int(generator.integers(CELLS[0], CELLS[1] + 1))
        points = generator.uniform(0, side, (cells, 2, 1, 1))
        region = torch.from_numpy(((points[:, 0] - rows) ** 2 + (points[:, 1] - columns) ** 2).argmin(0))
        classes = generator.integers(len(textures), size=cells)
        for cell, kind in enumerate(classes):
            whole = textures[kind]
            top, left = (int(generator.integers(n - side + 1)) for n in whole.shape)
            square = whole[top : top + side, left : left + side].rot90(int(generator.integers(4)), (0, 1))
            square = square.flip(1) if generator.integers(2) else square
            here = region == cell
            images[i][here], labels[i][here] = square[here], int(kind)
    return images[:, None].expand(-1, 3, -1, -1).contiguous(), labels


def main(argv: Sequence[str] | None = None) -> int:
    """Train, score and draw.

    Args:
        argv: arguments, ``sys.argv[1:]`` if None.

    Returns:
        0; 1 where the majority class was not beaten; 2 for arguments that cannot be served; 130 after Ctrl-C.
    """
    parser = cli.Parser(prog="segmentation", description=cli.first_line(__doc__))
    parser.set_defaults(command=_run)
    parser.add_argument("--steps", type=cli.positive, default=2000, metavar="N", help="default: %(default)s")
    parser.add_argument("--width", type=cli.positive, default=32, metavar="C", help="channels; default: %(default)s")
    parser.add_argument("--depth", type=cli.positive, default=4, metavar="N", help="Waveblocks; default: %(default)s")
    cli.add_machine_options(parser, "segmentation-results")
    return cli.run(parser, argv)


def build(width: int, depth: int) -> nn.Module:
    return WaveMix(num_classes=len(TEXTURES), depth=depth, ff_channel=width, final_dim=width, level=LEVEL)


def _run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if arguments.width % 4:
        raise cli.Refused(f"--width {arguments.width}: expected a multiple of 4")
    cli.make_folder(arguments.out)
    with cli.machine(arguments) as device:
        torch.manual_seed(arguments.seed)
        built = {"width": arguments.width, "depth": arguments.depth}
        model = build(**built).to(memory_format=torch.channels_last).to(device)
        known = [texture(name, test=False) for name in TEXTURES]
        seconds, steps = train(model, known, arguments.steps, arguments.seed, console)
        files.save_checkpoint(arguments.out / CHECKPOINT, built | {"steps": steps, "model": model.state_dict()})
        console.print(f"{steps} steps in {seconds:.0f} s")
        found = compare(model, arguments.out, console)
    if steps < arguments.steps:
        console.print(f"interrupted after {steps} of {arguments.steps} steps: the numbers are those of what was learnt")
        return 130
    return int(found.accuracy <= found.majority)


def train(model: nn.Module, textures: Sequence[Tensor], steps: int, seed: int, console: Console) -> tuple[float, int]:
    """Minimises the cross entropy of all pixels of random mosaics; seconds and steps taken, fewer after Ctrl-C."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps, pct_start=WARM_UP)
    generator = np.random.default_rng(seed)
    begin, done = time.perf_counter(), 0
    model.train()
    with Interrupt() as interrupt, Progress(console, steps) as bar:
        while done < steps and not interrupt.asked:
            images, labels = (t.to(device) for t in mosaics(textures, BATCH, SIDE, generator))
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            done += 1
            bar.advance("training", f"{100 * (logits.argmax(1) == labels).float().mean().item():.0f} % of pixels")
    return time.perf_counter() - begin, done


@torch.inference_mode()
def classes_of(model: nn.Module, images: Tensor) -> Tensor:
    """(N, 3, H, W) -> the class of each pixel, (N, H, W), on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    return torch.cat([model(image[None].to(device)).argmax(1).cpu() for image in images])


def scored(found: Tensor, labels: Tensor) -> Scores:
    """Both (N, H, W); the majority class is the one that most pixels of ``labels`` have."""
    classes = range(len(TEXTURES))
    both = [int(((found == k) & (labels == k)).sum()) for k in classes]
    either = [int(((found == k) | (labels == k)).sum()) for k in classes]
    share = [float((labels == k).double().mean()) for k in classes]
    iou = [b / e if e else float("nan") for b, e in zip(both, either, strict=True)]
    return Scores(sum(both) / labels.numel(), max(share), iou, share)


def compare(model: nn.Module, out: Path, console: Console) -> Scores:
    """Prints, logs and draws the classes of mosaics of what was held out."""
    from rich.table import Table

    unseen = [texture(name, test=True) for name in TEXTURES]
    images, labels = mosaics(unseen, TESTS, TEST_SIDE, np.random.default_rng(0))
    found = classes_of(model, images)
    scores = scored(found, labels)
    table = Table(title="held-out parts of the photographs", title_justify="left", box=None)
    for heading in ("class", "share of pixels", "IoU"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in zip(TEXTURES, scores.share, scores.iou, strict=True)]
    for row in rows:
        table.add_row(str(row["class"]), f"{100 * row['share']:.1f} %", f"{100 * row['iou']:.1f} %")
    console.print(table)
    files.save_table(out / "scores.csv", COLUMNS, rows)
    _draw(out / "mosaics.png", images[:4], labels[:4], found[:4])
    console.print(
        f"right {100 * scores.accuracy:.1f} % of pixels, by the majority class {100 * scores.majority:.1f} %; "
        f"mean IoU {100 * sum(scores.iou) / len(scores.iou):.1f} %; wrote {out}"
    )
    return scores


def _draw(path: Path, images: Tensor, labels: Tensor, found: Tensor) -> None:
    """A column for each mosaic: the mosaic, its true classes, and those found."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 * len(images), 7.4), dpi=140, layout="constrained")
    grid = figure.subplots(3, len(images), squeeze=False)
    for (name, cells), row in zip(
        {"mosaic": images[:, 0], "true": labels, "WaveMix": found}.items(), grid, strict=True
    ):
        for axes, picture in zip(row, cells, strict=True):
            colours = {"cmap": "gray"} if name == "mosaic" else {"cmap": "tab10", "vmin": 0, "vmax": 9}
            axes.imshow(picture.numpy(), interpolation="nearest", **colours)
            axes.set_axis_off()
        row[0].set_title(name, fontsize=10, loc="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    files.replace(path, buffer.getvalue())


if __name__ == "__main__":
    raise SystemExit(main())
