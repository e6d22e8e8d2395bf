"""FusedPATM: the reference PATM's parameters and results on the fused operators."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from wavemix_kernels import backends, checks
from wavemix_kernels.nn.waveblock import _frozen, _untouched, _update
from wavemix_kernels.ops import patm
from wavemix_kernels.reference.patm import PATM, Mlp


class FusedPATM(PATM):
    """A PATM that trains in a sixth (``recompute="amplitudes"``) or a nineteenth (``"all"``) of the activation memory.

    (N, dim, H, W) -> the same shape and memory format, any H and W; parameters, buffers and results are
    :class:`wavemix_kernels.reference.patm.PATM`'s. Runs as one autograd function; where that cannot stand for the
    modules (a BatchNorm turned into SyncBatchNorm, hooks or parametrizations on a part) the modules themselves run.
    Kernels take an even ``dim``; an odd one runs on the reference's operations. Not differentiable twice, except on
    backend ``"reference"``.

    Args:
        dim, qkv_bias, qk_scale, attn_drop, proj_drop, mode: as PATM takes them.
        recompute: what backward makes again: ``"amplitudes"``, z_h, z_w and c with all that follows, or ``"all"`` to
            keep x alone.

    Raises:
        TypeError, ValueError: an argument out of these ranges, or an input that does not fit them.
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
        self.check_input(x)
        norms = [cast(nn.BatchNorm2d, phase[1]) for phase in (self.theta_h_conv, self.theta_w_conv)]
        count = x.shape[0] * x.shape[2] * x.shape[3]
        if count == 1 and any(norm.training for norm in norms):
            raise ValueError(f"x: expected more than one value per channel in training, got shape {tuple(x.shape)}")
        modules = (self.fc_h, self.fc_w, self.fc_c, self.proj, self.theta_h_conv[0], self.theta_w_conv[0])
        convs = [cast(nn.Conv2d, module) for module in modules]
        cast_x, *flat = checks.autocast(x, *(t for conv in convs for t in (conv.weight, conv.bias)))
        checks.check_same_dtype("x", cast_x, "the weights", flat[0])
        fc, proj, *thetas = flat[:6], flat[6:8], flat[8:10], flat[10:]
        mlp = [t for conv in (self.reweight.fc1, self.reweight.fc2) for t in (conv.weight, cast(Tensor, conv.bias))]
        phase_h, phase_w = (
            patm.Phase(weight, bias, norm.weight, norm.bias, *_frozen(norm))
            for (weight, bias), norm in zip(thetas, norms, strict=True)
        )
        out, *statistics = patm.patm(
            cast_x,
            patm.Parameters(*fc, self.tfc_h.weight, self.tfc_w.weight, *mlp, *proj),  # type: ignore[call-arg]
            phase_h,
            phase_w,
            eps=(norms[0].eps, norms[1].eps),
            recompute=self.recompute,
            backend=backend,
        )
        for norm, (mean, var) in zip(norms, statistics, strict=True):
            if norm.training and norm.track_running_stats:
                _update(norm, mean, var, count)
        return self.proj_drop(out)

    def _parts_are_plain(self) -> bool:
        """Whether the one function computes what the modules would, and nobody listens to one of them."""
        phases = (self.theta_h_conv, self.theta_w_conv)
        kinds: list[tuple[Any, type[nn.Module]]] = [
            *((m, nn.Conv2d) for m in (self.fc_h, self.fc_w, self.fc_c, self.tfc_h, self.tfc_w, self.proj)),
            (self.reweight, Mlp),
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
        if any(type(module) is not kind or not _untouched(module) for module, kind in kinds):
            return False
        # The function has no form for one BatchNorm frozen beside one in training, nor for dropout in the MLP.
        frozen = [_frozen(cast(nn.BatchNorm2d, phase[1]))[0] is not None for phase in phases]
        drop = cast(nn.Dropout, self.reweight.drop)
        return (
            frozen[0] == frozen[1]
            and (drop.p == 0 or not drop.training)
            and cast(nn.GELU, self.reweight.act).approximate == "none"
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recompute={self.recompute!r}"
