"""The CPU's transposed convolution as the core has it: what the op gives to the library instead."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.cpu import minimal_filtering
from tests.ops.contract import image, randn
from tests.tolerances import DTYPES, UNIT_ROUNDOFF, accumulation, assert_within, sum_bound
from wavemix_kernels import _native

if _native.core is None:
    pytest.skip(f"CPU kernels: {_native.core_error}", allow_module_level=True)
core: Any = _native.core
address = _native.address
ids: dict[str, Any] = {"ids": lambda value: str(value).removeprefix("torch.").replace(" ", "")}


def poisoned(like: Tensor) -> Tensor:
    return torch.full_like(like, math.nan)


def test_minimal_filtering_is_the_transposed_convolution() -> None:
    u, weight, grad = randn(2, 3, 5, 4), randn(3, 2, 4, 4), randn(2, 2, 10, 8)
    made = minimal_filtering.forward(u, weight), minimal_filtering.input_gradient(grad, weight)
    wanted = (f(t, weight, stride=2, padding=1) for f, t in ((F.conv_transpose2d, u), (F.conv2d, grad)))
    torch.testing.assert_close(made, tuple(wanted))


SIZES = [(1, 5, 2, 7, 3), (3, 40, 36, 1, 2), (2, 16, 80, 8, 8), (1, 67, 33, 7, 9), (2, 64, 32, 24, 22)]  # n, f, o, h, w


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("size", SIZES, **ids)
def test_deconv(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    """Half types of many channels, which the op gives to the library; the gradients together and alone."""
    n, f, o, h, w = size
    wide, code, narrow = accumulation(dtype), _native.DTYPES[dtype], f * o <= core.DECONV_NARROW
    u = image(randn(n, f, h, w), dtype, layout="channels_slice")
    grad = image(randn(n, o, 2 * h, 2 * w, seed=1), dtype, layout="channels_slice" if o % 2 else "channels_last")
    weight, bias = randn(f, o, 4, 4).to(dtype), (100 + randn(o)).to(dtype)  # far from 0: hard for a variance
    leaves = [t.double().requires_grad_() for t in (u, weight)]
    exact = F.conv_transpose2d(*leaves, bias.double(), stride=2, padding=1)
    wants = torch.autograd.grad(exact, leaves, grad.double())
    exact, terms = exact.detach(), (4 * f + 1 if narrow else f + 12)
    size_y = minimal_filtering.forward(u.double(), weight.double(), sizes=True) + bias.double().abs()[:, None, None]
    size_grads = minimal_filtering.gradient_sizes(u.double(), weight.double(), grad.double())
    r, count = UNIT_ROUNDOFF[wide] * (2 if dtype == torch.float64 else 1), 4 * n * h * w
    want_var, want_mean = torch.var_mean(exact, (0, 2, 3), correction=0)
    worst = (terms * r * size_y).amax((0, 2, 3))
    spread = want_var.sqrt() + worst
    runs = []
    for threads in (1, 3):
        y, d_u, d_weight, alone_u, alone_weight = (poisoned(t) for t in (grad, u, weight, u, weight))
        mean, var = torch.full((2, o), math.nan, dtype=wide)
        g, w_ptr = address(grad), weight.data_ptr()
        core.deconv_forward_cpu(
            code, size, address(u), address(y), w_ptr, bias.data_ptr(), mean.data_ptr(), var.data_ptr(), [], threads
        )
        assert_within(y, exact, sum_bound(exact, size_y, terms, dtype), f"output {size}")
        # Each value is off by at most `worst` before it is stored; sums of `count` squares within a part.
        assert_within(mean, want_mean, worst + 4 * r * want_mean.abs(), f"mean {size}")
        assert_within(var, want_var, 4 * worst * spread + (count + 8) * r * spread**2, f"variance {size}")
        core.deconv_backward_cpu(code, size, address(u), g, w_ptr, [], [], address(d_u), d_weight.data_ptr(), threads)
        core.deconv_backward_cpu(code, size, [], g, w_ptr, [], [], address(alone_u), 0, threads)
        core.deconv_backward_cpu(code, size, address(u), g, 0, [], [], [], alone_weight.data_ptr(), threads)
        assert torch.equal(alone_u, d_u)
        assert torch.equal(alone_weight, d_weight)
        terms_of = (16 * o + 1, n * h * w + 1) if narrow else (4 * o + 12, n * h * w + 12)
        for name, got, want, s, t in zip(("u", "weight"), (d_u, d_weight), wants, size_grads, terms_of, strict=True):
            assert_within(got, want, sum_bound(want, s, t, dtype), f"gradient of {name} {size}")
        runs.append((y, mean, var, d_u, d_weight))
    if narrow:  # sums do not depend on who makes them
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_reduce_haar_needs_contiguous_channels() -> None:
    x, weight = torch.zeros(1, 4, 4, 8)[..., ::2], torch.zeros(2, 4)
    z = torch.zeros(1, 8, 2, 2).contiguous(memory_format=torch.channels_last)
    call: list[Any] = [1, 1, x.shape, 2, address(x), address(weight), [], [address(z)], 1]
    with pytest.raises(ValueError, match="x: expected contiguous channels or pixels"):
        core.reduce_haar_cpu(*call)
    call[4], call[7] = address(z[:, :4]), [address(z.contiguous())]
    with pytest.raises(ValueError, match="zs: expected contiguous channels"):
        core.reduce_haar_cpu(*call)
