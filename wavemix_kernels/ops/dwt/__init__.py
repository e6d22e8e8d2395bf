"""Separable wavelet transforms of any filters."""
