"""The head of the WaveMix models that give images: transposed convolutions, then a 1x1 convolution."""

from __future__ import annotations

import itertools

from torch import nn


class Expansion(nn.Sequential):
    """(N, channels, h, w) -> (N, outputs, 2^k h, 2^k w), k being ``doublings``, with nothing between its layers.

    Args:
        channels: of the input; each transposed convolution (4x4 taps, stride 2, padding 1) halves them.
        doublings: how many there are, at least 1.
        outputs: channels of the 1x1 convolution behind them.

    Source: package ``wavemix`` 0.2.4, whose parameter names these are.
    """

    def __init__(self, channels: int, doublings: int, outputs: int) -> None:
        widths = [channels >> k for k in range(doublings + 1)]
        super().__init__(
            *(nn.ConvTranspose2d(wide, narrow, 4, 2, 1) for wide, narrow in itertools.pairwise(widths)),
            nn.Conv2d(widths[-1], outputs, 1),
        )
