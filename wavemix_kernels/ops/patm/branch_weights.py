"""The branch weights: a small MLP of the branches' mean over H and W, and a softmax over the three branches."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels.ops.patm.weights import Weights


class BranchWeights(NamedTuple):
    """The MLP on the way: mean (N, C) -> pre -> GELU -> hidden -> softmax over 3 -> a (N, C, 3)."""

    mean: Tensor
    pre: Tensor
    hidden: Tensor
    a: Tensor

    def by_branch(self) -> Tensor:
        """``a`` as (3, N, C)."""
        return self.a.permute(2, 0, 1).contiguous()


def branch_weights(mean: Tensor, fc1: Tensor, fc1_bias: Tensor, fc2: Tensor, fc2_bias: Tensor) -> BranchWeights:
    wide = mean.dtype
    pre = torch.addmm(fc1_bias.to(wide), mean, fc1.flatten(1).to(wide).t())
    hidden = F.gelu(pre)
    logits = torch.addmm(fc2_bias.to(wide), hidden, fc2.flatten(1).to(wide).t())
    return BranchWeights(mean, pre, hidden, logits.reshape(mean.shape[0], mean.shape[1], 3).softmax(2))


def backward(d_by_branch: Tensor, made: BranchWeights, w: Weights) -> tuple[Tensor, list[Tensor]]:
    """Gradients of mean, and of fc1, fc1_bias, fc2, fc2_bias, from that of :meth:`BranchWeights.by_branch`."""
    d_a = d_by_branch.permute(1, 2, 0)
    wide = d_a.dtype
    d_logits = torch.ops.aten._softmax_backward_data(d_a, made.a, 2, wide).flatten(1)
    d_pre = torch.ops.aten.gelu_backward(d_logits @ w.fc2.flatten(1).to(wide), made.pre)
    grads = [d_pre.t() @ made.mean, d_pre.sum(0), d_logits.t() @ made.hidden, d_logits.sum(0)]
    tensors = (w.fc1, w.fc1_bias, w.fc2, w.fc2_bias)
    return d_pre @ w.fc1.flatten(1).to(wide), [
        g.reshape(t.shape).to(t.dtype) for g, t in zip(grads, tensors, strict=True)
    ]
