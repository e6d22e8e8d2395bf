"""Drop-in for the DWT modules of `pytorch_wavelets`, 2-D and 1-D: same constructors, results and state dicts.

Filters that equal Haar's run on the fused Haar kernels, all others on kernels for any filters. docs/wavelets.md says
where the original and PyWavelets differ, and which of them is followed.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from wavemix_kernels import checks, fx, log
from wavemix_kernels.ops.common.layout import is_channels_last
from wavemix_kernels.ops.dwt.op import dwt1d, dwt2d, idwt1d, idwt2d
from wavemix_kernels.ops.dwt.reference import Filters, cropped, synthesis_sizes
from wavemix_kernels.ops.haar.op import MODES, haar_dwt2d, haar_idwt2d
from wavemix_kernels.tracing import constant_result

__all__ = [
    "DWT", "DWT1D", "DWT2D", "IDWT", "IDWT1D", "IDWT2D", "DWT1DForward", "DWT1DInverse", "DWTForward", "DWTInverse",
]  # fmt: skip

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_S = math.sqrt(0.5)
# Haar's coefficient as each dtype rounds it: a buffer that went through a cast still means Haar.
_ROUNDED = tuple(torch.tensor(_S, dtype=dtype).item() for dtype in _DTYPES)


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


class _FilterBank(nn.Module):
    """Four filter buffers, and whether they hold Haar's as a plain attribute: forward need not read them."""

    _names: tuple[str, str, str, str]

    def __init__(self, filters: Sequence[Sequence[float]], mode: str) -> None:
        super().__init__()
        for name, taps in zip(self._names, filters, strict=True):
            shape = (1, 1, -1, 1) if name.endswith("col") else (1, 1, 1, -1)
            self.register_buffer(name, torch.tensor(taps, dtype=torch.get_default_dtype()).reshape(shape))
        self.mode = mode
        _checked_mode(mode)
        # The numbers given decide, not the buffers: under a meta device these hold none.
        self._haar = self._equals_haar(filters)
        self._remember()

    def refresh_filters(self) -> None:
        """Read the buffers again to decide whether they hold Haar's filters.

        Happens by itself after load_state_dict, a move or cast, an assignment, and a write in place on the
        CPU. Call it after a write in place on another device: forward does not look for those, as
        DistributedDataParallel broadcasts buffers in place at every step and each look would stall the
        device. Call it too after an assignment or write in place where torch.compile has compiled the module.
        """
        self._remember()
        filters = self._buffers_in_order()
        # Meta and fake tensors hold no numbers yet; what is loaded into them later is read then.
        if not any(f.is_meta or type(f) not in (Tensor, nn.Parameter) for f in filters):
            self._haar = self._equals_haar([f.detach().flatten().tolist() for f in filters])

    def _remember(self) -> None:
        # The tensors themselves, not their ids: an id is given again once its tensor is gone. The count of writes
        # only on the CPU, as refresh_filters says; inference tensors keep none, and a compiler sees none.
        compiled = torch.compiler.is_compiling()
        self._seen = [
            (f, None if compiled or f.device.type != "cpu" or f.is_inference() else f._version)
            for f in self._buffers_in_order()
        ]

    def _runs_haar(self) -> bool:
        """Whether the Haar kernels run."""
        low_col, high_col, low_row, high_row = filters = self._buffers_in_order()
        if low_col.requires_grad or high_col.requires_grad or low_row.requires_grad or high_row.requires_grad:
            log.fallback(self, "its filters are learned and need a gradient of their own", "plain convolutions")
            return False
        if not torch.compiler.is_compiling():
            for now, (then, version) in zip(filters, self._seen, strict=True):
                if now is not then or (version is not None and now._version != version):
                    self.refresh_filters()
                    break
        return self._haar

    def _how(self) -> tuple[str, Filters | None]:
        """The mode, and the filters, None for Haar's."""
        return _checked_mode(self.mode), None if self._runs_haar() else self._filters()

    def _filters(self) -> Filters:
        # The original hands its "col" filters to the pass along W and its "row" filters to the one along H.
        low_col, high_col, low_row, high_row = self._buffers_in_order()
        return Filters(low_w=low_col, high_w=high_col, low_h=low_row, high_h=high_row)

    def _buffers_in_order(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        low_col, high_col, low_row, high_row = self._names
        return getattr(self, low_col), getattr(self, high_col), getattr(self, low_row), getattr(self, high_row)

    def _equals_haar(self, filters: Sequence[Sequence[float]]) -> bool:
        def equal(taps: Sequence[float], signs: tuple[float, float]) -> bool:
            return len(taps) == 2 and all(
                any(abs(tap * sign - s) <= 2**-52 for s in _ROUNDED) for tap, sign in zip(taps, signs, strict=True)
            )

        low, high = (1.0, 1.0), (1.0, -1.0)  # mirrored for analysis or not for synthesis: the same in both
        return all(map(equal, filters, (low, high, low, high)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_FilterBank":
        super()._apply(fn, recurse)
        self.refresh_filters()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.refresh_filters()


class DWTForward(_FilterBank):
    """Multi-level 2-D discrete wavelet transform, `pytorch_wavelets.DWTForward`.

    Args:
        J: number of levels, 0 or more.
        wave: 'haar' or 'db1'; with PyWavelets installed the name of any discrete wavelet; a `pywt.Wavelet`; or
            the analysis filters (h0, h1) or (h0_col, h1_col, h0_row, h1_row) as arrays, tensors or lists in
            PyWavelets' order of taps, at least 2 taps, equally many in the two filters of an axis. As in the
            original, the "col" pair filters along W and the "row" pair along H.
        mode: how the signal goes on past its ends: 'zero', 'constant', 'symmetric', 'reflect', 'periodic',
            'smooth', 'antisymmetric', 'antireflect' or 'periodization' ('per').

    Buffers h0_col, h1_col (1, 1, L, 1) and h0_row, h1_row (1, 1, 1, L) hold the filters mirrored, in the
    default dtype. Filters that require grad are learned: they get their gradient, and the convolutions are
    used.

    Raises:
        TypeError, ValueError: arguments that fit none of this.
        ImportError: a name that needs PyWavelets, which is missing.
    """

    _names = ("h0_col", "h1_col", "h0_row", "h1_row")

    def __init__(self, J: int = 1, wave: str | WaveletLike | Sequence[Any] = "db1", mode: str = "zero") -> None:
        super().__init__([taps[::-1] for taps in _taps(wave, "dec_lo", "dec_hi")], mode)
        self.J = _checked_levels(J)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Analysis. The half dtypes are computed in float32; autocast changes nothing.

        Args:
            x: (N, C, H, W), float64, float32, float16 or bfloat16.

        Returns:
            ``(yl, yh)`` of x's dtype, contiguous: yl (N, C, h_J, w_J), yh a list of J tensors (N, C, 3, h_j, w_j), the
            finest first, with bands LH, HL, HH.

        Raises:
            TypeError: another dtype.
            ValueError: another rank, an empty H or W, or a size of 1 in mode 'reflect' or 'antireflect'.
        """
        if isinstance(x, fx.Proxy):
            return fx.call_module(self, x, lambda x: _analyse(x, *self._how(), self.J))
        checks.check_tensor("x", x, 4, "(N, C, H, W)")
        return _analyse(x, *self._how(), self.J)


class DWTInverse(_FilterBank):
    """Multi-level 2-D inverse wavelet transform, `pytorch_wavelets.DWTInverse`.

    Args:
        wave: as for :class:`DWTForward`; a tuple holds the synthesis filters, (g0, g1) or
            (g0_col, g1_col, g0_row, g1_row).
        mode: as for :class:`DWTForward`; all modes but 'periodization' reconstruct in the same way.

    Buffers g0_col, g1_col (1, 1, L, 1) and g0_row, g1_row (1, 1, 1, L) hold the filters unmirrored. Learned
    filters are as for :class:`DWTForward`.

    Raises:
        TypeError, ValueError, ImportError: as :class:`DWTForward`.
    """

    _names = ("g0_col", "g1_col", "g0_row", "g1_row")

    def __init__(self, wave: str | WaveletLike | Sequence[Any] = "db1", mode: str = "zero") -> None:
        super().__init__(_taps(wave, "rec_lo", "rec_hi"), mode)

    def forward(self, coeffs: tuple[Tensor, Sequence[Tensor | None]]) -> Tensor:
        """Synthesis. Where the running low-pass is one row or column larger than its level's yh, that one is dropped;
        an odd H or W itself therefore comes out one larger.

        Args:
            coeffs: ``(yl, yh)`` as :class:`DWTForward` returns them. None in yh is a level of zeros.

        Returns:
            The image (N, C, H, W), of yl's dtype, contiguous.

        Raises:
            TypeError: dtypes other than DWTForward's and, outside autocast, different ones in yl and yh.
            ValueError: ranks, sizes or devices that do not fit.
        """
        if isinstance(coeffs, fx.Proxy) or (isinstance(coeffs, tuple) and isinstance(coeffs[0], fx.Proxy)):
            return fx.call_module(self, coeffs, lambda coeffs: _synthesise(*coeffs, *self._how()))
        if not isinstance(coeffs, (tuple, list)) or len(coeffs) != 2:
            raise TypeError(f"coeffs: expected a pair (yl, yh), got {checks.describe(coeffs)}")
        return _synthesise(*coeffs, *self._how())


class DWT1DForward(nn.Module):
    """Multi-level 1-D discrete wavelet transform, `pytorch_wavelets.DWT1DForward`.

    Args:
        J, mode: as for :class:`DWTForward`.
        wave: as for :class:`DWTForward`; a tuple holds the two analysis filters (h0, h1).

    Buffers h0, h1 (1, 1, L) hold the filters mirrored, in the default dtype. Learned filters are as for
    :class:`DWTForward`.

    Raises:
        TypeError, ValueError, ImportError: as :class:`DWTForward`.
    """

    def __init__(self, J: int = 1, wave: str | WaveletLike | Sequence[Any] = "db1", mode: str = "zero") -> None:
        super().__init__()
        _hold(self, ("h0", "h1"), [taps[::-1] for taps in _taps(wave, "dec_lo", "dec_hi", axes=1)])
        self.J, self.mode = _checked_levels(J), mode
        _checked_mode(mode)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Analysis of x (N, C, L) along L. Returns ``(yl, yh)`` of x's dtype: yl (N, C, l_J) and yh a list of J tensors
        (N, C, l_j), the finest first. Raises as :meth:`DWTForward.forward`."""
        if isinstance(x, fx.Proxy):
            return fx.call_module(self, x, lambda x: fx.call_function(_analyse_lines, x, *_lines(self), self.J))
        checks.check_tensor("x", x, 3, "(N, C, L)")
        return _analyse_lines(x, *_lines(self), self.J)


class DWT1DInverse(nn.Module):
    """Multi-level 1-D inverse wavelet transform, `pytorch_wavelets.DWT1DInverse`.

    Args:
        wave: as for :class:`DWT1DForward`; a tuple holds the two synthesis filters (g0, g1).
        mode: as for :class:`DWTInverse`.

    Buffers g0, g1 (1, 1, L) hold the filters unmirrored.

    Raises:
        TypeError, ValueError, ImportError: as :class:`DWTForward`.
    """

    def __init__(self, wave: str | WaveletLike | Sequence[Any] = "db1", mode: str = "zero") -> None:
        super().__init__()
        _hold(self, ("g0", "g1"), _taps(wave, "rec_lo", "rec_hi", axes=1))
        self.mode = mode
        _checked_mode(mode)

    def forward(self, coeffs: tuple[Tensor, Sequence[Tensor | None]]) -> Tensor:
        """Synthesis of ``(yl, yh)`` as :class:`DWT1DForward` returns them, None in yh being zeros. Returns the lines
        (N, C, L); odd lengths and errors are as for :meth:`DWTInverse.forward`."""
        if isinstance(coeffs, fx.Proxy) or (isinstance(coeffs, tuple) and isinstance(coeffs[0], fx.Proxy)):
            return fx.call_module(self, coeffs, lambda c: fx.call_function(_synthesise_lines, *c, *_lines(self)))
        if not isinstance(coeffs, (tuple, list)) or len(coeffs) != 2:
            raise TypeError(f"coeffs: expected a pair (yl, yh), got {checks.describe(coeffs)}")
        return _synthesise_lines(*coeffs, *_lines(self))


DWT = DWT2D = DWTForward
IDWT = IDWT2D = DWTInverse
DWT1D = DWT1DForward
IDWT1D = DWT1DInverse


def _hold(module: nn.Module, names: Sequence[str], filters: Sequence[Sequence[float]]) -> None:
    for name, taps in zip(names, filters, strict=True):
        module.register_buffer(name, torch.tensor(taps, dtype=torch.get_default_dtype()).reshape(1, 1, -1))


def _lines(module: DWT1DForward | DWT1DInverse) -> tuple[str, list[Tensor]]:
    """The mode, and the filters low and high."""
    names = ("h0", "h1") if isinstance(module, DWT1DForward) else ("g0", "g1")
    filters = [getattr(module, name) for name in names]
    if any(f.requires_grad for f in filters):
        log.fallback(module, "its filters are learned and need a gradient of their own", "plain convolutions")
    return _checked_mode(module.mode), filters


def _analyse_lines(x: Tensor, mode: str, filters: list[Tensor], levels: int) -> tuple[Tensor, list[Tensor]]:
    return dwt1d(x, filters, levels, mode=mode) if levels else (x, [])


def _synthesise_lines(yl: Tensor, yh: Sequence[Tensor | None], mode: str, filters: list[Tensor]) -> Tensor:
    yl, yh = _checked_coefficients(yl, yh, "(N, C, l)")
    return idwt1d(yl, yh, filters, mode=mode) if yh else yl


def _analyse(x: Tensor, mode: str, filters: Filters | None, levels: int) -> tuple[Tensor, list[Tensor]]:
    if isinstance(x, fx.Proxy):
        return fx.call_function(_analyse, x, mode, filters, levels)
    if levels == 0:
        return x, []
    if filters is not None:
        return dwt2d(x, filters, levels, mode=mode)
    # Results are contiguous, as the original's; of one pass over channels_last, reordering x costs least.
    return haar_dwt2d(x.contiguous() if is_channels_last(x) else x, levels, mode=mode)


def _synthesise(yl: Tensor, yh: Sequence[Tensor | None], mode: str, filters: Filters | None) -> Tensor:
    if isinstance(yl, fx.Proxy):
        return fx.call_function(_synthesise, yl, yh, mode, filters)
    yl, yh = _checked_coefficients(yl, yh, "(N, C, 3, h, w)")
    if not yh:
        return yl
    if filters is not None:
        return idwt2d(yl, yh, filters, mode=mode)
    *sizes, size = synthesis_sizes(yl, yh, (2, 2), mode)
    # One zero seen from everywhere stands for a level of None: nothing is allocated.
    highs = [
        yl.new_zeros(()).expand(*yl.shape[:2], 3, *level_size) if high is None else high
        for high, level_size in zip(yh, reversed(sizes), strict=True)
    ]
    return haar_idwt2d(cropped(yl, sizes[0]), highs, mode=mode, size=size).contiguous()


def _checked_levels(levels: int) -> int:
    try:
        number = operator.index(levels)
    except TypeError:
        raise TypeError(f"J: expected an int, the number of levels, got {checks.describe(levels)}") from None
    if number < 0:
        raise ValueError(f"J: expected 0 or more levels, got {number}")
    return number


def _checked_mode(mode: str) -> str:
    checks.check_choice("mode", mode, MODES)
    return "periodization" if mode == "per" else mode


def _checked_coefficients(
    yl: Tensor, yh: Sequence[Tensor | None], shape: str
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """yl and yh in one dtype: under autocast, where bands may have met different ops, the widest of theirs. `shape` is
    that of a high."""
    images = "3" in shape
    checks.check_tensor("yl", yl, 4 if images else 3, "(N, C, h, w)" if images else shape)
    if not isinstance(yh, (tuple, list)):
        raise TypeError(f"yh: expected a list of tensors {shape} or None, got {checks.describe(yh)}")
    widest = yl.dtype
    for level, high in enumerate(yh):
        if high is None:
            continue
        name = f"yh[{level}]"
        checks.check_tensor(name, high, 5 if images else 3, shape)
        checks.check_same_device(name, high, "yl", yl)
        if images and high.shape[2] != 3:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(high.shape)}")
        if high.dtype != widest:
            if not torch.is_autocast_enabled(yl.device.type):
                checks.check_same_dtype(name, high, "yl", yl)
            widest = torch.promote_types(widest, high.dtype)
    if widest == yl.dtype and all(high is None or high.dtype == widest for high in yh):
        return yl, yh
    return yl.to(widest), [high if high is None else high.to(widest) for high in yh]


@constant_result
def _taps(wave: str | WaveletLike | Sequence[Any], low: str, high: str, axes: int = 2) -> list[list[float]]:
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
