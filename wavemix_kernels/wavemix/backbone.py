"""Shared by the three WaveMix models: the checks of their arguments, the stack of Waveblocks and its residuals."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wavemix_kernels import backends, checks, fx
from wavemix_kernels.nn.parts import Batch, is_frozen, together, untouched, update
from wavemix_kernels.nn.wavemix import stack
from wavemix_kernels.nn.wavemix.block import FusedWaveblock
from wavemix_kernels.nn.wavemix.expansion import FusedExpansion
from wavemix_kernels.nn.wavemix.inference import InferenceWaveblock
from wavemix_kernels.nn.wavemix.reference import Expansion
from wavemix_kernels.nn.wavemix.shuffle import FusedShuffleWaveblock, InferenceShuffleWaveblock
from wavemix_kernels.ops.common.kept import Kept
from wavemix_kernels.ops.norm import gelu_batch_norm
from wavemix_kernels.ops.stem import geometry
from wavemix_kernels.ops.stem import op as folding

#: Channels of a stem's first convolution from which on it is made again in backward.
_WIDE_STEM = 32

_FUSED = (FusedWaveblock, InferenceWaveblock, FusedShuffleWaveblock, InferenceShuffleWaveblock)


def adds_its_residual(block: nn.Module) -> bool:
    """Whether ``block(x, residual=True)`` can stand for ``block(x) + x``."""
    return isinstance(block, _FUSED) and block.why_not_joined() is None


def through(blocks: Sequence[nn.Module] | nn.ModuleList, x: Tensor, pooled: bool = False) -> Tensor:
    """x through the blocks, each with its residual; ``pooled``: or the average over all pixels, (N, C, 1, 1), where the
    blocks' kernels give it without the image.

    In channels_last where fused blocks run, which work so inside: one conversion saves two in every block.
    """
    # A block's node in a traced graph is the block's own output.
    joined = [not isinstance(x, fx.Proxy) and adds_its_residual(block) for block in blocks]
    return _through(blocks, joined, x, pooled)


def _through(blocks: Sequence[nn.Module] | nn.ModuleList, joined: Sequence[bool], x: Tensor, pooled: bool) -> Tensor:
    """``joined``: which blocks :func:`adds_its_residual` is true of."""
    if all(joined) and joined:
        x = x.contiguous(memory_format=torch.channels_last)
        if (out := stack.through(blocks, x, pooled)) is not None:
            return out
    for block, adds in zip(blocks, joined, strict=True):
        x = block(x, residual=True) if adds else block(x) + x
    return x


def run_stem(stem: nn.Module, img: Tensor, kept: Kept | None = None) -> Tensor:
    """``stem(img)``: its first convolutions as one (:mod:`wavemix_kernels.ops.stem`), or without the activations that
    it would keep between the first two.

    At the image's own resolution they are the largest of a model, 8 % of a training step's peak (192/16, 224x224), and
    a convolution of three channels makes them again in 2 % of its time. Few channels take as long for checkpoint's own
    work; a compiler plans memory by itself; without gradient nothing is kept.
    """
    layers: list[Any] = list(stem) if type(stem) is nn.Sequential and untouched(stem) else []
    # No itertools.takewhile, which torch.compile of older torch versions cannot trace.
    end = next((i for i, layer in enumerate(layers) if not _is_plain(layer)), len(layers))
    plain = layers[:end]
    if len(plain) < 2 or backends.requested() == "reference":
        return stem(img)
    convolutions = [geometry.Convolution(m.weight, m.bias, m.stride[0], m.padding[0]) for m in plain]
    if folding.serves(img, convolutions):
        x, rest = folding.run(img, convolutions, kept), layers[len(plain) :]
    else:
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in stem.parameters())
        if not learns or plain[0].out_channels < _WIDE_STEM or torch.compiler.is_compiling():
            return _run(layers, img)
        first, second, *rest = layers
        x = checkpoint(lambda t: second(first(t)), img, use_reentrant=False, preserve_rng_state=False)
    return _run(rest, x)


def _run(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """x through the layers, the last two as one operator where they are GELU and BatchNorm and that has kernels."""
    for layer in layers[:-2]:
        x = layer(x)
    if len(layers) > 1 and _is_gelu_norm(*layers[-2:]):
        norm: Any = layers[-1]
        backend, values = backends.requested(), x.shape[0] * x.shape[2] * x.shape[3]
        if values > 1 and gelu_batch_norm.serves(x, backend):  # of one value the module says that it is too few
            x, of = gelu_batch_norm.fused(x, norm.weight, norm.bias, norm.eps, backend)
            update(Batch(norm, of.mean, of.var, values))
            return x
    for layer in layers[-2:]:
        x = layer(x)
    return x


def _is_gelu_norm(activation: nn.Module, norm: nn.Module) -> bool:
    """The exact GELU and a BatchNorm by the batch's own statistics."""
    if type(activation) is not nn.GELU or type(norm) is not nn.BatchNorm2d:
        return False
    plain = untouched(activation) and untouched(norm)
    return plain and activation.approximate == "none" and not is_frozen(norm)


def _is_plain(layer: nn.Module) -> bool:
    """A square convolution of zeros around the image, whose weights may be folded into the next one's."""
    if type(layer) is not nn.Conv2d or not untouched(layer):
        return False
    pairs = (layer.kernel_size, layer.stride, layer.padding)
    square = all(not isinstance(pair, str) and pair[0] == pair[1] for pair in pairs)
    return square and layer.dilation == (1, 1) and layer.groups == 1 and layer.padding_mode == "zeros"


class Backbone(nn.Module):
    """``depth`` Waveblocks with residuals, between a stem ``conv`` and a head that the models add.

    The models build blocks, then head, then stem, as upstream does: the same seed gives the same initial weights.

    Args:
        depth: number of blocks, at least 1.
        mult, ff_channel, final_dim, dropout, level, upsample: each block's, see
            :class:`wavemix_kernels.FusedWaveblock`.
        block: the block class, called with those six as keywords.

    Raises:
        TypeError, ValueError: an argument out of its range.
    """

    conv: nn.Module

    def __init__(
        self,
        *,
        depth: int,
        mult: int,
        ff_channel: int,
        final_dim: int,
        dropout: float,
        level: int,
        upsample: str,
        block: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        self.level = level
        self._folded: Kept | None = None  # the stem's weights, in the inference form
        self.layers = nn.ModuleList(
            block(
                level=level, mult=mult, ff_channel=ff_channel, final_dim=final_dim, dropout=dropout, upsample=upsample
            )
            for _ in range(checks.check_positive_int("depth", depth))
        )

    def blocks_are_fused(self) -> None:
        """See :func:`wavemix_kernels.fuse_for_inference`."""
        self._folded = Kept()

    def expansion(self, channels: int, doublings: int, outputs: int) -> Expansion:
        """A head that gives images, of the blocks' own kind; see :class:`wavemix_kernels.reference.Expansion`."""
        kind = FusedExpansion if isinstance(self.layers[0], FusedWaveblock) else Expansion
        return kind(channels, doublings, outputs)

    def features(self, img: Tensor) -> Tensor:
        """Images through the stem and all blocks, each with its residual: (N, final_dim, h, w).

        In channels_last where fused blocks run, whatever the images are in, else in their memory format.

        Raises:
            TypeError, ValueError: as :meth:`check_image`.
        """
        return self._features(img, pooled=False)

    def _features(self, img: Tensor, pooled: bool) -> Tensor:
        """``pooled``: the average over all pixels will do, (N, final_dim, 1, 1), where that saves the image."""
        if isinstance(img, fx.Proxy):
            return through(self.layers, self.conv(img))
        self.check_image(img)
        joined = [*map(adds_its_residual, self.layers)]
        fused = all(joined)
        # The blocks' order comes before the stem, where the library's convolutions are faster that way: on a GPU, and
        # on a CPU without gradient.
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.conv.parameters())
        if fused and not (learns and img.device.type == "cpu"):
            img = img.contiguous(memory_format=torch.channels_last)
        with together():
            x = run_stem(self.conv, img, self._folded) if fused else self.conv(img)
            return _through(self.layers, joined, x, pooled)

    def check_image(self, img: Tensor) -> None:
        """Raises TypeError or ValueError unless the blocks can take what the stem makes of ``img``.

        A stem that someone put in place of the model's own is followed only while it is made of the same kinds of
        layers; the blocks check what they get in any case.
        """
        stem = list(self.conv) if isinstance(self.conv, nn.Sequential) else [self.conv]
        convolutions = [layer for layer in stem if isinstance(layer, nn.Conv2d)]
        if (
            not convolutions
            or not all(isinstance(layer, (nn.Conv2d, nn.GELU, nn.BatchNorm2d)) for layer in stem)
            or any(isinstance(layer.padding, str) for layer in convolutions)
        ):
            return
        channels = convolutions[0].in_channels
        checks.check_tensor("img", img, 4, f"(N, {channels}, H, W)")
        if img.shape[1] != channels:
            raise ValueError(f"img: expected {channels} channels, got shape {tuple(img.shape)}")
        unit = 2**self.level
        for axis, name in ((0, "H"), (1, "W")):
            size = img.shape[axis + 2]
            there = _size_after(convolutions, size, axis)
            if there < unit or there % unit:
                raise ValueError(
                    f"img: {name}={size} arrives at layers.0 as {there}, where a level-{self.level} Waveblock needs a "
                    f"multiple of {unit}; the nearest image sizes that work: {_nearest(convolutions, size, axis, unit)}"
                )


def _size_after(convolutions: list[nn.Conv2d], size: int, axis: int) -> int:
    for layer in convolutions:
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        size = max(0, (size + 2 * int(layer.padding[axis]) - reach - 1) // layer.stride[axis] + 1)
    return size


def _nearest(convolutions: list[nn.Conv2d], size: int, axis: int, unit: int) -> str:
    """The next smaller and larger image sizes that reach the blocks as a positive multiple of ``unit``."""

    def works(n: int) -> bool:
        there = _size_after(convolutions, n, axis)
        return there >= unit and there % unit == 0

    above = size + 1
    while not works(above):
        above += 1
    below = next((n for n in range(size - 1, 0, -1) if works(n)), None)
    return str(above) if below is None else f"{below} or {above}"


def strided_stem(in_channels: int, final_dim: int, stride: int) -> nn.Sequential:
    """Two 3x3 convolutions with nothing between them: (N, in_channels, H, W) -> final_dim channels."""
    checks.check_positive_int("stride", stride)
    return nn.Sequential(
        nn.Conv2d(checks.check_positive_int("in_channels", in_channels), final_dim // 2, 3, stride, 1),
        nn.Conv2d(final_dim // 2, final_dim, 3, stride, 1),
    )
