"""Pure-PyTorch models and operators: the specification, and the path for devices without kernels."""

from wavemix_kernels.reference.expansion import Expansion
from wavemix_kernels.reference.patm import PATM
from wavemix_kernels.reference.waveblock import Waveblock

__all__ = ["PATM", "Expansion", "Waveblock"]
