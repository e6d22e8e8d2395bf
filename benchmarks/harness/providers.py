"""Who takes part: upstream, the reference, its compiled forms, and ours as users get it, compiled, as a CUDA graph, and
backend by backend."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import graphs
from .case import Case, Forward, Setting
from .rivals import PEERS, Unavailable

# Name -> what it is, in the order of tables and plots.
PROVIDERS = {
    "upstream": "what users have today: pytorch_wavelets, and wavemix's own order of operations around it, eager",
    **{name: f"the package of that name ({version}), eager; wavelets alone" for name, version in PEERS.items()},
    "reference": "wavemix_kernels.reference, eager",
    "compile": "torch.compile of the reference, in its best setting",
    "reduce-overhead": "torch.compile of the reference in CUDA graphs (mode reduce-overhead); needs a GPU",
    "ours": "wavemix_kernels as users get it",
    "ours+compile": "wavemix_kernels as users get it, inside torch.compile",
    "ours+graph": "wavemix_kernels as users get it, the whole step one CUDA graph; needs a GPU",
    "cpu": "wavemix_kernels, C++ kernels",
    "triton": "wavemix_kernels, Triton kernels",
    "cuda": "wavemix_kernels, CUDA C++ kernels",
}
BACKENDS = ("cpu", "triton", "cuda")
OURS = ("ours", "ours+compile", "ours+graph", *BACKENDS)
COMPILED = ("compile", "reduce-overhead", "ours+compile")
#: A CPU measures these by default. "ours" is "cpu" there: each row is measured once.
ON_CPU = ("upstream", *PEERS, "reference", "compile", "ours")


@dataclass(frozen=True)
class Subject:
    """One provider, made for one case.

    Attributes:
        forward: from inputs to the flat list of outputs.
        scope: a context for the whole step, the backward included.
        module: what holds the parameters, if the callable is a module.
        graphed: its step is to be captured as a CUDA graph.
    """

    forward: Callable[..., list[Tensor]]
    scope: Callable[[], AbstractContextManager[Any]]
    module: nn.Module | None
    graphed: bool = False

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Parameters to differentiate by, in the order of names: providers register theirs in any order."""
        if self.module is None:
            return {}
        named = {name.removeprefix("_orig_mod."): value for name, value in self.module.named_parameters()}
        return dict(sorted(named.items()))

    @property
    def standing(self) -> list[Tensor]:
        """Every tensor that exists before a step, inputs apart."""
        return [*self.module.parameters(), *self.module.buffers()] if self.module is not None else []


def make(case: Case, provider: str, setting: Setting, inputs: Sequence[Tensor]) -> Subject:
    """Build `provider` for `case`.

    Raises:
        Unavailable: it does not serve this case on this machine.
    """
    scope: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    graphed = provider == "ours+graph"
    if (graphed or provider == "reduce-overhead") and (reason := graphs.why_not(setting.device)) is not None:
        raise Unavailable(reason)
    if provider in OURS:
        import wavemix_kernels

        if provider in BACKENDS:
            if (reason := _why_not(provider, setting, inputs)) is not None:
                raise Unavailable(reason)

            def scope() -> AbstractContextManager[Any]:
                return wavemix_kernels.backend(provider)

        call = case.makers["ours"](setting)
    else:
        call = case.makers["reference" if provider in COMPILED else provider](setting)
    if provider == "reduce-overhead":
        call = _compiled(call, mode="reduce-overhead")
    elif provider in COMPILED:
        call = _compiled(call, **_best(case, setting))
    return dataclasses.replace(subject(call, case, setting.device, scope), graphed=graphed)


def oracle(case: Case, device: torch.device) -> Subject:
    """The reference in float64, its parameters first rounded to the case's dtype, as everyone's are."""
    call = case.makers["reference"](Setting(device, torch.float64, exact=True))
    if isinstance(call, nn.Module):
        call.to(case.dtype).to(torch.float64)
    return subject(call, case, device, contextlib.nullcontext, autocast=False)


def subject(
    call: Forward,
    case: Case,
    device: torch.device,
    scope: Callable[[], AbstractContextManager[Any]],
    autocast: bool = True,
) -> Subject:
    """Wrap a callable, module or not, as the harness calls it."""
    cast = case.autocast if autocast else None

    def forward(*inputs: Tensor) -> list[Tensor]:
        if cast is None:
            return tree_leaves(call(*inputs))
        with torch.autocast(device.type, dtype=cast):
            return tree_leaves(call(*inputs))

    return Subject(forward, scope, call if isinstance(call, nn.Module) else None)


def _why_not(backend: str, setting: Setting, inputs: Sequence[Tensor]) -> str | None:
    from wavemix_kernels import backends

    if backend == "triton" and setting.device.type == "cpu":
        return "on a CPU Triton only interprets its kernels, which proves results and not speed"
    probe = {"cpu": backends.cpu_why_not, "triton": backends.triton_why_not, "cuda": backends.cuda_why_not}
    return probe[backend](*inputs)


def _best(case: Case, setting: Setting) -> dict[str, Any]:
    """On a GPU tuned matrix products, on a CPU weights packed for inference."""
    if setting.device.type == "cuda":
        return {"mode": "max-autotune-no-cudagraphs"} if case.tensor_cores else {}
    return {"options": {"freezing": True}} if case.tensor_cores and not case.backward else {}


def _compiled(call: Forward, **arguments: Any) -> Forward:
    """Static shapes and one whole graph."""
    return torch.compile(call, fullgraph=True, dynamic=False, **arguments)
