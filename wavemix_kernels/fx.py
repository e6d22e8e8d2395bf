"""Calls under ``torch.fx.symbolic_trace``: a fused function or module is one node of the graph, as its kernels look at
tensors and a Proxy is none. Torchvision's and timm's feature extractors trace so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Proxy
from torch.overrides import handle_torch_function
from torch.utils._pytree import tree_leaves

__all__ = ["Proxy", "call_function", "call_module"]


def call_function(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The call of ``function`` as a node."""
    return handle_torch_function(function, [a for a in args if isinstance(a, Proxy)], *args, **options)


def call_module(module: nn.Module, given: Any, plain: Callable[[Any], Any] | None = None, **options: Any) -> Any:
    """The call of ``module`` as a node.

    Args:
        given: its argument, a Proxy or a tuple of them.
        plain: traced in its place where ``module`` is what is traced, which can be no node of its own graph.

    Raises:
        TypeError: there is nothing plain.
    """
    tracer: Any = next(a for a in tree_leaves(given) if isinstance(a, Proxy)).tracer
    path = tracer.path_of_module(module)
    if path:
        return tracer.create_proxy("call_module", path, (given,), options)
    if plain is None:
        kind = type(module).__name__
        raise TypeError(
            f"torch.fx: a {kind} is one node of a graph; trace a module that holds it: nn.Sequential(block)"
        )
    return plain(given)
