"""The operators: one file each, with its public function, checks, fake, gradient and table of backends.

Each module has ``BACKENDS`` (its table) and ``self_test(backend, device)``, a run against the reference in float64
that returns the relative error and the bound it must keep.
"""

#: The one list of operators, by module name.
OPS = (
    "haar",
    "haar_pyramid",
    "haar_bands",
    "reduce_haar",
    "pointwise_mlp",
    "deconv",
    "batch_norm",
    "phase_aggregate",
    "branch_sum",
    "pre_norm",
    "patm_whole",
    "channel_mlp",
)
