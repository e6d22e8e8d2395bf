"""Kernels that a GPU has verified: the one list, read by :mod:`wavemix_kernels.ops.verify` and by docs/gpu-status.md.

An entry says that the tests of an operator passed with ``--device cuda`` on a GPU of that architecture, for every dtype
that the backend serves. ``benchmarks/gpu.sh`` runs them. ``python -m benchmarks publish`` then writes the page.
"""

from __future__ import annotations

from typing import NamedTuple


class Verified(NamedTuple):
    commit: str
    date: str  # year-month-day


#: (operator of :data:`wavemix_kernels.ops.OPS`, backend, architecture such as "sm_90") -> when. Nothing so far: no GPU
#: has run these kernels.
VERIFIED: dict[tuple[str, str, str], Verified] = {}
