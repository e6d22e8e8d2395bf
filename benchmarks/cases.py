"""The registry: every case that is measured, in one place.

A case names its inputs and how each provider is made; everything else (backends, compilation, the gate, clocks,
memory) is the same for all and lives in `measure`. To add one, append to `registry()`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import photographs
from .gate import Limit, elementwise, root_mean_square, unit_roundoff
from .rivals import UpstreamWaveblock, upstream_wavelets

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Setting:
    """What a provider is made for.

    Attributes:
        exact: make the deterministic twin (dropout off), which alone can be compared with float64.
    """

    device: torch.device
    dtype: torch.dtype
    exact: bool = False


@dataclass(frozen=True)
class Gradients:
    """What the gate's limits may depend on, all in float64."""

    inputs: Sequence[Tensor]
    cotangents: Sequence[Tensor]
    expected: Sequence[Tensor]  # outputs, then the gradients of inputs and of parameters
    terms: Sequence[float]  # for each of them, the size of a sum of its terms with random signs; 0 where not known


@dataclass(frozen=True)
class Case:
    """One row group of the table.

    Attributes:
        name: unique, as ``group/what/dtype/layout/size/pass``; what ``--cases`` matches.
        group: one plot each.
        dtype: of inputs and parameters.
        backward: measure forward+backward instead of forward.
        inputs: makes the inputs on the CPU in float32, in their final memory layout.
        makers: what makes the callable of "upstream", "reference" (also the oracle, and what ``torch.compile``
            gets) and "ours". A callable that is a module brings its parameters.
        limits: permitted errors of outputs and gradients, from the float64 values and the unit roundoff.
        stochastic: the exact twin differs from what is timed (dropout).
        autocast: dtype of ``torch.autocast`` around the forward, if any.
        tensor_cores: mostly matrix products. float32 runs in TF32 on a GPU, as PyTorch's convolutions do by
            default, and the roof counts arithmetic beside bytes.
        devices: where it runs.
        quick: part of ``--quick``.
    """

    name: str
    group: str
    dtype: torch.dtype
    backward: bool
    inputs: Callable[[], list[Tensor]]
    makers: Mapping[str, Callable[[Setting], Forward]]
    limits: Callable[[Gradients, float], list[Limit]]
    stochastic: bool = False
    autocast: torch.dtype | None = None
    tensor_cores: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    quick: bool = False

    def roundoff(self, device: torch.device) -> float:
        """Unit roundoff of the arithmetic that is allowed here."""
        if self.autocast is not None:
            return unit_roundoff(self.autocast)
        if self.dtype == torch.float32 and device.type == "cuda" and self.tensor_cores:
            return 2.0**-11  # TF32
        return unit_roundoff(self.dtype)


def registry() -> list[Case]:
    """All cases, in the order in which they run."""
    return [*_haar_cases(), *_waveblock_cases()]


_SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
_FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def _passes(backward: bool) -> str:
    return "forward+backward" if backward else "forward"


def _features(size: Sequence[int], layout: str) -> Callable[[], list[Tensor]]:
    n, c, h, w = size
    return lambda: [photographs.feature_maps(n, c, h, w).contiguous(memory_format=_FORMATS[layout])]


# --- Haar transform ------------------------------------------------------------------------------------------


def haar_case(
    levels: int, dtype: torch.dtype, layout: str, size: tuple[int, int, int, int], backward: bool, **options: Any
) -> Case:
    """Analysis of feature maps, zero mode."""

    def upstream(setting: Setting) -> Forward:
        transform = upstream_wavelets().DWTForward(J=levels, wave="haar", mode="zero")
        return transform.to(setting.device, setting.dtype)

    def reference(setting: Setting) -> Forward:
        from wavemix_kernels.reference.haar import analysis

        return lambda x: analysis(x, levels)  # strided slices: the form torch.compile fuses best

    def ours(setting: Setting) -> Forward:
        from wavemix_kernels import haar_dwt2d

        return lambda x: haar_dwt2d(x, levels)

    return Case(
        name=f"haar/J{levels}/{_SHORT[dtype]}/{layout}/{'x'.join(map(str, size))}/{_passes(backward)}",
        group="haar",
        dtype=dtype,
        backward=backward,
        inputs=_features(size, layout),
        makers={"upstream": upstream, "reference": reference, "ours": ours},
        limits=lambda gradients, u: _haar_limits(levels, gradients, u),
        **options,
    )


def _haar_limits(levels: int, gradients: Gradients, u: float) -> list[Limit]:
    """Six roundings a level: two passes (rows, columns) of a rounded filter, a product and a sum.

    Absolute values go through the same butterfly with plus signs only: every band of a level is bounded by the LL
    of |x|, and a gradient by half the sum of its four |cotangents|.
    """
    from wavemix_kernels.reference.haar import analysis

    magnitude = gradients.inputs[0].abs()
    sizes, bands = [], []
    for _ in range(levels):
        sizes.append(magnitude.shape[-2:])
        magnitude = analysis(magnitude)[0]
        bands.append(magnitude.unsqueeze(2))
    magnitudes = [magnitude, *bands]
    roundings = [6 * levels + 2, *(6 * level + 2 for level in range(1, levels + 1))]
    if gradients.cotangents:
        back, *highs = (cotangent.abs() for cotangent in gradients.cotangents)
        for high, (rows, columns) in zip(reversed(highs), reversed(sizes), strict=True):
            quad = (back + high.sum(2)) / 2
            back = quad.repeat_interleave(2, -2).repeat_interleave(2, -1)[..., :rows, :columns]
        magnitudes.append(back)
        roundings.append(6 * levels + 2)
    return elementwise(magnitudes, roundings, u)


def _haar_cases() -> list[Case]:
    headline, small, odd = (4, 64, 256, 256), (64, 16, 32, 32), (8, 64, 57, 57)
    fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
    everywhere, gpu = ("cpu", "cuda"), ("cuda",)
    plan = [
        (1, fp32, "nchw", headline, everywhere),
        (4, fp32, "nchw", headline, everywhere),
        (1, fp32, "channels_last", headline, everywhere),
        (4, fp32, "channels_last", headline, everywhere),
        (1, bf16, "nchw", headline, everywhere),
        (4, bf16, "nchw", headline, everywhere),
        (1, bf16, "channels_last", headline, gpu),
        (4, bf16, "channels_last", headline, gpu),
        (1, fp16, "nchw", headline, everywhere),
        (4, fp16, "nchw", headline, gpu),
        (1, fp32, "nchw", small, everywhere),
        (2, fp32, "nchw", odd, everywhere),
    ]
    return [
        haar_case(*what, backward, devices=devices, quick=tuple(what[1:]) == (fp32, "nchw", headline))
        for *what, devices in plan
        for backward in (False, True)
    ]


# --- Waveblock -----------------------------------------------------------------------------------------------


def waveblock_case(level: int, layout: str, size: tuple[int, int, int, int], backward: bool, **options: Any) -> Case:
    """A training step of a Waveblock with its dropout, or its inference."""
    config = {"mult": 2, "ff_channel": size[1], "final_dim": size[1]}
    dropout = 0.5 if backward else 0.0
    autocast = options.get("autocast")

    def made(build: Callable[..., nn.Module]) -> Callable[[Setting], Forward]:
        def make(setting: Setting) -> Forward:
            from wavemix_kernels.reference import Waveblock

            # Every provider gets these parameters; drawn on the CPU, so that devices agree too.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(level)
                state = Waveblock(level=level, dropout=0.0, **config).state_dict()
            module = build(level=level, dropout=0.0 if setting.exact else dropout, **config)
            module.load_state_dict(state)
            module.to(setting.device, setting.dtype, memory_format=_FORMATS[layout])
            return module.train(backward)

        return make

    def reference(**arguments: Any) -> nn.Module:
        from wavemix_kernels.reference import Waveblock

        return Waveblock(**arguments)

    def ours(**arguments: Any) -> nn.Module:
        from wavemix_kernels import FusedWaveblock

        return FusedWaveblock(**arguments)

    what = "bf16-autocast" if autocast else "fp32"
    pass_name = "training" if backward else "inference"
    return Case(
        name=f"waveblock/L{level}/{what}/{layout}/{'x'.join(map(str, size))}/{pass_name}",
        group="waveblock",
        dtype=torch.float32,
        backward=backward,
        inputs=_features(size, layout),
        makers={"upstream": made(UpstreamWaveblock), "reference": made(reference), "ours": made(ours)},
        # Per level: two 1x1 convolutions, GELU, the transposed one, normalisation, and the transform itself.
        limits=lambda gradients, u: root_mean_square(gradients.expected, gradients.terms, 6 * level + 1, u),
        stochastic=backward,
        tensor_cores=True,
        **options,
    )


def _waveblock_cases() -> list[Case]:
    small, large = (8, 64, 64, 64), (64, 192, 64, 64)
    cases = [
        waveblock_case(level, "nchw", small, backward, quick=level == 1 and not backward)
        for level in (1, 2, 3, 4)
        for backward in (True, False)
    ]
    cases += [
        waveblock_case(level, layout, large, backward, devices=("cuda",), autocast=torch.bfloat16)
        for level in (1, 3, 4)
        for layout in ("nchw", "channels_last")
        for backward in (True, False)
    ]
    return cases
