"""The cases of a Waveblock's reduction: by itself, and behind the block before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .case import BF16, Case, vector
from .case import operator as _op
from .record import image


def _reduce_haar(
    backend: str, c: int, level: int, last: bool, backward: bool, size: tuple[int, int] = (64, 64)
) -> Callable[[], Any]:
    n, side = size

    def run() -> Any:
        x, weight, bias = image((n, c, side, side), BF16, last), image((c // 4, c, 1, 1)), image((c // 4,))
        if not backward:
            return _op("reduce_haar")(x, weight, bias, level, True, backend)
        grads = [image((n, c, side >> i, side >> i), BF16, True) for i in range(1, level + 1)]
        return _op("reduce_haar_backward")(grads, x, weight, x, True, backend)

    return run


def _norm_reduce_haar(c: int, level: int, backward: bool) -> Callable[[], Any]:
    def run() -> Any:
        x, y = (image((64, c, 64, 64), BF16, True) for _ in range(2))
        weight, bias = image((c // 4, c, 1, 1)), image((c // 4,))
        if not backward:
            return _op("norm_reduce_haar")(y, vector(c), vector(c), x, weight, bias, level, "cuda")
        grads = [image((64, c, 64 >> i, 64 >> i), BF16, True) for i in range(1, level + 1)]
        of_norm = vector(c), vector(c), vector(c)
        return _op("norm_reduce_haar_backward")(grads, x, x, weight, True, y, *of_norm, "cuda")

    return run


def norm_reduce_haar_cases() -> Iterator[Case]:
    c, product = 192, 2.0 * 64 * 64 * 64 * 192 * 48
    flops = {"norm_reduce_haar": product, "reduce_haar_gradients": 2 * product}
    for level in (1, 3):
        shape = f"L{level} 64x{c}x64x64"
        yield Case(f"cuda norm_reduce_haar {shape}", _norm_reduce_haar(c, level, False), flops)
        yield Case(f"cuda norm_reduce_haar gradients {shape}", _norm_reduce_haar(c, level, True), flops)


def reduce_haar_cases() -> Iterator[Case]:
    for c, level, last in ((192, 1, True), (192, 1, False), (192, 3, True), (192, 3, False), (144, 1, True)):
        product = 2.0 * 64 * 64 * 64 * c * c / 4
        shape = f"L{level} {'channels_last' if last else 'nchw'} 64x{c}x64x64"
        for backend in ("cuda", "triton"):
            flops = {"reduce_haar": product, "_reduce_haar_kernel": product}
            yield Case(f"{backend} reduce_haar {shape}", _reduce_haar(backend, c, level, last, False), flops)
        flops = {"reduce_haar_gradients": 2 * product, "_backward_kernel": 2 * product}
        for backend in ("cuda", "triton"):
            made = _reduce_haar(backend, c, level, last, True)
            yield Case(f"{backend} reduce_haar gradients {shape}", made, flops)
    for c, size in ((8, (1024, 28)), (32, (1024, 32))):  # WaveMix-Lite's
        for backward, what in ((False, "reduce_haar"), (True, "reduce_haar gradients")):
            made = _reduce_haar("triton", c, 1, True, backward, size)
            yield Case(f"triton {what} L1 channels_last {size[0]}x{c}x{size[1]}x{size[1]}", made)
