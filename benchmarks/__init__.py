"""Benchmarks: every implementation of an operation side by side, in one run, checked before it is timed.

``python -m benchmarks`` from a checkout, ``python -m wavemix_kernels bench`` after an install; ``benchmarks/gpu.sh``
for a machine with a GPU.
"""
