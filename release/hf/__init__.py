"""Haar wavelets, WaveMix and Wave-MLP by fused Triton kernels. ``layers`` has what ``kernelize`` takes."""

from wavemix_kernels import (
    _startup,  # noqa: F401  (it says what is missing)
    layers,
)
from wavemix_kernels._version import __version__
from wavemix_kernels.accelerate import accelerate
from wavemix_kernels.backends import backend
from wavemix_kernels.inference import fuse_for_inference
from wavemix_kernels.nn.wavemix.block import FusedWaveblock
from wavemix_kernels.nn.wavemlp.patm import FusedPATM
from wavemix_kernels.ops.haar.op import haar_dwt2d, haar_idwt2d

__all__ = [
    "FusedPATM",
    "FusedWaveblock",
    "__version__",
    "accelerate",
    "backend",
    "fuse_for_inference",
    "haar_dwt2d",
    "haar_idwt2d",
    "layers",
]
