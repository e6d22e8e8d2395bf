"""The choice of an implementation: every decision between two that compute the same, in one place.

A rule is a pure function of shape, dtype, layout and device. It returns the name of an implementation, or names of
backends in the order to try them. Each states what was measured; the tables are in docs/develop/tuning.md. Rules serve
backend ``"auto"``: a backend asked for by name is obeyed or raises. What a backend can do at all is asked of its
``why_not`` (:mod:`wavemix_kernels.backends`), what was measured on this very device of
:mod:`wavemix_kernels.ops.tuned`, whose answer comes before the rules', and whether it computes right on this device of
:mod:`wavemix_kernels.ops.verify`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from wavemix_kernels import log
from wavemix_kernels.backends import NAMES, Backend
from wavemix_kernels.ops import tuned, verify
from wavemix_kernels.ops.common import plan
from wavemix_kernels.ops.common.chips import Products

Order = tuple[str, ...]

#: Backends that "auto" tries, in order, per device type. No GPU has been measured yet: the leaner start-up comes first.
AUTO: dict[str, Order] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}
_LIBRARY: Order = ("reference",)
#: Operator, backend, dtype and device of a call.
Call = tuple[str, str, torch.dtype, torch.device]


class _State:
    calls: dict[Call, None] | None = None  # in the order of their first time, where somebody watches


@contextmanager
def watched() -> Iterator[dict[Call, None]]:
    """The calls of :func:`select` inside, on all threads, as keys."""
    before, _State.calls = _State.calls, {}
    try:
        with plan.paused():
            yield _State.calls
    finally:
        _State.calls = before


# --- Backends of an op -----------------------------------------------------------------------------------


def order(device: str) -> Order:
    """Backends that "auto" tries on a device of this type."""
    return AUTO.get(device, _LIBRARY)


def pick(op: str, table: Mapping[str, Backend], name: str, *tensors: Tensor, order: Order | None = None) -> str:
    """The backend of ``op`` for ``tensors``: ``name``, or for ``"auto"`` the first of ``order`` that serves.

    Args:
        order: what a rule of this file answers; default: :func:`order` of the tensors' device.

    Raises:
        RuntimeError: ``name`` is not installed here, or computes wrong on this device.
        ValueError: ``name`` cannot serve these tensors. Both say why, with the values.
    """
    device = tensors[0].device.type
    unproven = device in verify.DEVICES
    if name != "auto":
        if name not in table:
            raise RuntimeError(f"{op}: backend={name!r} has no kernels for it; it has {', '.join(map(repr, table))}")
        if (missing := table[name].why_not()) is not None:
            raise RuntimeError(f"{op}: backend={name!r} is not available: {missing}")
        if (reason := table[name].why_not(*tensors)) is not None:
            raise ValueError(f"{op}: backend={name!r} cannot serve this call: {reason}")
        if unproven and (fault := verify.fault(table, name, tensors[0])) is not None:
            raise RuntimeError(f"{op}: backend={name!r} failed its self-test: {fault}")
        return name
    rule = AUTO.get(device, _LIBRARY) if order is None else order
    if not torch.compiler.is_compiling():  # a graph is traced by the rule; the operators in it ask again when they run
        rule = tuned.order(op, rule, table, tensors)
    for candidate in rule:
        if candidate not in table or table[candidate].why_not(*tensors) is not None:
            continue
        if not unproven or verify.fault(table, candidate, tensors[0]) is None:
            return candidate
    raise ValueError(f"{op}: no backend serves this call: {table['reference'].why_not(*tensors)}")


def select(op: str, table: Mapping[str, Backend], name: str, *tensors: Tensor, order: Order | None = None) -> Backend:
    """The implementation that :func:`pick` names; logged once per op, shapes and dtype."""
    chosen = pick(op, table, name, *tensors, order=order)
    if _State.calls is not None:
        _State.calls[op, chosen, tensors[0].dtype, tensors[0].device] = None
    if not torch.compiler.is_compiling() and log.enabled():
        key = (op, name, chosen, *((t.dtype, tuple(t.shape)) for t in tensors))
        log.once(key, lambda: _explain(op, table, name, chosen, tensors))
    return table[chosen]


def _explain(op: str, table: Mapping[str, Backend], name: str, chosen: str, tensors: tuple[Tensor, ...]) -> str:
    """``deconv float32 (8, 192, 32, 32): cpu (cuda: built without CUDA kernels; triton: torch sees no device)``"""
    others = []
    for other in NAMES:
        if other in ("auto", "reference", chosen):
            continue
        reason: str | None = "it has no kernels for this op"
        if other in table:
            reason = table[other].why_not(*tensors) or verify.known_fault(table, other, tensors[0])
        if reason is None and name == "auto":
            reason = "it serves, auto does not take it here"
        if reason is not None:
            others.append(f"{other}: {reason}")
    asked = ["asked for by name"]
    if name == "auto":
        asked = ["measured on this device"] if tuned.is_measured(op, chosen, tensors) else []
    dtype = str(tensors[0].dtype).removeprefix("torch.")
    shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
    return f"{op} {dtype} {shapes}: {chosen}" + (f" ({'; '.join(asked + others)})" if asked + others else "")


def for_part(name: str, table: Mapping[str, Backend]) -> str:
    """The backend for one op of a composite that was asked to run on ``name``: the same where the op has it at all,
    else ``"auto"``, since not every op has kernels of every kind. :func:`select` logs what then runs."""
    return name if name in table else "auto"


def with_kernels(function: str, table: Mapping[str, Backend], device: str) -> Order:
    """:func:`order` without backends that leave ``function`` to the library's operators."""
    return tuple(n for n in order(device) if n == "reference" or (n in table and function in table[n].functions))


# --- 1x1 convolution and Haar ------------------------------------------------------------------------------


def reduce_haar(order: Order, narrow: bool) -> Order:
    """Forward and gradients, where Triton's kernels for narrow images serve (reduce_haar/triton_narrow.py): predicted
    to take a fifth (8 channels) to five sixths (32) of the CUDA kernels' time. (docs/develop/tuning.md)"""
    return tuple(sorted(order, key=lambda name: name != "triton")) if narrow else order


def waveblock_recompute(device: str) -> str:
    """A Waveblock's backward makes again: on a GPU its hidden layers alone (``"hidden"``), since a pass over x is
    predicted to cost more there than the pyramid's memory, and one over the hidden layers more than the MLPs' results';
    on a CPU, where that is not measured, all of them (``"mlp"``).
    (docs/develop/tuning.md, Waveblock: what is kept for backward)"""
    return "hidden" if device == "cuda" else "mlp"


#: Channels from which the pass between two Waveblocks on a GPU is predicted faster as one kernel.
WAVEBLOCKS = 24


def waveblocks(backend: str, channels: int) -> str:
    """``"joined"``: BatchNorm, residual and the next block's reduction as one kernel, or ``"apart"``, where the narrow
    kernels of the parts take half its time. (docs/develop/tuning.md, CUDA: between two Waveblocks)"""
    return "joined" if backend == "cuda" or channels >= WAVEBLOCKS else "apart"


# --- Transposed convolution ------------------------------------------------------------------------------

#: Minimal filtering between many channels on one side and fewer than this on both costs more than it saves.
NARROW = 32


def deconv(
    device: str, dtype: torch.dtype, u_channels: int, y_channels: int, few: int, multiplied: bool, units: bool
) -> Order:  # fmt: skip
    """Forward and the input's gradient.

    A CPU's library that has products of half types makes them twice as fast as kernels of ours that widen them, except
    for few channels, whose kernels save more passes over memory. In fp32 it wins between many channels and fewer than
    :data:`NARROW`.
    On a GPU, where nothing is measured, the library with BatchNorm's passes around it is predicted faster: ours by name
    only. (docs/develop/tuning.md, transposed convolution)

    Args:
        few: products of channels up to which the CPU has kernels of their own.
        multiplied: whether the CPU's library has products of this half type.
        units: whether the CPU has kernels for this pass that go by matrix units.
    """
    if device == "cuda":
        return _LIBRARY
    if device != "cpu" or dtype == torch.float64:
        return order(device)
    if u_channels * y_channels <= few // (1 if dtype == torch.float32 else 4) or units:
        return order(device)
    library = min(u_channels, y_channels) < NARROW if dtype == torch.float32 else multiplied
    return _LIBRARY if library else order(device)


#: Channels of either side from which Triton's transposed convolution with an image added is predicted faster.
DECONV_RESIDUAL = 16


def deconv_residual(dtype: torch.dtype, channels: int, products: Products, little_shared: bool) -> Order:
    """Forward with an image added, on a GPU: Triton's kernel reads the image while it multiplies, where the library
    takes another pass. Predicted, not measured, and for two chips' half types only: elsewhere, and where the fewer
    `channels` of its sides are under :data:`DECONV_RESIDUAL`, the library.
    (docs/develop/tuning.md, Triton tiles: transposed convolution)"""
    wins = channels >= DECONV_RESIDUAL and (products == "wgmma" or (products == "mma" and not little_shared))
    return order("cuda") if wins and dtype in (torch.float16, torch.bfloat16) else _LIBRARY


def deconv_backward_weight(device: str) -> Order:
    """The weight's gradient: never the library's on a CPU. (docs/develop/tuning.md, transposed convolution)"""
    return _LIBRARY if device == "cuda" else order(device)


def head(inputs: int, inner: int, outputs: int) -> str:
    """``"folded"`` where a 1x1 convolution behind a transposed one goes into its weights, else ``"apart"``.

    By count: an input pixel makes four of the output, by 16 taps. (docs/develop/tuning.md, heads)
    """
    return "folded" if 16 * inputs * (inner - outputs) + 4 * inner * outputs > 0 else "apart"


def head_at_each_call(device: str, inputs: int, inner: int, outputs: int) -> str:
    """:func:`head` for weights that learn, which are folded anew at each call: on a CPU, where that is measured
    (docs/develop/tuning.md, heads), else ``"apart"``."""
    return head(inputs, inner, outputs) if device == "cpu" else "apart"


# --- Stem ------------------------------------------------------------------------------------------------


#: Products that one convolution must save on a GPU, where folding takes some fifty launches, and its gradient as many.
STEM = 25e9


def stem(device: str, folded: int, apart: int) -> str:
    """``"folded"``: convolutions with nothing between them as one, or ``"apart"``, each in the library.

    By count of products, folding included; one that is twice as many pays for the patches that a CPU copies.
    (docs/develop/tuning.md, stem)
    """
    wins = {"cpu": 2 * folded <= apart, "cuda": apart - folded >= STEM}
    return "folded" if wins.get(device) else "apart"


# --- MLPs and 1x1 convolutions -----------------------------------------------------------------------------

#: Up to so many inputs and results a program of the Triton MLP holds all columns of its pixels, and their sums.
MLP_HELD = 288
#: Up to so many inputs and results together it holds 64 hidden units for the gradients of all weights.
MLP_WEIGHTS_HELD = 256
#: The same on chips with 99 KB of shared memory for a block, where more columns spill registers.
MLP_HELD_BY_LITTLE = 128


def pointwise_mlp(dtype: torch.dtype, inputs: int, outputs: int, backward: bool, little_shared: bool = False) -> str:
    """How Triton's MLP runs on a GPU: ``"fused"``, no hidden layer in memory; ``"kept"``, backward: a kernel
    writes the hidden layer and its gradient, for products of the library; ``"products"``: the
    library's products and one kernel between them.

    Predicted, not measured; fp32 always fused, since the library's products follow another TF32 switch.
    (docs/develop/tuning.md, Triton tiles: pointwise MLP)
    """
    if dtype == torch.float32:
        return "fused"
    if max(inputs, outputs) > (MLP_HELD_BY_LITTLE if little_shared else MLP_HELD):
        return "products"
    return "kept" if backward and inputs + outputs > MLP_WEIGHTS_HELD else "fused"


def channel_mlp(
    device: str, dtype: torch.dtype, pixels: int, hidden: int, multiplies_bfloat16: bool, units: bool
) -> Order:
    """The library's products are worth the hidden layer in memory where a CPU multiplies bfloat16 itself: from enough
    pixels to fill them, up to the number of hidden channels. (docs/develop/tuning.md, channel MLP in bfloat16) Not
    where kernels of ours for this pass do so by matrix units, ``units``. (docs/develop/tuning.md, Matrix units)"""
    library = dtype == torch.bfloat16 and multiplies_bfloat16 and not units
    if device == "cpu" and library and 128 <= pixels < hidden:
        return _LIBRARY
    return order(device)


def convolution(device: str, dtype: torch.dtype, multiplied: bool) -> str:
    """The library's convolutions: ``"float32"`` for half types of which a CPU's library has no products, else
    ``"given"``. (docs/develop/tuning.md, half types on a CPU)"""
    half = dtype in (torch.float16, torch.bfloat16)
    return "float32" if device == "cpu" and half and not multiplied else "given"


def product(device: str, dtype: torch.dtype, elements: int) -> str:
    """``"onednn"`` for fp32 images on a CPU, whose matrix product has one speed for every shape, else
    ``"convolution"``. (docs/develop/tuning.md, 1x1 convolutions)"""
    return "onednn" if device == "cpu" and dtype == torch.float32 and elements > 0 else "convolution"


def product_backward_weight(device: str, dtype: torch.dtype) -> str:
    """``"core"`` on a CPU except for half types, for which a processor may have products of its own, else
    ``"convolution"``."""
    return "core" if device == "cpu" and dtype in (torch.float32, torch.float64) else "convolution"


# --- PATM --------------------------------------------------------------------------------------------------

#: Up to this many channels PATM is taken from end to end: beyond, weights outgrow a CPU's L2 cache and a GPU's shared
#: memory.
WHOLE = 128
#: Up to this many channels a CPU makes several projections by one product: beyond, copying the weights costs more than
#: a read.
JOINED = 128


def patm(device: str, channels: int, depthwise: bool) -> str:
    """``"whole"``: images from end to end; ``"parts"``: kernels of parts. Measured on a CPU
    (docs/develop/tuning.md, PATM on a CPU); predicted for a GPU (docs/develop/tuning.md, PATM on a GPU)."""
    return "whole" if device in ("cpu", "cuda") and not depthwise and channels <= WHOLE else "parts"


def projections(device: str, channels: int) -> str:
    """``"joined"``: several 1x1 convolutions of an image as one product, or ``"apart"``. A GPU always gains by it.
    (docs/develop/tuning.md, PATM on a CPU), (docs/develop/tuning.md, PATM on a GPU)"""
    return "joined" if device != "cpu" or channels <= JOINED else "apart"


# --- Haar --------------------------------------------------------------------------------------------------


def low_band(device: str) -> str:
    """LL alone, by Haar's kernel or by pooling: a CPU's kernel leaves the other bands out, Triton's writes them all.
    "Haar as other codes write it, on a CPU"."""
    return "kernel" if device == "cpu" else "pool"


def wtconv(device: str, dtype: torch.dtype) -> str:
    """A WTConv's forward: ``"fused"``, a pass for each level, for float32 on a GPU, else ``"parts"``: its own code on
    Haar's kernels. Predicted; half types gain nothing, and a CPU has no such kernel. (docs/develop/tuning.md, WTConv)
    """
    return "fused" if device == "cuda" and dtype == torch.float32 else "parts"
