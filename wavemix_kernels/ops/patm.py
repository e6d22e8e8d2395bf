"""``patm``: phase-aware token mixing as one differentiable function that saves its input and little else.

Upstream's autograd keeps some 19 tensors of the input's size. Here ``recompute="amplitudes"`` keeps x and the phases
before their BatchNorms, ``recompute="all"`` x alone; statistics, and what hangs on single images, are small.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels import backends
from wavemix_kernels.ops import batch_norm, branch_sum, layout, phase_aggregate

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


_FIELDS, _PHASE_FIELDS = len(Parameters._fields), len(Phase._fields)


class Options(NamedTuple):
    eps: tuple[float, float]
    recompute: str
    backend: str


def patm(
    x: Tensor, parameters: Parameters, phase_h: Phase, phase_w: Phase, *, eps: tuple[float, float], recompute: str,
    backend: str,
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:  # fmt: skip
    """PATM of checked arguments.

    Args:
        x: (N, C, H, W); the output takes its memory format.
        parameters: see :class:`Parameters`.
        phase_h, phase_w: phases along W and H; weight (C, C, 1, 1), or (C, 1, 3, 3) for depthwise ones.
        eps: of the two BatchNorms.
        recompute: what backward makes again: ``"amplitudes"``, or ``"all"`` to keep x alone.
        backend: for the ops that have it.

    Returns:
        The output, and (mean, biased variance) of the batch for each phase's BatchNorm, meaningless where it is frozen.
    """
    # Everything is in the dtype it is to be in; autocast would round the branch weights' little MLP, too.
    with torch.autocast(x.device.type, enabled=False):
        out, mean, var = _PATM.apply(Options(eps, recompute, backend), x, *parameters, *phase_h, *phase_w)
    return out, (mean[0], var[0]), (mean[1], var[1])


def _cat(*parts: Tensor | None, like: tuple[Tensor, ...]) -> Tensor | None:
    """Biases one after the other, zeros for missing ones; None if all are."""
    if all(p is None for p in parts):
        return None
    return torch.cat([w.new_zeros(w.shape[0]) if p is None else p for p, w in zip(parts, like, strict=True)])


def _is_depthwise(phase: Phase) -> bool:
    return phase.weight.shape[2] == 3


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _amplitudes(image: Tensor, p: Parameters) -> Tensor:
    weights = p.fc_h, p.fc_w, p.fc_c
    return F.conv2d(image, torch.cat(weights), _cat(p.fc_h_bias, p.fc_w_bias, p.fc_c_bias, like=weights))


def _thetas(image: Tensor, phases: tuple[Phase, Phase]) -> list[Tensor]:
    if _is_depthwise(phases[0]):
        return [F.conv2d(image, f.weight, f.bias, padding=1, groups=image.shape[1]) for f in phases]
    weights = phases[0].weight, phases[1].weight
    return [F.conv2d(image, torch.cat(weights), _cat(phases[0].bias, phases[1].bias, like=weights))]


def _pair(thetas: list[Tensor] | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """theta_h and theta_w, of one tensor or two."""
    return tuple(thetas) if len(thetas) == 2 else thetas[0].chunk(2, 1)


def _statistics(
    phases: tuple[Phase, Phase], thetas: tuple[Tensor, ...], options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance (of the batch, where it is asked for them) and inverse deviation, (2, C) each."""
    backend = backends.for_part(options.backend, batch_norm.BACKENDS)
    out: tuple[list[Tensor], ...] = ([], [], [])
    for phase, theta, eps in zip(phases, thetas, options.eps, strict=True):
        if phase.mean is None or phase.invstd is None:
            mean, var = torch.ops.wavemix_kernels.batch_norm_stats(theta, backend)
            invstd = torch.rsqrt(var + eps)
        else:
            mean, var, invstd = phase.mean, phase.mean, phase.invstd
        for values, value in zip(out, (mean, var, invstd), strict=True):
            values.append(value.to(batch_norm.statistics_dtype(theta.dtype)))
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

    @classmethod
    def of(cls, mean: Tensor, p: Parameters) -> _Weights:
        wide = mean.dtype
        pre = torch.addmm(p.fc1_bias.to(wide), mean, p.fc1.flatten(1).to(wide).t())
        hidden = F.gelu(pre)
        logits = torch.addmm(p.fc2_bias.to(wide), hidden, p.fc2.flatten(1).to(wide).t())
        return cls(mean, pre, hidden, logits.reshape(mean.shape[0], mean.shape[1], 3).softmax(2))

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


#: Up to this many input channels a plain product beats oneDNN's weight gradient of a 1x1 convolution on a CPU (64
#: channels, fp32: 13 against 18 ms; 320 channels: 27 against 18 ms).
NARROW = 128


def _input_gradient(grad: Tensor, x: Tensor, weight: Tensor, depthwise: bool = False) -> Tensor:
    return _convolution_backward(grad, x, weight, (True, False, False), depthwise)[0]


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, depthwise: bool = False) -> Tensor:
    if x.device.type == "cpu" and x.dtype == torch.float32 and not depthwise and x.shape[1] <= NARROW:
        rows = (t.permute(0, 2, 3, 1).reshape(-1, t.shape[1]) for t in (grad, x))
        return (next(rows).t() @ next(rows))[:, :, None, None]
    return _convolution_backward(grad, x, weight, (False, True, False), depthwise)[1]


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool], depthwise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    padding, groups = (1, x.shape[1]) if depthwise else (0, 1)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], [1, 1], [padding] * 2, [1, 1], False, [0, 0], groups, mask
    )


def _bias_gradients(grad: Tensor, biases: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Of biases beside each other in ``grad``'s channels."""
    if all(b is None for b in biases):
        return [None] * len(biases)
    sums = grad.sum((0, 2, 3), dtype=batch_norm.statistics_dtype(grad.dtype)).to(grad.dtype).chunk(len(biases))
    return [None if b is None else s for b, s in zip(biases, sums, strict=True)]


class _PATM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Options, x: Tensor, *flat: Tensor | None) -> tuple[Tensor, ...]:
        p, phases = _parameters(flat)
        image = _channels_last(x)
        z_h, z_w, c = _amplitudes(image, p).chunk(3, 1)
        thetas = _thetas(image, phases)
        mean, var, invstd = _statistics(phases, _pair(thetas), options)
        h, w, s = phase_aggregate.fused(
            z_h, z_w, c, *_pair(thetas), *_affines(phases, mean, invstd), p.tfc_h, p.tfc_w,
            backends.for_part(options.backend, phase_aggregate.BACKENDS),
        )  # fmt: skip
        branch_mean = s / (x.shape[2] * x.shape[3])
        a = _Weights.of(branch_mean, p).by_branch()
        mixed = branch_sum.branch_sum(h, w, c, a, backends.for_part(options.backend, branch_sum.BACKENDS))
        out = F.conv2d(mixed, p.proj, p.proj_bias)
        ctx.options = options
        kept = thetas if options.recompute == "amplitudes" else []
        ctx.save_for_backward(x, *flat, mean, invstd, branch_mean, *kept)
        out = layout.laid_out(out, True) if layout.is_channels_last(x) and not layout.is_channels_last(out) else out
        out = out if layout.is_channels_last(x) else out.contiguous()
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
        options: Options = ctx.options
        x, *rest = ctx.saved_tensors
        flat, (mean, invstd, branch_mean, *thetas) = (
            rest[: _FIELDS + 2 * _PHASE_FIELDS],
            rest[_FIELDS + 2 * _PHASE_FIELDS :],
        )
        p, phases = _parameters(flat)
        image, grad = _channels_last(x), _channels_last(grad)
        amplitudes = _amplitudes(image, p)
        z_h, z_w, c = amplitudes.chunk(3, 1)
        thetas = thetas or _thetas(image, phases)
        affines = _affines(phases, mean, invstd)
        aggregate = backends.for_part(options.backend, phase_aggregate.BACKENDS)
        h, w, _s = phase_aggregate.fused(z_h, z_w, c, *_pair(thetas), *affines, p.tfc_h, p.tfc_w, aggregate)
        weights = _Weights.of(branch_mean, p)
        a = weights.by_branch()

        d_mixed = _input_gradient(grad, h, p.proj)
        mixed, d_a = branch_sum.backward(d_mixed, h, w, c, a, backends.for_part(options.backend, branch_sum.BACKENDS))
        del h, w
        d_proj = _weight_gradient(grad, mixed, p.proj)
        (d_proj_bias,) = _bias_gradients(grad, (p.proj_bias,))
        del mixed
        d_mean, d_mlp = weights.backward(d_a.permute(1, 2, 0), p)

        batch_statistics = phases[0].mean is None
        depthwise = _is_depthwise(phases[0])
        out = phase_aggregate.backward(
            d_mixed, d_mixed, d_mean / (x.shape[2] * x.shape[3]), a, z_h, z_w, *_pair(thetas), *affines, p.tfc_h,
            p.tfc_w, mean if batch_statistics else None, invstd if batch_statistics else None, not depthwise, aggregate,
        )  # fmt: skip
        del amplitudes, z_h, z_w, c, d_mixed
        convolutions = [p.fc_h, p.fc_w, p.fc_c]
        if not depthwise:
            convolutions += [phase.weight for phase in phases]
        weight = torch.cat(convolutions)
        d_weights = list(_weight_gradient(out.images[0], image, weight).chunk(len(convolutions)))
        dx = _input_gradient(out.images[0], image, weight) if ctx.needs_input_grad[1] else None
        if depthwise:
            for phase, d_theta in zip(phases, out.images[1:], strict=True):
                d_weights.append(_weight_gradient(d_theta, image, phase.weight, True))
                if dx is not None:
                    dx += _input_gradient(d_theta, image, phase.weight, True)
        if dx is not None and not layout.is_channels_last(x):
            dx = dx.contiguous()

        biases = p.fc_h_bias, p.fc_w_bias, p.fc_c_bias
        d_biases = _bias_gradients(out.images[0][:, : 3 * x.shape[1]], biases)
        d_fc = [t for pair in zip(d_weights, d_biases, strict=False) for t in pair]
        d_phases: list[Any] = []
        for i, (phase, d_weight) in enumerate(zip(phases, d_weights[3:], strict=True)):
            d_pre, d_pre_theta = out.sums[i]
            if not batch_statistics:
                d_pre_theta = d_pre_theta - mean[i] * d_pre
            # Batch statistics take a constant out of theta again: its gradient is 0, not the rounding errors of a sum.
            d_bias = torch.zeros_like(d_pre) if batch_statistics else d_pre * affines[2 * i]
            made = (phase.bias, d_bias), (phase.norm_weight, d_pre_theta * invstd[i]), (phase.norm_bias, d_pre)
            d_phases += [d_weight, *(None if t is None else d.to(t.dtype) for t, d in made), None, None]
        return None, dx, *d_fc, out.w_h, out.w_w, *d_mlp, d_proj, d_proj_bias, *d_phases


def _parameters(flat: Any) -> tuple[Parameters, tuple[Phase, Phase]]:
    phases = flat[_FIELDS:]
    return Parameters(*flat[:_FIELDS]), (Phase(*phases[:_PHASE_FIELDS]), Phase(*phases[_PHASE_FIELDS:]))
