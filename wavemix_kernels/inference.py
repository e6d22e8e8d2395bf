"""``fuse_for_inference``: a whole model in its inference form."""

from __future__ import annotations

from torch import nn

__all__ = ["fuse_for_inference"]


def fuse_for_inference(model: nn.Module) -> nn.Module:
    """Puts the inference form of every fused block in its place, in the model itself, and sets it to evaluation.

    A block is a module with a method ``fuse_for_inference()`` (:class:`wavemix_kernels.FusedWaveblock`, …) that returns
    its inference form: BatchNorms folded into the weights before them, dropout and drop-path gone, the same results as
    in evaluation up to rounding. Parameters become buffers, so the model trains no more and its state dict is another;
    load checkpoints before. ``accelerate(model)`` first, where the blocks are not ours yet.

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
    return count


def _inference_form(block: nn.Module, path: str) -> nn.Module:
    try:
        return block.fuse_for_inference().eval()  # type: ignore[operator]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
