"""Blocks and models whose steps are predicted: ours, the published order of operations, and what a compiler gets.

A step is made twice: at its real size on fake tensors, where its launches are recorded, and narrow on a few pixels,
where its Python is timed (:mod:`benchmarks.predict.host`). Both take the same way through this package: the command
line refuses steps whose numbers of launches differ by a tenth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ..harness.rivals import UpstreamPATM, UpstreamWaveblock, upstream_wavelets
from ..harness.traffic import as_on_a_gpu

#: Ours; the published order of operations, one kernel an operator; the order that torch.compile gets, see rivals.py.
PROVIDERS = ("ours", "eager", "compile")
#: Channels of a narrow step, of a real one's.
NARROW = 4

Size = tuple[int, int, int, int]


@dataclass(frozen=True)
class Step:
    """A training step (output and all gradients) or an inference.

    Attributes:
        name: as the cases of benchmarks have it: group/what/layout/size.
        title: for the documentation.
        size: of the input.
        few: of the input whose Python is timed.
        build: called with a provider of :data:`PROVIDERS` and the number that channels are divided by.
        channels_last: the memory order of the input and of a module's weights.
        image: no gradient is taken of the input.
        narrow: in training, in inference: whether Python is timed on a narrow step. One whose kernels serve certain
            widths alone, or that is narrow already, is timed as it is.
    """

    name: str
    title: str
    size: Size
    few: Size
    build: Callable[[str, int], Callable[[Tensor], Any]]
    channels_last: bool = False
    image: bool = False
    narrow: tuple[bool, bool] = (True, True)

    def is_narrow(self, training: bool) -> bool:
        return self.narrow[0 if training else 1]

    def make(self, provider: str, *, training: bool, narrow: bool = False) -> Callable[[Tensor], Any]:
        """The module or function in bf16, ours in its inference form where nothing trains."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)  # a fake parameter cannot change its dtype
        # It looks at the values, which fake parameters have not.
        with mock.patch.object(nn.init, "trunc_normal_", lambda tensor, **_: tensor):
            made = self.build(provider, NARROW if narrow and self.is_narrow(training) else 1)
            if isinstance(made, nn.Module):
                made.train(training).requires_grad_(training)
                if provider != "ours":
                    made = as_on_a_gpu(made)
                elif not training:
                    from wavemix_kernels import fuse_for_inference

                    # PyTorch's own copy of a buffer looks at its storage, which fake ones have not.
                    with mock.patch.object(Tensor, "__deepcopy__", lambda t, memo: t.detach().clone()):
                        made = fuse_for_inference(made)
                if self.channels_last:
                    _in_channels_last(made)
        torch.set_default_dtype(before)
        return made


def run(
    step: Callable[[Tensor], Any],
    x: Tensor,
    *,
    training: bool,
    weights: Sequence[Tensor] | None = None,
    between: Callable[[], object] = lambda: None,
    cotangent: Callable[[Tensor], Tensor] = torch.empty_like,
) -> None:
    """One forward pass, and in training all gradients; ``between`` is called before them. ``weights`` are the step's
    parameters, which a training loop collects once."""
    if not training:
        with torch.no_grad():
            step(x)
        return
    wanted = parameters(step) if weights is None else weights
    out = _flat(step(x))
    between()
    torch.autograd.grad(out, [x, *wanted] if x.requires_grad else wanted, list(map(cotangent, out)))


def _in_channels_last(model: nn.Module) -> None:
    """``model.to(memory_format=torch.channels_last)``, as one has it for a GPU's convolutions; fake parameters cannot
    be changed in place."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 4:
                ordered = parameter.detach().contiguous(memory_format=torch.channels_last)
                setattr(module, name, nn.Parameter(ordered, parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.dim() == 4:
                setattr(module, name, buffer.contiguous(memory_format=torch.channels_last))


def parameters(step: Callable[[Tensor], Any]) -> list[Tensor]:
    return list(step.parameters()) if isinstance(step, nn.Module) else []


def _flat(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [tensor for one in out for tensor in _flat(one)]


@contextmanager
def narrow_choices() -> Iterator[None]:
    """Widths that decide between two ways, divided as channels are."""
    from wavemix_kernels.ops import choose
    from wavemix_kernels.wavemix import backbone

    widths = {name: getattr(choose, name) // NARROW for name in ("JOINED", "MLP_HELD", "MLP_WEIGHTS_HELD")}
    stem = backbone._WIDE_STEM // NARROW
    with mock.patch.multiple(choose, **widths), mock.patch.object(backbone, "_WIDE_STEM", stem):
        yield


# --- The steps ------------------------------------------------------------------------------------------------


def _haar(levels: int, provider: str, by: int) -> Callable[[Tensor], Any]:
    if provider == "ours":
        from wavemix_kernels import haar_dwt2d

        return lambda x: haar_dwt2d(x, levels)
    if provider == "eager":
        return upstream_wavelets().DWTForward(J=levels, wave="haar", mode="zero")
    from wavemix_kernels.ops.haar.reference import analysis

    return lambda x: analysis(x, levels)


class _Residual(nn.Module):
    """A Waveblock as the models run it: its input added to its output, ours in the pass that normalises."""

    def __init__(self, block: nn.Module, fused: bool) -> None:
        super().__init__()
        self.block, self.fused = block, fused
        if fused:
            self.fuse_for_inference = lambda: _Residual(block.fuse_for_inference(), True)

    def forward(self, x: Tensor) -> Any:
        return self.block(x, residual=True) if self.fused else self.block(x) + x


def _block(provider: str) -> Callable[..., nn.Module]:
    from wavemix_kernels import FusedWaveblock
    from wavemix_kernels.reference import Waveblock

    return {"ours": FusedWaveblock, "eager": UpstreamWaveblock, "compile": Waveblock}[provider]


def _waveblock(level: int, provider: str, by: int) -> nn.Module:
    width = 192 // by
    block = _block(provider)(level=level, mult=2, ff_channel=width, final_dim=width, dropout=0.5)
    return _Residual(block, provider == "ours")


def _mixer(provider: str) -> Callable[..., nn.Module]:
    from wavemix_kernels import FusedPATM
    from wavemix_kernels.reference import PATM

    return {"ours": FusedPATM, "eager": UpstreamPATM, "compile": PATM}[provider]


def _patm(provider: str, by: int) -> nn.Module:
    return _mixer(provider)(64 // by)


def _wavemix(provider: str, by: int) -> nn.Module:
    from wavemix_kernels.wavemix.classification import WaveMix

    return WaveMix(final_dim=192 // by, ff_channel=192 // by, block=_block(provider))


def _lite(provider: str, by: int) -> nn.Module:
    from wavemix_kernels.wavemix.classification import WaveMixLite

    return WaveMixLite(num_classes=10, final_dim=8, depth=5, in_channels=1, upsample="deconv", block=_block(provider))


def _wavemlp(name: str, provider: str, by: int) -> nn.Module:
    from wavemix_kernels import wavemlp

    widths = {} if by == 1 else {"embed_dims": tuple(c // by for c in (64, 128, 320, 512))}
    ours = {} if provider == "ours" else {"token_mixer": _mixer(provider)}
    layers, norm = {"T": ((2, 2, 4, 2), nn.BatchNorm2d), "S": ((2, 3, 10, 3), wavemlp.MyNorm)}[name]
    if by == 1:
        made: nn.Module = getattr(wavemlp, f"WaveMLP_{name}")(**ours)
        return made
    return wavemlp.WaveNet(layers, mlp_ratios=(4, 4, 4, 4), drop_path_rate=0.9, norm_layer=norm, **widths, **ours)


def steps() -> list[Step]:
    """Every step, in the order of the tables."""
    found = []
    for levels in (1, 4):
        for layout in ("nchw", "channels_last"):
            found.append(
                Step(
                    f"haar/J{levels}/{layout}/4x64x256x256", f"Haar, {levels} level{'s' * (levels > 1)}, {layout}",
                    (4, 64, 256, 256), (2, 16, 16, 16), functools.partial(_haar, levels), layout == "channels_last",
                )
            )  # fmt: skip
    for level in (1, 2, 3, 4):
        for layout in ("nchw", "channels_last") if level == 3 else ("nchw",):
            found.append(
                Step(
                    f"waveblock/L{level}/{layout}/64x192x64x64", f"Waveblock L{level}, C=192, {layout}",
                    (64, 192, 64, 64), (2, 48, 16, 16), functools.partial(_waveblock, level), layout == "channels_last",
                )
            )  # fmt: skip
    found.append(
        Step("patm/fc/nchw/64x64x56x56", "PATM, C=64", (64, 64, 56, 56), (2, 64, 8, 8), _patm,
             narrow=(False, False))
    )  # fmt: skip
    small = (2, 3, 32, 32)
    for batch in (1, 16, 64):
        found.append(
            Step(f"wavemix/192-16-L3/{batch}x3x224x224", f"WaveMix 192/16 L3, batch {batch}", (batch, 3, 224, 224),
                 small, _wavemix, True, image=True)
        )  # fmt: skip
    found.append(
        Step("wavemix/lite-8-5/1024x1x28x28", "WaveMix-Lite 8/5, batch 1024", (1024, 1, 28, 28), (2, 1, 28, 28), _lite,
             True, image=True, narrow=(False, False))
    )  # fmt: skip
    for name in ("T", "S"):
        for batch in (1, 32, 128):
            build = functools.partial(_wavemlp, name)
            found.append(
                Step(f"wavemlp/{name}/{batch}x3x224x224", f"WaveMLP_{name}, batch {batch}", (batch, 3, 224, 224),
                     (4, 3, 32, 32), build, image=True, narrow=(False, False))
            )  # fmt: skip
    return found
