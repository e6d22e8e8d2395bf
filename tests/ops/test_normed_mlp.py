"""The pointwise MLP's backward pass through a BatchNorm of its second input, on every backend."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.ops import each
from tests.ops.contract import Contract, image, on, randn
from tests.ops.test_mlp import Mlp, matrix
from tests.tolerances import DTYPES, UNIT_ROUNDOFF, accumulation, stored
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.mlp import normed
from wavemix_kernels.ops.norm import batch_norm

#: In parts; the others so wide that half types keep the hidden layer: few units, and more than a program takes at once.
SIZES = ((10, 8, 3, 20, 6), (34, 160, 80, 66, 40), (130, 100, 37, 16, 130), (42, 3, 5, 600, 250))
NAMES = normed.Gradients._fields
EPS = 1e-5


class Normed(Mlp):
    """All gradients. The sums of BatchNorm's gradient and the first weight's err as the products they are made of."""

    name = "normed_mlp_backward"
    axes: ClassVar[Any] = {
        "size": SIZES, "layout": ("nchw", "channels_last", "channels_slice"), "p": (0.0, 0.5), "affine": (False, True),
        "bias": (False, True),
    }  # fmt: skip
    dtypes: ClassVar[Any] = {name: Contract.dtypes[name] for name in ("reference", "triton")}
    few: ClassVar[Any] = {}

    def inputs(self, case: Any, device: str) -> Any:
        """`affine`: BatchNorm has a weight, one of which is 0, and a bias."""
        given = super().inputs(case, device)
        b = case.size[2]
        del given["scale"], given["shift"]
        weight, bias = ((randn(b, seed=i) + 1).to(device, case.dtype) if case.affine else None for i in (5, 6))
        if weight is not None:
            weight[0] = 0
        given["second"] = image(given["second"].double() + 3, case.dtype, device, case.layout)
        b1 = randn(case.size[3], seed=3).to(device, case.dtype)
        return given | {"b1": b1, "norm_weight": weight, "norm_bias": bias}

    def norm(self, t: Any, dtype: torch.dtype) -> normed.Norm:
        var, mean = torch.var_mean(t["second"].to(dtype), (0, 2, 3), correction=0)
        weight, bias = t["norm_weight"], t["norm_bias"]
        return normed.Norm.of(batch_norm.from_moments(mean, var, weight, bias, EPS), weight, bias)

    def run(self, case: Any, t: Any, backend: str) -> Any:
        norm = self.norm(t, torch.float64)
        norm = normed.Norm(*(v.to(accumulation(case.dtype)) for v in norm[:4]), norm.weight, norm.bias)
        seed = t["seed"] if case.p else None
        made = normed.backward(
            t["grad"], t["x"], t["second"], norm, t["w1"], t["b1"], t["w2"], t["b2"], case.p, seed, backend
        )
        assert made.y.is_contiguous(memory_format=torch.channels_last)
        return dict(zip(NAMES, made, strict=True))

    def solved(self, case: Any, t: Any, backend: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Exact matrices, and errors before they are stored."""
        wide = accumulation(case.dtype)
        u = UNIT_ROUNDOFF[wide] * (2 if case.dtype == torch.float64 else 1)
        half = UNIT_ROUNDOFF[case.dtype] if wide != case.dtype else 0.0
        (_, a, b, _, o), norm = case.size, self.norm(t, torch.float64)
        kept = backend == "triton" and choose.pointwise_mlp(case.dtype, a + b, o, True) == "kept"
        given = {"scale": norm.scale, "shift": norm.shift, **t}
        exact, error = self.solve(case, given, case.dtype)
        y, g = matrix(t["second"]), exact["second"]
        n = len(y)
        factor = torch.ones(b, dtype=torch.float64) if norm.weight is None else norm.weight
        yhat = (y - norm.mean) * norm.invstd
        far = (y.abs() + norm.mean.abs()) * norm.invstd  # what a rounding of yhat is of
        exact |= {"norm_weight": (g * yhat).sum(0), "norm_bias": g.sum(0)}
        g_error = error["second"] + half * (g.abs() + error["second"])  # it is stored
        of_yhat = half * yhat.abs() + 3 * u * far
        error["norm_bias"] = g_error.sum(0) + (n + 4) * u * g.abs().sum(0)
        error["norm_weight"] = (g_error * yhat.abs() + g.abs() * of_yhat).sum(0) + (n + 4) * u * (g.abs() * far).sum(0)
        if kept:  # both are products with w1 of sums that have errors of their own; that with yhat is stored
            w = t["w1"][:, a:]
            gz, gz_error = exact["before_activation"], error["before_activation"]
            product = gz.T @ yhat
            wrong = gz_error.T @ yhat.abs() + (gz.abs() + gz_error).T @ of_yhat
            wrong = wrong + (n + 4) * u * (gz.abs().T @ far) + half * product.abs()
            error["norm_bias"] = error["norm_bias"] + (len(w) + 4) * u * (gz.sum(0).abs() @ w.abs())
            error["norm_bias"] = error["norm_bias"] + error["b1"] @ w.abs()
            error["norm_weight"] = error["norm_weight"] + (w.abs() * wrong).sum(0)
            error["norm_weight"] = error["norm_weight"] + (len(w) + 4) * u * (w * product).abs().sum(0)
            of_w1 = wrong * factor.abs()
            if norm.bias is not None:
                of_w1 = of_w1 + (error["b1"] + 4 * u * gz.sum(0).abs())[:, None] * norm.bias.abs()
            error["w1"] = torch.cat((error["w1"][:, :a], of_w1 + 4 * u * exact["w1"][:, a:].abs()), 1)
        scale = norm.invstd * factor
        of_g, of_gx = exact["norm_bias"] / n, exact["norm_weight"] / n
        exact["y"] = scale * (g - of_g - yhat * of_gx)
        sizes = g.abs() + of_g.abs() + (far + norm.mean.abs() * norm.invstd) * of_gx.abs()
        off = g_error + (error["norm_bias"] + (far + yhat.abs()) * error["norm_weight"]) / n
        error["y"] = scale.abs() * (8 * u * sizes + off)
        return exact, error

    def images(self, case: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        n, w = self.sides(case.size[0])
        shaped = {
            name: t.reshape(n, 1, w, t.shape[1]).permute(0, 3, 1, 2) if name in ("x", "y") else t
            for name, t in values.items()
        }
        return {name: shaped[name] for name in NAMES if case.bias or name != "b2"}

    def exact(self, case: Any, tensors: Any) -> Any:
        return self.images(case, self.solved(case, tensors, "")[0])

    def bounds(self, case: Any, tensors: Any, cotangents: Any, exact: Any, backend: str) -> Any:
        error = self.images(case, self.solved(case, tensors, backend)[1])
        return {name: error[name] + stored(t.abs() + error[name], case.dtype, backend) for name, t in exact.items()}


FEW: Any = {"p": (0.5,), "affine": (True,), "bias": (True,)}
LAST: Any = {"layout": ("channels_last",)}
test_contract = each.case(Normed())
test_empty_batch = each.empty_batch(Normed(size=((0, 160, 80, 66, 40),), **FEW, **LAST))
test_repeats = each.backend_repeats(Normed(size=SIZES[1:2], **FEW))
test_operators = each.operator(Normed({"triton": DTYPES}, size=((8, 3, 2, 5, 4),), **FEW, **LAST))


@on("triton")
@pytest.mark.parametrize("change", [{}, {"b1": None}, {"dtype": torch.float32}, {"w2": 4}])
def test_serves_where_the_hidden_layer_is_kept(backend: str, device: str, change: dict[str, Any]) -> None:
    """In half types, with a first bias, of enough channels."""
    dtype, outputs = change.get("dtype", torch.float16), change.get("w2", 40)
    x, w1, w2 = (torch.empty(shape, dtype=dtype, device=device) for shape in ((1, 160, 2, 2), (66, 240), (outputs, 66)))
    b1 = None if "b1" in change else x.new_empty(66)
    assert normed.serves(x, w1, b1, w2, backend) == (not change)
