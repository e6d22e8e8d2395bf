"""Separable wavelet transforms of any filters."""

from wavemix_kernels.ops.dwt.op import dwt2d, idwt2d
from wavemix_kernels.ops.dwt.reference import Filters

__all__ = ["Filters", "dwt2d", "idwt2d"]
