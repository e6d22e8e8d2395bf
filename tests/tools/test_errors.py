"""Bad input to every public function: the error's type, and that it names the argument, the value and what works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import wavemix_kernels as wk
from tests.models.subjects import TINY, changed
from tests.tools.helpers import python
from wavemix_kernels import backends, reference
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.haar import op as haar
from wavemix_kernels.ops.haar.pyramid import haar_pyramid
from wavemix_kernels.ops.mlp.op import pointwise_mlp
from wavemix_kernels.ops.reduce_haar.op import reduce_haar
from wavemix_kernels.reference import Waveblock
from wavemix_kernels.wavemix import Level1Waveblock, Level2Waveblock, SemSegment, sisr
from wavemix_kernels.wavemix.classification import WaveMix
from wavemix_kernels.wavemlp import PATM, Mlp, WaveBlock, WaveMLP_T, WaveNet

SMALL = {"depth": 2, "mult": 2, "ff_channel": 8, "final_dim": 8}
STRIDED = SMALL | {"initial_conv": "strided"}
X = torch.zeros(2, 8, 8, 12)
W = torch.zeros(2, 8, 1, 1)
LL, HIGHS = wk.haar_dwt2d(X, 2)


def given(module: nn.Module, *shape: int) -> Any:
    return module(torch.zeros(shape))


def hooked(module: Any, part: str) -> Any:
    module.get_submodule(part).register_forward_hook(lambda *_: None)
    return module


def untracked(module: Any, norm: str) -> Any:
    return changed(module, norm, running_mean=None, running_var=None, track_running_stats=False)


# (what is called, the exception, what the message must say)
CASES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    # haar_dwt2d
    (lambda: wk.haar_dwt2d([1.0]), TypeError, r"x: expected a tensor \(N, C, H, W\), got \[1.0\] \(list\)"),
    (lambda: wk.haar_dwt2d(X[0]), ValueError, r"x: expected 4 dimensions \(N, C, H, W\), got shape \(8, 8, 12\)"),
    (lambda: wk.haar_dwt2d(X.int()), TypeError, r"x: expected float64.*got int32\(2, 8, 8, 12\).*\.float\(\)"),
    (lambda: wk.haar_dwt2d(X.to(torch.complex64)), TypeError, r"x: .*got complex64"),
    (lambda: wk.haar_dwt2d(X.bool()), TypeError, r"x: .*got bool"),
    (lambda: wk.haar_dwt2d(X.to_sparse()), TypeError, r"x: expected a dense tensor, got layout torch.sparse_coo"),
    (lambda: wk.haar_dwt2d(X[..., :0]), ValueError, r"x: expected at least one row and column, got shape \(2, 8, 8, 0\)"),
    (lambda: wk.haar_dwt2d(X, 0), ValueError, r"levels: expected a positive int, got 0"),
    (lambda: wk.haar_dwt2d(X, 1.5), TypeError, r"levels: expected a positive int, got 1.5 \(float\)"),
    (lambda: wk.haar_dwt2d(X, True), TypeError, r"levels: .*got True \(bool\)"),
    (lambda: wk.haar_dwt2d(X, mode="mirror"), ValueError, r"mode='mirror': expected one of 'zero', 'constant'"),
    (lambda: wk.haar_dwt2d(X, backend="gpu"), ValueError, r"backend='gpu': expected one of 'auto', 'cuda'"),
    (lambda: wk.haar_dwt2d(X[:, :, :2], 2, mode="reflect"), ValueError, r"mode='reflect': level 2 meets a single sample"),
    # haar_idwt2d
    (lambda: wk.haar_idwt2d(LL, HIGHS[0]), TypeError, r"highs: expected a list with one tensor"),
    (lambda: wk.haar_idwt2d(LL, []), TypeError, r"highs: expected a list with one tensor .* got \[\] \(list\)"),
    (lambda: wk.haar_idwt2d(LL, HIGHS[::-1]), ValueError, r"highs\[1\]: expected 1x2, half of highs\[0\]'s 2x3.*finest first"),
    (lambda: wk.haar_idwt2d(LL[:1], HIGHS), ValueError, r"highs\[0\]: expected shape \(1, 8, 3, h, w\)"),
    (lambda: wk.haar_idwt2d(X, HIGHS), ValueError, r"ll: expected the coarsest level's 2x3, got 8x12"),
    (lambda: wk.haar_idwt2d(LL.double(), HIGHS), TypeError, r"highs\[0\]: expected the dtype of ll, torch.float64, got torch.float32"),
    (lambda: wk.haar_idwt2d(LL.to("meta"), HIGHS), ValueError, r"highs\[0\]: expected on the device of ll, meta, got cpu"),
    (lambda: wk.haar_idwt2d(LL, HIGHS, size=(9, 12)), ValueError, r"size: expected 7 or 8 rows and 11 or 12 columns.*got 9x12"),
    (lambda: wk.haar_idwt2d(LL, HIGHS, size=8), TypeError, r"size: expected \(H, W\), got 8 \(int\)"),
    (lambda: wk.haar_idwt2d(LL, HIGHS, add=X[:, :4]), ValueError, r"add: expected shape \(2, 8, 8, 12\), got \(2, 4, 8, 12\)"),
    (lambda: wk.haar_idwt2d(LL, HIGHS, add=X[..., :4]), ValueError, r"size of add: .*got 8x4"),
    # backends
    (lambda: wk.backend("fastest"), ValueError, r"backend='fastest': expected one of 'auto'"),
    # haar_pyramid, reduce_haar
    (lambda: haar_pyramid(X, 3), ValueError, r"x: W=12: expected a multiple of 8; the nearest that work: 8 or 16"),
    (lambda: haar_pyramid(X, 6), ValueError, r"levels=6: expected 1 to 5"),
    (lambda: reduce_haar(X, W, levels=3), ValueError, r"x: W=12: expected a multiple of 8"),
    (lambda: reduce_haar(X, W[:, :4]), ValueError, r"weight: expected shape \(O, 8, 1, 1\) to go with x, got \(2, 4, 1, 1\)"),
    (lambda: reduce_haar(X, W, torch.zeros(3)), ValueError, r"bias: expected shape \(2,\), got \(3,\)"),
    (lambda: reduce_haar(X, W.double()), TypeError, r"weight: expected the dtype of x, torch.float32, got torch.float64"),
    (lambda: reduce_haar(X, W.to("meta")), ValueError, r"weight: expected on the device of x, cpu, got meta"),
    # pointwise_mlp
    (lambda: pointwise_mlp(X, W[0], None, W, None), ValueError, r"w1: expected shape \(8, 8\).*got \(8, 1, 1\)"),
    (lambda: pointwise_mlp(X, W[:, :, 0, 0], None, W[:, :, 0, 0], None), ValueError, r"w2: expected shape \(2, 2\).*got \(2, 8\)"),
    (lambda: pointwise_mlp(X, W[:, :, 0, 0], None, W[:, :2, 0, 0], None, dropout=1.5), ValueError, r"dropout=1.5: expected a probability"),
    (lambda: pointwise_mlp(X, W[:, :, 0, 0], None, W[:, :2, 0, 0], None, scale=X), ValueError, r"scale and shift belong to second"),
    (lambda: pointwise_mlp(X, W[:, :, 0, 0], None, W[:, :2, 0, 0], None, second=X[:1]), ValueError, r"second: expected \(N, B, H, W\)"),
    # modules
    (lambda: wk.FusedWaveblock(level=5), ValueError, r"level=5: expected 1, 2, 3 or 4"),
    (lambda: wk.FusedWaveblock(final_dim=30), ValueError, r"final_dim=30: expected a multiple of 4; the nearest that work: 28 or 32"),
    (lambda: wk.FusedWaveblock(final_dim="64"), TypeError, r"final_dim: expected a positive int, got '64' \(str\)"),
    (lambda: wk.FusedWaveblock(mult=0), ValueError, r"mult: expected a positive int, got 0"),
    (lambda: wk.FusedWaveblock(dropout=2), ValueError, r"dropout=2: expected a probability from 0 to 1"),
    (lambda: wk.FusedWaveblock(dropout="half"), TypeError, r"dropout: expected a probability from 0 to 1, got 'half'"),
    (lambda: wk.FusedWaveblock(upsample="cubic"), ValueError, r"upsample='cubic': expected one of 'deconv'"),
    (lambda: wk.FusedWaveblock(recompute="some"), ValueError, r"recompute='some': expected one of 'auto', 'hidden', 'mlp', 'all'"),
    (lambda: wk.FusedWaveblock(level=3, final_dim=8)(X), ValueError, r"x: W=12: expected a multiple of 8; the nearest that work: 8 or 16"),
    (lambda: Waveblock(level=2, final_dim=8)(X[..., :6]), ValueError, r"x: W=6: expected a multiple of 4"),
    (lambda: Level2Waveblock(final_dim=16)(X), ValueError, r"x: expected 16 channels \(final_dim\), got shape \(2, 8"),
    (lambda: Level2Waveblock(final_dim=8)(X.long()), TypeError, r"x: expected float64.*got int64"),
    (lambda: Level2Waveblock(final_dim=8)(X.double()), TypeError, r"x: expected the dtype of the block's weights, torch.float32"),
    (lambda: wk.FusedWaveblock(level=2.0), ValueError, r"level=2.0"),
    (lambda: wk.FusedWaveblock(upsample="pixelshuffle", ff_channel=6), ValueError, r"ff_channel=6"),
    (lambda: given(wk.FusedWaveblock(level=3, final_dim=8), 1, 8, 28, 32), ValueError, r"H=28.*24 or 32"),
    (lambda: given(wk.FusedWaveblock(final_dim=8), 8, 32, 32), ValueError, r"4 dimensions"),
    # WaveMix
    (lambda: given(WaveMix(**SMALL), 1, 3, 224, 250), ValueError, r"W=250 arrives at layers.0 as 62.* 227 or 256"),
    (lambda: given(WaveMix(**SMALL), 1, 3, 20, 64), ValueError, r"H=20 arrives at layers.0 as 5.* work: 32"),
    (lambda: given(WaveMix(**SMALL), 1, 3, 2, 64), ValueError, r"H=2 arrives at layers.0 as 0.* work: 32"),
    (lambda: given(WaveMix(**STRIDED, level=1), 1, 3, 33, 32), ValueError, r"H=33 arrives at layers.0 as 9.* 32 or 37"),
    (lambda: given(SemSegment.WaveMix(**SMALL), 1, 3, 72, 64), ValueError, r"H=72 arrives at layers.0 as 18.* 64 or 125"),
    (lambda: given(sisr.WaveMix(**SMALL), 1, 3, 9, 8), ValueError, r"H=9 arrives at layers.0 as 9.* 8 or 10"),
    (lambda: given(sisr.WaveMix(**SMALL), 1, 1, 8, 8), ValueError, r"3 channels"),
    (lambda: given(sisr.WaveMix(**SMALL), 3, 8, 8), ValueError, r"4 dimensions"),
    (lambda: WaveMix(**SMALL, level=5), ValueError, r"level=5: expected 1, 2, 3 or 4"),
    (lambda: WaveMix(**SMALL, initial_conv="patch"), ValueError, r"initial_conv='patch': expected one of 'pachify', 'patchify', 'strided'"),
    (lambda: WaveMix(**SMALL | {"final_dim": 10}), ValueError, r"final_dim=10"),
    (lambda: WaveMix(**SMALL | {"depth": 0}), ValueError, r"depth"),
    (lambda: WaveMix(**SMALL, num_classes=0), ValueError, r"num_classes"),
    (lambda: WaveMix(**SMALL, patch_size=0), ValueError, r"patch_size"),
    (lambda: WaveMix(**STRIDED, stride=0), ValueError, r"stride"),
    (lambda: WaveMix(**SMALL, pretrained="imagenet_99"), ValueError, r"pretrained='imagenet_99': expected one of 'imagenet_75.06'"),
    (lambda: WaveMix(**SMALL, pretrained="imagenet_70.66"), ValueError, r"pretrained='imagenet_70.66': these weights are of WaveMix\(level=1\)"),
    # Wave-MLP
    *((lambda dim=dim: PATM(dim), ValueError, f"dim={dim}: expected at least 4") for dim in (1, 2, 3)),
    (lambda: PATM(8, mode="conv"), ValueError, r"mode='conv': expected one of 'fc', 'depthwise'"),
    (lambda: PATM(8, recompute="some"), ValueError, r"recompute='some': expected one of 'amplitudes', 'all'"),
    (lambda: WaveBlock(8, recompute="none"), ValueError, r"recompute='none': expected one of 'amplitudes', 'all'"),
    (lambda: given(PATM(8), 1, 4, 5, 5), ValueError, r"x: expected 8 channels \(dim\), got shape \(1, 4, 5, 5\)"),
    (lambda: PATM(8)(X.long()), TypeError, r"x: expected float64, float32, float16 or bfloat16"),
    (lambda: given(PATM(8), 1, 8, 1, 1), ValueError, r"expected more than one value per channel in training"),
    (lambda: PATM(8)(X.double()), TypeError, r"x: expected the dtype of the weights, torch\.float32, got torch\.float64"),
    (lambda: WaveBlock(8)(X.double()), TypeError, r"x: expected the dtype of the weights, torch\.float32, got torch\.float64"),
    (lambda: given(Mlp(4, 6), 1, 5, 3, 3), ValueError, r"x: expected 4 channels \(in_features\), got shape \(1, 5, 3, 3\)"),
    (lambda: given(WaveNet(**TINY), 1, 3, 2, 8), ValueError, r"x: H=2 has no room .* expected at least 3"),
    (lambda: given(WaveNet(**TINY), 1, 3, 8, 1), ValueError, r"x: W=1 has no room .* expected at least 3"),
    (lambda: given(WaveNet(**TINY, in_chans=1), 1, 3, 16, 16), ValueError, r"x: expected 1 channels \(in_chans\), got shape \(1, 3, 16, 16\)"),
    (lambda: WaveNet(**TINY | {"embed_dims": [4, 8]}), ValueError, r"embed_dims=\[4, 8\]: expected one for each of the 4 stages"),
    (lambda: WaveNet(**TINY | {"mlp_ratios": None}), ValueError, r"mlp_ratios=None: expected one for each of the 4 stages"),
    (lambda: WaveNet(**TINY, transitions=[True]), ValueError, r"transitions=\[True\]: expected one for each of the 4 stages"),
    (lambda: WaveNet(**TINY, transitions=[False] * 4), ValueError, r"patch_size=1: expected 2"),
    (lambda: WaveNet(**TINY, drop_path_rate=1.5), ValueError, r"drop_path_rate=1.5: expected a probability"),
    (lambda: WaveNet(**TINY, num_classes=-2), ValueError, r"num_classes: expected a positive int, got -2"),
    (lambda: WaveNet(**TINY, mode="dw"), ValueError, r"mode='dw': expected one of"),
    (lambda: WaveNet(**TINY).reset_classifier(5, global_pool="max"), ValueError, r"global_pool='max': expected one of '', 'avg'"),
    (lambda: WaveNet(**TINY).reset_classifier(-1), ValueError, r"num_classes: expected a positive int, got -1"),
    (lambda: WaveNet(**TINY, fork_feat=True).get_classifier(), ValueError, r"get_classifier\(\): a model with fork_feat=True has no classifier"),
    (lambda: WaveNet(**TINY, fork_feat=True).reset_classifier(5), ValueError, r"reset_classifier\(5\): a model with fork_feat=True has no classifier"),
    (lambda: WaveMLP_T(pretrained=True), ValueError, r"pretrained=True: .* expected the path"),
    # accelerate, fuse_for_inference, export_form
    *((lambda of=of: wk.accelerate(of), TypeError, r"model: expected a torch\.nn\.Module") for of in (None, X, [nn.Linear(1, 1)])),
    (lambda: hooked(WaveBlock(8), "mlp.fc1").fuse_for_inference(), ValueError, r"mlp: fc1 has hooks"),
    (lambda: WaveBlock(8, token_mixer=reference.PATM).fuse_for_inference(), ValueError, r"attn is a PATM, expected FusedPATM"),
    (lambda: untracked(WaveBlock(8), "attn.theta_h_conv.1").fuse_for_inference(), ValueError, r"theta_h_conv\.1: track_running_stats=False"),
    (lambda: hooked(WaveNet(**TINY), "network.2.1.attn.fc_h").fuse_for_inference(), ValueError, r"network\.2\.1: fuse_for_inference: fc_h has hooks"),
    (lambda: untracked(Level1Waveblock(final_dim=8), "feedforward.5").fuse_for_inference(), ValueError, r"feedforward\.5: track_running_stats=False"),
    (lambda: hooked(Level1Waveblock(final_dim=8), "feedforward.0").fuse_for_inference(), ValueError, r"hooks"),
    (lambda: wk.fuse_for_inference(nn.Sequential(untracked(Level1Waveblock(), "feedforward.5"))), ValueError, r"0: feedforward\.5"),
    (lambda: wk.fuse_for_inference(nn.Linear(2, 2)), ValueError, r"accelerate"),
    (lambda: wk.fuse_for_inference(nn.functional.relu), TypeError, r"expected a torch"),
    (lambda: given(Level1Waveblock(final_dim=8).fuse_for_inference(), 1, 4, 8, 8), ValueError, r"final_dim"),
    (lambda: wk.export_form(3), TypeError, r"model: expected a torch.nn.Module, got int"),
    (lambda: wk.export_form(hooked(sisr.WaveMix(**SMALL), "layers.1.reduction")), ValueError, r"layers\.1: fuse_for_inference: reduction has hooks"),
    (lambda: wk.export_form(changed(nn.Linear(2, 2), forward=lambda x: x)), ValueError, r"the forward of this Linear is overridden on the instance"),
]  # fmt: skip


@pytest.mark.parametrize("call, kind, message", CASES, ids=range(len(CASES)))
def test_error_names_argument_value_and_remedy(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        call()
    assert type(caught.value) is kind


@pytest.mark.parametrize("call, named", [
    (lambda: PATM(8, qk_scale=0.5), "qk_scale=0.5"),
    (lambda: PATM(8, attn_drop=0.1), "attn_drop=0.1"),
    (lambda: WaveNet(**TINY, drop_rate=0.1), "drop_rate=0.1"),
    (lambda: WaveNet(**TINY, attn_drop_rate=0.1), "attn_drop=0.1"),
    (lambda: WaveNet(**TINY, patch_size=16), "patch_size=16"),
])  # fmt: skip
def test_arguments_without_effect_warn(call: Callable[[], nn.Module], named: str) -> None:
    with pytest.warns(UserWarning, match=f"{named}.* has no effect"):
        call()


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_backend_that_cannot_serve_says_why(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = rf"haar_dwt2d: backend='{name}' (is not available|cannot serve this call): \w+"
    with pytest.raises((RuntimeError, ValueError), match=message):
        wk.haar_dwt2d(X, backend=name)


def test_cpu_backend_on_another_device_says_what_it_got() -> None:
    meta = X.to("meta")
    wanted = r"backend='cpu' cannot serve this call: it takes CPU tensors, got float32\(2, 8, 8, 12\) on meta"
    with pytest.raises(ValueError, match=wanted):
        choose.select("haar_dwt2d", haar.BACKENDS, "cpu", meta)
    assert choose.select("haar_dwt2d", haar.BACKENDS, "auto", meta) is haar.BACKENDS["reference"]


@pytest.mark.parametrize("arch, runs, runs_not", [
    ("80", [(8, 0), (8, 9), (9, 0), (12, 0)], [(7, 5)]),
    ("86-real", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
    ("90-virtual", [(9, 0), (12, 0)], [(8, 9)]),
    ("90a", [(9, 0)], [(10, 0), (8, 0)]),
    ("100f", [(10, 0), (10, 3)], [(12, 0), (9, 0)]),
    ("120-real", [(12, 0), (12, 1)], [(10, 0)]),
])  # fmt: skip
def test_which_devices_a_build_serves(arch: str, runs: list[tuple[int, int]], runs_not: list[tuple[int, int]]) -> None:
    assert [device for device in (*runs, *runs_not) if backends.runs_on(arch, device)] == runs


def test_an_unknown_backend_in_the_environment_fails_at_import() -> None:
    run = python("-c", "import wavemix_kernels", WAVEMIX_KERNELS_BACKEND="gpu")
    assert run.returncode != 0
    assert "WAVEMIX_KERNELS_BACKEND='gpu': expected one of 'auto'" in run.stderr


def test_backend_nests_decorates_and_survives_exceptions() -> None:
    @wk.backend("reference")
    def inside() -> str:
        return backends.requested()

    assert backends.requested() == "auto"
    assert inside() == "reference"
    with wk.backend("cpu"):
        assert inside() == "reference"
        with pytest.raises(KeyError), wk.backend("triton"):
            raise KeyError
        assert backends.requested() == "cpu"
    assert backends.requested() == "auto"
