"""Runs the wavelet layers of public repositories beside the copies that ``accelerate`` has served.

``python tests/clients/public.py FOLDER [NAME ...]``: FOLDER holds a checkout of each repository under its own name. Not
a test: those checkouts are no part of this project. Every layer runs in float64 (in another dtype where its code takes
no float64) on one input: results, gradients, what is left of the input, attributes that are numbers, and state-dict
keys. The last line counts:

- served: replaced, and equal
- left: not replaced, with a reason
- silent: not replaced, without one
- wrong: something differs
- not there: the checkout or a module that it imports is missing, or the original itself raises

``--time`` times served layers and the originals on larger inputs, in turns: the ratio of the medians, the result alone
and with its gradient.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from wavemix_kernels import accelerate
from wavemix_kernels.haar_layers import HaarLayer

_DTYPES = (torch.float64, torch.float32, torch.float16)
_BOUND = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 5e-3}  # filters are rounded to float32
_ELEMENTS, _ROUNDS = 1 << 21, 7


@dataclass(frozen=True)
class Row:
    """A layer: its name, how a module makes it, its inputs as a tree of shapes, and arguments by name."""

    name: str
    make: Callable[[Any], nn.Module]
    inputs: Any
    more: tuple[tuple[str, Any], ...] = ()

    def given(self, dtype: torch.dtype, scale: int = 1) -> list[Tensor]:
        made = torch.Generator().manual_seed(0)
        shapes = [_scaled(shape, scale) for shape in _shapes(self.inputs)]
        return [torch.randn(shape, generator=made, dtype=torch.float64).to(dtype) for shape in shapes]

    def call(self, layer: nn.Module, given: list[Tensor]) -> Any:
        waiting = iter(given)
        return layer(*(_filled(entry, waiting) for entry in self.inputs), **dict(self.more))


def _is_shape(entry: Any) -> bool:
    return all(isinstance(n, int) for n in entry)


def _shapes(tree: Any) -> Iterator[tuple[int, ...]]:
    for entry in tree:
        if _is_shape(entry):
            yield entry
        else:
            yield from _shapes(entry)


def _filled(entry: Any, waiting: Iterator[Tensor]) -> Any:
    return next(waiting) if _is_shape(entry) else tuple(_filled(part, waiting) for part in entry)


def _scaled(shape: tuple[int, ...], scale: int) -> tuple[int, ...]:
    if len(shape) == 3:  # some make a matrix of the line's length squared
        return shape[0] * scale, shape[1], shape[2] * scale
    kept = 2 if len(shape) < 5 else 3
    return (*shape[:kept], *(n * scale for n in shape[kept:]))


def row(name: str, make: Callable[[Any], nn.Module], *inputs: Any, **more: Any) -> Row:
    return Row(name, make, inputs, tuple(more.items()))


IMAGE, BANDS, JOINED, HALF = (2, 5, 12, 20), (2, 5, 6, 10), (2, 20, 6, 10), (2, 12, 6, 10)
RGB = (2, 3, 12, 20)
VIDEO, CUBES = (1, 3, 5, 8, 12), (2, 5, 3, 4, 6)

#: The layers of WaveCNet's file, which others have copied.
MATRICES = (
    row("DWT_1D", lambda m: m.DWT_1D("haar"), (2, 5, 12)),
    row("IDWT_1D", lambda m: m.IDWT_1D("haar"), (2, 5, 6), (2, 5, 6)),
    row("DWT_2D", lambda m: m.DWT_2D("haar"), IMAGE),
    row("IDWT_2D", lambda m: m.IDWT_2D("haar"), BANDS, BANDS, BANDS, BANDS),
    row("DWT_2D_tiny", lambda m: m.DWT_2D_tiny("haar"), IMAGE),
    row("DWT_3D", lambda m: m.DWT_3D("haar"), (2, 5, 6, 8, 12)),
    row("IDWT_3D", lambda m: m.IDWT_3D("haar"), *[CUBES] * 8),
)
#: The same, by convolutions with filters that are no buffers.
CONVOLUTIONS = (
    row("DWT_1D", lambda m: m.DWT_1D(in_channels=5), (2, 5, 12)),
    row("IDWT_1D", lambda m: m.IDWT_1D(in_channels=5), (2, 5, 6), (2, 5, 6)),
    row("DWT_2D", lambda m: m.DWT_2D(in_channels=5), IMAGE),
    row("IDWT_2D", lambda m: m.IDWT_2D(in_channels=5), BANDS, BANDS, BANDS, BANDS),
)
VOLUME_CONVOLUTIONS = (
    row("DWT_3D", lambda m: m.DWT_3D(in_channels=5), (2, 5, 6, 8, 12)),
    row("IDWT_3D", lambda m: m.IDWT_3D(in_channels=5), *[CUBES] * 8),
)
#: MWCNN's file.
SQUARES = (row("DWT", lambda m: m.DWT(), IMAGE), row("IWT", lambda m: m.IWT(), JOINED))
BATCHED = (SQUARES[0], row("IWT", lambda m: m.IWT(), (8, 5, 6, 10)))
SQUARES_VIDEO = (*SQUARES, row("DWT3d", lambda m: m.DWT3d(), (2, 5, 3, 12, 20)))
#: Wave-ViT's file.
FILTERS = (row("DWT_2D", lambda m: m.DWT_2D("haar"), IMAGE), row("IDWT_2D", lambda m: m.IDWT_2D("haar"), JOINED))
POOLS = (
    row("WavePool", lambda m: m.WavePool(5), IMAGE),
    row("WaveUnpool", lambda m: m.WaveUnpool(5, "sum"), BANDS, BANDS, BANDS, BANDS),
)
VIDEOS = (
    row("HaarWaveletTransform3D", lambda m: m.HaarWaveletTransform3D(), VIDEO),
    row("InverseHaarWaveletTransform3D", lambda m: m.InverseHaarWaveletTransform3D(), (1, 24, 3, 4, 6)),
    row("HaarWaveletTransform2D", lambda m: m.HaarWaveletTransform2D(), VIDEO),
    row("InverseHaarWaveletTransform2D", lambda m: m.InverseHaarWaveletTransform2D(), (1, 12, 5, 4, 6)),
)


def new(name: str, *args: Any, **settings: Any) -> Callable[[Any], nn.Module]:
    def make(module: Any) -> Any:
        return getattr(module, name)(*args, **settings)

    return make


def _freia() -> Iterator[Row]:
    for settings in ({}, {"order_by_wavelet": True}, {"rebalance": 0.5}, {"order_by_wavelet": True, "rebalance": 0.7}):
        for rev in (False, True):
            words = ", ".join([*(f"{k}={v}" for k, v in settings.items()), *["rev"] * rev])
            down, up = new("HaarDownsampling", [(3, 12, 20)], **settings), new("HaarUpsampling", [HALF[1:]], **settings)
            yield row(f"HaarDownsampling({words})", down, (HALF if rev else RGB,), rev=rev)
            yield row(f"HaarUpsampling({words})", up, (RGB if rev else HALF,), rev=rev)


COSMOS = tuple(
    row(f"{name}({patch})", new(name, patch), shape)
    for patch in (2, 4)
    for name, shape in (
        ("Patcher", (2, 3, 16, 24)), ("UnPatcher", (2, 3 * patch**2, 4, 6)),
        ("Patcher3D", (1, 3, 9, 16, 24)), ("UnPatcher3D", (1, 3 * patch**3, 3, 4, 6)),
    )
)  # fmt: skip

#: (name of the checkout, owner, folder on the path, module, rows)
TABLE: tuple[tuple[str, str, str, str, tuple[Row, ...]], ...] = (
    ("WTConv", "BGU-CS-VIL", "", "wtconv.wtconv2d", (
        row("WTConv2d", lambda m: m.WTConv2d(5, 5), IMAGE),
        row("WTConv2d(3 levels)", lambda m: m.WTConv2d(5, 5, wt_levels=3), (2, 5, 24, 40)),
        row("WTConv2d(stride 2)", lambda m: m.WTConv2d(5, 5, stride=2), IMAGE),
        row("WTConv2d(odd)", lambda m: m.WTConv2d(5, 5), (2, 5, 13, 21)),
    )),
    ("Cosmos-Tokenizer", "NVIDIA", "", "cosmos_tokenizer.modules.patching", COSMOS),
    ("MWCNN_PyTorch", "lpj0", "", "model.common", SQUARES),
    ("Diffusion-Low-Light", "JianghaiSCU", "", "models.wavelet", BATCHED),
    ("DLDiff", "Yuii666", "", "utils.DWT", SQUARES[:1]),
    ("BVI-CDM", "lrr-rachel", "", "models.wavelet", BATCHED),
    ("HiNet", "TomTomTommi", "", "modules.Unet_common", SQUARES_VIDEO),
    ("MIRA", "XU001006", "", "models.modules.common", SQUARES_VIDEO),
    ("KPN_attention", "pminhtam", "", "utils.wavelet", SQUARES),
    ("KPN_attention", "pminhtam", "", "utils.wavelet_highwave", (
        row("DWT_highwave", lambda m: m.DWT_highwave(), IMAGE), row("IWT_highwave", lambda m: m.IWT_highwave(), JOINED),
    )),
    ("KPN_attention", "pminhtam", "", "utils.loss", (row("WaveletPool", lambda m: m.WaveletPool(), IMAGE),)),
    ("KPN_attention", "pminhtam", "convert", "tswt", (
        row("WaveletPool", lambda m: m.WaveletPool(), IMAGE), row("WaveletUnPool", lambda m: m.WaveletUnPool(), JOINED),
    )),
    ("stylegan2-pytorch", "rosinality", "", "swagan", (
        row("HaarTransform", lambda m: m.HaarTransform(3), RGB),
        row("InverseHaarTransform", lambda m: m.InverseHaarTransform(3), HALF),
    )),
    ("haar_pytorch", "bes-dev", "", "haar_pytorch.transform2d", (
        row("HaarForward", lambda m: m.HaarForward(), IMAGE), row("HaarInverse", lambda m: m.HaarInverse(), JOINED),
    )),
    ("Invertible-Image-Rescaling", "pkuxmq", "codes", "models.modules.Inv_arch", (
        row("HaarDownsampling", lambda m: m.HaarDownsampling(3), RGB),
        row("HaarDownsampling(rev)", lambda m: m.HaarDownsampling(3), HALF, rev=True),
    )),
    ("FrEIA", "vislearn", "", "FrEIA.modules.reshapes", tuple(_freia())),
    ("WaveCNet", "LiQiufu", "", "DWT_IDWT.DWT_IDWT_layer", MATRICES),
    ("WaveDiff", "VinAIResearch", "", "DWT_IDWT.DWT_IDWT_layer", MATRICES),
    ("WaveSNet", "LiQiufu", "", "DWT_IDWT.DWT_IDWT_layer", MATRICES),
    ("WaveSNet", "LiQiufu", "", "DWT_IDWT.DWT_IDWT_CS", CONVOLUTIONS + VOLUME_CONVOLUTIONS),
    ("3D-WaveUNet", "LiQiufu", "", "DWT_IDWT.DWT_IDWT_CS_v2", CONVOLUTIONS),
    ("FAFNet", "YinghuiXing", "", "DWT_IDWT.DWT_IDWT_layer", MATRICES[:5]),
    ("lfm", "quandao10", "", "DWT_IDWT.DWT_IDWT_layer", MATRICES[:5]),
    ("EPA-ShuffleNet", "Distant319", "", "DWT_IDWT.DWT_IDWT_layer", MATRICES[:5]),
    ("AdversarialWaveletTraining", "momo1986", "", "DWT_IDWT_layer", MATRICES[:5]),
    ("WaveFusion", "fd-qhwang", "", "DWT_IDWT.DWT_IDWT_CS_v2", CONVOLUTIONS),
    ("ImageNetModel", "YehLi", "classification", "torch_wavelets", FILTERS),
    ("WPANet", "summitgao", "", "torch_wavelets", FILTERS),
    ("Spectral-U-Net", "AnonymousAccount6688", "nnunetv2/training/network/model/waveunet", "torch_wavelets", FILTERS),
    ("WiFi-BullyDetect", "aiotgroup", "model/function", "torch_wavelets_1D", (
        row("DWT_1D", lambda m: m.DWT_1D("haar"), (2, 5, 12)), row("IDWT_1D", lambda m: m.IDWT_1D("haar"), (2, 10, 6)),
    )),
    ("WCT2", "clovaai", "", "model", (
        *POOLS, row("WaveUnpool(cat5)", lambda m: m.WaveUnpool(5, "cat5"), BANDS, BANDS, BANDS, BANDS, IMAGE),
    )),
    ("ECCV2022_WaveGAN", "kobeshegu", "", "networks.lofgan", (
        *POOLS, row("WavePool2", lambda m: m.WavePool2(5), IMAGE),
    )),
    ("HWD", "apple1986", "", "HWD", (row("Down_wt", lambda m: m.Down_wt(5, 7), IMAGE),)),
    ("wdm-3d", "pfriedri", "", "DWT_IDWT.DWT_IDWT_layer", MATRICES),
    ("LeanVAE", "westlake-repl", "", "LeanVAE.utils.patcher_utils", (
        row("Patcher", lambda m: m.Patcher(), VIDEO), row("Patcher(even)", lambda m: m.Patcher(), (1, 3, 4, 8, 12)),
        row("UnPatcher", lambda m: m.UnPatcher(), ((1, 12, 1, 4, 6), (1, 24, 2, 4, 6))),
    )),
    ("WF-VAE", "PKU-YuanGroup", "", "causalvideovae.model.modules.wavelet", VIDEOS),
    ("Open-Sora-Plan", "PKU-YuanGroup", "", "opensora.models.causalvideovae.model.modules.wavelet", VIDEOS),
)  # fmt: skip


# --- Loading them ----------------------------------------------------------------------------------------

#: Imported at the head of those files and not needed for their wavelet layers.
_UNUSED = (
    "av", "cv2", "decord", "diffusers", "huggingface_hub", "loguru", "mmcv", "mmdet", "mmseg", "nibabel", "pandas",
    "prettytable", "pytorch_lightning", "pytorch_msssim", "SimpleITK", "torchinfo", "torchvision", "transformers",
    "utils.image_3D_io",
)  # fmt: skip


class _Has(type):
    """A class with whatever attribute is asked for, that makes whatever is asked for."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock(name=name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return mock.MagicMock()


class _Blank(types.ModuleType):
    """A module with whatever class or function is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Has(name, (), {}) if name[0].isupper() else mock.MagicMock(name=name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if any(name == unused or name.startswith(f"{unused}.") for unused in _UNUSED):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        return _Blank(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


def _loaded(folder: Path, inside: str, name: str) -> Any:
    """A module of a checkout, made anew, and nothing of it in ``sys.modules`` afterwards."""
    before, path, finder = set(sys.modules), list(sys.path), _Finder()
    sys.path[:0] = [str(folder / inside), str(folder)]
    sys.meta_path.append(finder)  # asked where no module is found
    importlib.invalidate_caches()
    try:
        with mock.patch("torch.utils.cpp_extension.load"):  # ops that files compile as they are imported
            return importlib.import_module(name)
    finally:
        sys.path[:] = path
        sys.meta_path.remove(finder)
        for other in [m for m in sys.modules if m not in before]:
            where = getattr(sys.modules[other], "__file__", None) or ""
            if where.startswith(str(folder)) or isinstance(sys.modules[other], _Blank) or not where:
                sys.modules.pop(other)


# --- Running them ----------------------------------------------------------------------------------------


@dataclass
class Verdict:
    word: str
    why: str = ""
    times: tuple[float, float] | None = None


def _outcome(entry: Row, layer: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """All that a call leaves, numbers and tensors by name."""
    leaves = [x.requires_grad_() for x in entry.given(dtype)]
    given = [leaf.clone() for leaf in leaves]  # the layer may write to them
    torch.manual_seed(0)
    out = entry.call(layer, given)
    results = [r for r in tree_leaves(out) if r is not None]
    found: dict[str, Any] = {f"result {i}": r for i, r in enumerate(results)}
    found |= {f"input {i} afterwards": x for i, x in enumerate(given)}
    tensors = [r for r in results if isinstance(r, Tensor)]
    weights = [torch.randn(r.shape, generator=torch.Generator().manual_seed(1)).to(r) for r in tensors]
    wanted = leaves + [p for p in layer.parameters() if p.requires_grad]
    try:
        grads = torch.autograd.grad(tensors, wanted, weights, allow_unused=True)
        found |= {f"gradient {i}": g for i, g in enumerate(grads)}
    except (AttributeError, RuntimeError) as error:  # some backward passes are older than this PyTorch
        found["no gradient"] = type(error).__name__
    found |= {k: v for k, v in vars(layer).items() if isinstance(v, float)}
    found = {k: v.detach() if isinstance(v, Tensor) else v for k, v in found.items()}
    return found | {"keys": list(layer.state_dict())}


def _difference(theirs: dict[str, Any], ours: dict[str, Any], bound: float) -> str:
    if "no gradient" in theirs:
        ours = {k: v for k, v in ours.items() if not k.startswith("gradient")} | {"no gradient": theirs["no gradient"]}
    for name in theirs.keys() | ours.keys():
        a, b = theirs.get(name), ours.get(name)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"{name}: {tuple(a.shape)} {a.dtype}, ours {tuple(b.shape)} {b.dtype}"
            error = (a.double() - b.double()).abs().max().item() / max(a.double().abs().max().item(), 1e-30)
            if not error <= bound:
                return f"{name}: relative error {error:.1e}"
        elif isinstance(a, float) and isinstance(b, float):
            if abs(a - b) > 1e-9 * max(abs(a), 1e-3):
                return f"{name}: {a}, ours {b}"
        elif a is not b and a != b:
            return f"{name}: {a!r}, ours {b!r}"
    return ""


def _judge(entry: Row, load: Callable[[], Any], timed: bool) -> Verdict:
    raised = own = ""
    for dtype in _DTYPES:
        torch.manual_seed(0)
        theirs = entry.make(load()).to(dtype).eval()
        for p in theirs.parameters():
            if p.requires_grad:
                p.data.normal_()
        try:
            want = _outcome(entry, theirs, dtype)
        except Exception as error:  # noqa: BLE001 some layers take one dtype alone
            raised = f"the original raises {type(error).__name__}: {error}".splitlines()[0]
            continue
        report = accelerate(theirs)
        if not report.replaced:
            return Verdict("left", report.left[0].reason) if report.left else Verdict("silent")
        with _plain_noted(theirs) as plain:
            got = _outcome(entry, theirs, dtype)
        if difference := _difference(want, got, _BOUND[dtype]):
            return Verdict("wrong", difference)
        word = str(dtype).removeprefix("torch.")
        if not plain:
            return Verdict("served", f"{word}; {report.replaced[0].now}", _times(entry, load, dtype) if timed else None)
        own = own or f"replaced, but its own code ran in {word}"
    return Verdict("left", own) if own else Verdict("not there", raised)


@contextlib.contextmanager
def _plain_noted(layer: nn.Module) -> Iterator[list[str]]:
    """Notes when the forward of the class that a served layer was made of runs."""
    ran: list[str] = []
    kind: Any = type(layer).__mro__[2] if isinstance(layer, HaarLayer) else None
    if kind is None:
        yield ran
        return
    plain: Any = kind.forward

    def noted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        ran.append(kind.__name__)
        return plain(self, *args, **kwargs)

    with mock.patch.object(kind, "forward", noted):
        yield ran


def _times(entry: Row, load: Callable[[], Any], dtype: torch.dtype) -> tuple[float, float]:
    theirs, ours = entry.make(load()), entry.make(load())  # two modules: accelerate may change what layers share
    try:
        entry.call(theirs, entry.given(torch.float32))
        dtype = torch.float32
    except Exception:  # noqa: BLE001 it takes another dtype alone
        theirs = theirs.to(dtype)
    accelerate(ours.to(dtype))
    scale = 1
    while sum(x.numel() for x in entry.given(dtype, 2 * scale)) <= _ELEMENTS:
        scale *= 2
    given, sides, ratios = entry.given(dtype, scale), (theirs, ours), []

    def run(layer: nn.Module, gradient: bool) -> float:
        leaves = [x.clone().requires_grad_(gradient) for x in given]
        inputs = [x.clone() for x in leaves]
        start = time.perf_counter()
        out = [t for t in tree_leaves(entry.call(layer, inputs)) if isinstance(t, Tensor)]
        if gradient:
            with contextlib.suppress(AttributeError):
                torch.autograd.backward(out, [torch.ones_like(t) for t in out])
        return time.perf_counter() - start

    for gradient in (False, True):
        taken = [[run(layer, gradient) for layer in sides] for _ in range(_ROUNDS + 2)][2:]
        ratios.append(statistics.median(a for a, _ in taken) / statistics.median(b for _, b in taken))
    return ratios[0], ratios[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="of checkouts; default: all")
    parser.add_argument("--time", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    if not torch.cuda.is_available():  # some layers move to the GPU what they make
        Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]  # no GPU here
    count: dict[str, int] = {}
    for name, owner, inside, path, rows in TABLE:
        if args.names and name not in args.names:
            continue
        load = functools.partial(_loaded, (args.folder / name).resolve(), inside, path)
        for entry in rows:
            try:
                verdict = _judge(entry, load, args.time)
            except Exception as error:  # noqa: BLE001 what strangers' files raise as they are imported
                verdict = Verdict("not there", f"{type(error).__name__}: {error}".splitlines()[0])
            count[verdict.word] = count.get(verdict.word, 0) + 1
            times = "  {:6.1f} {:6.1f}".format(*verdict.times) if verdict.times else ""
            where = f"{owner}/{name} {path.rpartition('.')[2]}"
            print(f"{where:56} {entry.name:34} {verdict.word:9}{times}  {verdict.why}", flush=True)
    print("; ".join(f"{n} {word}" for word, n in count.items()), f"of {sum(count.values())}")


if __name__ == "__main__":
    main()
