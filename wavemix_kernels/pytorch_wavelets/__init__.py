"""Drop-in for `pytorch_wavelets`: same constructors, results and state dicts, modules at the same paths.

docs/use/wavelets.md says where the original and PyWavelets differ, and which of them is followed.
"""

from wavemix_kernels.pytorch_wavelets.dtcwt.transform2d import DTCWTForward, DTCWTInverse
from wavemix_kernels.pytorch_wavelets.dwt.swt import SWTForward, SWTInverse
from wavemix_kernels.pytorch_wavelets.dwt.transform1d import DWT1DForward, DWT1DInverse
from wavemix_kernels.pytorch_wavelets.dwt.transform2d import DWTForward, DWTInverse
from wavemix_kernels.pytorch_wavelets.scatternet import ScatLayer, ScatLayerj2
from wavemix_kernels.pytorch_wavelets.wavelets import WaveletLike

__all__ = [
    "DTCWT", "DWT", "DWT1D", "DWT2D", "IDTCWT", "IDWT", "IDWT1D", "IDWT2D", "DTCWTForward", "DTCWTInverse",
    "DWT1DForward", "DWT1DInverse", "DWTForward", "DWTInverse", "SWTForward", "SWTInverse", "ScatLayer", "ScatLayerj2",
    "WaveletLike",
]  # fmt: skip

DTCWT = DTCWTForward
IDTCWT = DTCWTInverse
DWT = DWT2D = DWTForward
IDWT = IDWT2D = DWTInverse
DWT1D = DWT1DForward
IDWT1D = DWT1DInverse
