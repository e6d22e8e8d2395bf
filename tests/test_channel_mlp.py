"""Wave-MLP's channel MLP, and the products around it: as modules, and kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.test_wave_block import assert_same_step
from tests.test_wavemlp import normal, randomised
from tests.tolerances import UNDERFLOW, UNIT_ROUNDOFF, accumulation, assert_within
from wavemix_kernels import wavemlp
from wavemix_kernels.nn.wavemlp import reference as patm
from wavemix_kernels.ops.common import layout, products
from wavemix_kernels.ops.mlp import channel as channel_mlp


class TestChannelMlp:
    @pytest.mark.parametrize("name", ["cpu", "reference", "triton"])
    def test_self_test(self, name: str) -> None:
        if (reason := channel_mlp.BACKENDS[name].why_not()) is not None:
            pytest.skip(f"{name}: {reason}")
        error, bound = channel_mlp.self_test(name, torch.device("cpu"))
        assert error <= bound

    @pytest.mark.parametrize("size", [(2, 1), (9, 8)], ids=str)
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_module_matches_reference(self, channels_last: bool, size: tuple[int, int]) -> None:
        exact = randomised(patm.Mlp(6, 20, 10).double())
        fused = wavemlp.Mlp(6, 20, 10).double()
        fused.load_state_dict(exact.state_dict(), strict=True)
        x = normal(2, 6, *size)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        assert_same_step(fused, exact, x)
        assert layout.is_channels_last(fused(x)) == channels_last
        with torch.autocast("cpu", torch.bfloat16):
            assert fused.float()(x.float()).dtype == torch.bfloat16

    def test_dropout_runs_the_modules(self) -> None:
        mlp = wavemlp.Mlp(4, 6, drop=1.0)
        assert torch.equal(mlp(torch.ones(1, 4, 3, 3)), torch.zeros(1, 4, 3, 3))
        assert mlp.eval()(torch.ones(1, 4, 3, 3)).any()

    def test_wrong_input(self) -> None:
        with pytest.raises(ValueError, match=r"x: expected 4 channels \(in_features\), got shape \(1, 5, 3, 3\)"):
            wavemlp.Mlp(4, 6)(torch.zeros(1, 5, 3, 3))

    def test_opcheck(self) -> None:
        x = normal(2, 4, 3, 5, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
        weights = [t.detach() for t in wavemlp.Mlp(4, 8).parameters()]
        inputs = [t.requires_grad_() for t in (x, *weights)]
        torch.library.opcheck(torch.ops.wavemix_kernels.channel_mlp, (*inputs, "cpu"))
        plain = [t.detach() for t in inputs]
        torch.library.opcheck(torch.ops.wavemix_kernels.channel_mlp_backward, (plain[0], *plain, "cpu"))

    # More pixels than channels, and fewer: the library's convolution and its plain product.
    @pytest.mark.parametrize("pixels", [3, 40])
    def test_products(self, pixels: int) -> None:
        image, grad = normal(1, 12, 1, pixels), normal(1, 20, 1, pixels, seed=2)
        weight, bias = normal(20, 12, 1, 1, seed=3), normal(20, seed=4)

        def all_of(*tensors: Tensor) -> list[Tensor]:
            image, grad, weight, bias = (
                t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors
            )
            return [
                products.project(image, weight, bias),
                products.backward_x(grad, image, weight),
                products.backward_weight(grad, image, weight),
                products.backward_bias(grad),
            ]

        tensors = (image, grad, weight, bias)
        got = all_of(*(t.float() for t in tensors))
        tensors = tuple(t.float().double() for t in tensors)
        size = all_of(*(t.abs() for t in tensors))
        # Products of n terms err by (n + 1) u of the sum of their absolute values; no sum here has more than 40.
        for value, want, bound in zip(got, all_of(*tensors), size, strict=True):
            assert_within(value, want, 41 * UNIT_ROUNDOFF[torch.float32] * bound)


def by_pixels(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """A channels_last image whose values are exact in `dtype`."""
    return (scale * normal(*shape, seed=seed)).to(dtype).contiguous(memory_format=torch.channels_last)


class TestWideMlp:
    """The kernel for images of fewer pixels than hidden channels: threads share the latter."""

    #: Images, channels, rows and columns, hidden channels: whole vectors; none; several blocks of pixels.
    @pytest.mark.parametrize("size", [(2, 32, 5, 4, 128), (1, 13, 3, 7, 45), (1, 6, 23, 23, 600)], ids=str)
    @pytest.mark.parametrize("dtype", UNIT_ROUNDOFF, ids=str)
    @pytest.mark.parametrize("threads", [1, 3])
    @pytest.mark.parametrize("bias", [False, True])
    def test_matches_float64(
        self,
        bias: bool,
        threads: int,
        dtype: torch.dtype,
        size: tuple[int, ...],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if (reason := channel_mlp.BACKENDS["cpu"].why_not()) is not None:
            pytest.skip(reason)
        n, c, h, w, k = size
        o = c + 3
        assert n * h * w < k
        monkeypatch.setattr(channel_mlp, "_BFLOAT16_PRODUCTS", False)
        x, grad = (by_pixels(n, count, h, w, seed=count, dtype=dtype) for count in (c, o))
        weights = [
            None if not bias and t.dim() == 1 else t.to(dtype)
            for t in (
                normal(k, c, 1, 1, seed=2) / c**0.5, normal(k, seed=3), normal(o, k, 1, 1, seed=4) / k**0.5,
                normal(o, seed=5),
            )
        ]  # fmt: skip
        mlp = channel_mlp.Weights(*weights)  # type: ignore[arg-type] - a bias may be None
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            functions = channel_mlp.BACKENDS["cpu"].functions
            got = [functions["forward"](x, mlp), *functions["backward"](grad, x, mlp)]
        finally:
            torch.set_num_threads(before)
        exact = channel_mlp.Weights(*(None if t is None else t.double() for t in weights))  # type: ignore[arg-type] - the same
        hidden = products.project(x.double(), exact.w1, exact.b1)
        size_of_hidden = products.project(
            x.double().abs(), exact.w1.abs(), None if exact.b1 is None else exact.b1.abs()
        )
        reference = channel_mlp.BACKENDS["reference"].functions
        want = [reference["forward"](x.double(), exact), *reference["backward"](grad.double(), x.double(), exact)]
        u, stored = UNIT_ROUNDOFF[accumulation(dtype)], UNIT_ROUNDOFF[dtype]
        # A hidden value errs by (c + 1) u of the sum of its terms, GELU by 5 u and, its slope and curvature being
        # at most 1.13, by as much; what follows is a sum of products of such.
        hidden_error = 1.13 * (c + 2) * u * size_of_hidden + 5 * u * (hidden.abs() + 1)
        value, slope = hidden.abs() + hidden_error, torch.full_like(hidden, 1.13)
        w1, w2 = exact.w1.abs(), exact.w2.abs()
        g, image = grad.double().abs(), x.double().abs()
        g_h = products.backward_x(g, hidden, w2)
        g_h_error = g_h * (hidden_error + (o + 2) * u * slope)

        def sums(of: Callable[[Tensor], Tensor], value: Tensor, error: Tensor, terms: int) -> Tensor:
            return of(error) + (terms + 2) * u * of(value)

        pixels = n * h * w
        bounds = [
            sums(lambda t: products.project(t, w2, None), value, hidden_error, k),
            sums(lambda t: products.backward_x(t, image, w1), g_h * slope, g_h_error, k),
            sums(lambda t: products.backward_weight(t, image, w1), g_h * slope, g_h_error, pixels),
            sums(lambda t: t.sum((0, 2, 3)), g_h * slope, g_h_error, pixels),
            sums(lambda t: products.backward_weight(g, t, w2), value, hidden_error, pixels),
            sums(lambda t: t.sum((0, 2, 3)), g, torch.zeros_like(g), pixels),
        ]
        names = ("out", "x", "w1", "b1", "w2", "b2")
        for name, actual, expected, bound in zip(names, got, want, bounds, strict=True):
            if not bias and name in ("b1", "b2"):
                assert actual is None
                continue
            # float64's own reference errs as much.
            bound = 2 * bound + 2 * u * (expected.abs() + (0 if exact.b2 is None else exact.b2.abs().max()))
            assert_within(actual, expected, bound + stored * expected.abs() + UNDERFLOW[dtype], name)


@pytest.mark.parametrize("size", [(2, 37, 20, 9, 5), (1, 64, 48, 30, 21), (3, 5, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weight_gradient_of_slices(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    """Both images are slices of wider ones, and there are pixels for more than one block."""
    n, o, c, h, w = size
    grad = by_pixels(n, o + 5, h, w, seed=1, dtype=dtype)[:, 3 : 3 + o]
    image = by_pixels(n, c + 2, h, w, seed=2, dtype=dtype)[:, 1 : 1 + c]
    got = products.backward_weight(grad, image, torch.empty(o, c, 1, 1, dtype=dtype))
    rows, columns = (products.matrix(t.double()) for t in (grad, image))
    bound = (n * h * w + 1) * UNIT_ROUNDOFF[dtype] * (rows.abs().t() @ columns.abs())
    # In float64 the product that it is compared with errs as much.
    assert_within(got.flatten(1), rows.t() @ columns, 2 * bound)
