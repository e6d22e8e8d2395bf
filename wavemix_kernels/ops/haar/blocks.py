"""One level of Haar along any of the axes D, H, W, with the order, signs, scale and layout of the bands free.

Band k of ``haar_split`` is ``weight[k]`` times the sums and differences of ``pattern[k]``: with axes (2, 3, 4) bit 4
says differences along D, bit 2 along H, bit 1 along W; with fewer axes the last of them has bit 1. ``haar_join`` is the
exact transpose, so the two close under differentiation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wavemix_kernels import _native, backends
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import selftest
from wavemix_kernels.ops.common.autograd import differentiable
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.common.library import Library
from wavemix_kernels.ops.haar.batching import into_batch
from wavemix_kernels.ops.haar.op import inlined
from wavemix_kernels.ops.haar.reference import MODES, edge_of, extend, fold, half_up

#: Where the bands lie in memory: inside each channel, around the channels, around the batch.
LAYOUTS = ("channels", "bands", "batch")

_library = Library()
_library.define(
    "haar_split(Tensor x, int[] axes, int[] pattern, float[] weight, str mode, int front, bool repeat, str layout, "
    "str backend) -> Tensor"
)
_library.define(
    "haar_join(Tensor bands, int[] axes, int[] pattern, float[] weight, SymInt[] size, str mode, int front, "
    "bool repeat, str layout, bool channels_last, str backend) -> Tensor"
)


def split(
    x: Tensor, axes: Sequence[int], pattern: Sequence[int], weight: Sequence[float], *, mode: str = "zero",
    front: int = 0, repeat: bool = True, layout: str = "channels", backend: str = "auto",
) -> Tensor:  # fmt: skip
    """(N, C, D, H, W) -> (N, C, 2^axes, d, h, w).

    Args:
        axes: some of 2, 3, 4, ascending.
        mode: what stands past the end of an odd axis (:data:`~wavemix_kernels.ops.haar.reference.MODES`).
        front: how many frames stand in front of the first: the first itself (``repeat``) or zeros.
        layout: of :data:`LAYOUTS`.
    """
    args = (x, list(axes), list(pattern), list(weight), mode, front, repeat, layout, backend)
    return (_split if inlined(backend) else _split_op)(*args)


def join(
    bands: Tensor, axes: Sequence[int], pattern: Sequence[int], weight: Sequence[float], size: Sequence[int], *,
    mode: str = "zero", front: int = 0, repeat: bool = True, layout: str = "channels", channels_last: bool = False,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """The transpose of :func:`split`: (N, C, 2^axes, d, h, w) -> (N, C, *size). With mode "zero" and ``repeat`` off it
    crops, which is what inverse transforms do."""
    args = (bands, list(axes), list(pattern), list(weight), list(size), mode, front, repeat, layout, channels_last)
    return (_join if inlined(backend) else _join_op)(*args, backend)


def is_channels_last(x: Tensor) -> bool:
    """Whether channels are innermost in memory."""
    return x.shape[1] > 1 and 0 < x.stride(1) < x.stride(-1)


def _counts(size: Sequence[int], axes: Sequence[int], front: int) -> list[int]:
    fronts = (front, 0, 0)
    return [half_up(n + f) if i + 2 in axes else n for i, (n, f) in enumerate(zip(size, fronts, strict=True))]


def _empty_bands(x: Tensor, axes: Sequence[int], front: int, layout: str, count: int = 0) -> Tensor:
    """(N, C, K, d, h, w); K: ``count``, else all bands."""
    n, c, *size = x.shape
    around = {"n": n, "c": c, "k": count or 2 ** len(axes)} | dict(zip("dhw", _counts(size, axes, front), strict=True))
    inside = {"channels": "ck", "bands": "kc", "batch": "c"}[layout]
    order = f"ndhw{inside}" if is_channels_last(x) else f"n{inside}dhw"
    order = f"k{order}" if layout == "batch" else order
    return x.new_empty([around[a] for a in order]).permute([order.index(a) for a in "nckdhw"])


def _empty_image(bands: Tensor, size: Sequence[int], channels_last: bool) -> Tensor:
    n, c = bands.shape[:2]
    if channels_last:
        return bands.new_empty([n, *size, c]).permute(0, 4, 1, 2, 3)
    return bands.new_empty([n, c, *size])


# --- By standard operators -------------------------------------------------------------------------------


def _extended(x: Tensor, axes: Sequence[int], mode: str, front: int, repeat: bool) -> Tensor:
    if front:
        first = x[:, :, :1] if repeat else torch.zeros_like(x[:, :, :1])
        x = torch.cat([first] * front + [x], 2)
    for axis in axes:
        x = extend(x, axis, mode)
    return x


def _folded(x: Tensor, axes: Sequence[int], size: Sequence[int], mode: str, front: int, repeat: bool) -> Tensor:
    """The transpose of :func:`_extended`."""
    for axis in axes:
        x = fold(x, axis, size[axis - 2] + (front if axis == 2 else 0), mode)
    if front:
        before, x = x[:, :, :front], x[:, :, front:]
        if repeat:
            x = torch.cat((x[:, :, :1] + before.sum(2, keepdim=True), x[:, :, 1:]), 2)
    return x


def _split_standard(
    x: Tensor, axes: list[int], pattern: list[int], weight: list[float], mode: str, front: int, repeat: bool,
    layout: str, backend: str,
) -> Tensor:  # fmt: skip
    parts = [_extended(x.to(accumulate_dtype(x.dtype)), axes, mode, front, repeat)]
    for axis in axes:
        even, odd = (slice(None),) * axis + (slice(0, None, 2),), (slice(None),) * axis + (slice(1, None, 2),)
        parts = [part for p in parts for part in (p[even] + p[odd], p[even] - p[odd])]
    return torch.stack([w * parts[p] for p, w in zip(pattern, weight, strict=True)], 2).to(x.dtype)


def _join_standard(
    bands: Tensor, axes: list[int], pattern: list[int], weight: list[float], size: list[int], mode: str, front: int,
    repeat: bool, layout: str, channels_last: bool, backend: str,
) -> Tensor:  # fmt: skip
    wide = bands.to(accumulate_dtype(bands.dtype))
    parts = [wide[:, :, pattern.index(p)] * weight[pattern.index(p)] for p in range(len(pattern))]
    for axis in reversed(axes):
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [torch.stack((a + b, a - b), axis + 1).flatten(axis, axis + 1) for a, b in pairs]
    return _folded(parts[0], axes, size, mode, front, repeat).to(bands.dtype)


# --- The kernel ------------------------------------------------------------------------------------------


def described(
    x: Tensor, bands: Tensor, axes: Sequence[int], pattern: Sequence[int], weight: Sequence[float], mode: str,
    front: int, repeat: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments of the CPU's kernel that follow from shapes and strides."""
    y_stride = [bands.stride(0), bands.stride(1), *bands.stride()[3:]]
    # Rows go along the axis that is innermost in memory, or along the channels where frames stand in front of it.
    inner = min((i for i in range(5) if x.shape[i] > 1), key=lambda i: (x.stride(i), -i), default=4)
    inner = 1 if inner == 2 and front else inner
    order = [a for a in axes if a != inner] + [a for a in axes if a == inner]
    along, edges = [], []
    for axis in order:
        n, before = x.shape[axis], front if axis == 2 else 0
        edge = edge_of(mode, n + before)
        source = n - 1 if edge.last else max(n - 2, 0) if edge.before else 0
        along.append((n, half_up(n + before), x.stride(axis), y_stride[axis], before, source))
        edges.append((float(repeat), edge.last or edge.before or edge.first))
    places = [len(axes) - 1 - order.index(a) for a in axes]  # the kernel's bit of each axis
    bits = [sum((p >> len(axes) - 1 - i & 1) << place for i, place in enumerate(places)) for p in pattern]
    outer = [(x.shape[i], x.stride(i), y_stride[i]) for i in range(5) if i not in axes and i != inner]
    row = () if inner in axes else (x.shape[inner], x.stride(inner), y_stride[inner])
    return along, edges, bits, weight, outer, row


def _cpu(
    analysis: bool, x: Tensor, bands: Tensor, axes: Sequence[int], pattern: Sequence[int], weight: Sequence[float],
    mode: str, front: int, repeat: bool,
) -> None:  # fmt: skip
    if x.numel() == 0:
        return
    band = [k * bands.stride(2) for k in range(len(pattern))]
    more = described(x, bands, axes, pattern, weight, mode, front, repeat)
    core: Any = _native.core
    core.haar_blocks_cpu(
        analysis, _native.DTYPES[x.dtype], x.data_ptr(), bands.data_ptr(), band, *more, torch.get_num_threads()
    )


def _triton(*args: Any) -> None:
    from wavemix_kernels.ops.haar.triton_blocks import run

    run(*args)


BACKENDS: dict[str, backends.Backend] = {
    "triton": backends.Backend(backends.triton_why_not, {"run": _triton}),
    "cpu": backends.Backend(backends.cpu_why_not, {"run": _cpu}),
    "reference": backends.Backend(backends.reference_why_not, {}),
}


def _split(
    x: Tensor, axes: list[int], pattern: list[int], weight: list[float], mode: str, front: int, repeat: bool,
    layout: str, backend: str,
) -> Tensor:  # fmt: skip
    chosen = choose.select("haar_split", BACKENDS, backend, x)
    bands = _empty_bands(x, axes, front, layout)
    if not chosen.functions:
        return bands.copy_(_split_standard(x, axes, pattern, weight, mode, front, repeat, layout, backend))
    edge = MODES[mode]
    if edge.last and edge.before:  # the missing sample comes from two others
        for axis in axes:
            x = x if axis == 2 and front else extend(x, axis, mode)
        if front:
            x, front = extend(_extended(x, (), mode, front, repeat), 2, mode), 0
    chosen.functions["run"](True, x, bands, axes, pattern, weight, mode, front, repeat)
    return bands


def _join(
    bands: Tensor, axes: list[int], pattern: list[int], weight: list[float], size: list[int], mode: str, front: int,
    repeat: bool, layout: str, channels_last: bool, backend: str,
) -> Tensor:  # fmt: skip
    chosen = choose.select("haar_join", BACKENDS, backend, bands)
    if not chosen.functions:
        args = (axes, pattern, weight, size, mode, front, repeat, layout, channels_last, backend)
        return _empty_image(bands, size, channels_last).copy_(_join_standard(bands, *args))
    folds = (repeat and front > 0) or (
        any(MODES[mode]) and any((size[a - 2] + (front if a == 2 else 0)) % 2 for a in axes)
    )
    if not folds:
        image = _empty_image(bands, size, channels_last)
        chosen.functions["run"](False, image, bands, axes, pattern, weight, "zero", front, False)
        return image
    whole = [2 * m if i + 2 in axes else m for i, m in enumerate(bands.shape[3:])]
    image = _empty_image(bands, whole, channels_last)
    chosen.functions["run"](False, image, bands, axes, pattern, weight, "zero", 0, False)
    return _empty_image(bands, size, channels_last).copy_(_folded(image, axes, size, mode, front, repeat))


def _split_fake(
    x: Tensor, axes: list[int], pattern: list[int], weight: list[float], mode: str, front: int, repeat: bool,
    layout: str, backend: str,
) -> Tensor:  # fmt: skip
    return _empty_bands(x, axes, front, layout)


def _join_fake(
    bands: Tensor, axes: list[int], pattern: list[int], weight: list[float], size: list[int], mode: str, front: int,
    repeat: bool, layout: str, channels_last: bool, backend: str,
) -> Tensor:  # fmt: skip
    return _empty_image(bands, size, channels_last)


_library.impl("haar_split", _split, "CompositeExplicitAutograd")
_library.impl("haar_join", _join, "CompositeExplicitAutograd")
torch.library.register_fake("wavemix_kernels::haar_split", _split_fake, lib=_library)
torch.library.register_fake("wavemix_kernels::haar_join", _join_fake, lib=_library)


# --- Gradients: each is the other ------------------------------------------------------------------------


def _split_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.rule, ctx.mode, ctx.front, ctx.repeat, ctx.layout, ctx.backend = inputs
    ctx.size, ctx.channels_last = x.shape[2:], is_channels_last(x)


def _split_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    border = (ctx.mode, ctx.front, ctx.repeat, ctx.layout)
    return _join_op(grad, *ctx.rule, list(ctx.size), *border, ctx.channels_last, ctx.backend), *[None] * 8


def _join_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.rule, _, ctx.mode, ctx.front, ctx.repeat, ctx.layout, _, ctx.backend = inputs


def _join_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    border = (ctx.mode, ctx.front, ctx.repeat, ctx.layout)
    return _split_op(grad, *ctx.rule, *border, ctx.backend), *[None] * 10


_split_op = differentiable(_library, "haar_split", _split_setup, _split_backward, standard=_split_standard, linear=True)
_join_op = differentiable(_library, "haar_join", _join_setup, _join_backward, standard=_join_standard, linear=True)


def _batched(name: str) -> Any:
    def rule(info: Any, in_dims: tuple[Any, ...], given: Tensor, *rest: Any) -> tuple[Tensor, int]:
        op = getattr(torch.ops.wavemix_kernels, name)
        out = op(into_batch(given, in_dims[0], info.batch_size), *rest)
        return out.unflatten(0, (info.batch_size, -1)), 0

    return rule


for _name in ("haar_split", "haar_join"):
    torch.library.register_vmap(f"wavemix_kernels::{_name}", _batched(_name), lib=_library)


def self_test(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """A volume of odd sizes with a frame in front, there and, the bands scaled, back, and the gradient of that:
    (error, bound)."""
    axes, pattern, weight = [2, 3, 4], [0, 2, 1, 3, 4, 6, 5, 7], [0.25, -0.5, 0.75, 1.0, -0.25, 0.5, 0.125, 0.5]
    size = [4, 5, 7]

    def run(there: Any, back: Any, name: str, x: Tensor) -> list[Tensor]:
        bands = there(x, axes, pattern, weight, "symmetric", 1, True, "bands", name)
        return [bands, back(bands, axes, pattern, weight, size, "zero", 1, False, "bands", False, name)]

    error = selftest.against_reference(
        lambda x: run(_split_op, _join_op, backend, x),
        lambda x: run(_split_standard, _join_standard, "reference", x),
        [selftest.pattern(2, 3, *size)],
        device,
        dtype,
    )
    return error, selftest.rounding_bound(2 * 8, dtype)
