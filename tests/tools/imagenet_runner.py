"""`examples.train_imagenet` with two tiny models in its table: what torchrun starts in tests."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from examples import train_imagenet
from wavemix_kernels.wavemix.classification import WaveMixLite
from wavemix_kernels.wavemlp import MyNorm, WaveNet

SIZES = {"layers": (1, 1), "embed_dims": (8, 16), "mlp_ratios": (2, 2)}


def tiny(num_classes: int, drop_path_rate: float = 0.0) -> WaveNet:
    """Without BatchNorm: equal for a batch and for its halves."""
    return WaveNet(num_classes=num_classes, drop_path_rate=drop_path_rate, norm_layer=MyNorm, **SIZES)


train_imagenet.MODELS.update({"tiny": tiny, "lite": WaveMixLite})


def die_at(rank: int, step: int) -> None:
    """Rank ``rank`` is killed in step ``step``, as by a machine that runs out of memory."""
    whole = train_imagenet.Training._step
    steps = iter(range(step + 1))

    def dying(self, images, labels):
        if self.processes.rank == rank and next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, images, labels)

    train_imagenet.Training._step = dying  # type: ignore[method-assign] - a fault put in on purpose


def interrupted_at(rank: int, step: int) -> None:
    """Rank ``rank`` gets SIGINT in step ``step``."""
    whole = train_imagenet.Training._step
    seen: list[int] = []

    def interrupting(self, images, labels):
        if self.processes.rank == rank and len(seen) == step:
            os.kill(os.getpid(), signal.SIGINT)
        seen.append(0)
        return whole(self, images, labels)

    train_imagenet.Training._step = interrupting  # type: ignore[method-assign] - Ctrl-C put in on purpose


if __name__ == "__main__":
    for variable, act in (("DIE_AT", die_at), ("INTERRUPT_AT", interrupted_at)):
        if variable in os.environ:
            act(*map(int, os.environ[variable].split(":")))
    raise SystemExit(train_imagenet.record(train_imagenet.main)())
