"""The one table of error bounds: derived from the arithmetic, never tuned.

An output is rounded once to its dtype (relative error u) after arithmetic in the accumulation dtype
(fp32 for the half types).
"""

from __future__ import annotations

import torch
from torch import Tensor

from wavemix_kernels.backends import triton_interpreted

#: Unit roundoff: half the distance between 1 and the next number.
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
#: Half of the smallest subnormal: the absolute error of rounding near zero.
UNDERFLOW = {torch.float64: 0.0, torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 0.0}
DTYPES = tuple(UNIT_ROUNDOFF)
#: A float64 result against one recorded from another float64 implementation.
GOLDEN = 1e-10


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def stored_roundoff(dtype: torch.dtype, backend: str = "") -> float:
    """Relative error of storing one value. Triton's interpreter (up to 3.9 at least) truncates fp32 to bf16 where a
    GPU rounds to nearest: twice the error."""
    truncates = backend == "triton" and dtype == torch.bfloat16 and triton_interpreted()
    return UNIT_ROUNDOFF[dtype] * (2 if truncates else 1)


def haar_bound(
    exact: Tensor, dtype: torch.dtype, levels: int, peak: float, roundings: int = 1, backend: str = ""
) -> Tensor:
    """|error| allowed for a Haar transform of values up to `peak`.

    A level sums four values in two roundings (the factor 1/2 is exact), and what it sums is at most doubled,
    so `levels` of them err by at most 2*levels roundoffs of a value of size peak*2**levels. `roundings` more at the
    output's own precision: one for storing it, and one for each further launch or sum that goes through memory.
    """
    u, low = UNIT_ROUNDOFF[accumulation(dtype)], stored_roundoff(dtype, backend)
    stored = roundings * (low * exact.abs() + UNDERFLOW[dtype])
    if roundings > 1:
        stored = stored + (roundings - 1) * low * peak * 2**levels
    return 2 * levels * u * peak * 2**levels + stored


def stored(exact: Tensor, dtype: torch.dtype, backend: str = "") -> Tensor:
    """The error of rounding a result to its dtype, once."""
    return stored_roundoff(dtype, backend) * exact.abs() + UNDERFLOW[dtype]


def sum_bound(
    exact: Tensor, sizes: Tensor, terms: float, dtype: torch.dtype, *, operands: float = 0, backend: str = ""
) -> Tensor:
    """|error| allowed for a sum of products, `terms` roundings long, of whose absolute values `sizes` is the sum
    [Higham, section 3.1]. A float64 reference errs as much itself.

    Half types: `operands` roundings to the dtype on the way, and one that stores the result.
    """
    wide = accumulation(dtype)
    off = terms * UNIT_ROUNDOFF[wide] * (2 if dtype == torch.float64 else 1) * sizes
    if wide == dtype:
        return off
    low = stored_roundoff(dtype, backend)
    off = off + operands * (low * sizes + UNDERFLOW[dtype])
    return off + low * (exact.abs() + off) + UNDERFLOW[dtype]


def assert_within(actual: Tensor, exact: Tensor, bound: Tensor, what: str = "") -> None:
    """Every element of `actual` within `bound` of the float64 `exact`; NaN and infinity must agree exactly."""
    actual, exact, bound = actual.detach().double().cpu(), exact.detach().double().cpu(), bound.detach().double().cpu()
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    finite = exact.isfinite()
    torch.testing.assert_close(actual[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True)
    error = (actual - exact).abs()[finite]
    bad = ~(error <= bound[finite])  # a NaN in `actual` compares false
    if bad.any():
        worst = (error - bound[finite]).nan_to_num(nan=float("inf")).argmax()
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} elements beyond the bound; worst: got {actual[finite][worst]}, "
            f"expected {exact[finite][worst]} within {bound[finite][worst]}"
        )
