"""Multiples of 8 that Triton is told of, so that rows of 8, 24, 40 ... channels move in words. Multiples of 16 it sees
itself."""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def"
# (Triton's functions are traced, not called: their arguments have no Python types.)
import math

import triton
import triton.language as tl


def unit_of(*numbers: int) -> int:
    """The largest number up to 8 that divides all; 1 where there is nothing to tell."""
    return 1 if all(number % 16 == 0 for number in numbers) else math.gcd(8, *numbers)


@triton.jit
def multiple(number, UNIT: tl.constexpr):
    """The number, a multiple of UNIT."""
    return number // UNIT * UNIT if UNIT > 1 else number
