"""The Waveblock's operators on backend "cuda": in the emulator, or on the GPU with --device cuda."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

import wavemix_kernels as wk
from tests.emulator.haar_cases import launches
from tests.golden_models import assert_reproduces
from tests.tolerances import DTYPES, UNDERFLOW, UNIT_ROUNDOFF, accumulation, assert_within
from wavemix_kernels.ops.haar import pyramid as haar_pyramid
from wavemix_kernels.ops.haar import reference as haar_reference
from wavemix_kernels.ops.reduce_haar import op as reduce_haar
from wavemix_kernels.ops.reduce_haar import reference as reduce_haar_reference
from wavemix_kernels.reference import Waveblock

pytestmark = pytest.mark.usefixtures("core")
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def ran(core: ModuleType | None, *kernels: str) -> None:
    """Asserts that these kernels, and no other, were launched since last asked."""
    if core is not None:
        names = launches(core)
        assert all(name.startswith(kernels) for name in names), names
        assert all(any(name.startswith(kernel) for name in names) for kernel in kernels), names


def random(*shape: int, dtype: torch.dtype, device: str, layout: str = "nchw") -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    return x.contiguous(memory_format=LAYOUTS[layout]) if len(shape) == 4 else x


def pyramid_bounds(size: Tensor, exact: list[Tensor], dtype: torch.dtype, terms: int) -> list[Tensor]:
    """What Z_l may err by: `terms` roundings of the sums, of which `size` bounds the image, then two for each level
    (the factor 1/2 is exact), and one of the result. Float64 is compared with a result as inexact as itself."""
    u = UNIT_ROUNDOFF[accumulation(dtype)] * (2 if dtype is torch.float64 else 1)
    bounds = []
    for level, (sums, z) in enumerate(zip(haar_reference.haar_pyramid(size, len(exact)), exact, strict=True), 1):
        ll = sums[:, : size.shape[1]]
        high = ll.repeat_interleave(3, 1)
        arithmetic = (terms + 2 * level) * u * torch.cat((ll, high), 1)
        bounds.append(arithmetic + UNIT_ROUNDOFF[dtype] * (z.abs() + arithmetic) + UNDERFLOW[dtype])
    return bounds


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_haar_pyramid(core: ModuleType | None, device: str, dtype: torch.dtype, layout: str, levels: int) -> None:
    x = random(2, 9 if levels == 3 else 8, 16, 32, dtype=dtype, device=device, layout=layout)
    got = haar_pyramid.haar_pyramid(x, levels, backend="cuda")
    ran(core, "haar_analysis")
    exact = haar_reference.haar_pyramid(x.double(), levels)
    for z, wanted, bound in zip(got, exact, pyramid_bounds(x.double().abs(), exact, dtype, 0), strict=True):
        assert z.is_contiguous(memory_format=LAYOUTS[layout])
        assert_within(z, wanted, bound)


@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_haar_pyramid_gradients(core: ModuleType | None, device: str, layout: str, levels: int) -> None:
    x = random(1, 2, 16, 16, dtype=torch.float64, device=device, layout=layout).requires_grad_()

    def pyramid(t: Tensor) -> list[Tensor]:
        return haar_pyramid.haar_pyramid(t, levels, backend="cuda")

    grads = [torch.randn_like(z) for z in pyramid(x)]
    (got,) = torch.autograd.grad(pyramid(x), x, grads)
    (wanted,) = torch.autograd.grad(haar_reference.haar_pyramid(x, levels), x, grads)
    torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-13)
    ran(core, "haar_analysis", "haar_synthesis")


def exact_reduction(x: Tensor, weight: Tensor, bias: Tensor | None, levels: int) -> tuple[list[Tensor], Tensor]:
    """Z_l in float64, and the sum of magnitudes behind each pixel of the reduced image."""
    x, weight = x.double().cpu(), weight.double().cpu()
    bias = None if bias is None else bias.double().cpu()
    magnitudes = torch.nn.functional.conv2d(x.abs(), weight.abs(), None if bias is None else bias.abs())
    return reduce_haar_reference.reduce_haar(x, weight, bias, levels), magnitudes


@pytest.mark.parametrize("channels, outputs, levels", [(16, 4, 4), (144, 36, 2), (192, 48, 3), (21, 7, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reduce_haar(
    core: ModuleType | None, device: str, dtype: torch.dtype, layout: str, channels: int, outputs: int, levels: int
) -> None:
    x = random(2, channels, 16, 16, dtype=dtype, device=device, layout=layout)
    weight = random(outputs, channels, 1, 1, dtype=dtype, device=device) / 4
    bias = random(outputs, dtype=dtype, device=device) if levels > 1 else None
    got = reduce_haar.reduce_haar(x, weight, bias, levels, backend="cuda")
    ran(core, "reduce_haar")
    exact, magnitudes = exact_reduction(x, weight, bias, levels)
    # Tensor cores may cut a sum off instead of rounding it.
    terms = (channels + 1) * (1 if dtype in (torch.float32, torch.float64) else 2)
    for z, wanted, bound in zip(got, exact, pyramid_bounds(magnitudes, exact, dtype, terms), strict=True):
        assert z.is_contiguous(memory_format=LAYOUTS[layout])
        assert_within(z, wanted, bound)


@pytest.fixture
def allow_tf32() -> Iterator[Callable[[bool], None]]:
    """Sets torch's switch; as it was afterwards."""
    before = torch.backends.cuda.matmul.allow_tf32

    def allow(value: bool) -> None:
        torch.backends.cuda.matmul.allow_tf32 = value

    yield allow
    allow(before)


def test_reduce_haar_rounds_to_tf32_only_when_allowed(device: str, allow_tf32: Callable[[bool], None]) -> None:
    x = random(1, 32, 8, 16, dtype=torch.float32, device=device)
    weight = random(8, 32, 1, 1, dtype=torch.float32, device=device)
    (wanted,), magnitudes = exact_reduction(x, weight, None, 1)
    (bound,) = pyramid_bounds(magnitudes, [wanted], torch.float32, 32)
    allow_tf32(False)
    (z,) = reduce_haar.reduce_haar(x, weight, backend="cuda")
    assert_within(z, wanted, bound)
    allow_tf32(True)
    (z,) = reduce_haar.reduce_haar(x, weight, backend="cuda")
    with pytest.raises(AssertionError, match="beyond the bound"):
        assert_within(z, wanted, bound)
    (wide,) = pyramid_bounds(magnitudes, [wanted], torch.float32, 2 * 32 + 2**14)  # 2 * 2^-11 from both factors
    assert_within(z, wanted, wide)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reduce_haar_gradients(core: ModuleType | None, device: str, layout: str) -> None:
    x = random(2, 6, 8, 8, dtype=torch.float64, device=device, layout=layout).requires_grad_()
    weight = random(3, 6, 1, 1, dtype=torch.float64, device=device).requires_grad_()
    bias = random(3, dtype=torch.float64, device=device).requires_grad_()
    leaves = (x, weight, bias)
    got = reduce_haar.reduce_haar(*leaves, 3, backend="cuda")
    wanted = reduce_haar_reference.reduce_haar(*leaves, 3)
    grads = [torch.randn_like(z) for z in wanted]
    for a, b in zip(torch.autograd.grad(got, leaves, grads), torch.autograd.grad(wanted, leaves, grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    ran(core, "reduce_haar", "haar_synthesis")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_waveblock(core: ModuleType | None, device: str, level: int, layout: str) -> None:
    """FusedWaveblock on backend "cuda" against the reference module, output and every gradient, in float64."""
    torch.manual_seed(level)
    options = {"level": level, "mult": 2, "ff_channel": 8, "final_dim": 8, "dropout": 0.0}
    reference = Waveblock(**options).double().to(device)
    block = wk.FusedWaveblock(**options).double().to(device)
    block.load_state_dict(reference.state_dict())
    x = random(2, 8, 16, 32, dtype=torch.float64, device=device, layout=layout)
    results = []
    for module, backend in ((reference, "reference"), (block, "cuda")):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with wk.backend(backend):
            out = module(leaf)
            out.backward(torch.cos(out.detach()))
        assert leaf.grad is not None
        results.append([out.detach(), leaf.grad, *(p.grad for p in module.parameters())])
    for got, wanted in zip(results[1], results[0], strict=True):
        # Backward through `level` BatchNorms, each amplifying by the inverse of its batch's deviation.
        assert (got - wanted).norm() <= 1e-11 * max(wanted.norm(), x.norm())
    ran(core, "reduce_haar", "haar_synthesis")


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_waveblock_reproduces_upstream(core: ModuleType | None, device: str, level: int) -> None:
    """Upstream's recorded outputs, gradients and running statistics to 1e-10."""
    if device != "cpu":
        pytest.skip("compares on the CPU: test_waveblock above runs on the device")
    with wk.backend("cuda"):
        assert_reproduces(f"waveblock_level{level}", wk.FusedWaveblock)
    ran(core, "reduce_haar", "haar_synthesis")


@pytest.mark.parametrize("module", [haar_pyramid, reduce_haar], ids=["haar_pyramid", "reduce_haar"])
def test_self_tests_pass(device: str, module: ModuleType) -> None:
    error, bound = module.self_test("cuda", torch.device(device))
    assert 0 < error <= bound
