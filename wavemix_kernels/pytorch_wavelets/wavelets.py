"""The filters of a wavelet: by name, from a `pywt.Wavelet`, or given."""

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from wavemix_kernels.tracing import constant_result

__all__ = ["WaveletLike", "filters_of"]

_S = math.sqrt(0.5)


@runtime_checkable
class WaveletLike(Protocol):
    """The four filters of a `pywt.Wavelet`, in PyWavelets' order of taps."""

    dec_lo: Sequence[float]
    dec_hi: Sequence[float]
    rec_lo: Sequence[float]
    rec_hi: Sequence[float]


class _Haar:
    dec_lo: Sequence[float] = (_S, _S)
    dec_hi: Sequence[float] = (-_S, _S)
    rec_lo: Sequence[float] = (_S, _S)
    rec_hi: Sequence[float] = (_S, -_S)


@constant_result
def filters_of(wave: str | WaveletLike | Sequence[Any], low: str, high: str, axes: int = 2) -> list[list[float]]:
    """The filters low_col, high_col, low_row, high_row of `wave`, or low and high of one axis; its attributes `low` and
    `high` count."""
    bank: Any = _by_name(wave) if isinstance(wave, str) else wave
    if isinstance(bank, WaveletLike):
        bank = (getattr(bank, low), getattr(bank, high))
    elif hasattr(bank, "tolist"):
        bank = bank.tolist()
    if not isinstance(bank, (tuple, list)):
        raise TypeError(
            f"wave: expected a wavelet's name, a pywt.Wavelet or a tuple of filters, got {type(wave).__name__}"
        )
    if len(bank) not in (2, 2 * axes):
        raise ValueError(f"wave: expected 2 filters{', or 4 where the axes differ' * (axes - 1)}, got {len(bank)}")
    filters = []
    for taps in bank:
        try:
            values = taps.tolist() if hasattr(taps, "tolist") else taps
            # On the CPU whatever the default device is: under a meta device there would be no numbers.
            filters.append(torch.tensor(values, dtype=torch.float64, device="cpu").flatten().tolist())
        except (TypeError, ValueError) as error:
            raise TypeError(f"wave: expected filters of real numbers, got {taps!r}") from error
    for first, second in zip(filters[::2], filters[1::2], strict=True):
        if len(first) != len(second) or len(first) < 2:
            raise ValueError(
                f"wave: expected filters of at least 2 taps, equally many in the two of an axis, "
                f"got {len(first)} and {len(second)}"
            )
    return filters * (2 * axes // len(filters))


def _by_name(name: str) -> WaveletLike:
    if name.lower() in ("haar", "db1"):
        return _Haar()
    try:
        import pywt
    except ModuleNotFoundError as error:
        raise ImportError(
            f"wave={name!r}: filters by name come from PyWavelets, which is missing: pip install PyWavelets "
            f'("haar", "db1" and filters in a tuple work without it)'
        ) from error
    try:
        return pywt.Wavelet(name)
    except ValueError as error:
        raise ValueError(
            f"wave={name!r}: expected a discrete wavelet, one of pywt.wavelist(kind='discrete')"
        ) from error
