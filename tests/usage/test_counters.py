"""Counters that people put around a model: FLOPs as the modules would count them, and what counters leave behind."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import wavemix_kernels as wk
from wavemix_kernels import reference, wavemlp
from wavemix_kernels.nn.wavemix.expansion import FusedExpansion
from wavemix_kernels.nn.wavemlp import reference as wavemlp_reference
from wavemix_kernels.wavemix import SemSegment, classification, sisr

_BLOCK = {"final_dim": 16, "ff_channel": 16, "level": 2}
_PLAIN = {"block": wavemlp_reference.WaveBlock, "token_mixer": wavemlp_reference.PATM}
_SIZES: dict[str, Any] = {"layers": [1, 2], "embed_dims": [64, 144], "mlp_ratios": [2, 2]}


def _waveblock(**options: Any) -> Callable[[bool], nn.Module]:
    def build(plain: bool) -> nn.Module:
        keep = {name: value for name, value in options.items() if not (plain and name == "recompute")}
        return (reference.Waveblock if plain else wk.FusedWaveblock)(**(_BLOCK | keep))

    return build


def _patm(dim: int, **options: Any) -> Callable[[bool], nn.Module]:
    def build(plain: bool) -> nn.Module:
        keep = {name: value for name, value in options.items() if not (plain and name == "recompute")}
        return (reference.PATM if plain else wk.FusedPATM)(dim, **keep)

    return build


def _model(kind: Any, **options: Any) -> Callable[[bool], nn.Module]:
    return lambda plain: kind(depth=2, **_BLOCK, **options, **({"block": reference.Waveblock} if plain else {}))


#: Whether plain modules make it, what is counted, and its input.
SUBJECTS: dict[str, tuple[Callable[[bool], nn.Module], tuple[int, ...]]] = {
    **{f"Waveblock {u}": (_waveblock(upsample=u), (2, 16, 16, 24))
       for u in ("deconv", "bilinear", "nearest", "pixelshuffle")},
    "Waveblock all": (_waveblock(recompute="all"), (2, 16, 16, 24)),
    "Waveblock wide": (_waveblock(final_dim=64, ff_channel=64), (1, 64, 16, 16)),
    "Waveblock narrow": (_waveblock(final_dim=4, ff_channel=4, level=1), (2, 4, 16, 16)),
    **{f"PATM {mode} {dim} {recompute}": (_patm(dim, mode=mode, recompute=recompute), (2, dim, 9, 8))
       for mode in ("fc", "depthwise") for dim in (16, 136) for recompute in ("amplitudes", "all")},
    "PATM odd": (_patm(15), (2, 15, 9, 8)),
    "Mlp": (lambda plain: (reference.Mlp if plain else wavemlp.Mlp)(8, 32, 16), (2, 8, 9, 8)),
    "WaveBlock": (lambda plain: (reference.WaveBlock if plain else wavemlp.WaveBlock)(16), (2, 16, 9, 8)),
    "Expansion": (lambda plain: (reference.Expansion if plain else FusedExpansion)(16, 2, 3), (2, 16, 8, 8)),
    "classification": (_model(classification.WaveMix, num_classes=10), (2, 3, 64, 64)),
    "sisr": (_model(sisr.WaveMix), (2, 3, 16, 16)),
    "SemSegment": (_model(SemSegment.WaveMix, num_classes=4), (1, 3, 32, 32)),
    "WaveNet": (lambda plain: wavemlp.WaveNet(**_SIZES, **(_PLAIN if plain else {})), (2, 3, 64, 64)),
    "WaveNet depthwise": (
        lambda plain: wavemlp.WaveNet(**_SIZES, mode="depthwise", **(_PLAIN if plain else {})), (2, 3, 64, 64)
    ),
}  # fmt: skip


def flops(run: Callable[[], Any]) -> tuple[Any, int]:
    with FlopCounterMode(display=False) as counter:
        out = run()
    return out, counter.get_total_flops()


def of_a_step(module: nn.Module, x: Tensor) -> tuple[int, int]:
    """FLOPs of the forward and of the backward pass."""
    out, forward = flops(lambda: module(x))
    _, backward = flops(lambda: out.sum().backward())
    return forward, backward


@pytest.mark.parametrize("name", SUBJECTS)
def test_flops_are_those_of_the_modules(name):
    """Model FLOPs for a paper's table, by FlopCounterMode: fused operators counted as 0."""
    build, size = SUBJECTS[name]
    x = torch.randn(size, requires_grad=True)
    fused, plain = of_a_step(build(False), x), of_a_step(build(True), x)
    assert plain[0] > 0
    assert fused == pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize("name", ["Waveblock deconv", "PATM fc 16 amplitudes", "WaveNet", "classification"])
def test_flops_in_half_precision_and_evaluation(name):
    """The same under bf16, where other kernels run, and without gradient."""
    build, size = SUBJECTS[name]
    x = torch.randn(size, dtype=torch.bfloat16, requires_grad=True)
    fused, plain = (of_a_step(build(kind).bfloat16(), x) for kind in (False, True))
    assert fused == pytest.approx(plain, rel=0.02)
    with torch.no_grad():
        fused, plain = (flops(lambda kind=kind: build(kind).eval()(x.float().detach()))[1] for kind in (False, True))
    assert fused == pytest.approx(plain, rel=0.02)


def test_one_counter_around_a_step_counts_what_two_count():
    """One FlopCounterMode around forward and backward: what backward makes again is not counted twice."""
    for name in ("Waveblock all", "PATM fc 136 all", "WaveNet"):
        build, size = SUBJECTS[name]
        module, x = build(False), torch.randn(size, requires_grad=True)
        _, together = flops(lambda module=module, x=x: module(x).sum().backward())
        assert together == pytest.approx(sum(of_a_step(build(True), x)), rel=0.02)


@pytest.mark.parametrize("name", ["classification", "WaveNet", "Expansion"])
def test_flops_of_the_inference_forms(name):
    """A deployed model is counted too: what it saves is BatchNorms and a folded head, no products elsewhere."""
    build, size = SUBJECTS[name]
    x = torch.randn(size)
    model = build(False).eval()
    exported, deployed = wk.export_form(model), wk.fuse_for_inference(copy.deepcopy(model))  # a counter has hooks
    with torch.no_grad():
        plain = flops(lambda: build(True).eval()(x))[1]
        form = flops(lambda: exported(x))[1]
        fused = flops(lambda: deployed(x))[1]
    assert fused == pytest.approx(form, rel=0.02)
    if name != "Expansion":
        assert fused == pytest.approx(plain, rel=0.02)


@pytest.mark.prove
def test_the_counter_may_be_imported_before_and_after():
    """A script imports the counter at its top, a notebook in its last cell."""
    lines = ["import wavemix_kernels", "from torch.utils.flop_counter import FlopCounterMode, flop_registry"]
    end = "import torch; assert torch.ops.wavemix_kernels.deconv in flop_registry, 'no formula'"
    for order in (lines, lines[::-1]):
        run = subprocess.run([sys.executable, "-c", "; ".join([*order, end])], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr


# --- What counters leave behind --------------------------------------------------------------------------


def left_by_thop(model: nn.Module) -> None:
    """The buffers that thop.profile registers on every module and never takes away."""
    for module in model.modules():
        for name in ("total_ops", "total_params"):
            module.register_buffer(name, torch.zeros(1, dtype=torch.float64))


def reference_models() -> dict[str, nn.Module]:
    plain: Any = {name: SUBJECTS[name][0](True) for name in ("classification", "WaveNet", "Waveblock wide", "PATM odd")}
    return plain


@pytest.mark.parametrize("name", reference_models())
def test_accelerate_after_thop_profile(name):
    """A profile of the model first, then accelerate: counters that no forward reads left every block as it was."""
    clean, counted = wk.accelerate(reference_models()[name]), reference_models()[name]
    left_by_thop(counted)
    report = wk.accelerate(counted)
    assert len(report.replaced) == len(clean.replaced) > 0
    assert report.left == clean.left


def test_accelerate_of_a_transform_after_thop_profile():
    """The same around a DWTForward of the original package."""
    original = pytest.importorskip("pytorch_wavelets", exc_type=ImportError)
    model = nn.Sequential(original.DWTForward(J=2, wave="haar"))
    left_by_thop(model)
    assert len(wk.accelerate(model).replaced) == 1


def test_a_real_tensor_too_many_still_leaves_a_block():
    """Only counters are looked past: another buffer may change what a block computes."""
    model = reference_models()["Waveblock wide"]
    model.register_buffer("scale", torch.ones(1))
    assert [entry.reason for entry in wk.accelerate(model).left] == [
        "its parameters and buffers are not a Waveblock's: scale"
    ]


@pytest.mark.parametrize("name", ["classification", "WaveNet"])
def test_thop_counts_a_fused_model(name):
    """thop.profile hooks the layers: the blocks run their modules while it counts, and are fused again after it."""
    thop = pytest.importorskip("thop")
    build, size = SUBJECTS[name]
    x = torch.randn(size)
    fused, plain = build(False), build(True)
    assert thop.profile(fused, (x,), verbose=False) == thop.profile(plain, (x,), verbose=False)
    blocks = [m for m in fused.modules() if isinstance(m, (wk.FusedWaveblock, wk.FusedPATM))]
    assert blocks
    assert all(m.why_not_fused() is None for m in blocks)
