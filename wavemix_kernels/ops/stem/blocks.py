"""Convolutions as one of an image's blocks: a GPU's way.

Blocks of stride x stride pixels become channels, and the folded convolution moves by one block: 3 channels and 8x8
pixels in steps of 4 are 48 channels and 2x2 blocks, which the library multiplies well. The interior's weights serve all
outputs, and the border's few are made again with their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels.ops.common import layout, plan
from wavemix_kernels.ops.common.dtypes import accumulate_dtype, without_autocast
from wavemix_kernels.ops.common.kept import Kept
from wavemix_kernels.ops.common.once import once_differentiable
from wavemix_kernels.ops.stem import folding
from wavemix_kernels.ops.stem.geometry import Convolution, Part, dtype_of, geometry, places


def folded(x: Tensor, convolutions: Sequence[Convolution], kept: Kept | None = None) -> Tensor:
    """The convolutions one after the other: x (N, C, H, W) -> (N, O, h, w), channels_last.

    Any floating dtype; weights are folded in fp32 for the half types, and in the parameters' own dtype under autocast.
    x gets no gradient, and the parameters' are differentiable once. On a GPU it goes by a plan.

    Args:
        convolutions: two, or three of which the last has no padding.
        kept: where folded weights of earlier calls are, for calls without gradient.
    """
    parameters = [t for one in convolutions for t in (one.weight, one.bias)]
    there = [t for t in parameters if t is not None]
    with without_autocast(x):
        x = x.detach().to(dtype_of(x))
        if kept is None or (torch.is_grad_enabled() and any(t.requires_grad for t in there)):
            kinds = [number for one in convolutions for number in (one.stride, one.padding)]
            out: Tensor = _ByBlocks.apply(kinds, x, *parameters)
            return out
        where = _Places.of(x.shape[2:], convolutions)
        made = kept.get((where, x.dtype), there, lambda: where.weights(convolutions, x.dtype))
        return _by_plan(where, x, *made)[0]


def _convolutions(kinds: Sequence[int], parameters: Sequence[Any]) -> list[Convolution]:
    fields = zip(parameters[::2], parameters[1::2], kinds[::2], kinds[1::2], strict=True)
    return [Convolution(*of) for of in fields]


class _Blocks(NamedTuple):
    """Blocks of ``stride`` x ``stride`` pixels, of which an output takes ``k`` x ``k``; ``before``: pixels of zeros
    above and to the left."""

    stride: int
    k: int
    before: int

    def image(self, x: Tensor, outputs: Sequence[int]) -> Tensor:
        """The padded image (N, stride * stride * C, blocks down, blocks across), channels_last."""
        s, before = self.stride, self.before
        counts = [n - 1 + self.k for n in outputs]
        after = [count * s - before - size for count, size in zip(counts, x.shape[2:], strict=True)]
        padded = F.pad(x, (before, after[1], before, after[0]))
        (n, c), (down, across) = x.shape[:2], counts
        made = x.new_empty((n, down, across, s, s, c))
        made.copy_(padded.reshape(n, c, down, s, across, s).permute(0, 2, 4, 3, 5, 1))
        return made.flatten(3).permute(0, 3, 1, 2)

    def weights(self, folded: Tensor, dtype: torch.dtype) -> Tensor:
        """Weights (P, O, C, window, window) as those of the blocks' convolution, (P, O, stride * stride * C, k, k)."""
        *parts, c, window, _ = folded.shape
        side, s, k = self.stride * self.k, self.stride, self.k
        square = F.pad(folded, (0, side - window, 0, side - window)).view(*parts, c, k, s, k, s)
        made = folded.new_empty((*parts, k, k, s, s, c), dtype=dtype)
        return made.copy_(square.permute(0, 1, 3, 5, 4, 6, 2)).flatten(4).permute(0, 1, 4, 2, 3)

    def weights_backward(self, grad: Tensor, window: int) -> Tensor:
        """The gradient of what :meth:`weights` takes."""
        (p, o, _, k, _), s = grad.shape, self.stride
        square = grad.reshape(p, o, s, s, -1, k, k).permute(0, 1, 4, 5, 2, 6, 3)
        return square.reshape(p, o, -1, k * s, k * s)[..., :window, :window]


class _Places(NamedTuple):
    """The blocks and parts of an image, by its size and the convolutions' alone."""

    blocks: _Blocks
    outputs: tuple[int, ...]
    rows: tuple[Part, ...]
    columns: tuple[Part, ...]

    @staticmethod
    def of(size: Sequence[int], convolutions: Sequence[Convolution]) -> _Places:
        way = geometry(convolutions)
        stride = way.stride * way.inner.stride
        before = way.padding * way.inner.stride + way.inner.padding
        outputs, rows, columns = places(size, convolutions, way)
        return _Places(_Blocks(stride, -(-way.window // stride), before), tuple(outputs), rows, columns)

    @property
    def whole(self) -> int:
        """The interior's number among the parts."""
        return _interior(self.rows) * len(self.columns) + _interior(self.columns)

    def slices(self) -> Iterator[tuple[Any, Any]]:
        """Where each part's outputs lie, and the blocks that they are made of."""
        k = self.blocks.k
        for (a, b, *_), (c, d, *_) in itertools.product(self.rows, self.columns):
            every = slice(None), slice(None)
            yield (*every, slice(a, b), slice(c, d)), (*every, slice(a, b + k - 1), slice(c, d + k - 1))

    def weights(self, convolutions: Sequence[Convolution], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Each part's weights and biases, (P, O, stride * stride * C, k, k) and (P, O)."""
        taps, bias = folding.taps_of(convolutions, accumulate_dtype(dtype))
        weights, biases = folding.of_parts(taps, bias, geometry(convolutions), self.rows, self.columns)
        return self.blocks.weights(weights, dtype), biases.to(dtype)


def _convolve(where: _Places, x: Tensor, weights: Tensor, biases: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the blocks that it is made of."""
    image, whole = where.blocks.image(x, where.outputs), where.whole
    out = F.conv2d(image, weights[whole], biases[whole]).contiguous(memory_format=torch.channels_last)
    for part, (here, there) in enumerate(where.slices()):
        if part != whole:
            out[here] = F.conv2d(image[there], weights[part], biases[part])
    return out, image


_by_plan = plan.planned("stem_of_kept_weights", _convolve)


@plan.function
class _ByBlocks(torch.autograd.Function):
    """(strides and paddings, x, each convolution's weight and bias) -> output."""

    @staticmethod
    def forward(ctx: Any, kinds: list[int], x: Tensor, *parameters: Tensor | None) -> Tensor:
        convolutions = _convolutions(kinds, parameters)
        where = _Places.of(x.shape[2:], convolutions)
        out, image = _convolve(where, x, *where.weights(convolutions, x.dtype))
        ctx.kinds, ctx.sizes = tuple(kinds), tuple(x.shape[2:])
        ctx.save_for_backward(image, *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        image, *parameters = ctx.saved_tensors
        convolutions = _convolutions(ctx.kinds, parameters)
        way, wide = geometry(convolutions), accumulate_dtype(grad.dtype)
        where = _Places.of(ctx.sizes, convolutions)
        blocks, rows, columns, whole = where.blocks, where.rows, where.columns, where.whole
        grad = layout.channels_inner(grad)
        weight = image.new_empty((grad.shape[1], image.shape[1], blocks.k, blocks.k))  # its shape alone is read

        def gradients(here: Any, there: Any) -> tuple[Tensor, Tensor]:
            _, of_weight, of_bias = torch.ops.aten.convolution_backward(
                grad[here], image[there], weight, [weight.shape[0]], [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
                [False, True, True],
            )  # fmt: skip
            return of_weight, of_bias

        everywhere = slice(None), slice(None), slice(None), slice(None)
        made = [
            gradients(*((everywhere, everywhere) if part == whole else place))
            for part, place in enumerate(where.slices())
        ]
        of_weights, of_biases = (torch.stack(of).to(wide) for of in zip(*made, strict=True))
        for of in (of_weights, of_biases):  # the interior's are those of all outputs, without the border's
            of[whole] = 2 * of[whole] - of.sum(0)
        d_taps = folding.of_parts_backward(
            blocks.weights_backward(of_weights, way.window), of_biases, way, rows, columns
        )
        return None, None, *folding.taps_backward(d_taps, of_biases.sum(0), convolutions, wide)


def _interior(parts: Sequence[Part]) -> int:
    return max(range(len(parts)), key=lambda i: parts[i][1] - parts[i][0])
