"""The rest of pytorch_wavelets' transforms, against the original: lines, undecimated, dual-tree, scattering."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..harness.case import CPU, GPU, Case, Forward, Setting, arithmetic, case_name, feature_maps
from ..harness.gate import root_mean_square
from ..harness.rivals import upstream_wavelets

#: Name, the module of pytorch_wavelets by path and name, its arguments, and the size of the input.
_PLAN: list[tuple[str, str, str, dict[str, Any], tuple[int, ...]]] = [
    ("lines-db6", "dwt.transform1d", "DWT1DForward", {"J": 1, "wave": "db6"}, (64, 32, 4096)),
    # One level, as the original's further ones fail.
    ("swt-db4", "dwt.transform2d", "SWTForward", {"J": 1, "wave": "db4", "mode": "periodic"}, (8, 16, 128, 128)),
    ("dtcwt", "dtcwt.transform2d", "DTCWTForward", {"J": 3}, (8, 16, 128, 128)),
    ("scat", "scatternet.layers", "ScatLayer", {}, (8, 16, 128, 128)),
    ("scatj2", "scatternet.layers", "ScatLayerj2", {}, (8, 3, 128, 128)),
]
#: Products that one coefficient adds up, at most: two axes of 10 or so taps, three levels.
_TERMS = 64


def transform_case(name: str, path: str, kind: str, options: dict[str, Any], size: Any, backward: bool) -> Case:
    """`kind` of pytorch_wavelets on feature maps."""

    def made(package: str, setting: Setting) -> Forward:
        module = getattr(importlib.import_module(f"{package}.{path}"), kind)(**options)
        module = module.to(setting.device, setting.dtype)
        return lambda x: module(x)  # no module: its frozen filters are nobody's parameters

    def upstream(setting: Setting) -> Forward:
        forward = made(upstream_wavelets().__name__, setting)
        if kind != "SWTForward":
            return forward
        return lambda x: [bands.unflatten(1, (-1, 4)) for bands in forward(x)]  # as it documents

    def ours(setting: Setting) -> Forward:
        return made("wavemix_kernels.pytorch_wavelets", setting)

    def reference(setting: Setting) -> Forward:
        from wavemix_kernels import backend

        forward = ours(setting)

        def call(x: Tensor) -> Any:
            with backend("reference"):
                return forward(x)

        return call

    passes = "forward+backward" if backward else "forward"
    return Case(
        name=case_name("transforms", name, arithmetic(torch.float32), "nchw", size, passes),
        group="transforms",
        dtype=torch.float32,
        backward=backward,
        inputs=_inputs(size),
        makers={"upstream": upstream, "reference": reference, "ours": ours},
        limits=lambda exact, u: root_mean_square(exact.values, exact.terms, _TERMS, u),
        devices=CPU + GPU,
    )


def _inputs(size: tuple[int, ...]) -> Callable[[], list[Tensor]]:
    if len(size) == 4:
        return feature_maps(size, "nchw")
    n, c, length = size
    lines = feature_maps((n, c, 64, length // 64), "nchw")
    return lambda: [x.flatten(2) for x in lines()]


def transform_cases() -> list[Case]:
    return [transform_case(*row, backward=backward) for row in _PLAN for backward in (False, True)]
