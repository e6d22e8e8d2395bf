"""Triton kernels, a file per family. Only importing a kernel module imports triton."""
