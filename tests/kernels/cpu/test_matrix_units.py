"""Kernels that go by a CPU's matrix units: paths that the ops' contracts may pass by, whole tiles read in place among
them, on numbers of threads that share the work in other ways."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.predict.tools import ROOT
from tests.models.subjects import threads
from tests.ops.contract import image, randn
from tests.tolerances import UNIT_ROUNDOFF, assert_within, stored
from wavemix_kernels import _native
from wavemix_kernels.ops.deconv import op as deconv
from wavemix_kernels.ops.mlp import op as mlp
from wavemix_kernels.ops.reduce_haar import op as reduce_haar
from wavemix_kernels.ops.reduce_haar import reference as haar_reference

if not _native.by_matrix_units(torch.bfloat16):
    pytest.skip(f"matrix units: this process's CPU kernels are {_native.cpu_isa}", allow_module_level=True)

HALF, U = UNIT_ROUNDOFF[torch.bfloat16], UNIT_ROUNDOFF[torch.float32]
COUNTS = (1, 2, 3, 9)


def check(got: Tensor, exact: Tensor, size: Tensor, terms: int, rounded: float = 0.0) -> None:
    """``size``: the sum of all terms' absolute values; ``rounded``: a relative error of each, beside summation's."""
    assert_within(got, exact, (terms * U + rounded) * size + stored(exact, torch.bfloat16))


# Rows by the block's height, whole tiles in place, tails of rows and columns, depth beyond one part, two inputs.
@pytest.mark.parametrize("size", [
    (640, 64, 0, 128, 64), (130, 32, 0, 32, 32), (95, 96, 0, 70, 17), (256, 40, 20, 48, 33), (70, 1056, 0, 64, 16),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("count", COUNTS)
def test_mlp(size: tuple[int, ...], count: int) -> None:
    rows, a, b, k, o = size
    x = image(randn(1, a, rows, 1), torch.bfloat16, layout="channels_last")
    second = image(randn(1, b, rows, 1, seed=1), torch.bfloat16, layout="channels_last") if b else None
    w1, w2 = randn(k, a + b, seed=2) / (a + b) ** 0.5, randn(o, k, seed=3) / k**0.5
    weights = [t.bfloat16() for t in (w1, randn(k, seed=4), w2, randn(o, seed=5))]
    w1, b1, w2, b2 = weights
    with threads(count):
        out = mlp.fused(x, second, None, None, w1, b1, w2, b2, 0.0, None, "cpu")
        grad = image(randn(1, o, rows, 1, seed=6), torch.bfloat16, layout="channels_last")
        made: Any = mlp.backward(grad, x, second, None, None, w1, b1, w2, b2, 0.0, None, True, "cpu")
    assert torch.equal(made.output, out)
    given = x if second is None else torch.cat((x, second), 1)
    leaf = given[0, :, :, 0].T.double().requires_grad_()
    leaves: Any = [t.double().requires_grad_() for t in weights]
    z = leaf @ leaves[0].T + leaves[1]
    hidden = F.gelu(z)
    exact = hidden @ leaves[2].T + leaves[3]
    g = grad[0, :, :, 0].T.double()
    exact.backward(g)
    of_z = (a + b) * U * (leaf.abs() @ leaves[0].abs().T + leaves[1].abs())
    of_hidden = 1.13 * of_z + (HALF + 2.0**-12) * hidden.abs()
    error = of_hidden @ leaves[2].abs().T
    assert_within(
        out[0, :, :, 0].T, exact.detach(),
        (error + k * U * (hidden.abs() @ leaves[2].abs().T) + stored(exact, torch.bfloat16)).detach(),
    )  # fmt: skip
    # Gradients: a hidden gradient errs by what its slope does and by a rounding.
    slope = (g @ leaves[2]).abs() * 1.13
    of_slope = slope * (HALF + 2.0**-11) + (g.abs() @ leaves[2].abs()) * (0.8 * of_z + o * U)
    size_x, size_w = slope @ leaves[0].abs(), slope.T @ leaf.abs()
    d_x = torch.cat([t for t in (made.x, made.second) if t is not None], 1)[0, :, :, 0].T
    for got, want, bound in (
        (d_x, leaf.grad, of_slope @ leaves[0].abs() + k * U * size_x),
        (made.w1.view(k, -1), leaves[0].grad, of_slope.T @ leaf.abs() + (rows * U + HALF) * size_w),
        (made.w2.view(o, -1), leaves[2].grad, g.abs().T @ (of_hidden + (rows * U + HALF) * hidden.abs())),
    ):
        assert_within(got, want, (bound + stored(want, torch.bfloat16)).detach())


# In place and copied, pixels first, the level in the weights and after the product, an image's last rows, wide strips.
@pytest.mark.parametrize("size", [
    (2, 64, 16, 32, 1), (1, 36, 10, 12, 1), (2, 96, 24, 56, 3), (1, 128, 16, 32, 2), (2, 144, 12, 20, 2),
    (1, 128, 4, 1036, 2), (1, 64, 4, 1060, 1),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("layout", ["channels_last", "channels_slice", "nchw"])
@pytest.mark.parametrize("count", COUNTS[::2])
def test_reduce_haar(size: tuple[int, ...], layout: str, count: int) -> None:
    n, c, h, w, levels = size
    x = image(randn(n, c, h, w), torch.bfloat16, layout=layout)
    weight, bias = (randn(c // 4, c, 1, 1, seed=1) / c**0.5).bfloat16(), randn(c // 4, seed=2).bfloat16()
    with threads(count):
        zs = reduce_haar.fused(x, weight, bias, levels, True, "cpu")
    exact = haar_reference.reduce_haar(x.double(), weight.double(), bias.double(), levels)
    reduced = F.conv2d(x.double().abs(), weight.double().abs(), bias.double().abs())
    image_of = F.conv2d(x.double(), weight.double(), bias.double()).abs()
    for level, (z, want) in enumerate(zip(zs, exact, strict=True), 1):
        of = [F.avg_pool2d(t, 2**level) * 2**level for t in (reduced, image_of)]  # of each band, sums of all pixels
        sums, values = (torch.cat((t, t.repeat_interleave(3, 1)), 1) for t in of)
        # The reduced image, or LL of the level before, is rounded to bfloat16.
        assert_within(z, want, (c + 8) * U * sums + HALF * values + stored(want, torch.bfloat16))


# Many strips, rows wider than a strip, whole tiles and tails, one pixel.
SIZES = [(2, 32, 32, 20, 18), (1, 64, 48, 3, 300), (3, 40, 17, 7, 5), (1, 96, 64, 1, 1), (1, 33, 32, 2, 700)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_deconv(size: tuple[int, ...], count: int) -> None:
    n, f, o, h, w = size
    u = image(randn(n, f, h, w), torch.bfloat16, layout="channels_slice")
    weight, bias = (randn(f, o, 4, 4, seed=1) / (4 * f) ** 0.5).bfloat16(), (randn(o, seed=2) + 5).bfloat16()
    residual = image(randn(n, o, 2 * h, 2 * w, seed=3), torch.bfloat16, layout="channels_last")
    with threads(count):
        y = deconv._cpu_forward(u, weight, bias)
        plus = deconv._cpu_forward_residual(u, weight, bias, residual)
        again, rows = deconv._cpu_forward_stats(u, weight, bias, (None, None, 1e-5))
        (d_weight,) = deconv._cpu_backward_weight(residual, u, False)
    exact = F.conv_transpose2d(u.double(), weight.double(), bias.double(), 2, 1)
    size_of = F.conv_transpose2d(u.double().abs(), weight.double().abs(), bias.double().abs(), 2, 1)
    check(y, exact, size_of, 4 * f + 2)
    assert torch.equal(again, y)
    check(plus, exact + residual.double(), size_of + residual.double().abs(), 4 * f + 3)
    pixels = 4 * n * h * w
    mean, variance = exact.mean((0, 2, 3)), exact.var((0, 2, 3), unbiased=False)
    spread = (4 * f + 8) * U * size_of.mean((0, 2, 3))
    assert_within(rows[0], mean, spread + 4 * U * mean.abs())
    wanted = (variance + 1e-5).rsqrt()
    error = 2 * spread * variance.sqrt() + spread**2 + 16 * U * variance
    assert_within(rows[2], wanted, wanted**3 * error + 8 * U * wanted)
    leaf = weight.double().requires_grad_()
    F.conv_transpose2d(u.double(), leaf, None, 2, 1).backward(residual.double())
    sizes = weight.double().requires_grad_()
    F.conv_transpose2d(u.double().abs(), sizes, None, 2, 1).backward(residual.double().abs())
    assert leaf.grad is not None
    assert sizes.grad is not None
    check(d_weight, leaf.grad, sizes.grad, pixels)


def test_the_library_keeps_its_own_tiles() -> None:
    """Its products set up tiles too, and both run on the same threads."""
    u = image(randn(2, 64, 16, 16), torch.bfloat16, layout="channels_last")
    weight, x, k = (randn(64, 64, 4, 4) / 16).bfloat16(), randn(500, 200).bfloat16(), randn(200, 300).bfloat16()

    def every() -> list[Tensor]:
        ours = deconv._cpu_forward(u, weight, None)
        return [ours, F.conv_transpose2d(u, weight, None, 2, 1), deconv._cpu_forward(u, weight, None), x @ k]

    with threads(2):
        first = every()
        for _ in range(50):
            assert all(map(torch.equal, every(), first))


_AT_THE_END = """
import ctypes, mmap, torch
from wavemix_kernels.ops.deconv import op as deconv
from wavemix_kernels.ops.mlp import op as mlp
from wavemix_kernels.ops.reduce_haar import op as reduce_haar

maps = []

def at_the_end(n, c, h, w):
    size = 2 * n * c * h * w
    pages = -(-size // mmap.PAGESIZE)
    maps.append(mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE))
    end = ctypes.addressof(ctypes.c_char.from_buffer(maps[-1])) + pages * mmap.PAGESIZE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, 0) == 0
    flat = torch.frombuffer(maps[-1], dtype=torch.bfloat16, offset=pages * mmap.PAGESIZE - size, count=size // 2)
    return flat.fill_(1).view(n, h, w, c).permute(0, 3, 1, 2)

for c in (64, 128, 40):
    weight, up = torch.ones(c // 4, c, 1, 1).bfloat16(), torch.ones(c, 48, 4, 4).bfloat16()
    w1, b1, w2 = torch.ones(96, c).bfloat16(), torch.ones(96).bfloat16(), torch.ones(32, 96).bfloat16()
    for w in (2, 6, 14, 32):
        x = at_the_end(1, c, 16, w)
        for image in (x, at_the_end(1, w, c, 16).permute(0, 2, 3, 1)):
            reduce_haar.fused(image, weight, None, 1, True, "cpu")
        mlp.fused(x, None, None, None, w1, b1, w2, None, 0.0, None, "cpu")
        deconv._cpu_forward_residual(x, up, None, at_the_end(1, 48, 32, 2 * w))
        deconv._cpu_backward_weight(at_the_end(1, 48, 32, 2 * w), x, False)
print("done")
"""


def test_nothing_behind_an_image_is_read() -> None:
    """Each image ends where the next page must not be read: a tile that goes on beyond it ends the process."""
    done = subprocess.run([sys.executable, "-c", _AT_THE_END], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
