"""The weights of PATM's branches, and their gradients, on every backend."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.ops import each
from tests.ops.contract import Case, Contract, randn
from tests.tolerances import DTYPES, UNIT_ROUNDOFF, accumulation, stored
from wavemix_kernels import backends
from wavemix_kernels.ops.patm import branch_weights

COUNT = 9  # pixels


class BranchWeights(Contract):
    """Two products, a GELU and a softmax. Weights are in the case's dtype, sums in that of their arithmetic."""

    name = "branch_weights"
    dtypes: ClassVar[Any] = {"reference": (torch.float64, torch.float32), "triton": DTYPES[1:]}
    axes: ClassVar[Any] = {"shape": ((3, 4), (17, 24), (1, 70), (2, 300), (44, 300))}

    def inputs(self, case: Case, device: str) -> Any:
        n, c = case.shape
        hidden, wide = c // 4, accumulation(case.dtype)
        made = {"s": COUNT * randn(n, c).to(device, wide), "d_a": randn(3, n, c, seed=1).to(device, wide)}
        shapes = {"fc1": (hidden, c, 1, 1), "fc1_bias": (hidden,), "fc2": (3 * c, hidden, 1, 1), "fc2_bias": (3 * c,)}
        for i, (name, shape) in enumerate(shapes.items()):
            made[name] = (randn(*shape, seed=2 + i) / (shape[1] ** 0.5 if len(shape) > 1 else 1)).to(device, case.dtype)
        return made

    def run(self, case: Case, tensors: Any, backend: str) -> Any:
        s, d_a, *weights = tensors.values()
        ops: Any = torch.ops.wavemix_kernels
        a, mean = ops.branch_weights(s, COUNT, *weights, backend)
        d_s, *grads = ops.branch_weights_backward(d_a, a, mean, COUNT, *weights, backend)
        return {"a": a, "mean": mean, "d_s": d_s, **dict(zip(branch_weights.Mlp._fields, grads, strict=True))}

    def exact(self, case: Case, tensors: Any) -> Any:
        s, d_a, *weights = (t.detach().requires_grad_() for t in tensors.values())
        a = branch_weights.standard(s / COUNT, branch_weights.Mlp(*weights)).permute(2, 0, 1)
        grads = torch.autograd.grad(a, [s, *weights], d_a)
        return {"a": a, "mean": s / COUNT, **dict(zip(("d_s", *branch_weights.Mlp._fields), grads, strict=True))}

    def bounds(self, case: Case, tensors: Any, cotangents: Any, exact: Any, backend: str) -> Any:
        """Errors by the chain: each product errs by its number of terms, times sums of absolute values; what follows
        multiplies the errors so far by absolute values of its own. GELU's slope is at most 1.13, its second derivative
        0.8; a softmax's is below 1/2 of the logits' largest error; it ends with an exponential and a division."""
        n, c = case.shape
        u = UNIT_ROUNDOFF[accumulation(case.dtype)] * (2 if case.dtype == torch.float64 else 1)
        mlp = branch_weights.Mlp(*(tensors[name].flatten(1) if "bias" not in name else tensors[name]
                                   for name in branch_weights.Mlp._fields))  # fmt: skip
        mean, k = exact["mean"].detach(), mlp.fc1.shape[0]
        size1 = mean.abs() @ mlp.fc1.abs().t() + mlp.fc1_bias.abs()
        pre = mean @ mlp.fc1.t() + mlp.fc1_bias
        off_pre = (c + 4) * u * size1
        hidden = torch.nn.functional.gelu(pre)
        off_hidden = 1.13 * off_pre + 8 * u * pre.abs()
        size2 = hidden.abs() @ mlp.fc2.abs().t() + mlp.fc2_bias.abs()
        off_logits = (k + 4) * u * size2 + off_hidden @ mlp.fc2.abs().t()
        by_image = off_logits.reshape(n, c, 3)
        a = exact["a"].detach()
        off_a = a * (2 * by_image.amax(2) + (16 + 2 * size2.reshape(n, c, 3).amax(2)) * u)
        d_a = tensors["d_a"]
        most = d_a.abs().amax(0)
        d_logits = a * (d_a - (a * d_a).sum(0))
        off_d_logits = 2 * most * off_a + a * (2 * (off_a.sum(0) + 8 * u) * most)
        rows, off_rows = (t.permute(1, 2, 0).flatten(1) for t in (d_logits, off_d_logits))
        d_hidden = rows @ mlp.fc2
        size3 = rows.abs() @ mlp.fc2.abs()
        off_d_hidden = (3 * c + 4) * u * size3 + off_rows @ mlp.fc2.abs()
        d_pre = 1.13 * d_hidden.abs()
        off_d_pre = 1.13 * off_d_hidden + d_hidden.abs() * (0.8 * off_pre + 8 * u * (1 + pre.abs()))
        size4 = d_pre @ mlp.fc1.abs()
        terms = (n + 4) * u
        off: Any = {
            "a": off_a, "mean": 2 * u * mean.abs(),
            "d_s": ((k + 4) * u * size4 + off_d_pre @ mlp.fc1.abs()) / COUNT,
            "fc1": terms * d_pre.t() @ mean.abs() + off_d_pre.t() @ mean.abs() + 2 * u * d_pre.t() @ mean.abs(),
            "fc1_bias": terms * d_pre.sum(0) + off_d_pre.sum(0),
            "fc2": terms * rows.abs().t() @ hidden.abs() + off_rows.t() @ hidden.abs() + rows.abs().t() @ off_hidden,
            "fc2_bias": terms * rows.abs().sum(0) + off_rows.sum(0),
        }  # fmt: skip
        bounds = {}
        for name, want in exact.items():
            bounds[name] = off[name].reshape(want.shape) * 1.01  # products of two errors
            if name in branch_weights.Mlp._fields:
                bounds[name] = bounds[name] + stored(want.detach().abs() + bounds[name], case.dtype, backend)
        return bounds


FEW: Any = {"shape": ((2, 8),)}
test_contract = each.case(BranchWeights())
test_repeats = each.backend_repeats(BranchWeights())
test_empty_batch = each.empty_batch(BranchWeights(shape=((0, 8),)))
test_operators = each.operator(BranchWeights(**FEW))
test_operators_of_gpus = each.operator(BranchWeights(**FEW), backends=("triton",))


def test_what_the_kernels_do_not_take() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    why_not = branch_weights.BACKENDS["triton"].why_not
    wide: Tensor = torch.empty(1, 4, dtype=torch.float64)
    if backends.triton_interpreted():
        assert "float64" in str(why_not(wide, torch.empty(1, 4, 1, 1)))
        assert "up to 256 hidden units, got 300" in str(why_not(wide.float(), torch.empty(300, 1200, 1, 1)))
        assert why_not(wide.float(), torch.empty(256, 1024, 1, 1)) is None
