"""Drop-in for the public Wave-MLP code (huawei-noah/Efficient-AI-Backbones, ``wavemlp_pytorch``): the same names,
arguments and checkpoints (Tang et al., "An Image Patch is a Wave: Phase-Aware Vision MLP", arXiv:2111.12294).

Four stages of :class:`WaveBlock`, each a residual token mixer (:class:`PATM`) and a residual channel MLP, at 1/4, 1/8,
1/16 and 1/32 of the image. Blocks take their token mixer by the keyword ``token_mixer``, models their block by
``block``: the reference model is this one with :class:`wavemix_kernels.reference.WaveBlock`.
"""

import argparse
import copy
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from wavemix_kernels import backends, checks, fx
from wavemix_kernels.nn.parts import affine_of, average, together, untouched
from wavemix_kernels.nn.wavemlp.block import FusedWaveBlock as WaveBlock
from wavemix_kernels.nn.wavemlp.inference import InferenceWaveBlock
from wavemix_kernels.nn.wavemlp.mlp import FusedMlp as Mlp
from wavemix_kernels.nn.wavemlp.patm import FusedPATM as PATM
from wavemix_kernels.nn.wavemlp.reference import DropPath, NormLayer, TokenMixer, warn_unused
from wavemix_kernels.nn.wavemlp.reference import WaveBlock as ReferenceBlock
from wavemix_kernels.ops.common import layout
from wavemix_kernels.ops.common.transforms import standard_wanted

__all__ = [
    "PATM",
    "Downsample",
    "DropPath",
    "Mlp",
    "MyNorm",
    "PatchEmbedOverlapping",
    "WaveBlock",
    "WaveMLP_B",
    "WaveMLP_M",
    "WaveMLP_S",
    "WaveMLP_T",
    "WaveMLP_T_dw",
    "WaveNet",
]

STEM_PATCH, STEM_STRIDE, STEM_PADDING = 7, 4, 2


def MyNorm(dim: int) -> nn.GroupNorm:
    """The norm layer of WaveMLP_S, _M and _B: one group, so statistics over C, H and W of each image."""
    return nn.GroupNorm(1, dim)


class PatchEmbedOverlapping(nn.Module):
    """Image to tokens by a strided convolution: (N, in_chans, H, W) -> (N, embed_dim, h, w).

    Args:
        patch_size, stride, padding: of the convolution, for H and W alike or as a pair.
        in_chans, embed_dim, groups: of the convolution.
        norm_layer: called with ``embed_dim``, where ``use_norm`` is true.

    Raises:
        ValueError: an image without room for one patch, or with other than ``in_chans`` channels.
    """

    def __init__(
        self,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] = 16,
        padding: int | tuple[int, int] = 0,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: NormLayer = nn.BatchNorm2d,
        groups: int = 1,
        use_norm: bool = True,
    ) -> None:
        super().__init__()
        self.patch_size = _pair(patch_size)
        self.padding = _pair(padding)
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, _pair(stride), self.padding, groups=groups)
        self.norm = norm_layer(embed_dim) if use_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return self.norm(self.proj(x))
        channels = self.proj.in_channels
        checks.check_tensor("x", x, 4, f"(N, {channels}, H, W)")
        if x.shape[1] != channels:
            raise ValueError(f"x: expected {channels} channels (in_chans), got shape {tuple(x.shape)}")
        for axis, size, patch, padding in zip("HW", x.shape[2:], self.patch_size, self.padding, strict=True):
            if size + 2 * padding < patch:
                raise ValueError(
                    f"x: {axis}={size} has no room for one patch of {patch} pixels, {padding} of padding on each side: "
                    f"expected at least {patch - 2 * padding}"
                )
        return self.norm(self.proj(x))


class Downsample(nn.Module):
    """The 3x3 convolution of stride 2 between two stages: (N, in_embed_dim, H, W) -> (N, out_embed_dim, ⌈H/2⌉, ⌈W/2⌉).

    Args:
        in_embed_dim, out_embed_dim: channels.
        patch_size: 2, or ValueError.
        norm_layer: called with ``out_embed_dim``, where ``use_norm`` is true.
    """

    def __init__(
        self,
        in_embed_dim: int,
        out_embed_dim: int,
        patch_size: int,
        norm_layer: NormLayer = nn.BatchNorm2d,
        use_norm: bool = True,
    ) -> None:
        super().__init__()
        if patch_size != 2:
            raise ValueError(f"patch_size={patch_size!r}: expected 2, since stages differ by a factor of 2")
        self.proj = nn.Conv2d(in_embed_dim, out_embed_dim, 3, stride=2, padding=1)
        self.norm = norm_layer(out_embed_dim) if use_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class WaveNet(nn.Module):
    """Wave-MLP of any size: images (N, in_chans, H, W), H and W at least 3, to logits (N, num_classes).

    Args:
        layers: blocks of each stage.
        img_size, args: unused, as upstream: any image size works.
        patch_size: unused, as upstream: the stem is a 7x7 convolution of stride 4. Other than 4 and 7 it warns.
        in_chans: channels of the image (upstream's stem always has 3).
        num_classes: size of the head; 0 for the pooled features (N, embed_dims[-1]).
        embed_dims, mlp_ratios: channels, and hidden channels of the MLP as a multiple of them, of each stage.
        transitions: for each stage but the last, whether it ends with :class:`Downsample`. None for all.
        qkv_bias, mode: as :class:`PATM` takes them.
        qk_scale, drop_rate, attn_drop_rate: unused, as upstream; other than None and 0 they warn.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        norm_layer: called with the channels for each norm, ``nn.BatchNorm2d`` or :func:`MyNorm`.
        fork_feat: a backbone for detection and segmentation: instead of a head a norm layer on each stage's output,
            named ``norm0``, ``norm2``, ... after its place in ``network``, and a list of these outputs, finest first.
            The environment variable ``FORK_LAST3`` leaves the first one without norm, as upstream.
        ds_use_norm: whether the stem and each :class:`Downsample` end with a norm.
        token_mixer: what takes PATM's place in each block.
        block: what takes WaveBlock's place, called as that is. None: :class:`WaveBlock` around PATM, and the plain
            modules around any other ``token_mixer``.

    Raises:
        TypeError, ValueError: an argument out of these ranges, or an image that does not fit them.

    Source: arXiv:2111.12294; parameter names and checkpoints are those of the authors' public code.
    """

    def __init__(
        self,
        layers: Sequence[int],
        img_size: int = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] | None = None,
        transitions: Sequence[bool] | None = None,
        mlp_ratios: Sequence[float] | None = None,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: NormLayer = nn.BatchNorm2d,
        fork_feat: bool = False,
        mode: str = "fc",
        ds_use_norm: bool = True,
        args: object = None,
        *,
        token_mixer: TokenMixer = PATM,
        block: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if block is None:
            block = WaveBlock if token_mixer is PATM else ReferenceBlock
        stages = len(layers)
        dims = _per_stage("embed_dims", embed_dims, stages)
        ratios = _per_stage("mlp_ratios", mlp_ratios, stages)
        shrinks = [True] * stages if transitions is None else list(transitions)
        if len(shrinks) < stages - 1:
            raise ValueError(f"transitions={transitions!r}: expected one for each of the {stages} stages but the last")
        checks.check_probability("drop_path_rate", drop_path_rate)
        warn_unused("drop_rate", drop_rate)
        if patch_size not in (4, STEM_PATCH):
            warnings.warn(
                f"patch_size={patch_size!r} has no effect: the stem is a {STEM_PATCH}x{STEM_PATCH} convolution of "
                f"stride {STEM_STRIDE}",
                stacklevel=2,
            )
        self.fork_feat = fork_feat
        self.embed_dim = dims[-1]
        self.patch_embed = PatchEmbedOverlapping(
            STEM_PATCH, STEM_STRIDE, STEM_PADDING, in_chans, dims[0], norm_layer, use_norm=ds_use_norm
        )

        network: list[nn.Module] = []
        self.out_indices: list[int] = []
        last = max(sum(layers) - 1, 1)
        for i, (depth, dim, ratio) in enumerate(zip(layers, dims, ratios, strict=True)):
            self.out_indices.append(len(network))
            first = sum(layers[:i])
            network.append(
                nn.Sequential(
                    *(
                        block(
                            dim,
                            ratio,
                            qkv_bias,
                            qk_scale,
                            attn_drop=attn_drop_rate,
                            drop_path=drop_path_rate * number / last,
                            norm_layer=norm_layer,
                            mode=mode,
                            token_mixer=token_mixer,
                        )
                        for number in range(first, first + depth)
                    )
                )
            )
            if i + 1 < stages and (shrinks[i] or dim != dims[i + 1]):
                network.append(Downsample(dim, dims[i + 1], 2 if shrinks[i] else 1, norm_layer, ds_use_norm))
        self.network = nn.ModuleList(network)

        if fork_feat:
            for i, (index, dim) in enumerate(zip(self.out_indices, dims, strict=True)):
                # Set for detectors that start at 1/8 of the image: DDP rejects a norm left without gradient.
                bare = i == 0 and os.environ.get("FORK_LAST3")
                self.add_module(f"norm{index}", nn.Identity() if bare else norm_layer(dim))
        else:
            self.norm = norm_layer(self.embed_dim)
            self._set_head(num_classes)

    def _set_head(self, num_classes: int) -> None:
        if num_classes != 0:
            checks.check_positive_int("num_classes", num_classes)
        self.num_classes = num_classes
        self.head: nn.Module = nn.Identity()
        if num_classes:
            self.head = head = nn.Linear(self.embed_dim, num_classes)
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)

    def init_weights(self, pretrained: str | os.PathLike[str] | None = None) -> None:
        """Loads a checkpoint file; nothing where it is None, as detection frameworks call it.

        The file holds a state dict, or a dict with one as ``"state_dict"`` or ``"model"``. A prefix ``module.`` (left
        by DistributedDataParallel) and the counters ``total_ops``, ``total_params`` (left by thop in upstream's files)
        are dropped. Names and shapes must match, except that a model with ``fork_feat`` takes a classifier's file: its
        ``norm`` and ``head`` are left out, and the norms of the outputs keep their values where the file has none.

        Raises:
            RuntimeError: names or shapes do not match (from ``load_state_dict``, which lists them).
            ValueError: no state dict in the file.
        """
        if pretrained is None:
            return
        # Upstream's training script saves its argparse arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(pretrained, map_location="cpu", weights_only=True)
        if isinstance(content, dict):
            content = content.get("state_dict", content.get("model", content))
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise ValueError(
                f"pretrained={os.fspath(pretrained)!r}: expected a file with a state dict, or with a dict that has one "
                f"as 'state_dict' or 'model'"
            )
        state = own_names(content)
        if self.fork_feat:
            state = {name: value for name, value in state.items() if not name.startswith(("norm.", "head."))}
            outputs = tuple(f"norm{index}." for index in self.out_indices)
            own = {name: value for name, value in self.state_dict().items() if name.startswith(outputs)}
            state = own | state
        self.load_state_dict(state)

    def fuse_for_inference(self) -> "WaveNet":
        """A new model for inference, equal to this one in evaluation up to rounding: every block in its inference form,
        the BatchNorms of the stem and between stages folded into their convolutions, the last one into the head.

        Raises:
            ValueError: a block that has no inference form; the message says which and why.
        """
        model = copy.deepcopy(self).eval().requires_grad_(False)
        for name, stage in model.network.named_children():
            if isinstance(stage, Downsample):
                _fold_norm(stage)
                continue
            for index, block in stage.named_children():
                if isinstance(block, WaveBlock):
                    try:
                        setattr(stage, index, block.fuse_for_inference())
                    except ValueError as error:
                        raise ValueError(f"network.{name}.{index}: {error}") from error
        _fold_norm(model.patch_embed)
        if not self.fork_feat and _is_tracked(model.norm) and type(model.head) is nn.Linear and untouched(model.head):
            # The mean over pixels keeps an affine map by channel.
            scale, shift = affine_of(model.norm, "norm")
            head, dtype = model.head, model.head.weight.dtype
            wide = head.weight.double()
            with torch.no_grad():
                head.bias.copy_((head.bias.double() + wide @ shift).to(dtype))
                head.weight.copy_((wide * scale).to(dtype))
            model.norm = nn.Identity()
        return model

    def _check_classifier(self, call: str) -> None:
        if self.fork_feat:
            raise ValueError(
                f"{call}: a model with fork_feat={self.fork_feat!r} has no classifier; expected fork_feat=False"
            )

    def get_classifier(self) -> nn.Module:
        """The head. Raises ValueError for a model with ``fork_feat``."""
        self._check_classifier("get_classifier()")
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str = "") -> None:
        """Replaces the head by a new one, on the model's device and in its dtype; 0 classes for none.

        Raises:
            ValueError: a model with ``fork_feat``, or a ``global_pool`` other than ``"avg"`` and ``""`` (the same).
        """
        self._check_classifier(f"reset_classifier({num_classes!r})")
        checks.check_choice("global_pool", global_pool, ("", "avg"))
        self._set_head(num_classes)
        self.head.to(self.patch_embed.proj.weight)

    def forward_embeddings(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) to the first stage's tokens, about a quarter of the size."""
        if isinstance(x, Tensor) and x.dim() == 4 and self._is_fused():
            # The order that the blocks work in: they, and the convolutions between them, then never convert.
            x = x.contiguous(memory_format=torch.channels_last)
        return self.patch_embed(x)

    def _is_fused(self) -> bool:
        return (
            backends.requested() != "reference"
            and standard_wanted() is None
            and any(isinstance(m, (WaveBlock, InferenceWaveBlock)) for m in self.network[0].modules())
        )

    def forward_tokens(self, x: Tensor) -> Tensor | list[Tensor]:
        """Tokens of the first stage to those of the last; with ``fork_feat`` to the list of every stage's, normed."""
        outputs = []
        with together():
            for index, module in enumerate(self.network):
                x = module(x)
                if self.fork_feat and index in self.out_indices:
                    outputs.append(getattr(self, f"norm{index}")(x))
        return outputs if self.fork_feat else x

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        tokens = self.forward_tokens(self.forward_embeddings(x))
        if isinstance(tokens, list):
            return [layout.ordered_as(t, x) for t in tokens]
        return self.head(average(self.norm(tokens)).flatten(1))


def _is_tracked(norm: nn.Module) -> bool:
    return type(norm) is nn.BatchNorm2d and untouched(norm) and norm.running_mean is not None


def _fold_norm(part: PatchEmbedOverlapping | Downsample) -> None:
    """The BatchNorm behind a convolution into it."""
    if _is_tracked(part.norm) and type(part.proj) is nn.Conv2d and untouched(part.proj):
        part.proj = fuse_conv_bn_eval(part.proj, part.norm)  # type: ignore[arg-type]
        part.norm = nn.Identity()


def own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of upstream's training as the model names it: without what DistributedDataParallel and thop add."""
    kept = {name: value for name, value in state.items() if not name.endswith(("total_ops", "total_params"))}
    return {name.removeprefix("module."): value for name, value in kept.items()}


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _per_stage(name: str, value: Sequence | None, stages: int) -> list:
    if value is None or len(value) != stages:
        raise ValueError(f"{name}={value!r}: expected one for each of the {stages} stages of layers")
    return list(value)


def _wave_mlp(
    pretrained: bool | str | os.PathLike[str],
    layers: Sequence[int],
    embed_dims: Sequence[int],
    mlp_ratios: Sequence[float],
    crop_pct: float,
    *,
    kind: type[WaveNet] = WaveNet,
    **kwargs: Any,
) -> WaveNet:
    if pretrained is True:
        raise ValueError("pretrained=True: no weights come with this package; expected the path of a checkpoint file")
    model = kind(layers, embed_dims=embed_dims, mlp_ratios=mlp_ratios, **kwargs)
    # timm's data pipeline asks a model for these.
    model.default_cfg = {  # type: ignore[assignment]
        "url": "", "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": None, "crop_pct": crop_pct,
        "interpolation": "bicubic", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "classifier": "head",
    }  # fmt: skip
    model.init_weights(pretrained or None)
    return model


#: M and B share these beside their sizes.
_LARGE: dict[str, Any] = {"norm_layer": MyNorm, "ds_use_norm": False}


def WaveMLP_T_dw(pretrained: bool | str | os.PathLike[str] = False, **kwargs: Any) -> WaveNet:
    """Wave-MLP-T with depthwise phases, 15,286,472 parameters: (N, 3, H, W) -> logits (N, 1000).

    Args:
        pretrained: the path of a checkpoint file, see :meth:`WaveNet.init_weights`; none comes with this package.
        kwargs: further arguments of :class:`WaveNet`.

    Raises:
        TypeError, ValueError: as :class:`WaveNet`, and for ``pretrained=True``.
    """
    return _wave_mlp(pretrained, (2, 2, 4, 2), (64, 128, 320, 512), (4, 4, 4, 4), 0.9, mode="depthwise", **kwargs)


def WaveMLP_T(pretrained: bool | str | os.PathLike[str] = False, **kwargs: Any) -> WaveNet:
    """Wave-MLP-T, 17,193,160 parameters; arguments as :func:`WaveMLP_T_dw`."""
    return _wave_mlp(pretrained, (2, 2, 4, 2), (64, 128, 320, 512), (4, 4, 4, 4), 0.9, **kwargs)


def WaveMLP_S(pretrained: bool | str | os.PathLike[str] = False, **kwargs: Any) -> WaveNet:
    """Wave-MLP-S, 30,708,040 parameters; arguments as :func:`WaveMLP_T_dw`."""
    return _wave_mlp(pretrained, (2, 3, 10, 3), (64, 128, 320, 512), (4, 4, 4, 4), 0.9, norm_layer=MyNorm, **kwargs)


def WaveMLP_M(pretrained: bool | str | os.PathLike[str] = False, **kwargs: Any) -> WaveNet:
    """Wave-MLP-M, 44,056,632 parameters; arguments as :func:`WaveMLP_T_dw`."""
    return _wave_mlp(pretrained, (3, 4, 18, 3), (64, 128, 320, 512), (8, 8, 4, 4), 0.9, **_LARGE, **kwargs)


def WaveMLP_B(pretrained: bool | str | os.PathLike[str] = False, **kwargs: Any) -> WaveNet:
    """Wave-MLP-B, 63,586,360 parameters; arguments as :func:`WaveMLP_T_dw`."""
    return _wave_mlp(pretrained, (2, 2, 18, 2), (96, 192, 384, 768), (4, 4, 4, 4), 0.875, **_LARGE, **kwargs)
