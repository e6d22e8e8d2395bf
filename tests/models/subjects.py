"""Every module that has a fused form beside its reference, and the one comparison of a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import wavemix_kernels as wk
from wavemix_kernels import reference, wavemlp
from wavemix_kernels.nn.wavemix.expansion import FusedExpansion
from wavemix_kernels.nn.wavemlp import reference as wavemlp_reference
from wavemix_kernels.wavemix import SemSegment, classification, sisr

LAYOUTS = ("contiguous", "channels_last", "slices")
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


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; "slices" are every other element of a larger tensor."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "slices":
        n, c, h, w = x.shape
        return x.new_full((n, 2 * c + 1, h + 1, 2 * w), float("nan"))[:, 1::2, 1:, ::2].copy_(x)
    return x


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

    def x(self, layout: str = "contiguous", dtype: torch.dtype = torch.float64) -> Tensor:
        return laid_out(normal(*self.shape, dtype=dtype), layout)


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
}
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
    "lite": _model(classification.WaveMixLite, (4, 3, 16, 8), depth=2, final_dim=8, num_classes=3, dropout=0.0),
    "wave net": wave_net(BATCH, "fc"),
    "wave net, depthwise": wave_net(BATCH, "depthwise", drop_path_rate=0.5),
    "wave net, groups": wave_net(GROUP, "fc", drop_path_rate=0.5),
}
SUBJECTS = PATM | WAVE_BLOCKS | WAVEBLOCKS | HEADS | MLPS | MODELS


def training_step(module: nn.Module, x: Tensor, backend: str = "auto") -> dict[str, Tensor]:
    """Output, gradients and buffers of a seeded step. The choice of the forward pass holds in backward."""
    torch.manual_seed(5)
    module.zero_grad()
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with wk.backend(backend):
        out = module(leaf)
    out.backward(normal(*out.shape, seed=3).to(out))
    assert leaf.grad is not None
    values = {"out": out.detach(), "x": leaf.grad} | {name: p.grad for name, p in module.named_parameters()}
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


class Operators(TorchDispatchMode):
    """Names of our operators as they run, each with the arguments of its call; names of all others."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.others: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "wavemix_kernels":
            self.calls.append((func._schema.name.partition("::")[2], args))
        else:
            self.others.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def operators(module: nn.Module, x: Tensor) -> list[str]:
    with Operators() as ran:
        module(x)
    return [name for name, _ in ran.calls]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
