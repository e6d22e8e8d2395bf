"""``branch_weights``: a small MLP of the branches' mean over H and W, and a softmax over the three branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels import backends
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import selftest
from wavemix_kernels.ops.common.dtypes import cast_together
from wavemix_kernels.ops.common.library import Library

_library = Library()
_WEIGHTS = "Tensor fc1, Tensor fc1_bias, Tensor fc2, Tensor fc2_bias"
_library.define(f"branch_weights(Tensor s, int count, {_WEIGHTS}, str backend) -> (Tensor, Tensor)")
_library.define(
    f"branch_weights_backward(Tensor d_a, Tensor a, Tensor mean, int count, {_WEIGHTS}, str backend) -> Tensor[]"
)


class Mlp(NamedTuple):
    """(K, C, 1, 1), (K), (3C, K, 1, 1) and (3C), of any dtypes; row 3c + i of fc2 is of channel c in branch i."""

    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor

    def matrices(self) -> tuple[Tensor, ...]:
        return tuple(t.flatten(1).contiguous() if t.dim() > 1 else t.contiguous() for t in self)


# --- Standard operators ----------------------------------------------------------------------------------


class _Made(NamedTuple):
    """The MLP on the way: mean (N, C) -> pre -> GELU -> hidden -> softmax over 3 -> a (N, C, 3)."""

    pre: Tensor
    hidden: Tensor
    a: Tensor


def _made(mean: Tensor, mlp: Mlp) -> _Made:
    fc1, fc1_bias, fc2, fc2_bias = (t.to(mean.dtype) for t in mlp)
    pre = torch.addmm(fc1_bias, mean, fc1.flatten(1).t())
    hidden = F.gelu(pre)
    logits = torch.addmm(fc2_bias, hidden, fc2.flatten(1).t())
    return _Made(pre, hidden, logits.reshape(mean.shape[0], mean.shape[1], 3).softmax(2))


def standard(mean: Tensor, mlp: Mlp) -> Tensor:
    """``a`` (N, C, 3) by differentiable operators."""
    return _made(mean, mlp).a


def _reference_forward(s: Tensor, count: int, mlp: Mlp) -> tuple[Tensor, Tensor]:
    mean = s / count
    return _made(mean, mlp).a.permute(2, 0, 1).contiguous(), mean


def _reference_backward(
    d_by_branch: Tensor, by_branch: Tensor, mean: Tensor, count: int, mlp: Mlp
) -> tuple[Tensor, Sequence[Tensor]]:
    d_a, made = d_by_branch.permute(1, 2, 0), _made(mean, mlp)
    wide = d_a.dtype
    d_logits = torch.ops.aten._softmax_backward_data(d_a, made.a, 2, wide).flatten(1)
    d_pre = torch.ops.aten.gelu_backward(d_logits @ mlp.fc2.flatten(1).to(wide), made.pre)
    grads = [d_pre.t() @ mean, d_pre.sum(0), d_logits.t() @ made.hidden, d_logits.sum(0)]
    shaped = [g.reshape(t.shape) for g, t in zip(grads, mlp, strict=True)]
    return d_pre @ mlp.fc1.flatten(1).to(wide) / count, cast_together(shaped, [t.dtype for t in mlp])


# --- Triton ----------------------------------------------------------------------------------------------


def _triton_why_not(*tensors: Tensor) -> str | None:
    """Tensors are s, or what has its dtype, and fc1."""
    if (reason := backends.triton_why_not(*tensors)) is not None or not tensors:
        return reason
    if tensors[0].dtype == torch.float64:
        return "its GELU is float32, got float64"
    from wavemix_kernels.ops.patm.triton_branch_weights import MOST_HIDDEN

    hidden = tensors[-1].shape[0]
    return None if hidden <= MOST_HIDDEN else f"it takes up to {MOST_HIDDEN} hidden units, got {hidden}"


def _triton_forward(s: Tensor, count: int, mlp: Mlp) -> tuple[Tensor, Tensor]:
    from wavemix_kernels.ops.patm import triton_branch_weights as kernels

    return kernels.forward(s.contiguous(), 1 / count, mlp.matrices())


def _triton_backward(d_a: Tensor, a: Tensor, mean: Tensor, count: int, mlp: Mlp) -> tuple[Tensor, Sequence[Tensor]]:
    from wavemix_kernels.ops.patm import triton_branch_weights as kernels

    d_s, grads = kernels.backward(d_a.contiguous(), a.contiguous(), mean.contiguous(), 1 / count, mlp.matrices())
    return d_s, [g.view(t.shape) for g, t in zip(grads, mlp, strict=True)]


BACKENDS: dict[str, backends.Backend] = {
    "triton": backends.Backend(_triton_why_not, {"forward": _triton_forward, "backward": _triton_backward}),
    "reference": backends.Backend(
        backends.reference_why_not, {"forward": _reference_forward, "backward": _reference_backward}
    ),
}


# --- The operators ---------------------------------------------------------------------------------------


def _forward(
    s: Tensor, count: int, fc1: Tensor, fc1_bias: Tensor, fc2: Tensor, fc2_bias: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    chosen = choose.select("branch_weights", BACKENDS, backend, s, fc1)
    made: tuple[Tensor, Tensor] = chosen.functions["forward"](s, count, Mlp(fc1, fc1_bias, fc2, fc2_bias))
    return made


def _backward(
    d_a: Tensor, a: Tensor, mean: Tensor, count: int, fc1: Tensor, fc1_bias: Tensor, fc2: Tensor, fc2_bias: Tensor,
    backend: str,
) -> list[Tensor]:  # fmt: skip
    chosen = choose.select("branch_weights_backward", BACKENDS, backend, mean, fc1)
    d_s, grads = chosen.functions["backward"](d_a, a, mean, count, Mlp(fc1, fc1_bias, fc2, fc2_bias))
    return [d_s, *grads]


def _backward_fake(d_a: Tensor, a: Tensor, mean: Tensor, count: int, *rest: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (mean, *rest[:-1])]


_library.impl("branch_weights", _forward, "CompositeExplicitAutograd")
_library.impl("branch_weights_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake(
    "wavemix_kernels::branch_weights",
    lambda s, *rest: (s.new_empty((3, *s.shape)), s.new_empty(s.shape)),
    lib=_library,
)
torch.library.register_fake("wavemix_kernels::branch_weights_backward", _backward_fake, lib=_library)


def _part(backend: str, like: Tensor, mlp: Mlp) -> str:
    """The backend of a PATM that was asked to run on ``backend``: it serves more than these kernels do."""
    part = choose.for_part(backend, BACKENDS)
    return "auto" if part in BACKENDS and BACKENDS[part].why_not(like, mlp.fc1) is not None else part


def branch_weights(s: Tensor, count: int, mlp: Mlp, backend: str) -> tuple[Tensor, Tensor]:
    """The weights of PATM's branches.

    Args:
        s: (N, C) fp32 or fp64, sums over ``count`` pixels.
        mlp: see :class:`Mlp`.

    Returns:
        ``a`` (3, N, C) and the mean (N, C), in the dtype of s. No gradient is registered: it is a step of
        :mod:`wavemix_kernels.ops.patm.op`.
    """
    return torch.ops.wavemix_kernels.branch_weights(s, count, *mlp, _part(backend, s, mlp))


def backward(d_a: Tensor, a: Tensor, mean: Tensor, count: int, mlp: Mlp, backend: str) -> tuple[Tensor, list[Tensor]]:
    """Gradients of s, and of ``mlp`` in its dtypes, from that of ``a``."""
    part = _part(backend, mean, mlp)
    d_s, *grads = torch.ops.wavemix_kernels.branch_weights_backward(d_a, a, mean, count, *mlp, part)
    return d_s, grads


def self_test(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Branch weights of a few sums, with all gradients: (error, bound)."""
    p, results = selftest.pattern, []
    s, d_a = 9 * p(2, 24), p(3, 2, 24, phase=1)
    weights = p(6, 24, 1, 1), p(6, phase=1), p(72, 6, 1, 1, phase=2), p(72, phase=2)
    for name, wide, where in ((backend, dtype, device), ("reference", torch.float64, torch.device("cpu"))):
        arithmetic = torch.float64 if wide == torch.float64 else torch.float32
        mlp = Mlp(*(t.to(dtype).to(where, wide) for t in weights))
        ops = torch.ops.wavemix_kernels
        a, mean = ops.branch_weights(s.to(where, arithmetic), 9, *mlp, name)
        grads = ops.branch_weights_backward(d_a.to(where, arithmetic), a, mean, 9, *mlp, name)
        results.append([a, mean, *grads])
    # A sum of fc1's and one of fc2's products, each of values up to 1, and a GELU and a softmax between them.
    return selftest.largest_error(*results), selftest.rounding_bound(24 + 6 + 72 + 16, dtype)
