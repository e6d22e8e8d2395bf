"""The registry: every case that is measured, in one place.

Backends, compilation, the gate, clocks and memory are the same for all and live in `measure`. To add a case, append it
to one of the lists named here.
"""

from __future__ import annotations

from ..harness.case import Case
from .dwt import dwt_cases
from .haar import haar_cases
from .wavemix import waveblock_cases, wavemix_cases
from .wavemlp import patm_cases, wavemlp_cases


def registry() -> list[Case]:
    """All cases, in the order in which they run."""
    return [*haar_cases(), *dwt_cases(), *waveblock_cases(), *patm_cases(), *wavemix_cases(), *wavemlp_cases()]
