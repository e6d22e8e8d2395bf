"""Waveblocks, and the WaveMix models made of them, against wavemix's own order of operations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..harness.case import CPU, GPU, Case, arithmetic, case_name, feature_maps, images, model_limits, module_makers
from ..harness.gate import root_mean_square
from ..harness.rivals import UpstreamWaveblock

BF16 = torch.bfloat16
Size = tuple[int, int, int, int]


def waveblock_case(level: int, layout: str, size: Size, training: bool, **options: Any) -> Case:
    """A training step of a Waveblock with its dropout, or its inference."""
    config: dict[str, Any] = {"level": level, "mult": 2, "ff_channel": size[1], "final_dim": size[1]}
    dropout = 0.5 if training else 0.0

    def reference(exact: bool) -> nn.Module:
        from wavemix_kernels.reference import Waveblock

        return Waveblock(**config, dropout=0.0 if exact else dropout)

    def upstream(exact: bool) -> nn.Module:
        return UpstreamWaveblock(**config, dropout=0.0 if exact else dropout)

    def ours(exact: bool) -> nn.Module:
        from wavemix_kernels import FusedWaveblock

        return FusedWaveblock(**config, dropout=0.0 if exact else dropout)

    dtype, autocast = torch.float32, options.get("autocast")
    passes = "training" if training else "inference"
    return Case(
        name=case_name("waveblock", f"L{level}", arithmetic(dtype, autocast), layout, size, passes),
        group="waveblock",
        dtype=dtype,
        backward=training,
        inputs=feature_maps(size, layout),
        makers=module_makers(
            {"upstream": upstream, "reference": reference, "ours": ours}, training=training, layout=layout
        ),
        # Per level: two 1x1 convolutions, GELU, the transposed one, normalisation, and the transform itself.
        limits=lambda exact, u: root_mean_square(exact.values, exact.terms, 6 * level + 1, u),
        stochastic=training,
        tensor_cores=True,
        **options,
    )


def waveblock_cases() -> list[Case]:
    both = (True, False)
    narrow, wide = (8, 64, 64, 64), (64, 192, 64, 64)
    cases = [
        waveblock_case(level, "nchw", narrow, training, quick=level == 1 and training)
        for level in (1, 2, 3, 4)
        for training in both
    ]
    cases += [
        waveblock_case(level, layout, wide, training, devices=GPU, autocast=BF16)
        for level in (1, 3, 4)
        for layout in ("nchw", "channels_last")
        for training in both
    ]
    cases += [
        waveblock_case(level, "nchw", narrow, training, devices=CPU, autocast=BF16, extra=True)
        for level in (1, 3)
        for training in both
    ]
    # The widths of the published models, in the arithmetic that is not above.
    cases += [
        waveblock_case(level, "nchw", size, training, devices=CPU, extra=True)
        for level, size in ((2, (4, 192, 64, 64)), (3, (4, 192, 64, 64)), (4, (4, 192, 64, 64)), (4, (2, 256, 64, 64)))
        for training in both
    ]
    have = {case.name for case in cases}
    more = (
        waveblock_case(level, "nchw", (64, width, 64, 64), training, devices=GPU, autocast=autocast, extra=True)
        for width in (64, 192, 256)
        for level in (1, 2, 3, 4)
        for autocast in (BF16, None)
        for training in both
    )
    return cases + [case for case in more if case.name not in have]


def _classification(**arguments: Any) -> nn.Module:
    from wavemix_kernels.wavemix.classification import WaveMix

    return WaveMix(**arguments)  # 192/16, level 3, patches of 4: blocks at a quarter of the image


def _lite(dim: int, depth: int, channels: int, **arguments: Any) -> nn.Module:
    from wavemix_kernels.wavemix.classification import WaveMixLite

    return WaveMixLite(final_dim=dim, depth=depth, in_channels=channels, upsample="deconv", **arguments)


def _segmentation(**arguments: Any) -> nn.Module:
    from wavemix_kernels.wavemix.SemSegment import WaveMix

    return WaveMix(**arguments)  # 256/16, level 4, two strides of 2


def _super_resolution(**arguments: Any) -> nn.Module:
    from wavemix_kernels.wavemix.sisr import WaveMix

    return WaveMix(**arguments)  # 144/4, level 1


# Name, model, whether its published form trains with dropout, and sizes on a CPU and on a GPU (None: no case there).
# torch.compile takes more than ten minutes on two cores for a training step of 16 blocks: 4 are timed beside it.
MODELS: tuple[tuple[str, Callable[..., nn.Module], bool, Size, Size | None], ...] = (
    ("lite-8-5", functools.partial(_lite, 8, 5, 1), True, (64, 1, 28, 28), (1024, 1, 28, 28)),  # Fashion-MNIST's
    ("lite-64-6", functools.partial(_lite, 64, 6, 3), True, (16, 3, 32, 32), (256, 3, 32, 32)),
    ("classification-192-16-L3", _classification, True, (2, 3, 224, 224), (64, 3, 224, 224)),
    ("classification-192-4-L3", functools.partial(_classification, depth=4), True, (2, 3, 224, 224), None),
    ("segmentation-256-16-L4", _segmentation, False, (1, 3, 256, 512), (1, 3, 512, 1024)),
    ("segmentation-256-4-L4", functools.partial(_segmentation, depth=4), False, (1, 3, 256, 512), None),
    ("super-resolution-144-4-L1", _super_resolution, False, (4, 3, 64, 64), (32, 3, 64, 64)),
)


#: Half types are slower than float32 on most CPUs; these say how much.
IN_BF16_ON_CPU = ("lite-64-6", "classification-192-4-L3")


def model_case(
    name: str, model: Callable[..., nn.Module], drops: bool, size: Size, training: bool, layout: str = "nchw",
    **options: Any,
) -> Case:  # fmt: skip
    """A training step of a WaveMix model, or its inference, on photographs."""

    def build(block: Callable[[], Mapping[str, Any]], exact: bool) -> nn.Module:
        # The models' own dropout, where they have one; inference ignores it.
        return model(**block(), **({"dropout": 0.0} if drops and exact else {}))

    def reference() -> Mapping[str, Any]:
        from wavemix_kernels.reference import Waveblock

        return {"block": Waveblock}

    blocks: dict[str, Callable[[], Mapping[str, Any]]] = {
        "upstream": lambda: {"block": UpstreamWaveblock},
        "reference": reference,
        "ours": dict,
    }
    dtype, autocast = torch.float32, options.get("autocast")
    passes = "training" if training else "inference"
    return Case(
        name=case_name("wavemix", name, arithmetic(dtype, autocast), layout, size, passes),
        group="wavemix",
        dtype=dtype,
        backward=training,
        inputs=images(size, layout),
        makers=module_makers(
            {provider: functools.partial(build, block) for provider, block in blocks.items()},
            training=training,
            layout=layout,
        ),
        limits=model_limits,
        stochastic=drops and training,
        tensor_cores=True,
        image=True,
        deep=True,
        extra=True,
        **options,
    )


def wavemix_cases() -> list[Case]:
    cases = []
    for name, model, drops, on_cpu, on_gpu in MODELS:
        for training in (True, False):
            quick = training and name == "lite-8-5"
            cases.append(model_case(name, model, drops, on_cpu, training, devices=CPU, quick=quick))
            if name in IN_BF16_ON_CPU:
                cases.append(model_case(name, model, drops, on_cpu, training, devices=CPU, autocast=BF16))
            for autocast in (BF16, None) if on_gpu is not None else ():
                cases.append(model_case(name, model, drops, on_gpu, training, devices=GPU, autocast=autocast, judged=8))
            if on_gpu is not None:  # the order that a GPU's library likes best; ours take it in any case
                given: Any = {"layout": "channels_last", "devices": GPU, "autocast": BF16, "judged": 8}
                cases.append(model_case(name, model, drops, on_gpu, training, **given))
    return cases
