"""The CUDA kernels of Haar and reduce_haar in the emulator: which kernel a shape takes, launches, 64-bit offsets."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.emulator.build import launches
from tests.kernels.cuda.support import ORDERS
from tests.kernels.test_haar_outputs import check_outputs
from tests.ops.contract import FAR, LAYOUTS, Case, check, image, pairwise, randn, results
from tests.ops.test_haar import Analysis, Pyramid, Synthesis
from tests.ops.test_reduce_haar import Gradients, ReduceHaar
from tests.tolerances import DTYPES
from wavemix_kernels import backends
from wavemix_kernels.ops.common import layout as memory_order
from wavemix_kernels.ops.norm.batch_norm import Affine
from wavemix_kernels.ops.reduce_haar import norm_reduce_haar
from wavemix_kernels.ops.reduce_haar import op as reduce_haar

HALF = torch.float16


@pytest.fixture(autouse=True)
def core(emulated_core: ModuleType) -> Iterator[ModuleType]:
    """The emulated core, whatever --device says."""
    assert emulated_core.MAX_HAAR_LEVELS == 5
    with backends.emulated_cuda(emulated_core):
        yield emulated_core


def case(shape: tuple[int, ...], levels: int, layout: str, dtype: torch.dtype = torch.float32, **more: Any) -> Case:
    return Case(dtype=dtype, size=(shape, levels), layout=layout, **more)


# Layouts of image and bands, shape, kernel, elements of an access: each kernel once, then other memory that takes it.
FORMS = (
    ("nchw", "nchw", (2, 3, 9, 32), "rows", 8), ("nchw", "nchw", (2, 3, 9, 31), "rows", 1),
    ("nchw", "nchw", (2, 3, 9, 24), "rows", 4), ("nchw", "nchw", (2, 3, 9, 12), "rows", 2),
    ("channels_last", "channels_last", (2, 8, 9, 7), "channels", 8),
    ("channels_last", "channels_last", (2, 12, 9, 7), "channels", 4),
    ("channels_last", "channels_last", (2, 6, 9, 7), "channels", 2),
    ("channels_last", "channels_last", (2, 7, 9, 7), "channels", 1),
)  # fmt: skip
MEMORY = (
    ("cropped", "nchw", (2, 3, 9, 32), "rows", 1), ("nchw", "cropped", (2, 3, 9, 32), "rows", 1),
    ("transposed", "transposed", (2, 3, 9, 32), "rows", 1), ("sliced", "sliced", (2, 3, 9, 32), "rows", 1),
    ("channels_last", "nchw", (2, 8, 9, 7), "channels", 1),
    ("channels_slice", "channels_last", (2, 8, 9, 7), "channels", 1),
    ("channels_last", "nchw", (2, 1, 9, 32), "rows", 8),  # one channel: the same memory as NCHW
)  # fmt: skip
LEVELS = tuple(range(1, 6))
KERNELS = tuple(itertools.product(DTYPES, LEVELS))  # that a form is instantiated for
REACHED = [
    Case(form=one.form, dtype=one.kernel[0], levels=one.kernel[1], lows=one.lows)
    for one in pairwise(form=FORMS, kernel=KERNELS, lows=(False, True))
]
REACHED += pairwise(form=MEMORY, dtype=DTYPES, levels=LEVELS, lows=(False, True))


@pytest.mark.parametrize("one", REACHED, ids=str)
def test_shapes_reach_the_kernel_meant_for_them(core: ModuleType, one: Case) -> None:
    (memory, bands, shape, kernel, elements), dtype = one.form, one.dtype
    launches(core)
    made = case(shape, one.levels, memory, dtype, edge=1.0, bands=bands, add=False, lows=one.lows, absent="")
    check_outputs(made, "cuda", "cpu")
    ran, form = launches(core), f"{kernel} ({min(16, elements * dtype.itemsize)} bytes"
    assert {name.split(", ")[0] for name in ran} == {f"haar_{way}_{form}" for way in ("analysis", "synthesis")}


def test_large_tensors_are_cut_into_several_launches(core: ModuleType) -> None:
    """The emulated core allows 1,024 tasks a launch instead of 2^31; every axis gets cut."""
    for shape in ((40, 4, 16, 16), (1, 2048, 4, 4), (1, 1, 704, 32), (1, 1, 32, 704)):
        for levels, layout in ((1, "nchw"), (2, "channels_last"), (5 if min(shape[2:]) > 16 else 2, "nchw")):
            launches(core)
            check(Analysis(), case(shape, levels, layout, mode="antisymmetric"), "cuda", "cpu")
            assert len(launches(core)) > 2 or levels > 1
            check(Pyramid(), case(shape, levels, layout, last=True, cotangents="nchw"), "cuda", "cpu")


def test_reduce_haar_cuts_large_batches_into_several_launches(core: ModuleType) -> None:
    """The emulated core allows 8 blocks a launch instead of 2^31."""
    for shape, outputs, expected in (((19, 4, 4, 4), 8, 3), ((2, 4, 20, 66), 8, 2), ((5, 4, 4, 4), 200, 3)):
        x, weight = image(randn(*shape), HALF, layout="channels_last"), randn(outputs, shape[1], 1, 1).to(HALF)
        launches(core)
        reduce_haar.reduce_haar(x, weight, backend="cuda")
        assert len(launches(core)) == expected
        more = {"layout": "channels_last", "last": True, "bias": True, "cotangents": "nchw"}
        check(ReduceHaar(), Case(dtype=HALF, size=(shape, outputs, 1), **more), "cuda", "cpu")


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_results_do_not_depend_on_the_order_of_threads(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    last, runs = layout == "channels_last", []
    for order in ORDERS:
        monkeypatch.setenv("WAVEMIX_EMULATOR_ORDER", order)
        made = [results(Pyramid(), case((1, 8, 32, 32), 5, layout, last=last, cotangents=layout), "cuda", "cpu")[2]]
        for levels in (1, 3):
            odd = case((1, 8, 33, 30), levels, layout, mode="symmetric", add=True)
            made += [results(contract, odd, "cuda", "cpu")[2] for contract in (Analysis(), Synthesis())]
        for dtype in (HALF, torch.float32):
            size = ((1, 40, 32, 32), 12, 5)
            one = Case(dtype=dtype, size=size, layout=layout, last=last, bias=False, cotangents=layout)
            made.append(results(ReduceHaar(), one, "cuda", "cpu")[2])
        one = Case(dtype=HALF, size=((1, 16, 8, 16), 4, 3), layout=layout, bias=True, add=None, cotangents=layout)
        made.append(results(Gradients(), one, "cuda", "cpu")[2])
        runs.append([t for tensors in made for t in tensors.values()])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def raw_reduction(core: ModuleType, x: Tensor, weight: Tensor, z: Tensor, tf32: bool = False) -> None:
    code, address = backends._native.DTYPES[x.dtype], backends._native.address
    core.reduce_haar_cuda(code, 1, x.shape, weight.shape[0], address(x), address(weight), [], [address(z)], tf32, 0)


@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("side", ["x", "weight", "z"])
def test_reduce_haar_offsets_are_64_bit(core: ModuleType, side: str, far: str) -> None:
    shapes = {"x": (2, 3, 4, 4), "weight": (2, 3, 1, 1), "z": (2, 8, 2, 2)}
    x, weight, z = (image(randn(*s), HALF, layout=far if name == side else "nchw") for name, s in shapes.items())
    raw_reduction(core, x, weight[:, :, 0, 0], z.fill_(float("nan")))
    (wanted,) = reduce_haar.reference.reduce_haar(x.double(), weight.double(), None, 1)
    torch.testing.assert_close(z.double(), wanted, rtol=2.0**-10, atol=2.0**-10)


@pytest.mark.parametrize(
    "dtype, tf32, channels, outputs, layout, kernel",
    [
        (HALF, False, 144, 36, "channels_last", "float16, tensor cores, 5 tiles of outputs, 16 bytes along C"),
        (torch.bfloat16, False, 192, 48, "nchw", "bfloat16, tensor cores, 6 tiles of outputs, 16 bytes along W"),
        (HALF, False, 16, 64, "channels_last", "float16, tensor cores, 8 tiles of outputs, 16 bytes along C"),
        (HALF, False, 20, 5, "channels_last", "float16, tensor cores, 2 tiles of outputs, 8 bytes along C"),
        (HALF, False, 20, 5, "channels_slice", "float16, tensor cores, 2 tiles of outputs, 2 bytes along C"),
        (torch.float32, True, 16, 16, "nchw", "float32, tensor cores, 2 tiles of outputs, 16 bytes along W"),
        (torch.float32, True, 19, 70, "channels_slice", "float32, tensor cores, 5 tiles of outputs, 4 bytes along C"),
        (torch.float32, False, 16, 64, "nchw", "float32, fma, 4 tiles of outputs, 16 bytes along W"),
        (torch.float32, False, 7, 36, "channels_last", "float32, fma, 5 tiles of outputs, 4 bytes along C"),
        (torch.float64, False, 16, 36, "transposed", "float64, fma, 2 tiles of outputs, 8 bytes along C"),
    ],
)
def test_reduce_haar_takes_the_kernel_meant_for_the_shape(
    core: ModuleType, dtype: torch.dtype, tf32: bool, channels: int, outputs: int, layout: str, kernel: str
) -> None:
    x, weight = image(randn(1, channels, 4, 16), dtype, layout=layout), randn(outputs, channels).to(dtype)
    z = image(torch.zeros(1, 4 * outputs, 2, 8), dtype, layout=layout)
    launches(core)
    raw_reduction(core, x, weight, z, tf32)
    assert launches(core) == [f"reduce_haar ({kernel}, 1 levels)"]
    (wanted,) = reduce_haar.reference.reduce_haar(x.double(), weight.double()[:, :, None, None], None, 1)
    torch.testing.assert_close(z.double(), wanted, rtol=0.02, atol=0.2)


@pytest.mark.parametrize(
    "dtype, shape, outputs, layout, ran",
    [
        (HALF, (1, 144, 4, 4), 36, "channels_last", "gradients (float16, size 3, 2 levels)"),
        (torch.bfloat16, (1, 16, 4, 4), 20, "channels_last", "gradients (bfloat16, size 2, 2 levels)"),
        (HALF, (1, 16, 4, 4), 4, "nchw", "gradients (float16, size 1, along W, 2 levels)"),
        (
            HALF,
            (1, 20, 4, 4),
            5,
            "channels_last",
            "multiples of 8 up to 256 channels and of 2 up to 64 outputs, got 20",
        ),
        (torch.float32, (1, 16, 4, 4), 4, "channels_last", "float16 and bfloat16, got float32"),
    ],
)
def test_reduce_haar_gradients_take_their_kernel_or_say_why_not(
    core: ModuleType, caplog: pytest.LogCaptureFixture, dtype: torch.dtype, shape: tuple[int, ...], outputs: int,
    layout: str, ran: str,
) -> None:  # fmt: skip
    caplog.set_level("INFO", "wavemix_kernels")
    launches(core)
    size = (shape, outputs, 2)
    one = Case(dtype=dtype, size=size, layout=layout, bias=True, add="channels_last", cotangents="channels_last")
    check(Gradients(), one, "cuda", "cpu")
    if ran.startswith("gradients"):
        assert launches(core)[0] == f"reduce_haar_{ran}"
    else:
        assert not [name for name in launches(core) if name.startswith("reduce_haar")]
        assert f"not by cuda: its gradients take {ran}" in caplog.text


@pytest.mark.parametrize(
    "dtype, shape, outputs, layout, ran",
    [
        (torch.bfloat16, (1, 136, 8, 8), 48, "channels_last", "bfloat16, tensor cores, 6 tiles of outputs"),
        (HALF, (1, 8, 4, 4), 4, "channels_slice", "dense images in channels_last order"),
        (HALF, (1, 20, 4, 4), 4, "channels_last", "multiples of 8 up to 256 channels"),
        (torch.float32, (1, 16, 4, 4), 4, "channels_last", "float16 and bfloat16, got float32"),
    ],
)
def test_norm_reduce_haar_joins_or_says_why_not(
    core: ModuleType, caplog: pytest.LogCaptureFixture, dtype: torch.dtype, shape: tuple[int, ...], outputs: int,
    layout: str, ran: str,
) -> None:  # fmt: skip
    caplog.set_level("INFO", "wavemix_kernels")
    x, y = (image(randn(*shape, seed=seed), dtype, layout=layout) for seed in (0, 1))
    weight, of = randn(outputs, shape[1], 1, 1).to(dtype), Affine(*randn(2, shape[1]).float())
    launches(core)
    norm_reduce_haar.forward(y, of, x, weight, None, 2, "cuda")
    names = launches(core)
    if names[0].startswith("norm_reduce_haar"):
        assert names == [f"norm_reduce_haar ({ran}, 16 bytes along C, 2 levels)"]
    else:
        assert [name.split()[0] for name in names] == ["reduce_haar"]
        assert ran in caplog.text


@pytest.mark.parametrize("shape", [(2, 16, 8, 12), (2, 8, 4, 2), (3, 8, 2, 2), (1, 8, 2, 2)])
def test_reduce_haar_gradients_read_their_channels_of_more(core: ModuleType, shape: tuple[int, ...]) -> None:
    """Z's gradients beside other channels are read in place (a pixel, a column or an image of them, too)."""
    n, c, h, w = shape
    x, weight = image(randn(*shape), HALF, layout="channels_last"), randn(4, c, 1, 1).to(HALF)
    wide = image(randn(n, 24, h // 2, w // 2, seed=1), HALF, layout="channels_last")
    grad = wide[:, :16]
    copied = []
    with pytest.MonkeyPatch.context() as patch:
        laid_out = memory_order.laid_out
        patch.setattr(memory_order, "laid_out", lambda t, last: copied.append(t) or laid_out(t, last))
        made = reduce_haar.backward([grad], x, weight, True, None, "cuda")
    wanted = reduce_haar.backward([grad.clone(memory_format=torch.channels_last)], x, weight, True, None, "cuda")
    assert not copied
    for got, want in zip(made, wanted, strict=True):
        assert torch.equal(got, want)


def test_reduce_haar_gradients_keep_non_finite_values_in_their_quad(core: ModuleType) -> None:
    """Beyond the last pixel, too: the tile of 64 pixels holds four quads' and what was there before."""
    x, grad = (image(torch.ones(*shape), HALF, layout="channels_last") for shape in ((1, 8, 4, 4), (1, 8, 2, 2)))
    grad[0, 0, 1, 0] = float("inf")
    dx, dw, db = reduce_haar.backward([grad], x, torch.ones(2, 8, 1, 1, dtype=HALF), True, None, "cuda")
    of_quad = (torch.arange(4)[:, None] // 2 == 1) & (torch.arange(4) // 2 == 0)
    assert torch.equal(dx.isfinite(), ~of_quad.expand(1, 8, 4, 4))
    assert dw.isfinite().flatten(1).all(1).tolist() == [False, True]
    assert db is not None
    assert db.isfinite().tolist() == [False, True]


@pytest.mark.parametrize(
    "case", pairwise(kind=((HALF, False), (torch.float32, False), (torch.float32, True), (torch.float64, False)),
                     x=tuple(LAYOUTS), z=tuple(LAYOUTS)), ids=str,
)  # fmt: skip
def test_reduce_haar_keeps_non_finite_values_in_their_quad(core: ModuleType, case: Case) -> None:
    """Neighbours of an infinity, in the same words and fragments, stay finite; also beyond C and O."""
    (dtype, tf32), values = case.kind, torch.ones(1, 5, 8, 8)
    values[0, 2, 3, 4] = float("inf")
    z = image(torch.full((1, 12, 4, 4), float("nan")), dtype, layout=case.z)
    raw_reduction(core, image(values, dtype, layout=case.x), torch.ones(3, 5, dtype=dtype), z, tf32)
    assert np.array_equal(z[0, 0].isfinite(), ~((torch.arange(4)[:, None] == 1) & (torch.arange(4) == 2)))
    assert torch.equal(z.isfinite(), z[:, :1].isfinite().expand_as(z))


def test_errors_name_sizes_and_orders(core: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, z = torch.zeros(1, 4, 6, 8), torch.zeros(4, 4), torch.zeros(1, 16, 3, 4)
    address = backends._native.address
    parts = address(x), address(weight), []
    with pytest.raises(ValueError, match="got 6 x 8 pixels; multiples of 4 would work"):
        core.reduce_haar_cuda(1, 2, x.shape, 4, *parts, [address(z)] * 2, False, 0)
    with pytest.raises(ValueError, match="levels: got 6"):
        core.reduce_haar_cuda(1, 6, (1, 4, 64, 64), 4, *parts, [address(z)] * 6, False, 0)
    for shape, outputs, message in (
        ((1, 4, 6, 8), 4, "got 4 channels and 4 outputs; multiples of 8 and of 2 would work"),
        ((1, 264, 6, 8), 4, "got 264 channels and 4 outputs; up to 256 and 64 would work"),
        ((2**20, 8, 64, 64), 4, "x: got 4294967296 pixels; up to 2147483647 would work"),
    ):
        with pytest.raises(ValueError, match=message):
            core.reduce_haar_backward_workspace_cuda(2, 1, shape, outputs, False, 132, 2**17)
    with pytest.raises(ValueError, match="x: got float32; float16 and bfloat16 would work"):
        core.reduce_haar_backward_workspace_cuda(1, 1, (1, 8, 6, 8), 4, False, 132, 2**17)
    ll, high = torch.zeros(1, 4, 3, 4), torch.zeros(1, 4, 3, 3, 4)
    call = (1, 1, x.shape, 0.0, address(x), address(ll), [address(high)])
    monkeypatch.setenv("WAVEMIX_EMULATOR_ORDER", "sideways")
    with pytest.raises(ValueError, match="got 'sideways'; forward, reverse or a seed would work"):
        core.haar_analysis_cuda(*call, 0)
