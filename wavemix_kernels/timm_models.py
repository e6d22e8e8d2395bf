"""Wave-MLP and WaveMix in timm's registry: ``import wavemix_kernels.timm_models``, then ``timm.create_model``.

Nothing else in this package imports timm. Registered are ``wavemlp_t_dw``, ``_t``, ``_s``, ``_m``, ``_b``, WaveMix with
a tag for each of its published weights (``wavemix_192_16.imagenet_75.06``), ``wavemix`` and ``wavemix_lite`` as in the
authors' file for timm, the four published WaveMix-Lites, and ``wavemix_v3_144_16``. WaveMix's other models give images
and have no place in this registry.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from wavemix_kernels import checks, pretrained, wavemlp
from wavemix_kernels.nn.parts import average
from wavemix_kernels.ops.common import layout
from wavemix_kernels.wavemix import classification
from wavemix_kernels.wavemix.v3 import WaveMixV3Block

__all__: list[str] = []  # timm adds each model that it registers

_IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic"}
_POOLS = ("avg",)


def _taken(count: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """The features that timm's ``indices`` mean (None: all, an int: the last so many), and the last of them."""
    if isinstance(indices, int):
        indices = range(-indices, 0)
    given = list(range(count) if indices is None else indices)
    if not given or not all(-count <= i < count for i in given):
        raise ValueError(f"indices={given!r}: expected one or more numbers from {-count} to {count - 1}")
    found = [i % count for i in given]
    return found, max(found)


class WaveMLP(wavemlp.WaveNet):
    """:class:`wavemix_kernels.wavemlp.WaveNet` with the methods that timm asks of a model.

    Args:
        layers, embed_dims, kwargs: as WaveNet takes them.
        drop_rate: of dropout before the head, in timm's sense.
        global_pool: "avg".

    ``features_only=True`` gives the stages' outputs, unnormalised: the norms of WaveNet's own ``fork_feat=True`` have
    no trained weights.
    """

    def __init__(
        self,
        layers: Sequence[int],
        *,
        embed_dims: Sequence[int],
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        **kwargs: Any,
    ) -> None:
        checks.check_choice("global_pool", global_pool, _POOLS)
        super().__init__(layers, embed_dims=embed_dims, **kwargs)
        self.drop_rate = checks.check_probability("drop_rate", drop_rate)
        self.num_features = self.head_hidden_size = self.embed_dim
        self.feature_info = [
            {"num_chs": channels, "reduction": 4 << i, "module": f"network.{index}"}
            for i, (channels, index) in enumerate(zip(embed_dims, self.out_indices, strict=True))
        ]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool or "")

    def no_weight_decay(self) -> set[str]:
        return set()

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the normalised tokens of the last stage, (N, embed_dims[-1], H/32, W/32)."""
        tokens: Any = self.forward_tokens(self.forward_embeddings(x))
        return self.norm(tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """These to logits, or to the pooled features that the head reads."""
        pooled = F.dropout(average(x).flatten(1), self.drop_rate, self.training)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        return super().forward(x) if self.fork_feat else self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's: the outputs of the stages ``indices`` (an int: the last so many), and :meth:`forward_features`.

        Args:
            norm: normalise the last stage's output.
            stop_early: leave out what comes after the last stage asked for.
            output_fmt: "NCHW".
            intermediates_only: leave out the features.
        """
        checks.check_choice("output_fmt", output_fmt, ("NCHW",))
        wanted, last = _taken(len(self.out_indices), indices)
        end = self.out_indices[last] + 1 if stop_early else len(self.network)
        given, found = x, []
        x = self.forward_embeddings(x)
        for index, module in enumerate(list(self.network)[:end]):
            x = module(x)
            if index in self.out_indices and self.out_indices.index(index) in wanted:
                is_last = index == self.out_indices[-1]
                out = self.norm(x) if norm and is_last else x
                found.append(out if layout.is_channels_last(given) else out.contiguous())
        if intermediates_only:
            return found
        return (self.norm(x) if end == len(self.network) else x), found

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops what :meth:`forward_intermediates` with ``indices`` does not need; these as a list."""
        wanted, last = _taken(len(self.out_indices), indices)
        self.network = nn.ModuleList(list(self.network)[: self.out_indices[last] + 1])
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self._set_head(0)
        result: list[int] = wanted
        return result


class WaveMix(classification.WaveMix):
    """:class:`wavemix_kernels.wavemix.classification.WaveMix` with the methods that timm asks of a model.

    Args:
        in_chans: channels of the image.
        drop_rate: of dropout before the head, in timm's sense; the blocks' own is ``dropout``.
        global_pool: "avg".
        kwargs: further arguments of WaveMix.
    """

    def __init__(self, *, in_chans: int = 3, drop_rate: float = 0.0, global_pool: str = "avg", **kwargs: Any) -> None:
        checks.check_choice("global_pool", global_pool, _POOLS)
        num_classes = kwargs.pop("num_classes", 1000)
        super().__init__(in_channels=in_chans, num_classes=num_classes or 1, **kwargs)
        self.drop_rate = checks.check_probability("drop_rate", drop_rate)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.get_classifier().in_features
        if not num_classes:
            self.reset_classifier(0)
        reduction = 1
        for layer in self.conv.modules():
            reduction *= layer.stride[0] if isinstance(layer, nn.Conv2d) else 1
        last = f"layers.{len(self.layers) - 1}"
        self.feature_info = [{"num_chs": self.num_features, "reduction": reduction, "module": last}]

    def _end(self) -> Any:
        """Pooling, flattening and the classifier."""
        return self.pool

    def get_classifier(self) -> Any:
        return self._end()[2]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, on the model's device and in its dtype; 0 classes for none."""
        checks.check_choice("global_pool", global_pool or "avg", _POOLS)
        old = next(self.conv.parameters())
        self.num_classes = num_classes
        self._end()[2] = nn.Linear(self.num_features, num_classes).to(old) if num_classes else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        return set()

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to what the last block gives, (N, final_dim, h, w)."""
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """This to logits, or to the pooled features that the head reads."""
        pool, flatten, classifier = self._end()
        pooled = F.dropout(flatten(pool(x)), self.drop_rate, self.training)
        return pooled if pre_logits else classifier(pooled)

    def forward(self, img: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(img))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's; the only scale is the last block's, and there is no norm after it."""
        checks.check_choice("output_fmt", output_fmt, ("NCHW",))
        _taken(1, indices)
        features = self.forward_features(x)
        return [features] if intermediates_only else (features, [features])

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        wanted: list[int] = _taken(1, indices)[0]
        if prune_head:
            self.reset_classifier(0)
        return wanted


class WaveMixWithHead(WaveMix):
    """:class:`WaveMix` with its end called ``head`` in place of ``pool``, as in the authors' file for timm."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._modules = {"head" if name == "pool" else name: module for name, module in self._modules.items()}

    def _end(self) -> Any:
        return self._modules.get("head", self._modules.get("pool"))


# --- What is registered --------------------------------------------------------------------------------------

_RELEASES = "https://github.com/huawei-noah/CV-Backbones/releases/download/wavemlp"
#: Name, the function with its sizes, crop in evaluation, whether weights are published.
_WAVE_MLP: tuple[tuple[str, Callable[..., nn.Module], float, bool], ...] = (
    ("WaveMLP_T_dw", wavemlp.WaveMLP_T_dw, 0.9, True),
    ("WaveMLP_T", wavemlp.WaveMLP_T, 0.9, True),
    ("WaveMLP_S", wavemlp.WaveMLP_S, 0.9, True),
    ("WaveMLP_M", wavemlp.WaveMLP_M, 0.9, True),
    ("WaveMLP_B", wavemlp.WaveMLP_B, 0.875, False),
)
#: Tags are names in :data:`wavemix_kernels.pretrained.WEIGHTS`, which says the arguments; the first is timm's default.
_WAVEMIX: dict[str, tuple[str, ...]] = {
    "wavemix_192_16": (
        *("imagenet_75.06", "imagenet_75.04", "imagenet_71.49"),
        *("galaxy10_95.42", "tinyimagenet_78.76", "tinyimagenet_71.69"),
    ),
    "wavemix_192_16_level1": ("imagenet_71.18", "imagenet_70.66", "galaxy10_90.23"),
    "wavemix_256_16": ("imagenet_73.03",),
    "wavemix_256_16_level4": ("imagenet_70.42",),
    "wavemix_256_12_level2": ("places365_54.94",),
    "wavemix_320_8_level1": ("cifar10_95.37",),
    "wavemix_144_7_level1": ("cifar10_94.58",),
    "wavemix_256_10_level1": ("cifar100_78.81", "tinyimagenet_62.51"),
    "wavemix_256_8_level1": ("cifar100_77.82",),
}
#: Names in the authors' file for timm, with the weights that it names.
_WITH_HEAD = {"wavemix": "imagenet_75.06", "wavemix_lite": "imagenet_71.18"}
#: Width, depth, upsampling, image; see :class:`wavemix_kernels.wavemix.classification.WaveMixLite`.
_LITE: dict[str, tuple[int, int, str, tuple[int, int, int]]] = {
    "wavemix_lite_8_10": (8, 10, "bilinear", (1, 28, 28)),
    "wavemix_lite_8_5": (8, 5, "deconv", (1, 28, 28)),
    "wavemix_lite_32_7": (32, 7, "bilinear", (3, 32, 32)),
    "wavemix_lite_64_6": (64, 6, "deconv", (3, 32, 32)),
}
#: Pixels; nothing but a default, any fitting size works.
_SIDES = {"imagenet": 224, "places365": 224, "cifar10": 32, "cifar100": 32, "tinyimagenet": 64, "galaxy10": 256}


def _configurations() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, _, crop, published in _WAVE_MLP:
        url = f"{_RELEASES}/{name}.pth.tar" if published else ""
        found[f"{name.lower()}.in1k" if published else name.lower()] = {
            "url": url, "crop_pct": crop, "first_conv": "patch_embed.proj", "classifier": "head", **_IMAGENET,
        }  # fmt: skip
    ends = {"first_conv": "conv.0", "classifier": "pool.2", **_IMAGENET}
    heads = {name: (tag,) for name, tag in _WITH_HEAD.items()}
    for name, tags in {**_WAVEMIX, **heads}.items():
        for tag in tags:
            entry = pretrained.weights(tag)
            side = _SIDES[tag.split("_")[0]]
            classes = entry.arguments.get("num_classes", 1000)
            size = {"input_size": (3, side, side), "num_classes": classes, "crop_pct": 1.0}
            classifier = {"classifier": "head.2" if name in heads else "pool.2"}
            found[f"{name}.{tag}"] = {"url": entry.url, **size, **ends, **classifier}
    for name, (_, _, _, image) in _LITE.items():
        grey = {"mean": (0.5,), "std": (0.5,)} if image[0] == 1 else {}
        found[name] = {"input_size": image, "num_classes": 10, "crop_pct": 1.0, **ends, **grey}
    found["wavemix_v3_144_16"] = {"input_size": (3, 224, 224), "num_classes": 1000, "crop_pct": 1.0, **ends}
    return found


default_cfgs = generate_default_cfgs(_configurations())


def _wave_mlp_weights(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    inner: Mapping[str, Any] = state.get("state_dict", state.get("model", state))
    return wavemlp.own_names(inner)


def _with_head(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The published weights have ``pool``."""
    return {re.sub(r"^pool\.", "head.", name): value for name, value in state.items()}


_FILTERS: dict[Any, Callable[..., dict[str, Tensor]]] = {WaveMixWithHead: _with_head}


def _built(kind: Callable[..., nn.Module], name: str, load: bool, scales: int, **kwargs: Any) -> nn.Module:
    # Upstream's training script saves its argparse arguments beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
        model: nn.Module = build_model_with_cfg(
            kind,
            name,
            load,
            pretrained_filter_fn=_wave_mlp_weights if name.startswith("wavemlp") else _FILTERS.get(kind),
            feature_cfg={"out_indices": tuple(range(scales)), "feature_cls": "getter"},
            **kwargs,
        )
    return model


def _register(name: str, text: str, make: Callable[..., nn.Module]) -> None:
    """timm reads a model's name, module and description off a function."""
    make.__name__ = make.__qualname__ = name
    make.__doc__ = text
    register_model(make)
    globals()[name] = make


def _wave_mlp_entry(name: str, sizes: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def made(**kwargs: Any) -> nn.Module:
        return sizes(kind=WaveMLP, **kwargs)

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _built(made, name, pretrained, 4, **kwargs)

    return entry


def _wavemix_entry(name: str, arguments: Mapping[str, Any], kind: type[WaveMix] = WaveMix) -> Callable[..., nn.Module]:
    # How many classes there are the tag says.
    arguments = {key: value for key, value in arguments.items() if key != "num_classes"}

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _built(kind, name, pretrained, 1, **{**arguments, **kwargs})

    return entry


for _name, _sizes, _, _ in _WAVE_MLP:
    _register(_name.lower(), f"{_name} of arXiv:2111.12294.", _wave_mlp_entry(_name.lower(), _sizes))
for _name, _tags in _WAVEMIX.items():
    _register(_name, "WaveMix of arXiv:2205.14375.", _wavemix_entry(_name, pretrained.weights(_tags[0]).arguments))
for _name, _tag in _WITH_HEAD.items():
    _text = "WaveMix of arXiv:2205.14375, as in its authors' file for timm."
    _register(_name, _text, _wavemix_entry(_name, pretrained.weights(_tag).arguments, WaveMixWithHead))
_v3 = {"depth": 16, "mult": 4, "final_dim": 144, "level": 1, "upsample": "pixelshuffle", "block": WaveMixV3Block}
_register("wavemix_v3_144_16", "WaveMix V3.", _wavemix_entry("wavemix_v3_144_16", _v3))
for _name, (_width, _depth, _upsample, _size) in _LITE.items():
    _arguments = {"final_dim": _width, "ff_channel": _width, "depth": _depth, "upsample": _upsample, "level": 1}
    _arguments |= {"initial_conv": "strided", "stride": 1}
    _register(_name, "WaveMix-Lite of arXiv:2205.14375.", _wavemix_entry(_name, _arguments))
