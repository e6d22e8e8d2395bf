"""Every module that has a fused form beside its reference, and the one comparison of a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import wavemix_kernels as wk
from benchmarks.harness import memory
from tests.ops.contract import image
from tests.ops.each import Calls
from wavemix_kernels import reference, wavemlp
from wavemix_kernels.accelerate import Report
from wavemix_kernels.nn.wavemix.expansion import FusedExpansion
from wavemix_kernels.nn.wavemix.shuffle import FusedShuffleWaveblock
from wavemix_kernels.nn.wavemlp import reference as wavemlp_reference
from wavemix_kernels.wavemix import SemSegment, classification, sisr
from wavemix_kernels.wavemix.v3 import WaveMixV3
from wavemix_kernels.wavemix.wavepaint import WavePaint

LAYOUTS = ("nchw", "channels_last", "sliced")
SMALL = {"depth": 2, "mult": 2, "ff_channel": 8, "final_dim": 8, "dropout": 0.0}
STRIDED = SMALL | {"initial_conv": "strided"}
TINY = {"layers": [1, 2, 1, 1], "embed_dims": [4, 6, 8, 8], "mlp_ratios": [2, 2, 2, 2]}
#: Upstream's order of operations throughout a Wave-MLP.
PLAIN = {"token_mixer": wavemlp_reference.PATM, "block": wavemlp_reference.WaveBlock}


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and running statistic away from its initial value, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2.0, generator=generator)
            elif value.is_floating_point():
                value.copy_(0.5 * torch.randn(value.shape, generator=generator, dtype=torch.float64))
    return module


@dataclass(frozen=True)
class Subject:
    """How a fused module and its reference are built, and a shape that they take."""

    fused: Callable[[], nn.Module]
    reference: Callable[[], nn.Module]
    shape: tuple[int, ...]
    keeps_format: bool = True  # in float64 too
    rtol: float = 1e-10

    def pair(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
        """(fused, reference in float64) with the same state, which each loads strictly from the other."""
        exact = randomised(self.reference().double())
        fused = self.fused().double()
        fused.load_state_dict(exact.state_dict(), strict=True)
        exact.load_state_dict(fused.state_dict(), strict=True)
        return fused.to(dtype), exact

    def x(self, layout: str = "nchw") -> Tensor:
        return image(normal(*self.shape), layout=layout)


def _of(fused: Callable[..., Any], exact: Callable[..., Any], shape: tuple[int, ...], **options: Any) -> Subject:
    return Subject(partial(fused, **options), partial(exact, **options), shape)


def waveblock(level: int, upsample: str = "deconv") -> Subject:
    options = {"level": level, "mult": 2, "ff_channel": 8, "final_dim": 8, "dropout": 0.0, "upsample": upsample}
    sides = (1 << level, 3 << level) if level > 2 else (12, 20)
    return replace(
        _of(wk.FusedWaveblock, reference.Waveblock, (2, 8, *sides), **options), keeps_format=False, rtol=1e-11
    )


def patm(
    dim: int, size: tuple[int, int], mode: str = "fc", qkv_bias: bool = False, recompute: str = "amplitudes"
) -> Subject:
    fused, exact = partial(wavemlp.PATM, recompute=recompute), wavemlp_reference.PATM
    return _of(fused, exact, (3, dim, *size), dim=dim, mode=mode, qkv_bias=qkv_bias)


def wave_block(
    size: tuple[int, int], norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d, mode: str = "fc",
    recompute: str = "amplitudes", dim: int = 8, **more: Any,
) -> Subject:  # fmt: skip
    fused, exact = partial(wavemlp.WaveBlock, recompute=recompute), wavemlp_reference.WaveBlock
    return _of(fused, exact, (4, dim, *size), dim=dim, mode=mode, norm_layer=norm_layer, **more)


def _model(model: Callable[..., nn.Module], shape: tuple[int, ...], **options: Any) -> Subject:
    """A WaveMix model; its reference has the reference block."""
    return Subject(partial(model, **options), partial(model, **options, block=reference.Waveblock), shape, False)


class WavePaintOfOne(WavePaint):
    """WavePaint of image and mask in one tensor (N, 4, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :3], x[:, 3:])


def shuffle_block(second: bool) -> Subject:
    options = {"mult": 2 if second else 4, "ff_channel": 32, "final_dim": 8, "dropout": 0.0, "second": second}
    return replace(_of(FusedShuffleWaveblock, reference.ShuffleWaveblock, (2, 8, 6, 10), **options), keeps_format=False)


def v3() -> Subject:
    fused = partial(WaveMixV3, depth=2, final_dim=8, dropout=0.0, num_classes=3)
    exact = partial(fused, block=partial(reference.ShuffleWaveblock, second=False))
    return Subject(fused, exact, (2, 3, 16, 24), False)


def wave_net(norm_layer: Callable[..., nn.Module], mode: str, **more: Any) -> Subject:
    fused = partial(wavemlp.WaveNet, **TINY | {"num_classes": 3, "norm_layer": norm_layer, "mode": mode} | more)
    return Subject(fused, partial(fused, **PLAIN), (3, 3, 40, 33), False)


BATCH, GROUP = nn.BatchNorm2d, wavemlp.MyNorm
#: Each pair of values of mode, bias and recompute once; images thinner and longer than the taps reach, odd channels.
PATM = {
    "patm": patm(4, (3, 21)),
    "patm of columns": patm(10, (8, 2), "depthwise", True),
    "patm of pixels": patm(6, (1, 1), "fc", True, "all"),
    "patm of odd channels": patm(5, (4, 5), "fc", True),
    "patm of odd channels, depthwise": patm(5, (4, 5), "depthwise", False, "all"),
    "patm of a row": patm(4, (1, 9), "depthwise"),
    "patm of 34": patm(34, (9, 5), "fc", False, "all"),
    "patm of long rows": patm(16, (4, 70), "fc", True),
    "patm keeping x, depthwise": patm(8, (5, 9), "depthwise", True, "all"),
}
#: More pixels than hidden channels, and fewer.
WAVE_BLOCKS = {
    "wave block": wave_block((6, 5), drop_path=0.5, qkv_bias=True),
    "wave block keeping x": wave_block((2, 1), BATCH, "fc", "all", drop_path=0.5),
    "wave block, depthwise": wave_block((2, 1), BATCH, "depthwise", qkv_bias=True),
    "wave block keeping x, depthwise": wave_block((6, 5), BATCH, "depthwise", "all"),
    "wave block, groups": wave_block((2, 1), GROUP, qkv_bias=True),
    "wave block keeping x, groups": wave_block((6, 5), GROUP, "fc", "all", drop_path=0.5),
    "wave block, groups, depthwise": wave_block((6, 5), GROUP, "depthwise", drop_path=0.5, qkv_bias=True),
    "wave block keeping x, groups, depthwise": wave_block((2, 1), GROUP, "depthwise", "all", drop_path=0.5),
}
WAVEBLOCKS = {
    f"waveblock {level} {upsample}": waveblock(level, upsample)
    for upsample, levels in (("deconv", (1, 2, 3, 4)), *((u, (1, 3)) for u in ("bilinear", "nearest", "pixelshuffle")))
    for level in levels
} | {"waveblock of SR-V2": shuffle_block(True), "waveblock of V3": shuffle_block(False)}
HEADS = {
    f"head {s}": Subject(partial(FusedExpansion, *s), partial(reference.Expansion, *s), (2, s[0], 5, 3), False)
    for s in ((64, 2, 5), (8, 1, 3), (12, 1, 40))
}
MLPS = {
    f"mlp {size}": Subject(partial(wavemlp.Mlp, 6, 20, 10), partial(wavemlp_reference.Mlp, 6, 20, 10), (2, 6, *size))
    for size in ((2, 1), (9, 8))
}
MODELS = {
    "classification": _model(classification.WaveMix, (2, 3, 32, 48), **SMALL, level=2, num_classes=3),
    "strided": _model(classification.WaveMix, (2, 3, 32, 16), **STRIDED, level=1, num_classes=3, upsample="nearest"),
    "segmentation": _model(SemSegment.WaveMix, (2, 3, 32, 64), **SMALL, level=3, num_classes=5, upsample="bilinear"),
    "super-resolution": _model(sisr.WaveMix, (2, 3, 16, 32), **SMALL, level=2, upsample="pixelshuffle"),
    "v3": v3(),
    "inpainting": _model(
        WavePaintOfOne, (2, 4, 8, 24), num_modules=2, blocks_per_module=1, ff_channel=8, final_dim=8, level=2
    ),
    "lite": _model(classification.WaveMixLite, (4, 3, 16, 8), depth=2, final_dim=8, num_classes=3, dropout=0.0),
    "wave net": wave_net(BATCH, "fc"),
    "wave net, depthwise": wave_net(BATCH, "depthwise", drop_path_rate=0.5),
    "wave net, groups": wave_net(GROUP, "fc", drop_path_rate=0.5),
}
SUBJECTS = PATM | WAVE_BLOCKS | WAVEBLOCKS | HEADS | MLPS | MODELS


def training_step(module: nn.Module, x: Tensor, backend: str = "auto") -> dict[str, Tensor]:
    """Output, gradients and buffers of a seeded step, and the number that would be drawn next. The choice of the
    forward pass holds in backward."""
    torch.manual_seed(5)
    module.zero_grad()
    leaf = x.detach().requires_grad_()
    with wk.backend(backend):
        out = module(leaf)
    out.backward(normal(*out.shape, seed=3).to(out))
    assert leaf.grad is not None
    # DistributedDataParallel compares these strides with its buckets'.
    assert all(p.grad is not None and p.grad.stride() == p.stride() for p in module.parameters())
    values = {"out": out.detach(), "x": leaf.grad, "drawn": torch.rand(1)} | {
        name: p.grad for name, p in module.named_parameters()
    }
    return values | {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 1e-10) -> None:
    """A tensor is off by at most ``rtol`` of its largest value."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name] is not None, name
        assert got[name].shape == value.shape, name
        if value.numel() == 0:
            continue
        # A bias in front of batch statistics has a gradient of 0: what the reference has are its rounding errors.
        cancels = name.endswith(".bias") and value.abs().max().item() < 1e-8
        scale = want["x"].abs().sum().item() if cancels else value.abs().max().item()
        error = (got[name].cpu() - value).abs().max().item()
        assert error <= rtol * scale, f"{name} is off by {error:.3g} at a scale of {scale:.3g}"


def assert_same_step(fused: nn.Module, exact: nn.Module, x: Tensor, rtol: float = 1e-10) -> None:
    assert_close(training_step(fused, x), training_step(exact, x.contiguous()), rtol)


def calls(module: nn.Module, x: Tensor) -> list[tuple[str, tuple[Any, ...]]]:
    """Our operators as they run, by name, each with the arguments of its call."""
    with Calls() as ran:
        module(x)
    return [(op._schema.name.partition("::")[2], args) for op, args in ran.made]


def operators(module: nn.Module, x: Tensor) -> list[str]:
    return [name for name, _ in calls(module, x)]


def changed(module: nn.Module, path: str = "", /, **attributes: Any) -> nn.Module:
    """``module``, of whose part at ``path`` some attributes are others."""
    for name, value in attributes.items():
        setattr(module.get_submodule(path), name, value)
    return module


def assert_accelerates(model: nn.Module) -> Report:
    """accelerate() leaves no candidate, keeps every tensor and draws no number; a second time it changes nothing."""
    before = [*model.parameters(), *model.buffers()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    report = wk.accelerate(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert report.model is model
    assert report.left == ()
    assert {id(t) for t in (*model.parameters(), *model.buffers())} == {id(t) for t in before}
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    again = wk.accelerate(model)
    assert again.replaced == again.left == ()
    return report


def autocast_step(module: nn.Module, x: Tensor, dtype: torch.dtype | None) -> list[Tensor]:
    """Output, and gradients of the sum of its squares by x and the parameters; in autocast, if there is a dtype."""
    module.zero_grad()
    leaf = x.detach().requires_grad_()
    with torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        out = module(leaf)
    out.float().square().sum().backward()
    grads = [leaf.grad, *(p.grad for p in module.parameters())]
    assert all(g is not None and g.isfinite().all() and g.dtype == t.dtype
               for g, t in zip(grads, (x, *module.parameters()), strict=True))  # fmt: skip
    return [out.detach(), *grads]


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of distinct storages that a step keeps for backward, parameters and buffers excluded."""
    leaf = x.detach().requires_grad_()
    return memory.saved_bytes(lambda: module(leaf), [*module.parameters(), *module.buffers()])


def peak_bytes(model: nn.Module, x: Tensor) -> int:
    """Most live bytes of a step of a classifier above x, parameters and gradients."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [x, *model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    return memory.tracked_peak_bytes(lambda: model(x).logsumexp(1).sum().backward(), known)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
