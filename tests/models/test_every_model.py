"""One statement for every module and model: upstream's values and names, and fused is the reference."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

import wavemix_kernels as wk
from tests import golden_models
from tests.models import subjects
from tests.models.subjects import HEADS, LAYOUTS, MLPS, MODELS, PATM, SUBJECTS, WAVE_BLOCKS, WAVEBLOCKS, Subject
from wavemix_kernels import wavemix, wavemlp
from wavemix_kernels.ops.common import layout
from wavemix_kernels.reference import Waveblock
from wavemix_kernels.wavemix import SemSegment, classification, sisr


def each(of: dict[str, Subject], **more: Subject) -> pytest.MarkDecorator:
    table = of | more
    return pytest.mark.parametrize("subject", table.values(), ids=table.keys())


# --- Upstream --------------------------------------------------------------------------------------------

WAVEMIX: dict[str, Callable[..., nn.Module]] = {
    "wavemix_classification_patch": classification.WaveMix,
    "wavemix_classification_strided": classification.WaveMix,
    "wavemix_segmentation": SemSegment.WaveMix,
    "wavemix_sisr": sisr.WaveMix,
}
WAVEMLP = (
    "patm_fc", "patm_depthwise", "wave_block_fc", "wavemlp_tiny_fc", "wavemlp_tiny_depthwise", "wavemlp_tiny_groupnorm",
)  # fmt: skip
PARAMETERS = {
    "WaveMLP_T_dw": 15_286_472,
    "WaveMLP_T": 17_193_160,
    "WaveMLP_S": 30_708_040,
    "WaveMLP_M": 44_056_632,
    "WaveMLP_B": 63_586_360,
}


def drop_in(*, level: int, **arguments: Any) -> nn.Module:
    return getattr(wavemix, f"Level{level}Waveblock")(**arguments)


@pytest.mark.parametrize(
    "name, build",
    [
        *((f"waveblock_level{i}", of) for i, of in product((1, 2, 3, 4), (Waveblock, wk.FusedWaveblock, drop_in))),
        *((name, partial(m, block=b)) for (name, m), b in product(WAVEMIX.items(), (Waveblock, wk.FusedWaveblock))),
    ],
)
def test_reproduces_upstream(name: str, build: Callable[..., nn.Module]) -> None:
    golden_models.assert_reproduces(name, build)


def of_wavemlp(kind: str, *, dropout: float, norm: str = "bn", **arguments: Any) -> nn.Module:
    """The module that a recording's ``config`` describes. Nothing there drops anything: rates are 0 by default."""
    if kind in ("patm", "wave_block"):
        return {"patm": wavemlp.PATM, "wave_block": wavemlp.WaveBlock}[kind](**arguments)
    norm_layer = {"bn": nn.BatchNorm2d, "gn": wavemlp.MyNorm}[norm]
    return wavemlp.WaveNet(transitions=[True] * 4, norm_layer=norm_layer, **arguments)


@pytest.mark.parametrize("name", WAVEMLP)
@pytest.mark.parametrize("kernels", ["whole", "parts", "reference"])
def test_wave_mlp_reproduces_upstream(name: str, kernels: str, request: pytest.FixtureRequest) -> None:
    if kernels == "parts":
        request.getfixturevalue("parts")
    with wk.backend("reference" if kernels == "reference" else "auto"):
        golden_models.assert_reproduces(name, partial(of_wavemlp, golden_models.config(name)["kind"]))


def recorded(kind: str) -> dict[str, dict[str, list[int]]]:
    return json.loads((golden_models.FOLDER / f"{kind}_state_dicts.json").read_text())


def shapes(module: nn.Module) -> list[tuple[str, list[int]]]:
    """In order: an optimizer's state refers to parameters by their position."""
    return [(key, list(value.shape)) for key, value in module.state_dict().items()]


@pytest.mark.parametrize(
    "name", [*(f"wavemix.{m}.WaveMix" for m in ("classification", "SemSegment", "sisr")), *PARAMETERS]
)
def test_default_state_dict_is_upstreams(name: str) -> None:
    *modules, kind = name.split(".")
    with torch.device("meta"):
        model = getattr(getattr(wavemix, modules[1]) if modules else wavemlp, kind)()
    assert shapes(model) == list(recorded("wavemix" if modules else "wavemlp")[name].items())
    if not modules:
        assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
        assert model.default_cfg["crop_pct"] == (0.875 if name == "WaveMLP_B" else 0.9)


@pytest.mark.parametrize("level, model, width", [(1, "sisr", 144), (3, "classification", 192), (4, "SemSegment", 256)])
def test_state_dict_of_a_block_is_upstreams(level: int, model: str, width: int) -> None:
    prefix, of_model = "layers.0.", recorded("wavemix")[f"wavemix.{model}.WaveMix"]
    state = {key.removeprefix(prefix): shape for key, shape in of_model.items() if key.startswith(prefix)}
    assert shapes(drop_in(level=level, ff_channel=width, final_dim=width)) == list(state.items())


# --- Fused is the reference ------------------------------------------------------------------------------


@each(SUBJECTS)
@pytest.mark.parametrize(
    "training, order", [*((True, order) for order in LAYOUTS), (False, "nchw")], ids=[*LAYOUTS, "evaluation"]
)
def test_fused_is_the_reference(subject: Subject, training: bool, order: str) -> None:
    """Output, every gradient and running statistic; the memory format is the input's."""
    fused, exact = (module.train(training) for module in subject.pair())
    x = subject.x(order)
    subjects.assert_same_step(fused, exact, x, subject.rtol)
    if not training:
        plain, last = (subjects.training_step(exact, subject.x(order)) for order in LAYOUTS[:2])
        subjects.assert_close(last, plain, subject.rtol)
    if subject.keeps_format and order != "sliced" and min(subject.shape[2:]) > 1:
        leaf = x.clone().requires_grad_()
        out = fused(leaf)
        out.sum().backward()
        for value in (out, leaf.grad):
            if value.dim() == 4:
                assert layout.is_channels_last(value) == (order == "channels_last")


@pytest.mark.usefixtures("parts")
@each(PATM | WAVE_BLOCKS)
@pytest.mark.parametrize("training, order", [(True, "channels_last"), (False, "sliced")], ids=["train", "eval"])
def test_fused_is_the_reference_in_kernels_of_parts(subject: Subject, training: bool, order: str) -> None:
    fused, exact = (module.train(training) for module in subject.pair())
    subjects.assert_same_step(fused, exact, subject.x(order))


SMALL_PATM = {
    "fc": subjects.patm(6, (3, 7)),
    "depthwise": subjects.patm(6, (3, 7), "depthwise", True),
    "fc, keeping x": subjects.patm(4, (5, 1), "fc", True, "all"),
    "depthwise, keeping x": subjects.patm(4, (5, 1), "depthwise", False, "all"),
}


@each(SMALL_PATM)
@pytest.mark.parametrize("name, training", [("cuda", True), ("triton", True), ("cuda", False), ("triton", False)])
def test_patm_on_a_gpus_kernels(
    subject: Subject, name: str, training: bool, device: str, request: pytest.FixtureRequest
) -> None:
    """The phases' kernels are the backend's own; the others those that `device` has."""
    if name == "cuda":
        request.getfixturevalue("core")
    else:
        pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    fused, exact = (module.train(training) for module in subject.pair())
    x = subject.x("channels_last")
    got = subjects.training_step(fused.to(device), x.to(device), name)
    subjects.assert_close(got, subjects.training_step(exact, x.contiguous(), "reference"))


@each(SUBJECTS)
def test_fused_runs_its_operators(subject: Subject) -> None:
    fused, exact = (module.eval() for module in subject.pair())
    ours = set(subjects.operators(fused, subject.x())) - {"haar_pyramid", "haar_analysis"}
    assert ours or subject.shape[1] % 2, "no operator ran"
    with wk.backend("reference"):
        torch.testing.assert_close(fused(subject.x()), exact(subject.x()), rtol=1e-10, atol=1e-10)


@each(SMALL_PATM | MLPS | HEADS, block=subjects.wave_block((5, 4), drop_path=0.5), waveblock=subjects.waveblock(2))
def test_parts_with_hooks_run_themselves(subject: Subject) -> None:
    """Each part is called as often as in the reference, and the results are its."""
    for name in [name for name, _ in subject.pair()[1].named_modules() if name]:
        calls = []
        modules = subject.pair()
        for module in modules:
            seen: list[int] = []
            module.get_submodule(name).register_forward_hook(lambda *_, to=seen: to.append(1))
            calls.append(seen)
        subjects.assert_same_step(*modules, subject.x(), subject.rtol)
        assert calls[0] == calls[1] != [], name


@each(PATM | WAVE_BLOCKS | WAVEBLOCKS | HEADS | MODELS)
def test_empty_batch(subject: Subject) -> None:
    fused = subject.pair()[0].eval()
    x = subject.x()[:0].requires_grad_()
    out = fused(x)
    assert out.shape == (0, *fused(subject.x()).shape[1:])
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and (p.grad == 0).all() for p in fused.parameters())


SHALLOW = {"layers": [1, 1], "embed_dims": [4, 6], "mlp_ratios": [2, 2], "drop_path_rate": 0.5}


@pytest.mark.parametrize(
    "subject, dynamic",
    [
        (subjects.waveblock(2), True),
        pytest.param(subjects.patm(4, (5, 6)), True, marks=pytest.mark.prove),
        pytest.param(subjects.patm(4, (5, 6), "depthwise"), True, marks=pytest.mark.prove),
        pytest.param(
            subjects.wave_block((6, 5), subjects.GROUP, "depthwise", "all", dim=4), False, marks=pytest.mark.prove
        ),
        pytest.param(subjects.wave_net(subjects.BATCH, "fc", **SHALLOW), False, marks=pytest.mark.prove),
    ],
    ids=["waveblock", "patm", "patm, depthwise", "wave block", "wave net"],
)
def test_compiles_whole(subject: Subject, dynamic: bool) -> None:
    """Forward and backward in one graph each. Generating code for them is Inductor's matter and a minute's work."""
    torch._dynamo.reset()
    fused, _ = subject.pair()
    compiled = torch.compile(fused, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    state = {name: value.clone() for name, value in fused.state_dict().items()}
    other = subjects.normal(3, subject.shape[1], 8, 4)  # another batch, height and width
    for x in (subject.x(), other) if dynamic else (subject.x(),):
        results = []
        for run in (fused, compiled):
            fused.load_state_dict(state)
            step = subjects.training_step(run, x)
            results.append({name.removeprefix("_orig_mod."): value for name, value in step.items()})
        subjects.assert_close(results[1], results[0], 1e-9)


# --- Inference and acceleration --------------------------------------------------------------------------


@each(PATM | WAVE_BLOCKS | WAVEBLOCKS | HEADS | MODELS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_inference_form_is_the_module_in_evaluation(subject: Subject, backend: str) -> None:
    module = subject.pair()[0].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    form = wk.fuse_for_inference(copy.deepcopy(module))
    folded = [part for part in form.modules() if type(part).__name__.startswith("Inference")]
    assert folded
    assert not any(p.requires_grad for part in folded for p in part.parameters())
    assert not any(isinstance(inner, nn.Dropout) for part in folded for inner in part.modules())
    for order in LAYOUTS:
        x = subject.x(order)
        with wk.backend(backend):
            got, want = form(x), module(x).detach()
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        if subject.keeps_format and order != "sliced" and min(subject.shape[2:]) > 1:
            assert layout.is_channels_last(got) == layout.is_channels_last(want)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@each(WAVE_BLOCKS | WAVEBLOCKS | MODELS)
def test_accelerated_reference_is_the_reference(subject: Subject) -> None:
    """Upstream's modules, or ours of upstream's structure: the same tensors in the fused modules."""
    fused, exact = subject.pair()
    model = copy.deepcopy(exact)
    assert subjects.assert_accelerates(model).replaced
    wanted = {name: type(part) for name, part in fused.named_modules() if "Fused" in type(part).__name__}
    assert {name: type(part) for name, part in model.named_modules()}.items() >= wanted.items()
    subjects.assert_same_step(model, exact, subject.x(), subject.rtol)
