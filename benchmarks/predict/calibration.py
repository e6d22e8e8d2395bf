"""Published times of public kernels of our kinds, predicted by the same code.

Only what names its card, its sizes and a kernel that can be compiled here is taken; each row names its source. Nothing
was found for kernels with matrix products at shapes and tiles like ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .bound import predict
from .chips import CHIPS
from .record import Array, Launch


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    """Triton's first tutorial."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    tl.store(out + at, tl.load(x + at, mask=mask) + tl.load(y + at, mask=mask), mask=mask)


@triton.jit
def copy_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def softmax_kernel(out, x, x_stride, out_stride, columns, BLOCK: tl.constexpr):
    """Triton's second tutorial before it became persistent: a row a program."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    values = tl.load(x + row * x_stride + at, mask=at < columns, other=-float("inf"))
    powers = tl.exp(values - tl.max(values, axis=0))
    tl.store(out + row * out_stride + at, powers / tl.sum(powers, axis=0), mask=at < columns)


@triton.jit
def layer_norm_kernel(x, y, weight, bias, mean, rstd, stride, n, eps, BLOCK: tl.constexpr):
    """Triton's fifth tutorial, forward."""
    row = tl.program_id(0)
    y += row * stride
    x += row * stride
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
    center = tl.sum(total, axis=0) / n
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
        value = tl.where(at < n, value - center, 0.0)
        total += value * value
    scale = 1 / tl.sqrt(tl.sum(total, axis=0) / n + eps)
    tl.store(mean + row, center)
    tl.store(rstd + row, scale)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < n
        w, b = tl.load(weight + at, mask=mask), tl.load(bias + at, mask=mask)
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + at, (value - center) * scale * w + b, mask=mask)


@dataclass(frozen=True)
class Row:
    """A published time beside ours.

    Attributes:
        published: seconds of the kernel: the source's, less `fixed`.
        fixed: seconds that timing one launch by events adds, where the source shows it: what is left of its two largest
            sizes at the speed at which the larger one's time grows.
        predicted: seconds of the kernel.
        source: where the number stands.
    """

    name: str
    chip: str
    published: float
    fixed: float
    predicted: float
    source: str

    @property
    def error(self) -> float:
        """The prediction's error, relative to the published time."""
        return self.predicted / self.published - 1


def _arrays(*shapes: tuple[tuple[int, ...], torch.dtype]) -> list[Array]:
    made, at = [], 1 << 44
    for shape, dtype in shapes:
        count = torch.Size(shape).numel()
        made.append(Array(dtype, shape, (), at, count * dtype.itemsize))
        at += count * dtype.itemsize + 4096
    return made


def _launch(kernel: Any, grid: int, arrays: list[Array], scalars: tuple[Any, ...], constants: dict[str, Any]) -> Launch:
    constants = {**constants, "enable_fp_fusion": True}  # as when the times were published; Triton 3.10 changes it
    return Launch(
        "triton", kernel.fn.__name__, "", sum(a.bytes for a in arrays), tuple(arrays), (grid,),
        32 * constants["num_warps"], 0, kernel, (*arrays, *scalars), constants,
    )  # fmt: skip


def _add(n: int) -> Launch:
    arrays = _arrays(*[((n,), torch.float32)] * 3)
    return _launch(add_kernel, -(-n // 1024), arrays, (n,), {"BLOCK": 1024, "num_warps": 4})


def _copy(n: int) -> Launch:
    arrays = _arrays(*[((n,), torch.bfloat16)] * 2)
    return _launch(copy_kernel, -(-n // 2048), arrays, (n,), {"BLOCK": 2048, "num_warps": 4})


def _softmax(rows: int, columns: int) -> Launch:
    out, x = _arrays(*[((rows, columns), torch.float32)] * 2)
    block = triton.next_power_of_2(columns)
    warps = 16 if block >= 4096 else 8 if block >= 2048 else 4
    constants = {"BLOCK": block, "num_warps": warps}
    return _launch(softmax_kernel, rows, [out, x], (columns, columns, columns), constants)


def _layer_norm(rows: int, columns: int) -> Launch:
    half, wide = torch.float16, torch.float32
    image, vector, of_rows = ((rows, columns), half), ((columns,), half), ((rows,), wide)
    arrays = _arrays(image, image, vector, vector, of_rows, of_rows)
    block = triton.next_power_of_2(columns)
    constants = {"BLOCK": block, "num_warps": min(max(block // 256, 1), 8)}
    return _launch(layer_norm_kernel, rows, arrays, (columns, columns, 1e-5), constants)


_ADD = "github.com/triton-lang/triton/pull/3894"
_SOFTMAX = "github.com/triton-lang/triton/pull/3766"
_LAYER_NORM = "github.com/allenai/OLMo/issues/258"
_COPY = "github.com/pytorch/ao/pull/4247"
#: name, chip, launch, bytes that the source divides by the time, its GB/s, source.
_PUBLISHED: list[tuple[str, str, Callable[[], Launch], float, float, str]] = [
    *(
        (f"vector add, 2^{power} fp32", "a100", lambda p=power: _add(2**p), 12.0 * 2**power, speed, _ADD)
        for power, speed in ((22, 1206.2), (24, 1546.6), (25, 1620.5), (26, 1665.2), (27, 1682.8))
    ),
    *(
        (f"LayerNorm, 4096 x {n} fp16", "a100", lambda n=n: _layer_norm(4096, n), 16384.0 * n, speed, _LAYER_NORM)
        for n, speed in ((4096, 1129.9), (8192, 1379.7))
    ),
    *(
        (f"softmax, 4096 x {n} fp32", "h100", lambda n=n: _softmax(4096, n), 32768.0 * n, speed, _SOFTMAX)
        for n, speed in ((256, 809.1), (512, 1236.5), (768, 1432.5), (12160, 1900.8), (12672, 1929.8))
    ),
    *(
        (f"copy, 2048 x {n} bf16", "b200", lambda n=n: _copy(2048 * n), 4096.0 * n, speed, _COPY)
        for n, speed in ((8192, 2048.0), (14336, 2389.3), (28672, 2740.9))
    ),
]  # fmt: skip
#: Facts that the sources leave open.
NOTES = (
    "vector add and copy: the chips' copy bandwidths come from the two largest sizes of these rows, so that only the "
    "smaller ones test the prediction",
    "softmax: nothing is taken off for the timing of one launch, which is most of the small sizes; the source says "
    "H100 and not which; at 4096 x 12672 it reaches 1.93 TB/s, near a PCIe card's memory (2.0 TB/s) and far from an "
    "SXM one's (3.35 TB/s), for which we predict",
    "LayerNorm: the source says A100, and not which, nor the dtype, for which the tutorial's is taken",
    "copy: the source's card is a GB200, whose memory is a B200's; its GB/s count the read alone",
)


def rows() -> list[Row]:
    """Every published number beside its prediction.

    Raises:
        tools.Missing: a compiler is missing.
    """
    found = []
    for name, chip_name, launch, moved, speed, source in _PUBLISHED:
        seconds, fixed = moved / (speed * 1e9), _fixed(source)
        predicted = predict(launch(), CHIPS[chip_name]).seconds
        found.append(Row(name, chip_name, seconds - fixed, fixed, predicted, source))
    return found


def _fixed(source: str) -> float:
    if source not in (_ADD, _COPY):  # others are no streams, whose time is a straight line
        return 0.0
    sizes = sorted((moved, moved / (speed * 1e9)) for _, _, _, moved, speed, of in _PUBLISHED if of == source)
    (small, short), (large, long) = sizes[-2:]
    return long - large * (long - short) / (large - small)
