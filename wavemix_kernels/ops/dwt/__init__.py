"""Separable wavelet transforms of any filters."""

from wavemix_kernels.ops.dwt.op import dwt1d, dwt2d, idwt1d, idwt2d
from wavemix_kernels.ops.dwt.reference import Filters

__all__ = ["Filters", "dwt1d", "dwt2d", "idwt1d", "idwt2d"]
