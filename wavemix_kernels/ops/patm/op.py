"""``patm``: phase-aware token mixing as one differentiable function that saves its input and little else; by itself or
as the residual branch of a block, with the norm in front and the sum behind.

Upstream's autograd keeps some 19 tensors of the input's size. Here ``recompute="amplitudes"`` keeps x and the phases
before their BatchNorms, ``recompute="all"`` x alone; statistics, and what hangs on single images, are small. The
normalised image is no more than an affine map of x: backward makes it again. Where a CPU takes images from end to end
(:func:`wavemix_kernels.ops.choose.patm`), x alone is kept in either case.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import layout, products
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.norm import batch_norm, pre_norm
from wavemix_kernels.ops.patm import branches as branch_sum
from wavemix_kernels.ops.patm import phases as phase_aggregate
from wavemix_kernels.ops.patm import reference
from wavemix_kernels.ops.patm import whole as patm_whole

RECOMPUTE = ("amplitudes", "all")


class Phase(NamedTuple):
    """What makes one branch's phase; ``mean`` and ``invstd`` None: the batch's own statistics."""

    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    mean: Tensor | None
    invstd: Tensor | None


class Parameters(NamedTuple):
    """Tensors of a PATM. Those of convolutions on images are in x's dtype; the others in any."""

    fc_h: Tensor
    fc_h_bias: Tensor | None
    fc_w: Tensor
    fc_w_bias: Tensor | None
    fc_c: Tensor
    fc_c_bias: Tensor | None
    tfc_h: Tensor
    tfc_w: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor
    proj: Tensor
    proj_bias: Tensor | None


_NORM_FIELDS, _FIELDS, _PHASE_FIELDS = len(pre_norm.Norm._fields), len(Parameters._fields), len(Phase._fields)
_NO_NORM = pre_norm.Norm(None, None, None, None)


class Options(NamedTuple):
    eps: tuple[float, float]
    recompute: str
    backend: str
    kind: pre_norm.Kind | None  # None: PATM by itself

    def part(self, table: Any) -> str:
        return choose.for_part(self.backend, table)


class Output(NamedTuple):
    """The output, and (mean, biased variance) for each phase's BatchNorm and for the branch's norm, meaningless where
    that is frozen or absent."""

    image: Tensor
    phase_h: tuple[Tensor, Tensor]
    phase_w: tuple[Tensor, Tensor]
    norm: tuple[Tensor, Tensor]


def patm(
    x: Tensor, parameters: Parameters, phase_h: Phase, phase_w: Phase, *, eps: tuple[float, float], recompute: str,
    backend: str, norm: pre_norm.Norm | None = None, kind: pre_norm.Kind | None = None, path: Tensor | None = None,
) -> Output:  # fmt: skip
    """PATM of checked arguments, or ``x + path PATM(norm(x))``.

    Args:
        x: (N, C, H, W); the output takes its memory format.
        parameters: see :class:`Parameters`.
        phase_h, phase_w: phases along W and H; weight (C, C, 1, 1), or (C, 1, 3, 3) for depthwise ones.
        eps: of the two BatchNorms.
        recompute: what backward makes again: ``"amplitudes"``, or ``"all"`` to keep x alone.
        backend: for the ops that have it.
        norm, kind: the norm in front (:mod:`wavemix_kernels.ops.norm.pre_norm`); None: PATM by itself, x in the
            weights' dtype.
        path: (N, 1, 1, 1), what stochastic depth multiplies each sample's branch with, or None.
    """
    options = Options(eps, recompute, backend, kind)
    function: Any = _WholePATM if _runs_whole(x, backend, _is_depthwise(phase_h)) else _PATM
    # Everything is in the dtype it is to be in; autocast would round the branch weights' little MLP, too.
    with torch.autocast(x.device.type, enabled=False):
        out, mean, var, *of_norm = function.apply(
            options, x, path, *(norm or _NO_NORM), *parameters, *phase_h, *phase_w
        )
    return Output(out, (mean[0], var[0]), (mean[1], var[1]), (of_norm[0], of_norm[1]))


def _cat(*parts: Tensor | None, like: tuple[Tensor, ...]) -> Tensor | None:
    """Biases one after the other, zeros for missing ones; None if all are."""
    if all(p is None for p in parts):
        return None
    return torch.cat([w.new_zeros(w.shape[0]) if p is None else p for p, w in zip(parts, like, strict=True)])


def _is_depthwise(phase: Phase) -> bool:
    return phase.weight.shape[2] == 3


def _runs_whole(x: Tensor, backend: str, depthwise: bool) -> bool:
    return (
        choose.patm(x.device.type, x.shape[1], depthwise) == "whole"
        and backend in ("auto", "cpu")
        and patm_whole.BACKENDS["cpu"].why_not(x) is None
    )


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _projections(image: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]) -> list[Tensor]:
    """1x1 convolutions of one image, as images or as slices of one."""
    if choose.projections(image.shape[1]) == "apart":
        return [products.project(image, w, b) for w, b in zip(weights, biases, strict=True)]
    joined = products.project(image, torch.cat(weights), _cat(*biases, like=weights))
    return list(joined.chunk(len(weights), 1))


def _amplitudes(image: Tensor, p: Parameters) -> list[Tensor]:
    return _projections(image, (p.fc_h, p.fc_w, p.fc_c), (p.fc_h_bias, p.fc_w_bias, p.fc_c_bias))


def _thetas(image: Tensor, phases: tuple[Phase, Phase]) -> list[Tensor]:
    if _is_depthwise(phases[0]):
        return [F.conv2d(image, f.weight, f.bias, padding=1, groups=image.shape[1]) for f in phases]
    return _projections(image, (phases[0].weight, phases[1].weight), (phases[0].bias, phases[1].bias))


def _statistics(
    phases: tuple[Phase, Phase], thetas: tuple[Tensor, ...], options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance (of the batch, where it is asked for them) and inverse deviation, (2, C) each."""
    backend = choose.for_part(options.backend, batch_norm.BACKENDS)
    out: tuple[list[Tensor], ...] = ([], [], [])
    for phase, theta, eps in zip(phases, thetas, options.eps, strict=True):
        if phase.mean is None or phase.invstd is None:
            mean, var = torch.ops.wavemix_kernels.batch_norm_stats(theta, backend)
            invstd = torch.rsqrt(var + eps)
        else:
            mean, var, invstd = phase.mean, phase.mean, phase.invstd
        for values, value in zip(out, (mean, var, invstd), strict=True):
            values.append(value.to(accumulate_dtype(theta.dtype)))
    mean, var, invstd = map(torch.stack, out)
    return mean, var, invstd


def _affines(phases: tuple[Phase, Phase], mean: Tensor, invstd: Tensor) -> list[Tensor]:
    """scale_h, shift_h, scale_w, shift_w."""
    out: list[Tensor] = []
    for i, phase in enumerate(phases):
        out += batch_norm.affine(mean[i], invstd[i], phase.norm_weight, phase.norm_bias)
    return out


class _Weights(NamedTuple):
    """The branch weights' MLP on the way: mean -> pre -> GELU -> hidden -> softmax over 3 -> a (N, C, 3)."""

    mean: Tensor
    pre: Tensor
    hidden: Tensor
    a: Tensor

    def by_branch(self) -> Tensor:
        return self.a.permute(2, 0, 1).contiguous()

    def backward(self, d_a: Tensor, p: Parameters) -> tuple[Tensor, list[Tensor]]:
        """Gradients of mean, and of fc1, fc1_bias, fc2, fc2_bias, from that of a (N, C, 3)."""
        wide = d_a.dtype
        d_logits = (self.a * (d_a - (self.a * d_a).sum(2, keepdim=True))).flatten(1)
        d_pre = torch.ops.aten.gelu_backward(d_logits @ p.fc2.flatten(1).to(wide), self.pre)
        grads = [d_pre.t() @ self.mean, d_pre.sum(0), d_logits.t() @ self.hidden, d_logits.sum(0)]
        tensors = (p.fc1, p.fc1_bias, p.fc2, p.fc2_bias)
        return d_pre @ p.fc1.flatten(1).to(wide), [
            g.reshape(t.shape).to(t.dtype) for g, t in zip(grads, tensors, strict=True)
        ]


def _bias_gradients(grad: Tensor, biases: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Of biases beside each other in ``grad``'s channels."""
    if all(b is None for b in biases):
        return [None] * len(biases)
    sums = products.backward_bias(grad).chunk(len(biases))
    return [None if b is None else s for b, s in zip(biases, sums, strict=True)]


def _branch_weights(mean: Tensor, fc1: Tensor, fc1_bias: Tensor, fc2: Tensor, fc2_bias: Tensor) -> _Weights:
    wide = mean.dtype
    pre = torch.addmm(fc1_bias.to(wide), mean, fc1.flatten(1).to(wide).t())
    hidden = F.gelu(pre)
    logits = torch.addmm(fc2_bias.to(wide), hidden, fc2.flatten(1).to(wide).t())
    return _Weights(mean, pre, hidden, logits.reshape(mean.shape[0], mean.shape[1], 3).softmax(2))


class Folded(NamedTuple):
    """Constants of a PATM in evaluation. ``weight`` (3C or, with the phases' 1x1 convolutions, 5C, C, 1, 1) and its
    bias make z_h, z_w, c (and both thetas) in one product; ``phase_h`` and ``phase_w`` are depthwise ones, or None."""

    weight: Tensor
    bias: Tensor | None
    phase_h: Tensor | None
    phase_w: Tensor | None
    proj: Tensor
    proj_bias: Tensor | None
    scale_h: Tensor
    shift_h: Tensor
    scale_w: Tensor
    shift_w: Tensor
    tfc_h: Tensor
    tfc_w: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor


def evaluate(image: Tensor, f: Folded, backend: str) -> Tensor:
    """PATM of an image (N, C, H, W) in the dtype of ``f.weight``: channels_last, without gradient; on backend
    ``"reference"`` in standard operators only."""
    if backend == "reference":
        return _evaluate_standard(image, f)
    channels = image.shape[1]
    if _runs_whole(image, backend, f.phase_h is not None):
        z_h, z_w, c, theta_h, theta_w = f.weight.chunk(5)
        biases = (None,) * 5 if f.bias is None else f.bias.chunk(5)
        weights = patm_whole.Weights(
            z_h, biases[0], theta_h, biases[3], f.scale_h, f.shift_h, f.tfc_h, z_w, biases[1], theta_w, biases[4],
            f.scale_w, f.shift_w, f.tfc_w, c, biases[2], f.fc1, f.fc1_bias, f.fc2, f.fc2_bias, f.proj, f.proj_bias,
        )  # fmt: skip
        return patm_whole.forward(patm_whole.Image(image, None, None), None, False, weights, "cpu")[0]
    image = _channels_last(image)
    parts = products.project(image, f.weight, f.bias).split(channels, 1)
    z_h, z_w, c, *thetas = parts
    if f.phase_h is not None and f.phase_w is not None:
        thetas = [F.conv2d(image, w, padding=1, groups=channels) for w in (f.phase_h, f.phase_w)]
    h, w, s = phase_aggregate.fused(
        z_h, z_w, c, *thetas, f.scale_h, f.shift_h, f.scale_w, f.shift_w, f.tfc_h, f.tfc_w,
        choose.for_part(backend, phase_aggregate.BACKENDS),
    )  # fmt: skip
    mean = s / (image.shape[2] * image.shape[3])
    a = _branch_weights(mean, f.fc1, f.fc1_bias, f.fc2, f.fc2_bias).by_branch()
    mixed = branch_sum.branch_sum(h, w, c, a, choose.for_part(backend, branch_sum.BACKENDS))
    return products.project(mixed, f.proj, f.proj_bias)


def _evaluate_standard(image: Tensor, f: Folded) -> Tensor:
    channels = image.shape[1]
    z_h, z_w, c, *thetas = F.conv2d(image, f.weight, f.bias).split(channels, 1)
    if f.phase_h is not None and f.phase_w is not None:
        thetas = [F.conv2d(image, w, padding=1, groups=channels) for w in (f.phase_h, f.phase_w)]
    theta_h, theta_w = thetas
    h, w, s = reference.phase_aggregate(
        z_h, z_w, c, theta_h, theta_w, f.scale_h, f.shift_h, f.scale_w, f.shift_w, f.tfc_h, f.tfc_w
    )
    a = _branch_weights(s / (image.shape[2] * image.shape[3]), f.fc1, f.fc1_bias, f.fc2, f.fc2_bias).a
    return F.conv2d(reference.branch_sum(h, w, c, a), f.proj, f.proj_bias)


class _PATM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Options, x: Tensor, path: Tensor | None, *flat: Tensor | None) -> tuple[Tensor, ...]:
        norm, p, phases = _parameters(flat)
        of_norm = None
        if options.kind is None:
            image = _channels_last(x)
        else:
            of_norm = pre_norm.statistics(x, norm, options.kind, options.backend)
            image = pre_norm.normalise(x, norm, options.kind, of_norm, options.backend, p.fc_h.dtype)
        z_h, z_w, c = _amplitudes(image, p)
        thetas = _thetas(image, phases)
        del image
        mean, var, invstd = _statistics(phases, tuple(thetas), options)
        h, w, s = phase_aggregate.fused(
            z_h, z_w, c, *thetas, *_affines(phases, mean, invstd), p.tfc_h, p.tfc_w,
            options.part(phase_aggregate.BACKENDS),
        )  # fmt: skip
        branch_mean = s / (x.shape[2] * x.shape[3])
        a = _branch_weights(branch_mean, p.fc1, p.fc1_bias, p.fc2, p.fc2_bias).by_branch()
        mixed = branch_sum.branch_sum(h, w, c, a, options.part(branch_sum.BACKENDS))
        del z_h, z_w, c, h, w
        out = products.project(mixed, p.proj, p.proj_bias)
        ctx.options = options
        kept = thetas if options.recompute == "amplitudes" else []
        of_norm = of_norm or pre_norm.Statistics(*(mean.new_empty(0) for _ in range(3)))
        ctx.save_for_backward(x, path, *flat, *of_norm, mean, invstd, branch_mean, *kept)
        if options.kind is not None:
            out = pre_norm.join(x, out, path, options.backend)
        elif layout.is_channels_last(out) != layout.is_channels_last(x) or not layout.is_channels_last(x):
            out = layout.laid_out(out, layout.is_channels_last(x))
        ctx.mark_non_differentiable(mean, var, of_norm.mean, of_norm.var)
        return out, mean, var, of_norm.mean, of_norm.var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
        options: Options = ctx.options
        x, path, *rest = ctx.saved_tensors
        count = _NORM_FIELDS + _FIELDS + 2 * _PHASE_FIELDS
        flat, of_norm = rest[:count], pre_norm.Statistics(*rest[count : count + 3])
        mean, invstd, branch_mean, *thetas = rest[count + 3 :]
        norm, p, phases = _parameters(flat)
        if options.kind is None:
            image = _channels_last(x)
        else:
            image = pre_norm.normalise(x, norm, options.kind, of_norm, options.backend, p.fc_h.dtype)
        around, grad = grad, pre_norm.join_backward(grad, path, image, options.backend)
        z_h, z_w, c = _amplitudes(image, p)
        thetas = thetas or _thetas(image, phases)
        affines = _affines(phases, mean, invstd)
        aggregate = options.part(phase_aggregate.BACKENDS)
        h, w, _s = phase_aggregate.fused(z_h, z_w, c, *thetas, *affines, p.tfc_h, p.tfc_w, aggregate)
        weights = _branch_weights(branch_mean, p.fc1, p.fc1_bias, p.fc2, p.fc2_bias)
        a = weights.by_branch()

        d_mixed = products.backward_x(grad, h, p.proj)
        mixed, d_a = branch_sum.backward(d_mixed, h, w, c, a, options.part(branch_sum.BACKENDS))
        del h, w
        d_proj = products.backward_weight(grad, mixed, p.proj)
        (d_proj_bias,) = _bias_gradients(grad, (p.proj_bias,))
        del mixed, grad
        d_mean, d_mlp = weights.backward(d_a.permute(1, 2, 0), p)

        batch_statistics = phases[0].mean is None
        depthwise = _is_depthwise(phases[0])
        out = phase_aggregate.backward(
            d_mixed, d_mixed, d_mean / (x.shape[2] * x.shape[3]), a, z_h, z_w, *thetas, *affines, p.tfc_h,
            p.tfc_w, mean if batch_statistics else None, invstd if batch_statistics else None, not depthwise, aggregate,
        )  # fmt: skip
        del z_h, z_w, c, d_mixed
        convolutions = [p.fc_h, p.fc_w, p.fc_c]
        if not depthwise:
            convolutions += [phase.weight for phase in phases]
        weight = torch.cat(convolutions)
        d_weights = list(products.backward_weight(out.images[0], image, weight).chunk(len(convolutions)))
        want_image = ctx.needs_input_grad[1] or options.kind is not None
        d_image = products.backward_x(out.images[0], image, weight) if want_image else None
        if depthwise:
            for phase, d_theta in zip(phases, out.images[1:], strict=True):
                through, d_weight = products.depthwise_backward(d_theta, image, phase.weight, want_image)
                d_weights.append(d_weight)
                if d_image is not None and through is not None:
                    d_image += through
        del image
        dx: Tensor | None = d_image
        d_norm: list[Tensor | None] = [None, None]
        if options.kind is not None and d_image is not None:
            dx, *d_norm = pre_norm.backward(d_image, x, around, norm, options.kind, of_norm, options.backend)
        elif dx is not None and not layout.is_channels_last(x):
            dx = dx.contiguous()

        biases = p.fc_h_bias, p.fc_w_bias, p.fc_c_bias
        d_biases = _bias_gradients(out.images[0][:, : 3 * x.shape[1]], biases)
        d_fc = [t for pair in zip(d_weights, d_biases, strict=False) for t in pair]
        d_phases: list[Any] = []
        for i, (phase, d_weight) in enumerate(zip(phases, d_weights[3:], strict=True)):
            d_phases += _phase_gradients(
                phase, d_weight, out.sums[i], mean[i], invstd[i], affines[2 * i], batch_statistics
            )
        of_fc = *d_fc, out.w_h, out.w_w, *d_mlp, d_proj, d_proj_bias
        return None, dx, None, *d_norm, None, None, *_like((*of_fc, *d_phases), (*p, *phases[0], *phases[1]))


class _WholePATM(torch.autograd.Function):
    """As :class:`_PATM`, image by image. Kept are x and statistics."""

    @staticmethod
    def forward(ctx: Any, options: Options, x: Tensor, path: Tensor | None, *flat: Tensor | None) -> tuple[Tensor, ...]:
        norm, p, phases = _parameters(flat)
        image, of_norm, moments = _read(layout.channels_inner(x), norm, phases, options)
        mean, var, invstd = _phase_statistics(phases, moments, options, accumulate_dtype(x.dtype))
        weights = _weights(p, phases, _affines(phases, mean, invstd))
        path = None if path is None else path.flatten()
        out, branch_mean = patm_whole.forward(image, path, options.kind is not None, weights, "cpu")
        if not layout.is_channels_last(x):
            out = layout.laid_out(out, False)
        ctx.options = options
        ctx.save_for_backward(x, path, *flat, *of_norm, mean, invstd, branch_mean, *moments)
        ctx.mark_non_differentiable(mean, var, of_norm.mean, of_norm.var)
        return out, mean, var, of_norm.mean, of_norm.var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
        options: Options = ctx.options
        x, path, *rest = ctx.saved_tensors
        count = _NORM_FIELDS + _FIELDS + 2 * _PHASE_FIELDS
        flat, of_norm = rest[:count], pre_norm.Statistics(*rest[count : count + 3])
        mean, invstd, branch_mean, *moments = rest[count + 3 :]
        norm, p, phases = _parameters(flat)
        image = _image(layout.channels_inner(x), norm, options, of_norm)
        affines = _affines(phases, mean, invstd)
        batch = patm_whole.Batch(mean, invstd, *moments) if moments else None
        out = patm_whole.backward(grad, branch_mean, batch, image, path, _weights(p, phases, affines), "cpu")
        dx = out.image
        d_norm: list[Tensor | None] = [None, None]
        if options.kind is not None:
            dx, *d_norm = pre_norm.backward(dx, x, grad, norm, options.kind, of_norm, options.backend)
        elif not layout.is_channels_last(x):
            dx = layout.laid_out(dx, False)
        d_phases: list[Any] = []
        for i, (phase, d_weight) in enumerate(zip(phases, (out.theta_h, out.theta_w), strict=True)):
            d_phases += _phase_gradients(
                phase, d_weight, out.sums[i], mean[i], invstd[i], affines[2 * i], bool(moments)
            )
        of_parameters = [getattr(out, name) for name in _OF_WHOLE]
        gradients = _like((*of_parameters, *d_phases), (*p, *phases[0], *phases[1]))
        return None, dx, None, *d_norm, None, None, *gradients


#: Fields of :class:`patm_whole.Gradients` in the order of :class:`Parameters`.
_OF_WHOLE = (
    "z_h", "z_h_bias", "z_w", "z_w_bias", "channel", "channel_bias", "taps_h", "taps_w", "fc1", "fc1_bias", "fc2",
    "fc2_bias", "proj", "proj_bias",
)  # fmt: skip


def _read(
    x: Tensor, norm: pre_norm.Norm, phases: tuple[Phase, Phase], options: Options
) -> tuple[patm_whole.Image, pre_norm.Statistics, tuple[Tensor, ...]]:
    """The image, its norm's statistics, and the image's moments where the phases' statistics are the batch's."""
    plain = patm_whole.Image(x, None, None)
    of_batch = phases[0].mean is None
    wide = accumulate_dtype(x.dtype)
    if options.kind is None:
        none = pre_norm.Statistics(*(x.new_empty(0, dtype=wide) for _ in range(3)))
        return plain, none, patm_whole.moments(plain, "cpu") if of_batch else ()
    if options.kind.by_image or norm.mean is not None or not of_batch:
        of_norm = pre_norm.statistics(x, norm, options.kind, options.backend)
        image = _image(x, norm, options, of_norm)
        return image, of_norm, patm_whole.moments(image, "cpu") if of_batch else ()
    # One pass for both: a BatchNorm maps moments as it maps values.
    mean, covariance = patm_whole.moments(plain, "cpu")
    var = covariance.diagonal()
    of_norm = pre_norm.Statistics(mean.to(wide), var.to(wide), torch.rsqrt(var + options.kind.eps).to(wide))
    image = _image(x, norm, options, of_norm)
    assert image.scale is not None
    assert image.shift is not None
    scale = image.scale.double()
    return image, of_norm, (mean * scale + image.shift, scale[:, None] * covariance * scale)


def _image(x: Tensor, norm: pre_norm.Norm, options: Options, of_norm: pre_norm.Statistics) -> patm_whole.Image:
    if options.kind is None:
        return patm_whole.Image(x, None, None)
    return patm_whole.Image(x, *pre_norm.affine(norm, options.kind, of_norm, x.shape[1]))


def _phase_statistics(
    phases: tuple[Phase, Phase], moments: tuple[Tensor, ...], options: Options, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_statistics`, of an image with these moments."""
    out: tuple[list[Tensor], ...] = ([], [], [])
    for phase, eps in zip(phases, options.eps, strict=True):
        if phase.mean is not None and phase.invstd is not None:
            mean, var, invstd = phase.mean, phase.mean, phase.invstd
        else:
            weight = phase.weight.flatten(1).double()
            mean = weight @ moments[0] if phase.bias is None else torch.addmv(phase.bias.double(), weight, moments[0])
            var = (weight @ moments[1] * weight).sum(1).clamp_min_(0.0)
            invstd = torch.rsqrt(var + eps)
        for values, value in zip(out, (mean, var, invstd), strict=True):
            values.append(value.to(dtype))
    means, variances, invstds = map(torch.stack, out)
    return means, variances, invstds


def _weights(p: Parameters, phases: tuple[Phase, Phase], affines: list[Tensor]) -> patm_whole.Weights:
    (h, w), (scale_h, shift_h, scale_w, shift_w) = phases, affines
    return patm_whole.Weights(
        p.fc_h, p.fc_h_bias, h.weight, h.bias, scale_h, shift_h, p.tfc_h, p.fc_w, p.fc_w_bias, w.weight, w.bias,
        scale_w, shift_w, p.tfc_w, p.fc_c, p.fc_c_bias, p.fc1, p.fc1_bias, p.fc2, p.fc2_bias, p.proj, p.proj_bias,
    )  # fmt: skip


def _like(gradients: Iterable[Tensor | None], parameters: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Gradients in their parameters' strides, None where there is no parameter."""
    pairs = zip(gradients, parameters, strict=True)
    return [None if g is None or t is None else layout.like_weight(g, t) for g, t in pairs]


def _phase_gradients(
    phase: Phase, d_weight: Tensor, sums: Tensor, mean: Tensor, invstd: Tensor, scale: Tensor, of_batch: bool
) -> list[Tensor | None]:
    """Of a :class:`Phase`, from its weight's and the sums of d and ``d (theta - mean)``, mean 0 for frozen ones."""
    d_pre, d_pre_theta = sums
    if not of_batch:
        d_pre_theta = d_pre_theta - mean * d_pre
    # Batch statistics take a constant out of theta again: its gradient is 0, not the rounding errors of a sum.
    d_bias = torch.zeros_like(d_pre) if of_batch else d_pre * scale
    made = (phase.bias, d_bias), (phase.norm_weight, d_pre_theta * invstd), (phase.norm_bias, d_pre)
    return [d_weight, *(None if t is None else d.to(t.dtype) for t, d in made), None, None]


def _parameters(flat: Any) -> tuple[pre_norm.Norm, Parameters, tuple[Phase, Phase]]:
    phases = flat[_NORM_FIELDS + _FIELDS :]
    return (
        pre_norm.Norm(*flat[:_NORM_FIELDS]),
        Parameters(*flat[_NORM_FIELDS : _NORM_FIELDS + _FIELDS]),
        (Phase(*phases[:_PHASE_FIELDS]), Phase(*phases[_PHASE_FIELDS:])),
    )
