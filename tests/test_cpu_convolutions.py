"""The CPU's transposed convolution and reduction, called as the ops call them, against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tolerances import DTYPES, UNDERFLOW, UNIT_ROUNDOFF, accumulation, assert_within
from wavemix_kernels import _native
from wavemix_kernels.ops.deconv import op as deconv
from wavemix_kernels.ops.reduce_haar import reference

if _native.core is None:
    pytest.skip(f"CPU kernels: {_native.core_error}", allow_module_level=True)
core: Any = _native.core
ids: dict[str, Any] = {"ids": lambda value: str(value).removeprefix("torch.").replace(" ", "")}
channels_last = torch.channels_last

# --- Minimal filtering, as csrc/cpu/deconv/minimal_filtering.h defines it -------------------------

INPUT = torch.tensor(
    [[1, -1, 0, 0], [0, 1, 0, 0], [0, 1, -1, 0], [0, 1, -1, 0], [0, 0, 1, 0], [0, 0, 1, -1]], dtype=torch.float64
)  # rows 2i-1 .. 2i+2 -> what each product multiplies
WEIGHT = torch.tensor(
    [[0, 0, 0, 1], [0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 1, 0], [1, 0, 0, 0]], dtype=torch.float64
)  # taps -> of each product
OUTPUT = torch.tensor(
    [[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0], [0, 1, -1, 0, 0, 0], [0, 0, 0, 0, 1, -1]], dtype=torch.float64
)  # products -> rows 4t .. 4t+3
GRAD = torch.tensor(
    [
        [1, 0, -1, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 0, -1, 0],
        [0, 1, 0, -1, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0, -1],
    ],
    dtype=torch.float64,
)  # rows 4t-1 .. 4t+4 of the gradient -> what each product of its pass multiplies
GRAD_WEIGHT = torch.tensor(
    [[1, 0, 0, 0], [1, 0, 1, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1]], dtype=torch.float64
)  # taps -> of each product
SUMS = torch.tensor([[1, 1, 0], [0, 1, -1]], dtype=torch.float64)  # sums of two products -> rows 2t, 2t+1


def _both(matrix: Tensor, patch: Tensor) -> Tensor:
    """Along both of the last two axes."""
    return matrix @ patch @ matrix.t()


def _tiles(image: Tensor, side: int, step: int, first: int, rows: int, columns: int) -> Tensor:
    """Patches (N, C, rows, columns, side, side) beginning at ``step * tile + first``, zero outside."""
    n, c, h, w = image.shape
    whole = image.new_zeros(n, c, step * rows + 8, step * columns + 8)
    whole[:, :, 2 : 2 + h, 2 : 2 + w] = image
    cut = whole[:, :, 2 + first :, 2 + first :].unfold(2, side, step).unfold(3, side, step)
    return cut[:, :, :rows, :columns]


def _forward(u: Tensor, weight: Tensor, *, sizes: bool = False) -> Tensor:
    """The algorithm in float64; with ``sizes`` of absolute values, plus signs only: what rounding errors scale with."""
    n, _, h, w = u.shape
    rows, columns = -(-h // 2), -(-w // 2)
    forms, taps, out = (m.abs() if sizes else m for m in (INPUT, WEIGHT, OUTPUT))
    u, weight = (t.abs() if sizes else t for t in (u, weight))
    v = _both(forms, _tiles(u, 4, 2, -1, rows, columns))
    y = _both(out, torch.einsum("nfrcij,foij->norcij", v, _both(taps, weight)))
    return y.permute(0, 1, 2, 4, 3, 5).reshape(n, weight.shape[1], 4 * rows, 4 * columns)[:, :, : 2 * h, : 2 * w]


def _backward_x(grad: Tensor, weight: Tensor, *, sizes: bool = False) -> Tensor:
    """The gradient of u, likewise."""
    h, w = grad.shape[2] // 2, grad.shape[3] // 2
    rows, columns = -(-h // 2), -(-w // 2)
    sums = SUMS.abs() if sizes else SUMS
    forms, taps = (m.abs() if sizes else m for m in (GRAD, GRAD_WEIGHT))
    grad, weight = (t.abs() if sizes else t for t in (grad, weight))
    v = _both(forms, _tiles(grad, 6, 4, -1, rows, columns))
    products = torch.einsum("norcij,foij->nfrcij", v, _both(taps, weight))
    u = _both(torch.cat((sums, sums), 1), products)  # both halves of the products go into the same sums
    return u.permute(0, 1, 2, 4, 3, 5).reshape(grad.shape[0], weight.shape[0], 2 * rows, 2 * columns)[:, :, :h, :w]


def _gradient_sizes(u: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The same for both gradients, of absolute values: that of weight is the transposed map."""
    weight = weight.abs().requires_grad_()
    d_u = _backward_x(grad, weight, sizes=True)
    return d_u.detach(), torch.autograd.grad(d_u, weight, u.abs())[0]


def image(*shape: int, dtype: torch.dtype, gap: int = 0, generator: torch.Generator) -> Tensor:
    """Channels innermost, `gap` elements between the pixels."""
    n, c, h, w = shape
    whole = torch.full((n, h, w, c + gap), math.nan, dtype=dtype)
    whole[..., :c] = torch.randn(n, h, w, c, generator=generator, dtype=torch.float64)
    return whole[..., :c].permute(0, 3, 1, 2)


SIZES = [  # n, f, o, h, w
    (2, 5, 3, 3, 5),
    (1, 1, 1, 1, 1),
    (3, 40, 36, 1, 2),
    (2, 16, 48, 8, 8),
    (1, 67, 33, 7, 9),
    (2, 64, 32, 24, 22),
]


def test_minimal_filtering_is_the_transposed_convolution() -> None:
    generator = torch.Generator().manual_seed(0)
    u, weight = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((2, 3, 5, 4), (3, 2, 4, 4)))
    torch.testing.assert_close(_forward(u, weight), F.conv_transpose2d(u, weight, stride=2, padding=1))
    grad = torch.randn(2, 2, 10, 8, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(_backward_x(grad, weight), F.conv2d(grad, weight, stride=2, padding=1))


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("size", SIZES, **ids)
def test_deconv(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    """Forward with statistics, and both gradients, together and alone, with and without the BatchNorm before them; one
    and three threads."""
    n, f, o, h, w = size
    generator, wide = torch.Generator().manual_seed(h), accumulation(dtype)
    u = image(n, f, h, w, dtype=dtype, gap=3, generator=generator)
    grad = image(n, o, 2 * h, 2 * w, dtype=dtype, gap=1, generator=generator)
    weight = torch.randn(f, o, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    bias = (100 + torch.randn(o, generator=generator, dtype=torch.float64)).to(dtype)  # far from 0: hard for a variance
    leaves = [t.double().requires_grad_() for t in (u, weight)]
    exact = F.conv_transpose2d(*leaves, bias.double(), stride=2, padding=1)
    plain = torch.autograd.grad(exact, leaves, grad.double(), retain_graph=True)

    r = UNIT_ROUNDOFF[wide]

    def terms(depth: int) -> float:
        # Forms of input and weight and the last sums: 2 additions each along both axes. A float64 reference errs too.
        return (depth + 12) * r * (2 if dtype == torch.float64 else 1)

    off = terms(f) * (_forward(leaves[0].detach(), leaves[1].detach(), sizes=True) + bias.double().abs()[:, None, None])

    def stored(want: Tensor, off: Tensor) -> Tensor:
        return off + (UNIT_ROUNDOFF[dtype] * (want.abs() + off) + UNDERFLOW[dtype] if wide != dtype else 0)

    # The gradient of a normalised output, as BatchNorm's backward would have it.
    y = torch.empty(n, 2 * h, 2 * w, o, dtype=dtype).permute(0, 3, 1, 2)
    line = [torch.randn(o, generator=generator, dtype=torch.float64).to(wide) for _ in range(4)]
    line[2] += 100  # the mean
    code = _native.DTYPES[dtype]
    address = _native.address
    for threads in (1, 3):
        mean, var = torch.full((o,), math.nan, dtype=wide), torch.full((o,), math.nan, dtype=wide)
        y.fill_(math.nan)
        core.deconv_forward_cpu(
            code, size, address(u), address(y), weight.data_ptr(), bias.data_ptr(), mean.data_ptr(), var.data_ptr(),
            [], threads,
        )  # fmt: skip
        want = exact.detach()
        assert_within(y, want, stored(want, off), f"output {size}")
        # The gradient stands in for an image to add: it has other strides than y.
        plus, sum_of_both = torch.full_like(y, math.nan), want + grad.double()
        core.deconv_forward_cpu(
            code, size, address(u), address(plus), weight.data_ptr(), bias.data_ptr(), 0, 0, address(grad), threads
        )
        assert_within(plus, sum_of_both, stored(sum_of_both, off + r * sum_of_both.abs()), f"with residual {size}")
        count = n * 4 * h * w
        want_var, want_mean = torch.var_mean(want, (0, 2, 3), correction=0)
        worst = off.amax((0, 2, 3))
        assert_within(mean, want_mean, worst + 4 * r * want_mean.abs(), f"mean {size}")
        # Each value's square of its distance to the mean, off by both; sums of at most `count` terms within a part.
        spread = want_var.sqrt() + worst
        assert_within(var, want_var, 4 * worst * spread + (count + 8) * r * spread**2, f"variance {size}")

        for norm in (False, True):
            dy = grad.double()
            if norm:
                a, b, center, d = (t.double()[:, None, None] for t in line)
                dy = a * dy + b * (y.double() - center) + d
            want_u, want_weight = torch.autograd.grad(exact, leaves, dy, retain_graph=True) if norm else plain
            size_u, size_weight = _gradient_sizes(u.double(), weight.double(), dy)
            if norm:  # three more roundings, of larger terms
                slack = a.abs() * grad.double().abs() + b.abs() * (y.double().abs() + center.abs()) + d.abs()
                more_u, more_weight = _gradient_sizes(u.double(), weight.double(), slack)
                size_u, size_weight = size_u + more_u, size_weight + more_weight
            extra = (address(y), [t.data_ptr() for t in line]) if norm else ([], [])
            d_u = torch.full((n, h, w, f), math.nan, dtype=dtype).permute(0, 3, 1, 2)
            d_weight = torch.full_like(weight, math.nan)
            arguments = code, size, address(u), address(grad), weight.data_ptr(), *extra
            core.deconv_backward_cpu(*arguments, address(d_u), d_weight.data_ptr(), threads)
            assert_within(d_u, want_u, stored(want_u, terms(4 * o) * size_u), f"gradient of u {size} {norm}")
            bound = stored(want_weight, terms(n * h * w) * size_weight)
            assert_within(d_weight, want_weight, bound, f"gradient of weight {size} {norm}")
            # Each alone, without what it does not need: the same sums in the same order.
            both = d_u.clone(), d_weight.clone()
            d_u.fill_(math.nan), d_weight.fill_(math.nan)
            core.deconv_backward_cpu(code, size, [], *arguments[3:], address(d_u), 0, threads)
            core.deconv_backward_cpu(*arguments[:4], 0, *extra, [], d_weight.data_ptr(), threads)
            assert torch.equal(d_u, both[0])
            assert torch.equal(d_weight, both[1])


def test_deconv_op_on_every_kind_of_image() -> None:
    """The op and its gradients against torch's: NCHW, channels_last, a slice; wide (kernels), narrow (library)."""
    torch.manual_seed(0)
    for channels in (8, 48):
        weight = torch.randn(channels, 2 * channels, 4, 4, requires_grad=True)
        bias = torch.randn(2 * channels, requires_grad=True)
        base = torch.randn(2, channels + 4, 5, 6)
        for u in (
            base[:, 2:-2],
            base[:, 2:-2].contiguous(memory_format=channels_last),
            base[:, :channels].contiguous(),
        ):
            u = u.detach().requires_grad_()
            leaves = (u, weight, bias)
            got, want = deconv.deconv(*leaves), F.conv_transpose2d(*leaves, stride=2, padding=1)
            assert got.is_contiguous(memory_format=channels_last)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            cotangent = torch.randn_like(want)
            pairs = zip(
                torch.autograd.grad(got, leaves, cotangent), torch.autograd.grad(want, leaves, cotangent), strict=True
            )
            for a, b in pairs:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_deconv_operators_describe_themselves() -> None:
    """opcheck: schemas, fake tensors' strides, no aliases; with the BatchNorm folded (fp32, wide) and not."""
    ops = torch.ops.wavemix_kernels
    for channels, layout in ((40, channels_last), (40, torch.contiguous_format), (8, channels_last)):
        u = torch.randn(2, channels, 3, 4).contiguous(memory_format=channels_last)
        weight, bias = torch.randn(channels, 36, 4, 4), torch.randn(36)
        y, mean, var = ops.deconv_stats(u, weight, bias, "auto")
        grad = torch.randn(y.shape).contiguous(memory_format=layout)
        invstd = torch.rsqrt(var + 1e-5)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(ops.deconv_stats, (u, weight, bias, "auto"), test_utils=tests)
        torch.library.opcheck(ops.deconv_residual, (u, weight, bias, grad, "auto"), test_utils=tests)
        torch.library.opcheck(ops.deconv_backward_x, (grad, weight, "auto"), test_utils=tests)
        torch.library.opcheck(ops.deconv_backward_weight, (grad, u, True, "auto"), test_utils=tests)
        if deconv.folds("auto", channels, grad):
            arguments = (grad, y, mean, invstd, bias, True, u, weight, "auto")
            torch.library.opcheck(ops.deconv_norm_backward, arguments, test_utils=tests)


def test_deconv_of_nothing() -> None:
    """Statistics of no pixels are NaN; gradients of weights that saw none are zero."""
    ops = torch.ops.wavemix_kernels
    u, weight, bias = torch.empty(0, 40, 3, 4), torch.randn(40, 36, 4, 4), torch.randn(36)
    y, mean, var = ops.deconv_stats(u, weight, bias, "auto")
    assert y.shape == (0, 36, 6, 8)
    assert mean.isnan().all()
    assert var.isnan().all()
    assert ops.deconv_backward_x(y, weight, "auto").shape == u.shape
    assert all(not t.any() for t in ops.deconv_backward_weight(y, u, True, "auto"))


def test_deconv_errors() -> None:
    u = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match=r"weight: expected \(4, O, 4, 4\) to go with u, got \(4, 2, 3, 3\)"):
        deconv.deconv(u, torch.zeros(4, 2, 3, 3))
    with pytest.raises(ValueError, match=r"bias: expected shape \(2,\)"):
        deconv.deconv(u, torch.zeros(4, 2, 4, 4), torch.zeros(3))
    with pytest.raises((TypeError, ValueError), match="weight"):
        deconv.deconv(u, torch.zeros(4, 2, 4, 4, dtype=torch.float64))


# --- The reduction and its Haar levels -------------------------------------------------------------------


def _absolute_pyramid(r: Tensor, levels: int) -> list[Tensor]:
    """The pyramid with plus signs only, all four bands alike: what rounding errors scale with."""
    out = []
    for _ in range(levels):
        r = F.avg_pool2d(r, 2) * 2
        out.append(torch.cat((r, r.repeat_interleave(3, 1)), 1))
    return out


REDUCTIONS = [  # n, c, o, h, w, levels
    (2, 5, 3, 4, 6, 1),
    (1, 1, 1, 2, 2, 1),
    (2, 64, 16, 24, 32, 3),
    (3, 36, 9, 16, 48, 4),
    (1, 19, 48, 28, 36, 2),
    (1, 8, 2, 8, 1032, 3),
]


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("by_channel", [False, True], ids=["channels_inner", "pixels_inner"])
@pytest.mark.parametrize("size", REDUCTIONS, **ids)
def test_reduce_haar(dtype: torch.dtype, by_channel: bool, size: tuple[int, ...]) -> None:
    """Forward and all gradients, x in either memory order, with something added to its gradient."""
    n, c, o, h, w, levels = size
    generator, wide = torch.Generator().manual_seed(c), accumulation(dtype)
    x = image(n, c, h, w, dtype=dtype, gap=0 if by_channel else 2, generator=generator)
    add = image(n, c, h, w, dtype=dtype, generator=generator)
    if by_channel:
        x, add = x.contiguous(), add.contiguous()
    weight, bias = (torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in ((o, c), (o,)))
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    sizes = [t.detach().abs().requires_grad_() for t in leaves]
    exact = reference.reduce_haar(leaves[0], leaves[1][:, :, None, None], leaves[2], levels)
    size_out = _absolute_pyramid(F.conv2d(sizes[0], sizes[1][:, :, None, None], sizes[2]), levels)
    grads = [image(*z.shape, dtype=dtype, generator=generator) for z in exact]
    want = torch.autograd.grad(exact, leaves, [g.double() for g in grads])
    size_grads = torch.autograd.grad(size_out, sizes, [g.double().abs() for g in grads])
    r, half = UNIT_ROUNDOFF[wide] * (2 if dtype == torch.float64 else 1), UNIT_ROUNDOFF[dtype]
    # The half types round the reduced image between the product and the transform.
    between = 0.0 if wide == dtype else half

    def check(got: Tensor, want: Tensor, terms: int, sizes: Tensor, what: str) -> None:
        off = ((terms + 4 * levels + 2) * r + between) * sizes  # [Higham, section 3.1]
        stored = half * (want.abs() + off) + UNDERFLOW[dtype] * 4**levels if wide != dtype else 0
        assert_within(got, want.detach(), off.detach() + stored, f"{what} {size}")

    address, code, shape = _native.address, _native.DTYPES[dtype], (n, c, h, w)
    for threads in (1, 3):
        zs = [torch.full(z.permute(0, 2, 3, 1).shape, math.nan, dtype=dtype).permute(0, 3, 1, 2) for z in exact]
        core.reduce_haar_cpu(
            code, levels, shape, o, address(x), address(weight), address(bias), [address(z) for z in zs], threads
        )
        for z, want_z, size_z in zip(zs, exact, size_out, strict=True):
            check(z, want_z, c, size_z, "output")
        d_x = torch.empty_strided(add.shape, add.stride(), dtype=dtype).fill_(math.nan)
        d_weight, d_bias = torch.full_like(weight, math.nan), torch.full_like(bias, math.nan)
        core.reduce_haar_backward_cpu(
            code, levels, shape, o, address(x), address(weight), [address(g) for g in grads], address(d_x),
            address(add), d_weight.data_ptr(), d_bias.data_ptr(), threads,
        )  # fmt: skip
        check(d_x, want[0] + add.double(), o, size_grads[0] + add.double().abs(), "gradient of x")
        check(d_weight, want[1], n * h * w, size_grads[1], "gradient of weight")
        check(d_bias, want[2], n * h * w, size_grads[2], "gradient of bias")


def test_reduce_haar_needs_contiguous_channels() -> None:
    x, weight = torch.zeros(1, 4, 4, 8)[..., ::2], torch.zeros(2, 4)
    z = torch.zeros(1, 8, 2, 2).contiguous(memory_format=channels_last)
    call: list[Any] = [1, 1, x.shape, 2, _native.address(x), _native.address(weight), [], [_native.address(z)], 1]
    with pytest.raises(ValueError, match="x: expected contiguous channels or pixels"):
        core.reduce_haar_cpu(*call)
    call[4], call[7] = _native.address(z[:, :4]), [_native.address(z.contiguous())]
    with pytest.raises(ValueError, match="zs: expected contiguous channels"):
        core.reduce_haar_cpu(*call)
