"""A loss between the wavelet bands of two images, which never holds the bands of more than a few planes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels import checks
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.common.transforms import in_transform, standard_wanted
from wavemix_kernels.ops.dwt.op import dwt2d
from wavemix_kernels.ops.dwt.reference import Filters
from wavemix_kernels.ops.haar.op import MODES, haar_dwt2d
from wavemix_kernels.pytorch_wavelets.dwt.swt import swt2d
from wavemix_kernels.pytorch_wavelets.wavelets import WaveletLike, filters_of

__all__ = ["wavelet_loss"]

_KINDS = ("l1", "mse", "huber")
# Planes and their bands stay in cache: 1 to 8 MiB took the same time, all planes at once 1.3 to 2 times as long.
_CHUNK_BYTES = 1 << 22


def wavelet_loss(
    pred: Tensor, target: Tensor, wavelet: str | WaveletLike | Sequence[Any] = "haar", levels: int = 1, *,
    kind: str = "l1", weights: Sequence[float | Sequence[float]] | None = None, mode: str | None = None,
    delta: float = 1.0, undecimated: bool = False,
) -> Tensor:  # fmt: skip
    """Weighted sum of the losses between the bands of `pred` and of `target`.

    With ``(yl, yh) = DWTForward(levels, wavelet, mode)`` of each image it is
    ``weights[0] * loss(yl, yl') + sum(weights[1 + j] * loss(yh[j], yh'[j]))``, each loss the mean over its tensor. The
    transform is linear, so it runs once, on the difference. On the CPU in eager mode it runs over a few planes at a
    time, with their gradient in the same turn: beside the images, that gradient is all that is kept for the backward.
    Elsewhere, under torch.func and for a backward with create_graph=True the bands are held whole. Derivatives of any
    order work.

    Args:
        pred, target: (N, C, H, W) of one shape and device, float64, float32, float16 or bfloat16. Either may require
            grad.
        wavelet: as `wave` of :class:`wavemix_kernels.pytorch_wavelets.DWTForward`. Its filters are not learned.
        levels: 1 or more.
        kind: 'l1', 'mse' or 'huber'.
        weights: ``1 + levels`` entries, that of the low-pass first, then of the levels from the finest. An entry of a
            level is a number or three, for LH, HL and HH. None: 1 everywhere.
        mode: how the image goes on past its borders, as for the module; None: 'zero', or where `undecimated`
            'periodization', both the defaults of the modules.
        delta: where 'huber' turns from quadratic to linear.
        undecimated: take the bands of :class:`wavemix_kernels.pytorch_wavelets.SWTForward`: yl is the LL of the
            coarsest level, yh[j] the three other bands of level j.

    Returns:
        The loss, a scalar: float64 for float64, else float32, in which it is computed.

    Raises:
        TypeError, ValueError: arguments that fit none of this.
        ImportError: a wavelet's name that needs PyWavelets, which is missing.
    """
    checks.check_tensor("pred", pred, 4, "(N, C, H, W)")
    checks.check_tensor("target", target, 4, "(N, C, H, W)")
    checks.check_same_device("target", target, "pred", pred)
    if pred.shape != target.shape:
        raise ValueError(f"target: expected the shape of pred, {tuple(pred.shape)}, got {tuple(target.shape)}")
    if pred.numel() == 0:
        raise ValueError(f"pred: expected at least one image and channel, got shape {tuple(pred.shape)}")
    checks.check_positive_int("levels", levels)
    checks.check_choice("kind", kind, _KINDS)
    mode = ("periodization" if undecimated else "zero") if mode is None else mode
    checks.check_choice("mode", mode, MODES)
    if not delta > 0:
        raise ValueError(f"delta: expected a positive number, got {delta}")
    dtype = accumulate_dtype(torch.promote_types(pred.dtype, target.dtype))
    weighted = _checked_weights(weights, levels)
    loss = _BandLoss(wavelet, levels, kind, weighted, mode, delta, undecimated, dtype, pred.device)
    if pred.device.type != "cpu" or torch.compiler.is_compiling() or standard_wanted():
        return loss.total(pred.to(dtype) - target.to(dtype)) / (pred.shape[0] * pred.shape[1])
    if torch.is_grad_enabled() and (pred.requires_grad or target.requires_grad):
        result: Tensor = _InChunks.apply(pred, target, loss)
        return result
    return _in_chunks(pred, target, loss, None)


class _BandLoss:
    """The loss of a difference of images."""

    def __init__(
        self, wavelet: str | WaveletLike | Sequence[Any], levels: int, kind: str,
        weights: list[list[float]], mode: str, delta: float, undecimated: bool, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        taps = tuple(tuple(f[::-1]) for f in filters_of(wavelet, "dec_lo", "dec_hi"))
        haar = taps == tuple(tuple(f[::-1]) for f in filters_of("haar", "dec_lo", "dec_hi"))
        self.filters = None if haar and not undecimated else _filters(taps, dtype, device)
        self.undecimated = undecimated
        self.levels, self.kind, self.weights, self.delta = levels, kind, weights, delta
        self.mode = "periodization" if mode == "per" else mode
        self.dtype = dtype

    def total(self, difference: Tensor) -> Tensor:
        """The loss of each plane (a mean over its own coefficients), summed over the planes."""
        if self.undecimated:
            assert self.filters is not None
            levels = swt2d(difference, self.filters, self.levels, self.mode)
            low, highs = levels[-1][:, :, 0], [bands[:, :, 1:] for bands in levels]
        elif self.filters is None:
            low, highs = haar_dwt2d(difference, self.levels, mode=self.mode)
        else:
            low, highs = dwt2d(difference, self.filters, self.levels, mode=self.mode)
        total = difference.new_zeros(())
        for band, weights in zip([low, *highs], self.weights, strict=True):
            size = band.shape[2:].numel()
            bands = [band] if len(set(weights)) == 1 else band.unbind(2)
            for weight, part in zip(weights, bands, strict=False):
                if weight:
                    total = total + self._penalty(part) * (weight / size)
        return total

    def _penalty(self, x: Tensor) -> Tensor:
        if self.kind == "l1":
            return x.abs().sum()
        if self.kind == "mse":
            return x.square().sum()
        return F.huber_loss(x, x.new_zeros(()).expand_as(x), reduction="sum", delta=self.delta)


def _in_chunks(pred: Tensor, target: Tensor, loss: _BandLoss, grad: Tensor | None) -> Tensor:
    """The loss; its gradient by the difference is written to `grad`."""
    planes = pred.shape[0] * pred.shape[1]
    total = torch.zeros((), dtype=torch.float64)
    for ours, theirs, slot in zip(*_chunks(loss.dtype, pred, target, grad), strict=True):
        difference = ours.to(loss.dtype) - theirs.to(loss.dtype)
        with torch.set_grad_enabled(slot is not None):
            part = loss.total(difference.requires_grad_(slot is not None)) / planes
        if slot is not None:
            slot.copy_(torch.autograd.grad(part, difference)[0])
        total += part.detach()
    return total.to(loss.dtype)


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred: Tensor, target: Tensor, loss: _BandLoss) -> Tensor:
        grad = torch.empty_like(pred, dtype=loss.dtype)
        result = _in_chunks(pred, target, loss, grad)
        ctx.save_for_backward(pred, target)
        ctx.loss, ctx.kept = loss, [grad]
        return result

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        pred, target = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the kept gradient knows nothing of the images it came from
            difference = pred.to(ctx.loss.dtype) - target.to(ctx.loss.dtype)
            total = ctx.loss.total(difference) / (pred.shape[0] * pred.shape[1])
            (grad,) = torch.autograd.grad(total, difference, create_graph=True)
            scaled = grad * d_loss
        else:
            if ctx.kept:  # given away, so that no second tensor of its size is made; another backward makes it anew
                grad = ctx.kept.pop()
            else:
                grad = torch.empty_like(pred, dtype=ctx.loss.dtype)
                with torch.enable_grad():
                    _in_chunks(pred.detach(), target.detach(), ctx.loss, grad)
            alone = not in_transform() and not torch._C._functorch.is_legacy_batchedtensor(d_loss)
            scaled = grad.mul_(d_loss) if alone else grad * d_loss
        of_pred = scaled.to(pred.dtype) if ctx.needs_input_grad[0] else None
        of_target = (-scaled).to(target.dtype) if ctx.needs_input_grad[1] else None
        return of_pred, of_target, None


def _chunks(dtype: torch.dtype, *images: Tensor | None) -> list[Sequence[Tensor | None]]:
    """Each image in parts (n, C, H, W): planes where all images are contiguous, else whole images."""
    first = images[0]
    assert first is not None
    flat = all(x is None or x.is_contiguous() for x in images)
    views = [x.flatten(0, 1).unsqueeze(1) if flat and x is not None else x for x in images]
    one = first.shape[-2:].numel() * (1 if flat else first.shape[1]) * dtype.itemsize
    count = max(1, _CHUNK_BYTES // one)
    number = -(-(first.shape[0] * (first.shape[1] if flat else 1)) // count)
    return [[None] * number if x is None else x.split(count) for x in views]


def _filters(taps: tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device) -> Filters:
    low_w, high_w, low_h, high_h = (torch.tensor(f, dtype=dtype, device=device) for f in taps)
    return Filters(
        low_w=low_w.reshape(1, 1, -1, 1), high_w=high_w.reshape(1, 1, -1, 1),
        low_h=low_h.reshape(1, 1, 1, -1), high_h=high_h.reshape(1, 1, 1, -1),
    )  # fmt: skip


def _checked_weights(weights: Sequence[float | Sequence[float]] | None, levels: int) -> list[list[float]]:
    if weights is None:
        return [[1.0]] * (1 + levels)
    if not isinstance(weights, Sequence) or len(weights) != 1 + levels:
        raise ValueError(f"weights: expected 1 + levels = {1 + levels} entries, got {checks.describe(weights)}")
    checked = [list(map(float, w)) if isinstance(w, Sequence) else [float(w)] for w in weights]
    if len(checked[0]) != 1 or any(len(w) not in (1, 3) for w in checked):
        raise ValueError(f"weights: expected a number first, then numbers or three for LH, HL, HH, got {weights!r}")
    return checked
