"""Questions that fused modules ask the standard ones they are made of."""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _global_backward_hooks as _backward_of_all
from torch.nn.modules.module import _global_backward_pre_hooks as _before_backward_of_all
from torch.nn.modules.module import _global_forward_hooks as _for_all
from torch.nn.modules.module import _global_forward_pre_hooks as _before_all

from wavemix_kernels import fx
from wavemix_kernels.ops.norm import running as running_statistics


def why_not_plain(name: str, module: nn.Module, kind: type[nn.Module] | None = None) -> str | None:
    """Why a function cannot stand for part ``name`` of a fused module: another class than ``kind`` (where one is
    given), or a hook or parametrization that would be left out. None: it can."""
    if kind is not None and type(module) is not kind:
        return f"{name} is {type(module).__name__}, expected {kind.__name__}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{name} has hooks"
    if _for_all or _before_all or _backward_of_all or _before_backward_of_all:
        return f"hooks on all modules are registered (torch.nn.modules.module), which would not see {name}"
    if "forward" in module.__dict__:
        return f"{name} has a forward of its own on the instance"
    # Not by hasattr: what it does not find costs nn.Module a microsecond.
    return f"{name} has parametrizations" if "parametrizations" in module._modules else None


def why_not_all_plain(parts: Iterable[tuple[str, nn.Module, type[nn.Module]]]) -> str | None:
    """:func:`why_not_plain` of several parts, (name, module, kind) each: the first reason, or None."""
    watched = _for_all or _before_all or _backward_of_all or _before_backward_of_all
    for name, module, kind in parts:
        own = module.__dict__
        if (
            watched
            or type(module) is not kind
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
            or "parametrizations" in own["_modules"]
        ):
            return why_not_plain(name, module, kind)
    return None


_HOOKS = operator.itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def all_plain(modules: Sequence[nn.Module], kinds: Sequence[type[nn.Module]]) -> bool:
    """Whether :func:`why_not_all_plain` has no reason, in a fifth of its time: a model asks in every step. Parametrized
    modules are of another class. Not for torch.compile, which cannot trace it."""
    if [*map(type, modules)] != kinds or _for_all or _before_all or _backward_of_all or _before_backward_of_all:
        return False
    own = [module.__dict__ for module in modules]
    return not any(map(any, map(_HOOKS, own))) and not any("forward" in attributes for attributes in own)


def untouched(module: nn.Module) -> bool:
    """No hook would be left out if the module's own forward never ran."""
    return why_not_plain("", module) is None


def kept(tensor: Tensor) -> Tensor:
    """A copy to keep as a buffer: without gradient, and contiguous, as safetensors wants it."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def average(x: Tensor) -> Tensor:
    """Over all pixels: (N, C, H, W) -> (N, C, 1, 1). For half types a CPU's pooling to one pixel writes the image in
    fp32 first, and that by a window of its size does not."""
    traced = isinstance(x, fx.Proxy) or torch.compiler.is_compiling() or torch.jit.is_tracing()
    if not traced and x.dtype in (torch.float16, torch.bfloat16) and x.device.type == "cpu" and x.numel() > 0:
        return F.avg_pool2d(x, x.shape[2:])
    return F.adaptive_avg_pool2d(x, 1)


def affine_of(norm: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a BatchNorm in evaluation, in float64: rounded once, when the folded weights are.

    Raises:
        ValueError: it keeps no running statistics.
    """
    n = cast(nn.BatchNorm2d, norm)
    if n.running_mean is None or n.running_var is None:
        raise ValueError(
            f"{name}: track_running_stats={n.track_running_stats!r} keeps no statistics to fold; inference depends on "
            "the batch and has no folded form"
        )
    scale = torch.rsqrt(n.running_var.double() + n.eps)
    if n.weight is not None:
        scale = scale * n.weight.detach().double()
    shift = -n.running_mean.double() * scale
    if n.bias is not None:
        shift = shift + n.bias.detach().double()
    return scale, shift


def affine_parameters(module: nn.Module) -> tuple[Any, Any]:
    """(weight, bias) of a module that has both by name; not by its attributes, which take longer than a launch."""
    own = module._parameters
    if "weight" in own and "bias" in own:
        return own["weight"], own["bias"]
    return module.weight, module.bias


def is_frozen(norm: nn.BatchNorm2d) -> bool:
    """Whether the norm uses its running statistics: in evaluation, or frozen during training."""
    return not (norm.training or norm.running_mean is None or norm.running_var is None)


class _Later(threading.local):
    """Batches that :func:`together` will hand to :func:`update` at its end."""

    batches: list[Batch] | None = None


_later = _Later()


@contextmanager
def together() -> Iterator[None]:
    """Around a model's forward pass: running statistics move at its end, in few launches; not after an error."""
    if torch.compiler.is_compiling() or _later.batches is not None:
        yield
        return
    _later.batches = []
    try:
        yield
        batches = _later.batches
    finally:
        _later.batches = None
    update(*batches)


def frozen(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Running mean and inverse deviation of a norm that uses them."""
    if not is_frozen(norm):
        return None, None
    mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    return mean, torch.rsqrt(var + norm.eps)


class Batch(NamedTuple):
    """The values that a norm saw: their mean, biased variance and count per channel; or the rows of
    :class:`~wavemix_kernels.ops.norm.batch_norm.Statistics`, None and that count."""

    norm: nn.Module
    mean: Tensor
    var: Tensor | None
    values: int


def update(*batches: Batch) -> None:
    """Running statistics of those that are BatchNorms in training and keep them."""
    if not torch.compiler.is_compiling() and (later := _later.batches) is not None:
        later += batches
        return
    by_momentum: dict[float | None, list[running_statistics.Move]] = {}
    seen: set[nn.Module] = set()
    twice: list[Batch] = []
    for batch in batches:
        norm, mean, var, values = batch
        if not (isinstance(norm, nn.BatchNorm2d) and norm.training and norm.track_running_stats):
            continue
        if norm in seen:  # a module in two places moves twice
            twice.append(batch)
            continue
        seen.add(norm)
        running: Any = norm._buffers  # not by nn.Module's attributes, which take longer than a launch
        move = running_statistics.Move(
            running["running_mean"], running["running_var"], running["num_batches_tracked"], mean, var, values
        )
        by_momentum.setdefault(norm.momentum, []).append(move)
    for momentum, moves in by_momentum.items():
        running_statistics.update(moves, momentum)
    if twice:
        update(*twice)
