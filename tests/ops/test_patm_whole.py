"""PATM from end to end on a GPU: moments and forward of the CUDA kernels against the reference in float64."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops import each
from tests.ops.contract import Case, Contract, image, on, randn
from tests.ops.test_patm import some_weights, split
from tests.tolerances import UNIT_ROUNDOFF
from wavemix_kernels.ops.patm import reference, whole
from wavemix_kernels.ops.patm.branch_weights import branch_weights
from wavemix_kernels.ops.patm.weights import ON_IMAGES, Affine, Weights

HALF = (torch.bfloat16, torch.float16)
WIDE = UNIT_ROUNDOFF[torch.float32]
#: Of the sine of half types (csrc/cuda/patm/sincos.cuh).
SINE = 14 * 2.0**-24
ON_X = set(Weights._fields[:ON_IMAGES])


class OnGpu(Contract):
    """One read for moments, two for the output. Thin images, of several strips, of several launches; by image or for
    the batch an affine map in front, or none."""

    name = "patm_whole"
    dtypes: ClassVar[Any] = {"cuda": HALF}
    axes: ClassVar[Any] = {
        "shape": ((2, 64, 3, 21), (1, 96, 4, 34), (1, 128, 2, 7), (9, 64, 1, 5), (1, 64, 2, 67)),
        "map": ("by image", "none", "far"),
        "layout": ("sliced", "channels_last", "nchw"),
    }

    def inputs(self, case: Case, device: str) -> Any:
        n, c, *_ = case.shape
        made: Any = {"x": image(randn(*case.shape), case.dtype, device, case.layout), "scale": None, "shift": None}
        if case.map == "by image":
            made |= {"scale": (1 + randn(n, c, seed=2) / 4).float(), "shift": randn(n, c, seed=3).float()}
        if case.map == "far":  # from 0, where sums of squares would lose all digits
            made |= {"scale": torch.ones(c), "shift": 3000 + randn(c, seed=3).float()}
        made["path"] = 2 * torch.rand(n, generator=torch.Generator().manual_seed(0))
        weights = some_weights(c, torch.float32, biased=case.map != "none")
        made |= {name: t.to(case.dtype) if name in ON_X and t is not None else t for name, t in weights.items()}
        return {name: None if t is None else t.to(device) for name, t in made.items()}

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        read = whole.Image(tensors["x"], tensors["scale"], tensors["shift"])
        mean, covariance = whole.moments(read, backend)
        made = {"mean": mean, "covariance": covariance}
        if case.map != "far":
            out, branch_mean = whole.forward(read, tensors["path"], True, *split(tensors), backend)
            made |= {"out": out, "branch_mean": branch_mean}
        return {name: t.float() if t.dtype == torch.float64 and backend == "cuda" else t for name, t in made.items()}

    def exact(self, case: Case, tensors: Any) -> Any:
        return self.run(case, tensors, "reference")

    def bounds(self, case: Case, tensors: Any, cotangents: Any, exact: Any, backend: str) -> Any:
        """Each step's error is what comes in, through absolute values, and its own: `u` where a value is rounded to the
        element type, of an exact sum's terms otherwise."""
        u, t = UNIT_ROUNDOFF[case.dtype], tensors
        read = whole._read(whole.Image(t["x"], t["scale"], t["shift"]))
        n, c, h, w = read.shape
        apart = (read - exact["mean"][:, None, None]).abs().amax((0, 2, 3)) * 2  # from another pixel
        far = 8 * WIDE * (exact["mean"].abs() + apart)
        of_sums = 2 * u + n * h * w * WIDE
        made = {
            "mean": of_sums * apart + far,
            "covariance": of_sums * apart[:, None] * apart + far[:, None] * apart + apart[:, None] * far,
        }
        if case.map == "far":
            return made

        def product(weight: Tensor, values: Tensor) -> Tensor:
            return torch.einsum("oc,nchw->nohw", weight.flatten(1), values)

        d_read = 0 * read if t["scale"] is None else u * read.abs()
        value, error = {}, {}
        for name in ("z_h", "z_w", "z_c", "theta_h", "theta_w"):
            bias = 0 if t[f"{name}_bias"] is None else t[f"{name}_bias"][:, None, None]
            value[name] = product(t[name], read) + bias
            sizes = product(t[name].abs(), read.abs()) + abs(bias)
            error[name] = product(t[name].abs(), d_read) + (c + 2) * WIDE * sizes
        maps = [t[name] for name in Affine._fields]
        branch = dict(
            zip("hwc", reference.phase_aggregate(*value.values(), *maps, t["taps_h"], t["taps_w"]), strict=True)
        )
        branch["c"], d_branch = value["z_c"], {"c": error["z_c"]}
        for b in "hw":
            scale, shift = t[f"scale_{b}"][:, None, None].abs(), t[f"shift_{b}"][:, None, None].abs()
            d_phase = scale * error[f"theta_{b}"] + 4 * WIDE * (scale * value[f"theta_{b}"].abs() + shift)
            z, d_z = value[f"z_{b}"].abs(), error[f"z_{b}"]
            d_wave = d_z + z * (d_phase + SINE + u)  # rounded on its way to a sum
            taps, padding = t[f"taps_{b}"].abs(), (0, 3) if b == "h" else (3, 0)
            # Cosines make the first half of the outputs, sines the other; both are up to as large as the amplitude.
            both = torch.cat([d_wave + 16 * WIDE * z] * 2, 1)
            d_branch[b] = F.conv2d(both, taps, padding=padding, groups=c)
        every = sum(of.abs() for of in branch.values())
        made["branch_mean"] = (sum(d_branch.values()) + (h * w + 8) * WIDE * every).mean((2, 3))
        given = (t[name] for name in ("fc1", "fc1_bias", "fc2", "fc2_bias"))
        mlp = branch_weights(exact["branch_mean"], *given)
        few = 64 * WIDE  # of sums of no more terms, a GELU and a softmax
        d_hidden = 1.13 * (made["branch_mean"] + few * exact["branch_mean"].abs()) @ t["fc1"].flatten(1).abs().T + few
        d_logits = (d_hidden + few * mlp.hidden.abs()) @ t["fc2"].flatten(1).abs().T + few
        # A softmax's weight moves by at most half of what a logit moves.
        d_a = 0.5 * d_logits.unflatten(1, (c, 3)).amax(2)[..., None, None] + few
        a = dict(zip("hwc", mlp.by_branch()[..., None, None], strict=True))
        mixed = sum(branch[b] * a[b] for b in "hwc")
        d_mixed = sum(d_branch[b] * a[b] for b in "hwc") + (d_a + 8 * WIDE) * every + u * mixed.abs()
        d_out = product(t["proj"].abs(), d_mixed + (c + 2) * WIDE * mixed.abs())
        path = t["path"][:, None, None, None]
        made["out"] = path * d_out + (u + 4 * WIDE) * (exact["out"].abs() + path * d_out)
        return made


class Lit(OnGpu):
    """A few columns of x are not zero. What reaches their neighbours comes through one tap, with nothing to hide
    behind where a halo is off."""

    axes: ClassVar[Any] = {
        "shape": ((1, 64, 2, 67), (1, 96, 4, 34), (1, 128, 9, 35)), "map": ("none",), "layout": ("channels_last",),
    }  # fmt: skip

    def inputs(self, case: Case, device: str) -> Any:
        made = super().inputs(case, device)
        lit = torch.zeros(case.shape[3], dtype=torch.bool, device=device)
        lit[[column for column in (4, 31, 32, 63, 64) if column < len(lit)]] = True
        made["x"].masked_fill_(~lit, 0)
        return made


test_contract = each.case(OnGpu(), Lit())


@on("cuda")
def test_empty_batch(backend: str, device: str) -> None:
    w, maps = split({k: t.to(device) for k, t in some_weights(64, torch.float16).items()})
    x = torch.empty(0, 64, 3, 5, dtype=torch.float16, device=device)
    out, mean = whole.forward(whole.Image(x, None, None), None, False, w, maps, backend)
    assert (out.shape, mean.shape) == ((0, 64, 3, 5), (0, 64))
    assert all(t.isnan().all() for t in whole.moments(whole.Image(x, None, None), backend))


@on("cuda")
@pytest.mark.parametrize("c, dtype, message", [
    (32, torch.float16, "takes 64, 96, 128 channels, got 32"), (64, torch.float32, "takes float16 and bfloat16"),
])  # fmt: skip
def test_what_it_does_not_serve_it_says(backend: str, device: str, c: int, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whole.moments(whole.Image(torch.zeros(1, c, 2, 2, dtype=dtype, device=device), None, None), backend)


@on("cuda")
def test_backward_is_by_parts(backend: str, device: str) -> None:
    w, maps = split({k: t.to(device) for k, t in some_weights(64, torch.float16).items()})
    x = torch.zeros(1, 64, 2, 2, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match="backend='cuda' goes forward alone"):
        whole.backward(x, x[..., 0, 0].float(), None, whole.Image(x, None, None), None, w, maps, backend)
