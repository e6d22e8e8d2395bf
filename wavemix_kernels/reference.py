"""Pure-PyTorch models: the specification, and the path for devices without kernels.

The functions that the kernels are held to stand beside them: ``wavemix_kernels.ops.<family>.reference``.
"""

from wavemix_kernels.nn.wavemix.reference import Expansion, ShuffleWaveblock, Waveblock
from wavemix_kernels.nn.wavemlp.reference import PATM, Mlp, WaveBlock

__all__ = ["PATM", "Expansion", "Mlp", "ShuffleWaveblock", "WaveBlock", "Waveblock"]
