"""Drop-in for ``wavemix.classification``: the WaveMix image classifier, and its WaveMix-Lite form."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from wavemix_kernels import checks, fx, pretrained
from wavemix_kernels.nn.parts import average, untouched
from wavemix_kernels.nn.wavemix.block import FusedWaveblock
from wavemix_kernels.wavemix.backbone import Backbone, strided_stem

__all__ = ["WaveMix", "WaveMixLite"]

INITIAL_CONVS = ("pachify", "patchify", "strided")


class WaveMix(Backbone):
    """Image classifier: (N, in_channels, H, W) -> logits (N, num_classes).

    Args:
        num_classes: number of logits.
        depth: number of Waveblocks.
        mult, ff_channel, final_dim, dropout, level: each block's, see :class:`wavemix_kernels.FusedWaveblock`.
        initial_conv: the stem. "pachify" (upstream's spelling; "patchify" is the same): two 3x3 convolutions, then a
            convolution over patches, GELU and BatchNorm. "strided": two 3x3 convolutions.
        patch_size: side of a patch; has effect with "pachify" only.
        stride: of each of the two convolutions; has effect with "strided" only.
        in_channels: of the image.
        upsample: of each block.
        pretrained: name of published weights to load, one of :data:`wavemix_kernels.pretrained.WEIGHTS`, which also
            says the arguments they need (:func:`wavemix_kernels.pretrained.load_model` gives these by itself).
        block: the block class; :class:`wavemix_kernels.reference.Waveblock` makes the reference model.

    H and W have to reach the blocks as multiples of ``2**level``: multiples of ``patch_size * 2**level`` do so with
    "pachify", of ``stride**2 * 2**level`` with "strided".

    Raises:
        TypeError, ValueError: an argument out of its range, or an image that does not fit (the message names the
            nearest sizes that do).
        RuntimeError: published weights that cannot be had.

    Source: arXiv:2205.14375; package ``wavemix`` 0.2.4, whose parameter names and checkpoints these are.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        depth: int = 16,
        mult: int = 2,
        ff_channel: int = 192,
        final_dim: int = 192,
        dropout: float = 0.5,
        level: int = 3,
        initial_conv: str = "pachify",
        patch_size: int = 4,
        stride: int = 2,
        in_channels: int = 3,
        upsample: str = "deconv",
        pretrained: str | None = None,
        block: Callable[..., nn.Module] = FusedWaveblock,
    ) -> None:
        super().__init__(
            depth=depth,
            mult=mult,
            ff_channel=ff_channel,
            final_dim=final_dim,
            dropout=dropout,
            level=level,
            upsample=upsample,
            block=block,
        )
        checks.check_positive_int("num_classes", num_classes)
        checks.check_choice("initial_conv", initial_conv, INITIAL_CONVS)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(final_dim, num_classes))
        if initial_conv == "strided":
            self.conv = strided_stem(in_channels, final_dim, stride)
        else:
            checks.check_positive_int("patch_size", patch_size)
            self.conv = nn.Sequential(
                nn.Conv2d(checks.check_positive_int("in_channels", in_channels), final_dim // 4, 3, 1, 1),
                nn.Conv2d(final_dim // 4, final_dim // 2, 3, 1, 1),
                nn.Conv2d(final_dim // 2, final_dim, patch_size, patch_size),
                nn.GELU(),
                nn.BatchNorm2d(final_dim),
            )
        if pretrained is not None:
            _load_published(self, pretrained)

    def forward(self, img: Tensor) -> Tensor:
        own = type(self).features is Backbone.features
        if isinstance(img, fx.Proxy) or not own or not _averages(self.pool):
            return self.pool(self.features(img))
        x, layers = self._features(img, pooled=True), list(self.pool)
        x = x if x.shape[2:] == (1, 1) else average(x)  # the average already, or of one pixel
        for layer in layers[1:]:
            x = layer(x)
        return x


def _averages(head: nn.Module) -> bool:
    """Whether it begins with the average over all pixels, and nobody looks at what goes into that."""
    if type(head) is not nn.Sequential or not untouched(head):
        return False
    first = head[0]
    return type(first) is nn.AdaptiveAvgPool2d and first.output_size in (1, (1, 1)) and untouched(first)


def _load_published(model: WaveMix, name: str) -> None:
    """Before anything is fetched: the same parameters and buffers as the model these weights are of."""
    entry = pretrained.weights(name)
    with torch.device("meta"):
        wanted = entry.build().state_dict()
    have = model.state_dict()
    for key in wanted.keys() | have.keys():
        if key not in have or key not in wanted or have[key].shape != wanted[key].shape:
            kind = entry.model.rpartition(".")[2]
            called = ", ".join(f"{k}={v!r}" for k, v in entry.arguments.items())
            raise ValueError(f"pretrained={name!r}: these weights are of {kind}({called}), not of this model")
    model.load_state_dict(pretrained.load_state_dict(name), strict=True)


class WaveMixLite(WaveMix):
    """WaveMix-Lite: level-1 blocks and a stem of two 3x3 convolutions; (N, in_channels, H, W) -> (N, num_classes).

    Args:
        num_classes: number of logits.
        depth: number of blocks.
        final_dim: channels C, a multiple of 4; the blocks' ``ff_channel`` is the same.
        mult, dropout, upsample: each block's, see :class:`wavemix_kernels.FusedWaveblock`.
        stride: of each of the stem's convolutions; H and W are multiples of ``2 * stride**2``.
        in_channels: of the image.
        block: the block class.

    The models of upstream's table of parameter efficiency, by width / depth:

    | model                   | in_channels | upsample | parameters |
    | ----------------------- | ----------- | -------- | ---------- |
    | 8/10 (MNIST 99%)        | 1           | bilinear |      3,566 |
    | 8/5 (Fashion-MNIST 90%) | 1           | deconv   |      7,156 |
    | 32/7 (CIFAR-10 80%)     | 3           | bilinear |     37,058 |
    | 64/6 (CIFAR-10 90%)     | 3           | deconv   |    520,106 |

    The table gives neither ``ff_channel`` nor the stem's width; these follow from the counts. With i input channels,
    a stem of width k and ``mult=2``, 10 classes: stem 9ik + k + 9kC + C, classifier 10C + 10; a block has
    C(C/4) + C/4 (reduction) + 2C^2 + 2C (first 1x1 convolution) + 2C (BatchNorm), and then 2C^2 + C with a weightless
    upsampling or 2Cf + f + 16fC + C with a transposed convolution. 3,566 = 10·314 + 90 + (82k + 8) gives k = 4 = C/2,
    and so does 37,058 = 7·4,520 + 330 + (316k + 32): k = 16. With k = C/2, 7,156 = 5(186 + 145f) + 336 + 90 gives
    f = 8 = C and 520,106 = 6(9,552 + 1,153f) + 19,392 + 650 gives f = 64 = C.

    Raises:
        TypeError, ValueError: as :class:`WaveMix`.

    Source: arXiv:2205.14375, arXiv:2203.03689.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        depth: int = 7,
        final_dim: int = 32,
        mult: int = 2,
        dropout: float = 0.5,
        stride: int = 1,
        in_channels: int = 3,
        upsample: str = "bilinear",
        block: Callable[..., nn.Module] = FusedWaveblock,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            depth=depth,
            mult=mult,
            ff_channel=final_dim,
            final_dim=final_dim,
            dropout=dropout,
            level=1,
            initial_conv="strided",
            stride=stride,
            in_channels=in_channels,
            upsample=upsample,
            block=block,
        )
