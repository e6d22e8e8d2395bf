"""FusedPATM: the reference PATM's parameters and results on the fused operators."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from wavemix_kernels import backends, checks
from wavemix_kernels.nn.parts import frozen, untouched
from wavemix_kernels.nn.wavemlp import norm as pre_norm
from wavemix_kernels.nn.wavemlp.inference import InferencePATM
from wavemix_kernels.nn.wavemlp.mlp import FusedMlp
from wavemix_kernels.nn.wavemlp.reference import PATM, Mlp
from wavemix_kernels.ops.patm import op as patm


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
            keep x alone, as a CPU does in either case up to :data:`wavemix_kernels.ops.patm.op.WHOLE` channels.

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
        self.recompute = checks.check_choice("recompute", recompute, patm.RECOMPUTE)

    def forward(self, x: Tensor) -> Tensor:
        backend = backends.requested()
        if backend == "reference" or not self._parts_are_plain():
            return super().forward(x)
        return self.proj_drop(self._run(x, None, None, backend))

    def residual(self, x: Tensor, norm: nn.Module, path: Tensor | None, backend: str) -> Tensor:
        """``x + path self(norm(x))``, path (N, 1, 1, 1) or None, for a plain self and norm."""
        return self._run(x, norm, path, backend)

    def _run(self, x: Tensor, norm: nn.Module | None, path: Tensor | None, backend: str) -> Tensor:
        self.check_input(x)
        phase_norms = [cast(nn.BatchNorm2d, phase[1]) for phase in (self.theta_h_conv, self.theta_w_conv)]
        count = x.shape[0] * x.shape[2] * x.shape[3]
        if count == 1 and any(phase_norm.training for phase_norm in phase_norms):
            raise ValueError(f"x: expected more than one value per channel in training, got shape {tuple(x.shape)}")
        modules = (self.fc_h, self.fc_w, self.fc_c, self.proj, self.theta_h_conv[0], self.theta_w_conv[0])
        convs = [cast(nn.Conv2d, module) for module in modules]
        # A norm in front reads x as it is: of x the dtype alone.
        cast_x, *flat = checks.autocast(
            x if norm is None else x[:0], *(t for conv in convs for t in (conv.weight, conv.bias))
        )
        checks.check_same_dtype("x", cast_x, "the weights", flat[0])
        fc, proj, *thetas = flat[:6], flat[6:8], flat[8:10], flat[10:]
        mlp = [t for conv in (self.reweight.fc1, self.reweight.fc2) for t in (conv.weight, cast(Tensor, conv.bias))]
        phase_h, phase_w = (
            patm.Phase(weight, bias, phase_norm.weight, phase_norm.bias, *frozen(phase_norm))
            for (weight, bias), phase_norm in zip(thetas, phase_norms, strict=True)
        )
        read, kind = (None, None) if norm is None else pre_norm.read(norm, x)
        out = patm.patm(
            cast_x if norm is None else x,
            patm.Parameters(*fc, self.tfc_h.weight, self.tfc_w.weight, *mlp, *proj),  # type: ignore[call-arg]
            phase_h,
            phase_w,
            eps=(phase_norms[0].eps, phase_norms[1].eps),
            recompute=self.recompute,
            backend=backend,
            norm=read,
            kind=kind,
            path=path,
        )
        for phase_norm, statistics in zip(phase_norms, (out.phase_h, out.phase_w), strict=True):
            pre_norm.update(phase_norm, x, *statistics)
        if norm is not None:
            pre_norm.update(norm, x, *out.norm)
        return out.image

    def is_plain(self) -> bool:
        """Whether :meth:`residual` can stand for a call: no hook anywhere would notice, and nothing is dropped."""
        drop = self.proj_drop
        return (
            untouched(self)
            and type(drop) is nn.Dropout
            and untouched(drop)
            and (drop.p == 0 or not drop.training)
            and self._parts_are_plain()
        )

    def fuse_for_inference(self) -> InferencePATM:
        """A new module for inference, equal to this one in evaluation up to rounding: projections joined, BatchNorms
        as affine maps, dropout gone.

        Raises:
            ValueError: a part has hooks, parametrizations or a class of its own; a BatchNorm has no running statistics.
        """
        return InferencePATM(self)

    def _parts_are_plain(self) -> bool:
        """Whether the one function computes what the modules would, and nobody listens to one of them."""
        phases = (self.theta_h_conv, self.theta_w_conv)
        kinds: list[tuple[Any, type[nn.Module]]] = [
            *((m, nn.Conv2d) for m in (self.fc_h, self.fc_w, self.fc_c, self.tfc_h, self.tfc_w, self.proj)),
            (self.reweight, FusedMlp if type(self.reweight) is FusedMlp else Mlp),
            *zip(
                (self.reweight.fc1, self.reweight.act, self.reweight.fc2, self.reweight.drop),
                (nn.Conv2d, nn.GELU, nn.Conv2d, nn.Dropout),
                strict=True,
            ),
        ]
        for phase in phases:
            if type(phase) is not nn.Sequential or len(phase) != 3:
                return False
            kinds += [(phase, nn.Sequential), *zip(phase, (nn.Conv2d, nn.BatchNorm2d, nn.ReLU), strict=True)]
        if any(type(module) is not kind or not untouched(module) for module, kind in kinds):
            return False
        # The function has no form for one BatchNorm frozen beside one in training, nor for dropout in the MLP.
        is_frozen = [frozen(cast(nn.BatchNorm2d, phase[1]))[0] is not None for phase in phases]
        drop = cast(nn.Dropout, self.reweight.drop)
        return (
            is_frozen[0] == is_frozen[1]
            and (drop.p == 0 or not drop.training)
            and cast(nn.GELU, self.reweight.act).approximate == "none"
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recompute={self.recompute!r}"
