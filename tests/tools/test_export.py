"""export_form: any model in standard operators, through torch.export, ONNX, AOTInductor and TorchScript."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wavemix_kernels as wk
from benchmarks.harness import photographs
from examples import export as program
from tests.models.test_accelerate import RoundTrip
from tests.tools.helpers import needs
from wavemix_kernels import wavemlp
from wavemix_kernels.pytorch_wavelets import DWTForward, DWTInverse
from wavemix_kernels.wavemix import SemSegment, classification, sisr

#: Relative to the largest output. The graphs round in other places; fp32 leaves 1e-6 here.
TOLERANCE = 1e-4

needs_onnx = needs("export", program.EXTRAS)
prove = pytest.mark.prove


def wave_net(**arguments: Any) -> wavemlp.WaveNet:
    return wavemlp.WaveNet((1, 1), embed_dims=(8, 16), mlp_ratios=(2, 2), num_classes=5, **arguments)


NARROW: dict[str, Any] = {"final_dim": 16, "ff_channel": 16}
#: name -> (build, smallest size with a pixel to spare on the coarsest map, unit of the sizes)
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "classification": (lambda: classification.WaveMix(num_classes=5, depth=1, level=2, **NARROW), 32, 16),
    "lite": (lambda: classification.WaveMixLite(final_dim=16, depth=2), 16, 2),
    "pixelshuffle": (lambda: classification.WaveMixLite(final_dim=16, depth=1, upsample="pixelshuffle"), 16, 2),
    "segmentation": (lambda: SemSegment.WaveMix(num_classes=5, depth=1, level=2, **NARROW), 32, 16),
    "sisr": (lambda: sisr.WaveMix(depth=2, **NARROW), 16, 2),
    "wavemlp-dw": (lambda: wave_net(mode="depthwise"), 64, 1),
    "wavemlp-groupnorm": (lambda: wave_net(norm_layer=wavemlp.MyNorm), 64, 1),
    "wavemlp-features": (lambda: wave_net(fork_feat=True), 64, 1),
    "wavelets": (lambda: RoundTrip(DWTForward(J=2, wave="haar", mode="symmetric"), DWTInverse(wave="haar")), 16, 4),
}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name][0]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # untrained ones have nothing to fold
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def as_list(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


@torch.no_grad()
def assert_same(run: Callable[[Tensor], Any], model: nn.Module, x: Tensor) -> None:
    for got, true in zip(as_list(run(x)), as_list(model(x)), strict=True):
        assert got.shape == true.shape
        assert (got - true).abs().max() <= TOLERANCE * true.abs().max()


def targets(graph: torch.nn.Module) -> set[str]:
    """The operators that a graph and the graphs within it call."""
    parts = (part for part in graph.modules() if isinstance(part, torch.fx.GraphModule))
    return {str(node.target) for part in parts for node in part.graph.nodes if node.op == "call_function"}


def few(names: Iterable[str], *first: str) -> list[Any]:
    """All of the models for `make prove`, the first ones for `make test`."""
    return [name if name in first else pytest.param(name, marks=prove) for name in names]


@pytest.mark.parametrize("name", few(MODELS, "classification", "wavemlp-dw", "wavelets"))
def test_exported_graphs_are_standard_and_dynamic(name: str) -> None:
    model, size, unit = built(name), *MODELS[name][1:]
    x = torch.rand(2, 3, size, size)
    form = wk.export_form(model)
    shapes = program.dynamic_shapes("all", unit, size)
    exported = torch.export.export(form, (x,), dynamic_shapes=shapes)
    # No operator of ours, and no graph within a graph (autocast, no_grad), which ONNX has no word for.
    called = targets(exported.graph_module)
    assert called
    assert not [t for t in called if "wavemix_kernels" in t or "wrap" in t]
    run = exported.module()
    for shape in ((2, 3, size, size), (1, 3, size, size), (3, 3, 2 * size, size + unit)):
        assert_same(run, model, torch.rand(shape))
    with wk.backend("cpu"):  # the form itself stays on standard operators
        assert_same(form, model, x)


@needs_onnx
@pytest.mark.parametrize("name", few(["classification", "segmentation", "sisr", "wavemlp-dw"]))
def test_onnx(name: str, tmp_path: Path) -> None:
    model, size, unit = built(name), *MODELS[name][1:]
    x = photographs.crops(5, size, size)
    path = tmp_path / "model.onnx"
    program.write(wk.export_form(model), x[:2], path, program.dynamic_shapes("all", unit, size))
    run, what = program.read(path)
    assert "image ['batch', 3, " in what
    assert_same(run, model, x)
    assert_same(run, model, photographs.crops(1, 2 * size, size + unit))


@prove
@needs_onnx
@pytest.mark.parametrize("build", [
    lambda: classification.WaveMix(depth=1, final_dim=192, ff_channel=192, level=3),
    lambda: wavemlp.WaveNet((1,) * 4, embed_dims=(64, 128, 320, 512), mlp_ratios=(4,) * 4, mode="depthwise"),
], ids=["wavemix", "wavemlp"])  # fmt: skip
def test_onnx_at_full_width(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """The published widths and image size on photographs; fewer blocks, since all are alike."""
    torch.manual_seed(0)
    model, path, images = build().eval(), tmp_path / "model.onnx", photographs.crops(5, 224, 224)
    program.write(wk.export_form(model), images[:2], path, program.dynamic_shapes("batch", 1, 1))
    assert_same(program.read(path)[0], model, images)


@pytest.mark.parametrize("name", ["classification", "wavemlp-dw"])
def test_kernels_in_an_exported_graph(name: str, tmp_path: Path) -> None:
    """Without export_form the graph holds the operators; it is loaded where this package is installed."""
    model, size = built(name), MODELS[name][1]
    form, x = wk.fuse_for_inference(built(name)), torch.rand(2, 3, size, size)
    exported = torch.export.export(form, (x,), dynamic_shapes=program.dynamic_shapes("batch", 1, 1))
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    assert any("wavemix_kernels" in t for t in targets(loaded.graph_module))
    for batch in (1, 5):
        assert_same(loaded.module(), model, torch.rand(batch, 3, size, size))


@prove
@pytest.mark.parametrize("standard", [True, False], ids=["standard", "kernels"])
def test_aot_inductor(standard: bool, tmp_path: Path) -> None:
    """One narrow block: Inductor compiles a C++ file per model, which is what takes the time."""
    torch.manual_seed(0)
    block = wk.FusedWaveblock(final_dim=8, ff_channel=8, upsample="bilinear").eval()
    form = wk.export_form(block) if standard else wk.fuse_for_inference(block)
    x = torch.rand(2, 8, 8, 8)
    exported = torch.export.export(form, (x,), dynamic_shapes=program.dynamic_shapes("batch", 1, 1))
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "block.pt2"))
    run = torch._inductor.aoti_load_package(package)
    for batch in (1, 3):
        assert_same(run, block, torch.rand(batch, 8, 8, 8))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["classification", "wavemlp-dw", "wavelets"])
def test_traced_torchscript(name: str, tmp_path: Path) -> None:
    model, size = built(name), MODELS[name][1]
    traced = torch.jit.trace(wk.export_form(model), (torch.rand(2, 3, size, size),))
    torch.jit.save(traced, tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    kinds = {node.kind() for node in loaded.inlined_graph.nodes()}
    assert not [kind for kind in kinds if kind.startswith(("wavemix_kernels::", "mkldnn::"))]
    assert_same(loaded, model, torch.rand(3, 3, size, size))


def test_half_precision_forms() -> None:
    model = built("classification")
    x = torch.rand(2, 3, 32, 32)
    form = wk.export_form(model).to(torch.bfloat16)
    exported = torch.export.export(form, (x.bfloat16(),))
    with torch.no_grad():
        got, true = exported.module()(x.bfloat16()), model(x)
    assert got.dtype == torch.bfloat16
    # Eight bits through some ten layers with independent roundings.
    assert (got - true).abs().max() <= 2.0**-8 * 10 * true.abs().max()


def test_the_form_is_a_copy() -> None:
    model = MODELS["classification"][0]().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    form = wk.export_form(model)
    assert type(model) is classification.WaveMix
    assert isinstance(form, classification.WaveMix)
    assert (model.training, form.training) == (True, False)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in form.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "conv.0.weight" in form.state_dict()


@pytest.mark.parametrize("name", ["classification", "wavemlp-dw"])
def test_a_fused_model_and_a_block_have_a_form_too(name: str) -> None:
    model, size = built(name), MODELS[name][1]
    form = wk.export_form(wk.fuse_for_inference(built(name)))
    x = torch.rand(2, 3, size, size)
    assert_same(form, model, x)
    assert not [t for t in targets(torch.export.export(form, (x,)).graph_module) if "wavemix_kernels" in t]
    block = wk.FusedWaveblock(final_dim=8, ff_channel=8, level=2).eval()
    assert_same(wk.export_form(block), block, torch.rand(1, 8, 8, 8))


# --- The program -----------------------------------------------------------------------------------------


@needs_onnx
@pytest.mark.parametrize("suffix, classes, extra", [(".onnx", 10, "--dynamic none"), (".pt2", 3, "--classes 3")])
def test_program(suffix: str, classes: int, extra: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, out = tmp_path / "weights.pt", tmp_path / "there" / f"lite{suffix}"
    torch.save(classification.WaveMixLite(num_classes=classes).state_dict(), weights)
    assert program.main(f"--model wavemix_lite_32_7 --weights {weights} --out {out} {extra}".split()) == 0
    assert out.is_file()
    printed = capsys.readouterr().out
    assert str(out) in printed
    assert "largest error on 5 photographs" in printed


@needs_onnx
@pytest.mark.parametrize("arguments, named", [
    ("lite_32_7 --out m.bin", "--out m.bin: expected a name that ends in .onnx or .pt2"),
    ("192_16 --out m.onnx --size 100", "--size 100: wavemix_192_16 needs a multiple of 32"),
    ("192_16 --out m.onnx --size 32 --dynamic all", "a multiple of 32 from 64 on"),
    ("sisr_144_4 --out m.onnx --classes 3", "--classes 3: this model gives an image"),
    ("lite_32_7 --out m.onnx --weights none.pt", "--weights none.pt: "),
    ("resnet --out m.onnx", "argument --model: invalid choice"),
])  # fmt: skip
def test_program_refuses(arguments: str, named: str, refused) -> None:
    assert named in refused(program.main, f"--model wavemix_{arguments}".split())
