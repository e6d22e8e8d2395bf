"""The operators: one folder for each family (haar, dwt, wtconv, reduce_haar, mlp, deconv, norm, patm), with the
public functions, checks, fakes, gradients and tables of backends in its ``op.py`` or a file named after the operator.

:mod:`wavemix_kernels.ops.choose` decides which backend runs. The module of each operator in :data:`OPS` has
``BACKENDS`` (its table) and ``self_test(backend, device)``, a run against the reference in float64 that returns the
relative error and the bound it must keep.

Public functions: ``from wavemix_kernels.ops.haar import haar_dwt2d, haar_idwt2d, haar_pyramid``,
``from wavemix_kernels.ops.reduce_haar import reduce_haar``, ``from wavemix_kernels.ops.mlp import pointwise_mlp``,
``from wavemix_kernels.ops.deconv import deconv``, ``from wavemix_kernels.ops.patm import phase_aggregate``.
"""

from __future__ import annotations

import importlib
from types import ModuleType

#: The one list of operators: name -> module under ``wavemix_kernels.ops``.
OPS = {
    "haar": "haar.op",
    "haar_pyramid": "haar.pyramid",
    "haar_bands": "haar.bands",
    "haar_blocks": "haar.blocks",
    "dwt": "dwt.op",
    "filter_bank": "dwt.bank",
    "quads": "dwt.quads",
    "reduce_haar": "reduce_haar.op",
    "pointwise_mlp": "mlp.op",
    "deconv": "deconv.op",
    "batch_norm": "norm.batch_norm",
    "phase_aggregate": "patm.phases",
    "branch_weights": "patm.branch_weights",
    "branch_sum": "patm.branches",
    "pre_norm": "norm.pre_norm",
    "patm_whole": "patm.whole",
    "channel_mlp": "mlp.channel",
    "wtconv": "wtconv.op",
}


def load(name: str) -> ModuleType:
    """The module of an operator of :data:`OPS`."""
    return importlib.import_module(f"{__name__}.{OPS[name]}")
