"""The Haar transform on feature maps, against pytorch_wavelets, and as WTConv calls it, against its convolution."""

from __future__ import annotations

from typing import Any

import torch

from ..harness import photographs
from ..harness.case import CPU, GPU, Case, Expectation, Forward, Setting, arithmetic, case_name, feature_maps
from ..harness.gate import Limit, elementwise
from ..harness.rivals import cosmos_patcher, peers, upstream_wavelets, wtconv_transform


def haar_case(
    levels: int, dtype: torch.dtype, layout: str, size: tuple[int, int, int, int], backward: bool, **options: Any
) -> Case:
    """Analysis of feature maps, zero mode."""

    def upstream(setting: Setting) -> Forward:
        transform = upstream_wavelets().DWTForward(J=levels, wave="haar", mode="zero")
        return transform.to(setting.device, setting.dtype)

    def reference(setting: Setting) -> Forward:
        from wavemix_kernels.ops.haar.reference import analysis

        return lambda x: analysis(x, levels)  # strided slices: the form torch.compile fuses best

    def ours(setting: Setting) -> Forward:
        from wavemix_kernels import haar_dwt2d

        return lambda x: haar_dwt2d(x, levels)

    passes = "forward+backward" if backward else "forward"
    return Case(
        name=case_name("haar", f"J{levels}", arithmetic(dtype), layout, size, passes),
        group="haar",
        dtype=dtype,
        backward=backward,
        inputs=feature_maps(size, layout),
        makers={
            "upstream": upstream,
            **peers("haar", "zero", levels, backward, dtype),
            "reference": reference,
            "ours": ours,
        },
        limits=lambda exact, u: _limits(levels, exact, u),
        **options,
    )


def _limits(levels: int, exact: Expectation, u: float) -> list[Limit]:
    """Six roundings a level: two passes (rows, columns) of a rounded filter, a product and a sum.

    Absolute values go through the same butterfly with plus signs only: every band of a level is bounded by the LL
    of |x|, and a gradient by half the sum of its four |cotangents|.
    """
    from wavemix_kernels.ops.haar.reference import analysis

    magnitude = exact.inputs[0].abs()
    sizes, bands = [], []
    for _ in range(levels):
        sizes.append(magnitude.shape[-2:])
        magnitude = analysis(magnitude)[0]
        bands.append(magnitude.unsqueeze(2))
    magnitudes = [magnitude, *bands]
    roundings = [6 * levels + 2, *(6 * level + 2 for level in range(1, levels + 1))]
    if exact.cotangents:
        back, *highs = (cotangent.abs() for cotangent in exact.cotangents)
        for high, (rows, columns) in zip(reversed(highs), reversed(sizes), strict=True):
            quad = (back + high.sum(2)) / 2
            back = quad.repeat_interleave(2, -2).repeat_interleave(2, -1)[..., :rows, :columns]
        magnitudes.append(back)
        roundings.append(6 * levels + 2)
    return elementwise(magnitudes, roundings, u)


def wtconv_case(
    dtype: torch.dtype, layout: str, size: tuple[int, int, int, int], backward: bool, **options: Any
) -> Case:
    """WTConv's ``wt_function``; its backward pass is what ``iwt_function`` computes."""

    def upstream(setting: Setting) -> Forward:
        return wtconv_transform(size[1], setting.device, setting.dtype)

    def reference(setting: Setting) -> Forward:
        from wavemix_kernels.ops.haar.reference import analysis

        def bands(x: torch.Tensor) -> torch.Tensor:
            ll, (high,) = analysis(x)
            return torch.cat((ll.unsqueeze(2), high), 2)

        return bands

    def ours(setting: Setting) -> Forward:
        from wavemix_kernels.ops.haar.bands import haar_bands

        return haar_bands

    passes = "forward+backward" if backward else "forward"
    return Case(
        name=case_name("haar", "wtconv", arithmetic(dtype), layout, size, passes),
        group="haar",
        dtype=dtype,
        backward=backward,
        inputs=feature_maps(size, layout),
        makers={"upstream": upstream, "reference": reference, "ours": ours},
        limits=_bands_limits,
        **options,
    )


def _bands_limits(exact: Expectation, u: float) -> list[Limit]:
    """The limits of :func:`_limits` for one level, with the bands in one tensor."""
    from wavemix_kernels.ops.haar.reference import analysis

    magnitudes = [analysis(exact.inputs[0].abs())[0].unsqueeze(2)]
    if exact.cotangents:
        quad = exact.cotangents[0].abs().sum(2) / 2
        magnitudes.append(quad.repeat_interleave(2, -2).repeat_interleave(2, -1))
    return elementwise(magnitudes, [8] * len(magnitudes), u)


def cosmos_case(dtype: torch.dtype, size: tuple[int, int, int, int, int], backward: bool, **options: Any) -> Case:
    """Cosmos' patches of 4: two rounds of the transform along frames, rows and columns, all bands of the first round
    again."""
    rounds = 2

    def upstream(setting: Setting) -> Forward:
        return cosmos_patcher(rounds, setting.device, setting.dtype)

    def reference(setting: Setting) -> Forward:
        return lambda x: _cosmos(x, rounds)

    def ours(setting: Setting) -> Forward:
        from wavemix_kernels.ops.haar import haar_bands3d

        return lambda x: haar_bands3d(x, "cosmos3d", rounds=rounds)

    def video() -> list[torch.Tensor]:
        n, c, frames, h, w = size
        return [photographs.feature_maps(n * frames, c, h, w).unflatten(0, (n, frames)).transpose(1, 2).contiguous()]

    def limits(exact: Expectation, u: float) -> list[Limit]:
        # A round: three sums of two products, and the scale. Absolute values go through sums alone.
        with torch.enable_grad():
            x = exact.inputs[0].abs().requires_grad_()
            largest = _cosmos(x, rounds, signs=False)
        found = [largest.detach()]
        if exact.cotangents:
            found += torch.autograd.grad(largest, x, exact.cotangents[0].abs())
        return elementwise(found, [10 * rounds + 2] * len(found), u)

    passes = "forward+backward" if backward else "forward"
    return Case(
        name=case_name("haar", "cosmos3d", arithmetic(dtype), "nchw", size, passes),
        group="haar",
        dtype=dtype,
        backward=backward,
        inputs=video,
        makers={"upstream": upstream, "reference": reference, "ours": ours},
        limits=limits,
        **options,
    )


def _cosmos(x: torch.Tensor, rounds: int, signs: bool = True) -> torch.Tensor:
    """(N, C, 1 + frames, H, W) -> (N, 8**rounds C, ...), the first frame repeated to a patch's length."""
    x = torch.cat((x[:, :, :1].repeat_interleave(2**rounds, 2), x[:, :, 1:]), 2)
    for _ in range(rounds):
        parts = [x]
        for axis in (2, 3, 4):
            halves = [(part.unflatten(axis, (-1, 2)).unbind(axis + 1)) for part in parts]
            parts = [made for a, b in halves for made in ((a + b) / 2, (a - b if signs else a + b) / 2)]
        x = torch.cat(parts, 1)
    return x


def haar_cases() -> list[Case]:
    headline, small, odd = (4, 64, 256, 256), (64, 16, 32, 32), (8, 64, 57, 57)
    fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
    everywhere = CPU + GPU
    plan = [
        (4, fp32, "nchw", headline, everywhere),
        (1, fp32, "nchw", headline, everywhere),
        (1, fp32, "channels_last", headline, everywhere),
        (4, fp32, "channels_last", headline, everywhere),
        (1, bf16, "nchw", headline, everywhere),
        (4, bf16, "nchw", headline, everywhere),
        (1, bf16, "channels_last", headline, GPU),
        (4, bf16, "channels_last", headline, GPU),
        (1, fp16, "nchw", headline, everywhere),
        (4, fp16, "nchw", headline, GPU),
        (1, fp32, "nchw", small, everywhere),
        (2, fp32, "nchw", odd, everywhere),
    ]
    wtconv_plan = [
        (fp32, "nchw", headline, everywhere),
        (fp32, "channels_last", headline, everywhere),
        (bf16, "nchw", headline, everywhere),
    ]
    transforms = [
        haar_case(*what, backward, devices=devices, quick=backward and tuple(what) == (4, fp32, "nchw", headline))
        for *what, devices in plan
        for backward in (True, False)
    ]
    videos = [cosmos_case(fp32, (1, 3, 9, 256, 256), backward, devices=everywhere) for backward in (True, False)]
    return (
        transforms
        + videos
        + [
            wtconv_case(*what, backward, devices=devices)
            for *what, devices in wtconv_plan
            for backward in (True, False)
        ]
    )
