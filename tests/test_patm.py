"""PATM on its kernels: phase_aggregate and branch_sum per backend, FusedPATM against upstream and the reference."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wavemix_kernels as wk
from tests import golden_models
from tests.test_wavemlp import RECORDED, from_config, normal, randomised
from tests.tolerances import DTYPES, UNDERFLOW, UNIT_ROUNDOFF, accumulation, assert_within
from wavemix_kernels import _native, backends, wavemlp
from wavemix_kernels.nn.wavemlp import reference as wavemlp_reference
from wavemix_kernels.nn.wavemlp.patm import FusedPATM
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.patm import branches as sum_op
from wavemix_kernels.ops.patm import op as patm_op
from wavemix_kernels.ops.patm import phases as op
from wavemix_kernels.ops.patm import reference as patm_reference

LAYOUTS = ("contiguous", "channels_last", "slices")
# (N, C, H, W): thinner and longer than the taps reach, more pairs of channels and more pixels than one block takes.
SHAPES = [(2, 8, 7, 9), (1, 6, 3, 21), (3, 4, 1, 1), (2, 2, 1, 5), (1, 10, 13, 2), (1, 132, 5, 4), (1, 4, 2, 261)]
NAMES = (
    "z_h", "z_w", "z_c", "theta_h", "theta_w", "scale_h", "shift_h", "scale_w", "shift_w", "taps_h", "taps_w",
)  # fmt: skip
aggregates = pytest.mark.parametrize("name", ["cpu", "reference"])
modes = pytest.mark.parametrize("mode", wavemlp_reference.MODES)
recomputes = pytest.mark.parametrize("recompute", patm_op.RECOMPUTE)


@pytest.fixture(autouse=True)
def on_the_cpu(device: str) -> None:
    if device != "cpu":
        pytest.skip("the CPU's part; test_cuda_patm.py and test_triton_patm.py have the GPU's")


@pytest.fixture(autouse=True)
def in_kernels_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As wide images run; test_patm_whole.py has the kernel from end to end."""
    monkeypatch.setattr(choose, "WHOLE", 0)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; slices as a projection to several tensors leaves them."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "slices":
        wide = torch.full((x.shape[0], *x.shape[2:], 3 * x.shape[1] + 1), float("nan"), dtype=x.dtype)
        part = wide.permute(0, 3, 1, 2)[:, x.shape[1] + 1 : 2 * x.shape[1] + 1]
        return part.copy_(x)
    return x


def arguments(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> list[Tensor]:
    """Phases stay 0.01 away from ReLU's corner, where rounding would decide between two gradients."""
    n, c, h, w = shape
    images = [normal(n, c, h, w, seed=i) for i in range(5)]
    for theta in images[3:]:
        theta += 0.1 * theta.sign()
    wide = accumulation(dtype)
    affine = [0.5 + normal(c, seed=5).abs(), 0.04 * torch.tanh(normal(c, seed=6))]
    affine += [0.5 + normal(c, seed=7).abs(), 0.04 * torch.tanh(normal(c, seed=8))]
    taps = [normal(c, 2, 1, 7, seed=9), normal(c, 2, 7, 1, seed=10)]
    return [*(laid_out(t.to(dtype), layout) for t in images), *(t.to(wide) for t in (*affine, *taps))]


class Bounds:
    """|error| of arithmetic in roundoffs u, per branch, from the largest values that meet.

    A phase comes of one multiplication and one addition (or one FMA), so it errs by 2 u (|scale theta| + |phase|), and
    turns its wave by as much; sine and cosine by 1.32 u, the product with z by u.
    """

    def __init__(self, inputs: list[Tensor], dtype: torch.dtype, grads: tuple[Tensor, Tensor] | None = None) -> None:
        values = dict(zip(NAMES, (t.double() for t in inputs), strict=True))
        self.u = UNIT_ROUNDOFF[accumulation(dtype)]
        self.z, self.row, self.phase, self.scale = {}, {}, {}, {}
        for b in "hw":
            theta, scale = values[f"theta_{b}"].abs().max().item(), values[f"scale_{b}"].abs().max().item()
            self.z[b], self.scale[b] = values[f"z_{b}"].abs().max().item(), scale
            self.phase[b] = 2 * (2 * theta * scale + values[f"shift_{b}"].abs().max().item())
            # Sums of |weights|: over what one output reads, and over what one wave goes to.
            taps = values[f"taps_{b}"].abs().flatten(2)
            self.row[b] = max(taps.sum((1, 2)).max().item(), 2 * taps.sum(2).max().item())

    def output(self, b: str) -> float:
        """14 products and sums of waves."""
        return self.u * self.z[b] * self.row[b] * (self.phase[b] + 1.32 + 1 + 14)

    def d_wave(self, b: str, d: float) -> float:
        """7 products and sums of gradients up to d, which themselves come of two operations."""
        return self.u * d * self.row[b] * (7 + 2)


@pytest.mark.parametrize("name, layout", [*(("cpu", layout) for layout in LAYOUTS), ("reference", "contiguous")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_aggregate_matches_reference(shape: tuple[int, ...], layout: str, dtype: torch.dtype, name: str) -> None:
    inputs = arguments(shape, dtype, layout)
    leaves = [t.detach().requires_grad_() for t in inputs]
    exact_leaves = [t.detach().double().requires_grad_() for t in inputs]
    outputs = op.phase_aggregate(*leaves, backend=name)
    exact = patm_reference.phase_aggregate(*exact_leaves)
    bounds, u, low = Bounds(inputs, dtype), UNIT_ROUNDOFF[accumulation(dtype)], UNIT_ROUNDOFF[dtype]
    pixels = math.prod(shape[2:])

    def rounded(value: Tensor, bound: float) -> Tensor:
        return bound + low * value.abs() + UNDERFLOW[dtype]

    for b, got, want in zip("hw", outputs, exact, strict=False):
        assert got.dtype == dtype
        assert_within(got, want, rounded(want, bounds.output(b)), b)
    peaks = sum(bounds.z[b] * bounds.row[b] for b in "hw") + inputs[2].abs().max().item()
    each = sum(bounds.output(b) for b in "hw") + (pixels + 2) * u * peaks
    assert outputs[2].dtype == accumulation(dtype)
    assert_within(outputs[2], exact[2], torch.full_like(exact[2], pixels * each), "s")

    cotangents = [normal(*t.shape, seed=20 + i).to(t.dtype) for i, t in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, leaves, cotangents)
    exact_grads = torch.autograd.grad(exact, exact_leaves, [t.double() for t in cotangents])
    got = dict(zip(NAMES, grads, strict=True))
    want = dict(zip(NAMES, exact_grads, strict=True))
    assert_within(got["z_c"], want["z_c"], rounded(want["z_c"], 0.0), "z_c")
    everywhere = shape[0] * pixels
    for b, cotangent in zip("hw", cotangents, strict=False):
        d = (cotangent.double().abs().max() + cotangents[2].double().abs().max()).item()
        turned = bounds.phase[b] + 1.32
        # z gets two products of wave gradients with cosine and sine, theta one more with z and with scale.
        wave = bounds.d_wave(b, d) + u * d * bounds.row[b] * (turned + 3)
        assert_within(got[f"z_{b}"], want[f"z_{b}"], rounded(want[f"z_{b}"], 2 * wave), f"z_{b}")
        pre = 2 * bounds.z[b] * (wave + u * d * bounds.row[b] * 3)
        of_theta = want[f"theta_{b}"]
        assert_within(got[f"theta_{b}"], of_theta, rounded(of_theta, bounds.scale[b] * pre), f"theta_{b}")
        # Sums over every pixel, by any order of additions.
        summed = everywhere * (pre + everywhere * u * 2 * bounds.z[b] * d * bounds.row[b])
        theta = inputs[NAMES.index(f"theta_{b}")].abs().max().item()
        for key, factor in (("shift", 1.0), ("scale", theta)):
            exact_sum = want[f"{key}_{b}"]
            assert_within(got[f"{key}_{b}"], exact_sum, torch.full_like(exact_sum, factor * summed), f"{key}_{b}")
        of_taps = want[f"taps_{b}"]
        each = u * bounds.z[b] * d * (turned + 4 + everywhere)
        assert_within(got[f"taps_{b}"], of_taps, torch.full_like(of_taps, everywhere * each), f"taps_{b}")


@pytest.mark.parametrize("power", [4, 5, 6, 30])
def test_large_phases(power: int) -> None:
    """Taps that pass one channel through show cosine and sine themselves: 1.32 u, and one rounding of the product."""
    theta = (10.0**power * (1 + normal(1, 32, 3, 40).abs())).float()
    theta[0, 0, 0, :4] = torch.tensor([8192.0, 8192.001, float("inf"), float("nan")])
    z, zero, one = torch.ones_like(theta), torch.zeros(32), torch.ones(32)
    taps_h, taps_w = torch.zeros(32, 2, 1, 7), torch.zeros(32, 2, 7, 1)
    taps_h[:, 0, 0, 3] = taps_w[:, 1, 3, 0] = 1
    # Zero weights would spread NaN through the sums of a line: they go through an input of their own.
    finite = torch.where(theta.isfinite(), theta, 0.0)
    h, w, _ = op.phase_aggregate(z, z, z, finite, finite, one, zero, one, zero, taps_h, taps_w, backend="cpu")
    exact = finite.double()
    bound = torch.full((1, 16, 3, 40), 2.32 * UNIT_ROUNDOFF[torch.float32])
    for out, channels in ((h, slice(0, None, 2)), (w, slice(1, None, 2))):
        assert_within(out[:, :16], exact[:, channels].cos(), bound, "cosine")
        assert_within(out[:, 16:], exact[:, channels].sin(), bound, "sine")
    h, *_ = op.phase_aggregate(z, z, z, theta, theta, one, zero, one, zero, taps_h, taps_w, backend="cpu")
    reached = [h[0, 0, 0, :7], h[0, 16, 0, :7]]  # 3 pixels to each side, in the outputs of the one pair of channels
    assert all(value.isnan().all() for value in reached)
    assert h.isnan().sum() == sum(value.numel() for value in reached)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set(isa: str) -> None:
    """The variants that this CPU would not pick: each op's own check in a process of its own."""
    script = (
        "import torch\n"
        "from wavemix_kernels import _native\n"
        "from wavemix_kernels.ops.patm import branches as branch_sum, phases as phase_aggregate\n"
        f"assert _native.core.cpu_isa() == {isa!r}\n"
        "for op in (branch_sum, phase_aggregate):\n"
        "    error, bound = op.self_test('cpu', torch.device('cpu'))\n"
        "    assert error <= bound, (op.__name__, error, bound)\n"
    )
    environment = os.environ | {"WAVEMIX_KERNELS_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    if f"WAVEMIX_KERNELS_CPU_ISA={isa}: this CPU and build have" in result.stderr:
        pytest.skip(result.stderr.strip().splitlines()[-1])
    assert result.returncode == 0, result.stderr


@aggregates
def test_aggregate_gradcheck(name: str) -> None:
    inputs = [t.requires_grad_() for t in arguments((2, 4, 3, 5), torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: op.phase_aggregate(*t, backend=name), inputs, fast_mode=True)


def test_second_derivatives_are_the_references_alone() -> None:
    inputs = [t.requires_grad_() for t in arguments((1, 2, 1, 2), torch.float64)]

    def of_z(*tensors: Tensor, name: str = "reference") -> Tensor:
        return op.phase_aggregate(*tensors, backend=name)[0]

    assert torch.autograd.gradgradcheck(of_z, inputs)
    out = of_z(*inputs, name="cpu")
    (grad,) = torch.autograd.grad(out, inputs[:1], torch.ones_like(out, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@aggregates
@pytest.mark.parametrize("joined", [False, True])
def test_opcheck(name: str, joined: bool) -> None:
    inputs = [t.detach().requires_grad_() for t in arguments((2, 4, 3, 5), torch.float32, "slices")]
    ops = torch.ops.wavemix_kernels
    torch.library.opcheck(ops.phase_aggregate, (*inputs, name))
    plain = [t.detach() for t in inputs]
    h, w, s = op.phase_aggregate(*plain)
    a, mean, invstd = torch.rand(3, 2, 4), torch.rand(2, 4), torch.rand(2, 4)
    some = (h, w, s, a, plain[0], plain[1], *plain[3:], mean, invstd, joined, name)
    torch.library.opcheck(ops.phase_aggregate_backward, some)
    torch.library.opcheck(ops.branch_sum, (h, w, plain[2], a, name))
    torch.library.opcheck(ops.branch_sum_backward, (h, h, w, plain[2], a, name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 5, 9), (1, 5, 19, 3), (3, 1, 1, 1)], ids=str)
def test_branch_sum(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    grad, h, w, c = (laid_out(normal(*shape, seed=i).to(dtype), layout) for i in range(4))
    a = normal(3, *shape[:2], seed=5).to(accumulation(dtype))
    branches = [t.double() for t in (h, w, c)]
    weights = a.double()[..., None, None]
    want = sum(t * k for t, k in zip(branches, weights, strict=True))
    size = sum((t * k).abs() for t, k in zip(branches, weights, strict=True))
    u, pixels = UNIT_ROUNDOFF[accumulation(dtype)], math.prod(shape[2:])
    got, d_a = sum_op.backward(grad, h, w, c, a, "cpu")
    # Three products and two sums, then the output's own rounding.
    bound = 4 * u * size + UNIT_ROUNDOFF[dtype] * want.abs() + UNDERFLOW[dtype]
    assert_within(got, want, bound, "sum")
    assert torch.equal(got, sum_op.branch_sum(h, w, c, a, "cpu"))
    exact = torch.stack([(grad.double() * t).sum((2, 3)) for t in branches])
    size = torch.stack([(grad.double() * t).abs().sum((2, 3)) for t in branches])
    assert d_a.dtype == a.dtype
    assert_within(d_a, exact, (pixels + 1) * u * size, "d_a")


class TestArguments:
    def test_odd_channels_have_no_kernel(self) -> None:
        inputs = arguments((1, 5, 3, 4), torch.float32)
        with pytest.raises(ValueError, match=r"backend='cpu' cannot serve this call: it takes an even number .* got 5"):
            op.phase_aggregate(*inputs, backend="cpu")
        for got, want in zip(op.phase_aggregate(*inputs), patm_reference.phase_aggregate(*inputs), strict=True):
            torch.testing.assert_close(got, want)

    @pytest.mark.parametrize(
        "name, change, error, message",
        [
            ("z_h", lambda t: t[0], ValueError, "z_h: expected 4 dimensions"),
            (
                "z_w",
                lambda t: t[:, :2],
                ValueError,
                r"z_w: expected the shape of z_h, \(1, 4, 3, 5\), got \(1, 2, 3, 5\)",
            ),
            ("theta_w", lambda t: t.double(), TypeError, "theta_w: expected the dtype of z_h, torch.float32, got"),
            ("shift_w", lambda t: t[:1], ValueError, r"shift_w: expected shape \(4,\) to go with z_h"),
            ("taps_w", lambda t: t.transpose(2, 3), ValueError, r"taps_w: expected shape \(4, 2, 7, 1\)"),
        ],
        ids=["z_h", "z_w", "theta_w", "shift_w", "taps_w"],
    )
    def test_rejected(self, name: str, change: Callable[[Tensor], Tensor], error: type, message: str) -> None:
        inputs = dict(zip(NAMES, arguments((1, 4, 3, 5), torch.float32), strict=True))
        inputs[name] = change(inputs[name])
        with pytest.raises(error, match=message):
            op.phase_aggregate(*inputs.values())

    def test_core_refuses_what_it_cannot_read(self) -> None:
        core: Any = _native.core
        x = torch.zeros(1, 4, 2, 2)
        with pytest.raises(ValueError, match="branches: expected contiguous channels, got a channel stride of 4"):
            core.branch_sum_cpu(1, x.shape, [_native.address(x)] * 3, 0, _native.address(x), 1)
        odd = torch.zeros(1, 3, 2, 2).contiguous(memory_format=torch.channels_last)
        with pytest.raises(ValueError, match="shape: expected an even number of channels, got 3"):
            core.phase_forward_cpu(1, odd.shape, True, (*[_native.address(odd)] * 2, 0, 0, 0), (), (), 0, 1)

    def test_constructor(self) -> None:
        with pytest.raises(ValueError, match="recompute='some': expected one of 'amplitudes', 'all'"):
            FusedPATM(8, recompute="some")
        with pytest.raises(ValueError, match="expected more than one value per channel in training"):
            FusedPATM(8)(torch.zeros(1, 8, 1, 1))
        with pytest.raises(
            TypeError, match=r"x: expected the dtype of the weights, torch\.float32, got torch\.float64"
        ):
            FusedPATM(8)(torch.zeros(2, 8, 1, 1, dtype=torch.float64))


# --- FusedPATM -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDED)
def test_modules_reproduce_upstream(name: str) -> None:
    """The specification itself; tests/test_wavemlp.py holds the kernels to the same values."""
    kind = golden_models.config(name)["kind"]
    with wk.backend("reference"):
        golden_models.assert_reproduces(name, lambda *, dropout, **arguments: from_config(kind, **arguments))


@modes
def test_keeping_x_alone_reproduces_upstream(mode: str) -> None:
    def build(*, dropout: float, **arguments: Any) -> nn.Module:
        return FusedPATM(**arguments, recompute="all")

    golden_models.assert_reproduces(f"patm_{mode}", build)


def pair(dim: int, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[FusedPATM, wavemlp_reference.PATM]:
    recompute = options.pop("recompute", "amplitudes")
    exact = randomised(wavemlp_reference.PATM(dim, **options).double())
    fused = FusedPATM(dim, **options, recompute=recompute).double()
    fused.load_state_dict(exact.state_dict(), strict=True)
    return fused.to(dtype), exact


def compare(fused: nn.Module, exact: nn.Module, x: Tensor, rtol: float = 1e-10) -> None:
    """Output, all gradients and buffers of one step; a tensor is off by at most ``rtol`` of its largest value."""
    results = []
    for module, leaf in ((fused, x.clone(memory_format=torch.preserve_format)), (exact, x.clone().contiguous())):
        leaf.requires_grad_()
        out = module(leaf)
        out.backward(normal(*out.shape, seed=3).to(out.dtype))
        values = {"out": out, "x": leaf.grad} | {n: p.grad for n, p in module.named_parameters()}
        results.append(values | dict(module.named_buffers()))
    got, want = results
    for key, value in want.items():
        assert got[key] is not None, key
        assert got[key].shape == value.shape, key
        # What stands before batch statistics has a gradient of 0, and the reference has its rounding errors.
        scale = value.abs().max().item() if ".0.bias" not in key else want["x"].abs().sum().item()
        assert (got[key] - value).abs().max().item() <= rtol * scale, key


@modes
@recomputes
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dim, size", [(4, (3, 21)), (10, (8, 2)), (6, (1, 1)), (5, (4, 5))], ids=str)
def test_matches_reference(
    dim: int, size: tuple[int, int], training: bool, qkv_bias: bool, recompute: str, mode: str
) -> None:
    fused, exact = pair(dim, mode=mode, qkv_bias=qkv_bias, recompute=recompute)
    compare(fused.train(training), exact.train(training), normal(3, dim, *size))


@modes
@pytest.mark.parametrize("channels_last", [False, True])
def test_takes_the_inputs_memory_format(mode: str, channels_last: bool) -> None:
    fused, exact = pair(8, torch.float32, mode=mode)
    x = normal(2, 8, 6, 5, dtype=torch.float32)
    x = (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    out = fused(x)
    out.sum().backward()
    for value in (out, x.grad):
        assert value.is_contiguous(memory_format=torch.channels_last) == channels_last
        assert value.is_contiguous() != channels_last
    torch.testing.assert_close(out.detach().double(), exact(x.detach().double()), rtol=1e-3, atol=1e-4)


def test_slices_of_larger_tensors() -> None:
    fused, exact = pair(6)
    wide = normal(3, 13, 9, 14)
    compare(fused, exact, wide[1:, 1::2, 2:-1, ::3])


def test_frozen_norms_train_the_rest() -> None:
    fused, exact = pair(6, qkv_bias=True)
    for module in (fused, exact):
        module.train()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()
    compare(fused, exact, normal(2, 6, 5, 4))


@pytest.mark.parametrize(
    "change",
    [
        {"momentum": None},
        {"momentum": 0.5, "eps": 1e-2},
        {"running_mean": None, "running_var": None, "num_batches_tracked": None, "track_running_stats": False},
        {"weight": None, "bias": None},
    ],
    ids=["cumulative", "eps", "untracked", "no affine"],
)
def test_batch_norm_options(change: dict[str, Any]) -> None:
    fused, exact = pair(6)
    for module in (fused, exact):
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                for name, value in change.items():
                    setattr(part, name, value)
    for seed in range(2):
        for module in (fused, exact):
            module.zero_grad()
        compare(fused, exact, normal(2, 6, 5, 4, seed=seed))
    compare(fused.eval(), exact.eval(), normal(2, 6, 5, 4))


@modes
def test_gradcheck(mode: str) -> None:
    fused, _ = pair(4, mode=mode)
    names = [n for n, _ in fused.named_parameters()]
    x = normal(2, 4, 2, 3).requires_grad_()

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(fused, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(
        function, (x, *(p.detach().requires_grad_() for p in fused.parameters())), fast_mode=True
    )


def test_compiles_whole_with_dynamic_shapes() -> None:
    """Depthwise phases; tests/test_wavemlp.py compiles a model with the others."""
    torch._dynamo.reset()
    fused, _ = pair(4, mode="depthwise")
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    state = {name: value.clone() for name, value in fused.state_dict().items()}
    for shape in ((2, 4, 5, 6), (3, 4, 7, 4)):
        results = []
        for run in (fused, compiled):
            fused.load_state_dict(state)
            fused.zero_grad()
            x = normal(*shape).requires_grad_()
            run(x).sin().sum().backward()
            results.append(
                [x.grad, *(p.grad.clone() for p in fused.parameters()), *(b.clone() for b in fused.buffers())]
            )
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(mode: str, dtype: torch.dtype) -> None:
    fused, exact = pair(8, torch.float32, mode=mode)
    for module in (fused, exact):
        with torch.no_grad():
            for name, value in module.state_dict().items():
                if "theta" in name and name.endswith("0.weight"):
                    value.mul_(0.5)  # phases of about one radian: what a half type makes of many says nothing
        module.eval()
    x = normal(2, 8, 6, 7, dtype=torch.float32)

    def run(module: nn.Module, x: Tensor, enabled: bool) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=enabled):
            out = module(leaf)
        out.float().square().sum().backward()
        return [out, leaf.grad, *(p.grad for p in module.parameters())]

    got, want = run(fused, x, True), run(exact, x.double(), False)
    assert got[0].dtype == dtype
    assert all(g.dtype == torch.float32 for g in got[1:])
    # One after the other are rounded: x and weights, theta (which turns waves by phase times that), z, h, the weighted
    # sum, the output. The backward pass doubles the chain, and squares double the error of the output's gradient.
    phase = fused.theta_h_conv(x).abs().max().item() + fused.theta_w_conv(x).abs().max().item()
    unit = UNIT_ROUNDOFF[dtype] * (6 + phase)
    for i, (value, exact_value) in enumerate(zip(got, want, strict=True)):
        assert (value.double() - exact_value).norm() <= (2 if i == 0 else 6) * unit * exact_value.norm(), i


@modes
@pytest.mark.parametrize("recompute, allowed", [("amplitudes", 0.20), ("all", 0.06)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_saved_for_backward(mode: str, recompute: str, allowed: float, channels_last: bool) -> None:
    """Bytes of distinct storages, parameters and buffers excluded, against upstream's order of operations."""

    def saved(module: nn.Module) -> int:
        own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = torch.randn(2, 32, 28, 28)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = module(x.requires_grad_())
        assert out.requires_grad
        return sum(storages.values())

    upstream = saved(wavemlp_reference.PATM(32, mode=mode))
    assert upstream > 18 * 2 * 32 * 28 * 28 * 4
    assert saved(FusedPATM(32, mode=mode, recompute=recompute)) <= allowed * upstream


class TestFallsBackToTheModules:
    def calls(self, module: FusedPATM, monkeypatch: pytest.MonkeyPatch) -> int:
        """How often the one function ran."""
        count = 0
        original = patm_op.patm

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(patm_op, "patm", counted)
        module(normal(2, 8, 5, 4, dtype=torch.float32))
        return count

    def test_not_without_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.calls(FusedPATM(8), monkeypatch) == 1

    @pytest.mark.parametrize("name", [n for n, m in FusedPATM(8).named_modules() if n and n != "proj_drop"])
    def test_hooks(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        module = FusedPATM(8)
        seen: list[nn.Module] = []
        module.get_submodule(name).register_forward_hook(lambda m, *_: seen.append(m))
        assert self.calls(module, monkeypatch) == 0
        # reweight's dropout is called twice, in both of its places.
        assert len(seen) == (2 if name == "reweight.drop" else 1)

    def test_parametrizations(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = FusedPATM(8)
        nn.utils.parametrizations.weight_norm(module.fc_h)
        assert self.calls(module, monkeypatch) == 0

    def test_other_modules(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = nn.SyncBatchNorm.convert_sync_batchnorm(FusedPATM(8)).eval()
        assert type(module.theta_h_conv[1]) is nn.SyncBatchNorm
        assert self.calls(module, monkeypatch) == 0

    def test_one_frozen_norm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = FusedPATM(8)
        module.theta_h_conv[1].eval()
        assert self.calls(module, monkeypatch) == 0

    def test_backend_reference(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with wk.backend("reference"):
            assert self.calls(FusedPATM(8), monkeypatch) == 0


def test_no_gradients_wanted() -> None:
    fused, exact = pair(6)
    fused.eval(), exact.eval()
    x = normal(2, 6, 4, 5)
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), exact(x), rtol=1e-10, atol=1e-10)
    for parameter in fused.parameters():
        parameter.requires_grad_(False)
    x.requires_grad_()
    fused(x).sum().backward()
    assert x.grad is not None


def test_gradients_do_not_depend_on_x_wanting_one() -> None:
    fused, _ = pair(6)
    x = normal(2, 6, 4, 5)
    grads = []
    for leaf in (x, x.clone().requires_grad_()):
        fused.zero_grad()
        fused(leaf).square().sum().backward()
        grads.append([p.grad.clone() for p in fused.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_empty_batch() -> None:
    fused = FusedPATM(8).eval()
    x = torch.zeros(0, 8, 4, 5, requires_grad=True)
    out = fused(x)
    assert out.shape == (0, 8, 4, 5)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and (p.grad == 0).all() for p in fused.parameters())


def test_is_the_models_token_mixer() -> None:
    with torch.device("meta"):
        model = wavemlp.WaveMLP_T()
    mixers = [m for m in model.modules() if isinstance(m, wavemlp_reference.PATM)]
    assert len(mixers) == 10
    assert all(type(m) is FusedPATM for m in mixers)


@pytest.mark.parametrize("threads", [1, 3])
def test_same_bits_for_any_number_of_threads(threads: int) -> None:
    """The sums of an image add up in an order of their own. (Sums over the batch follow the threads.)"""
    inputs = arguments((3, 12, 40, 33), torch.float32)
    expected = op.phase_aggregate(*inputs, backend="cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        actual = op.phase_aggregate(*inputs, backend="cpu")
    finally:
        torch.set_num_threads(before)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_probe_of_an_installation() -> None:
    assert backends.requested() == "auto"
    assert op.BACKENDS["cpu"].why_not() == backends.cpu_why_not()
