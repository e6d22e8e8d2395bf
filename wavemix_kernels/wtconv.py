"""WTConv's wavelet functions (Finder et al., "Wavelet Convolutions for Large Receptive Fields", ECCV 2024,
arXiv:2407.05848, BGU-CS-VIL/WTConv) on the Haar kernels, for :func:`wavemix_kernels.accelerate`.

A ``WTConv2d`` keeps its frozen filters as ``wt_filter`` and ``iwt_filter``, (4C, 1, 2, 2), and calls
``wt_function(x)``, (N, C, H, W) -> (N, C, 4, H/2, W/2), and ``iwt_function(bands)``: two grouped convolutions of stride
2. With wavelet 'db1' their bands are ours, order, signs and scale included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from wavemix_kernels import backends, checks, fx, log
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.haar.bands import haar_bands, haar_from_bands

#: (function, its filters), both of one module.
NAMES = (("wt_function", "wt_filter"), ("iwt_function", "iwt_filter"))
NOW = "its wt_function and iwt_function on the Haar kernels"
_SIGNS = ((1, 1, 1, 1), (1, 1, -1, -1), (1, -1, 1, -1), (1, -1, -1, 1))


def _analyse(x: Tensor) -> Tensor:
    (x,) = checks.autocast(x)
    # A convolution of stride 2 leaves an odd last row or column out.
    return haar_bands(x[..., : x.shape[-2] // 2 * 2, : x.shape[-1] // 2 * 2])


def _synthesise(bands: Tensor) -> Tensor:
    (bands,) = checks.autocast(bands)
    return haar_from_bands(bands)


_KERNELS: tuple[Callable[[Tensor], Tensor], ...] = (_analyse, _synthesise)


class HaarFunction:
    """Stands for one of the two functions as long as the filters are Haar's and frozen; else calls the original.

    Args:
        original: the function of the module, bound to ``filters``.
        filters: (4C, 1, 2, 2).
        direction: 0 analysis, 1 synthesis.
    """

    def __init__(self, original: Callable[[Tensor], Tensor], filters: Tensor, direction: int) -> None:
        self.original = original
        self.filters = filters
        self.direction = direction
        self._look()

    def _look(self) -> None:
        self._seen = _version(self.filters)
        reason = why_not_haar(self.filters)
        self._why_not = None if reason is None else f"its filters {reason}"

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return self.original(x)
        # A compiled graph keeps what it was traced with; in eager mode a checkpoint may bring other filters.
        if not torch.compiler.is_compiling() and self._seen != _version(self.filters):
            self._look()
        reason = "its filters are trainable" if self.filters.requires_grad else self._why_not
        if reason is None and _convolution_is_faster(x):
            reason = "channels_last on a CPU"
        if reason is None:
            return _KERNELS[self.direction](x)
        if not torch.compiler.is_compiling() and log.enabled():
            name = NAMES[self.direction][0]
            log.once((name, reason), lambda: f"{name}: runs as its convolution: {reason}")
        return self.original(x)

    def __repr__(self) -> str:
        return f"HaarFunction({self.original!r})"


def _convolution_is_faster(x: Tensor) -> bool:
    """``x`` is an image, or bands (N, C, 4, h, w). A backend asked for by name gets its kernels."""
    channels_last = x.stride(1 if x.dim() == 4 else 2) == 1
    return backends.requested() == "auto" and choose.wavelet_function(x.device.type, channels_last) == "convolution"


def _version(filters: Tensor) -> int | None:
    """Counts writes to ``filters``; tensors made in inference mode do not."""
    return None if filters.is_inference() else filters._version


def why_not_haar(filters: Tensor) -> str | None:
    """None for frozen filters that equal Haar's up to the rounding of their dtype, else what they are instead."""
    if filters.requires_grad:
        return "are trainable"
    if filters.dim() != 4 or filters.shape[0] % 4 or filters.shape[1:] != (1, 2, 2):
        return f"have shape {tuple(filters.shape)}, Haar's (4C, 1, 2, 2)"
    if filters.is_meta:
        return "are on the meta device, without values"
    haar = 0.5 * torch.tensor(_SIGNS, dtype=torch.float64).reshape(4, 1, 2, 2)
    values = filters.detach().double().cpu().unflatten(0, (-1, 4))
    # sqrt(1/2) is rounded, its square once more; WTConv does so in float32, and a later cast to float64 keeps that.
    eps = max(torch.finfo(filters.dtype).eps, torch.finfo(torch.float32).eps)
    if not torch.allclose(values, haar.expand_as(values), rtol=4 * eps, atol=0):
        return "are not Haar's"
    return None


def has_wavelet_functions(module: nn.Module) -> bool:
    """Whether ``module`` has what a WTConv2d has and the functions are not ours yet."""
    pairs = [(getattr(module, function, None), getattr(module, filters, None)) for function, filters in NAMES]
    return all(callable(function) and isinstance(filters, Tensor) for function, filters in pairs) and not all(
        isinstance(function, HaarFunction) for function, _ in pairs
    )


class Unsuitable(Exception):
    """Why the functions of a module cannot be replaced."""


def check(module: nn.Module) -> None:
    """Raises Unsuitable unless ours can stand for both functions of ``module``."""
    theirs: Any = module
    for name, filters in NAMES:
        if (reason := why_not_haar(getattr(theirs, filters))) is not None:
            raise Unsuitable(f"its {filters} {reason}")
        if name not in module.__dict__:
            raise Unsuitable(f"its {name} is a method or module of its class, not an attribute that can be replaced")
    channels = theirs.wt_filter.shape[0] // 4
    # Small integers: their quarter sums are exact in every dtype and in TF32, so only a wrong sign or order differs.
    pattern = (torch.arange(channels * 24) * 5 % 9 - 4).reshape(1, channels, 4, 6).to(theirs.wt_filter)
    try:
        with torch.no_grad():
            bands, ours = theirs.wt_function(pattern), haar_bands(pattern)
            same = bands.shape == ours.shape and torch.allclose(bands, ours, atol=1e-2, rtol=0)
            image = theirs.iwt_function(ours)
            same = same and image.shape == pattern.shape and torch.allclose(image, pattern, atol=1e-2, rtol=0)
    # Whatever a stranger's code raises, the answer is the same: these functions cannot be vouched for.
    except Exception as error:
        raise Unsuitable(
            f"its functions could not be run beside ours to compare: {type(error).__name__}: {error}"
        ) from error
    if not same:
        raise Unsuitable("its functions compute something else than WTConv's")


def install(module: nn.Module) -> None:
    """Puts ours in the place of both functions; the originals stay inside for filters that change."""
    theirs: Any = module
    for direction, (name, filters) in enumerate(NAMES):
        setattr(module, name, HaarFunction(getattr(theirs, name), getattr(theirs, filters), direction))
