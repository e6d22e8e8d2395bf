"""The table of docs/gpu-status.md, from :mod:`wavemix_kernels.ops.verified` and the operators' tables of backends."""

from __future__ import annotations

from wavemix_kernels import ops
from wavemix_kernels.ops.verified import VERIFIED

BACKENDS = ("cuda", "triton")


def table() -> str:
    """A row for each operator, a column for each kind of GPU kernels."""
    lines = [] if VERIFIED else ["No GPU has verified anything yet.", ""]
    lines += ["| op | " + " | ".join(BACKENDS) + " |", "| --- " * (len(BACKENDS) + 1) + "|"]
    for op, (_, work) in ops.OPS.items():
        lines.append("| " + " | ".join([f"{op} ({work})", *(_cell(op, backend) for backend in BACKENDS)]) + " |")
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
