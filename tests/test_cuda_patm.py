"""PATM's operators on backend "cuda": in the emulator, or on the GPU with --device cuda."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

import wavemix_kernels as wk
from tests.emulator import build, phase_cases
from tests.emulator.haar_cases import launches
from tests.kernels.cuda.support import ORDERS, huge_view, sanitized_python
from tests.test_patm import NAMES, Bounds, arguments, pair
from tests.tolerances import DTYPES, UNDERFLOW, UNIT_ROUNDOFF, accumulation, assert_within
from wavemix_kernels.nn.wavemlp import reference as wavemlp_reference
from wavemix_kernels.ops.patm import phases as op
from wavemix_kernels.ops.patm import reference as patm_reference

pytestmark = pytest.mark.usefixtures("core")

# (N, C, H, W): thinner and longer than the taps reach; whole words and none; several blocks across, images and turns
# of a block (the emulated core counts 8 blocks as many), segments of a line; no images.
SHAPES = [
    (2, 8, 7, 9), (1, 6, 3, 21), (3, 4, 1, 1), (2, 2, 1, 5), (1, 132, 5, 4), (1, 4, 2, 261), (11, 16, 9, 2),
    (0, 4, 3, 5),
]  # fmt: skip
# Each way of the gradient: weights of the branches, batch statistics, one joined image.
BACKWARD = {"plain": (False, False, False), "weighted": (True, False, True), "statistics": (True, True, True)}
# Roundoffs by which sine and cosine of a phase may err (csrc/cuda/sincos.cuh).
SINE = {torch.float32: 1.33, torch.float64: 2.5}


@pytest.fixture
def emulated(core: ModuleType | None) -> ModuleType:
    if core is None:
        pytest.skip("--device cuda: it looks into the emulator")
    return core


def chunks(images: list[Tensor], offset: int = 0) -> list[Tensor]:
    """The same values as slices of one channels_last image, as projections leave them, from channel `offset` on."""
    n, c, h, w = images[0].shape
    channels = len(images) * c
    whole = images[0].new_full((n, h, w, channels + offset), math.nan).permute(0, 3, 1, 2)
    parts = whole[:, offset:].split(c, 1)
    return [part.copy_(image) for part, image in zip(parts, images, strict=True)]


def inputs_of(shape: tuple[int, ...], dtype: torch.dtype, device: str, layout: str = "slices") -> list[Tensor]:
    tensors = [t.to(device) for t in arguments(shape, dtype)]
    if layout == "contiguous":
        return tensors
    amplitudes = chunks(tensors[:3], offset=1 if layout == "misaligned" else 0)
    return [*amplitudes, *chunks(tensors[3:5]), *tensors[5:]]


class Gradient:
    """Arguments of a backward pass, its exact results, and how far off others may be."""

    def __init__(self, inputs: list[Tensor], kind: str) -> None:
        weighted, statistics, self.joined = BACKWARD[kind]
        z = inputs[0]
        n, c, h, w = z.shape
        wide, device = accumulation(z.dtype), z.device

        def random(*shape: int, seed: int, dtype: torch.dtype = wide) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

        grads = [random(n, h, w, c, seed=i, dtype=z.dtype).permute(0, 3, 1, 2) for i in range(2)]
        grad_s = random(n, c, seed=3)
        a = random(3, n, c, seed=4) if weighted else None
        mean = random(2, c, seed=5) / 4 if statistics else None
        invstd = 0.5 + random(2, c, seed=6).abs() if statistics else None
        self.inputs, self.low, self.dtype = inputs, UNIT_ROUNDOFF[z.dtype], z.dtype
        self.arguments = (*grads, grad_s, a, *inputs[:2], *inputs[3:], mean, invstd)
        self.exact = self.run("reference", torch.float64)
        self.first = self.exact if mean is None else self.run("reference", torch.float64, without_statistics=True)
        self.d = [
            (g.abs().max() * (1 if a is None else a[i].abs().max()) + grad_s.abs().max()).item()
            for i, g in enumerate(grads)
        ] if n else [0.0, 0.0]  # fmt: skip
        self.d_c = 0.0 if a is None or n == 0 else (grads[0].abs().max() * a[2].abs().max()).item()
        self.statistics = None if mean is None or invstd is None else (mean.abs().max(), invstd.abs().max())

    def run(self, name: str, dtype: torch.dtype | None = None, without_statistics: bool = False) -> dict[str, Tensor]:
        tensors = [t if t is None or dtype is None else t.to(dtype) for t in self.arguments]
        if without_statistics:
            tensors[-2:] = None, None
        out = op.backward(*tensors, self.joined, name)
        slots = dict(zip(("z_h", "z_w", "c", "theta_h", "theta_w"), op._slots(out.images), strict=True))
        return {**slots, "sums": out.sums, "w_h": out.w_h, "w_w": out.w_w}

    def check(self, got: dict[str, Tensor]) -> None:
        bounds = Bounds(self.inputs, self.dtype)
        u = bounds.u * (slack_of(self.dtype))
        n, _, h, w = self.inputs[0].shape
        count = n * h * w

        def rounded(value: Tensor, bound: float) -> Tensor:
            return bound + self.low * (value.abs() + bound) + UNDERFLOW[self.dtype]

        # One product and one sum, then the output's own rounding.
        exact = self.exact
        assert_within(got["c"], exact["c"], rounded(exact["c"], 2 * u * (self.d_c + max(self.d))), "c")
        for i, b in enumerate("hw"):
            z, row, d = bounds.z[b], bounds.row[b], self.d[i]
            turned = bounds.phase[b] + 1.32
            # The gradient of a wave: 7 products and sums of d, which comes of two operations; then a product with sine
            # and cosine each. Theta's takes one more with z.
            wave = u * d * row * (7 + 2 + turned + 3)
            of_z = exact[f"z_{b}"]
            assert_within(got[f"z_{b}"], of_z, rounded(of_z, 2 * wave), f"z_{b}")
            pre = 2 * z * (wave + 3 * u * d * row)
            of_theta, bound = exact[f"theta_{b}"], torch.full_like(exact["z_h"], bounds.scale[b] * pre)
            theta = self.inputs[NAMES.index(f"theta_{b}")].abs().max().item() if count else 0.0
            # Sums over every pixel, by any order of additions.
            largest = 2 * z * d * row
            summed = count * (pre + count * u * largest)
            if self.statistics is not None:
                mean, invstd = (t.item() for t in self.statistics)
                theta += mean
                # scale (d_pre - sum / count - (theta - mean) invstd^2 sum_theta / count), in some 8 operations that
                # pass through values of this size; what the first pass left was rounded, too.
                spread = 1 + (invstd * theta) ** 2
                bound = bound + bounds.scale[b] * spread * (summed / max(count, 1) + 8 * u * largest)
                bound = bound + self.low * (self.first[f"theta_{b}"].abs() + bound) + UNDERFLOW[self.dtype]
            assert_within(
                got[f"theta_{b}"], of_theta, bound + self.low * (of_theta.abs() + bound) + UNDERFLOW[self.dtype]
            )
            for k, factor in enumerate((1.0, theta)):
                value = exact["sums"][i, k]
                assert_within(got["sums"][i, k], value, torch.full_like(value, factor * summed), f"sum {k} {b}")
            value = exact[f"w_{b}"]
            each = u * z * d * (turned + 4 + count)
            assert_within(got[f"w_{b}"], value, torch.full_like(value, count * each), f"w_{b}")


def slack_of(dtype: torch.dtype) -> float:
    """On Bounds, whose sines are of 1.32 units: float64's are of 2.5, and its reference is as inexact again."""
    return 1.0 if dtype != torch.float64 else SINE[dtype] / 1.32 + 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["slices", "misaligned", "contiguous"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: str) -> None:
    inputs = inputs_of(shape, dtype, device, layout)
    h, w, s = op.phase_aggregate(*inputs, backend="cuda")
    exact = patm_reference.phase_aggregate(*(t.double() for t in inputs))
    assert s.dtype == accumulation(dtype)
    for got in (h, w):
        assert got.dtype == dtype
        assert got.stride(1) == 1
    if shape[0] > 0:
        bounds, low, pixels = Bounds(inputs, dtype), UNIT_ROUNDOFF[dtype], shape[2] * shape[3]
        slack = slack_of(dtype)
        for b, got, want in zip("hw", (h, w), exact, strict=False):
            bound = slack * bounds.output(b)
            assert_within(got, want, bound + low * (want.abs() + bound) + UNDERFLOW[dtype], b)
        peaks = sum(bounds.z[b] * bounds.row[b] for b in "hw") + inputs[2].abs().max().item()
        each = sum(bounds.output(b) for b in "hw") + (pixels + 2) * bounds.u * peaks
        assert_within(s, exact[2], torch.full_like(exact[2], slack * pixels * each), "s")
    for kind in BACKWARD:
        if shape[0] == 0:
            assert all((t == 0).all() for t in Gradient(inputs, kind).run("cuda").values())
            continue
        gradient = Gradient(inputs, kind)
        gradient.check(gradient.run("cuda"))


@pytest.mark.parametrize("power", [0, 3.5, 4, 6, 12, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sine_and_cosine_of_any_phase(dtype: torch.dtype, power: float, device: str) -> None:
    """Taps that pass one channel through show them: their own error, and one rounding of the product."""
    generator = torch.Generator().manual_seed(int(power))
    theta = (10.0**power * (1 + torch.rand(1, 32, 3, 8, generator=generator, dtype=torch.float64))).to(device, dtype)
    # Near multiples of pi/2 most of the phase cancels; and both sides of where the long reduction begins.
    near = [math.pi / 2 * k * 10.0**power for k in range(1, 7)]
    theta[0, 0, 0, :] = torch.tensor([*near, 8192.0, 8193.0], dtype=dtype)
    theta[0, 1, 0, :3] = torch.tensor([1048576.0, 1048577.0, torch.finfo(dtype).max], dtype=dtype)
    one, zero = torch.ones_like(theta), torch.zeros(32, dtype=dtype, device=device)
    w_h, w_w = (torch.zeros(shape, dtype=dtype, device=device) for shape in ((32, 2, 1, 7), (32, 2, 7, 1)))
    w_h[:, 0, 0, 3] = w_w[:, 1, 3, 0] = 1
    h, w, _ = op.phase_aggregate(
        one, one, one, theta, theta, one[0, :, 0, 0], zero, one[0, :, 0, 0], zero, w_h, w_w, backend="cuda"
    )
    with mpmath.workprec(1200):
        exact = {
            f: theta.double().cpu().clone().apply_(lambda x, f=f: float(f(mpmath.mpf(x))))
            for f in (mpmath.cos, mpmath.sin)
        }
    unit = UNIT_ROUNDOFF[dtype] * (SINE[dtype] + 1)
    for out, channels in ((h, slice(0, None, 2)), (w, slice(1, None, 2))):
        for half, function in zip(out.split(16, 1), (mpmath.cos, mpmath.sin), strict=True):
            want = exact[function][:, channels]
            assert_within(half, want, torch.full_like(want, unit), function.__name__)


def test_phases_without_a_sine_stay_in_reach_of_their_taps(device: str) -> None:
    """Infinity and NaN, three pixels to each side, in the outputs of the one pair of channels."""
    inputs = [torch.ones(1, 8, 3, 20, device=device) for _ in range(5)]
    inputs[3][0, 0, 0, 4], inputs[3][0, 2, 1, 10] = math.inf, math.nan
    ones = torch.ones(8, device=device)
    w_h, w_w = torch.ones(8, 2, 1, 7, device=device), torch.ones(8, 2, 7, 1, device=device)
    h, w, _ = op.phase_aggregate(*inputs, ones, ones, ones, ones, w_h, w_w, backend="cuda")
    expected = torch.zeros(h.shape, dtype=torch.bool, device=device)
    expected[0, [0, 4], 0, 1:8] = True
    expected[0, [1, 5], 1, 7:14] = True
    assert torch.equal(h.isnan(), expected)
    assert not w.isnan().any()


@pytest.mark.parametrize("mode", wavemlp_reference.MODES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_whole_patm(core: ModuleType | None, mode: str, training: bool, device: str) -> None:
    """FusedPATM on backend "cuda" against the reference module: output, every gradient and buffer, in float64."""
    modules = [module.to(device).train(training) for module in pair(8, mode=mode)]
    x = torch.randn(3, 8, 5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    results = []
    for module, backend in zip(modules, ("cuda", "reference"), strict=True):
        leaf = x.clone(memory_format=torch.channels_last).requires_grad_()
        with wk.backend(backend):
            out = module(leaf)
            out.backward(torch.cos(out.detach()))
        values = {"out": out.detach(), "x": leaf.grad} | {n: p.grad for n, p in module.named_parameters()}
        results.append(values | dict(module.named_buffers()))
    got, want = results
    for name, value in want.items():
        # What stands before batch statistics has a gradient of 0, and the reference has its rounding errors.
        scale = want["x"].abs().sum() if ".0.bias" in name else value.abs().max()
        assert (got[name] - value).abs().max() <= 1e-10 * scale, name
    if core is not None:
        ran = {name.split(" ")[0] for name in launches(core)}
        wanted = {"phase_forward", "phase_backward", "phase_sum_rows"}
        assert ran == wanted | ({"phase_statistics"} if training else set())


def test_compiled_and_checked(device: str) -> None:
    inputs = [t.detach().requires_grad_() for t in inputs_of((2, 4, 3, 5), torch.float32, device)]
    ops = torch.ops.wavemix_kernels
    torch.library.opcheck(ops.phase_aggregate, (*inputs, "cuda"))
    for kind in BACKWARD:
        gradient = Gradient([t.detach() for t in inputs], kind)
        torch.library.opcheck(ops.phase_aggregate_backward, (*gradient.arguments, gradient.joined, "cuda"))


def test_self_test_passes(device: str) -> None:
    error, bound = op.self_test("cuda", torch.device(device))
    assert 0 < error <= bound


def test_odd_channels_have_no_kernel(device: str) -> None:
    inputs = [t.to(device) for t in arguments((1, 5, 3, 4), torch.float32)]
    with pytest.raises(ValueError, match=r"backend='cuda' cannot serve this call: it takes an even number .* got 5"):
        op.phase_aggregate(*inputs, backend="cuda")


# --- Inside the emulator ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout, form", [("slices", "wide"), ("misaligned", "narrow"), ("contiguous", "wide")])
def test_slices_are_read_in_place_by_words(emulated: ModuleType, layout: str, form: str, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    inputs = inputs_of((1, 16, 3, 4), dtype, "cpu", layout)
    op.phase_aggregate(*inputs, backend="cuda")
    assert launches(emulated) == [f"phase_forward ({form}, {name})", f"phase_sum_rows ({name})"]
    Gradient(inputs, "statistics").run("cuda")
    backward, sums, statistics = launches(emulated)
    assert (backward, sums) == (f"phase_backward ({form}, {name})", f"phase_sum_rows ({name})")
    assert statistics == f"phase_statistics (wide, {name})"  # the phases' slices are aligned


def test_large_batches_are_cut_into_several_launches(emulated: ModuleType) -> None:
    """The emulated core allows 8 blocks a launch instead of 2^31."""
    inputs = inputs_of((11, 16, 9, 2), torch.float32, "cpu")
    op.phase_aggregate(*inputs, backend="cuda")
    assert len(launches(emulated)) > 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_do_not_depend_on_the_order_of_threads(
    emulated: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    results = []
    for order in ORDERS:
        monkeypatch.setenv("WAVEMIX_EMULATOR_ORDER", order)
        results.append(phase_cases.run(emulated, phase_cases.Case(dtype, (3, 24, 9, 11))))
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("axis", [0, 2, 3])
def test_offsets_are_64_bit(emulated: ModuleType, axis: int) -> None:
    """One image at a time has strides that pass 2^31 elements."""
    shape = (2, 4, 3, 5)
    shape = (*shape[:axis], 3, *shape[axis + 1 :])
    inputs = inputs_of(shape, torch.float16, "cpu")
    with huge_view((*shape[:1], *shape[2:], shape[1]), {0: 0, 2: 1, 3: 2}[axis]) as view:
        huge = torch.from_numpy(view).permute(0, 3, 1, 2)
        assert huge.stride(1) == 1
        for i in (0, 1, 2, 3, 4):
            moved = list(inputs)
            moved[i] = huge.copy_(inputs[i])
            got = op.phase_aggregate(*moved, backend="cuda")
            for a, b in zip(got, op.phase_aggregate(*inputs, backend="cuda"), strict=True):
                assert torch.equal(a, b)
        del huge, moved, view  # the mapping closes


def test_argument_errors(emulated: Any) -> None:
    with pytest.raises(ValueError, match="shape: expected an even number of channels, got 3"):
        emulated.phase_forward_cuda(1, (1, 3, 2, 2), [((), (), 0, 0, 0)] * 2, [(), ()], (), 0, 0, 0, 0)
    strided = torch.zeros(1, 4, 2, 2)
    bad = [strided.data_ptr(), *strided.stride()]
    with pytest.raises(ValueError, match="z: expected contiguous channels, got a channel stride of 4"):
        emulated.phase_forward_cuda(1, (1, 4, 2, 2), [(bad, bad, 0, 0, 0)] * 2, [(), ()], (), 0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"z: an image has 65536 x 65536 pixels; up to 1073741824 would work"):
        emulated.phase_workspace_cuda((1, 2, 65536, 65536), True)


def test_kernels_pass_the_sanitizers(emulated: ModuleType) -> None:
    (module,) = Path(build.build("address,undefined")).glob("_emulated.*")
    done = sanitized_python("-m", phase_cases.__name__, str(module))
    assert done.returncode == 0, done.stderr[-6000:]
    assert "cases passed" in done.stdout
