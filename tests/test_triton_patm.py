"""The Triton kernels of PATM: phase_aggregate and branch_sum against float64, and FusedPATM on them.

Their registers and accesses on real chips: tests/test_triton_aot.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wavemix_kernels as wk
from tests.test_patm import LAYOUTS, NAMES, Bounds, arguments, laid_out, pair
from tests.test_wavemlp import normal
from tests.tolerances import DTYPES, UNDERFLOW, UNIT_ROUNDOFF, accumulation, assert_within, stored_roundoff
from wavemix_kernels.nn.wavemlp import reference as wavemlp_reference
from wavemix_kernels.ops.patm import branches as sum_op
from wavemix_kernels.ops.patm import phases as op
from wavemix_kernels.ops.patm import reference as patm_reference

pytest.importorskip("triton", reason="Triton is not installed: pip install wavemix-kernels[triton]")

from tests.kernels.triton import search_spaces

EPS = 1e-5


def stored(exact: Tensor, dtype: torch.dtype) -> Tensor:
    return stored_roundoff(dtype, "triton") * exact.abs() + UNDERFLOW[dtype]


def to(device: str, tensors: list[Tensor]) -> list[Tensor]:
    """On the device, strides kept: a slice stays one of a larger tensor."""
    if device == "cpu":
        return tensors
    moved = []
    for t in tensors:
        storage = t.new_empty(0).set_(t.untyped_storage()).to(device)
        moved.append(storage.as_strided(t.shape, t.stride(), t.storage_offset()))
    return moved


# ------------------------------------------------------------------------------------------- phase_aggregate


class Exact:
    """float64 by autograd, from the sum of ``(grad_h a0 + grad_s) h``, ``(grad_w a1 + grad_s) w`` and
    ``(grad_h a2 + grad_s) c``.

    With ``statistics`` scale and shift come from those of theta: gamma and beta are chosen so that they still are the
    given ones, of which rounding moves no phase across ReLU's corner.
    """

    def __init__(
        self, inputs: list[Tensor], grads: list[Tensor], a: Tensor | None, statistics: bool
    ) -> None:  # fmt: skip
        leaf = dict(zip(NAMES, (t.detach().double().cpu().requires_grad_() for t in inputs), strict=True))
        affine, gamma, beta = [], [], []
        self.mean, self.invstd = [], []
        for b in "hw":
            theta, scale, shift = (leaf[f"{name}_{b}"] for name in ("theta", "scale", "shift"))
            if statistics:
                var, mean = torch.var_mean(theta, (0, 2, 3), correction=0)
                invstd = (var + EPS).rsqrt()
                self.mean.append(mean.detach())
                self.invstd.append(invstd.detach())
                gamma.append((scale / invstd).detach().requires_grad_())
                beta.append((shift + mean * scale).detach().requires_grad_())
                scale = gamma[-1] * invstd
                shift = beta[-1] - mean * scale
            affine += [scale, shift]
        images = [leaf[name] for name in NAMES[:5]]
        taps = [leaf["taps_h"], leaf["taps_w"]]
        h, w, s = patm_reference.phase_aggregate(*images, *affine, *taps)
        self.outputs = [t.detach() for t in (h, w, s)]
        grad_h, grad_w, grad_s = (t.double().cpu() for t in grads)
        weights = [1.0, 1.0, 0.0] if a is None else [t[..., None, None] for t in a.double().cpu()]
        loss = (h * grad_h * weights[0]).sum() + (w * grad_w * weights[1]).sum() + (s * grad_s).sum()
        loss = loss + (images[2] * grad_h * weights[2]).sum()
        wrt = [*images, *taps, *(gamma if statistics else (leaf["scale_h"], leaf["scale_w"]))]
        wrt += beta if statistics else [leaf["shift_h"], leaf["shift_w"]]
        made = torch.autograd.grad(loss, wrt)
        self.z = dict(zip("hw", made[:2], strict=True))
        self.c = made[2]
        self.theta = dict(zip("hw", made[3:5], strict=True))
        self.taps = dict(zip("hw", made[5:7], strict=True))
        of_scale = [g / i for g, i in zip(made[7:9], self.invstd, strict=True)] if statistics else made[7:9]
        self.sums = {b: (made[9 + i], of_scale[i]) for i, b in enumerate("hw")}


def check(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: str, weighted: bool, statistics: bool, joined: bool
) -> None:
    """Forward, and every gradient with all that backward is told, within bounds of the arithmetic."""
    wide = accumulation(dtype)
    inputs = to(device, arguments(shape, dtype, layout))
    grads = to(device, [laid_out(normal(*shape, seed=20 + i).to(dtype), layout) for i in range(2)])
    grads.append(normal(*shape[:2], seed=22).to(device, wide))
    a = normal(3, *shape[:2], seed=23).to(device, wide) if weighted else None
    exact = Exact(inputs, grads, a, statistics)
    mean, invstd = ((torch.stack(t).to(device, wide) if statistics else None) for t in (exact.mean, exact.invstd))
    outputs = op.fused(*inputs, "triton")
    got = op.backward(*grads, a, *inputs[:2], *inputs[3:], mean, invstd, joined, "triton")
    assert len(got.images) == (1 if joined else 3)
    d_z_h, d_z_w, d_c, d_theta_h, d_theta_w = got.slots()
    images = {"h": (d_z_h, d_theta_h), "w": (d_z_w, d_theta_w)}

    bounds, u = Bounds(inputs, dtype), UNIT_ROUNDOFF[wide]
    pixels = math.prod(shape[2:])
    everywhere = shape[0] * pixels
    for b, value, want in zip("hw", outputs, exact.outputs, strict=False):
        assert value.dtype == dtype
        assert_within(value, want, bounds.output(b) + stored(want, dtype), b)
    peaks = sum(bounds.z[b] * bounds.row[b] for b in "hw") + inputs[2].abs().max().item()
    each = sum(bounds.output(b) for b in "hw") + (pixels + 2) * u * peaks
    assert outputs[2].dtype == wide
    assert_within(outputs[2], exact.outputs[2], torch.full_like(exact.outputs[2], pixels * each), "s")

    size = max(1.0, 0.0 if a is None else a.abs().max().item())
    d = size * max(t.abs().max().item() for t in grads[:2]) + grads[2].abs().max().item()
    assert_within(d_c, exact.c, 2 * u * d + stored(exact.c, dtype), "c")
    for i, b in enumerate("hw"):
        turned = bounds.phase[b] + 2  # CUDA's double functions err by up to 2
        wave = bounds.d_wave(b, d) + u * d * bounds.row[b] * (turned + 3)
        d_z, d_theta = images[b]
        assert_within(d_z, exact.z[b], 2 * wave + stored(exact.z[b], dtype), f"z_{b}")
        pre = 2 * bounds.z[b] * (wave + u * d * bounds.row[b] * 3)
        peak = 2 * bounds.z[b] * d * bounds.row[b]  # of the phase's gradient
        # Sums over every pixel, by any order of additions; theta - mean is at most twice the largest theta.
        summed = everywhere * (pre + everywhere * u * peak)
        spread = 2 * inputs[NAMES.index(f"theta_{b}")].abs().max().item()
        for value, want, factor in zip(got.sums[i], exact.sums[b], (1.0, spread), strict=True):
            bound = factor * summed + (2 * u * spread * everywhere * peak if statistics else 0.0)
            assert_within(value, want, torch.full_like(want, bound), f"sums of {b}")
        bound = bounds.scale[b] * pre + stored(exact.theta[b], dtype)
        if statistics:
            # What is added to the already rounded gradient: a line with the errors of both sums and its own five
            # operations, of which theta and its mean cancel.
            steep = exact.invstd[i].square().max().item() * spread**2
            line = bounds.scale[b] * (1 + steep) * (summed / everywhere + 5 * u * peak)
            bound = bound + line + stored_roundoff(dtype, "triton") * bounds.scale[b] * peak
        assert_within(d_theta, exact.theta[b], bound, f"theta_{b}")
        want = exact.taps[b]
        each = u * bounds.z[b] * d * (turned + 4 + everywhere)
        assert_within((got.taps_h, got.taps_w)[i], want, torch.full_like(want, everywhere * each), f"taps_{b}")


ALL, SINGLE = DTYPES, (torch.float32,)


@pytest.mark.parametrize(
    "shape, layout, weighted, statistics, joined, dtype",
    [
        (*case, dtype)
        for *case, dtypes in (
            ((2, 8, 3, 9), "slices", True, True, True, ALL),
            ((2, 2, 1, 5), "contiguous", False, False, False, ALL),
            ((1, 6, 3, 21), "contiguous", True, False, False, SINGLE),
            ((3, 4, 1, 1), "channels_last", True, True, False, SINGLE),
            ((1, 4, 9, 5), "slices", False, True, True, SINGLE),
            ((1, 132, 2, 3), "channels_last", True, False, True, SINGLE),  # more channels than a program takes
            ((1, 4, 70, 1), "channels_last", False, False, False, SINGLE),  # longer than a segment
        )
        for dtype in dtypes
    ],
    ids=str,
)
def test_aggregate(
    shape: tuple[int, ...], layout: str, weighted: bool, statistics: bool, joined: bool, dtype: torch.dtype, device: str
) -> None:
    check(shape, layout, dtype, device, weighted, statistics, joined)


def phase_configs() -> Iterator[Any]:
    """Tiles worth timing: 128 values in a thread forward, 64 backward, at one warp."""
    from wavemix_kernels.ops.patm.triton_phases import PhaseConfig

    for values in (64, 128):
        for num_warps in (1, 4):
            for channels in (16, 32, 64):
                yield PhaseConfig(values * num_warps // channels, channels, num_warps)


def test_every_configuration(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from wavemix_kernels.ops.patm import triton_phases as kernels

    configs = {*search_spaces.phase_aggregate(False), *search_spaces.phase_aggregate(True)}
    if device == "cpu":  # warps are nothing to the interpreter
        configs = set({(c.lines, c.channels): c for c in configs}.values())
    assert configs
    for config in configs:
        monkeypatch.setattr(kernels, "config_for", lambda *_, config=config: config)
        check((1, 20, 2, 5), "channels_last", torch.float32, device, True, False, True)


def test_sums_are_the_same_in_every_run(device: str) -> None:
    inputs = to(device, arguments((2, 6, 4, 5), torch.float32))
    grads = [normal(2, 6, 4, 5, seed=i).to(device, torch.float32) for i in range(2)]
    grads.append(torch.ones(2, 6, device=device))
    runs = []
    for _ in range(2):
        made = op.backward(*grads, None, *inputs[:2], *inputs[3:], None, None, True, "triton")
        runs.append((op.fused(*inputs, "triton")[2], made.sums, made.taps_h, made.taps_w))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_empty_batch(device: str) -> None:
    inputs = [t.requires_grad_() for t in to(device, arguments((0, 4, 3, 5), torch.float32))]
    h, w, s = op.phase_aggregate(*inputs, backend="triton")
    assert (h.shape, w.shape, s.shape) == ((0, 4, 3, 5), (0, 4, 3, 5), (0, 4))
    grads = torch.autograd.grad((h.sum() + w.sum() + s.sum()), inputs)
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(grads, inputs, strict=True))
    a = torch.ones(3, 0, 4, device=device)
    out, d_a = sum_op.backward(h.detach(), h.detach(), w.detach(), inputs[2].detach(), a, "triton")
    assert (out.shape, d_a.shape) == ((0, 4, 3, 5), (3, 0, 4))


@pytest.mark.parametrize("axis", [0, 2, 3])
def test_offsets_beyond_32_bits(axis: int, device: str) -> None:
    """Two images, rows or columns 2^31 elements apart; what lies between is never touched, nor given memory by a CPU's
    allocator."""
    shape = [1, 2, 3, 3]
    shape[axis] = 2
    step = 2**31 + 64
    stride = [64, 1, 16, 4]
    stride[axis] = step
    store = torch.empty(step + 128, dtype=torch.bfloat16, device=device)
    far = [store.as_strided(shape, stride, offset) for offset in (0, 2)]
    near = [normal(*shape, seed=i).to(device, torch.bfloat16) for i in range(2)]
    for image, values in zip(far, near, strict=True):
        image.copy_(values)
    others = to(device, arguments(tuple(shape), torch.bfloat16))

    def run(z: Tensor, theta: Tensor) -> list[Tensor]:
        inputs = [z, z, z, theta, theta, *others[5:]]
        grad_s = torch.ones(shape[:2], device=device)
        a = torch.full((3, *shape[:2]), 0.5, device=device)
        made = op.backward(z, theta, grad_s, a, z, z, *inputs[3:], None, None, True, "triton")
        mixed, d_a = sum_op.backward(theta, z, theta, z, a, "triton")
        return [*op.fused(*inputs, "triton"), *made.images, made.sums, made.taps_h, made.taps_w, mixed, d_a]

    for value, want in zip(run(*far), run(*near), strict=True):
        assert torch.equal(value, want)


# --------------------------------------------------------------------------------------------------- sincos


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NaN and infinity, interpreted
def test_sincos(device: str) -> None:
    """All sizes of fp32: within 1.32 roundoffs below 8192, where every number was tried (cpu/patm/sincos.h); beyond,
    the rest after whole quarter turns is as exact and goes through the same polynomials."""
    import triton
    import triton.language as tl

    from wavemix_kernels.ops.patm.triton_waves import sincos

    @triton.jit
    def kernel(sine, cosine, x, of: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0) * 64 + tl.arange(0, 64)[None, :]
        s, c = of(tl.load(x + at))
        tl.store(sine + at, s)
        tl.store(cosine + at, c)

    bits = torch.randint(0, 0x7F800000, (64 * 40,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    x = bits.view(torch.float32)
    small = torch.linspace(0, 9000, 64 * 20)
    # The closest of all to a multiple of pi/2, the two ends of the reductions, none at all, and no number.
    special = [16367173.0 * 2.0**72, 8192.0, 8192.001, 3.4028234663852886e38, 0.0, -1.0, 1e-40, 16367173.0 * 2.0**104]
    special = torch.tensor([*special, float("inf"), float("nan")]).repeat(7)[:64]
    x = torch.cat((x, small, special)).to(device)
    sine, cosine = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    kernel[(x.numel() // 64,)](sine, cosine, x, sincos)
    phases = x.cpu().relu().double().tolist()
    for got, function in ((sine, math.sin), (cosine, math.cos)):
        exact = torch.tensor([function(p) if math.isfinite(p) else math.nan for p in phases], dtype=torch.float64)
        assert_within(got, exact, torch.full_like(exact, 1.32 * UNIT_ROUNDOFF[torch.float32]), function.__name__)


def test_large_phases_reach_both_outputs(device: str) -> None:
    """Taps that pass one channel through show cosine and sine themselves; a NaN reaches 3 pixels to each side."""
    theta = (1e6 * (1 + normal(1, 4, 3, 12).abs())).float()
    z, zero, one = torch.ones_like(theta), torch.zeros(4), torch.ones(4)
    taps_h, taps_w = torch.zeros(4, 2, 1, 7), torch.zeros(4, 2, 7, 1)
    taps_h[:, 0, 0, 3] = taps_w[:, 1, 3, 0] = 1
    given = [t.to(device) for t in (z, z, z, theta, theta, one, zero, one, zero, taps_h, taps_w)]
    h, w, _ = op.phase_aggregate(*given, backend="triton")
    exact = theta.double()
    bound = torch.full((1, 2, 3, 12), 2.32 * UNIT_ROUNDOFF[torch.float32])  # and one rounding of the product
    for out, channels in ((h, slice(0, None, 2)), (w, slice(1, None, 2))):
        assert_within(out[:, :2], exact[:, channels].cos(), bound, "cosine")
        assert_within(out[:, 2:], exact[:, channels].sin(), bound, "sine")
    theta[0, 0, 0, 6] = float("nan")
    given[3] = theta.to(device)
    h, *_ = op.phase_aggregate(*given, backend="triton")
    expected = torch.zeros(1, 4, 3, 12, dtype=torch.bool)
    expected[0, ::2, 0, 3:10] = True
    assert torch.equal(h.isnan().cpu(), expected)


# ----------------------------------------------------------------------------------------------- branch_sum


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 5, 9), (1, 72, 19, 3), (3, 1, 1, 1)], ids=str)
def test_branch_sum(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: str) -> None:
    images = to(device, [laid_out(normal(*shape, seed=i).to(dtype), layout) for i in range(4)])
    grad, h, w, c = images
    a = normal(3, *shape[:2], seed=5).to(device, accumulation(dtype))
    terms = torch.stack([t.double() * k for t, k in zip((h, w, c), a.double()[..., None, None], strict=True)])
    u, pixels = UNIT_ROUNDOFF[accumulation(dtype)], math.prod(shape[2:])
    got, d_a = sum_op.backward(grad, h, w, c, a, "triton")
    # Three products and two sums, then the output's own rounding.
    assert_within(got, terms.sum(0), 4 * u * terms.abs().sum(0) + stored(terms.sum(0), dtype), "sum")
    assert torch.equal(got, sum_op.branch_sum(h, w, c, a, "triton"))
    products = torch.stack([grad.double() * t.double() for t in (h, w, c)])
    assert d_a.dtype == a.dtype
    assert_within(d_a, products.sum((3, 4)), (pixels + 1) * u * products.abs().sum((3, 4)), "d_a")


def test_every_sum_configuration(device: str) -> None:
    from wavemix_kernels.ops.patm import triton_branches as kernels

    images = [normal(2, 20, 5, 13, seed=i).to(device, torch.float32) for i in range(4)]
    grad, *branches = (t.contiguous(memory_format=torch.channels_last) for t in images)
    a = normal(3, 2, 20, seed=5).to(device, torch.float32)
    terms = torch.stack([t.double() * k for t, k in zip(branches, a.double()[..., None, None], strict=True)])
    products = torch.stack([grad.double() * t.double() for t in branches])
    u = UNIT_ROUNDOFF[torch.float32]
    for config in search_spaces.branch_sum():
        out = torch.full_like(grad, float("nan"))
        d_a = kernels.backward(out, branches, a, grad, config)
        assert_within(out, terms.sum(0), 4 * u * terms.abs().sum(0), str(config))
        assert_within(d_a, products.sum((3, 4)), 66 * u * products.abs().sum((3, 4)), str(config))


# --------------------------------------------------------------------------------------------- the operators


def test_odd_channels_are_refused(device: str) -> None:
    inputs = to(device, arguments((1, 5, 3, 4), torch.float32))
    message = r"backend='triton' cannot serve this call: it takes an even number of channels, got 5"
    with pytest.raises(ValueError, match=message):
        op.phase_aggregate(*inputs, backend="triton")


def test_opcheck(device: str) -> None:
    inputs = [t.detach().requires_grad_() for t in to(device, arguments((1, 4, 2, 3), torch.float32, "slices"))]
    ops = torch.ops.wavemix_kernels
    torch.library.opcheck(ops.phase_aggregate, (*inputs, "triton"))
    plain = [t.detach() for t in inputs]
    h, w, s = op.phase_aggregate(*plain, backend="triton")
    a, mean, invstd = (torch.rand(3, 1, 4, device=device), *torch.rand(2, 2, 4, device=device))
    some = (h, w, s, a, plain[0], plain[1], *plain[3:], mean, invstd, True, "triton")
    torch.library.opcheck(ops.phase_aggregate_backward, some)
    torch.library.opcheck(ops.branch_sum, (h, w, plain[2], a, "triton"))
    torch.library.opcheck(ops.branch_sum_backward, (h, h, w, plain[2], a, "triton"))


@pytest.mark.parametrize("mode", wavemlp_reference.MODES)
@pytest.mark.parametrize(
    "dim, size, training, recompute",
    [(6, (3, 7), True, "amplitudes"), (4, (5, 1), True, "all"), (8, (4, 3), False, "amplitudes")],
)
def test_fused_patm(dim: int, size: tuple[int, int], training: bool, recompute: str, mode: str, device: str) -> None:
    """The whole module in float64: output, all gradients, running statistics."""
    fused, exact = pair(dim, mode=mode, recompute=recompute)
    x = normal(2, dim, *size)
    results: list[dict[str, Any]] = []
    for module, where, name in ((fused, device, "triton"), (exact, "cpu", "reference")):
        assert isinstance(module, nn.Module)
        module.to(where).train(training)
        leaf = x.to(where).requires_grad_()
        with wk.backend(name):
            out = module(leaf)
        out.backward(normal(*out.shape, seed=3).to(where))  # the choice of the forward pass holds
        values = {"out": out, "x": leaf.grad, **{n: p.grad for n, p in module.named_parameters()}}
        results.append({**values, **dict(module.named_buffers())})
    got, want = results
    assert got.keys() == want.keys()
    largest = want["x"].abs().sum().item()
    for key, value in want.items():
        # What stands before batch statistics has a gradient of 0, and the reference has its rounding errors.
        scale = largest if training and ".0.bias" in key else value.abs().max().item()
        assert (got[key].cpu() - value).abs().max().item() <= 1e-10 * scale, key
