"""Filters of the dual-tree complex wavelet transform, by name.

'near_sym_a' is built in, in closed form; tests check that it reconstructs perfectly. 'legall' and 'antonini' are
PyWavelets' bior2.2 and bior4.4. All others are read from the data files of an installed `dtcwt` or `pytorch_wavelets`,
neither of which is imported: both are "free to use but restricted", so their numbers are not part of this package.
"""

import functools
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wavemix_kernels import checks

Taps = NDArray[np.float64]

#: The data folder of each package that has one.
_DATA = {"dtcwt": "data", "pytorch_wavelets": "dtcwt/data"}
_PYWAVELETS = {"legall": "bior2.2", "antonini": "bior4.4"}
_LEVEL_1 = ("near_sym_a", *_PYWAVELETS, "near_sym_b", "near_sym_b_bp")
_LEVEL_2 = ("qshift_06", "qshift_32", "qshift_a", "qshift_b", "qshift_b_bp", "qshift_c", "qshift_d")
_BOTH_TREES = ("farras", "near_sym_a2")


def biort(name: str) -> tuple[Taps, ...]:
    """The filters of level 1, one bank for both trees.

    Args:
        name: 'near_sym_a', 'legall', 'antonini', 'near_sym_b' or 'near_sym_b_bp'.

    Returns:
        h0o, g0o, h1o, g1o, each (L, 1) float64; 'near_sym_b_bp' has h2o and g2o too.

    Raises:
        ValueError: another name.
        ImportError: the package that has the filters is not installed.
    """
    checks.check_choice("biort", name, _LEVEL_1)
    if name == "near_sym_a":
        low, back = np.array([-1, 5, 12, 5, -1]) / 20, np.array([-3, -15, 73, 170, 73, -15, -3]) / 280
    elif name in _PYWAVELETS:
        low, back = _from_pywavelets(name)
    else:
        return _read("biort", name, ("h0o", "g0o", "h1o", "g1o") + ("h2o", "g2o") * name.endswith("_bp"))
    low, back = low.reshape(-1, 1), back.reshape(-1, 1)
    return low, back, _modulated(back), _modulated(low)


def qshift(name: str) -> tuple[Taps, ...]:
    """The filters of levels 2 and up.

    Args:
        name: 'qshift_06', 'qshift_32', 'qshift_a', 'qshift_b', 'qshift_c', 'qshift_d' or 'qshift_b_bp'.

    Returns:
        h0a, h0b, g0a, g0b, h1a, h1b, g1a, g1b, each (L, 1) float64; 'qshift_b_bp' has h2a, h2b, g2a and g2b too.

    Raises:
        ValueError: another name.
        ImportError: neither `dtcwt` nor `pytorch_wavelets` is installed.
    """
    checks.check_choice("qshift", name, _LEVEL_2)
    return _read("qshift", name, _of_trees("012" if name.endswith("_bp") else "01"))


def level1(name: str, compact: bool = False) -> tuple[Taps, ...]:
    """:func:`biort` where `compact`; else the filters of level 1 that differ between the trees, 'farras' or
    'near_sym_a2', as :func:`qshift` returns them. `dtcwt` does not have these two."""
    if compact:
        return biort(name)
    checks.check_choice("name", name, _BOTH_TREES)
    return _read("name", name, _of_trees("01"))


def given(argument: str, filters: Any, names: Sequence[str]) -> Sequence[Any]:
    """The filters that a caller gives instead of a name.

    Raises:
        TypeError: no list or tuple.
        ValueError: fewer than `names`.
    """
    expected = f"{argument}: expected a name or the filters ({', '.join(names)})"
    if not isinstance(filters, (tuple, list)):
        raise TypeError(f"{expected}, got {checks.describe(filters)}")
    if len(filters) < len(names):
        raise ValueError(f"{expected}, got {len(filters)}")
    return filters[: len(names)]


def _of_trees(bands: str) -> tuple[str, ...]:
    return tuple(f"{kind}{band}{tree}" for band in bands for kind in "hg" for tree in "ab")


def _modulated(taps: Taps) -> Taps:
    """The high-pass that goes with the symmetric low-pass of the other side."""
    return taps * (-1.0) ** (np.arange(taps.size) - taps.size // 2).reshape(-1, 1)


def _from_pywavelets(name: str) -> tuple[Taps, Taps]:
    """The low-pass filters, scaled to a gain of 1 at analysis and synthesis, without the zeros around."""
    try:
        import pywt
    except ModuleNotFoundError as error:
        raise ImportError(
            f"biort={name!r}: these filters come from PyWavelets, which is missing: pip install PyWavelets"
        ) from error
    wavelet = pywt.Wavelet(_PYWAVELETS[name])
    low, back = (np.trim_zeros(np.array(taps)) / 2**0.5 for taps in (wavelet.dec_lo, wavelet.rec_lo))
    return low, back


def _read(argument: str, name: str, keys: Sequence[str]) -> tuple[Taps, ...]:
    for package, folder in _DATA.items():
        # Not imported: pytorch_wavelets fails beside setuptools 82. Not from sys.modules: we may stand in there.
        found = PathFinder.find_spec(package)
        for place in (found and found.submodule_search_locations) or ():
            file = Path(place, folder, f"{name}.npz")
            if file.is_file():
                filters = _loaded(file)
                return tuple(filters[key].copy() for key in keys)
    packages = "pytorch_wavelets" if name in _BOTH_TREES else "dtcwt (or pytorch_wavelets)"
    raise ImportError(
        f"{argument}={name!r}: these filters are 'free to use but restricted', hence not part of wavemix_kernels, and "
        f"no installed package has them: pip install {packages}, or give DTCWTForward and DTCWTInverse the filters"
    )


@functools.cache
def _loaded(file: Path) -> dict[str, Taps]:
    with np.load(file, allow_pickle=False) as data:
        return {key: np.asarray(data[key], dtype=np.float64) for key in data.files if key[:1] in "gh"}
