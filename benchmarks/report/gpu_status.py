"""The table of docs/gpu-status.md, from :mod:`wavemix_kernels.ops.verified` and the operators' tables of backends."""

from __future__ import annotations

from wavemix_kernels import ops
from wavemix_kernels.ops.verified import VERIFIED

BACKENDS = ("cuda", "triton")

#: The work of an operator's kernels, beside its name.
_NOTES = {
    "haar": "analysis, synthesis",
    "haar_pyramid": "forward, backward",
    "haar_bands": "WTConv; haar's kernels on strided bands",
    "haar_blocks": "1-D, 3-D and the conventions of other codes",
    "dwt": "other wavelets: images in one pass up to 16 taps, a pass for each axis beyond",
    "filter_bank": "undecimated and dual-tree transforms: one pass; a transpose that folds its border takes more",
    "quads": "the dual-tree transform's complex numbers: one pass",
    "reduce_haar": "forward; backward: one kernel; cuda's for half types, else haar_pyramid's and library "
    "convolutions; triton has its own for one level of 8 to 32 channels in half types and channels_last, which `auto` "
    "takes",
    "pointwise_mlp": "forward; backward: all gradients in one kernel up to 16 channels and units in half types",
    "deconv": "forward with statistics; both gradients and BatchNorm's backward in one launch; by name only, `auto` "
    "takes cuDNN",
    "batch_norm": "statistics, apply, backward",
    "phase_aggregate": "PATM: forward, backward",
    "branch_weights": "PATM: forward, backward",
    "branch_sum": "PATM",
    "pre_norm": "norm, residual and stochastic depth around Wave-MLP's mixers",
    "patm_whole": "PATM from end to end: on a GPU half types, 64, 96 or 128 channels",
    "channel_mlp": "Wave-MLP's MLP: pointwise_mlp's kernels",
    "wtconv": "WTConv's levels: forward, backward",
}


def table() -> str:
    """A row for each operator, a column for each kind of GPU kernels."""
    lines = [] if VERIFIED else ["No GPU has verified anything yet.", ""]
    lines += ["| op | " + " | ".join(BACKENDS) + " |", "| --- " * (len(BACKENDS) + 1) + "|"]
    for op in ops.OPS:
        lines.append("| " + " | ".join([f"{op} ({_NOTES[op]})", *(_cell(op, backend) for backend in BACKENDS)]) + " |")
    return "\n".join(lines) + "\n"


def _cell(op: str, backend: str) -> str:
    if backend not in ops.load(op).BACKENDS:
        return "no kernels"
    found = [
        f"{architecture}: {entry.commit[:10]}, {entry.date}"
        for (of, by, architecture), entry in sorted(VERIFIED.items())
        if (of, by) == (op, backend)
    ]
    return "; ".join(found) or "not yet"
