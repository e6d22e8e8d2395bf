"""Finds modules that look like ours and judges whether they compute the same, for
:func:`wavemix_kernels.accelerate`.

A module looks like one of ours by its parts, whatever its class is called and wherever it comes from. Then its layers
are compared one by one, and at last a copy of it with other weights is run beside the same copy in our class.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from wavemix_kernels import haar_layers, pytorch_wavelets, wtconv
from wavemix_kernels.nn.wavemix.block import FusedWaveblock
from wavemix_kernels.nn.wavemix.expansion import FusedDeconvs, FusedExpansion, is_pointwise, why_not_deconv
from wavemix_kernels.nn.wavemix.reference import LEVELS, Expansion, ShuffleWaveblock, Waveblock
from wavemix_kernels.nn.wavemix.shuffle import FusedShuffleWaveblock
from wavemix_kernels.nn.wavemlp.block import FusedWaveBlock
from wavemix_kernels.nn.wavemlp.mlp import FusedMlp
from wavemix_kernels.nn.wavemlp.patm import FusedPATM
from wavemix_kernels.nn.wavemlp.reference import PATM, Mlp, WaveBlock
from wavemix_kernels.ops.common import precision
from wavemix_kernels.pytorch_wavelets.dwt.bank import FilterBank
from wavemix_kernels.wtconv import CannotReplace, names_in

__all__ = ["CannotReplace", "become", "names_in", "replacement"]


#: Makes one of ours of a given module and returns the words for the report, or raises CannotReplace.
Replace = Callable[[nn.Module], str]

_UPSTREAM_BLOCKS = {f"Level{level}Waveblock": level for level in LEVELS}
_OURS = (
    *(FusedWaveblock, FusedShuffleWaveblock, FusedDeconvs),
    *(FusedPATM, FusedMlp, FusedWaveBlock, FilterBank),
)
_FILTERS: dict[type[FilterBank], tuple[str, str, str, str]] = {
    pytorch_wavelets.DWTForward: pytorch_wavelets.DWTForward._names,
    pytorch_wavelets.DWTInverse: pytorch_wavelets.DWTInverse._names,
}
#: thop and its like leave these on every module; no forward reads them.
_COUNTERS = ("total_ops", "total_params")
_NOT_RUN = "could not be run beside ours to compare"


def replacement(module: nn.Module) -> Replace | None:
    """How to replace a module that looks like one of ours; None for any other, and for ours."""
    kind = type(module)
    if isinstance(module, _OURS) or kind.__module__.split(".")[0] == __package__:
        return _OF_REFERENCE.get(kind)
    if kind.__name__ in _UPSTREAM_BLOCKS or _looks_like_waveblock(module):
        return _waveblock
    if kind.__name__ in ("DWTForward", "DWTInverse") or any(_has(module, *names) for names in _FILTERS.values()):
        return _transform
    if kind.__name__ == "PATM" or _has(module, "fc_h", "fc_w", "fc_c", "tfc_h", "tfc_w", kinds=(nn.Conv2d,)):
        return _patm
    if _has(module, "norm1", "attn", "norm2", "mlp"):
        mixer: Any = module.get_submodule("attn")
        is_ours = isinstance(mixer, PATM) or replacement(mixer) is _patm
        return _wave_block if is_ours or kind.__name__ == "WaveBlock" else None
    if _has(module, "fc1", "fc2", kinds=(nn.Conv2d,)) and (
        kind.__name__ == "Mlp" or {"fc1", "act", "fc2"} <= module._modules.keys() <= {"fc1", "act", "fc2", "drop"}
    ):
        return _mlp
    if kind is nn.Sequential and _looks_like_decoder(module):
        return _decoder
    return wtconv.replacement(module) or haar_layers.replacement(module)


def _has(module: nn.Module, *names: str, kinds: tuple[type, ...] = (nn.Module, Tensor)) -> bool:
    return all(isinstance(getattr(module, name, None), kinds) for name in names)


def _looks_like_waveblock(module: nn.Module) -> bool:
    return _has(module, "reduction", kinds=(nn.Conv2d,)) and any(
        _has(module, name, kinds=(nn.Sequential,)) for name in ("feedforward", "feedforward1")
    )


def _looks_like_decoder(module: nn.Module) -> bool:
    """Transposed convolutions of our kind, with nothing else than BatchNorm and 1x1 convolutions among them."""
    first, *rest = list(module.children()) or [module]
    return why_not_deconv("", first) is None and all(
        isinstance(layer, nn.BatchNorm2d) or is_pointwise(layer) or why_not_deconv("", layer) is None for layer in rest
    )


def become(module: nn.Module, ours: nn.Module) -> str:
    """``module`` takes the class and plain attributes of ``ours`` and keeps all that nn.Module itself manages; a part
    without tensors that it lacks is added. Returns the class's name."""
    managed = nn.Module().__dict__.keys()
    module.__dict__.update({name: value for name, value in ours.__dict__.items() if name not in managed})
    module.__class__ = type(ours)
    for name, part in ours.named_children():
        if name not in module._modules:
            module.add_module(name, part.train(module.training))
    return f"{type(ours).__module__}.{type(ours).__qualname__}"


# --- Comparing -------------------------------------------------------------------------------------------


def _check_class(module: nn.Module) -> None:
    if "forward" in module.__dict__:
        raise CannotReplace("its forward is overridden on the instance")
    if hasattr(module, "parametrizations"):
        raise CannotReplace("it has parametrizations")
    for name, parameter in module.named_parameters():
        if type(parameter.data) is not Tensor:
            raise CannotReplace(
                f"{name} is a {type(parameter.data).__name__}; call accelerate before parameters are distributed"
            )


def _check_layers(module: nn.Module, ours: nn.Module, kind: str, optional: tuple[str, ...] = ()) -> None:
    """Raises CannotReplace unless the two have the same layers, parameters and buffers, by name."""
    theirs, expected = dict(module.named_modules()), dict(ours.named_modules())
    for name in sorted(theirs.keys() | expected.keys()):
        if not name or (name in optional and name not in theirs):
            continue
        if _layer(theirs.get(name)) != _layer(expected.get(name)):
            raise CannotReplace(f"{name} is {theirs.get(name)!r}, expected {expected.get(name)!r}")
    if extra := _tensors(module) ^ _tensors(ours):
        raise CannotReplace(f"its parameters and buffers are not a {kind}'s: {', '.join(sorted(extra))}")


def _tensors(module: nn.Module) -> set[str]:
    names = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    return {name for name in names if name.rpartition(".")[2] not in _COUNTERS}


def _layer(module: nn.Module | None) -> tuple[object, ...]:
    """The settings of a layer that must agree; dropout's probability, BatchNorm's eps and momentum may differ."""
    if type(module) is nn.Dropout:
        return (nn.Dropout,)
    if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) and type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return nn.BatchNorm2d, module.num_features
    # The MLP inside of a PATM is of its author's own class; its layers are compared like all others.
    if module is not None and _has(module, "fc1", "fc2", kinds=(nn.Conv2d,)):
        return ("Mlp",)
    return type(module), "" if module is None else module.extra_repr()


def _twin(module: nn.Module) -> nn.Module:
    """A copy in float32 with random weights and statistics, nothing dropped, without hooks. (A deep copy would go
    through everything that the hooks refer to.) Its class is not called: authors' arguments differ."""
    generator, device = torch.Generator().manual_seed(0), _device(module)

    def drawn(name: str, t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return torch.zeros(t.shape, dtype=t.dtype, device=device)
        values = torch.rand(t.shape, generator=generator)
        return (values + 0.5 if "var" in name else values - 0.5).to(device)

    def copied(of: nn.Module) -> nn.Module:
        new: Any = type(of).__new__(type(of))
        # The hooks are fresh, all else is shared with the original.
        new.__dict__.update(of.__dict__ | {name: v for name, v in nn.Module().__dict__.items() if "hook" in name})
        new._parameters = {k: None if p is None else nn.Parameter(drawn(k, p)) for k, p in of._parameters.items()}
        new._buffers = {k: None if b is None else drawn(k, b) for k, b in of._buffers.items()}
        new._modules = {k: None if m is None else copied(m) for k, m in of._modules.items()}
        if isinstance(new, nn.Dropout):
            new.p = 0.0
        if isinstance(getattr(new, "drop_prob", None), float) and new.drop_prob > 0:
            new.drop_prob = 0.5  # stochastic depth that shows in four images
        return new

    return copied(module)


def _device(module: nn.Module) -> torch.device:
    device = next(iter(module.parameters()), torch.empty(0)).device
    return torch.device("cpu") if device.type == "meta" else device


def _check_same(module: nn.Module, form: Callable[[nn.Module], object], *size: int) -> None:
    """Runs two twins of ``module``, one of them in our form, on an image of this size: in training, where stochastic
    depth and batch statistics show, and in evaluation."""
    device = _device(module)
    try:
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), precision.products_in("ieee"):
            theirs, ours = _twin(module), _twin(module)
            form(ours)
            x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device)
            same = True
            for training in (True, False):
                results = []
                for run in (theirs, ours):
                    torch.manual_seed(0)
                    results.append(run.train(training)(x))
                same = same and _close(*results)
    # Whatever a stranger's code raises, the answer is the same: this class cannot be vouched for.
    except Exception as error:
        raise CannotReplace(f"{_NOT_RUN}: {type(error).__name__}: {error}") from error
    if not same:
        raise CannotReplace("has the layers of ours but computes something else")


def _close(theirs: Any, ours: Any) -> bool:
    if isinstance(ours, (tuple, list)):
        return len(theirs) == len(ours) and all(map(_close, theirs, ours))
    size = ours.abs().max().item()
    return theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=1e-3, atol=1e-4 * max(size, 1e-3))


# --- Waveblocks ------------------------------------------------------------------------------------------


def _waveblock(module: nn.Module) -> str:
    theirs: Any = module
    if any(isinstance(layer, nn.PixelShuffle) for layer in getattr(module, "feedforward", ())):
        return _shuffle_block(module)
    level, upsample = _UPSTREAM_BLOCKS.get(type(module).__name__) or _level(module), "deconv"
    if isinstance(module, Waveblock):
        level, upsample = theirs.level, theirs.upsample
    ours = _waveblock_form(module, level, upsample)
    if type(module) is not Waveblock:
        side = 2 * 2**level
        form = functools.partial(_waveblock_form, level=level, upsample=upsample)
        _check_same(module, lambda twin: become(twin, form(twin)), 2, ours.final_dim, side, side + side // 2)
    return become(module, ours)


def _level(module: nn.Module) -> int:
    if hasattr(module, "feedforward"):
        return 1
    return max((level for level in LEVELS if hasattr(module, f"feedforward{level}")), default=1)


def _waveblock_form(module: nn.Module, level: int, upsample: str) -> FusedWaveblock:
    """A FusedWaveblock (on the meta device) with the layers that ``module`` has, one by one."""
    _check_class(module)
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
        raise CannotReplace(f"its layers are not a level-{level} Waveblock's: {error}") from error
    _check_layers(module, ours, "Waveblock")
    return ours


def _shuffle_block(module: nn.Module) -> str:
    ours = _shuffle_form(module)
    if type(module) is not ShuffleWaveblock:
        _check_same(module, lambda twin: become(twin, _shuffle_form(twin)), 2, ours.final_dim, 4, 6)
    return become(module, ours)


def _shuffle_form(module: nn.Module) -> FusedShuffleWaveblock:
    """A FusedShuffleWaveblock (on the meta device) with the layers that ``module`` has, one by one."""
    _check_class(module)
    try:
        reduction: Any = module.get_submodule("reduction")
        part = module.get_submodule("feedforward")
        convolutions: list[Any] = [layer for layer in part.children() if isinstance(layer, nn.Conv2d)]
        dim = reduction.in_channels
        with torch.device("meta"):
            ours = FusedShuffleWaveblock(
                mult=convolutions[0].out_channels // dim, ff_channel=4 * dim, final_dim=dim,
                second=len(convolutions) == 3,
            )  # fmt: skip
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise CannotReplace(f"its layers are not a Waveblock's with PixelShuffle: {error}") from error
    _check_layers(module, ours, "Waveblock with PixelShuffle")
    return ours


def _decoder(module: nn.Module) -> str:
    """At every call ours asks which of its layers it can fuse, and runs the others."""
    *_, last = module.children()
    norms = any(isinstance(layer, nn.BatchNorm2d) for layer in module.children())
    kind = FusedExpansion if is_pointwise(last) and not norms else FusedDeconvs
    module.__class__ = kind
    return f"{kind.__module__}.{kind.__qualname__}"


# --- Wave-MLP --------------------------------------------------------------------------------------------


def _mlp_form(module: nn.Module, name: str = "Mlp") -> FusedMlp:
    _check_class(module)
    theirs: Any = module
    try:
        with torch.device("meta"):
            ours = FusedMlp(theirs.fc1.in_channels, theirs.fc1.out_channels, theirs.fc2.out_channels)
    except (AttributeError, TypeError, ValueError) as error:
        raise CannotReplace(f"its layers are not a {name}'s: {error}") from error
    _check_layers(module, ours, name, optional=("drop",))
    return ours


def _patm_form(module: nn.Module) -> FusedPATM:
    _check_class(module)
    theirs: Any = module
    try:
        mode = "fc" if theirs.theta_h_conv[0].groups == 1 else "depthwise"
        with torch.device("meta"):
            ours = FusedPATM(theirs.fc_h.in_channels, qkv_bias=theirs.fc_h.bias is not None, mode=mode)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise CannotReplace(f"its layers are not a PATM's: {error}") from error
    _check_layers(module, ours, "PATM", optional=("proj_drop", "reweight.drop"))
    return ours


def _become_patm(twin: nn.Module) -> None:
    mlp = twin.get_submodule("reweight")
    become(mlp, _mlp_form(mlp))
    become(twin, _patm_form(twin))


def _wave_block_form(module: nn.Module) -> FusedWaveBlock:
    _check_class(module)
    with torch.device("meta"):
        return FusedWaveBlock(4)  # its parts are replaced each by itself; at every call it asks which it can fuse


def _become_wave_block(twin: nn.Module) -> None:
    become(twin, _wave_block_form(twin))
    for part in list(twin.modules())[1:]:
        if (how := replacement(part)) in (_patm, _mlp):
            _become_patm(part) if how is _patm else become(part, _mlp_form(part))


def _mlp(module: nn.Module) -> str:
    ours = _mlp_form(module)
    if type(module) is not Mlp:
        _check_same(module, lambda twin: become(twin, _mlp_form(twin)), 2, ours.fc1.in_channels, 3, 5)
    return become(module, ours)


def _patm(module: nn.Module) -> str:
    ours = _patm_form(module)
    if type(module) is not PATM:
        _check_same(module, _become_patm, 2, ours.dim, 6, 9)
    return become(module, ours)


def _wave_block(module: nn.Module) -> str:
    ours = _wave_block_form(module)
    theirs: Any = module
    if type(module) is not WaveBlock:
        path = getattr(theirs, "drop_path", None)
        if type(path).__name__ not in ("Identity", "DropPath"):
            raise CannotReplace(f"drop_path is {path!r}, expected stochastic depth or Identity")
        channels = next(iter(theirs.attn.parameters())).shape[1]
        _check_same(module, _become_wave_block, 4, channels, 6, 9)
    return become(module, ours)


_OF_REFERENCE: dict[type[nn.Module], Replace] = {
    Waveblock: _waveblock,
    ShuffleWaveblock: _waveblock,
    Expansion: _decoder,
    PATM: _patm,
    Mlp: _mlp,
    WaveBlock: _wave_block,
}


# --- Wavelet transforms ----------------------------------------------------------------------------------


def _transform(module: nn.Module) -> str:
    _check_class(module)
    theirs: Any = module
    forward = _has(module, *_FILTERS[pytorch_wavelets.DWTForward]) or type(module).__name__ == "DWTForward"
    kind = pytorch_wavelets.DWTForward if forward else pytorch_wavelets.DWTInverse
    buffers = {name: b for name, b in module.named_buffers() if name not in _COUNTERS}
    if buffers.keys() != set(kind._names) or any(module.parameters()):
        tensors = ", ".join(sorted(_tensors(module))) or "none"
        raise CannotReplace(
            f"its tensors are {tensors}, where pytorch_wavelets has the buffers {', '.join(kind._names)}"
        )
    try:
        ours: Any = kind(theirs.J, mode=theirs.mode) if forward else kind(mode=theirs.mode)
    except (AttributeError, TypeError, ValueError) as error:
        raise CannotReplace(str(error)) from error
    # The very same buffers, so that ours decides by the numbers that the model will go on to use.
    for name, buffer in buffers.items():
        setattr(ours, name, buffer)
    ours.refresh_filters()
    _check_transform(theirs, ours)
    return become(module, ours)


def _check_transform(theirs: Any, ours: Any) -> None:
    """Runs the two on an image of odd sizes, where modes differ, and on one of even sizes."""
    first: Tensor = next(ours.buffers())
    if first.is_meta:
        raise CannotReplace(f"{_NOT_RUN}: its filters are on the meta device, without values")
    try:
        with torch.no_grad():
            same, filters = True, list(ours.buffers())
            least = 2 * max(f.numel() for f in filters)  # a border longer than the image is nobody's habit
            for h, w in ((19, 22), (16, 24)):
                size = (1, 2, max(h, least + h % 2), max(w, least))
                x: Any = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(first)
                if isinstance(ours, pytorch_wavelets.DWTInverse):  # coefficients of any filters of these lengths
                    x = pytorch_wavelets.DWTForward(2, filters, ours.mode).to(first)(x)
                same = same and _close(theirs.forward(x), ours.forward(x))
    except Exception as error:
        raise CannotReplace(f"{_NOT_RUN}: {type(error).__name__}: {error}") from error
    if not same:
        raise CannotReplace("has the filters of ours but computes something else")
