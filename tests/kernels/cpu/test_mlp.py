"""The CPU's pointwise MLP below its op: Philox, dropout's definition, GELU's accuracy, strided rows."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.ops.contract import untouched
from tests.tolerances import DTYPES, UNIT_ROUNDOFF, accumulation, assert_within, stored
from wavemix_kernels import _native
from wavemix_kernels.ops.mlp import reference

if (reason := _native.cpu_reason()) is not None:
    pytest.skip(f"CPU kernels: {reason}", allow_module_level=True)
core = _native.core

SEED = 0x9E3779B97F4A7C15  # uses all 64 bits
ids = {"ids": lambda value: str(value).removeprefix("torch.").replace(" ", "")}


# --- Philox and dropout's definition ---------------------------------------------------------------------


def keep_mask(rows: int, cols: int, p: float, seed: int, first_row: int = 0) -> Tensor:
    """The definition in csrc/cpu/philox.h, by the reference's Philox."""
    groups = -(-cols // 8)
    words = reference.philox(torch.arange(rows * groups) + first_row * groups, seed)
    low_first = torch.stack((words % 2**16, words // 2**16), -1)
    return low_first.reshape(rows, groups * 8)[:, :cols] < round((1 - p) * 2**16)


@pytest.mark.parametrize("counter, key, words", [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
], ids=["zeros", "ones", "pi"])  # fmt: skip
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    """The vectors published with Random123 (kat_vectors), by the kernel and by the reference."""
    assert tuple(core.philox4x32_cpu(counter, key)) == words
    if counter[2:] == (0, 0):  # the reference's counters have two words
        assert reference.philox(torch.tensor(counter[0]), 0).tolist() == list(words)


# --- GELU and dropout ------------------------------------------------------------------------------------


def matrix(tensor: Tensor) -> tuple[int, int]:
    assert tensor.stride(1) == 1 or tensor.shape[1] <= 1
    return tensor.data_ptr(), tensor.stride(0)


def through(
    pre: Tensor, p: float = 0.0, seed: int = SEED, first_row: int = 0, threads: int = 1
) -> tuple[Tensor, Tensor]:
    """dropout(gelu(pre)) and its derivative, by an MLP whose two products change nothing. Backward makes the same
    hidden layer again, and nothing is written beyond the rows of strided outputs."""
    (rows, cols), code = pre.shape, _native.DTYPES[pre.dtype]
    eye, *weights = torch.eye(cols, dtype=pre.dtype), *(torch.empty(cols, cols, dtype=pre.dtype) for _ in range(2))
    one, places = torch.ones_like(pre), (0, 0, eye.data_ptr(), 0, eye.data_ptr(), 0)
    hidden, again, by_pre = (torch.full((rows, cols + gap), math.nan, dtype=pre.dtype)[:, :cols] for gap in (3, 2, 1))
    given = code, (rows, cols, 0, cols, cols), matrix(pre), (0, 0), places, p, seed, first_row
    core.mlp_forward_cpu(*given, matrix(hidden), threads)
    made = weights[0].data_ptr(), 0, weights[1].data_ptr(), 0
    core.mlp_backward_cpu(*given, matrix(one), matrix(by_pre), (0, 0), matrix(again), made, threads)
    torch.testing.assert_close(again, hidden, rtol=0, atol=0, equal_nan=True)
    assert all(map(untouched, (hidden, again, by_pre)))
    return hidden, by_pre


def exact_gelu(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gelu, its derivative, and the sum of that derivative's two terms' sizes, in float64, accurate in the tail."""
    x = x.double()
    t = x.abs()
    density = torch.exp(-0.5 * t * t) / math.sqrt(2 * math.pi)
    tail = 0.5 * torch.special.erfcx(t / math.sqrt(2)) * torch.exp(-0.5 * t * t)
    cdf = torch.where(x > 0, 1 - tail, tail)
    return x.clamp(min=0) - t * tail, cdf + x * density, cdf + t * density


def gelu_bounds(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """|error| allowed for gelu and for its derivative, before either is rounded to a half type.

    float: csrc/cpu/common/gelu.h. double: erfc and exp amplify the rounding of their argument by t^2 and t^2/2, in the
    kernel and in this file's reference.
    """
    value, _, terms = exact_gelu(x)
    if accumulation(dtype) == torch.float64:
        u = (8 + 3 * x.double().square()) * UNIT_ROUNDOFF[torch.float64]
        return u * value.abs() + 2.0**-1070, u * terms + 2.0**-1070
    u = UNIT_ROUNDOFF[torch.float32]
    if _native.by_matrix_units(dtype):  # csrc/cpu/mlp/gelu_of_bf16.h
        return 2.0**-12.9 * value.abs() + 2.0**-125, 2.0**-12.9 * terms + 2.0**-123
    return 4.25 * u * value.abs().clamp(min=2.0**-126), 4.5 * u * terms.clamp(min=2.0**-126)


@pytest.mark.parametrize("dtype", DTYPES, **ids)
def test_gelu_is_accurate_everywhere(dtype: torch.dtype) -> None:
    """Every binade, both signs, down to the subnormals: the bound csrc/cpu/gelu.h states."""
    density = 20 if dtype == torch.float32 else 17
    bits = torch.arange(0, 0x41700000, 0x41700000 >> density, dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    x = torch.cat([x, -x, torch.linspace(-15, 15, 1 << (density - 1))])
    x = x[: x.numel() // 16 * 16].view(-1, 16).to(dtype)
    value, slope, _ = exact_gelu(x)
    half = accumulation(dtype) != dtype  # stored with a rounding; bfloat16 has subnormals of 2**-133
    bounds = [
        b + (stored(e, dtype) + 2.0**-134 if half else 4 * UNIT_ROUNDOFF[dtype] * e.abs() * (dtype == torch.float64))
        for e, b in zip((value, slope), gelu_bounds(x, dtype), strict=True)
    ]  # float64: products by one, in the kernel and in this file's reference
    hidden, by_pre = through(x)
    assert_within(hidden, value, bounds[0], "gelu")
    assert_within(by_pre, slope, bounds[1], "gelu'")


@pytest.mark.parametrize("dtype", DTYPES, **ids)
def test_gelu_of_infinity_and_nan(dtype: torch.dtype) -> None:
    # A column of its own for each row: products with other columns' zeros would spread them.
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0], dtype=dtype).repeat(7)[:, None]
    value, slope = [math.inf, 0.0, math.nan, 0.0, 0.0], [1.0, 0.0, math.nan, 0.5, 0.5]
    expected, expected_slope = (torch.tensor(v, dtype=dtype).repeat(7)[:, None] for v in (value, slope))
    hidden, gradient = through(x)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(gradient, expected_slope, rtol=0, atol=1e-37, equal_nan=True)
    dropped = through(x, 0.5)[0][~keep_mask(35, 1, 0.5, SEED)]
    assert torch.equal(dropped, torch.zeros_like(dropped)), "what is dropped is 0, even where it was NaN or infinite"


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("seed, first_row", [(0, 0), (2**64 - 1, 1), (SEED, 2**31 - 3), (12345, (1 << 33) + 7)])
def test_dropout_keeps_what_the_definition_says(dtype: torch.dtype, seed: int, first_row: int) -> None:
    """Forward and backward, whatever threads take which rows; columns that fill whole groups have a path of their
    own."""
    for (rows, cols), p in itertools.product(
        [(1, 1), (3, 5), (9, 16), (5, 67), (7, 514), (300, 128)], [0.1, 0.5, 0.99]
    ):
        pre = torch.full((rows, cols), 20.0, dtype=dtype)  # gelu(20) = 20 in every type
        for t in through(pre, p, seed, first_row, threads=1 + cols % 5):
            assert torch.equal(t != 0, keep_mask(rows, cols, p, seed, first_row)), (rows, cols, p)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_is_random(p: float) -> None:
    """Keep rate and correlations within five standard deviations. Seeds are fixed: it passes always or never."""
    rows, cols = 512, 512
    pre = torch.full((rows, cols), 20.0)

    def kept(seed: int) -> Tensor:
        return (through(pre, p, seed)[0] != 0).double()

    first, n = kept(7), rows * cols
    assert abs(first.mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    for axis in (0, 1):  # every row's and every column's own rate; 1024 of them, hence six
        assert (first.mean(axis) - (1 - p)).abs().max() < 6 * math.sqrt(p * (1 - p) / rows)
    z = (first - (1 - p)) / math.sqrt(p * (1 - p))
    pairs = {"neighbouring column": (z[:, 1:], z[:, :-1]), "neighbouring row": (z[1:], z[:-1])}
    pairs |= {f"{lag} columns on": (z[:, lag:], z[:, :-lag]) for lag in (2, 3, 4, 8, 64)}
    for seed in (8, 7 + (1 << 32), 7 ^ (1 << 63)):
        pairs[f"seed {seed}"] = (z, (kept(seed) - (1 - p)) / math.sqrt(p * (1 - p)))
    for name, (a, b) in pairs.items():
        assert abs((a * b).mean()) < 5 / math.sqrt(a.numel()), name
    # All sixteen patterns of a group's four lanes, chi-square with 15 degrees of freedom (mean 15, deviation 5.5).
    pattern = (first.view(-1, 4) @ torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)).long()
    ones = torch.tensor([bin(k).count("1") for k in range(16)])
    expected = n / 4 * (1 - p) ** ones.double() * p ** (4 - ones).double()
    chi_square = ((torch.bincount(pattern, minlength=16) - expected).square() / expected).sum()
    assert chi_square < 15 + 5 * math.sqrt(30)
