"""The operators: one file each, with its public function, checks, fake, gradient and table of backends.

Each module has ``BACKENDS`` (its table) and ``self_test(backend, device)``, a run against the reference in float64
that returns the relative error and the bound it must keep.
"""

from __future__ import annotations

import importlib
from types import ModuleType

#: The one list of operators: name -> module under ``wavemix_kernels.ops``.
OPS = {
    "haar": "haar.op",
    "haar_pyramid": "haar.pyramid",
    "haar_bands": "haar.bands",
    "reduce_haar": "reduce_haar.op",
    "pointwise_mlp": "mlp.op",
    "deconv": "deconv.op",
    "batch_norm": "norm.batch_norm",
    "phase_aggregate": "patm.phases",
    "branch_sum": "patm.branches",
    "pre_norm": "norm.pre_norm",
    "patm_whole": "patm.whole",
    "channel_mlp": "mlp.channel",
}


def load(name: str) -> ModuleType:
    """The module of an operator of :data:`OPS`."""
    return importlib.import_module(f"{__name__}.{OPS[name]}")
