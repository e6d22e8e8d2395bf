"""The CPU kernels behind the Waveblock, called as the ops call them: the pointwise MLP, batch normalisation.

The Haar kernels have their own file; here the compiled core is tested below its ops, against float64 torch.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tolerances import DTYPES, UNDERFLOW, UNIT_ROUNDOFF, accumulation, assert_within
from wavemix_kernels import _native

if _native.core is None:
    pytest.skip(f"CPU kernels: {_native.core_error}", allow_module_level=True)
core = _native.core

#: The kernels leave smaller inputs to one thread.
SERIAL_ELEMENTS = 1 << 15
ISA_VARIABLE = "WAVEMIX_KERNELS_CPU_ISA"
SEED = 0x9E3779B97F4A7C15  # uses all 64 bits
ids = {"ids": lambda value: str(value).removeprefix("torch.").replace(" ", "")}


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """The references are small: torch's own threads would only get in the kernels' way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def thread_counts(elements: int) -> tuple[int, ...]:
    return (1, 2) if elements >= SERIAL_ELEMENTS else (1,)


# --- Philox and dropout's definition ---------------------------------------------------------------------


def philox4x32(counter: Sequence[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
    """Philox4x32-10 in NumPy, over arrays of counters (uint64 holding 32-bit words)."""
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)
    k0, k1 = key
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p, q = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (q >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            q & low,
            (p >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def keep_mask(rows: int, cols: int, p: float, seed: int, first_row: int = 0) -> Tensor:
    """The definition in csrc/cpu/mlp/philox.h, element by element."""
    row, col = np.meshgrid(np.arange(rows, dtype=np.uint64), np.arange(cols, dtype=np.uint64), indexing="ij")
    group = (row + np.uint64(first_row)) * np.uint64((cols + 3) // 4) + col // np.uint64(4)
    zero = np.zeros_like(group)
    counter = [group & np.uint64(0xFFFFFFFF), group >> np.uint64(32), zero, zero]
    words = np.stack(philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)))
    word = np.take_along_axis(words, (col % np.uint64(4)).astype(np.int64)[None], axis=0)[0]
    return torch.from_numpy(word < np.uint64(round((1 - p) * 2**32)))


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    """The vectors published with Random123 (kat_vectors), by the kernel and by this file's own reference."""
    assert tuple(core.philox4x32_cpu(counter, key)) == words
    assert tuple(int(w) for w in philox4x32([np.uint64(c) for c in counter], key)) == words


# --- GELU and dropout ------------------------------------------------------------------------------------


def matrix(tensor: Tensor) -> tuple[int, int]:
    assert tensor.stride(1) == 1 or tensor.shape[1] <= 1
    return tensor.data_ptr(), tensor.stride(0)


def identity_mlp(
    pre: Tensor, p: float, seed: int, first_row: int
) -> tuple[tuple[int, ...], dict[str, object], list[Tensor]]:
    """Arguments of an MLP whose two products change nothing, so that its hidden layer can be seen, and their memory."""
    rows, cols = pre.shape
    eye = torch.eye(cols, dtype=pre.dtype)
    weight = eye.data_ptr()
    arguments: dict[str, object] = {
        "dtype": _native.DTYPES[pre.dtype], "size": (rows, cols, 0, cols, cols), "x": matrix(pre), "second": (0, 0),
        "tensors": (0, 0, weight, 0, weight, 0), "p": p, "seed": seed, "first_row": first_row,
    }  # fmt: skip
    return (rows, cols), arguments, [eye]


def forward(pre: Tensor, out: Tensor, p: float = 0.0, seed: int = SEED, first_row: int = 0, threads: int = 1) -> Tensor:
    """dropout(gelu(pre)) into `out`."""
    _, arguments, _kept = identity_mlp(pre, p, seed, first_row)
    core.mlp_forward_cpu(**arguments, out=matrix(out), threads=threads)
    return out


def backward(
    pre: Tensor, grad: Tensor, p: float = 0.0, seed: int = SEED, first_row: int = 0, threads: int = 1
) -> tuple[Tensor, Tensor]:
    """(hidden, gradient by pre)."""
    (rows, cols), arguments, _kept = identity_mlp(pre, p, seed, first_row)
    hidden, by_pre = padded(rows, cols, pre.dtype, 2), padded(rows, cols, pre.dtype, 1)
    weights = [torch.empty(cols, cols, dtype=pre.dtype) for _ in range(2)]
    core.mlp_backward_cpu(
        **arguments, grad=matrix(grad), d_x=matrix(by_pre), d_second=(0, 0), out=matrix(hidden),
        d_tensors=(weights[0].data_ptr(), 0, weights[1].data_ptr(), 0), threads=threads,
    )  # fmt: skip
    return hidden, by_pre


def padded(rows: int, cols: int, dtype: torch.dtype, gap: int) -> Tensor:
    """NaN everywhere, rows `cols + gap` apart."""
    return torch.full((rows, cols + gap), math.nan, dtype=dtype)[:, :cols]


def untouched(view: Tensor) -> bool:
    """Whether the elements around a `padded` view are still NaN."""
    base = view._base
    return base is None or bool(base[:, view.shape[1] :].isnan().all())


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
    return 4.25 * u * value.abs().clamp(min=2.0**-126), 4.5 * u * terms.clamp(min=2.0**-126)


def rounded(exact: Tensor, bound: Tensor, dtype: torch.dtype, products: int) -> Tensor:
    """`bound`, after `products` more roundings in the arithmetic type and one to `dtype`."""
    u = UNIT_ROUNDOFF[accumulation(dtype)]
    if dtype == torch.float64:
        products *= 2  # the float64 reference has them too
    size = exact.abs() + bound
    stored = UNIT_ROUNDOFF[dtype] * size + UNDERFLOW[dtype] if accumulation(dtype) != dtype else 0
    return bound + products * u * size + stored


SHAPES = [(1, 1), (1, 64), (3, 5), (7, 16), (5, 67), (33, 130), (2, 1030), (40, 1024)]


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gelu_dropout(dtype: torch.dtype, gap: int, p: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for rows, cols in SHAPES:
        pre = padded(rows, cols, dtype, gap).copy_(
            3 * torch.randn(rows, cols, generator=generator, dtype=torch.float64)
        )
        grad = padded(rows, cols, dtype, gap + 1).copy_(
            torch.randn(rows, cols, generator=generator, dtype=torch.float64)
        )
        value, slope, _ = exact_gelu(pre)
        value_bound, slope_bound = gelu_bounds(pre, dtype)
        scale = keep_mask(rows, cols, p, SEED).double() / (1 - p)
        what = f"{rows}x{cols}"

        hidden = forward(pre, padded(rows, cols, dtype, gap), p)
        assert_within(hidden, scale * value, rounded(scale * value, scale * value_bound, dtype, 2), f"{what} forward")
        assert untouched(hidden)

        exact_grad = scale * slope * grad.double()
        bound = rounded(exact_grad, scale * slope_bound * grad.double().abs(), dtype, 3)
        again, by_pre = backward(pre, grad, p)
        assert torch.equal(again, hidden), f"{what}: backward's hidden layer differs from forward's"
        assert_within(by_pre, exact_grad, bound, f"{what} backward")
        assert untouched(again)
        assert untouched(by_pre)


def test_gelu_is_accurate_everywhere() -> None:
    """Every binade, both signs, down to the subnormals: the bound csrc/cpu/common/gelu.h states."""
    bits = torch.arange(0, 0x41700000, 0x41700000 // (1 << 20), dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    x = torch.cat([x, -x, torch.linspace(-15, 15, 1 << 19)])
    x = x[: x.numel() // 16 * 16].view(-1, 16)
    value, slope, _ = exact_gelu(x)
    value_bound, slope_bound = gelu_bounds(x, torch.float32)
    assert_within(forward(x, torch.empty_like(x)), value, value_bound, "gelu")
    assert_within(backward(x.clone(), torch.ones_like(x))[1], slope, slope_bound, "gelu'")


@pytest.mark.parametrize("dtype", DTYPES, **ids)
def test_gelu_of_infinity_and_nan(dtype: torch.dtype) -> None:
    # A column of its own for each row: products with other columns' zeros would spread them.
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0], dtype=dtype).repeat(7)[:, None]
    value, slope = [math.inf, 0.0, math.nan, 0.0, 0.0], [1.0, 0.0, math.nan, 0.5, 0.5]
    expected, expected_slope = (torch.tensor(v, dtype=dtype).repeat(7)[:, None] for v in (value, slope))
    torch.testing.assert_close(forward(x, torch.empty_like(x)), expected, rtol=0, atol=0, equal_nan=True)
    gradient = backward(x, torch.ones_like(x))[1]
    torch.testing.assert_close(gradient, expected_slope, rtol=0, atol=1e-37, equal_nan=True)
    kept = keep_mask(35, 1, 0.5, SEED)
    dropped = forward(x, torch.empty_like(x), 0.5)[~kept]
    assert torch.equal(dropped, torch.zeros_like(dropped)), "what is dropped is 0, even where it was NaN or infinite"


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("seed, first_row", [(0, 0), (2**64 - 1, 1), (SEED, 2**31 - 3), (12345, (1 << 33) + 7)])
def test_dropout_keeps_what_the_definition_says(dtype: torch.dtype, seed: int, first_row: int) -> None:
    for (rows, cols), p in itertools.product([(1, 1), (3, 5), (9, 16), (5, 67), (7, 514)], [0.1, 0.5, 0.99]):
        pre = torch.full((rows, cols), 20.0, dtype=dtype)  # gelu(20) = 20 in every type
        kept = forward(pre, torch.empty_like(pre), p, seed, first_row) != 0
        assert torch.equal(kept, keep_mask(rows, cols, p, seed, first_row)), (rows, cols, p)
        again, by_pre = backward(pre, torch.ones_like(pre), p, seed, first_row)
        assert torch.equal(again != 0, kept)
        assert torch.equal(by_pre != 0, kept)


def test_dropout_at_the_ends() -> None:
    pre = torch.linspace(-3, 3, 999)[None].repeat(2, 1)
    nothing = forward(pre, torch.full_like(pre, math.nan), 1.0)
    assert torch.equal(nothing, torch.zeros_like(pre))
    hidden, gradient = backward(pre.clone(), torch.ones_like(pre), 1.0)
    assert torch.equal(hidden, nothing)
    assert torch.equal(gradient, nothing)
    everything = forward(pre, torch.empty_like(pre), 1e-12)  # rounds to a threshold of 2^32
    assert torch.equal(everything, forward(pre, torch.empty_like(pre), 0.0))


def test_dropout_does_not_depend_on_chunks_or_threads() -> None:
    rows, cols, p = 300, 134, 0.4
    pre = torch.randn(rows, cols, generator=torch.Generator().manual_seed(2))
    whole = forward(pre, torch.empty_like(pre), p)
    for threads in (2, 3):
        assert torch.equal(forward(pre, torch.empty_like(pre), p, threads=threads), whole)
    parts = [
        forward(part, torch.empty_like(part), p, first_row=start)
        for start, part in ((start, pre[start : start + 37]) for start in range(0, rows, 37))
    ]
    assert torch.equal(torch.cat(parts), whole)
    # Columns that fill whole groups take another path, in which rows are joined.
    pre = torch.randn(512, 128)
    whole = forward(pre, torch.empty_like(pre), p)
    halves = [forward(pre[i : i + 256], torch.empty(256, 128), p, first_row=i, threads=2) for i in (0, 256)]
    assert torch.equal(torch.cat(halves), whole)
    strided = torch.empty(512, 130)[:, :128].copy_(pre)
    assert torch.equal(forward(strided, torch.empty(512, 131)[:, :128], p), whole)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_is_random(p: float) -> None:
    """Keep rate and correlations within five standard deviations. Seeds are fixed: it passes always or never."""
    rows, cols = 512, 512
    pre = torch.full((rows, cols), 20.0)

    def kept(seed: int) -> Tensor:
        return (forward(pre, torch.empty_like(pre), p, seed) != 0).double()

    first, n = kept(7), rows * cols
    assert abs(first.mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    for axis in (0, 1):  # every row's and every column's own rate; 1024 of them, hence six
        assert (first.mean(axis) - (1 - p)).abs().max() < 6 * math.sqrt(p * (1 - p) / rows)
    z = (first - (1 - p)) / math.sqrt(p * (1 - p))
    pairs = {"neighbouring column": (z[:, 1:], z[:, :-1]), "neighbouring row": (z[1:], z[:-1])}
    pairs |= {f"{lag} columns on": (z[:, lag:], z[:, :-lag]) for lag in (2, 3, 4, 64)}
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


@pytest.mark.parametrize(
    "change, message",
    [
        ({"p": 1.5}, "p: expected a probability, 0 to 1, got 1.5"),
        ({"p": math.nan}, "p: expected a probability"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"dtype": 9}, "dtype: unknown code 9"),
        ({"size": (1, 2, 3)}, "size: expected"),
        ({"x": (0, 1, 1)}, "x: expected an address and a row stride, got 3 integers"),
        ({"tensors": (0,)}, "tensors: expected"),
    ],
)
def test_mlp_errors(change: dict[str, object], message: str) -> None:
    x = torch.zeros(2, 3)
    _, arguments, _kept = identity_mlp(x, 0.5, SEED, 0)
    with pytest.raises(ValueError, match=message):
        core.mlp_forward_cpu(**{**arguments, "out": matrix(x), "threads": 1, **change})


# --- The whole pointwise MLP -----------------------------------------------------------------------------

MLP_SIZES = [  # rows, columns of x, of second, of the hidden layer, of the output
    (1, 1, 0, 1, 1),
    (7, 3, 2, 5, 9),
    (300, 12, 6, 24, 8),
    (130, 49, 0, 67, 50),
    (257, 64, 32, 128, 64),
    (40, 33, 17, 516, 3),
]


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("size", MLP_SIZES, **ids)
def test_mlp(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    """Forward and all gradients with everything present, from strided rows, against float64; one and three threads."""
    rows, a, b, k, o = size
    p, generator = 0.25, torch.Generator().manual_seed(rows)
    wide = accumulation(dtype)

    def made(*shape: int, gap: int = 0, scale: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        value = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return padded(*shape, of, gap).copy_(value) if len(shape) == 2 else value.to(of)

    x, second, grad = made(rows, a, gap=3), made(rows, b, gap=1), made(rows, o, gap=2)
    scale, shift = made(b, of=wide), made(b, of=wide)
    w1, b1 = made(k, a + b, scale=(a + b) ** -0.5), made(k)
    w2, b2 = made(o, k, scale=k**-0.5), made(o)
    pointers = [t.data_ptr() if t.numel() else 0 for t in (scale, shift, w1, b1, w2, b2)]
    arguments: dict[str, object] = {
        "dtype": _native.DTYPES[dtype], "size": size, "x": matrix(x), "second": matrix(second), "tensors": pointers,
        "p": p, "seed": SEED, "first_row": 0,
    }  # fmt: skip

    # The same in float64, with the sizes of all sums' terms for the bounds.
    leaves = [t.double().requires_grad_() for t in (x, second, w1, b1, w2, b2)]
    xd, sd, w1d, b1d, w2d, b2d = leaves
    joined = torch.cat((xd, sd * scale.double() + shift.double()), 1)
    joined.retain_grad()
    keep = keep_mask(rows, k, p, SEED).double() / (1 - p)
    pre = joined @ w1d.t() + b1d
    hidden = torch.nn.functional.gelu(pre) * keep
    expected = hidden @ w2d.t() + b2d
    expected.backward(grad.double())

    u = UNIT_ROUNDOFF[wide]
    with torch.no_grad():
        # A sum of n terms is off by n u times the sum of their sizes [Higham, section 3.1]; gelu's slope is below 1.13.
        pre_off = (a + b + 3) * u * (joined.abs() @ w1d.abs().t() + b1d.abs())
        hidden_off = keep * (1.13 * pre_off + 6 * u * (hidden.abs() + pre.abs()))
        out_off = hidden_off @ w2d.abs().t() + (k + 2) * u * (hidden.abs() @ w2d.abs().t() + b2d.abs())
        g_hidden = grad.double().abs() @ w2d.abs()
        # gelu'' is at most 0.8.
        pre_grad = 1.13 * keep * g_hidden
        pre_grad_off = keep * g_hidden * (0.8 * pre_off + (o + 8) * u * 1.13)
        d_x_off = pre_grad_off @ w1d.abs() + (k + 1) * u * (pre_grad @ w1d.abs())
        sums = rows + 4
        d_w1_off = pre_grad_off.t() @ joined.abs() + sums * u * (pre_grad.t() @ joined.abs())
        d_w2_off = grad.double().abs().t() @ (hidden_off + sums * u * hidden.abs())
        d_b1_off = (pre_grad_off + sums * u * pre_grad).sum(0)
        d_b2_off = sums * u * grad.double().abs().sum(0)

    def check(got: Tensor, want: Tensor | None, off: Tensor, what: str) -> None:
        assert want is not None
        stored = UNIT_ROUNDOFF[dtype] * (want.abs() + off) + UNDERFLOW[dtype] if wide != dtype else 0
        # The float64 reference errs as a float64 kernel does.
        assert_within(got, want, (2 if dtype == torch.float64 else 1) * off + stored, f"{what} {size}")

    for threads in (1, 3):
        out = padded(rows, o, dtype, 1)
        core.mlp_forward_cpu(**arguments, out=matrix(out), threads=threads)
        check(out, expected.detach(), out_off, "output")
        assert untouched(out)
        d_x, d_second, again = padded(rows, a, dtype, 2), padded(rows, b, dtype, 1), padded(rows, o, dtype, 4)
        weights = [torch.full(t.shape, math.nan, dtype=dtype) for t in (w1, b1, w2, b2)]
        core.mlp_backward_cpu(
            **arguments, grad=matrix(grad), d_x=matrix(d_x), d_second=matrix(d_second), out=matrix(again),
            d_tensors=[t.data_ptr() for t in weights], threads=threads,
        )  # fmt: skip
        assert torch.equal(again, out), "backward's output differs from forward's"
        assert joined.grad is not None
        check(d_x, joined.grad[:, :a], d_x_off[:, :a], "gradient of x")
        check(d_second, joined.grad[:, a:], d_x_off[:, a:], "gradient of the affine map of second")
        offs = (d_w1_off, d_b1_off, d_w2_off, d_b2_off)
        for name, got, leaf, off in zip(("w1", "b1", "w2", "b2"), weights, leaves[2:], offs, strict=True):
            check(got, leaf.grad, off, f"gradient of {name}")
        assert all(untouched(t) for t in (d_x, d_second, again))


def test_mlp_of_nothing() -> None:
    """No rows: nothing is written but zero gradients of the weights."""
    x, weights = torch.empty(0, 3), [torch.full((3, 3), math.nan) for _ in range(2)]
    _, arguments, _kept = identity_mlp(x, 0.5, SEED, 0)
    core.mlp_forward_cpu(**arguments, out=matrix(x), threads=2)
    core.mlp_backward_cpu(
        **arguments, grad=matrix(x), d_x=matrix(x), d_second=(0, 0), out=(0, 0),
        d_tensors=(weights[0].data_ptr(), 0, weights[1].data_ptr(), 0), threads=2,
    )  # fmt: skip
    assert all(torch.equal(t, torch.zeros(3, 3)) for t in weights)


# --- Batch normalisation ---------------------------------------------------------------------------------

BN_SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (3, 16, 8, 8),
    (2, 5, 1, 9),
    (6, 8, 1, 1),
    (4, 130, 3, 3),
    (2, 1100, 2, 1),
    (1, 24, 40, 37),
    (5, 2, 33, 20),
]
LAYOUTS = ("nchw", "channels_last", "nchw slice", "channels_last slice", "batch innermost")


def lay_out(values: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
    """`values` (n, c, h, w) as a view in `layout`; a slice's surroundings are NaN."""
    n, c, h, w = values.shape
    if layout == "nchw":
        out = torch.empty(n, c, h, w, dtype=dtype)
    elif layout == "channels_last":
        out = torch.empty(n, h, w, c, dtype=dtype).permute(0, 3, 1, 2)
    elif layout == "nchw slice":
        out = torch.full((n, c + 1, h + 2, w + 3), math.nan, dtype=dtype)[:, 1:, 1:-1, 2:-1]
    elif layout == "channels_last slice":
        out = torch.full((n, h + 2, w + 3, c + 5), math.nan, dtype=dtype)[:, 1:-1, 2:-1, 4:-1].permute(0, 3, 1, 2)
    else:
        out = torch.empty(c, h, w, n, dtype=dtype).permute(3, 0, 1, 2)
    return out.copy_(values)


def surroundings(view: Tensor) -> int:
    """How many elements of a view's base are not NaN."""
    return int((view if view._base is None else view._base).isnan().logical_not().sum())


def random_image(shape: Sequence[int], dtype: torch.dtype, mean: float = 0.0, seed: int = 0) -> Tensor:
    x = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x + mean).to(dtype).double()


def channel_array(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(accumulation(dtype)).contiguous()


def by_channel(values: Tensor) -> Tensor:
    return values.double().view(1, -1, 1, 1)


def stats(y: Tensor, threads: int = 1) -> tuple[Tensor, Tensor]:
    mean, var = torch.full((2, y.shape[1]), math.nan, dtype=accumulation(y.dtype))
    core.batch_norm_stats_cpu(
        _native.DTYPES[y.dtype], tuple(y.shape), _native.address(y), mean.data_ptr(), var.data_ptr(), threads
    )
    return mean, var


def assert_stats(y: Tensor, mean: Tensor, var: Tensor, what: str) -> None:
    """Sums of up to 1024 values by four lanes (SSE) are chains of 256 additions in the arithmetic type.

    Deviations are taken from a running mean, whose distances from the tiles' means add up to no more than twice the sum
    of squares (three times with that sum itself); means of tiles err like the deviations they are made of.
    """
    exact = y.double().permute(1, 0, 2, 3).flatten(1)
    if y.dtype == torch.float64:  # the reference needs more digits than the kernel has
        wide = exact.numpy().astype(np.longdouble)
        exact_mean, exact_var = (torch.from_numpy(s.astype(np.float64)) for s in (wide.mean(1), wide.var(1)))
    else:
        exact_mean, exact_var = exact.mean(1), exact.var(1, unbiased=False)
    u = UNIT_ROUNDOFF[accumulation(y.dtype)]
    spread = exact_var.sqrt()
    # Tiles are merged in double, whatever the type, and no channel here is cut into more than 64: each merge rounds the
    # mean, and that enters the variance through the tile's distance from it.
    merged = 64 * UNIT_ROUNDOFF[torch.float64] * exact_mean.abs()
    assert_within(mean, exact_mean, u * exact_mean.abs() + merged + 3 * 260 * u * spread, f"{what} mean")
    assert_within(var, exact_var, 3 * 260 * u * exact_var + merged * (2 * spread + merged), f"{what} variance")


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_stats(dtype: torch.dtype, mean: float) -> None:
    for shape, layout in itertools.product(BN_SHAPES, LAYOUTS):
        y = lay_out(random_image(shape, dtype, mean), layout, dtype)
        for threads in thread_counts(y.numel()):
            assert_stats(y, *stats(y, threads), what=f"{shape} {layout} threads={threads}")


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_stats_of_awkward_data(layout: str) -> None:
    """Data whose level changes along the way, so that no early mean is a good shift for the rest."""
    steps = random_image((6, 5, 64, 64), torch.float32, 1e3)
    steps[:3] = 0
    border = random_image((4, 20, 48, 48), torch.float32, 1e3)
    border[:, :, :2] = border[:, :, :, :2] = 0
    ramp = random_image((2, 7, 90, 90), torch.float32) + torch.linspace(0, 1e4, 90, dtype=torch.float64)[:, None]
    outlier = random_image((2, 3, 40, 40), torch.float32)
    outlier[0, :, 0, 0] = 1e6
    constant = torch.full((3, 4, 50, 50), 1234.5678, dtype=torch.float64)
    for name, image in {
        "steps": steps,
        "border": border,
        "ramp": ramp,
        "outlier": outlier,
        "constant": constant,
    }.items():
        y = lay_out(image, layout, torch.float32)
        for threads in (1, 2):
            assert_stats(y, *stats(y, threads), what=f"{name} threads={threads}")


def test_stats_repeat_and_stay_in_their_channel() -> None:
    y = random_image((4, 12, 50, 40), torch.float32, 5.0).float()
    clean = stats(y, 2)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(stats(y, 2), clean, strict=True))
    for layout in ("nchw", "channels_last"):
        spoiled = lay_out(y, layout, torch.float32)
        clean = stats(spoiled, 2)
        spoiled[1, 5, 3, 3] = math.nan
        spoiled[2, 7, 0, 0] = math.inf
        for got, want in zip(stats(spoiled, 2), clean, strict=True):
            others = torch.ones(12, dtype=torch.bool)
            others[[5, 7]] = False
            assert torch.equal(got[others], want[others])
            assert not got[[5, 7]].isfinite().any()


def test_batch_norm_of_nothing() -> None:
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        mean, var = stats(torch.empty(shape), 2)
        assert mean.isnan().all()
        assert var.isnan().all()
        sums = backward_reduce(torch.empty(shape), torch.empty(shape), torch.zeros(3), torch.ones(3))
        assert all(torch.equal(s, torch.zeros(3)) for s in sums)
        apply(torch.empty(shape), torch.ones(3), torch.ones(3), None, torch.empty(shape))
    stats(torch.empty(2, 0, 4, 4))


def apply(y: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, out: Tensor, threads: int = 1) -> Tensor:
    core.batch_norm_apply_cpu(
        _native.DTYPES[y.dtype],
        tuple(y.shape),
        _native.address(y),
        scale.data_ptr(),
        shift.data_ptr(),
        _native.address(residual),
        _native.address(out),
        threads,
    )
    return out


def backward_reduce(g: Tensor, y: Tensor, mean: Tensor, invstd: Tensor, threads: int = 1) -> tuple[Tensor, Tensor]:
    sum_g, sum_gx = torch.full((2, y.shape[1]), math.nan, dtype=accumulation(y.dtype))
    core.batch_norm_backward_reduce_cpu(
        _native.DTYPES[y.dtype],
        tuple(y.shape),
        _native.address(g),
        _native.address(y),
        mean.data_ptr(),
        invstd.data_ptr(),
        sum_g.data_ptr(),
        sum_gx.data_ptr(),
        threads,
    )
    return sum_g, sum_gx


def backward_apply(g: Tensor, y: Tensor, a: Tensor, b: Tensor, d: Tensor, out: Tensor, threads: int = 1) -> Tensor:
    core.batch_norm_backward_apply_cpu(
        _native.DTYPES[y.dtype],
        tuple(y.shape),
        _native.address(g),
        _native.address(y),
        a.data_ptr(),
        b.data_ptr(),
        d.data_ptr(),
        _native.address(out),
        threads,
    )
    return out


def elementwise_bound(exact: Tensor, terms: Tensor, dtype: torch.dtype) -> Tensor:
    """Three terms: two products and two sums (or fewer, fused) are at most four roundings of the terms' sizes."""
    return rounded(exact, 4 * UNIT_ROUNDOFF[accumulation(dtype)] * terms, dtype, 0)


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("shape", BN_SHAPES, **ids)
def test_apply_and_backward_apply(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Every pair of layouts, the third operand cycling through them."""
    c = shape[1]
    first, second = random_image(shape, dtype, seed=1), random_image(shape, dtype, seed=2)
    a, b, d = (channel_array(torch.randn(c, generator=torch.Generator().manual_seed(k)), dtype) for k in range(3))
    nothing = torch.full(shape, math.nan, dtype=torch.float64)
    # (inputs, exact result, the sizes of its terms)
    affine, product, offset = first * by_channel(a), second * by_channel(b), by_channel(d).expand(shape)
    for k, (out_layout, in_layout) in enumerate(itertools.product(LAYOUTS, LAYOUTS)):
        third = LAYOUTS[k % len(LAYOUTS)]
        x, z = lay_out(first, in_layout, dtype), lay_out(second, third, dtype)
        for threads in thread_counts(first.numel()):
            what = f"{in_layout}, {third} -> {out_layout} threads={threads}"

            def check(out: Tensor, exact: Tensor, terms: Tensor, what: str = what) -> None:
                assert_within(out, exact, elementwise_bound(exact, terms, dtype), what)
                assert surroundings(out) == out.numel(), f"{what}: wrote outside of out"

            out = apply(x, a, d, None, lay_out(nothing, out_layout, dtype), threads)
            check(out, affine + offset, affine.abs() + offset.abs())
            out = apply(x, a, d, z, lay_out(nothing, out_layout, dtype), threads)
            check(out, affine + offset + second, affine.abs() + offset.abs() + second.abs())
            out = backward_apply(x, z, a, b, d, lay_out(nothing, out_layout, dtype), threads)
            check(out, affine + product + offset, affine.abs() + product.abs() + offset.abs())


@pytest.mark.parametrize("dtype", DTYPES, **ids)
def test_in_place(dtype: torch.dtype) -> None:
    shape = (3, 20, 17, 19)
    a, b, d = (channel_array(torch.randn(20), dtype) for _ in range(3))
    for layout, other in itertools.product(LAYOUTS, LAYOUTS):
        y, r = (lay_out(random_image(shape, dtype, seed=k), o, dtype) for k, o in ((1, layout), (2, other)))
        fresh = lay_out(y, layout, dtype)
        expected = apply(y, a, d, r, fresh)
        for target in ("y", "residual"):
            y2, r2 = lay_out(y, layout, dtype), lay_out(r, other, dtype)
            assert torch.equal(apply(y2, a, d, r2, y2 if target == "y" else r2), expected), (layout, other, target)
        expected = backward_apply(r, y, a, b, d, fresh)
        for target in ("g", "y"):
            y2, r2 = lay_out(y, layout, dtype), lay_out(r, other, dtype)
            assert torch.equal(backward_apply(r2, y2, a, b, d, y2 if target == "y" else r2), expected)


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("shape", BN_SHAPES, **ids)
def test_backward_reduce(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    g_values, y_values = random_image(shape, dtype, seed=3), random_image(shape, dtype, 100.0, seed=4)
    mean = channel_array(y_values.mean((0, 2, 3)), dtype)
    invstd = channel_array(torch.rand(shape[1]) + 0.5, dtype)
    terms = g_values * (y_values - by_channel(mean)) * by_channel(invstd)
    u = UNIT_ROUNDOFF[accumulation(dtype)]
    # Chains of up to 256 additions, as for the statistics; three more roundings make a term.
    bounds = [(k * u * t.abs().sum((0, 2, 3)) + 1e-300) for k, t in ((258, g_values), (262, terms))]
    for layout, other in itertools.product(LAYOUTS, LAYOUTS):
        g, y = lay_out(g_values, layout, dtype), lay_out(y_values, other, dtype)
        for threads in thread_counts(g.numel()):
            what = f"g {layout}, y {other} threads={threads}"
            sums = backward_reduce(g, y, mean, invstd, threads)
            assert_within(sums[0], g_values.sum((0, 2, 3)), bounds[0], f"{what} sum_g")
            assert_within(sums[1], terms.sum((0, 2, 3)), bounds[1], f"{what} sum_gx")
            again = backward_reduce(g, y, mean, invstd, threads)
            assert all(torch.equal(a, b) for a, b in zip(sums, again, strict=True)), f"{what}: not reproducible"


def test_expanded_gradient() -> None:
    """The gradient of a sum arrives as one number with strides of 0."""
    y = random_image((3, 6, 20, 30), torch.float32).float()
    g = torch.tensor(0.5).expand(y.shape)
    mean, invstd = y.mean((0, 2, 3)), torch.ones(6)
    sum_g, _ = backward_reduce(g, y, mean, invstd)
    assert torch.equal(sum_g, torch.full((6,), 900.0))
    a, b, d = torch.ones(6), torch.zeros(6), torch.zeros(6)
    assert torch.equal(backward_apply(g, y, a, b, d, torch.empty_like(y)), g)


def test_agrees_with_torch_batch_norm() -> None:
    """The four functions together are training-mode batch normalisation, forward and backward."""
    x = random_image((4, 10, 12, 14), torch.float64, 2.0).requires_grad_()
    weight, bias = torch.randn(10, dtype=torch.float64), torch.randn(10, dtype=torch.float64)
    expected = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=1e-5)
    g = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, x, g)
    y = x.detach().contiguous(memory_format=torch.channels_last)
    mean, var = stats(y, 2)
    invstd = (var + 1e-5).rsqrt()
    scale = weight * invstd
    out = apply(y, scale, bias - mean * scale, None, torch.empty_like(g), 2)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    sum_g, sum_gx = backward_reduce(g, y, mean, invstd, 2)
    n = y.numel() / y.shape[1]
    b = -scale * invstd * sum_gx / n
    d = -scale * sum_g / n - b * mean
    grad = backward_apply(g, y, scale, b, d, torch.empty_like(g), 2)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-12)


# --- Instruction sets ------------------------------------------------------------------------------------


def test_the_instruction_set_is_the_one_asked_for() -> None:
    asked = os.environ.get(ISA_VARIABLE)
    assert core.cpu_isa() == (asked or core.cpu_isa())
    assert core.cpu_isa() in ("avx512", "avx2", "baseline")


@pytest.mark.skipif(bool(os.environ.get(ISA_VARIABLE)), reason=f"{ISA_VARIABLE} is set: this is one of the variants")
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_instruction_set_variants(isa: str) -> None:
    """This file and the convolutions', in a process of its own, by each variant that this process did not pick."""
    if core.cpu_isa() == isa:
        pytest.skip(f"{isa} is what this process runs")
    environment = {**os.environ, ISA_VARIABLE: isa}
    probe = "import torch, wavemix_kernels._native as n; print(n.core.cpu_isa())"
    found = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        reason = found.stderr.strip().splitlines()[-1]
        assert ISA_VARIABLE in reason, found.stderr
        pytest.skip(reason)
    files = [str(Path(__file__).with_name(name)) for name in (Path(__file__).name, "test_cpu_convolutions.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    result = subprocess.run(
        command, env=environment, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
