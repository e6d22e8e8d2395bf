"""Triton kernels, one file per family. Importing a kernel module imports triton; this package alone does not."""
