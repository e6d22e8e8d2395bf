"""Fused kernels for Haar wavelets, WaveMix and Wave-MLP in PyTorch."""

from wavemix_kernels import _startup, wavemix  # noqa: F401  (_startup first: it says what is missing)
from wavemix_kernels._version import __version__
from wavemix_kernels.accelerate import accelerate
from wavemix_kernels.backends import backend
from wavemix_kernels.inference import export_form, fuse_for_inference
from wavemix_kernels.nn.wavemix.block import FusedWaveblock
from wavemix_kernels.nn.wavemlp.patm import FusedPATM
from wavemix_kernels.ops.common import flops
from wavemix_kernels.ops.haar.op import haar_dwt2d, haar_idwt2d
from wavemix_kernels.tune import tune
from wavemix_kernels.warmup import warmup

flops.install()

__all__ = [
    "FusedPATM",
    "FusedWaveblock",
    "__version__",
    "accelerate",
    "backend",
    "export_form",
    "fuse_for_inference",
    "haar_dwt2d",
    "haar_idwt2d",
    "tune",
    "warmup",
    "wavemix",
]
