"""``fuse_for_inference``: a whole model in its inference form; ``export_form``: that in standard operators."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from wavemix_kernels import backends

__all__ = ["export_form", "fuse_for_inference"]


def fuse_for_inference(model: nn.Module) -> nn.Module:
    """Puts the inference form of every fused block in its place, in the model itself, and sets it to evaluation.

    A block is a module with a method ``fuse_for_inference()`` (:class:`wavemix_kernels.FusedWaveblock`, …) that returns
    its inference form: BatchNorms folded into the weights before them, dropout and drop-path gone, the same results as
    in evaluation up to rounding. Parameters become buffers, so the model trains no more and its state dict is another;
    load checkpoints before. A module with a method ``blocks_are_fused()`` is told so after its blocks: a WaveMix model
    then folds its stem once, not in every call. ``accelerate(model)`` first, where the blocks are not ours yet.

    Args:
        model: any module; a block itself works too.

    Returns:
        ``model``, or its inference form where it is a block itself.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: nothing to fuse, or a block that has no inference form: the message says which and why.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "fuse_for_inference"):
        return _inference_form(model, "model")
    count = _replace(model, "")
    if count == 0:
        raise ValueError(
            f"model: {type(model).__name__} holds no block with an inference form; call accelerate(model) first?"
        )
    return model.eval()


def export_form(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in its inference form that runs on standard PyTorch operators only.

    For ``torch.export``, ONNX, AOTInductor and ``torch.jit.trace``: whoever loads what these make of it needs no part
    of this package.

    Blocks take their inference form (:func:`fuse_for_inference`), and every call runs on backend ``"reference"``
    whatever :class:`wavemix_kernels.backend` says: Haar is strided slices and sums, GELU the exact one. Names of
    arguments stay the model's. For the kernels themselves in a graph, export ``fuse_for_inference(model)`` instead.

    Args:
        model: any module, in training or evaluation; it is read, not changed. Apply ``accelerate`` first only if you
            want to: modules that are not ours are kept as they are.

    Returns:
        The copy, in evaluation and without gradient.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a block has no inference form (the message says which and why), or the model's forward is overridden
            on the instance.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    form = copy.deepcopy(model)
    if hasattr(form, "fuse_for_inference"):
        form = _inference_form(form, "model")
    else:
        _replace(form, "")
    form.eval().requires_grad_(False)
    kind: Any = type(form)
    if "forward" in form.__dict__:
        raise ValueError(f"model: the forward of this {kind.__name__} is overridden on the instance; make it a method")
    return _standard(form)


def _standard(model: nn.Module) -> nn.Module:
    """The model itself, with a forward of standard operators only."""
    # A subclass, no wrapper: names of parameters and arguments, by which exporters call inputs, stay the model's.
    kind: Any = type(model)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # The class is made on the spot: pickle and deepcopy take the model in its own and make it anew.
        plain = object.__new__(kind)
        plain.__dict__ = self.__dict__
        return _standard, (plain,)

    forward = backends.backend("reference")(kind.forward)
    members = {"forward": forward, "__reduce_ex__": reduce, "__module__": kind.__module__}
    model.__class__ = type(kind.__name__, (kind,), members)
    return model


def _replace(module: nn.Module, path: str) -> int:
    """Outermost first: what a block holds is its own to fuse."""
    count = 0
    for name, child in module.named_children():
        where = f"{path}.{name}" if path else name
        if hasattr(child, "fuse_for_inference"):
            setattr(module, name, _inference_form(child, where))
            count += 1
        else:
            count += _replace(child, where)
    told = getattr(module, "blocks_are_fused", None)
    if count and callable(told):
        told()
    return count


def _inference_form(block: nn.Module, path: str) -> nn.Module:
    try:
        return block.fuse_for_inference().eval()  # type: ignore[operator]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
