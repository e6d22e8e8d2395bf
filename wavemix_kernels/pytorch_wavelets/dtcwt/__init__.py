"""The dual-tree complex wavelet transform."""
