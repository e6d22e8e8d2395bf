"""Writes a model as an ONNX or torch.export file that runs without this package, and checks the file on photographs.

python -m examples.export --model wavemix_192_16 --weights weights.safetensors --out model.onnx --size 224
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import wavemix_kernels
from benchmarks.harness import photographs
from examples._support import cli
from wavemix_kernels import wavemlp
from wavemix_kernels.wavemix import SemSegment, classification, sisr

#: module -> package, of the extra "export".
EXTRAS = {"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime", "skimage": "scikit-image"}
#: Permitted error as a part of the largest output; fp16 keeps 11 bits through some 50 layers.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
PHOTOGRAPHS = 5


@dataclass(frozen=True)
class Model:
    """A model that the program knows.

    Attributes:
        build, arguments: the function that makes it, and its arguments.
        classes: the name of the argument for the number of classes, if there are classes.
        size: usual H and W.
        unit: H and W are multiples of it.
        least: smallest H and W of an exported graph with dynamic sizes. Below, the coarsest map has one pixel, a case
            that graphs treat apart.
    """

    build: Callable[..., nn.Module]
    arguments: dict[str, Any]
    classes: str | None
    unit: int
    least: int
    size: int

    def make(self, classes: int | None) -> nn.Module:
        if classes is not None and self.classes is None:
            raise cli.Refused(f"--classes {classes}: this model gives an image, no classes")
        chosen = {} if classes is None or self.classes is None else {self.classes: classes}
        return self.build(**self.arguments, **chosen)


def _wave_mlp(build: Callable[..., nn.Module]) -> Model:
    return Model(build, {}, "num_classes", 1, 64, 224)


MODELS = {
    "wavemix_192_16": Model(
        classification.WaveMix,
        {"depth": 16, "final_dim": 192, "ff_channel": 192, "level": 3},
        "num_classes", 32, 64, 224,
    ),
    "wavemix_lite_32_7": Model(classification.WaveMixLite, {}, "num_classes", 2, 4, 32),
    "wavemix_lite_64_6": Model(
        classification.WaveMixLite, {"depth": 6, "final_dim": 64, "upsample": "deconv"}, "num_classes", 2, 4, 32
    ),
    "wavemix_segmentation_256_16": Model(SemSegment.WaveMix, {}, "num_classes", 64, 128, 256),
    "wavemix_sisr_144_4": Model(sisr.WaveMix, {}, None, 2, 4, 128),
    "wavemlp_t_dw": _wave_mlp(wavemlp.WaveMLP_T_dw),
    "wavemlp_t": _wave_mlp(wavemlp.WaveMLP_T),
    "wavemlp_s": _wave_mlp(wavemlp.WaveMLP_S),
    "wavemlp_m": _wave_mlp(wavemlp.WaveMLP_M),
    "wavemlp_b": _wave_mlp(wavemlp.WaveMLP_B),
}  # fmt: skip


def dynamic_shapes(dynamic: str, unit: int, least: int) -> tuple[dict[int, Any]] | None:
    """Dynamic shapes of the one argument, the image, as ``torch.export`` and ``torch.onnx.export`` take them.

    Args:
        dynamic: "none", "batch", or "all" for H and W too, as multiples of ``unit`` from ``least`` on.
    """
    if dynamic == "none":
        return None
    shapes: dict[int, Any] = {0: torch.export.Dim("batch")}
    if dynamic == "all":
        for axis, name in ((2, "height"), (3, "width")):
            steps = torch.export.Dim(name if unit == 1 else f"{name}_units", min=-(-least // unit))
            shapes[axis] = steps if unit == 1 else unit * steps
    return (shapes,)


def write(form: nn.Module, image: Tensor, path: Path, shapes: tuple[dict[int, Any]] | None) -> None:
    """The form of :func:`wavemix_kernels.export_form` as ``path``: ONNX, or by the suffix ``.pt2`` torch.export's."""
    if path.suffix == ".pt2":
        torch.export.save(torch.export.export(form, (image,), dynamic_shapes=shapes), path)
        return
    torch.onnx.export(
        form, (image,), path, dynamo=True, dynamic_shapes=shapes, input_names=["image"], output_names=["output"],
        external_data=False, verbose=False,
    )  # fmt: skip


def read(path: Path) -> tuple[Callable[[Tensor], Tensor], str]:
    """A function that runs the file, and a line about it."""
    if path.suffix == ".pt2":
        program = torch.export.load(path)
        return program.module(), f"torch.export, {len(program.graph.nodes)} nodes"
    import onnx
    import onnxruntime

    stored = onnx.load(path, load_external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (argument,) = session.get_inputs()
    opset = next(entry.version for entry in stored.opset_import if entry.domain in ("", "ai.onnx"))

    def run(image: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {argument.name: image.numpy()})[0])

    return run, f"ONNX, opset {opset}, {len(stored.graph.node)} nodes, {argument.name} {argument.shape}"


def largest_error(
    run: Callable[[Tensor], Tensor], dtype: torch.dtype, model: nn.Module, images: Sequence[Tensor]
) -> float:
    """Error of the file, which takes images in ``dtype``, against the float32 model: a part of its largest output."""
    worst = 0.0
    with torch.no_grad():
        for image in images:
            true, got = model(image), run(image.to(dtype)).float()
            worst = max(worst, float((got - true).abs().max() / true.abs().max()))
    return worst


def export(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    if out.suffix not in (".onnx", ".pt2"):
        raise cli.Refused(f"--out {out}: expected a name that ends in .onnx or .pt2 (torch.export)")
    entry = MODELS[arguments.model]
    size = arguments.size or entry.size
    smallest = entry.least if arguments.dynamic == "all" else entry.unit
    if size % entry.unit or size < smallest:
        raise cli.Refused(f"--size {size}: {arguments.model} needs a multiple of {entry.unit} from {smallest} on")
    dtype = DTYPES[arguments.precision]
    torch.manual_seed(0)
    model = entry.make(arguments.classes).eval()
    if arguments.weights is not None:
        load(model, arguments.weights)
    # Two images: a batch of one is a size that graphs treat apart.
    images = photographs.crops(PHOTOGRAPHS, size, size)
    form = wavemix_kernels.export_form(model).to(dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    write(form, images[:2].to(dtype), out, dynamic_shapes(arguments.dynamic, entry.unit, entry.least))
    run, what = read(out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {what}")
    batches = list(images.split(2)) if arguments.dynamic != "none" else [images[:2], images[2:4]]
    error = largest_error(run, dtype, model, batches)
    bound = TOLERANCE[dtype]
    print(f"largest error on {PHOTOGRAPHS} photographs: {error:.1e} of the output's range, {bound:g} allowed")
    return 0 if error <= bound else 1


def load(model: nn.Module, path: Path) -> None:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except (OSError, RuntimeError) as error:
        raise cli.Refused(f"--weights {path}: {error}") from error


def parser() -> argparse.ArgumentParser:
    made = cli.Parser("python -m examples.export", description=cli.first_line(__doc__))
    made.add_argument("--model", choices=MODELS, required=True, metavar="NAME", help=", ".join(MODELS))
    made.add_argument("--out", type=Path, required=True, metavar="FILE", help="ends in .onnx or .pt2")
    made.add_argument("--weights", type=Path, metavar="FILE", help="a state dict, .safetensors or torch.save's")
    made.add_argument("--classes", type=cli.positive, metavar="N", help="default: the model's own")
    made.add_argument("--size", type=cli.positive, metavar="N", help="height and width; default: the model's usual")
    made.add_argument("--dynamic", choices=("none", "batch", "all"), default="batch", help="default: %(default)s")
    made.add_argument("--precision", choices=DTYPES, default="fp32", help="default: %(default)s")
    made.set_defaults(command=export)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), argv, EXTRAS)


if __name__ == "__main__":
    sys.exit(main())
