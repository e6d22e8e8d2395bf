"""The Haar transform: analysis and synthesis in 1-D, 2-D and 3-D, the bands as others write them, the Waveblock's
pyramid."""

from wavemix_kernels.ops.haar.conventions import (
    CONVENTIONS,
    Convention,
    haar_bands2d,
    haar_bands3d,
    haar_from_bands2d,
    haar_from_bands3d,
)
from wavemix_kernels.ops.haar.op import haar_dwt2d, haar_idwt2d
from wavemix_kernels.ops.haar.pyramid import haar_pyramid
from wavemix_kernels.ops.haar.volumes import BANDS3D, haar_dwt1d, haar_dwt3d, haar_idwt1d, haar_idwt3d

__all__ = [
    "BANDS3D",
    "CONVENTIONS",
    "Convention",
    "haar_bands2d",
    "haar_bands3d",
    "haar_dwt1d",
    "haar_dwt2d",
    "haar_dwt3d",
    "haar_from_bands2d",
    "haar_from_bands3d",
    "haar_idwt1d",
    "haar_idwt2d",
    "haar_idwt3d",
    "haar_pyramid",
]
