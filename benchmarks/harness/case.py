"""A case: its inputs, how each provider is made, and the errors that the gate permits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..harness.gate import Limit, calibrated, root_mean_square, summation, unit_roundoff
from . import photographs
from .rivals import PEERS

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Setting:
    """The conditions that a provider is made for.

    Attributes:
        exact: make the deterministic twin (dropout off), which alone can be compared with float64.
    """

    device: torch.device
    dtype: torch.dtype
    exact: bool = False


@dataclass(frozen=True)
class Expectation:
    """The expected values, from which limits follow: outputs, gradients of inputs, gradients of parameters, in float64.

    Attributes:
        terms: the size of a sum of each value's terms with random signs; 0 where not known.
        rounding: root mean square error of the reference in the case's own arithmetic, for each value; empty unless
            the case is `deep`.
        parameters: how many values at the end are gradients of parameters.
    """

    inputs: Sequence[Tensor]
    cotangents: Sequence[Tensor]
    values: Sequence[Tensor]
    terms: Sequence[float]
    rounding: Sequence[float] = ()
    parameters: int = 0


@dataclass(frozen=True)
class Case:
    """One row group of the table.

    Attributes:
        name: unique, as ``group/what/dtype/layout/size/pass``; what ``--cases`` matches.
        group: one plot each.
        dtype: of inputs and parameters.
        backward: measure forward+backward instead of forward.
        inputs: makes the inputs on the CPU in float32, in their final memory layout.
        makers: functions that make the callables of "upstream", "reference" (also the oracle, and compiled), "ours"
            and of other packages that have the operation. A callable that is a module brings its parameters.
        limits: permitted errors of outputs and gradients, from the float64 values and the unit roundoff.
        stochastic: the exact twin differs from what is timed (dropout).
        autocast: dtype of ``torch.autocast`` around the forward, if any.
        tensor_cores: mostly matrix products. float32 runs in TF32 on a GPU, as PyTorch's convolutions do by
            default, and the roof counts arithmetic beside bytes.
        image: a whole model: its input needs no gradient, and frames per second are what its users ask for.
        deep: so many layers that the gate's limits are measured, see :func:`benchmarks.harness.gate.calibrated`.
        judged: the gate compares so many images, the first ones; None for all. Float64 takes up to four times the
            memory. One or two images are too few: a mean over pixels at the end makes gradients constant over each
            image, and normalisation leaves next to nothing of them.
        devices: where it runs.
        quick: part of ``--quick``.
        extra: runs only with ``--all`` or by name: too slow for a run of everything else.
    """

    name: str
    group: str
    dtype: torch.dtype
    backward: bool
    inputs: Callable[[], list[Tensor]]
    makers: Mapping[str, Callable[[Setting], Forward]]
    limits: Callable[[Expectation, float], Sequence[Limit]]
    stochastic: bool = False
    autocast: torch.dtype | None = None
    tensor_cores: bool = False
    image: bool = False
    deep: bool = False
    judged: int | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    quick: bool = False
    extra: bool = False

    def takes(self, provider: str) -> bool:
        """Whether `provider` has a form of this case: other packages have wavelets alone."""
        return provider not in PEERS or provider in self.makers

    def roundoff(self, device: torch.device) -> float:
        """Unit roundoff of the arithmetic that is allowed here."""
        if self.autocast is not None:
            return unit_roundoff(self.autocast)
        if self.dtype == torch.float32 and device.type == "cuda" and self.tensor_cores:
            return 2.0**-11  # TF32
        return unit_roundoff(self.dtype)


CPU, GPU = ("cpu",), ("cuda",)
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
_SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


def case_name(group: str, what: str, arithmetic: str, layout: str, size: Sequence[int], passes: str) -> str:
    return "/".join((group, what, arithmetic, layout, "x".join(map(str, size)), passes))


def arithmetic(dtype: torch.dtype, autocast: torch.dtype | None = None) -> str:
    """The dtype as a case's name has it: "fp32", "bf16-autocast"."""
    return _SHORT[dtype] if autocast is None else f"{_SHORT[autocast]}-autocast"


def feature_maps(size: Sequence[int], layout: str) -> Callable[[], list[Tensor]]:
    n, c, h, w = size
    return lambda: [photographs.feature_maps(n, c, h, w).contiguous(memory_format=FORMATS[layout])]


def images(size: Sequence[int], layout: str = "nchw") -> Callable[[], list[Tensor]]:
    """Crops of photographs in colour, or grey for one channel."""
    n, channels, h, w = size

    def made() -> list[Tensor]:
        crops = photographs.crops(n, h, w)
        return [(crops if channels == 3 else crops.mean(1, keepdim=True)).contiguous(memory_format=FORMATS[layout])]

    return made


def with_sums(limits: Sequence[float], exact: Expectation) -> list[float]:
    """`limits`, with room in parameters' gradients for the roundings of a sum over all pixels one by one in float32,
    which is how depthwise convolutions and compiled code add."""
    sums = root_mean_square(exact.values, exact.terms, summation(_pixels(exact)), unit_roundoff(torch.float32))
    first = len(limits) - exact.parameters
    return [limit + (one if i >= first else 0.0) for i, (limit, one) in enumerate(zip(limits, sums, strict=True))]


def model_limits(exact: Expectation, u: float) -> list[float]:
    """Limits of a whole model."""
    return with_sums(calibrated(exact.values, exact.terms, exact.rounding, _pixels(exact), u), exact)


def _pixels(exact: Expectation) -> int:
    n, _, h, w = exact.inputs[0].shape
    return n * h * w


def module_makers(
    builds: Mapping[str, Callable[[bool], nn.Module]], *, training: bool, layout: str = "nchw"
) -> dict[str, Callable[[Setting], Forward]]:
    """Makers of modules that all start from the same parameters; ours in its inference form where nothing trains.

    Args:
        builds: makes each provider's module, told whether the exact twin is wanted.
    """

    def made(provider: str, build: Callable[[bool], nn.Module]) -> Callable[[Setting], Forward]:
        def make(setting: Setting) -> Forward:
            # Drawn on the CPU and by the reference, so that devices and providers agree.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                state = builds["reference"](True).state_dict()
            module = build(setting.exact)
            module.load_state_dict(state)
            module.to(setting.device, setting.dtype, memory_format=FORMATS[layout])
            module.train(training)
            if provider == "ours" and not training:
                from wavemix_kernels import fuse_for_inference

                return fuse_for_inference(module)  # as torch.compile's weights are frozen
            return module

        return make

    return {provider: made(provider, build) for provider, build in builds.items()}
