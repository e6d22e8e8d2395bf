"""Wavelets other than Haar, three levels on feature maps, against pytorch_wavelets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..harness.case import CPU, GPU, Case, Expectation, Forward, Setting, arithmetic, case_name, feature_maps
from ..harness.gate import Limit, elementwise
from ..harness.rivals import Unavailable, peers, upstream_wavelets

if TYPE_CHECKING:
    from wavemix_kernels.ops.dwt.reference import Filters

LEVELS = 3


def dwt_case(
    wave: str, mode: str, dtype: torch.dtype, layout: str, size: tuple[int, int, int, int], backward: bool,
    devices: tuple[str, ...],
) -> Case:  # fmt: skip
    """Analysis of feature maps by wavelet `wave` with borders as `mode` says."""

    def upstream(setting: Setting) -> Forward:
        transform = upstream_wavelets().DWTForward(J=LEVELS, wave=wave, mode=mode)
        return transform.to(setting.device, setting.dtype)

    def reference(setting: Setting) -> Forward:
        from wavemix_kernels.ops.dwt.reference import separable_dwt2d

        filters = _filters(wave, setting)
        return lambda x: separable_dwt2d(x, filters, LEVELS, mode=mode)

    def ours(setting: Setting) -> Forward:
        from wavemix_kernels.ops.dwt import dwt2d

        filters = _filters(wave, setting)
        return lambda x: dwt2d(x, filters, LEVELS, mode=mode)

    passes = "forward+backward" if backward else "forward"
    return Case(
        name=case_name("dwt", f"{wave}-{mode}", arithmetic(dtype), layout, size, passes),
        group="dwt",
        dtype=dtype,
        backward=backward,
        inputs=feature_maps(size, layout),
        makers={
            "upstream": upstream,
            **peers(wave, mode, LEVELS, backward, dtype),
            "reference": reference,
            "ours": ours,
        },
        limits=lambda exact, u: _limits(wave, mode, exact, u),
        devices=devices,
        quick=backward and (wave, mode, dtype, layout) == ("db4", "symmetric", torch.float32, "nchw"),
    )


def _filters(wave: str, setting: Setting) -> Filters:
    """The analysis filters, mirrored, in the arithmetic type."""
    try:
        from wavemix_kernels.pytorch_wavelets import DWTForward

        return DWTForward(1, wave).to(setting.device)._filters()
    except ImportError as error:
        raise Unavailable(str(error)) from error


def _limits(wave: str, mode: str, exact: Expectation, u: float) -> list[Limit]:
    """Each level adds up as many products as both axes' filters have taps, of filters rounded once.

    Their absolute values add up to the transform of |x| by |filters|; these modes extend with plus signs only. The
    gradient's are that transform's, of the absolute cotangents.
    """
    from wavemix_kernels.ops.dwt.reference import Filters, separable_dwt2d

    filters = Filters(*(f.double().abs() for f in _filters(wave, Setting(torch.device("cpu"), torch.float64))))
    with torch.enable_grad():
        x = exact.inputs[0].abs().requires_grad_()
        ll, highs = separable_dwt2d(x, filters, LEVELS, mode=mode)
    magnitudes = [ll.detach(), *(high.detach() for high in highs)]
    level = 2 * (filters.low_h.numel() + filters.low_w.numel()) + 2
    roundings = [LEVELS * level, *(level * (i + 1) for i in range(LEVELS))]
    if exact.cotangents:
        magnitudes += torch.autograd.grad([ll, *highs], x, [c.abs() for c in exact.cotangents])
        roundings.append(LEVELS * level)
    return elementwise(magnitudes, roundings, u)


def dwt_cases() -> list[Case]:
    headline = (8, 16, 256, 256)
    fp32, bf16 = torch.float32, torch.bfloat16
    plan = [
        *((wave, mode, fp32, "nchw", CPU + GPU) for wave in ("db4", "bior4.4", "sym7")
          for mode in ("symmetric", "periodization")),
        ("db4", "symmetric", fp32, "channels_last", CPU + GPU),
        ("db4", "symmetric", bf16, "nchw", CPU + GPU),
        ("db2", "zero", fp32, "nchw", CPU + GPU),
    ]  # fmt: skip
    return [
        dwt_case(wave, mode, dtype, layout, headline, backward, devices)
        for wave, mode, dtype, layout, devices in plan
        for backward in (True, False)
    ]
