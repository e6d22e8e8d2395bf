"""Copies of other people's layers, on the CPU, to run beside ours."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only


def on_cpu(module: nn.Module) -> nn.Module:
    """A copy on the CPU; tensors that a layer holds as plain attributes move with it."""
    twin = copy.deepcopy(module).cpu()
    for part in twin.modules():
        for name, value in part.__dict__.items():
            if name not in nn.Module().__dict__ and isinstance(value, (Tensor, list, tuple, dict)):
                part.__dict__[name] = tree_map_only(Tensor, Tensor.cpu, value)
    return twin


class StaysOnCpu(TorchFunctionMode):
    """Keeps what a layer makes at each call, on the GPU where there is one, beside its copy on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is Tensor.cuda:
            return args[0]
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        if function is Tensor.to:
            args = tuple(torch.device("cpu") if isinstance(a, (str, torch.device)) else a for a in args)
        return function(*args, **kwargs)
