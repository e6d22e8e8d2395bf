"""``patm``: phase-aware token mixing of an image as one differentiable function, alone or as the residual branch of a
block with the norm in front and the sum behind.

The plan, and the memory that each step moves in sizes of x (mode "fc"; benchmarks/harness/traffic.py counts it):

=================================================  ==========================================  =======  ========
step                                               runs on                                     forward  backward
=================================================  ==========================================  =======  ========
by parts (:class:`_ByParts`; wide images, fp32 GPU)                                            22       50
- z_h, z_w, z_c (made again in backward)           ``common.products``: the library            4        4
- theta_h, theta_w (kept; "all" makes them again)  ``common.products``: the library            3
- batch statistics of both                         ``norm.batch_norm``                         2
- waves, 7 taps, sums: h, w (made again)           ``phases``: CUDA, Triton, CPU               7        7
- branch weights a                                 ``branch_weights``: Triton, the library     0        0
- h a0 + w a1 + z_c a2                             ``branches``: Triton, CPU                   4        5
- proj: its input's and weight's gradient          ``common.products``: the library            2        5
- gradients of waves, taps and batch statistics    ``phases``: CUDA, Triton, CPU                        17
- gradients of all projections                     ``common.products``: the library                     12
whole (:class:`_Whole`; a CPU, narrow images)                                                  4        7
- the image's moments give the batch statistics    ``whole``: CPU                              1
- everything else, one image after the other       ``whole``: CPU                              3        3
- what comes through batch statistics              ``whole``: CPU                                       4
whole (:class:`_Whole`; a GPU, half types, 64, 96, 128 channels)                               4        16
- moments; branch weights; mix                     ``whole``: CUDA                             4
- gradients of branch weights and proj             ``whole``: CUDA                                      2
- gradients of all projections at every pixel      ``whole``: CUDA                                      7
- of x (with batch statistics) and of weights      ``whole``: CUDA                                      7
=================================================  ==========================================  =======  ========

Kept for backward: x and the thetas (``recompute="amplitudes"``), or x alone (``recompute="all"``, and always where the
whole is one kernel), with statistics and what hangs on single images. The normalised image is an affine map of x, so
backward makes it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wavemix_kernels import log
from wavemix_kernels.ops import choose, tuned, verify
from wavemix_kernels.ops.common import convolutions, flops, layout, plan, products
from wavemix_kernels.ops.common.autograd import again
from wavemix_kernels.ops.common.dtypes import accumulate_dtype, cast_given, cast_together, without_autocast
from wavemix_kernels.ops.common.once import once_differentiable
from wavemix_kernels.ops.norm import pre_norm
from wavemix_kernels.ops.patm import branch_weights, branches, phases, statistics, whole, whole_gpu
from wavemix_kernels.ops.patm.weights import COUNT, ON_IMAGES, Arguments, PhaseNorm, Weights, unflatten

RECOMPUTE = ("amplitudes", "all")
_NO_NORM = pre_norm.Norm(None, None, None, None)


@plan.words
class Options(NamedTuple):
    eps: tuple[float, float]
    recompute: str
    backend: str
    kind: pre_norm.Kind | None  # None: PATM by itself
    whole: str | None  # the backend that takes images from end to end, or by parts
    dtypes: tuple[torch.dtype, torch.dtype] | None  # see patm

    def part(self, table: Any) -> str:
        return choose.for_part(self.backend, table)


class Output(NamedTuple):
    """The output, and (mean, biased variance) for the BatchNorms of theta_h and theta_w and for the norm in front,
    meaningless where that is frozen or absent."""

    image: Tensor
    norm_h: tuple[Tensor, Tensor]
    norm_w: tuple[Tensor, Tensor]
    norm: tuple[Tensor, Tensor]


@tuned.composite("patm")
def patm(
    x: Tensor, weights: Weights, norm_h: PhaseNorm, norm_w: PhaseNorm, *, eps: tuple[float, float], recompute: str,
    backend: str, norm: pre_norm.Norm | None = None, kind: pre_norm.Kind | None = None, path: Tensor | None = None,
    dtypes: tuple[torch.dtype, torch.dtype] | None = None,
) -> Output:  # fmt: skip
    """PATM of checked arguments, or ``x + path PATM(norm(x))``.

    Args:
        x: (N, C, H, W); the output takes its memory format.
        weights, norm_h, norm_w: see :mod:`wavemix_kernels.ops.patm.weights`.
        eps: of the two BatchNorms.
        recompute: what backward makes again: ``"amplitudes"``, or ``"all"`` to keep x alone.
        backend: for the ops that have it.
        norm, kind: the norm in front (:mod:`wavemix_kernels.ops.norm.pre_norm`); None: PATM by itself, x in the
            weights' dtype.
        path: (N, 1, 1, 1), what stochastic depth multiplies each sample's branch with, or None.
        dtypes: of the arithmetic, and of the weights of the convolutions on images, which are converted; None: they are
            in the arithmetic's.
    """
    arguments = Arguments(norm or _NO_NORM, weights, norm_h, norm_w)
    dtype = weights.z_h.dtype if dtypes is None else dtypes[0]
    name = runs_whole(x, backend, arguments.depthwise(), weights.fc1.shape[0], dtype)
    options = Options(eps, recompute, backend, kind, name, dtypes)
    function: Any = _ByParts if name is None else _Whole
    # Tensors already have their dtypes; autocast would round the branch weights' small MLP.
    with without_autocast(x):
        out, mean, var, *of_norm = function.apply(options, x, path, *arguments.flat())
    return Output(out, (mean[0], var[0]), (mean[1], var[1]), (of_norm[0], of_norm[1]))


def runs_whole(
    x: Tensor, backend: str, depthwise: bool, hidden: int = 0, dtype: torch.dtype | None = None
) -> str | None:
    """The backend that takes images from end to end, or None: by parts, and the log says why.

    Args:
        hidden, dtype: hidden channels of the branch weights' MLP, dtype of the projections' weights; default: x's.
    """
    name = x.device.type if backend == "auto" else backend
    if (reason := _why_by_parts(x, backend, name, depthwise, hidden, dtype or x.dtype)) is None:
        return name
    if not torch.compiler.is_compiling() and log.enabled():
        given, shape = str(x.dtype).removeprefix("torch."), tuple(x.shape)
        log.once(("patm", backend, given, shape, reason), lambda: f"patm {given} {shape}: by parts ({reason})")
    return None


def _why_by_parts(x: Tensor, backend: str, name: str, depthwise: bool, hidden: int, dtype: torch.dtype) -> str | None:
    if depthwise:
        return "depthwise phases have no kernels of the whole"
    if name not in ("cpu", "cuda"):
        return f"{name} has no kernels of the whole"
    if (reason := whole.BACKENDS[name].why_not(x)) is not None:
        return f"whole on {name}: {reason}"
    if name == "cuda" and (reason := whole_gpu.why_not_these(x, hidden, dtype)) is not None:
        return f"whole on cuda: {reason}"
    form = choose.patm(name, x.shape[1], depthwise)
    if backend == "auto":
        other = "parts" if form == "whole" else "whole"
        measured = tuned.either("patm", form, other, x, extra=(torch.is_grad_enabled(),))
        if name in verify.DEVICES and (fault := verify.fault(whole.BACKENDS, name, x)) is not None:
            return f"whole on {name} failed its self-test: {fault}"
        if measured != form:
            return None if measured == "whole" else "measured on this device"
    return None if form == "whole" else "parts are faster here"


# --- What both functions save and return ----------------------------------------------------------------------


def _converted(flat: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """:meth:`Arguments.flat` with the weights of convolutions on images, or their gradients, in another dtype."""
    first = len(pre_norm.Norm._fields)
    return (*flat[:first], *cast_given(flat[first : first + ON_IMAGES], dtype), *flat[first + ON_IMAGES :])


class _Saved(NamedTuple):
    options: Options
    x: Tensor
    path: Tensor | None
    arguments: Arguments
    of_norm: pre_norm.Statistics
    of_thetas: statistics.Statistics
    branch_mean: Tensor
    more: list[Tensor]  # by parts the thetas, or nothing; whole the image's moments, or nothing


def _save(
    ctx: Any, options: Options, tensors: tuple[Any, ...], of_norm: pre_norm.Statistics | None,
    of_thetas: statistics.Statistics, branch_mean: Tensor, more: Iterable[Tensor],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Keeps what :func:`_load` gives back; ``tensors`` are x, path and the flat arguments. Returns the outputs that
    are statistics."""
    mean, var = of_thetas[:2]
    of_norm = of_norm or pre_norm.Statistics(*(mean.new_empty(0) for _ in range(3)))
    ctx.options = options
    ctx.save_for_backward(*tensors, *of_norm, *of_thetas, branch_mean, *more)
    ctx.mark_non_differentiable(mean, var, of_norm.mean, of_norm.var)
    if not torch.compiler.is_compiling():  # which does not know it
        ctx.set_materialize_grads(False)  # of statistics
    return mean, var, of_norm.mean, of_norm.var


def _load(ctx: Any) -> _Saved:
    x, path, *rest = ctx.saved_tensors
    of_norm, of_thetas = (
        pre_norm.Statistics(*rest[COUNT : COUNT + 3]),
        statistics.Statistics(*rest[COUNT + 3 : COUNT + 8]),
    )
    branch_mean, *more = rest[COUNT + 8 :]
    return _Saved(ctx.options, x, path, unflatten(rest[:COUNT]), of_norm, of_thetas, branch_mean, more)


def _returned(
    saved: _Saved, grad: Tensor, d_image: Tensor | None, d: Mapping[str, Tensor | None], sums: Tensor
) -> tuple[Any, ...]:
    """Gradients in the order of the functions' arguments: ``d`` by the names of :class:`Weights`, without the thetas'
    biases, and in their parameters' strides. ``grad`` is that of the output."""
    options, x, _, arguments, of_norm = saved[:5]
    d_norm = _NO_NORM
    if options.kind is not None and d_image is not None:
        d_image, d_weight, d_bias = pre_norm.backward(
            d_image, x, grad, arguments.norm, options.kind, of_norm, options.backend
        )
        d_norm = pre_norm.Norm(d_weight, d_bias, None, None)
    elif d_image is not None and not layout.is_channels_last(x):
        d_image = layout.laid_out(d_image, False)
    biases, d_norms = statistics.gradients(arguments, sums, saved.of_thetas)
    small = {name: t for name, t in list(arguments.weights._asdict().items())[ON_IMAGES:] if t is not None}
    given: Any = [d[name] for name in small]
    d = {**d, **dict(zip(small, cast_together(given, [t.dtype for t in small.values()]), strict=True))}
    d_weights = Weights(**d, theta_h_bias=biases[0], theta_w_bias=biases[1])  # type: ignore[arg-type]
    gradients = Arguments(d_norm, d_weights, d_norms[0], d_norms[1]).flat()
    like = zip(gradients, arguments.flat(), strict=True)
    # A list: torch.compile of older torch versions cannot trace a generator that asks for strides.
    laid_out = [None if g is None or t is None else layout.like_weight(g, t) for g, t in like]
    return None, d_image, None, *(laid_out if options.dtypes is None else _converted(laid_out, options.dtypes[1]))


# --- By parts -------------------------------------------------------------------------------------------------


@plan.function
class _ByParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Options, x: Tensor, path: Tensor | None, *flat: Tensor | None) -> tuple[Tensor, ...]:
        flat = flat if options.dtypes is None else _converted(flat, options.dtypes[0])
        arguments, of_norm = unflatten(flat), None
        w = arguments.weights.with_taps(accumulate_dtype(arguments.weights.z_h.dtype))
        if options.kind is not None:
            of_norm = pre_norm.statistics(x, arguments.norm, options.kind, options.backend)
        image = _image(x, arguments, options, of_norm)
        keeps = options.recompute == "amplitudes"
        weight = torch.cat([*_pointwise(arguments).values()]) if _is_joined(image) else None
        z_h, z_w, z_c, *thetas = _amplitudes_and_thetas(image, arguments, weight, joined=not keeps)
        del image, weight
        of_thetas = statistics.of_thetas(arguments.norms(), thetas, options.eps, options.backend)
        maps = of_thetas.maps()
        h, v, s = phases.fused(
            z_h, z_w, z_c, *thetas, *maps, w.taps_h, w.taps_w, options.part(phases.BACKENDS)
        )  # fmt: skip
        a, branch_mean = branch_weights.branch_weights(s, x.shape[2] * x.shape[3], w.mlp(), options.backend)
        mixed = branches.branch_sum(h, v, z_c, a, options.part(branches.BACKENDS))
        del z_h, z_w, z_c, h, v
        out = products.project(mixed, w.proj, w.proj_bias)
        kept = thetas if keeps else []
        made = _save(ctx, options, (x, path, *flat), of_norm, of_thetas, branch_mean, kept)
        if options.kind is not None:
            out = pre_norm.join(x, out, path, options.backend)
        elif layout.is_channels_last(out) != layout.is_channels_last(x) or not layout.is_channels_last(x):
            out = layout.laid_out(out, layout.is_channels_last(x))
        return out, *made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, around: Tensor | None, *_: Any) -> tuple[Any, ...]:
        return _backward_by_parts(ctx, around)


def _backward_by_parts(ctx: Any, around: Tensor | None) -> tuple[Any, ...]:
    if around is None:
        return (None,) * len(ctx.needs_input_grad)
    saved = _load(ctx)
    options, x, path, arguments, of_norm, of_thetas, branch_mean, thetas = saved
    w, channels = arguments.weights.with_taps(of_thetas.mean.dtype), x.shape[1]
    image = _image(again(x), arguments, options, of_norm)
    grad = pre_norm.join_backward(around, path, image, options.backend)
    before = flops.counted()
    pointwise = _pointwise(arguments)
    weight = torch.cat([*pointwise.values()])
    joined = weight if _is_joined(image) else None
    if thetas:
        z_h, z_w, z_c = _projections(image, arguments, joined, _AMPLITUDES)
    else:
        z_h, z_w, z_c, *thetas = _amplitudes_and_thetas(image, arguments, joined, joined=True)
    maps = of_thetas.maps()
    part = options.part(phases.BACKENDS)
    h, v, _s = phases.fused(z_h, z_w, z_c, *thetas, *maps, w.taps_h, w.taps_w, part)
    a, _ = branch_weights.branch_weights(branch_mean, 1, w.mlp(), options.backend)
    flops.forget_since(before)

    d_mixed = products.backward_x(grad, h, w.proj)
    mixed, d_a = branches.backward(d_mixed, h, v, z_c, a, options.part(branches.BACKENDS))
    del h, v
    d: dict[str, Tensor | None] = {"proj": products.backward_weight(grad, mixed, w.proj)}
    (d["proj_bias"],) = _bias_gradients(grad, (w.proj_bias,))
    del mixed, grad
    d_s, (d["fc1"], d["fc1_bias"], d["fc2"], d["fc2_bias"]) = branch_weights.backward(
        d_a, a, branch_mean, x.shape[2] * x.shape[3], w.mlp(), options.backend
    )

    by_batch, depthwise = arguments.by_batch(), arguments.depthwise()
    out = phases.backward(
        d_mixed, d_mixed, d_s, a, z_h, z_w, *thetas, *maps, w.taps_h, w.taps_w,
        *((of_thetas.mean, of_thetas.invstd) if by_batch else (None, None)), not depthwise, part,
    )  # fmt: skip
    del z_h, z_w, z_c, d_mixed
    d["taps_h"], d["taps_w"] = out.taps_h, out.taps_w
    d_pointwise = products.backward_weight(out.images[0], image, weight).chunk(len(pointwise))
    d.update(zip(pointwise, d_pointwise, strict=True))
    want_image = ctx.needs_input_grad[1] or options.kind is not None
    d_image = products.backward_x(out.images[0], image, weight) if want_image else None
    if depthwise:
        for name, theta, d_theta in zip(("theta_h", "theta_w"), (w.theta_h, w.theta_w), out.images[1:], strict=True):
            through, d[name] = products.depthwise_backward(d_theta, image, theta, want_image)
            if d_image is not None and through is not None:
                d_image += through
    del image
    biases = w.z_h_bias, w.z_w_bias, w.z_c_bias
    d["z_h_bias"], d["z_w_bias"], d["z_c_bias"] = _bias_gradients(out.images[0][:, : 3 * channels], biases)
    return _returned(saved, around, d_image, d, out.sums)


def _image(x: Tensor, arguments: Arguments, options: Options, of_norm: pre_norm.Statistics | None) -> Tensor:
    """The image that PATM reads, channels_last."""
    if options.kind is None or of_norm is None:
        return x.contiguous(memory_format=torch.channels_last)
    return pre_norm.normalise(x, arguments.norm, options.kind, of_norm, options.backend, arguments.weights.z_h.dtype)


def _cat(*parts: Tensor | None, like: tuple[Tensor, ...]) -> Tensor | None:
    """Biases one after the other, zeros for missing ones; None if all are."""
    if all(p is None for p in parts):
        return None
    return torch.cat([w.new_zeros(w.shape[0]) if p is None else p for p, w in zip(parts, like, strict=True)])


def _pointwise(arguments: Arguments) -> dict[str, Tensor]:
    """The weights of the 1x1 convolutions of the image, by the names of :class:`Weights`."""
    w = arguments.weights
    amplitudes = {"z_h": w.z_h, "z_w": w.z_w, "z_c": w.z_c}
    return amplitudes if arguments.depthwise() else amplitudes | {"theta_h": w.theta_h, "theta_w": w.theta_w}


def _is_joined(image: Tensor) -> bool:
    return choose.projections(image.device.type, image.shape[1]) == "joined"


def _projections(image: Tensor, arguments: Arguments, weight: Tensor | None, part: slice) -> list[Tensor]:
    """Some of the 1x1 convolutions, as slices of one image by a part of ``weight``, all their weights one after the
    other; where there is none, as images."""
    names, weights = zip(*[*_pointwise(arguments).items()][part], strict=True)
    biases = [getattr(arguments.weights, f"{name}_bias") for name in names]
    if weight is None:
        return [products.project(image, w, b) for w, b in zip(weights, biases, strict=True)]
    rows = weights[0].shape[0]
    whole = weight[rows * (part.start or 0) :][: rows * len(names)]
    return list(products.project(image, whole, _cat(*biases, like=weights)).chunk(len(names), 1))


_AMPLITUDES, _THETAS = slice(0, 3), slice(3, None)


def _amplitudes_and_thetas(image: Tensor, arguments: Arguments, weight: Tensor | None, joined: bool) -> list[Tensor]:
    """``joined``: they may be slices of one image, which no one of them outlives."""
    w = arguments.weights
    if not arguments.depthwise():
        parts = (slice(None),) if joined else (_AMPLITUDES, _THETAS)
        return [t for part in parts for t in _projections(image, arguments, weight, part)]
    thetas = (w.theta_h, w.theta_h_bias), (w.theta_w, w.theta_w_bias)
    return [
        *_projections(image, arguments, weight, _AMPLITUDES),
        *(convolutions.conv2d(image, theta, bias, padding=1, groups=image.shape[1]) for theta, bias in thetas),
    ]


def _bias_gradients(grad: Tensor, biases: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Gradients of biases whose channels lie beside each other in ``grad``."""
    if all(b is None for b in biases):
        return [None] * len(biases)
    sums = products.backward_bias(grad).chunk(len(biases))
    return [None if b is None else s for b, s in zip(biases, sums, strict=True)]


# --- Whole ----------------------------------------------------------------------------------------------------


def _forward_whole(
    ctx: Any, options: Options, x: Tensor, path: Tensor | None, flat: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    flat = flat if options.dtypes is None else _converted(flat, options.dtypes[0])
    arguments, name = unflatten(flat), options.whole
    assert name is not None
    image, of_norm, moments = _whole_image(layout.channels_inner(x), arguments, options, name)
    of_thetas = statistics.of_moments(arguments.norms(), arguments.weights, moments, options.eps, name)
    maps = of_thetas.maps()
    by_image = None if path is None else path.flatten()
    out, branch_mean = whole.forward(
        image, by_image, options.kind is not None, arguments.weights, maps, name, layout.is_channels_last(x)
    )
    return out, *_save(ctx, options, (x, by_image, *flat), of_norm, of_thetas, branch_mean, moments)


@plan.function
class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Options, x: Tensor, path: Tensor | None, *flat: Tensor | None) -> tuple[Tensor, ...]:
        return _forward_whole(ctx, options, x, path, flat)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        saved = _load(ctx)
        options, x, path, arguments, of_norm, of_thetas, branch_mean, moments = saved
        image = _mapped(layout.channels_inner(again(x)), arguments.norm, options, of_norm)
        maps = of_thetas.maps()
        batch = whole.Batch(of_thetas.mean, of_thetas.invstd, *moments) if moments else None
        order = options.kind is not None or layout.is_channels_last(x)  # the norm's backward takes channels_last
        out = whole.backward(grad, branch_mean, batch, image, path, arguments.weights, maps, str(options.whole), order)
        return _returned(saved, grad, out.image, out.weights, out.sums)


def _whole_image(
    x: Tensor, arguments: Arguments, options: Options, name: str
) -> tuple[whole.Image, pre_norm.Statistics | None, tuple[Tensor, ...]]:
    """The image, its norm's statistics, and the image's moments where the phases want batch statistics."""
    norm, kind, by_batch = arguments.norm, options.kind, arguments.by_batch()
    plain = whole.Image(x, None, None)
    if kind is None:
        return plain, None, whole.moments(plain, name) if by_batch else ()
    if kind.by_image or norm.mean is not None or not by_batch:
        of_norm = pre_norm.statistics(x, norm, kind, options.backend)
        image = _mapped(x, norm, options, of_norm)
        return image, of_norm, whole.moments(image, name) if by_batch else ()
    # One pass for both: a BatchNorm maps moments as it maps values.
    wide = accumulate_dtype(x.dtype)
    mean, covariance = whole.moments(plain, name)
    var = covariance.diagonal()
    of_norm = pre_norm.Statistics(mean.to(wide), var.to(wide), torch.rsqrt(var + kind.eps).to(wide))
    image = _mapped(x, norm, options, of_norm)
    assert image.scale is not None
    assert image.shift is not None
    scale = image.scale.double()
    return image, of_norm, (mean * scale + image.shift, scale[:, None] * covariance * scale)


def _mapped(x: Tensor, norm: pre_norm.Norm, options: Options, of_norm: pre_norm.Statistics) -> whole.Image:
    """x and its norm as an affine map."""
    if options.kind is None:
        return whole.Image(x, None, None)
    return whole.Image(x, *pre_norm.affine(norm, options.kind, of_norm, x.shape[1]))
