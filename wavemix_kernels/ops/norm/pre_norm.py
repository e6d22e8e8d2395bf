"""``pre_norm``: the normalisation in front of a residual branch, by channel (BatchNorm) or by image (GroupNorm(1)), and
the sum behind it.

Each of its parts is one pass over memory: normalise; ``x + path branch``; and the norm's gradient, to which that around
the branch is added. What is normalised is never kept, being an affine map of x, but made again for backward.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wavemix_kernels import _native, backends
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import layout, plan, selftest
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.common.library import Library
from wavemix_kernels.ops.norm import batch_norm

_library = Library()
_library.define("pre_norm_stats(Tensor x, float eps, bool by_image, str backend) -> Tensor")
_library.define(
    "pre_norm_apply(Tensor x, Tensor? mean, Tensor invstd, Tensor? weight, Tensor? bias, bool by_image, "
    "ScalarType dtype, str backend) -> Tensor"
)
_library.define(
    "pre_norm_backward(Tensor grad, Tensor x, Tensor around, Tensor mean, Tensor invstd, Tensor? weight, "
    "bool by_image, bool own, str backend) -> (Tensor, Tensor)"
)
_library.define("pre_norm_join(Tensor x, Tensor branch, Tensor? path, str backend) -> Tensor")


class Norm(NamedTuple):
    """Tensors of the norm, (C) each; ``mean`` and ``var`` None: x's own statistics, by channel or by image."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None


@plan.words
class Kind(NamedTuple):
    """Its constants: eps of the variance, and whether each image is normalised by itself."""

    eps: float
    by_image: bool


class Statistics(NamedTuple):
    """Mean, biased variance and inverse deviation that x was normalised by, fp32 (fp64 for fp64); (C), by image (N)."""

    mean: Tensor
    var: Tensor
    invstd: Tensor


# --- Backends: stats(x, by_image, eps) -> the rows of Statistics; apply(x, mean, invstd, weight, bias, by_image, out);
#     backward(grad, x, around, mean, invstd, weight, by_image, own, out) -> gradients of weight and bias (2, C);
#     join(x, branch, path, out). No mean is 0. Small tensors are contiguous; Triton takes weight, bias and path in any
#     dtype, the others in the statistics'. ----------------------------------------------------------------------


def _small(t: Tensor | None, like: Tensor) -> Any:
    return None if t is None else t.to(accumulate_dtype(like.dtype)).contiguous()


def _images_as_channels(x: Tensor) -> Tensor:
    """(1, N, 1, C H W): what BatchNorm's statistics by channel are then is by image."""
    order = (0, 2, 3, 1) if layout.is_channels_last(x) else (0, 1, 2, 3)
    return x.permute(order).reshape(1, x.shape[0], 1, -1) if x.numel() else x.new_empty((1, x.shape[0], 1, 0))


def _kernel_stats(name: str, x: Tensor, by_image: bool, eps: float) -> Tensor:
    run = batch_norm.BACKENDS[name].functions["stats"]
    made: Tensor = run(_images_as_channels(x) if by_image else x, None, None, eps)
    return made[: len(Statistics._fields)]


def _cpu_why_not(*tensors: Tensor) -> str | None:
    """Tensors are x and an image of the branch."""
    if (reason := backends.cpu_why_not(*tensors)) is not None or not tensors:
        return reason
    x, *branch = tensors
    for t in branch:
        if t.dtype != x.dtype and not (x.dtype == torch.float32 and t.dtype in (torch.float16, torch.bfloat16)):
            return f"it takes a branch of x's dtype, or a half type in float32, got {t.dtype} in {x.dtype}"
    return None


def _cpu_types(x: Tensor, branch: Tensor) -> tuple[int, int]:
    return _native.DTYPES[x.dtype], _native.DTYPES[branch.dtype]


def _cpu_norm(mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if t is None else t.data_ptr() for t in (mean, invstd, weight, bias))


def _cpu_apply(
    x: Tensor, mean: Tensor | None, invstd: Tensor, weight: Tensor | None, bias: Tensor | None, by_image: bool,
    out: Tensor,
) -> None:  # fmt: skip
    core: Any = _native.core
    weight, bias, mean = _small(weight, x), _small(bias, x), torch.zeros_like(invstd) if mean is None else mean
    core.pre_norm_apply_cpu(
        _cpu_types(x, out), x.shape, by_image, _cpu_norm(mean, invstd, weight, bias), _native.address(x),
        _native.address(out), torch.get_num_threads(),
    )  # fmt: skip


def _cpu_backward(
    grad: Tensor, x: Tensor, around: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, by_image: bool,
    own: bool, out: Tensor,
) -> Tensor:  # fmt: skip
    core: Any = _native.core
    of_parameters = mean.new_empty(2, x.shape[1])
    d_weight, d_bias = of_parameters.unbind(0)
    a, dtype, weight = _native.address, mean.dtype if weight is None else weight.dtype, _small(weight, x)
    core.pre_norm_backward_cpu(
        _cpu_types(x, grad), x.shape, by_image, _cpu_norm(mean, invstd, weight, None), own, a(grad), a(x), a(around),
        a(out), d_weight.data_ptr(), d_bias.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return of_parameters.to(dtype)


def _cpu_join(x: Tensor, branch: Tensor, path: Tensor | None, out: Tensor) -> None:
    core: Any = _native.core
    a, path = _native.address, _small(path, x)
    core.pre_norm_join_cpu(
        _cpu_types(x, branch), x.shape, a(x), a(branch), 0 if path is None else path.data_ptr(), a(out),
        torch.get_num_threads(),
    )  # fmt: skip


def _triton_apply(
    x: Tensor, mean: Tensor | None, invstd: Tensor, weight: Tensor | None, bias: Tensor | None, by_image: bool,
    out: Tensor,
) -> None:  # fmt: skip
    from wavemix_kernels.ops.norm import triton_pre_norm as kernels

    kernels.apply(out, x, mean, invstd, weight, bias, by_image)


def _triton_backward(
    grad: Tensor, x: Tensor, around: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, by_image: bool,
    own: bool, out: Tensor,
) -> Tensor:  # fmt: skip
    from wavemix_kernels.ops.norm import triton_pre_norm as kernels

    return kernels.backward(out, grad, x, around, mean, invstd, weight, by_image, own)


def _triton_join(x: Tensor, branch: Tensor, path: Tensor | None, out: Tensor) -> None:
    from wavemix_kernels.ops.norm import triton_pre_norm as kernels

    kernels.join(out, x, branch, path)


def _reference_stats(x: Tensor, by_image: bool, eps: float) -> Tensor:
    axes = (1, 2, 3) if by_image else (0, 2, 3)
    var, mean = torch.var_mean(x.to(accumulate_dtype(x.dtype)), axes, correction=0)
    return torch.stack((mean, var, torch.rsqrt(var + eps)))


def _standardised(x: Tensor, mean: Tensor | None, invstd: Tensor, by_image: bool) -> tuple[Tensor, Tensor]:
    """(x - mean) * invstd, and invstd as it goes with an image."""
    axes = (slice(None), *[None] * (3 if by_image else 2))
    value, invstd = x.to(invstd.dtype), invstd[axes]
    return (value if mean is None else value - mean[axes]) * invstd, invstd


def _reference_apply(
    x: Tensor, mean: Tensor | None, invstd: Tensor, weight: Tensor | None, bias: Tensor | None, by_image: bool,
    out: Tensor,
) -> None:  # fmt: skip
    value, _ = _standardised(x, mean, invstd, by_image)
    value = value if weight is None else value * weight[:, None, None]
    out.copy_(value if bias is None else value + bias[:, None, None])


def _reference_backward(
    grad: Tensor, x: Tensor, around: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, by_image: bool,
    own: bool, out: Tensor,
) -> Tensor:  # fmt: skip
    value, invstd = _standardised(x, mean, invstd, by_image)
    g = grad.to(value.dtype)
    of_parameters = torch.stack(((g * value).sum((0, 2, 3)), g.sum((0, 2, 3))))
    g = g if weight is None else g * weight[:, None, None]
    if own:
        axes = (1, 2, 3) if by_image else (0, 2, 3)
        g = g - g.mean(axes, keepdim=True) - value * (g * value).mean(axes, keepdim=True)
    out.copy_(g * invstd + around)
    return of_parameters if weight is None else of_parameters.to(weight.dtype)


def _reference_join(x: Tensor, branch: Tensor, path: Tensor | None, out: Tensor) -> None:
    wide = accumulate_dtype(x.dtype)
    value = branch.to(wide)
    out.copy_(x + (value if path is None else value * path[:, None, None, None]))


BACKENDS: dict[str, backends.Backend] = {
    "triton": backends.Backend(
        backends.triton_why_not,
        {
            "stats": functools.partial(_kernel_stats, "triton"),
            "apply": _triton_apply,
            "backward": _triton_backward,
            "join": _triton_join,
        },
    ),
    "cpu": backends.Backend(
        _cpu_why_not,
        {
            "stats": functools.partial(_kernel_stats, "cpu"),
            "apply": _cpu_apply,
            "backward": _cpu_backward,
            "join": _cpu_join,
        },
    ),
    "reference": backends.Backend(
        backends.reference_why_not,
        {
            "stats": _reference_stats,
            "apply": _reference_apply,
            "backward": _reference_backward,
            "join": _reference_join,
        },
    ),
}


# --- The operators ---------------------------------------------------------------------------------------


def _like_x(x: Tensor) -> Tensor:
    return layout.empty(x, x.shape, layout.is_channels_last(x))


def _branch_image(x: Tensor, dtype: torch.dtype) -> Tensor:
    return layout.empty(x if x.dtype == dtype else x.new_empty(0, dtype=dtype), x.shape, True)


def _stats(x: Tensor, eps: float, by_image: bool, backend: str) -> Tensor:
    made: Tensor = choose.select("pre_norm_stats", BACKENDS, backend, x).functions["stats"](x, by_image, eps)
    return made


def _apply(
    x: Tensor, mean: Tensor | None, invstd: Tensor, weight: Tensor | None, bias: Tensor | None, by_image: bool,
    dtype: torch.dtype, backend: str,
) -> Tensor:  # fmt: skip
    out = _branch_image(x, dtype)
    run = choose.select("pre_norm_apply", BACKENDS, backend, x, out).functions["apply"]
    run(x, _small(mean, x), _small(invstd, x), *batch_norm.contiguous(weight, bias), by_image, out)
    return out


def _backward(
    grad: Tensor, x: Tensor, around: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, by_image: bool,
    own: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = _like_x(x)
    run = choose.select("pre_norm_backward", BACKENDS, backend, x, grad).functions["backward"]
    small = _small(mean, x), _small(invstd, x), *batch_norm.contiguous(weight)
    return out, run(grad, x, around, *small, by_image, own, out)


def _join(x: Tensor, branch: Tensor, path: Tensor | None, backend: str) -> Tensor:
    out = _like_x(x)
    run = choose.select("pre_norm_join", BACKENDS, backend, x, branch).functions["join"]
    run(x, branch, None if path is None else path.flatten(), out)
    return out


def _stats_fake(x: Tensor, eps: float, by_image: bool, backend: str) -> Tensor:
    shape = len(Statistics._fields), x.shape[0 if by_image else 1]
    return x.new_empty(shape, dtype=accumulate_dtype(x.dtype))


for _name, _implementation, _fake in (
    ("pre_norm_stats", _stats, _stats_fake),
    (
        "pre_norm_apply",
        _apply,
        lambda x, m, i, w, b, by_image, dtype, k: _branch_image(x, dtype),
    ),
    (
        "pre_norm_backward",
        _backward,
        lambda g, x, a, m, i, w, by_image, own, k: (_like_x(x), batch_norm.empty_gradients(x, w)),
    ),
    ("pre_norm_join", _join, lambda x, b, p, k: _like_x(x)),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"wavemix_kernels::{_name}", _fake, lib=_library)


# --- What a residual branch calls, below autograd -----------------------------------------------------------


def statistics(x: Tensor, norm: Norm, kind: Kind, backend: str) -> Statistics:
    if norm.mean is not None and norm.var is not None:
        wide = accumulate_dtype(x.dtype)
        mean, var = norm.mean.to(wide, copy=True), norm.var.to(wide, copy=True)
        return Statistics(mean, var, torch.rsqrt(var + kind.eps))
    part = choose.for_part(backend, BACKENDS)
    return Statistics(*torch.ops.wavemix_kernels.pre_norm_stats(x, kind.eps, kind.by_image, part).unbind(0))


def normalise(
    x: Tensor, norm: Norm, kind: Kind, stats: Statistics, backend: str = "auto", dtype: torch.dtype | None = None
) -> Tensor:
    """``(x - mean) * invstd * weight + bias`` of an image of any strides: channels_last, rounded once, to ``dtype`` if
    given."""
    return torch.ops.wavemix_kernels.pre_norm_apply(
        x, stats.mean, stats.invstd, norm.weight, norm.bias, kind.by_image, dtype or x.dtype,
        choose.for_part(backend, BACKENDS),
    )  # fmt: skip


def affine(norm: Norm, kind: Kind, stats: Statistics, channels: int) -> tuple[Tensor, Tensor]:
    """:func:`normalise` as ``x * scale + shift``: (C), by image (N, C)."""
    mean, invstd = stats.mean, stats.invstd
    if kind.by_image:
        mean, invstd = (t[:, None].expand(-1, channels) for t in (mean, invstd))
    scale = invstd if norm.weight is None else invstd * norm.weight
    shift = -mean * scale if norm.bias is None else norm.bias - mean * scale
    return scale.to(mean.dtype), shift.to(mean.dtype)


def backward(
    grad: Tensor, x: Tensor, around: Tensor, norm: Norm, kind: Kind, stats: Statistics, backend: str = "auto"
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias from that of :func:`normalise`'s output; ``around``, the gradient that goes
    around the branch, is added to x's."""
    dx, of_parameters = torch.ops.wavemix_kernels.pre_norm_backward(
        grad, x, around, stats.mean, stats.invstd, norm.weight, kind.by_image, norm.mean is None,
        choose.for_part(backend, BACKENDS),
    )  # fmt: skip
    d_weight, d_bias = (
        None if t is None else d.to(t.dtype)
        for t, d in zip((norm.weight, norm.bias), of_parameters.unbind(0), strict=True)
    )
    return dx, d_weight, d_bias


def join(x: Tensor, branch: Tensor, path: Tensor | None, backend: str = "auto") -> Tensor:
    """``x + path branch`` in x's dtype and memory format."""
    return torch.ops.wavemix_kernels.pre_norm_join(x, branch, path, choose.for_part(backend, BACKENDS))


def join_backward(grad: Tensor, path: Tensor | None, image: Tensor, backend: str = "auto") -> Tensor:
    """Gradient of the branch in :func:`join`: channels_last, in the dtype of the branch's ``image``."""
    if path is None:
        return grad.to(image.dtype).contiguous(memory_format=torch.channels_last)
    # Images of inverse deviation `path`.
    return torch.ops.wavemix_kernels.pre_norm_apply(
        grad, None, path.flatten(), None, None, True, image.dtype, choose.for_part(backend, BACKENDS)
    )


def self_test(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Statistics, norm, gradient and sum, by channel and by image: (error, bound)."""
    p, errors = selftest.pattern, []
    path = torch.tensor([0.0, 1.25], dtype=torch.float64)[:, None, None, None]
    images = [p(2, 6, 5, 7, phase=i) + 2 for i in range(3)]  # no mean is near 0
    for by_image in (False, True):
        results = []
        for name, wide, where in ((backend, dtype, device), ("reference", torch.float64, torch.device("cpu"))):
            x, grad, around = (t.to(dtype).to(where, wide) for t in images)
            norm = Norm(p(6).to(dtype).to(where, wide), p(6, phase=2).to(dtype).to(where, wide), None, None)
            kind = Kind(1e-5, by_image)
            stats = statistics(x, norm, kind, name)
            image = normalise(x, norm, kind, stats, name)
            gradients = backward(grad, x, around, norm, kind, stats, name)
            results.append([*stats, image, *gradients, join(x, image, path.to(where, wide), name)])
        errors.append(selftest.largest_error(*results))
    return selftest.largest(*errors), selftest.rounding_bound(6 * 5 * 7, dtype)
