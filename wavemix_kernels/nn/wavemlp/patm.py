"""FusedPATM: the reference PATM's parameters and results on the fused operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wavemix_kernels import backends, checks, fx, log
from wavemix_kernels.nn.parts import (
    Batch,
    affine_parameters,
    all_plain,
    frozen,
    is_frozen,
    update,
    why_not_all_plain,
    why_not_plain,
)
from wavemix_kernels.nn.wavemlp import norm as pre_norm
from wavemix_kernels.nn.wavemlp.inference import InferencePATM
from wavemix_kernels.nn.wavemlp.mlp import MLP_KINDS, FusedMlp, why_not_dropping, why_not_mlp, why_not_mlp_runs
from wavemix_kernels.nn.wavemlp.reference import PATM, Mlp
from wavemix_kernels.ops.common.transforms import standard_wanted
from wavemix_kernels.ops.patm import op as patm_op
from wavemix_kernels.ops.patm.weights import ON_IMAGES, PhaseNorm, Weights

_CONVOLUTIONS = ("fc_h", "fc_w", "fc_c", "tfc_h", "tfc_w", "proj")
_PHASES = ("theta_h_conv", "theta_w_conv")
_KINDS: list[type[nn.Module]] = [*[nn.Conv2d] * len(_CONVOLUTIONS), *[nn.Sequential] * len(_PHASES)]
_KINDS_INSIDE = [*[nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * len(_PHASES), *(kind for _, kind in MLP_KINDS)]


class FusedPATM(PATM):
    """A PATM that trains in a sixth (``recompute="amplitudes"``) or a nineteenth (``"all"``) of the activation memory.

    (N, dim, H, W) -> the same shape and memory format, any H and W, in float64, float32, float16 or bfloat16 as the
    weights are (autocast converts both; phases stay fp32). Parameters, buffers and results are
    :class:`wavemix_kernels.reference.PATM`'s. Runs as one autograd function; where that cannot stand for the
    modules (a BatchNorm turned into SyncBatchNorm, hooks or parametrizations on a part) the modules themselves run.
    Kernels take an even ``dim``; an odd one runs on the reference's operations. Not differentiable twice, except on
    backend ``"reference"``.

    Args:
        dim: channels, at least 4.
        qkv_bias, qk_scale, attn_drop, proj_drop, mode: as :class:`wavemix_kernels.reference.PATM` takes them.
        recompute: what backward makes again: ``"amplitudes"``, z_h, z_w and c with all that follows, or ``"all"`` to
            keep x alone, as a CPU does in either case up to :data:`wavemix_kernels.ops.choose.WHOLE` channels.

    Raises:
        TypeError, ValueError: an argument out of these ranges, or an input that does not fit them.

    Source: arXiv:2111.12294.
    """

    def __init__(
        self,
        dim: int,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        mode: str = "fc",
        *,
        recompute: str = "amplitudes",
    ) -> None:
        super().__init__(dim, qkv_bias, qk_scale, attn_drop, proj_drop, mode)
        self.recompute = checks.check_choice("recompute", recompute, patm_op.RECOMPUTE)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return fx.call_module(self, x, super().forward)
        backend = backends.requested()
        if backend == "reference" or log.fallback(self, self.why_not_fused()):
            return super().forward(x)
        return self.proj_drop(self._run(x, None, None, backend))

    def residual(self, x: Tensor, norm: nn.Module, path: Tensor | None, backend: str) -> Tensor:
        """``x + path self(norm(x))``, path (N, 1, 1, 1) or None, where neither :meth:`why_not_joined` nor
        :func:`wavemix_kernels.nn.wavemlp.norm.why_not` has a reason."""
        return self._run(x, norm, path, backend)

    def _run(self, x: Tensor, norm: nn.Module | None, path: Tensor | None, backend: str) -> Tensor:
        self.check_input(x)
        # By iteration: nn.Sequential walks to what an index asks for.
        own: Any = self._modules  # not by nn.Module's attributes, which take longer than a launch
        phase_norms: list[Any] = [[*own[name]][1] for name in _PHASES]
        count = x.shape[0] * x.shape[2] * x.shape[3]
        if count == 1 and any(phase_norm.training for phase_norm in phase_norms):
            raise ValueError(f"x: expected more than one value per channel in training, got shape {tuple(x.shape)}")
        weights = self.weights()
        # A norm in front reads x as it is: only x's dtype counts here.
        if (dtypes := checks.autocast_inside(x, weights[:ON_IMAGES])) is not None:
            cast_x = x.to(dtypes[0]) if norm is None else x
        else:
            cast_x, *on_images = checks.autocast(x if norm is None else x[:0], *weights[:ON_IMAGES])
            checks.check_same_dtype("x", cast_x, "the weights", on_images[0])
            weights = Weights(*on_images, *weights[ON_IMAGES:])
        norm_h, norm_w = (PhaseNorm(*affine_parameters(n), *frozen(n)) for n in phase_norms)
        read, kind = (None, None) if norm is None else pre_norm.read(norm, x)
        out = patm_op.patm(
            cast_x if norm is None else x, weights, norm_h, norm_w, eps=(phase_norms[0].eps, phase_norms[1].eps),
            recompute=self.recompute, backend=backend, norm=read, kind=kind, path=path, dtypes=dtypes,
        )  # fmt: skip
        seen = [*zip(phase_norms, (out.norm_h, out.norm_w), strict=True), *([] if norm is None else [(norm, out.norm)])]
        update(*(Batch(of, mean, var, count) for of, (mean, var) in seen))
        return out.image

    def weights(self) -> Weights:
        """Upstream's parameters by the operators' names."""
        own: Any = self._modules
        thetas = [next(iter(own[name])) for name in _PHASES]
        weights: list[Any] = []
        for conv in (own["fc_h"], own["fc_w"], own["fc_c"], *thetas, own["proj"]):
            weights += affine_parameters(conv)
        weights += (affine_parameters(own[name])[0] for name in ("tfc_h", "tfc_w"))
        for name in ("fc1", "fc2"):
            weights += affine_parameters(own["reweight"]._modules[name])
        return Weights(*weights)

    def why_not_joined(self) -> str | None:
        """Why :meth:`residual` cannot stand for a call, or None: a hook would be left out, or something is dropped."""
        return (
            why_not_plain("it", self)
            or why_not_plain("proj_drop", self.proj_drop, nn.Dropout)
            or why_not_dropping("proj_drop", self.proj_drop)
            or self.why_not_fused()
        )

    def fuse_for_inference(self) -> InferencePATM:
        """A new module for inference, equal to this one in evaluation up to rounding: projections joined, BatchNorms
        as affine maps, dropout gone.

        Raises:
            ValueError: a part has hooks, parametrizations or a class of its own; a BatchNorm has no running statistics.
        """
        return InferencePATM(self)

    def why_not_fused(self) -> str | None:
        """Why the one function cannot stand for the modules, or None: it computes something else, or a part's hook or
        parametrization would be left out."""
        if (reason := standard_wanted()) is not None:
            return reason
        if not torch.compiler.is_compiling() and self._all_plain():
            return None
        reweight = self.reweight
        norms: list[Any] = []
        parts: list[tuple[str, nn.Module, type[nn.Module]]] = [
            *((name, getattr(self, name), nn.Conv2d) for name in _CONVOLUTIONS),
            ("reweight", reweight, FusedMlp if type(reweight) is FusedMlp else Mlp),
        ]
        for name in _PHASES:
            phase = getattr(self, name)
            if type(phase) is not nn.Sequential or len(phase) != 3:
                return f"{name} is {phase}, expected a Sequential of Conv2d, BatchNorm2d and ReLU"
            conv, norm, relu = phase
            parts += [(name, phase, nn.Sequential), (f"{name}.0", conv, nn.Conv2d)]
            parts += [(f"{name}.1", norm, nn.BatchNorm2d), (f"{name}.2", relu, nn.ReLU)]
            norms.append(norm)
        if (reason := why_not_all_plain(parts)) is not None:
            return reason
        if (reason := why_not_mlp(reweight)) is not None:
            return f"reweight: {reason}"
        of_h, of_w = (is_frozen(norm) for norm in norms)
        return None if of_h == of_w else "one of theta_h_conv.1 and theta_w_conv.1 is frozen, the other is not"

    def _all_plain(self) -> bool:
        """Whether there is no reason of :meth:`why_not_fused`, asked quickly."""
        own: Any = self._modules
        convolutions, phases = [own.get(name) for name in _CONVOLUTIONS], [own.get(name) for name in _PHASES]
        mlp = own.get("reweight")
        if [*map(type, phases)] != [nn.Sequential] * 2 or type(mlp) not in (FusedMlp, Mlp):
            return False
        inner = [m for phase in phases for m in phase._modules.values()]
        if len(phases[0]._modules) != len(phases[1]._modules):
            return False
        of_mlp = [*mlp._modules.values()]
        if not all_plain([*convolutions, *phases, mlp, *inner, *of_mlp], [*_KINDS, type(mlp), *_KINDS_INSIDE]):
            return False
        return why_not_mlp_runs(mlp) is None and is_frozen(inner[1]) == is_frozen(inner[4])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recompute={self.recompute!r}"
