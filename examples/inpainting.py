"""Inpainting of photographs: WavePaint against the mean colour and Telea's method, trained on a CPU in minutes.

``python -m examples.inpainting``; docs/use/training.md says what to expect.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavemix_kernels.wavemix.wavepaint import WavePaint

from ._support import cli, files
from ._support.interrupt import Interrupt
from ._support.progress import Progress
from .super_resolution import HELD_OUT, TRAINING, patches, photograph

if TYPE_CHECKING:
    from rich.console import Console

BATCH, PATCH = 16, 64  # patches, and their side
PEAK_LR, WARM_UP = 2e-3, 0.1
#: Strokes of a mask on a patch: how many, how many corners each has, and their widths in pixels.
STROKES, CORNERS, WIDTHS = (1, 4), (2, 5), (2, 8)
LEVEL = 2
CUT = 96  # pixels of the photograph in a picture
CHECKPOINT = "checkpoint.pt"
EXTRAS = {**cli.EXTRAS, "cv2": "opencv-python-headless"}
COLUMNS = ("photograph", "masked", "psnr_mean", "psnr_spread", "psnr_telea", "psnr_wavepaint")


def mask_of(height: int, width: int, strokes: int, generator: np.random.Generator) -> Tensor:
    """Random broken lines of random width, as (1, height, width): 1 where the photograph is missing."""
    rows, columns = np.mgrid[:height, :width]
    found = np.zeros((height, width), bool)
    for _ in range(strokes):
        half = generator.uniform(*WIDTHS) / 2
        begin = generator.uniform((0, 0), (height, width))
        angle = generator.uniform(0, 2 * np.pi)
        for _ in range(generator.integers(CORNERS[0], CORNERS[1] + 1)):
            angle += generator.uniform(-1, 1)
            step = generator.uniform(8, 24) * np.array((np.sin(angle), np.cos(angle)))
            # Distance of every pixel from the segment between two corners.
            share = ((rows - begin[0]) * step[0] + (columns - begin[1]) * step[1]) / (step @ step)
            share = share.clip(0, 1)
            away = np.hypot(rows - begin[0] - share * step[0], columns - begin[1] - share * step[1])
            found |= away <= half
            begin = begin + step
    return torch.from_numpy(found)[None].float()


def masks(count: int, side: int, generator: np.random.Generator) -> Tensor:
    """(count, 1, side, side)."""
    low, high = STROKES
    return torch.stack([mask_of(side, side, int(generator.integers(low, high + 1)), generator) for _ in range(count)])


def mean_filled(image: Tensor, mask: Tensor) -> Tensor:
    """The masked (…, 3, H, W) with the mean colour of what is left, and half grey where nothing is."""
    kept = 1 - mask
    left = kept.sum((-1, -2), keepdim=True)
    mean = (image * kept).sum((-1, -2), keepdim=True) / left.clamp(min=1)
    return image * kept + mask * torch.where(left > 0, mean, torch.full_like(mean, 0.5))


def spread(images: Tensor, masks: Tensor) -> Tensor:
    """(N, 3, H, W) with what surrounds a gap in it: at each scale of a pyramid the mean of what is left there, and from
    the next coarser scale where nothing is."""
    kept = 1 - masks
    scales = [(images * kept, kept)]
    while max(scales[-1][0].shape[2:]) > 1:
        scales.append(tuple(F.avg_pool2d(t, 2, ceil_mode=True) for t in scales[-1]))  # type: ignore[arg-type]  # a pair gives a pair
    found = torch.full_like(scales[-1][0], 0.5)
    for total, weight in reversed(scales):
        coarse = F.interpolate(found, size=total.shape[2:], mode="bilinear", align_corners=False)
        found = torch.where(weight > 0, total / weight.clamp(min=1e-6), coarse)
    return found


def telea(image: Tensor, mask: Tensor) -> Tensor:
    """(3, H, W) and (1, H, W) -> (3, H, W): OpenCV's inpainting by Telea's method, with a radius of 3 pixels."""
    import cv2

    stored = (image * 255).round().byte().permute(1, 2, 0).numpy()
    found = cv2.inpaint(np.ascontiguousarray(stored), mask[0].byte().numpy(), 3, cv2.INPAINT_TELEA)
    return torch.from_numpy(found).permute(2, 0, 1).float() / 255


class Painter(nn.Module):
    """WavePaint's addition to :func:`spread`: (N, 3, H, W) in [0, 1] and masks -> (N, 3, H, W).

    The model itself paints on black; here it paints on what surrounds a gap. Its last convolutions begin at zero, so
    training begins there.
    """

    def __init__(self, width: int, depth: int, modules: int) -> None:
        super().__init__()
        self.paint = WavePaint(
            num_modules=modules, blocks_per_module=depth, ff_channel=width, final_dim=width, level=LEVEL
        )
        for module in self.paint.wavemodules:
            last = module.get_submodule("decoder2.0")
            assert isinstance(last, nn.Conv2d)
            assert last.bias is not None
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        return self.paint(spread(images, masks) - 0.5, masks) + 0.5


def psnr(image: Tensor, truth: Tensor, mask: Tensor) -> float:
    """In dB, of the masked pixels alone, as 8-bit images."""
    error = (image.clamp(0, 1).mul(255).round() - truth.mul(255).round()) * mask
    return float(10 * torch.log10(255**2 * 3 * mask.sum() / error.double().square().sum()))


@torch.inference_mode()
def painted(model: nn.Module, image: Tensor, mask: Tensor) -> Tensor:
    """(3, H, W) and (1, H, W) -> (3, H, W), on the CPU; sides are filled up to what the blocks take, and cut again."""
    model.eval()
    device = next(model.parameters()).device
    height, width = image.shape[1:]
    unit = 2 << LEVEL
    border = (0, -width % unit, 0, -height % unit)
    inputs = (F.pad(t[None], border, mode="replicate").to(device) for t in (image * (1 - mask), mask))
    return model(*inputs)[0, :, :height, :width].cpu()


def main(argv: Sequence[str] | None = None) -> int:
    """Train, compare and draw.

    Args:
        argv: arguments, ``sys.argv[1:]`` if None.

    Returns:
        0; 1 where Telea's method was not beaten; 2 for arguments that cannot be served; 130 after Ctrl-C.
    """
    parser = cli.Parser(prog="inpainting", description=cli.first_line(__doc__))
    parser.set_defaults(command=_run)
    parser.add_argument("--steps", type=cli.positive, default=4000, metavar="N", help="default: %(default)s")
    parser.add_argument("--width", type=cli.positive, default=32, metavar="C", help="channels; default: %(default)s")
    parser.add_argument("--depth", type=cli.positive, default=4, metavar="N", help="Waveblocks; default: %(default)s")
    parser.add_argument("--modules", type=cli.positive, default=1, metavar="N", help="default: %(default)s")
    cli.add_machine_options(parser, "inpainting-results")
    return cli.run(parser, argv, EXTRAS)


def _run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if arguments.width % 4:
        raise cli.Refused(f"--width {arguments.width}: expected a multiple of 4")
    cli.make_folder(arguments.out)
    with cli.machine(arguments) as device:
        torch.manual_seed(arguments.seed)
        built = {"width": arguments.width, "depth": arguments.depth, "modules": arguments.modules}
        model = Painter(**built).to(memory_format=torch.channels_last).to(device)
        known = [photograph(name) for name in TRAINING]
        seconds, steps = train(model, known, arguments.steps, arguments.seed, console)
        files.save_checkpoint(arguments.out / CHECKPOINT, built | {"steps": steps, "model": model.state_dict()})
        console.print(f"{steps} steps in {seconds:.0f} s")
        gain = compare(model, arguments.out, console)
    if steps < arguments.steps:
        console.print(f"interrupted after {steps} of {arguments.steps} steps: the numbers are those of what was learnt")
        return 130
    return int(gain <= 0)


def train(
    model: nn.Module, photographs: Sequence[Tensor], steps: int, seed: int, console: Console
) -> tuple[float, int]:
    """Minimises the mean squared error of the masked pixels of random patches; seconds and steps taken, fewer after
    Ctrl-C."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps, pct_start=WARM_UP)
    generator, of_masks = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    begin, done = time.perf_counter(), 0
    model.train()
    with Interrupt() as interrupt, Progress(console, steps) as bar:
        while done < steps and not interrupt.asked:
            truth = patches(photographs, BATCH, PATCH, generator).to(device)
            missing = masks(BATCH, PATCH, of_masks).to(device)
            found = model(truth * (1 - missing), missing)
            error = ((found - truth).square() * missing).sum() / (3 * missing.sum())
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            scheduler.step()
            done += 1
            bar.advance("training", f"{-10 * error.log10().item():.1f} dB")
    return time.perf_counter() - begin, done


def compare(model: nn.Module, out: Path, console: Console) -> float:
    """Prints, logs and draws what each method paints on the held-out photographs; the mean gain over Telea's in dB."""
    from rich.table import Table

    rows, gains = [], []
    table = Table(title="held-out photographs: PSNR of what was missing, dB", title_justify="left", box=None)
    for heading in ("photograph", "missing", "mean colour", "surroundings", "Telea", "WavePaint"):
        table.add_column(heading, justify="left" if heading == "photograph" else "right")
    for number, name in enumerate(HELD_OUT):
        truth = photograph(name)
        _, height, width = truth.shape
        strokes = 2 * height * width // PATCH**2
        mask = mask_of(height, width, strokes, np.random.default_rng(number))
        given = truth * (1 - mask)
        methods: dict[str, Callable[[], Tensor]] = {
            "mean": lambda given=given, mask=mask: mean_filled(given, mask),
            "spread": lambda given=given, mask=mask: spread(given[None], mask[None])[0],
            "telea": lambda given=given, mask=mask: telea(given, mask),
            "wavepaint": lambda given=given, mask=mask: painted(model, given, mask),
        }
        images = {method: paint() for method, paint in methods.items()}
        scores = {method: psnr(image, truth, mask) for method, image in images.items()}
        gains.append(scores["wavepaint"] - scores["telea"])
        share = float(mask.mean())
        rows.append(dict(zip(COLUMNS, (name, share, *scores.values()), strict=True)))
        table.add_row(name, f"{100 * share:.0f} %", *(f"{found:.2f}" for found in scores.values()))
        _draw(out / f"{name}.png", {"given": given, **images, "true": truth}, mask, scores)
    console.print(table)
    files.save_table(out / "scores.csv", COLUMNS, rows)
    console.print(f"mean gain over Telea {sum(gains) / len(gains):+.2f} dB; wrote {out}")
    return sum(gains) / len(gains)


def _draw(path: Path, images: dict[str, Tensor], mask: Tensor, scores: dict[str, float]) -> None:
    """The square that misses most, from each image."""
    from matplotlib.figure import Figure

    sums = F.avg_pool2d(mask[None], CUT, stride=8)[0, 0]
    top, left = (8 * int(i) for i in divmod(int(sums.argmax()), sums.shape[1]))
    figure = Figure(figsize=(12, 2.4), dpi=140, layout="constrained")
    names = {"mean": "mean colour", "spread": "surroundings", "telea": "Telea", "wavepaint": "WavePaint"}
    for axes, (name, image) in zip(figure.subplots(1, len(images)), images.items(), strict=True):
        cut = image[:, top : top + CUT, left : left + CUT]
        axes.imshow(cut.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
        note = f" {scores[name]:.2f} dB" if name in scores else ""
        axes.set_title(names.get(name, name) + note, fontsize=10, loc="left")
        axes.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    files.replace(path, buffer.getvalue())


if __name__ == "__main__":
    raise SystemExit(main())
