"""FusedWaveblock: the reference Waveblock's parameters and results on the fused operators."""

from __future__ import annotations

from torch import Tensor

from wavemix_kernels.ops.haar import haar_dwt2d
from wavemix_kernels.reference.waveblock import Waveblock


class FusedWaveblock(Waveblock):
    __doc__ = Waveblock.__doc__

    def analyse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ll, (high,) = haar_dwt2d(x)
        return ll, high
