"""Super-resolution of photographs: WaveMix against bicubic interpolation, trained on a CPU in minutes.

``python -m examples.super_resolution``; docs/use/training.md says what to expect.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavemix_kernels.wavemix.sisr import WaveMix
from wavemix_kernels.wavemix.sr import WaveMixSR_V2

from ._support import cli, files
from ._support.interrupt import Interrupt
from ._support.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

# Photographs inside scikit-image's wheel: nothing is downloaded.
TRAINING = ("astronaut", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")
HELD_OUT = ("chelsea", "stereo_motorcycle")
STEPS = {"wavemix": 6000, "sr-v2": 1500}  # ten minutes at most on two cores

BATCH, PATCH = 16, 64  # patches, and their side
PEAK_LR, WARM_UP = 2e-3, 0.1
CUT = 96  # pixels of the true photograph in a picture
CHECKPOINT = "checkpoint.pt"
COLUMNS = ("photograph", "psnr_bicubic", "psnr_wavemix", "ssim_bicubic", "ssim_wavemix")


def photograph(name: str, scale: int = 2) -> Tensor:
    """``skimage.data``.``name`` as (3, H, W) float32 in [0, 1], cropped to a size that shrinking and the DWT take."""
    import skimage.data

    image = getattr(skimage.data, name)()
    image = image[0] if isinstance(image, tuple) else image  # a stereo pair: the left one
    unit = scale * 2
    height, width = (side // unit * unit for side in image.shape[:2])
    return torch.from_numpy(np.ascontiguousarray(image[:height, :width])).permute(2, 0, 1).float() / 255


def shrink(images: Tensor, scale: int = 2) -> Tensor:
    """(N, 3, scale H, scale W) -> (N, 3, H, W): antialiased bicubic, rounded to 8 bits as a stored small image is."""
    small = F.interpolate(images, scale_factor=1 / scale, mode="bicubic", antialias=True, align_corners=False)
    return small.clamp(0, 1).mul(255).round().div(255)


def bicubic(images: Tensor, scale: int = 2) -> Tensor:
    """(N, C, H, W) -> (N, C, scale H, scale W)."""
    return F.interpolate(images, scale_factor=scale, mode="bicubic", align_corners=False)


class OverBicubic(nn.Module):
    """WaveMix's addition to bicubic interpolation: (N, 3, H, W) in [0, 1] -> (N, 3, 2H, 2W).

    The model itself gives the whole image; the skip is this example's. Its last convolution begins at zero, so training
    begins at bicubic instead of spending minutes on getting there.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.detail = WaveMix(depth=depth, final_dim=width, ff_channel=width)
        _begin_at_zero(self.detail.expand[-1])

    def forward(self, images: Tensor) -> Tensor:
        return bicubic(images) + self.detail(images - 0.5)


#: Weights of red, green and blue in Y, Cb and Cr (ITU-R BT.601, full range, without offsets).
YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


class LumaOverBicubic(nn.Module):
    """WaveMixSR-V2's additions to bicubic interpolation of the luminance, doubling by doubling: (N, 3, H, W) in [0, 1]
    -> (N, 3, scale H, scale W). Its blocks end in PixelShuffle; colours are interpolated, as in the original."""

    matrix: Tensor
    inverse: Tensor

    def __init__(self, width: int, depth: int, scale: int) -> None:
        super().__init__()
        self.detail = WaveMixSR_V2(sr=scale, blocks=depth, final_dim=width, dropout=0.0, upsample="pixelshuffle")
        for stage in self.detail.SR_blocks:
            _begin_at_zero(stage.get_submodule("final.1"))
        matrix = torch.tensor(YCBCR, dtype=torch.float64)
        self.register_buffer("matrix", matrix.float(), persistent=False)
        self.register_buffer("inverse", matrix.inverse().float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        y = torch.einsum("cr,nrhw->nchw", self.matrix, images)
        for stage in self.detail.SR_blocks:
            luma = stage(y - 0.5)[:, :1]
            y = bicubic(y)
            y = torch.cat((y[:, :1] + luma, y[:, 1:]), 1)
        return torch.einsum("rc,nchw->nrhw", self.inverse, y)


def _begin_at_zero(last: nn.Module) -> None:
    assert isinstance(last, nn.Conv2d)
    assert last.bias is not None
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)


def build(name: str, width: int, depth: int, scale: int) -> nn.Module:
    """The model that ``--model`` names."""
    return LumaOverBicubic(width, depth, scale) if name == "sr-v2" else OverBicubic(width, depth)


def patches(photographs: Sequence[Tensor], count: int, side: int, generator: torch.Generator) -> Tensor:
    """Random patches (count, 3, side, side) in random of the eight orientations of a square."""

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    drawn = []
    for _ in range(count):
        image = photographs[draw(len(photographs))]
        top, left = draw(image.shape[1] - side + 1), draw(image.shape[2] - side + 1)
        patch = image[:, top : top + side, left : left + side].rot90(draw(4), (1, 2))
        drawn.append(patch.flip(2) if draw(2) else patch)
    return torch.stack(drawn)


@dataclass(frozen=True)
class Score:
    """Scores of one enlarged photograph against the true one.

    Attributes:
        psnr: PSNR of the luma Y in dB, without borders of as many pixels as the scale, as papers do.
        ssim: SSIM of the same pixels.
    """

    psnr: float
    ssim: float


def score(image: Tensor, truth: Tensor, scale: int = 2) -> Score:
    """Both (3, H, W) in [0, 1]; compared as 8-bit images would be."""
    from skimage.color import rgb2ycbcr
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    def luma(x: Tensor) -> np.ndarray:
        stored = x.clamp(0, 1).mul(255).round().div(255).double()
        return rgb2ycbcr(stored.permute(1, 2, 0).numpy())[scale:-scale, scale:-scale, 0]

    mine, true = luma(image), luma(truth)
    return Score(
        float(peak_signal_noise_ratio(true, mine, data_range=255)),
        # Gaussian windows and biased covariances are Wang et al.'s SSIM, which papers report.
        float(
            structural_similarity(
                true, mine, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
        ),
    )


@torch.inference_mode()
def enlarge(model: nn.Module, small: Tensor) -> Tensor:
    """(3, H, W) -> (3, scale H, scale W), on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    return model(small[None].to(device))[0].cpu()


def main(argv: Sequence[str] | None = None) -> int:
    """Train, compare and draw.

    Args:
        argv: arguments, ``sys.argv[1:]`` if None.

    Returns:
        0; 1 where bicubic was not beaten; 2 for arguments that cannot be served; 130 after Ctrl-C.
    """
    parser = cli.Parser(prog="super_resolution", description=cli.first_line(__doc__))
    parser.set_defaults(command=_run)
    parser.add_argument("--model", choices=tuple(STEPS), default="wavemix", help="default: %(default)s")
    parser.add_argument("--scale", type=int, choices=(2, 4), default=2, help="4: sr-v2 only; default: %(default)s")
    steps = ", ".join(f"{number} ({name})" for name, number in STEPS.items())
    parser.add_argument("--steps", type=cli.positive, metavar="N", help=f"default: {steps}")
    parser.add_argument("--width", type=cli.positive, default=32, metavar="C", help="channels; default: %(default)s")
    parser.add_argument("--depth", type=cli.positive, default=4, metavar="N", help="Waveblocks; default: %(default)s")
    cli.add_machine_options(parser, "super-resolution-results")
    return cli.run(parser, argv)


def _run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if arguments.width % 4:
        raise cli.Refused(f"--width {arguments.width}: expected a multiple of 4")
    if arguments.scale == 4 and arguments.model == "wavemix":
        raise cli.Refused("--scale 4: --model wavemix doubles; --model sr-v2 has both scales")
    arguments.steps = arguments.steps or STEPS[arguments.model]
    cli.make_folder(arguments.out)
    with cli.machine(arguments) as device:
        torch.manual_seed(arguments.seed)
        built = {"name": arguments.model, "width": arguments.width, "depth": arguments.depth, "scale": arguments.scale}
        model = build(**built).to(memory_format=torch.channels_last).to(device)
        known = [photograph(name, arguments.scale) for name in TRAINING]
        seconds, steps = train(model, known, arguments.scale, arguments.steps, arguments.seed, console)
        state = built | {"steps": steps, "model": model.state_dict()}
        files.save_checkpoint(arguments.out / CHECKPOINT, state)
        console.print(f"{steps} steps in {seconds:.0f} s")
        gain = compare(model, arguments.scale, arguments.out, console)
    if steps < arguments.steps:
        console.print(f"interrupted after {steps} of {arguments.steps} steps: the numbers are those of what was learnt")
        return 130
    return int(gain <= 0)


def train(
    model: nn.Module, photographs: Sequence[Tensor], scale: int, steps: int, seed: int, console: Console
) -> tuple[float, int]:
    """Minimises the mean squared error, PSNR's own, on random patches; seconds and steps taken, fewer after Ctrl-C."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps, pct_start=WARM_UP)
    generator = torch.Generator().manual_seed(seed)
    begin, done = time.perf_counter(), 0
    model.train()
    with Interrupt() as interrupt, Progress(console, steps) as bar:
        while done < steps and not interrupt.asked:
            truth = patches(photographs, BATCH, PATCH, generator)
            error = F.mse_loss(model(shrink(truth, scale).to(device)), truth.to(device))
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            scheduler.step()
            done += 1
            bar.advance("training", f"{-10 * error.log10().item():.1f} dB")
    return time.perf_counter() - begin, done


def compare(model: nn.Module, scale: int, out: Path, console: Console) -> float:
    """Prints, logs and draws WaveMix beside bicubic on the held-out photographs; the mean gain in dB."""
    from rich.table import Table

    rows, gains = [], []
    table = Table(title="held-out photographs: PSNR (dB), SSIM", title_justify="left", box=None)
    for heading in ("photograph", "bicubic", "WaveMix", "gain"):
        table.add_column(heading, justify="left" if heading == "photograph" else "right")
    for name in HELD_OUT:
        truth = photograph(name, scale)
        small = shrink(truth[None], scale)[0]
        plain, ours = bicubic(small[None], scale)[0], enlarge(model, small)
        before, after = score(plain, truth, scale), score(ours, truth, scale)
        gains.append(after.psnr - before.psnr)
        rows.append(dict(zip(COLUMNS, (name, before.psnr, after.psnr, before.ssim, after.ssim), strict=True)))
        cells = (f"{found.psnr:.2f}  {found.ssim:.4f}" for found in (before, after))
        table.add_row(name, *cells, f"{after.psnr - before.psnr:+.2f}  {after.ssim - before.ssim:+.4f}")
        _draw(out / f"{name}.png", {"small": small, "bicubic": plain, "WaveMix": ours, "true": truth}, before, after)
    console.print(table)
    files.save_table(out / "scores.csv", COLUMNS, rows)
    console.print(f"mean gain over bicubic {sum(gains) / len(gains):+.2f} dB; wrote {out}")
    return sum(gains) / len(gains)


def _draw(path: Path, images: dict[str, Tensor], before: Score, after: Score) -> None:
    """The square in which bicubic errs most, from each image."""
    from matplotlib.figure import Figure

    error = (images["bicubic"] - images["true"]).abs().mean(0, keepdim=True)
    sums = F.avg_pool2d(error[None], CUT, stride=4)[0, 0]
    top, left = (4 * int(i) for i in divmod(int(sums.argmax()), sums.shape[1]))
    figure = Figure(figsize=(12, 3.4), dpi=140, layout="constrained")
    notes = {"bicubic": f"{before.psnr:.2f} dB", "WaveMix": f"{after.psnr:.2f} dB"}
    for axes, (name, image) in zip(figure.subplots(1, len(images)), images.items(), strict=True):
        unit = images["true"].shape[1] // image.shape[1]
        rows, columns = (slice(start // unit, (start + CUT) // unit) for start in (top, left))
        axes.imshow(image[:, rows, columns].clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(" ".join(filter(None, (name, notes.get(name)))), fontsize=10, loc="left")
        axes.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    files.replace(path, buffer.getvalue())


if __name__ == "__main__":
    raise SystemExit(main())
