"""Layers as ``kernels.kernelize`` takes them: a forward each, without state. The module that calls it keeps its own
parameters, and is compared with ours when it first runs, as :func:`accelerate` does."""

from __future__ import annotations

import copy
import weakref

from torch import Tensor, nn

from wavemix_kernels import lookalikes

__all__ = ["PATM", "Waveblock"]

#: Module -> the same parts in our class.
_twins: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()


def _fused(module: nn.Module) -> nn.Module:
    twin = _twins.get(module)
    if twin is None:
        twin = copy.copy(module)  # the dicts of parameters and parts are shared, so both follow every change
        twin.__dict__.pop("forward", None)  # kernelize's
        replace = lookalikes.replacement(twin)
        if replace is None:
            raise TypeError(f"{type(module).__name__}: expected a Waveblock of WaveMix or a PATM of Wave-MLP")
        replace(twin)
        _twins[module] = twin
    twin.training = module.training
    return twin


class Waveblock(nn.Module):
    """Forward of WaveMix's ``Level1Waveblock`` to ``Level4Waveblock``: (N, C, H, W) -> the same shape.

    Raises:
        CannotReplace: the module's layers, or what it computes, differ from the published block's.
    """

    has_backward = True
    can_torch_compile = False

    def forward(self, x: Tensor) -> Tensor:
        return _fused(self)(x)


class PATM(nn.Module):
    """Forward of Wave-MLP's ``PATM``: (N, C, H, W) -> the same shape.

    Raises:
        CannotReplace: the module's layers, or what it computes, differ from the published block's.
    """

    has_backward = True
    can_torch_compile = False

    def forward(self, x: Tensor) -> Tensor:
        return _fused(self)(x)
