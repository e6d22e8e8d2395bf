"""``accelerate``: puts the fused modules in place of the ones a model already holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wavemix_kernels import pytorch_wavelets, wtconv
from wavemix_kernels.nn.wavemix.block import FusedWaveblock
from wavemix_kernels.nn.wavemix.expansion import FusedExpansion
from wavemix_kernels.nn.wavemix.reference import LEVELS, Expansion, Waveblock
from wavemix_kernels.nn.wavemlp.block import FusedWaveBlock
from wavemix_kernels.nn.wavemlp.mlp import FusedMlp
from wavemix_kernels.nn.wavemlp.patm import FusedPATM
from wavemix_kernels.nn.wavemlp.reference import PATM, Mlp, WaveBlock

__all__ = ["Left", "Replaced", "Report", "accelerate"]


@dataclass(frozen=True)
class Replaced:
    """A module that :func:`accelerate` has turned into one of ours."""

    path: str
    was: str
    now: str


@dataclass(frozen=True)
class Left:
    """A module with the name of one that :func:`accelerate` replaces, left as it was, and why."""

    path: str
    what: str
    reason: str


@dataclass(frozen=True)
class Report:
    """The report of :func:`accelerate` on ``model``. Printing it lists every module, a line each."""

    model: nn.Module
    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        lines = [f"accelerate: {len(self.replaced)} replaced, {len(self.left)} left"]
        lines += [f"  {r.path or '(the model itself)'}: {r.was} -> {r.now}" for r in self.replaced]
        lines += [f"  {entry.path or '(the model itself)'}: {entry.what} left: {entry.reason}" for entry in self.left]
        return "\n".join(lines)


def accelerate(model: nn.Module, *, verbose: bool = False) -> Report:
    """Turns the modules of ``model`` that this package has a faster form of into that form, in place.

    Replaced are the package ``wavemix``'s Waveblocks (found by class name, parameter names and layers, so copies of
    its source count, if they compute the same), ``pytorch_wavelets``' ``DWTForward`` and ``DWTInverse`` (also
    ``wavemix``'s own copy) with Haar filters, Wave-MLP's ``PATM``, ``Mlp`` and ``WaveBlock`` (copies of its public
    source), and this package's own reference modules. A module with WTConv's ``wt_filter``, ``iwt_filter``,
    ``wt_function`` and ``iwt_function`` keeps its class and, where the filters are Haar's and frozen, gets other
    functions (:mod:`wavemix_kernels.wtconv`).

    Each stays the object it was and only changes class, as ``torch.nn.utils.parametrize`` and FSDP2 do: parameters,
    buffers, submodules, hooks and their handles, training mode and whoever holds a reference stay valid, so
    optimizers, DistributedDataParallel and state dicts go on as before. Even the model itself may be such a module.
    A second call changes nothing. Call it before ``torch.compile``, ``torch.jit`` or ``torch.export`` see the model.

    Args:
        model: any module.
        verbose: print the report.

    Returns:
        The report; ``report.model`` is ``model``.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    replaced: list[Replaced] = []
    left: list[Left] = []
    for path, module in list(model.named_modules()):
        counterpart = _counterpart(module)
        if counterpart is None:
            continue
        was = f"{type(module).__module__}.{type(module).__qualname__}"
        try:
            ours = counterpart(module)
        except _CannotReplace as reason:
            left.append(Left(path, was, str(reason)))
            continue
        if ours is module:
            replaced.append(Replaced(path, was, wtconv.NOW))
            continue
        _become(module, ours)
        replaced.append(Replaced(path, was, f"{type(ours).__module__}.{type(ours).__qualname__}"))
    report = Report(model, tuple(replaced), tuple(left))
    if verbose:
        print(report)
    return report


class _CannotReplace(Exception):
    """Carries the reason why a module is left as it is."""


#: Builds the module of ours that is to take the place of a given one, or changes that one and returns it, or raises
#: _CannotReplace.
_Counterpart = Callable[[nn.Module], nn.Module]

_UPSTREAM_BLOCKS = {f"Level{level}Waveblock": level for level in LEVELS}
_DWT_PACKAGES = ("pytorch_wavelets", "wavemix")


def _counterpart(module: nn.Module) -> _Counterpart | None:
    """How to replace a module that goes by the name of one we know; None for any other and for ours."""
    kind = type(module)
    if kind.__module__.split(".")[0] == __package__:
        return _OF_REFERENCE.get(kind)
    if kind.__name__ in _UPSTREAM_BLOCKS:
        return _fused_from_upstream
    if kind.__name__ in ("DWTForward", "DWTInverse"):
        return _dwt
    if kind.__name__ in _WAVE_MLP and all(isinstance(getattr(module, n, None), k) for n, k in _SIGNS[kind.__name__]):
        return _fused_from_wave_mlp
    if wtconv.has_wavelet_functions(module):
        return _with_haar_functions
    return None


def _become(module: nn.Module, ours: nn.Module) -> None:
    """``module`` takes the class and plain attributes of ``ours`` and keeps all that nn.Module itself manages."""
    managed = nn.Module().__dict__.keys()
    module.__dict__.update({name: value for name, value in ours.__dict__.items() if name not in managed})
    module.__class__ = type(ours)


# --- Waveblocks ------------------------------------------------------------------------------------------


def _fused_from_reference(module: nn.Module) -> nn.Module:
    block: Any = module
    return _checked_block(block, block.level, block.upsample)


def _fused_expansion(module: nn.Module) -> nn.Module:
    with torch.device("meta"):
        return FusedExpansion(4, 1, 1)  # at every call it asks which of its layers it can fuse


def _fused_from_upstream(module: nn.Module) -> nn.Module:
    kind = type(module)
    level = _UPSTREAM_BLOCKS[kind.__name__]
    ours = _checked_block(module, level, "deconv")
    if kind.__module__ != "wavemix":
        _check_forward(kind, level)
    return ours


def _checked_block(module: nn.Module, level: int, upsample: str) -> FusedWaveblock:
    """A FusedWaveblock (on the meta device) with the layers that ``module`` has, one by one."""
    if "forward" in module.__dict__:
        raise _CannotReplace("its forward is overridden on the instance")
    first = "feedforward" if level == 1 else "feedforward1"
    try:
        reduction: Any = module.get_submodule("reduction")
        hidden: Any = module.get_submodule(f"{first}.0")
        last: Any = module.get_submodule(f"{first}.3")
        with torch.device("meta"):
            ours = FusedWaveblock(
                level=level,
                mult=hidden.out_channels // reduction.in_channels,
                ff_channel=last.out_channels,
                final_dim=reduction.in_channels,
                upsample=upsample,
            )
    except (AttributeError, TypeError, ValueError) as error:
        raise _CannotReplace(f"its layers are not a level-{level} Waveblock's: {error}") from error
    theirs, expected = dict(module.named_modules()), dict(ours.named_modules())
    for name in theirs.keys() | expected.keys():
        if name and _layer(theirs.get(name)) != _layer(expected.get(name)):
            raise _CannotReplace(f"{name} is {theirs.get(name)!r}, expected {expected.get(name)!r}")
    if extra := _tensors(module).keys() ^ _tensors(ours).keys():
        raise _CannotReplace(f"its parameters and buffers are not a Waveblock's: {', '.join(sorted(extra))}")
    return ours


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """Its buffers without the counters that thop.profile leaves on every module and no forward reads."""
    counters = ("total_ops", "total_params")
    return {name: b for name, b in module.named_buffers() if name.split(".")[-1] not in counters}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | _buffers(module)


def _layer(module: nn.Module | None) -> tuple[object, ...]:
    """The settings of a layer that must agree; dropout's probability, BatchNorm's eps and momentum may differ."""
    if type(module) is nn.Dropout:
        return (nn.Dropout,)
    if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) and type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return nn.BatchNorm2d, module.num_features
    return type(module), "" if module is None else module.extra_repr()


def _check_forward(kind: type[nn.Module], level: int) -> None:
    """Classes that only share upstream's names are run once, on a small block of their own, beside ours."""
    size = 2 * 2**level
    sizes: dict[str, Any] = {"mult": 2, "ff_channel": 8, "final_dim": 8, "dropout": 0.0}
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            theirs, ours = kind(**sizes).eval(), FusedWaveblock(level=level, **sizes).eval()
            ours.load_state_dict(theirs.state_dict())
            x = torch.randn(1, 8, size, size + size // 2)
            same = torch.allclose(theirs(x), ours(x), rtol=1e-3, atol=1e-4)
    # Whatever a stranger's code raises, the answer is the same: this class cannot be vouched for.
    except Exception as error:
        raise _CannotReplace(f"could not be run beside ours to compare: {type(error).__name__}: {error}") from error
    if not same:
        raise _CannotReplace("shares the names of wavemix's block but computes something else")


# --- Wave-MLP --------------------------------------------------------------------------------------------


#: These parts tell such modules from others of the same name, as every transformer has an Mlp.
_SIGNS: dict[str, tuple[tuple[str, type[nn.Module]], ...]] = {
    "PATM": (),
    "Mlp": (("fc1", nn.Conv2d), ("fc2", nn.Conv2d)),
    "WaveBlock": (("norm1", nn.Module), ("attn", nn.Module), ("norm2", nn.Module), ("mlp", nn.Module)),
}


def _wave_mlp_form(module: nn.Module) -> nn.Module:
    """Our module (on the meta device) with the layers that ``module`` has, one by one."""
    if "forward" in module.__dict__:
        raise _CannotReplace("its forward is overridden on the instance")
    name = type(module).__name__
    theirs: Any = module
    ours: nn.Module
    try:
        with torch.device("meta"):
            if name in ("WaveBlock", "FusedWaveBlock"):
                # Its parts are replaced, or not, each by itself; at every call it asks which ones it can fuse.
                return FusedWaveBlock(4)
            if name == "Mlp":
                ours = FusedMlp(theirs.fc1.in_channels, theirs.fc1.out_channels, theirs.fc2.out_channels)
            else:
                mode = "fc" if theirs.theta_h_conv[0].groups == 1 else "depthwise"
                ours = FusedPATM(theirs.fc_h.in_channels, qkv_bias=theirs.fc_h.bias is not None, mode=mode)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise _CannotReplace(f"its layers are not a {name}'s: {error}") from error
    modules, expected = dict(module.named_modules()), dict(ours.named_modules())
    for path in sorted(modules.keys() | expected.keys()):
        if path and _wave_mlp_layer(modules.get(path)) != _wave_mlp_layer(expected.get(path)):
            raise _CannotReplace(f"{path} is {modules.get(path)!r}, expected {expected.get(path)!r}")
    if extra := _tensors(module).keys() ^ _tensors(ours).keys():
        raise _CannotReplace(f"its parameters and buffers are not a {name}'s: {', '.join(sorted(extra))}")
    return ours


def _wave_mlp_layer(module: nn.Module | None) -> tuple[object, ...]:
    # The MLP inside a PATM is of its author's own class; its layers are compared like all others.
    return ("Mlp",) if type(module).__name__ in ("Mlp", "FusedMlp") else _layer(module)


def _fused_from_wave_mlp(module: nn.Module) -> nn.Module:
    ours = _wave_mlp_form(module)
    if type(module) not in _OF_REFERENCE:
        _check_wave_mlp(module)
    return ours


def _check_wave_mlp(module: nn.Module) -> None:
    """A stranger's class is run once, on a small module of its own, beside the same module with our classes: in
    training, where stochastic depth and batch statistics show, and in evaluation."""
    kind: Any = type(module)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            if kind.__name__ == "Mlp":
                theirs = kind(8, 16, 8)
            elif kind.__name__ == "PATM":
                theirs = kind(8, mode="fc" if module.theta_h_conv[0].groups == 1 else "depthwise")  # type: ignore
            else:
                theirs = kind(8, drop_path=0.5)
            ours = copy.deepcopy(theirs)
            for part in list(ours.modules()):
                if type(part).__name__ in _WAVE_MLP:
                    _become(part, _wave_mlp_form(part))
            x = torch.randn(4, 8, 6, 9)
            same = True
            for training in (True, False):
                results = []
                for run in (theirs, ours):
                    torch.manual_seed(0)
                    results.append(run.train(training)(x))
                same = same and torch.allclose(results[0], results[1], rtol=1e-3, atol=1e-4)
    # Whatever a stranger's code raises, the answer is the same: this class cannot be vouched for.
    except Exception as error:
        raise _CannotReplace(f"could not be run beside ours to compare: {type(error).__name__}: {error}") from error
    if not same:
        raise _CannotReplace(f"shares the names of Wave-MLP's {kind.__name__} but computes something else")
    dropping = getattr(module, "drop_path", None)
    if dropping is not None and type(dropping) not in (nn.Identity, type(theirs.drop_path)):
        raise _CannotReplace(f"drop_path is {dropping!r}, expected what its class puts there")


_WAVE_MLP = tuple(_SIGNS)
_OF_REFERENCE: dict[type[nn.Module], _Counterpart] = {
    Waveblock: _fused_from_reference,
    Expansion: _fused_expansion,
    PATM: _fused_from_wave_mlp,
    Mlp: _fused_from_wave_mlp,
    WaveBlock: _fused_from_wave_mlp,
}


# --- Wavelet transforms ----------------------------------------------------------------------------------


def _dwt(module: nn.Module) -> nn.Module:
    kind = type(module)
    if kind.__module__.split(".")[0] not in _DWT_PACKAGES:
        raise _CannotReplace(f"it is neither of {' nor of '.join(_DWT_PACKAGES)}")
    if "forward" in module.__dict__:
        raise _CannotReplace("its forward is overridden on the instance")
    theirs: Any = module
    ours: pytorch_wavelets.DWTForward | pytorch_wavelets.DWTInverse
    try:
        if kind.__name__ == "DWTForward":
            ours = pytorch_wavelets.DWTForward(J=theirs.J, mode=theirs.mode)
        else:
            ours = pytorch_wavelets.DWTInverse(mode=theirs.mode)
    except (AttributeError, TypeError, ValueError) as error:
        raise _CannotReplace(str(error)) from error
    buffers = _buffers(module)
    if buffers.keys() != _buffers(ours).keys():
        raise _CannotReplace(f"its buffers are {', '.join(sorted(buffers)) or 'none'}")
    # The very same buffers, so that ours decides by the numbers that the model will go on to use.
    for name, buffer in buffers.items():
        setattr(ours, name, buffer)
    ours.refresh_filters()
    if ours._why_not_haar() is not None:
        raise _CannotReplace("its filters are not Haar's")
    return ours


def _with_haar_functions(module: nn.Module) -> nn.Module:
    try:
        wtconv.check(module)
    except wtconv.Unsuitable as reason:
        raise _CannotReplace(str(reason)) from reason
    wtconv.install(module)
    return module
