"""WavePaint: inpainting by WaveMix modules, each a stem, Waveblocks and a decoder at the image's resolution."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavemix_kernels import checks, fx
from wavemix_kernels.nn.parts import affine_of, kept, why_not_plain
from wavemix_kernels.nn.wavemix.block import FusedWaveblock
from wavemix_kernels.nn.wavemix.expansion import FusedDeconvs, is_pointwise, why_not_deconv
from wavemix_kernels.ops.common import layout
from wavemix_kernels.ops.deconv import op as deconv
from wavemix_kernels.wavemix.backbone import run_stem, through

__all__ = ["WaveMixModule", "WavePaint"]


class WaveMixModule(nn.Module):
    """One module of :class:`WavePaint`: image (N, 3, H, W) and mask (N, 1, H, W) -> (N, 3, H, W).

    Two 3x3 convolutions that halve the size, Waveblocks with residuals, a depthwise 5x5 convolution, GELU and
    BatchNorm, a transposed convolution and BatchNorm of that beside the stem's output, and a 1x1 convolution of that
    beside the image.

    Args:
        depth: number of blocks.
        mult, ff_channel, final_dim, level, dropout: each block's, see :class:`wavemix_kernels.FusedWaveblock`.
        mask_channel: whether the mask is the stem's fourth channel; without, it has no effect.
        block: the block class; :class:`wavemix_kernels.reference.Waveblock` makes the reference module.

    Raises:
        TypeError, ValueError: an argument out of its range.

    Source: arXiv:2307.00407; parameter names are those of its published code.
    """

    def __init__(
        self,
        *,
        depth: int,
        mult: int = 2,
        ff_channel: int = 16,
        final_dim: int = 16,
        level: int = 1,
        dropout: float = 0.0,
        mask_channel: bool = True,
        block: Callable[..., nn.Module] = FusedWaveblock,
    ) -> None:
        super().__init__()
        checks.check_multiple("final_dim", checks.check_positive_int("final_dim", final_dim), 4)
        half = final_dim // 2
        self.mask_channel = mask_channel
        self.conv = nn.Sequential(nn.Conv2d(3 + mask_channel, half, 3, 1, 1), nn.Conv2d(half, final_dim, 3, 2, 1))
        self.layers = nn.ModuleList(
            block(
                level=level, mult=mult, ff_channel=ff_channel, final_dim=final_dim, dropout=dropout, upsample="deconv"
            )
            for _ in range(checks.check_positive_int("depth", depth))
        )
        self.depthconv = nn.Sequential(
            nn.Conv2d(final_dim, final_dim, 5, padding="same", groups=final_dim), nn.GELU(), nn.BatchNorm2d(final_dim)
        )
        decoder = FusedDeconvs if isinstance(self.layers[0], FusedWaveblock) else nn.Sequential
        self.decoder1 = decoder(nn.ConvTranspose2d(2 * final_dim, half, 4, 2, 1), nn.BatchNorm2d(half))
        self.decoder2 = nn.Sequential(nn.Conv2d(half + 3, 3, 1))

    def encoded(self, img: Tensor, mask: Tensor) -> Tensor:
        """The decoder's input: (N, 2 final_dim, H/2, W/2)."""
        given = torch.cat((img, mask), 1) if self.mask_channel else img
        skip = self.conv(given) if isinstance(img, fx.Proxy) else run_stem(self.conv, given)
        return torch.cat((self.depthconv(through(self.layers, skip)), skip), 1)

    def forward(self, img: Tensor, mask: Tensor) -> Tensor:
        return self.decoder2(torch.cat((self.decoder1(self.encoded(img, mask)), img), 1))

    def fuse_for_inference(self) -> nn.Module:
        """The module for inference: the decoder's three layers are one transposed convolution to three channels, and a
        1x1 convolution of the image.

        Raises:
            ValueError: a part has hooks, parametrizations or a class of its own; a BatchNorm has no running statistics.
        """
        if (reason := self._why_not_folded()) is not None:
            raise ValueError(f"fuse_for_inference: {reason}, which folded weights cannot stand for")
        return InferenceWaveMixModule(self)

    def _why_not_folded(self) -> str | None:
        one, two = self.decoder1, self.decoder2
        if len(one) != 2 or len(two) != 1:
            return f"the decoder has {len(one)} and {len(two)} parts, expected 2 and 1"
        reasons = (
            why_not_plain("it", self),
            why_not_plain("decoder1", one),
            why_not_deconv("decoder1.0", one[0]),
            why_not_plain("decoder1.1", one[1], nn.BatchNorm2d),
            why_not_plain("decoder2", two, nn.Sequential),
            None if is_pointwise(two[0]) else f"decoder2.0 is {two[0]}, expected a 1x1 convolution without hooks",
        )
        return next((reason for reason in reasons if reason is not None), None)


class InferenceWaveMixModule(nn.Module):
    """The result of :meth:`WaveMixModule.fuse_for_inference`: the same map up to rounding.

    BatchNorm and the 1x1 convolution behind a transposed one are linear and local, so they go into its weights, borders
    included: three channels are made in place of ``final_dim / 2``.
    """

    def __init__(self, source: WaveMixModule) -> None:
        super().__init__()
        self.mask_channel = source.mask_channel
        self.conv, self.depthconv = (copy.deepcopy(m).requires_grad_(False) for m in (source.conv, source.depthconv))
        self.layers = nn.ModuleList(
            layer.fuse_for_inference() if hasattr(layer, "fuse_for_inference") else layer  # type: ignore[operator]
            for layer in source.layers
        )
        parts: list[Any] = [*source.decoder1, *source.decoder2]
        up, norm, last = parts
        scale, shift = affine_of(norm, "decoder1.1")
        matrix = last.weight.detach().double().flatten(1)
        inner = matrix[:, : up.out_channels]
        weight = torch.einsum("fmhw,om->fohw", up.weight.detach().double(), inner * scale)
        bias = inner @ (shift if up.bias is None else up.bias.detach().double() * scale + shift)
        bias = bias if last.bias is None else bias + last.bias.detach().double()
        of_image = matrix[:, up.out_channels :, None, None]
        for name, tensor in (("weight", weight), ("bias", bias), ("weight_image", of_image)):
            self.register_buffer(name, kept(tensor.to(up.weight.dtype)))
        self.train(False)

    encoded = WaveMixModule.encoded

    def forward(self, img: Tensor, mask: Tensor) -> Tensor:
        x: Any = self.encoded(img, mask)  # type: ignore[misc]
        weight, bias, of_image = (cast(Tensor, getattr(self, name)) for name in ("weight", "bias", "weight_image"))
        return deconv.deconv(x, weight, bias) + F.conv2d(img, of_image)


class WavePaint(nn.Module):
    """Inpainting: image (N, 3, H, W) without what is masked, and mask (N, 1, H, W), 1 where there is something to
    paint -> (N, 3, H, W), the image itself where the mask is 0.

    Each module adds its output to the image that the next one gets. H and W are multiples of ``2 * 2**level``.

    Args:
        num_modules: number of :class:`WaveMixModule`.
        blocks_per_module: Waveblocks in each.
        mult: each block's; default: 2 with ``mask_channel`` and 4 without, as the two published files have it.
        ff_channel, final_dim, dropout: each block's, see :class:`wavemix_kernels.FusedWaveblock`.
        level: each block's. The published modules know levels 1 to 3; of these the third is not published, and is
            WaveMix's here.
        mask_channel: which of the two published forms. True: modules see the mask as a fourth channel, and the result
            is ``x * mask + img * (1 - mask)``. False: they see the image alone, and it is ``x * mask + img``, the same
            where what is masked is 0.
        block: the block class; :class:`wavemix_kernels.reference.Waveblock` makes the reference model.

    Raises:
        TypeError, ValueError: an argument out of its range; an image or mask that does not fit.

    Source: Jeevan et al., arXiv:2307.00407; parameter names and checkpoints are those of its published code.
    """

    def __init__(
        self,
        *,
        num_modules: int = 1,
        blocks_per_module: int = 7,
        mult: int | None = None,
        ff_channel: int = 16,
        final_dim: int = 16,
        dropout: float = 0.0,
        level: int = 1,
        mask_channel: bool = True,
        block: Callable[..., nn.Module] = FusedWaveblock,
    ) -> None:
        super().__init__()
        self.level, self.mask_channel = level, mask_channel
        mult = mult if mult is not None else 2 if mask_channel else 4
        self.wavemodules = nn.ModuleList(
            WaveMixModule(
                depth=blocks_per_module, mult=mult, ff_channel=ff_channel, final_dim=final_dim, level=level,
                dropout=dropout, mask_channel=mask_channel, block=block,
            )
            for _ in range(checks.check_positive_int("num_modules", num_modules))
        )  # fmt: skip

    def forward(self, img: Tensor, mask: Tensor) -> Tensor:
        if not isinstance(img, fx.Proxy):
            self.check_input(img, mask)
        x = img
        for module in self.wavemodules:
            x = module(x, mask) + x
        out = x * mask + (img * (1 - mask) if self.mask_channel else img)
        return layout.ordered_as(out, img)

    def check_input(self, img: Tensor, mask: Tensor) -> None:
        """Raises TypeError or ValueError unless the modules can take the two."""
        checks.check_tensor("img", img, 4, "(N, 3, H, W)")
        if img.shape[1] != 3:
            raise ValueError(f"img: expected 3 channels, got shape {tuple(img.shape)}")
        checks.check_tensor("mask", mask, 4, "(N, 1, H, W)")
        n, _, h, w = img.shape
        if tuple(mask.shape) != (n, 1, h, w):
            raise ValueError(f"mask: expected shape {(n, 1, h, w)} to go with img, got {tuple(mask.shape)}")
        for axis, size in (("H", h), ("W", w)):
            checks.check_multiple(f"img: {axis}", size, 2 << self.level)
