"""A round of Haar whose bands lie in one tensor, or each in its own: :func:`haar_split` and :func:`haar_join` of
:mod:`wavemix_kernels.ops.haar.blocks` with the layouts of other people's codes.

On a CPU an eager call costs one allocation, one kernel and one node of autograd: what follows from shapes is worked out
once (:func:`_there`, :func:`_back`), and the kernel writes bands where they are wanted. Everything else goes by the
operators and views of their results.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wavemix_kernels import _native
from wavemix_kernels.ops import choose, tuned
from wavemix_kernels.ops.common import plan
from wavemix_kernels.ops.haar import blocks
from wavemix_kernels.ops.haar.reference import MODES

#: How a layout's bands lie side by side in memory (:data:`wavemix_kernels.ops.haar.blocks.LAYOUTS`).
_INSIDE = {
    "channels": "channels", "inside": "channels", "bands": "bands", "around": "bands", "batch": "batch",
    "separate": "batch",
}  # fmt: skip


class Rule(NamedTuple):
    """The definition of a round.

    Attributes:
        axes, order, weight, mode, front, repeat: as for :func:`wavemix_kernels.ops.haar.blocks.split`; tuples.
        layout: "bands", "channels", "batch": (N, K * C, ...), (N, C * K, ...), (K * N, C, ...); "around", "inside":
            (N, K, C, ...), (N, C, K, ...); "separate": K tensors (N, C, ...).
        held: K; the bands after the first K are not returned, and zero in the synthesis.
    """

    axes: tuple[int, ...]
    order: tuple[int, ...]
    weight: tuple[float, ...]
    layout: str
    held: int
    mode: str = "zero"
    front: int = 0
    repeat: bool = True


def analysis(x: Tensor, rule: Rule, backend: str) -> tuple[Tensor, ...]:
    """The bands of ``x``, of three to five dimensions, the last of which are D, H and W as far as it has them: one
    tensor, or those of layout "separate". Differentiable any number of times."""
    if _quick("haar_split", (x,), backend) and not _border(rule):
        if x.requires_grad and torch.is_grad_enabled():
            found = _Analysis.apply(x, rule, backend)
            return found if isinstance(found, tuple) else (found,)
        return _analysed(x, rule, _there(x.shape, x.stride(), x.dtype, rule))
    axes, order, weight, layout, held, mode, front, repeat = rule
    bands = blocks.split(
        volume(x, 2), axes, order, weight, mode=mode, front=front, repeat=repeat, layout=_INSIDE[layout],
        backend=backend,
    )  # fmt: skip
    return _parted(bands if held == 2 ** len(axes) else bands[:, :, :held], layout, x.dim())


def synthesis(
    bands: Sequence[Tensor], rule: Rule, size: Sequence[int], channels_last: bool, backend: str
) -> Tensor:  # fmt: skip
    """The transpose of :func:`analysis`: an image whose last dimensions are those of ``size``, (D, H, W)."""
    first = bands[0]
    dims = first.dim() - (rule.layout in ("around", "inside"))
    if _quick("haar_join", bands, backend) and not _folds(size, rule):
        if torch.is_grad_enabled() and any(b.requires_grad for b in bands):
            return _Synthesis.apply(rule, tuple(size), channels_last, backend, *bands)
        return _synthesised(bands, rule, tuple(size), channels_last)
    axes, order, weight, layout, held, mode, front, repeat = rule
    if layout == "separate":
        block = torch.cat([volume(b, 2).unsqueeze(1) for b in bands], 1).transpose(1, 2)
    else:
        block = volume(_apart(first, layout, held), 3)
    if (missing := 2 ** len(axes) - held) > 0:
        n, c, _, *sizes = block.shape
        block = torch.cat((block, block.new_zeros(n, c, missing, *sizes)), 2)
    inside = "bands" if layout == "separate" else _INSIDE[layout]
    image = blocks.join(
        block, axes, order, weight, size, mode=mode, front=front, repeat=repeat, layout=inside,
        channels_last=channels_last, backend=backend,
    )  # fmt: skip
    return flat(image, dims, 2)


def volume(x: Tensor, at: int) -> Tensor:
    """``x`` with axes of size 1 inserted at axis ``at``, until three follow it."""
    while x.dim() < at + 3:
        x = x.unsqueeze(at)
    return x


def flat(x: Tensor, dims: int, at: int) -> Tensor:
    """The inverse of :func:`volume` for an image of ``dims`` dimensions."""
    for _ in range(5 - dims):
        x = x.squeeze(at)
    return x


def _parted(bands: Tensor, layout: str, dims: int) -> tuple[Tensor, ...]:
    """(N, C, K, D, H, W) as tensors of a layout: views."""
    bands = flat(bands, dims, 3)
    if layout == "channels":
        return (bands.flatten(1, 2),)
    if layout == "bands":
        return (bands.transpose(1, 2).flatten(1, 2),)
    if layout == "batch":
        return (bands.movedim(2, 0).flatten(0, 1),)
    if layout == "around":
        return (bands.transpose(1, 2),)
    if layout == "inside":
        return (bands,)
    return tuple(bands[:, :, k] for k in range(bands.shape[2]))  # not unbind, whose views refuse writes


def _apart(joined: Tensor, layout: str, count: int) -> Tensor:
    """(N, C, K, ...) of a joined tensor: a view."""
    if layout == "inside":
        return joined
    if layout == "around":
        return joined.transpose(1, 2)
    axis = 0 if layout == "batch" else 1
    if joined.shape[axis] % count:
        raise ValueError(f"bands: expected a multiple of {count} on axis {axis}, got shape {tuple(joined.shape)}")
    if layout == "channels":
        return joined.unflatten(1, (-1, count))
    if layout == "bands":
        return joined.unflatten(1, (count, -1)).transpose(1, 2)
    return joined.unflatten(0, (count, -1)).movedim(0, 2)


# --- Eager calls on a CPU --------------------------------------------------------------------------------


def _quick(op: str, tensors: Sequence[Tensor], backend: str) -> bool:
    """Whether the CPU's kernel serves an eager call that nobody watches."""
    if torch.compiler.is_compiling() or tuned.watching() or not plan.unseen(tensors):
        return False
    first = tensors[0]
    if first.numel() == 0 or not all(t.is_cpu and t.dtype == first.dtype for t in tensors):
        return False
    return choose.select(op, blocks.BACKENDS, backend, first) is blocks.BACKENDS["cpu"]


def _border(rule: Rule) -> bool:
    """Whether a sample that is not there may come from two others."""
    edge = MODES[rule.mode]
    return bool(edge.last and edge.before)


def _folds(size: Sequence[int], rule: Rule) -> bool:
    """Whether the transpose adds to samples what stood beyond the image's end."""
    if rule.front:
        return rule.repeat or any(MODES[rule.mode])
    return any(MODES[rule.mode]) and any(size[axis - 2] % 2 for axis in rule.axes)


class _Launch(NamedTuple):
    """A round's output and the kernel's arguments, as far as shapes decide them.

    Attributes:
        shape, stride: of the output.
        band: where each band lies; empty: bands have tensors of their own.
        more: the kernel's other arguments.
        size: of the image, (D, H, W).
        channels_last: whether the image is.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    band: list[int]
    more: tuple[Any, ...]
    size: tuple[int, ...]
    channels_last: bool


@functools.lru_cache(maxsize=4096)
def _there(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, rule: Rule) -> _Launch:
    x = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    image = volume(x, 2)
    bands = blocks._empty_bands(image, rule.axes, rule.front, _INSIDE[rule.layout], rule.held)
    out = _parted(bands, rule.layout, x.dim())[0]
    band = [] if rule.layout == "separate" else [k * bands.stride(2) for k in range(rule.held)]
    return _Launch(
        tuple(out.shape), out.stride(), band, _described(image, bands, rule), tuple(image.shape[2:]),
        blocks.is_channels_last(image),
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _back(
    shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, rule: Rule, size: tuple[int, ...],
    channels_last: bool,
) -> _Launch:  # fmt: skip
    first = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    separate = rule.layout == "separate"
    dims = first.dim() - (rule.layout in ("around", "inside"))
    bands = volume(first, 2).unsqueeze(2) if separate else volume(_apart(first, rule.layout, rule.held), 3)
    image = blocks._empty_image(bands, size, channels_last)
    out = flat(image, dims, 2)
    band = [] if separate else [k * bands.stride(2) for k in range(rule.held)]
    plain = rule._replace(mode="zero", repeat=False)
    return _Launch(tuple(out.shape), out.stride(), band, _described(image, bands, plain), size, channels_last)


def _described(image: Tensor, bands: Tensor, rule: Rule) -> tuple[Any, ...]:
    return blocks.described(image, bands, rule.axes, rule.order, rule.weight, rule.mode, rule.front, rule.repeat)


def _run(there: bool, launch: _Launch, x: Tensor, bands: Sequence[Tensor]) -> None:
    to = bands[0].data_ptr()
    band = launch.band or [(b.data_ptr() - to) // x.element_size() for b in bands]
    core: Any = _native.core
    core.haar_blocks_cpu(
        there, _native.DTYPES[x.dtype], x.data_ptr(), to, band, *launch.more, torch.get_num_threads()
    )  # fmt: skip


def _analysed(x: Tensor, rule: Rule, launch: _Launch) -> tuple[Tensor, ...]:
    count = 1 if launch.band else rule.held
    bands = tuple([x.new_empty_strided(launch.shape, launch.stride) for _ in range(count)])
    _run(True, launch, x, bands)
    return bands


def _synthesised(bands: Sequence[Tensor], rule: Rule, size: tuple[int, ...], channels_last: bool) -> Tensor:
    first = bands[0]
    if len(bands) > 1:
        stride, unit = first.stride(), first.element_size()
        at = first.data_ptr() % unit
        if any(b.stride() != stride or b.data_ptr() % unit != at for b in bands):
            bands = [b.contiguous() for b in bands]
            first = bands[0]
    launch = _back(first.shape, first.stride(), first.dtype, rule, size, channels_last)
    image = first.new_empty_strided(launch.shape, launch.stride)
    _run(False, launch, image, bands)
    return image


class _Analysis(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: Rule, backend: str) -> Any:
        launch = _there(x.shape, x.stride(), x.dtype, rule)
        ctx.given = rule, launch.size, launch.channels_last, backend
        found = _analysed(x, rule, launch)
        return found if len(found) > 1 else found[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rule, size, channels_last, backend = ctx.given
        return synthesis(grads, rule, size, channels_last, backend), None, None


class _Synthesis(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rule: Rule, size: tuple[int, ...], channels_last: bool, backend: str, *bands: Tensor
    ) -> Tensor:  # fmt: skip
        ctx.given = rule, backend
        return _synthesised(bands, rule, size, channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *analysis(grad, *ctx.given)
