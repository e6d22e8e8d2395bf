"""PATM from end to end on a GPU: the CUDA kernels against the reference in float64."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops import each
from tests.ops.contract import Case, Contract, image, on, randn, singles
from tests.ops.test_patm import some_weights, split
from tests.tolerances import UNIT_ROUNDOFF
from wavemix_kernels.ops.common import layout
from wavemix_kernels.ops.patm import branch_weights, reference, whole
from wavemix_kernels.ops.patm.weights import ON_IMAGES, Affine, Weights

HALF = (torch.bfloat16, torch.float16)
WIDE = UNIT_ROUNDOFF[torch.float32]
#: Error of the sine of half types (csrc/cuda/patm/sincos.cuh).
SINE = 14 * 2.0**-24
ON_X = set(Weights._fields[:ON_IMAGES])


class OnGpu(Contract):
    """One read for moments, two for the output. Thin images, of several strips, of several launches; by image or for
    the batch an affine map in front, or none."""

    name = "patm_whole"
    dtypes: ClassVar[Any] = {"cuda": HALF}
    axes: ClassVar[Any] = {
        "shape": ((2, 64, 3, 21), (1, 96, 4, 36), (1, 128, 2, 7), (9, 64, 1, 5), (1, 64, 2, 67)),
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
            last = case.layout != "nchw"
            out, branch_mean = whole.forward(read, tensors["path"], True, *split(tensors), backend, last)
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
        mlp = branch_weights._made(exact["branch_mean"], branch_weights.Mlp(*given))
        few = 64 * WIDE  # of sums of no more terms, a GELU and a softmax
        d_hidden = 1.13 * (made["branch_mean"] + few * exact["branch_mean"].abs()) @ t["fc1"].flatten(1).abs().T + few
        d_logits = (d_hidden + few * mlp.hidden.abs()) @ t["fc2"].flatten(1).abs().T + few
        # A softmax's weight moves by at most half of what a logit moves.
        d_a = 0.5 * d_logits.unflatten(1, (c, 3)).amax(2)[..., None, None] + few
        a = dict(zip("hwc", mlp.a.permute(2, 0, 1)[..., None, None], strict=True))
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
        "shape": ((1, 64, 2, 67), (1, 96, 4, 34)), "map": ("none",), "layout": ("channels_last",),
    }  # fmt: skip

    def cases(self, backend: str) -> list[Case]:
        return singles(dtype=self.dtypes[backend], **self.axes)  # `OnGpu` has each shape in each dtype

    def inputs(self, case: Case, device: str) -> Any:
        made = super().inputs(case, device)
        lit = torch.zeros(case.shape[3], dtype=torch.bool, device=device)
        lit[[column for column in (4, 31, 32, 63, 64) if column < len(lit)]] = True
        made["x"].masked_fill_(~lit, 0)
        return made


class Back(OnGpu):
    """All gradients, with statistics given or of the batch. Phases stay away from ReLU's corner, where a rounded image
    would decide between two gradients."""

    axes: ClassVar[Any] = {
        "shape": ((2, 64, 3, 21), (1, 96, 2, 35), (1, 128, 7, 7), (9, 64, 1, 5)),
        "map": ("by image", "none"),
        "layout": ("sliced", "nchw"),
        "of_batch": (True, False),
    }
    STATISTICS = ("center", "invstd", "image_mean", "covariance")

    def inputs(self, case: Case, device: str) -> Any:
        made, c = super().inputs(case, device), case.shape[1]
        for b in "hw":
            made[f"shift_{b}"] = 12 * made[f"shift_{b}"].sign()
        made["grad"] = image(randn(*case.shape, seed=4), case.dtype, device, case.layout)
        wide = {name: None if t is None else t.double().cpu() for name, t in made.items()}
        moments = whole.moments(whole.Image(wide["x"], wide["scale"], wide["shift"]), "reference")
        statistics = (0.1 * randn(2, c)).float(), 1 + randn(2, c).square().float(), *moments
        given_ones = statistics if case.of_batch else (None,) * 4
        made |= {name: None if t is None else t.to(device) for name, t in zip(self.STATISTICS, given_ones, strict=True)}
        given = whole.Image(wide["x"], wide["scale"], wide["shift"]), None, False, *split(wide)
        made["mean"] = whole.forward(*given, "reference")[1].float().to(device)
        return made

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        read = whole.Image(tensors["x"], tensors["scale"], tensors["shift"])
        batch = whole.Batch(*(tensors[name] for name in self.STATISTICS)) if case.of_batch else None
        given = tensors["grad"], tensors["mean"], batch, read, tensors["path"], *split(tensors), backend
        made = whole.backward(*given, case.layout != "nchw")
        return {"image": made.image, "sums": made.sums} | made.weights

    def bounds(self, case: Case, tensors: Any, cotangents: Any, exact: Any, backend: str) -> Any:
        """Like forward's: incoming errors go through absolute values, each step adds its own. The element type rounds
        image, waves, branches, what is mixed, branches' gradients, those of projections and statistics' matrix."""
        u, t = UNIT_ROUNDOFF[case.dtype], tensors
        n, c, h, w = case.shape
        pixels = h * w
        few = (n * pixels + 64) * WIDE  # of a sum over all pixels, of shorter ones and of the arithmetic between
        read = whole._read(whole.Image(t["x"], t["scale"], t["shift"]))
        x, d_x = read.abs(), 0 * read if t["scale"] is None else u * read.abs()

        def product(weight: Tensor, values: Tensor) -> Tensor:
            return torch.einsum("oc,nchw->nohw", weight.flatten(1), values)

        def over_pixels(rows: Tensor, columns: Tensor) -> Tensor:
            return torch.einsum("nohw,nchw->oc", rows, columns)

        grad = t["grad"] * t["path"][:, None, None, None]
        mixed_gradient = product(t["proj"].flatten(1).t(), grad)
        d_mixed = few * product(t["proj"].flatten(1).t().abs(), grad.abs())
        given = (t[name] for name in ("fc1", "fc1_bias", "fc2", "fc2_bias"))
        mlp = branch_weights._made(t["mean"], branch_weights.Mlp(*given))
        a = dict(zip("hwc", mlp.a.permute(2, 0, 1)[..., None, None], strict=True))
        wave, d_wave, turned, branch, d_branch = {}, {}, {}, {}, {}
        for b in "hw":
            theta, z = (product(t[f"{k}_{b}"], read) + (0 if t[f"{k}_{b}_bias"] is None else
                        t[f"{k}_{b}_bias"][:, None, None]) for k in ("theta", "z"))  # fmt: skip
            d_theta, d_z = (product(t[f"{k}_{b}"].abs(), d_x + few * x) for k in ("theta", "z"))
            scale, shift = t[f"scale_{b}"][:, None, None], t[f"shift_{b}"][:, None, None]
            phase = (theta * scale + shift).relu()
            d_phase = scale.abs() * (d_theta + 4 * WIDE * theta.abs()) + 4 * WIDE * shift.abs() + SINE + 16 * WIDE
            wave[b] = torch.cat((z * phase.cos(), z * phase.sin()), 1)
            d_wave[b] = torch.cat([d_z + z.abs() * d_phase] * 2, 1)
            turned[b] = phase, d_phase, z, d_z, theta, d_theta
            taps, padding = t[f"taps_{b}"], (0, 3) if b == "h" else (3, 0)
            branch[b] = F.conv2d(wave[b], taps, padding=padding, groups=c)
            d_branch[b] = F.conv2d(d_wave[b] + 2 * u * wave[b].abs(), taps.abs(), padding=padding, groups=c)
        branch["c"] = product(t["z_c"], read) + (0 if t["z_c_bias"] is None else t["z_c_bias"][:, None, None])
        d_branch["c"] = product(t["z_c"].abs(), d_x + few * x)
        rounded = {b: d_branch[b] + (0 if b == "c" else u) * branch[b].abs() for b in "hwc"}
        d_a = {b: (mixed_gradient.abs() * rounded[b] + (d_mixed + few * mixed_gradient.abs()) * branch[b].abs())
               .sum((2, 3)) for b in "hwc"}  # fmt: skip
        by_a = {b: (mixed_gradient * branch[b]).sum((2, 3)) for b in "hwc"}
        size_a, error_a = (
            sum(a[b][..., 0, 0] * by_a[b].abs() for b in "hwc"),
            sum(a[b][..., 0, 0] * d_a[b] for b in "hwc"),
        )
        made: Any = {}
        logits, d_logits = (
            torch.stack([a[b][..., 0, 0] * (own[b].abs() + whole_) for b in "hwc"], 2).flatten(1)
            for own, whole_ in ((by_a, size_a), (d_a, error_a))
        )
        d_logits = d_logits + few * logits
        fc1, fc2, hidden = t["fc1"].flatten(1).abs(), t["fc2"].flatten(1).abs(), mlp.hidden.abs()
        pre, d_pre = 1.13 * logits @ fc2, 1.13 * d_logits @ fc2
        d_pre = d_pre + few * pre
        made |= {"fc2": d_logits.t() @ hidden + few * logits.t() @ hidden, "fc2_bias": (d_logits + few * logits).sum(0)}
        made |= {"fc1": (d_pre + few * pre).t() @ t["mean"].abs(), "fc1_bias": (d_pre + few * pre).sum(0)}
        d_mean = ((d_pre + few * pre) @ fc1 / pixels)[..., None, None]
        # The error of mean itself: from the exact gradient of the hidden layer, whose logits' gradient may cancel.
        mean = _mean_gradient(torch.stack([by_a[b] for b in "hwc"], 2), mlp, t)[..., None, None] / pixels
        e_mixed = sum((d_branch[b] + 2 * u * branch[b].abs()) * a[b] for b in "hwc")
        made["proj"] = over_pixels(grad.abs(), e_mixed + few * sum(branch[b].abs() * a[b] for b in "hwc"))
        made["proj_bias"] = few * grad.abs().sum((0, 2, 3))
        image_, error = {}, {}
        sums, e_sums = [], []
        for b in "hw":
            phase, d_phase, z, d_z, theta, d_theta = turned[b]
            of = mixed_gradient * a[b] + mean
            e_of = d_mixed * a[b] + d_mean + (u + few) * (mixed_gradient.abs() * a[b] + mean.abs())
            taps, padding = t[f"taps_{b}"], (0, 3) if b == "h" else (3, 0)
            back = F.conv_transpose2d(of, taps, padding=padding, groups=c)
            e_back = F.conv_transpose2d(e_of + few * of.abs(), taps.abs(), padding=padding, groups=c)
            (re, im), (e_re, e_im) = back.chunk(2, 1), e_back.chunk(2, 1)
            size = re.abs() + im.abs()
            image_[f"z_{b}"] = re * phase.cos() + im * phase.sin()
            error[f"z_{b}"] = e_re + e_im + size * d_phase
            turn = torch.where(phase > 0, z * (im * phase.cos() - re * phase.sin()), 0)
            e_turn = torch.where(phase > 0, z.abs() * (e_re + e_im + size * d_phase) + d_z * size, 0)
            scale = t[f"scale_{b}"][:, None, None].abs()
            image_[f"theta_{b}"], error[f"theta_{b}"] = scale * turn, scale * e_turn
            center = (theta - (0 if t["center"] is None else t["center"]["hw".index(b)][:, None, None])).abs()
            apart = center
            e_sums.append(torch.stack(((e_turn + few * turn.abs()).sum((0, 2, 3)),
                (e_turn * apart + turn.abs() * (d_theta + few * (apart + theta.abs()))).sum((0, 2, 3)))))  # fmt: skip
            sums.append(torch.stack((turn.abs().sum((0, 2, 3)), (turn.abs() * apart).sum((0, 2, 3)))))
            padded = F.pad(wave[b].abs(), (3, 3, 0, 0) if b == "h" else (0, 0, 3, 3))
            e_padded = F.pad(d_wave[b] + few * wave[b].abs(), (3, 3, 0, 0) if b == "h" else (0, 0, 3, 3))
            windows, e_windows = (v.unfold(3 if b == "h" else 2, 7, 1).unflatten(1, (c, 2)) for v in (padded, e_padded))
            made[f"taps_{b}"] = (
                torch.einsum("nohw,nokhwt->okt", e_of, windows) + torch.einsum("nohw,nokhwt->okt", of.abs(), e_windows)
            ).reshape(taps.shape)
            made[f"z_{b}_bias"] = (error[f"z_{b}"] + few * image_[f"z_{b}"].abs()).sum((0, 2, 3))
        of = mixed_gradient * a["c"] + mean
        image_["z_c"], error["z_c"] = of, d_mixed * a["c"] + d_mean + few * (mixed_gradient.abs() * a["c"] + mean.abs())
        made["z_c_bias"] = (error["z_c"] + few * of.abs()).sum((0, 2, 3))
        made["sums"] = torch.stack(e_sums)
        made["image"] = 0 * x
        for name, of in image_.items():
            stored = error[name] + u * (of.abs() + error[name])
            made[name] = over_pixels(stored + few * of.abs(), x + d_x) + over_pixels(of.abs(), d_x)
            made["image"] = made["image"] + product(t[name].flatten(1).t().abs(), stored + few * of.abs())
        if case.of_batch:
            self._through_statistics(t, torch.stack(sums), torch.stack(e_sums), made, read, d_x, u, few)
        made["image"] = made["image"] + u * (exact["image"].abs() + made["image"])
        out = {name: made[name].reshape(want.shape) for name, want in exact.items()}
        return {name: of + u * (exact[name].abs() + of) if name in ON_X else of for name, of in out.items()}

    def _through_statistics(self, t: Any, sums: Tensor, e_sums: Tensor, made: Any, read: Tensor, d_x: Tensor, u: float,
                            few: float) -> None:  # fmt: skip
        """A line of sums, as :func:`wavemix_kernels.ops.patm.statistics.through_moments` has it, of absolute values."""
        count = read.shape[0] * read.shape[2] * read.shape[3]
        scale = torch.stack((t["scale_h"], t["scale_w"])).abs()[:, None] / count
        theta = torch.stack((t["theta_h"], t["theta_w"])).flatten(2).abs()
        (offset, rise), (e_offset, e_rise) = (
            ((scale * s)[:, 0], (scale * s)[:, 1] * t["invstd"].square()) for s in (sums, e_sums + few * sums)
        )
        mean, covariance = t["image_mean"].abs(), t["covariance"].abs()
        for i, b in enumerate("hw"):
            through = (e_rise[i][:, None] * theta[i]) @ covariance + e_offset[i][:, None] * mean
            made[f"theta_{b}"] = made[f"theta_{b}"] + count * (
                through + few * ((rise[i][:, None] * theta[i]) @ covariance + offset[i][:, None] * mean)
            )
        matrix, e_matrix = (torch.einsum("bok,boc,bo->kc", theta, theta, v) for v in (rise, e_rise))
        x = (read - t["image_mean"][:, None, None]).abs()
        made["image"] = made["image"] + torch.einsum("kc,nchw->nkhw", e_matrix, x + few * read.abs())
        made["image"] = made["image"] + torch.einsum("kc,nchw->nkhw", matrix, (2 * u + few) * read.abs() + d_x)
        line = torch.einsum("bok,bo->k", theta, e_offset + few * offset) + few * matrix @ mean
        made["image"] = made["image"] + line[:, None, None]


def _mean_gradient(d_a: Tensor, mlp: Any, t: Any) -> Tensor:
    logits = (mlp.a * (d_a - (mlp.a * d_a).sum(2, keepdim=True))).flatten(1)
    pre = torch.ops.aten.gelu_backward(logits @ t["fc2"].flatten(1), mlp.pre)
    return pre @ t["fc1"].flatten(1)


class Far(OnGpu):
    """Images, rows or columns so far apart that offsets take 64 bits; outputs, too."""

    #: Strides are multiples of 16 bytes, as images that are read in place have them.
    axes: ClassVar[Any] = {
        "shape": ((2, 64, 3, 9), (1, 64, 5, 9), (1, 64, 3, 9)), "layout": ("far", "far_rows", "far_columns"),
        "map": ("none",),
    }  # fmt: skip

    def cases(self, backend: str) -> list[Case]:
        return singles(dtype=self.dtypes[backend], **self.axes)

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        with outputs_in(case, backend):
            return super().run(case, tensors, backend)


class FarBack(Back):
    axes: ClassVar[Any] = Far.axes | {"of_batch": (True,)}

    def cases(self, backend: str) -> list[Case]:
        return singles(dtype=self.dtypes[backend], **self.axes)

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        with outputs_in(case, backend):
            return super().run(case, tensors, backend)


def outputs_in(case: Case, backend: str) -> AbstractContextManager[Any]:
    """The kernels' images lie in memory as the case's inputs do."""

    def empty(like: Tensor, shape: Any, channels_last: bool) -> Tensor:
        return image(torch.full(tuple(shape), torch.nan), like.dtype, str(like.device), case.layout)

    return mock.patch.object(layout, "empty", empty) if backend == "cuda" else nullcontext()


test_contract = each.case(OnGpu(), Lit())
test_offsets_beyond_32_bits = each.case(Far({"cuda": HALF[1:]}), FarBack({"cuda": HALF[1:]}))
test_contract_of_strips = pytest.mark.prove(each.case(Lit({"cuda": HALF[:1]}, shape=((1, 128, 9, 35),))))
ONE: Any = {"shape": ((2, 64, 3, 21),), "map": ("by image",), "layout": ("sliced",), "of_batch": (True,)}
test_contract_of_a_gradient = each.case(Back({"cuda": HALF[:1]}, **ONE))
#: Each width and dtype with statistics of the batch, which have a kernel for each.
THROUGH: Any = {"shape": tuple((1, c, 1, 4) for c in (64, 96, 128)), "map": ("none",), "of_batch": (True,)}
test_contract_of_gradients = pytest.mark.prove(each.case(Back(), Back(layout=("nchw",), **THROUGH)))


@on("cuda")
@pytest.mark.parametrize("dtype, biased", [(torch.bfloat16, False), (torch.float16, True)])
@pytest.mark.parametrize("c", [64, 96, pytest.param(128, marks=pytest.mark.prove)])
def test_contract_of_statistics(backend: str, device: str, c: int, dtype: torch.dtype, biased: bool) -> None:
    """Statistics from moments: sums in double, each result rounded once or twice. A variance of 0 stays one."""
    root, mean = randn(c, c).double(), randn(c, seed=1).double()
    phases = []
    for i in range(2):
        theta, vectors = randn(c, c, 1, 1, seed=2 + i).to(dtype), randn(3, c, seed=4 + i).to(dtype)
        theta[3] = 0
        phases += [theta, *(v if biased else None for v in vectors)]
    given = [mean, root @ root.t(), *phases]

    def of(name: str, where: str, wide: bool) -> Tensor:
        to = [None if t is None else t.double() if wide else t.to(where) for t in given]
        return torch.ops.wavemix_kernels.patm_statistics(*to, 1e-5, 1e-3, name).double().cpu()

    got, want = of(backend, device, False), of("reference", "cpu", True)
    centre, var, invstd, scale, shift = want
    in_double = 4 * c * 2.0**-53  # the rounding of a sum of a square's products, at most 4 times as large as the sum
    largest = torch.stack([(p.double().flatten(1).abs() @ given[1].abs() * p.double().flatten(1).abs()).sum(1)
                           for p in (phases[0], phases[4])])  # fmt: skip
    d_var = in_double * largest
    d_centre = WIDE * centre.abs() + in_double * mean.abs().max() * c
    d_invstd = 4 * WIDE * invstd + 0.5 * invstd**3 * d_var
    d_scale = scale.abs() / invstd * d_invstd + WIDE * scale.abs()
    d_shift = d_centre * scale.abs() + centre.abs() * d_scale + 2 * WIDE * ((centre * scale).abs() + shift.abs())
    bounds = d_centre, d_var + WIDE * var, d_invstd, d_scale, d_shift
    for error, bound in zip((got - want).abs(), bounds, strict=True):
        assert (error <= bound).all(), (error / bound).max()
    assert (got[1][:, 3] == 0).all()


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
def test_backward_of_an_empty_batch(backend: str, device: str) -> None:
    w, maps = split({k: t.to(device) for k, t in some_weights(64, torch.float16).items()})
    x = torch.empty(0, 64, 3, 5, dtype=torch.float16, device=device)
    made = whole.backward(x, x.new_empty((0, 64)).float(), None, whole.Image(x, None, None), None, w, maps, backend)
    assert made.image.shape == x.shape
    assert all((t == 0).all() for t in (made.sums, *made.weights.values()))
