"""Scattering layers on the dual-tree complex wavelet transform."""

from wavemix_kernels.pytorch_wavelets.scatternet.layers import ScatLayer, ScatLayerj2

__all__ = ["ScatLayer", "ScatLayerj2"]
