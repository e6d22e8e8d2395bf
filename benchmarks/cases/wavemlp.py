"""Phase-aware token mixing, and the Wave-MLP models around it, against their published order of operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..harness.case import (
    CPU,
    GPU,
    Case,
    Expectation,
    arithmetic,
    case_name,
    feature_maps,
    images,
    model_limits,
    module_makers,
    with_sums,
)
from ..harness.gate import magnitudes, root_mean_square
from ..harness.rivals import UpstreamPATM

FP16, BF16 = torch.float16, torch.bfloat16
Size = tuple[int, int, int, int]
#: Channels, rows and columns of the four stages, at 224 pixels.
STAGES = ((64, 56, 56), (128, 28, 28), (320, 14, 14), (512, 7, 7))
#: Rounded layers of a PATM: projections, phase, normalisation, sine and cosine, wave, taps, the branch weights' mean,
#: two layers and softmax, weighted sum, projection.
DEPTH = 12


def patm_case(mode: str, size: Size, training: bool, **options: Any) -> Case:
    """A training step of a PATM, or its inference."""

    def upstream(exact: bool) -> nn.Module:
        return UpstreamPATM(size[1], mode=mode)

    def reference(exact: bool) -> nn.Module:
        from wavemix_kernels.reference import PATM

        return PATM(size[1], mode=mode)

    def ours(exact: bool) -> nn.Module:
        from wavemix_kernels import FusedPATM

        return FusedPATM(size[1], mode=mode)

    dtype, autocast = torch.float32, options.get("autocast")
    passes = "training" if training else "inference"
    return Case(
        name=case_name("patm", mode, arithmetic(dtype, autocast), "nchw", size, passes),
        group="patm",
        dtype=dtype,
        backward=training,
        inputs=feature_maps(size, "nchw"),
        makers=module_makers({"upstream": upstream, "reference": reference, "ours": ours}, training=training),
        limits=lambda exact, u: _with_kinks(
            with_sums(root_mean_square(exact.values, exact.terms, DEPTH, u), exact), exact, size[1:], u
        ),
        tensor_cores=True,
        **options,
    )


def _with_kinks(limits: Sequence[float], exact: Expectation, stage: Sequence[int], u: float) -> list[float]:
    """`limits`, with room for ReLU's kink in the gradients.

    Rounding moves about a share `u` of the phases across the kink, and each changes by its whole gradient. A phase's
    gradient is a product of several normal factors, so single ones are several times the mean: four are allowed.
    """
    share = math.sqrt(u) + 4 / math.sqrt(len(exact.inputs[0]) * math.prod(stage))
    sizes = magnitudes(exact.values, exact.terms)
    outputs = len(exact.cotangents) or len(limits)
    added = [0.0] * outputs + [share * size for size in sizes[outputs:]]
    return [limit + more for limit, more in zip(limits, added, strict=True)]


def patm_cases() -> list[Case]:
    cases = []
    for mode in ("fc", "depthwise"):
        for stage, shape in enumerate(STAGES):
            for training in (True, False):
                extra = stage > 0
                quick = training and mode == "fc" and not extra
                cases.append(patm_case(mode, (8, *shape), training, devices=CPU, extra=extra, quick=quick))
                if stage == 0:
                    given: Any = {"devices": CPU, "autocast": BF16, "extra": True}
                    cases.append(patm_case(mode, (8, *shape), training, **given))
                for autocast in (BF16, None):
                    cases.append(
                        patm_case(mode, (128, *shape), training, devices=GPU, autocast=autocast, extra=extra, judged=8)
                    )
    return cases


def model_case(group: str, name: str, size: Size, training: bool, **options: Any) -> Case:
    """A training step of a Wave-MLP, or its inference, on photographs.

    Args:
        name: a function of :mod:`wavemix_kernels.wavemlp`, without ``WaveMLP_``.
    """

    def build(**arguments: Any) -> nn.Module:
        from wavemix_kernels import wavemlp

        return getattr(wavemlp, f"WaveMLP_{name}")(**arguments)

    def reference(exact: bool) -> nn.Module:
        from wavemix_kernels.reference import PATM

        return build(token_mixer=PATM)

    makers: dict[str, Callable[[bool], nn.Module]] = {
        "upstream": lambda exact: build(token_mixer=UpstreamPATM),
        "reference": reference,
        "ours": lambda exact: build(),
    }
    dtype, autocast = torch.float32, options.get("autocast")
    passes = "training" if training else "inference"
    return Case(
        name=case_name(group, name, arithmetic(dtype, autocast), "nchw", size, passes),
        group=group,
        dtype=dtype,
        backward=training,
        inputs=images(size),
        makers=module_makers(makers, training=training),
        limits=lambda exact, u: _with_kinks(model_limits(exact, u), exact, STAGES[-1], u),
        tensor_cores=True,
        image=True,
        deep=True,
        extra=True,
        **options,
    )


def wavemlp_cases() -> list[Case]:
    on_cpu, on_gpu = (2, 3, 224, 224), (128, 3, 224, 224)
    cases = []
    for name in ("T_dw", "S"):
        for training in (True, False):
            cases.append(model_case("wavemlp", name, on_cpu, training, devices=CPU))
            if name == "T_dw":
                cases.append(model_case("wavemlp", name, on_cpu, training, devices=CPU, autocast=BF16))
            cases.append(model_case("wavemlp", name, on_gpu, training, devices=GPU, autocast=BF16, judged=8))
        cases.append(model_case("wavemlp", name, on_gpu, False, devices=GPU, judged=8))
    # Frames per second of training in fp16 autocast and fp32; no other case trains in fp32.
    for name in ("T_dw", "T", "S", "M"):
        for autocast in (FP16, None):
            cases.append(model_case("wavemlp-frames", name, on_gpu, True, devices=GPU, autocast=autocast, judged=8))
    return cases
