"""``branch_sum``: PATM's three branches, weighted per image and channel, as its output projection reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wavemix_kernels import _native, backends
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import layout, selftest
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.common.library import Library
from wavemix_kernels.ops.patm import reference

_library = Library()
_library.define("branch_sum(Tensor h, Tensor w, Tensor c, Tensor a, str backend) -> Tensor")
_library.define(
    "branch_sum_backward(Tensor grad, Tensor h, Tensor w, Tensor c, Tensor a, str backend) -> (Tensor, Tensor)"
)


def _cpu_arguments(h: Tensor, w: Tensor, c: Tensor, a: Tensor) -> tuple[list[Any], list[Tensor]]:
    kept = [*map(layout.channels_inner, (h, w, c)), a.to(accumulate_dtype(h.dtype)).contiguous()]
    return [_native.DTYPES[h.dtype], h.shape, [_native.address(t) for t in kept[:3]], kept[3].data_ptr()], kept


def _cpu_forward(h: Tensor, w: Tensor, c: Tensor, a: Tensor) -> Tensor:
    core: Any = _native.core
    out = layout.empty(h, h.shape, True)
    arguments, _kept = _cpu_arguments(h, w, c, a)
    core.branch_sum_cpu(*arguments, _native.address(out), torch.get_num_threads())
    return out


def _cpu_backward(grad: Tensor, h: Tensor, w: Tensor, c: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    core: Any = _native.core
    out = layout.empty(h, h.shape, True)
    arguments, kept = _cpu_arguments(h, w, c, a)
    grad, d_a = layout.channels_inner(grad), torch.empty_like(kept[3])
    core.branch_sum_backward_cpu(
        *arguments, _native.address(grad), _native.address(out), d_a.data_ptr(), torch.get_num_threads()
    )
    return out, d_a


# --- Triton ----------------------------------------------------------------------------------------------


def _triton_forward(h: Tensor, w: Tensor, c: Tensor, a: Tensor) -> Tensor:
    from wavemix_kernels.ops.patm import triton_branches as kernels

    out = layout.empty(h, h.shape, True)
    branches = [layout.channels_inner(t) for t in (h, w, c)]
    kernels.forward(out, branches, a.to(accumulate_dtype(h.dtype)).contiguous())
    return out


def _triton_backward(grad: Tensor, h: Tensor, w: Tensor, c: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    from wavemix_kernels.ops.patm import triton_branches as kernels

    out = layout.empty(h, h.shape, True)
    grad, *branches = (layout.channels_inner(t) for t in (grad, h, w, c))
    return out, kernels.backward(out, branches, a.to(accumulate_dtype(h.dtype)).contiguous(), grad)


# --- Reference -------------------------------------------------------------------------------------------


def _reference_forward(h: Tensor, w: Tensor, c: Tensor, a: Tensor) -> Tensor:
    return layout.laid_out(reference.branch_sum(h, w, c, a.permute(1, 2, 0)), True)


def _reference_backward(grad: Tensor, h: Tensor, w: Tensor, c: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    wide = grad.to(accumulate_dtype(h.dtype))
    return _reference_forward(h, w, c, a), torch.stack([(wide * branch).sum((2, 3)) for branch in (h, w, c)])


BACKENDS: dict[str, backends.Backend] = {
    "triton": backends.Backend(backends.triton_why_not, {"forward": _triton_forward, "backward": _triton_backward}),
    "cpu": backends.Backend(backends.cpu_why_not, {"forward": _cpu_forward, "backward": _cpu_backward}),
    "reference": backends.Backend(
        backends.reference_why_not, {"forward": _reference_forward, "backward": _reference_backward}
    ),
}


def _forward(h: Tensor, w: Tensor, c: Tensor, a: Tensor, backend: str) -> Tensor:
    return choose.select("branch_sum", BACKENDS, backend, h, w, c).functions["forward"](h, w, c, a)


def _backward(grad: Tensor, h: Tensor, w: Tensor, c: Tensor, a: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    chosen = choose.select("branch_sum_backward", BACKENDS, backend, h, w, c, grad)
    return chosen.functions["backward"](grad, h, w, c, a)


_library.impl("branch_sum", _forward, "CompositeExplicitAutograd")
_library.impl("branch_sum_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake(
    "wavemix_kernels::branch_sum", lambda h, w, c, a, backend: layout.empty(h, h.shape, True), lib=_library
)
torch.library.register_fake(
    "wavemix_kernels::branch_sum_backward",
    lambda grad, h, w, c, a, backend: (
        layout.empty(h, h.shape, True),
        a.new_empty(a.shape, dtype=accumulate_dtype(h.dtype)),
    ),
    lib=_library,
)


def branch_sum(h: Tensor, w: Tensor, c: Tensor, a: Tensor, backend: str) -> Tensor:
    """``h a[0] + w a[1] + c a[2]``.

    Args:
        h, w, c: (N, C, H, W), one dtype. Contiguous channels are read in place.
        a: (3, N, C).

    Returns:
        (N, C, H, W), channels_last, computed in fp32 (fp64 for fp64) and rounded once. No gradient is registered: it is
        a step of :mod:`wavemix_kernels.ops.patm.op`, which chooses what to save.
    """
    return torch.ops.wavemix_kernels.branch_sum(h, w, c, a, backend)


def backward(grad: Tensor, h: Tensor, w: Tensor, c: Tensor, a: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The sum again, and the gradient of ``a`` from that of the sum. Gradients of h, w and c are ``grad a``."""
    return torch.ops.wavemix_kernels.branch_sum_backward(grad, h, w, c, a, backend)


def self_test(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """The sum, again with the gradient of its weights: (error, bound)."""
    p, results = selftest.pattern, []
    tensors = (*(p(2, 6, 5, 9, phase=i) for i in range(4)), p(3, 2, 6))
    for name, wide, where in ((backend, dtype, device), ("reference", torch.float64, torch.device("cpu"))):
        grad, h, w, c, a = (t.to(dtype).to(where, wide) for t in tensors)
        results.append([branch_sum(h, w, c, a, name), *backward(grad, h, w, c, a, name)])
    return selftest.largest_error(*results), selftest.rounding_bound(5 * 9, dtype)
