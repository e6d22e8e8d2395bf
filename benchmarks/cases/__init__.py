"""The registry: every case that is measured, in one place, each family's most important one first.

Backends, compilation, the gate, clocks and memory are the same for all and live in `measure`. To add a case, append it
to one of the lists named here.
"""

from __future__ import annotations

from itertools import zip_longest

from ..harness.case import Case
from .dwt import dwt_cases
from .haar import haar_cases
from .transforms import transform_cases
from .wavemix import waveblock_cases, wavemix_cases
from .wavemlp import patm_cases, wavemlp_cases


def registry() -> list[Case]:
    """All cases in the order in which they run: by turns, so that a short run has something of each family."""
    families = (
        waveblock_cases(), patm_cases(), haar_cases(), dwt_cases(), transform_cases(), wavemix_cases(), wavemlp_cases(),
    )  # fmt: skip
    return [case for turn in zip_longest(*families) for case in turn if case is not None]
