"""`examples.train_imagenet` with two tiny models in its table: what torchrun starts in tests."""

from __future__ import annotations

import itertools
import os
import signal

from torch import nn

from examples import train_imagenet
from wavemix_kernels.wavemix.classification import WaveMixLite
from wavemix_kernels.wavemlp import PATM, MyNorm, WaveNet

SIZES = {"layers": (1, 1), "embed_dims": (8, 16), "mlp_ratios": (2, 2)}


def tiny(num_classes: int, drop_path_rate: float = 0.0) -> WaveNet:
    """Without BatchNorm, those of PATM's phases included: equal for a batch and for its halves."""
    model = WaveNet(num_classes=num_classes, drop_path_rate=drop_path_rate, norm_layer=MyNorm, **SIZES)
    for mixer in [module for module in model.modules() if isinstance(module, PATM)]:
        mixer.theta_h_conv[1], mixer.theta_w_conv[1] = MyNorm(mixer.dim), MyNorm(mixer.dim)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return model


train_imagenet.MODELS.update({"tiny": tiny, "lite": WaveMixLite})


def signal_at(name: str, rank: str, step: str) -> None:
    """A rank gets a signal in a step: SIGINT as Ctrl-C, SIGKILL as from a machine that runs out of memory."""
    whole, steps = train_imagenet.Training._step, itertools.count()

    def signalled(self, images, labels):
        if self.processes.rank == int(rank) and next(steps) == int(step):
            os.kill(os.getpid(), signal.Signals[name])
        return whole(self, images, labels)

    train_imagenet.Training._step = signalled  # a fault put in on purpose


if __name__ == "__main__":
    if "SIGNAL_AT" in os.environ:
        signal_at(*os.environ["SIGNAL_AT"].split(":"))
    raise SystemExit(train_imagenet.record(train_imagenet.main)())
