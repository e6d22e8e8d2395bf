"""The CPU's kernels for few channels (transposed convolution; reduction with one Haar level) against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tolerances import DTYPES, UNDERFLOW, UNIT_ROUNDOFF, accumulation, assert_within
from wavemix_kernels import _native
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.reduce_haar import reference

if _native.core is None:
    pytest.skip(f"CPU kernels: {_native.core_error}", allow_module_level=True)
core: Any = _native.core
address = _native.address
ids: dict[str, Any] = {"ids": lambda value: str(value).removeprefix("torch.").replace(" ", "")}
THREADS = (1, 2, 5)


def image(*shape: int, dtype: torch.dtype, generator: torch.Generator, gap: int = 0, by_pixel: bool = True) -> Tensor:
    """Random; channels innermost with `gap` elements of NaN between the pixels, or pixels innermost."""
    n, c, h, w = shape
    if not by_pixel:
        return torch.randn(n, c, h, w, generator=generator, dtype=torch.float64).to(dtype)
    whole = torch.full((n, h, w, c + gap), math.nan, dtype=dtype)
    whole[..., :c] = torch.randn(n, h, w, c, generator=generator, dtype=torch.float64)
    return whole[..., :c].permute(0, 3, 1, 2)


def poisoned(like: Tensor) -> Tensor:
    return torch.full_like(like, math.nan)


def bound(terms: int, sizes: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Of a sum of products, ``terms`` roundings long, `sizes` of absolute values [Higham, section 3.1]; a float64
    reference errs as much itself. Stored once."""
    wide = accumulation(dtype)
    off = terms * UNIT_ROUNDOFF[wide] * (2 if dtype == torch.float64 else 1) * sizes
    return off if wide == dtype else off + UNIT_ROUNDOFF[dtype] * (exact.abs() + off) + UNDERFLOW[dtype]


def same(results: list[list[Tensor]]) -> list[Tensor]:
    """Of several numbers of threads: all alike, to the bit."""
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
    return results[0]


DECONVS = [  # n, f, o, h, w: odd, thin, wider than a block of places, several shares
    (1, 1, 1, 1, 1),
    (2, 2, 3, 3, 5),
    (1, 3, 5, 1, 301),
    (1, 5, 2, 60, 1),
    (40, 8, 8, 7, 9),
    (3, 12, 16, 6, 5),
    (2, 16, 12, 14, 14),
    (1, 31, 31, 5, 8),
]


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("size", DECONVS, **ids)
def test_deconv(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    """Forward with statistics; both gradients, with the BatchNorm before them and without."""
    n, f, o, h, w = size
    generator, wide, code = torch.Generator().manual_seed(w), accumulation(dtype), _native.DTYPES[dtype]
    gap = o % 2
    u = image(n, f, h, w, dtype=dtype, generator=generator, gap=gap)
    grad = image(n, o, 2 * h, 2 * w, dtype=dtype, generator=generator, gap=gap)
    weight, bias = (torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in ((f, o, 4, 4), (o,)))
    bias += 100  # far from 0: hard for a variance
    leaves = [t.double().requires_grad_() for t in (u, weight, bias)]
    sizes = [t.detach().abs().requires_grad_() for t in leaves]
    exact, size_y = (F.conv_transpose2d(*tensors, stride=2, padding=1) for tensors in (leaves, sizes))
    y = poisoned(grad)

    def forward(threads: int) -> list[Tensor]:
        stats = [torch.full((o,), math.nan, dtype=wide) for _ in range(2)]
        y.fill_(math.nan)
        core.deconv_forward_cpu(
            code, size, address(u), address(y), weight.data_ptr(), bias.data_ptr(), *(t.data_ptr() for t in stats),
            [], threads,
        )  # fmt: skip
        # The gradient stands in for an image to add: it has other strides than this result.
        plus = torch.full_like(grad, math.nan, memory_format=torch.channels_last)
        core.deconv_forward_cpu(
            code, size, address(u), address(plus), weight.data_ptr(), bias.data_ptr(), 0, 0, address(grad), threads
        )
        return [y.clone(), plus, *stats]

    got, plus, mean, var = same([forward(threads) for threads in THREADS])
    want, sums = exact.detach(), size_y.detach()
    assert_within(got, want, bound(4 * f + 1, sums, want, dtype), f"output {size}")
    sum_of_both, terms = want + grad.double(), sums + grad.double().abs()
    assert_within(plus, sum_of_both, bound(4 * f + 2, terms, sum_of_both, dtype), f"with residual {size}")
    # Each value is off by at most `worst` before it is stored; sums of `count` squares within a part.
    r, count = UNIT_ROUNDOFF[wide] * (2 if dtype == torch.float64 else 1), 4 * n * h * w
    worst = ((4 * f + 1) * r * sums).amax((0, 2, 3))
    want_var, want_mean = torch.var_mean(want, (0, 2, 3), correction=0)
    assert_within(mean, want_mean, worst + 4 * r * want_mean.abs(), f"mean {size}")
    spread = want_var.sqrt() + worst
    assert_within(var, want_var, 4 * worst * spread + (count + 8) * r * spread**2, f"variance {size}")

    line = [torch.randn(o, generator=generator, dtype=torch.float64).to(wide) for _ in range(4)]
    line[2] += 100  # the mean
    for norm in (False, True):
        dy, slack = grad.double(), grad.double().abs()
        if norm:
            a, b, center, d = (t.double()[:, None, None] for t in line)
            dy = a * dy + b * (y.double() - center) + d
            slack = a.abs() * slack + b.abs() * (y.double().abs() + center.abs()) + d.abs()
        wants = torch.autograd.grad(exact, leaves[:2], dy, retain_graph=True)
        size_grads = torch.autograd.grad(size_y, sizes[:2], slack, retain_graph=True)
        extra = (address(y), [t.data_ptr() for t in line]) if norm else ([], [])

        def gradients(threads: int, extra: tuple[list[int], list[int]] = extra) -> list[Tensor]:
            d_u, d_weight = poisoned(u), poisoned(weight)
            core.deconv_backward_cpu(
                code, size, address(u), address(grad), weight.data_ptr(), *extra, address(d_u), d_weight.data_ptr(),
                threads,
            )  # fmt: skip
            # Either alone is what one pass makes of both.
            alone = poisoned(u), poisoned(weight)
            core.deconv_backward_cpu(
                code, size, [], address(grad), weight.data_ptr(), *extra, address(alone[0]), 0, threads
            )
            core.deconv_backward_cpu(
                code, size, address(u), address(grad), 0, *extra, [], alone[1].data_ptr(), threads
            )
            assert torch.equal(alone[0], d_u)
            assert torch.equal(alone[1], d_weight)
            return [d_u, d_weight]

        gots = same([gradients(threads) for threads in THREADS])
        terms = (16 * o, n * h * w)  # and the four roundings of BatchNorm's line
        for name, a, b, s, t in zip(("u", "weight"), gots, wants, size_grads, terms, strict=True):
            assert_within(a, b, bound(t + 5, s, b, dtype), f"gradient of {name} {size} {norm}")


def test_deconv_of_nothing() -> None:
    """Statistics of no pixels are NaN; gradients of weights that saw none are zero."""
    ops = torch.ops.wavemix_kernels
    u, weight, bias = torch.empty(0, 8, 3, 4), torch.randn(8, 5, 4, 4), torch.randn(5)
    y, mean, var = ops.deconv_stats(u, weight, bias, "cpu")
    assert y.shape == (0, 5, 6, 8)
    assert mean.isnan().all()
    assert var.isnan().all()
    assert ops.deconv_backward_x(y, weight, "cpu").shape == u.shape
    assert all(not t.any() for t in ops.deconv_backward_weight(y, u, True, "cpu"))


def test_deconv_takes_the_kernel_for_few_channels() -> None:
    """What the operator chooses: ours below so many products of channels, minimal filtering or the library above."""
    for f, o, want in ((8, 8, "cpu"), (32, 32, "cpu"), (16, 128, "reference"), (64, 64, "cpu")):
        assert choose.deconv("cpu", torch.float32, f, o, _native.core.DECONV_NARROW)[0] == want


REDUCTIONS = [  # n, c, o, h, w
    (1, 1, 1, 2, 2),
    (2, 2, 1, 6, 4),
    (1, 3, 2, 2, 602),
    (1, 5, 3, 90, 2),
    (40, 8, 2, 14, 10),
    (3, 12, 3, 10, 14),
    (2, 16, 4, 28, 28),
    (1, 31, 4, 6, 10),
]


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("by_pixel", [True, False], ids=["channels_inner", "pixels_inner"])
@pytest.mark.parametrize("size", REDUCTIONS, **ids)
def test_reduce_haar(dtype: torch.dtype, by_pixel: bool, size: tuple[int, ...]) -> None:
    """Forward and all gradients, x in either memory order, with something added to its gradient and without."""
    n, c, o, h, w = size
    generator, code, shape = torch.Generator().manual_seed(c), _native.DTYPES[dtype], (n, c, h, w)
    x, add = (
        image(*shape, dtype=dtype, generator=generator, gap=gap if by_pixel else 0, by_pixel=by_pixel)
        for gap in (c % 2, 0)
    )
    weight, bias = (torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in ((o, c), (o,)))
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    sizes = [t.detach().abs().requires_grad_() for t in leaves]
    (exact,) = reference.reduce_haar(leaves[0], leaves[1][:, :, None, None], leaves[2], 1)
    low = F.avg_pool2d(F.conv2d(sizes[0], sizes[1][:, :, None, None], sizes[2]), 2) * 2
    size_z = torch.cat((low, low.repeat_interleave(3, 1)), 1)  # plus signs only, all bands alike
    d_z = image(*exact.shape, dtype=dtype, generator=generator)
    wants = torch.autograd.grad(exact, leaves, d_z.double())
    size_grads = torch.autograd.grad(size_z, sizes, d_z.double().abs())

    def run(threads: int) -> list[Tensor]:
        z, d_x = poisoned(d_z), torch.empty_strided(add.shape, add.stride(), dtype=dtype).fill_(math.nan)
        alone, d_weight, d_bias = poisoned(d_x), poisoned(weight), poisoned(bias)
        core.reduce_haar_cpu(code, 1, shape, o, address(x), address(weight), address(bias), [address(z)], threads)
        for out, more in ((d_x, address(add)), (alone, [])):
            core.reduce_haar_backward_cpu(
                code, 1, shape, o, address(x), address(weight), [address(d_z)], address(out), more,
                d_weight.data_ptr(), d_bias.data_ptr(), threads,
            )  # fmt: skip
        return [z, alone, d_x, d_weight, d_bias]

    z, alone, d_x, d_weight, d_bias = same([run(threads) for threads in THREADS])
    # Two additions for a band of the image or for a pixel of its gradient; the rest are sums of products.
    for name, got, want, size_of, terms in (
        ("output", z, exact.detach(), size_z.detach(), c + 3),
        ("gradient of x", alone, wants[0], size_grads[0], o + 3),
        ("and something", d_x, wants[0] + add.double(), size_grads[0] + add.double().abs(), o + 4),
        ("gradient of weight", d_weight, wants[1], size_grads[1], n * h * w + 3),
        ("gradient of bias", d_bias, wants[2], size_grads[2], n * h * w + 3),
    ):
        assert_within(got, want, bound(terms, size_of, want, dtype), f"{name} {size}")
