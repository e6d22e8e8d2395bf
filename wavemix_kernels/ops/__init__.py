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
from typing import NamedTuple


class Op(NamedTuple):
    """An operator: its module under ``wavemix_kernels.ops``, and the work of its GPU kernels beside its name."""

    module: str
    work: str


#: The one list of operators.
OPS = {
    "haar": Op("haar.op", "analysis, synthesis"),
    "haar_pyramid": Op("haar.pyramid", "forward, backward"),
    "haar_bands": Op("haar.bands", "WTConv; haar's kernels on strided bands"),
    "haar_blocks": Op("haar.blocks", "1-D, 3-D and the conventions of other codes"),
    "dwt": Op("dwt.op", "other wavelets: images in one pass up to 16 taps, a pass for each axis beyond"),
    "filter_bank": Op(
        "dwt.bank", "undecimated and dual-tree transforms: one pass; a transpose that folds its border takes more"
    ),
    "quads": Op("dwt.quads", "the dual-tree transform's complex numbers: one pass"),
    "reduce_haar": Op(
        "reduce_haar.op",
        "forward; backward: one kernel; cuda's for half types, else haar_pyramid's and library convolutions; triton "
        "has its own for one level of 8 to 32 channels in half types and channels_last, which `auto` takes",
    ),
    "norm_reduce_haar": Op(
        "reduce_haar.norm_reduce_haar", "between two Waveblocks: BatchNorm, residual and reduce_haar; half types"
    ),
    "pointwise_mlp": Op(
        "mlp.op", "forward; backward: all gradients in one kernel up to 16 channels and units in half types"
    ),
    "normed_mlp": Op("mlp.normed", "pointwise_mlp's backward through a BatchNorm of its second input; half types"),
    "deconv": Op(
        "deconv.op",
        "forward with statistics; both gradients and BatchNorm's backward in one launch; by name only, `auto` takes "
        "cuDNN",
    ),
    "batch_norm": Op("norm.batch_norm", "statistics, apply, backward"),
    "gelu_batch_norm": Op("norm.gelu_batch_norm", "a stem's end: forward, backward"),
    "batch_norm_pool": Op("norm.pooled", "a classifier's end: apply, residual and the average over all pixels"),
    "phase_aggregate": Op("patm.phases", "PATM: forward, backward"),
    "branch_weights": Op("patm.branch_weights", "PATM: forward, backward"),
    "branch_sum": Op("patm.branches", "PATM"),
    "pre_norm": Op("norm.pre_norm", "norm, residual and stochastic depth around Wave-MLP's mixers"),
    "patm_whole": Op("patm.whole", "PATM from end to end: on a GPU half types, 64, 96 or 128 channels"),
    "channel_mlp": Op("mlp.channel", "Wave-MLP's MLP: pointwise_mlp's kernels"),
    "wtconv": Op("wtconv.op", "WTConv's levels: forward, backward"),
}


def load(name: str) -> ModuleType:
    """The module of an operator of :data:`OPS`."""
    return importlib.import_module(f"{__name__}.{OPS[name].module}")
