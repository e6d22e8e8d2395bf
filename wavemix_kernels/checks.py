"""Argument checks of the public functions and modules: each error names the argument, the value and what would work."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wavemix_kernels.ops.common.dtypes import WITHOUT_AUTOCAST, cast_together

_short = reprlib.Repr()
_short.maxother = _short.maxstring = 120


def describe(value: object) -> str:
    """A value as an error message shows it: in one line, arrays by their shape."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)} on {value.device}"
    if (shape := getattr(value, "shape", None)) is not None:
        return f"{type(value).__name__} of shape {shape}"
    return f"{' '.join(_short.repr(value).split())} ({type(value).__name__})"


def check_tensor(name: str, value: object, rank: int, layout: str) -> Tensor:
    """A dense real floating-point tensor of ``rank`` dimensions, without empty H or W.

    Raises:
        TypeError: not a tensor, not strided, or not real floating point.
        ValueError: another rank, or no pixels.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {layout}, got {describe(value)}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}; call .to_dense() first")
    if value.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        remedy = "convert by .float()"
        if value.is_complex():  # .float() drops the imaginary part
            remedy = "pass .real and .imag one after the other; torch.complex joins two results"
        elif value.is_quantized:
            remedy = "convert by .dequantize()"
        raise TypeError(f"{name}: expected float64, float32, float16 or bfloat16, got {describe(value)}; {remedy}")
    if value.dim() != rank:
        raise ValueError(f"{name}: expected {rank} dimensions {layout}, got shape {tuple(value.shape)}")
    if value.shape[-1] == 0 or value.shape[-2] == 0:
        raise ValueError(f"{name}: expected at least one row and column, got shape {tuple(value.shape)}")
    return value


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name}: expected on the device of {other_name}, {other.device}, got {value.device}")


def check_same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: expected the dtype of {other_name}, {other.dtype}, got {value.dtype}")


def check_positive_int(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a positive int, got {describe(value)}")
    if value < 1:
        raise ValueError(f"{name}: expected a positive int, got {value}")
    return value


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")
    return str(value)


def check_multiple(name: str, value: int, unit: int) -> int:
    if value % unit:
        below = value // unit * unit
        near = f"{below} or {below + unit}" if below else f"{unit}"
        raise ValueError(f"{name}={value}: expected a multiple of {unit}; the nearest that work: {near}")
    return value


def check_probability(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a probability from 0 to 1, got {describe(value)}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r}: expected a probability from 0 to 1")
    return float(value)


def autocast(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the dtype that autocast gives a convolution on ``first``'s device; unchanged outside it."""
    tensors = (first, *others)
    if (dtype := autocast_dtype(first)) is None:
        return tensors
    plain = not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    if first.device.type == "cuda" and plain:
        changing = [t for t in others if t is not None and t.dtype != dtype]
        made = iter(_Cast.apply(dtype, *changing) if changing else ())
        return first.to(dtype), *(t if t is None or t.dtype == dtype else next(made) for t in others)
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def autocast_inside(first: Tensor, weights: Sequence[Tensor | None]) -> tuple[torch.dtype, torch.dtype] | None:
    """(autocast's dtype, the weights'), for operators that convert their weights themselves, by fewer nodes of
    autograd's graph; None: there is nothing to convert, weights are of several dtypes, or a compiler traces."""
    dtype = autocast_dtype(first)
    given = {t.dtype for t in weights if t is not None}
    if dtype is None or len(given) != 1 or dtype in given or torch.compiler.is_compiling():
        return None
    return dtype, given.pop()


def autocast_dtype(first: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives a convolution of ``first``; None outside it."""
    kind = first.device.type
    if kind in WITHOUT_AUTOCAST or not torch.is_autocast_enabled(kind) or first.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


class _Cast(torch.autograd.Function):
    """Parameters in one dtype, and their gradients in their own, by one launch each."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [t.dtype for t in tensors]
        ctx.set_materialize_grads(False)
        return tuple(cast_together(tensors, [dtype] * len(tensors)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        pairs = list(zip(grads, ctx.dtypes, strict=True))
        if torch.is_grad_enabled():  # this pass is to be differentiable itself
            return None, *(None if g is None else g.to(dtype) for g, dtype in pairs)
        there = [(g, dtype) for g, dtype in pairs if g is not None]
        made = iter(cast_together([g for g, _ in there], [dtype for _, dtype in there]))
        return None, *(None if g is None else next(made) for g in grads)
