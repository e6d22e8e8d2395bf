"""Phase-aware token mixing (PATM)."""

from wavemix_kernels.ops.patm.phases import phase_aggregate

__all__ = ["phase_aggregate"]
