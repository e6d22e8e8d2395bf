"""PATM's operators on every backend: `phase_aggregate`, `branch_sum`, and a CPU's PATM from end to end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.ops import each
from tests.ops.contract import SHORT, Case, Contract, image, randn, singles
from tests.tolerances import DTYPES, UNIT_ROUNDOFF, accumulation, stored, stored_roundoff, sum_bound
from wavemix_kernels.ops.patm import branches, phases, reference, whole
from wavemix_kernels.ops.patm.weights import Affine, Weights

EPS = 1e-5
#: Roundoffs by which sine and cosine of a phase may err (csrc/cpu/patm/sincos.h, csrc/cuda/patm/sincos.cuh), in fp64
#: CUDA's own. Half types have those of fp32 there, on GPUs a chip's functions.
SINE = {("cuda", torch.float32): 1.33, ("cuda", torch.float64): 2.5, ("triton", torch.float64): 2.0}
SINE_OF_CHIP = 13.9


def sine(backend: str, dtype: torch.dtype) -> float:
    if dtype.itemsize == 2 and backend in ("cuda", "triton"):
        return SINE_OF_CHIP
    return SINE.get((backend, accumulation(dtype)), 1.32)


NAMES = (
    "z_h", "z_w", "z_c", "theta_h", "theta_w", "scale_h", "shift_h", "scale_w", "shift_w", "taps_h", "taps_w",
)  # fmt: skip
#: Two images, rows or columns.
FAR = (((2, 2, 3, 3), "far"), ((1, 2, 2, 3), "far_rows"), ((1, 2, 3, 2), "far_columns"))
EVERYWHERE = dict.fromkeys(("reference", "cpu", "triton", "cuda"), DTYPES)
#: Tensors of a whole PATM.
FIELDS = (*Weights._fields, *Affine._fields)
KERNELS = pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"], indirect=True)


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", layout: str = "nchw", turns: float = 1.0
) -> dict[str, Tensor]:
    """Phases of some radians, or `turns` times as many. They stay 0.01 away from ReLU's corner, where rounding would
    decide between two gradients."""
    c = shape[1]
    images = [randn(*shape, seed=i) for i in range(5)]
    for theta in images[3:]:
        theta += 0.1 * theta.sign()
    affine = [t for i in (5, 7) for t in (turns * (0.5 + randn(c, seed=i).abs()), 0.04 * randn(c, seed=i + 1).tanh())]
    vectors = [*affine, randn(c, 2, 1, 7, seed=9), randn(c, 2, 7, 1, seed=10)]
    made = [image(t, dtype, device, layout) for t in images] + [t.to(device, accumulation(dtype)) for t in vectors]
    return dict(zip(NAMES, made, strict=True))


class PhaseAggregate(Contract):
    """Forward, and every gradient with all that backward is told.

    A phase comes of one multiplication and one addition (or one FMA), so it errs by 2 u (|scale theta| + |phase|), and
    turns its wave by as much; sine and cosine err by `sine` u, the product with z by u.
    """

    name = "phase_aggregate"
    dtypes = EVERYWHERE
    axes: ClassVar[Any] = {
        # Thinner and longer than the taps reach; more channels, pixels, images than one block or program takes.
        "shape": (
            (2, 8, 7, 9), (1, 6, 3, 21), (3, 4, 1, 1), (2, 2, 1, 5), (1, 132, 2, 3), (1, 4, 70, 1), (1, 4, 2, 261),
            (11, 16, 9, 2),
        ),
        "layout": ("channels_slice", "nchw", "channels_last", "sliced"),
        "way": ("statistics", "plain", "weighted", "turns"),
    }  # fmt: skip

    def cases(self, backend: str) -> list[Case]:
        if backend != "triton":
            return super().cases(backend)
        few = self.axes | {"shape": self.axes["shape"][:6]}  # interpreted, an element takes a microsecond
        dtypes = self.dtypes[backend]
        again = [torch.float32] if torch.float32 in dtypes else dtypes
        return singles(dtype=dtypes, **few) + singles(dtype=again, **few | {"way": few["way"][::-1]})

    def inputs(self, case: Case, device: str) -> Any:
        turns = 300.0 if case.way == "turns" else 1.0
        made: Any = arguments(case.shape, case.dtype, device, case.layout, turns)
        wide = accumulation(case.dtype)
        for i, b in enumerate("hw"):
            made[f"grad_{b}"] = image(randn(*case.shape, seed=20 + i), case.dtype, device, case.layout)
        made["grad_s"] = randn(*case.shape[:2], seed=22).to(device, wide)
        weighted, statistics = case.way in ("weighted", "statistics"), case.way == "statistics"
        made["a"] = randn(3, *case.shape[:2], seed=23).to(device, wide) if weighted else None
        var, mean = zip(*(self.statistics(made[f"theta_{b}"].double()) for b in "hw"), strict=True)
        made["mean"] = torch.stack(mean).to(wide) if statistics else None
        made["invstd"] = (torch.stack(var) + EPS).rsqrt().to(wide) if statistics else None
        return made

    def statistics(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        return torch.var_mean(theta, (0, 2, 3), correction=0)

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        t = tensors
        h, w, s = phases.fused(*(t[name] for name in NAMES), backend)
        joined = case.way != "plain"
        given = [t[name] for name in ("grad_h", "grad_w", "grad_s", "a", "z_h", "z_w", *NAMES[3:], "mean", "invstd")]
        made = phases.backward(*given, joined, backend)
        assert len(made.images) == (1 if joined else 3)
        slots = zip(("z_h", "z_w", "z_c", "theta_h", "theta_w"), made.slots(), strict=True)
        out = {"h": h, "w": w, "s": s, "d_taps_h": made.taps_h, "d_taps_w": made.taps_w}
        out |= {f"d_{name}": d for name, d in slots}
        for i, b in enumerate("hw"):
            out |= {f"d_shift_{b}": made.sums[i, 0], f"d_scale_{b}": made.sums[i, 1]}
        return out

    def exact(self, case: Case, tensors: Any) -> Any:
        """By autograd, from the sum of ``(grad_h a0 + grad_s) h``, ``(grad_w a1 + grad_s) w`` and
        ``(grad_h a2 + grad_s) c``.

        With statistics, scale and shift come from those of theta: gamma and beta are chosen so that they still are the
        given ones, of which rounding moves no phase across ReLU's corner. The sums are then the gradients of these.
        """
        leaf = {name: tensors[name].detach().requires_grad_() for name in NAMES}
        affine, wrt, invstd = {}, {f"d_{name}": leaf[name] for name in NAMES}, dict.fromkeys("hw", torch.ones(1))
        for b in "hw":
            scale, shift = leaf[f"scale_{b}"], leaf[f"shift_{b}"]
            if case.way == "statistics":
                var, mean = self.statistics(leaf[f"theta_{b}"])
                inverse = (var + EPS).rsqrt()
                gamma = (scale / inverse).detach().requires_grad_()
                beta = (shift + mean * scale).detach().requires_grad_()
                scale, shift, invstd[b] = gamma * inverse, beta - mean * gamma * inverse, inverse.detach()
                wrt |= {f"d_scale_{b}": gamma, f"d_shift_{b}": beta}
            affine |= {f"scale_{b}": scale, f"shift_{b}": shift}
        h, w, s = reference.phase_aggregate(*(leaf | affine).values())
        grad_h, grad_w, grad_s, a = (tensors[name] for name in ("grad_h", "grad_w", "grad_s", "a"))
        weights = [1.0, 1.0, 0.0] if a is None else [t[..., None, None] for t in a]
        loss = (h * grad_h * weights[0]).sum() + (w * grad_w * weights[1]).sum() + (s * grad_s).sum()
        loss = loss + (leaf["z_c"] * grad_h * weights[2]).sum()
        made = dict(zip(wrt, torch.autograd.grad(loss, list(wrt.values())), strict=True))
        made |= {f"d_scale_{b}": made[f"d_scale_{b}"] / invstd[b] for b in "hw"}
        return {"h": h, "w": w, "s": s} | made

    def bounds(self, case: Case, tensors: Any, cotangents: Any, exact: Any, backend: str) -> Any:
        def largest(name: str) -> float:
            return 0.0 if tensors[name] is None else tensors[name].abs().max().item()

        wide, pixels = accumulation(case.dtype), math.prod(case.shape[2:])
        u = UNIT_ROUNDOFF[wide] * (2 if case.dtype == torch.float64 else 1)  # float64's truth errs as much
        n = case.shape[0] * pixels
        d = max(1.0, largest("a")) * max(largest("grad_h"), largest("grad_w")) + largest("grad_s")
        allowed, outputs, peaks = {"d_z_c": 2 * u * d}, 0.0, largest("z_c")
        for i, b in enumerate("hw"):
            z, theta, scale = (largest(f"{name}_{b}") for name in ("z", "theta", "scale"))
            turned = 2 * (2 * theta * scale + largest(f"shift_{b}")) + sine(backend, case.dtype)
            # Sums of |weights|: over what one output reads, and over what one wave goes to.
            taps = tensors[f"taps_{b}"].abs().flatten(2)
            row = max(taps.sum((1, 2)).max().item(), 2 * taps.sum(2).max().item())
            # 14 products and sums of waves.
            allowed[b] = u * z * row * (turned + 1 + 14)
            outputs, peaks = outputs + allowed[b], peaks + z * row
            # 7 products and sums of gradients, which themselves come of two operations; then z takes products with
            # cosine and sine, theta one more with z and with scale.
            wave = u * d * row * (7 + 2 + turned + 3)
            allowed[f"d_z_{b}"] = 2 * wave
            pre, peak = 2 * z * (wave + 3 * u * d * row), 2 * z * d * row
            # Sums over every pixel, by any order of additions; theta - mean is at most twice the largest theta.
            summed = n * (pre + n * u * peak)
            spread = (2 if case.way == "statistics" else 1) * theta
            of_mean = 2 * u * spread * n * peak if case.way == "statistics" else 0.0
            allowed |= {f"d_shift_{b}": summed + of_mean, f"d_scale_{b}": spread * summed + of_mean}
            allowed[f"d_theta_{b}"] = scale * pre
            if case.way == "statistics":
                # A line is added to the already rounded gradient, with the errors of both sums and its own five
                # operations; theta and its mean cancel in it.
                steep = tensors["invstd"][i].square().max().item() * spread**2
                line = scale * (1 + steep) * (summed / n + 5 * u * peak)
                allowed[f"d_theta_{b}"] += line + stored_roundoff(case.dtype, backend) * scale * peak
            allowed[f"d_taps_{b}"] = n * u * z * d * (turned + 4 + n)
        allowed["s"] = pixels * (outputs + (pixels + 2) * u * peaks)
        once = ("h", "w", "d_z_h", "d_z_w", "d_z_c", "d_theta_h", "d_theta_w")
        return {
            name: bound + (stored(exact[name], case.dtype, backend) if name in once else torch.zeros_like(exact[name]))
            for name, bound in allowed.items()
        }

    def also(self, case: Case, tensors: Any, results: Any) -> None:
        for name, got in results.items():
            assert got.dtype == (case.dtype if got.dim() == 4 and got.shape == case.shape else accumulation(case.dtype))
            if name in ("h", "w"):
                assert got.is_contiguous(memory_format=torch.channels_last)


class BranchSum(Contract):
    """Three products and two sums; the gradient of `a` is a sum over pixels."""

    name = "branch_sum"
    dtypes: ClassVar[Any] = dict.fromkeys(("reference", "cpu", "triton"), DTYPES)
    axes: ClassVar[Any] = {
        "shape": ((2, 6, 5, 9), (1, 72, 19, 3), (1, 5, 19, 3), (3, 1, 1, 1)),
        "layout": ("nchw", "channels_last", "channels_slice", "sliced"),
    }

    def inputs(self, case: Case, device: str) -> Any:
        made = {name: image(randn(*case.shape, seed=i), case.dtype, device, case.layout)
                for i, name in enumerate(("grad", "h", "w", "c"))}  # fmt: skip
        return made | {"a": randn(3, *case.shape[:2], seed=5).to(device, accumulation(case.dtype))}

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        out, d_a = branches.backward(*tensors.values(), backend)
        _, *given = tensors.values()
        assert torch.equal(out, branches.branch_sum(*given, backend))
        assert (out.dtype, d_a.dtype) == (case.dtype, accumulation(case.dtype))
        return {"out": out, "d_a": d_a}

    def exact(self, case: Case, tensors: Any) -> Any:
        grad, *three, a = tensors.values()
        out = sum(t * k for t, k in zip(three, a[..., None, None], strict=True))
        return {"out": out, "d_a": torch.stack([(grad * t).sum((2, 3)) for t in three])}

    def bounds(self, case: Case, tensors: Any, cotangents: Any, exact: Any, backend: str) -> Any:
        sizes = self.exact(case, {name: t.abs() for name, t in tensors.items()})
        terms = math.prod(case.shape[2:]) + 1
        return {
            "out": sum_bound(exact["out"], sizes["out"], 4, case.dtype, backend=backend),
            "d_a": sum_bound(exact["d_a"], sizes["d_a"], terms, accumulation(case.dtype)),
        }


def some_weights(c: int, dtype: torch.dtype, biased: bool = True) -> dict[str, Tensor]:
    """Phases of a few radians, mostly above 0."""
    hidden, values = max(c // 4, 1), {}
    shapes: dict[str, tuple[int, ...]] = {
        "fc1": (hidden, c, 1, 1), "fc1_bias": (hidden,), "fc2": (3 * c, hidden, 1, 1), "fc2_bias": (3 * c,),
        "taps_h": (c, 2, 1, 7), "taps_w": (c, 2, 7, 1),
    }  # fmt: skip
    for i, name in enumerate(FIELDS):
        vector = name.startswith(("scale", "shift")) or name.endswith("bias")
        shape = shapes.get(name, (c,) if vector else (c, c, 1, 1))
        value = randn(*shape, seed=i) / (c**0.5 if len(shape) > 1 else 4)
        values[name] = (value + 1 if name.startswith(("scale", "shift")) else value).to(dtype)
        if not biased and name in ("z_h_bias", "theta_w_bias", "z_c_bias", "proj_bias"):
            values[name] = None
    return values


def split(tensors: Any) -> tuple[Weights, Affine]:
    return tuple(kind(*(tensors[name] for name in kind._fields)) for kind in (Weights, Affine))


class Whole(Contract):
    """PATM as a residual branch, behind an affine map by image."""

    name = "patm_whole"
    dtypes: ClassVar[Any] = {"cpu": DTYPES}
    axes: ClassVar[Any] = {
        "of_batch": (True, False),
        "layout": ("sliced", "channels_slice", "nchw"),
        "shape": ((2, 10, 9, 11),),
    }
    STATISTICS = ("mean", "invstd", "image_mean", "covariance")

    def inputs(self, case: Case, device: str) -> Any:
        n, c, *_ = case.shape
        wide = accumulation(case.dtype)
        made: Any = {"x": image(randn(*case.shape), case.dtype, device, case.layout)}
        made |= {"scale": (1 + randn(n, c, seed=2) / 4).to(wide), "shift": randn(n, c, seed=3).to(wide)}
        moments = whole.moments(whole.Image(*made.values()), "reference")
        statistics = (0.1 * randn(2, c)).to(wide), 1 + randn(2, c).square().to(wide), *moments
        made |= {"grad": image(randn(*case.shape, seed=1), case.dtype, device, case.layout)}
        made |= {"path": torch.tensor([0.0, 1.25], dtype=wide)}
        made |= dict(zip(self.STATISTICS, statistics if case.of_batch else (None,) * 4, strict=True))
        return made | some_weights(c, wide, biased=case.of_batch)

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        x = whole.Image(*(tensors[name] for name in ("x", "scale", "shift")))
        given = split(tensors)
        batch = whole.Batch(*(tensors[name] for name in self.STATISTICS)) if case.of_batch else None
        out, mean = whole.forward(x, tensors["path"], True, *given, backend)
        grads = whole.backward(tensors["grad"], mean, batch, x, tensors["path"], *given, backend)
        return {"out": out, "branch_mean": mean, "image": grads.image, "sums": grads.sums} | grads.weights

    def exact(self, case: Case, tensors: Any) -> Any:
        return self.run(case, tensors, "reference")

    def bounds(self, case: Case, tensors: Any, cotangents: Any, exact: Any, backend: str) -> Any:
        """The longest sums are over pixels, over the joined projections' channels, over taps. A phase turns its wave by
        its own rounding error, and the chain is walked twice, forward and backward."""
        n, c, h, w = case.shape
        read = tensors["x"] * tensors["scale"][..., None, None] + tensors["shift"][..., None, None]
        thetas = [torch.einsum("oc,nchw->nohw", tensors[f"theta_{b}"].flatten(1), read) for b in "hw"]
        u = UNIT_ROUNDOFF[accumulation(case.dtype)] * (1 + max(t.abs().max().item() for t in thetas))
        made = {}
        for name, want in exact.items():
            size = want.abs().amax((0, 2), keepdim=True) if name == "sums" else want.abs().max()
            once = stored(want, case.dtype) if name in ("out", "image") else 0.0
            made[name] = torch.broadcast_to(2 * (n * h * w + 5 * c + 14) * u * size + once, want.shape)
        return made


FEW: Any = {"shape": ((2, 4, 3, 5),), "layout": ("channels_slice",)}
test_contract = each.case(PhaseAggregate(), BranchSum(), Whole())
test_repeats = each.backend_repeats(PhaseAggregate(), BranchSum())
EMPTY: Any = {"shape": ((0, 4, 3, 5),), "layout": ("nchw",)}
test_empty_batch = each.empty_batch(PhaseAggregate(way=("plain", "weighted"), **EMPTY), BranchSum(**EMPTY))
test_offsets_beyond_32_bits = each.case(
    *(PhaseAggregate(SHORT, shape=(shape,), layout=(layout,), way=("statistics",)) for shape, layout in FAR),
    *(BranchSum({b: SHORT[b] for b in ("cpu", "triton")}, shape=(shape,), layout=(layout,)) for shape, layout in FAR),
)
test_operators_of_gpus = each.operator(
    PhaseAggregate(way=("weighted", "statistics"), **FEW), BranchSum(**FEW), backends=("triton", "cuda")
)
test_operators = each.operator(PhaseAggregate(**FEW), BranchSum(**FEW), Whole(shape=FEW["shape"], layout=("nchw",)))


# --- As operators ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"], indirect=True)
def test_gradcheck(backend: str) -> None:
    inputs = [t.requires_grad_() for t in arguments((2, 4, 3, 5), torch.float64).values()]
    assert torch.autograd.gradcheck(lambda *t: phases.phase_aggregate(*t, backend=backend), inputs, fast_mode=True)


def test_second_derivatives_are_the_references_alone() -> None:
    inputs = [t.requires_grad_() for t in arguments((1, 2, 1, 2), torch.float64).values()]

    def of_z(*tensors: Tensor, name: str = "reference") -> Tensor:
        return phases.phase_aggregate(*tensors, backend=name)[0]

    assert torch.autograd.gradgradcheck(of_z, inputs)
    out = of_z(*inputs, name="cpu")
    (grad,) = torch.autograd.grad(out, inputs[:1], torch.ones_like(out, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()


# --- Errors ----------------------------------------------------------------------------------------------


@KERNELS
def test_odd_channels_have_no_kernel(backend: str, device: str) -> None:
    inputs = arguments((1, 5, 3, 4), torch.float32, device).values()
    message = f"backend='{backend}' cannot serve this call: it takes an even number of channels, got 5"
    with pytest.raises(ValueError, match=message):
        phases.phase_aggregate(*inputs, backend=backend)
    for got, want in zip(phases.phase_aggregate(*inputs), reference.phase_aggregate(*inputs), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "name, change, error, message",
    [
        ("z_h", lambda t: t[0], ValueError, "z_h: expected 4 dimensions"),
        ("z_w", lambda t: t[:, :2], ValueError, r"z_w: expected the shape of z_h, \(1, 4, 3, 5\), got \(1, 2, 3, 5\)"),
        ("theta_w", lambda t: t.double(), TypeError, "theta_w: expected the dtype of z_h, torch.float32, got"),
        ("shift_w", lambda t: t[:1], ValueError, r"shift_w: expected shape \(4,\) to go with z_h"),
        ("taps_w", lambda t: t.transpose(2, 3), ValueError, r"taps_w: expected shape \(4, 2, 7, 1\)"),
    ],
)  # fmt: skip
def test_rejects(name: str, change: Callable[[Tensor], Tensor], error: type[Exception], message: str) -> None:
    inputs = arguments((1, 4, 3, 5), torch.float32)
    inputs[name] = change(inputs[name])
    with pytest.raises(error, match=message):
        phases.phase_aggregate(*inputs.values())
