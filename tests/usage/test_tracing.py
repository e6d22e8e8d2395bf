"""Tracing: torch.fx and the feature extractors on it, ONNX, and modules made inside a compiled function."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wavemix_kernels as wk
from wavemix_kernels import reference, wavemlp
from wavemix_kernels.nn.wavemix.expansion import FusedExpansion
from wavemix_kernels.nn.wavemlp import reference as wavemlp_reference
from wavemix_kernels.ops.deconv import deconv
from wavemix_kernels.ops.haar import haar_pyramid
from wavemix_kernels.ops.haar.bands import haar_bands, haar_from_bands
from wavemix_kernels.ops.mlp import pointwise_mlp
from wavemix_kernels.ops.patm import phase_aggregate
from wavemix_kernels.ops.reduce_haar import reduce_haar
from wavemix_kernels.pytorch_wavelets import DWTForward, DWTInverse
from wavemix_kernels.wavemix import SemSegment, classification, sisr

_BLOCK = {"depth": 1, "final_dim": 8, "ff_channel": 8, "level": 1}
_SIZES: dict[str, Any] = {"layers": [1, 1], "embed_dims": [8, 8], "mlp_ratios": [2, 2]}
_PLAIN: dict[str, Any] = {"block": wavemlp_reference.WaveBlock, "token_mixer": wavemlp_reference.PATM}


def models() -> dict[str, nn.Module]:
    plain = {"block": reference.Waveblock}
    return {
        "classification": classification.WaveMix(num_classes=3, patch_size=2, **_BLOCK),
        "sisr": sisr.WaveMix(**_BLOCK),
        "SemSegment": SemSegment.WaveMix(num_classes=3, **_BLOCK),
        "WaveNet": wavemlp.WaveNet(**_SIZES, num_classes=3),
        "WaveNet fork_feat": wavemlp.WaveNet(**_SIZES, fork_feat=True),
        "reference classification": classification.WaveMix(num_classes=3, patch_size=2, **_BLOCK, **plain),
        "reference SemSegment": SemSegment.WaveMix(num_classes=3, **_BLOCK, **plain),
        "reference WaveNet": wavemlp.WaveNet(**_SIZES, num_classes=3, **_PLAIN),
    }


class Restoration(nn.Module):
    """A network of somebody else that works on bands."""

    def __init__(self, wave: str) -> None:
        super().__init__()
        self.dwt, self.idwt = DWTForward(2, wave, "symmetric"), DWTInverse(wave, "symmetric")
        self.mix = nn.Conv2d(9, 9, 1)

    def forward(self, x: Tensor) -> Tensor:
        low, (fine, coarse) = self.dwt(x)
        return self.idwt((low, [self.mix(fine.flatten(1, 2)).unflatten(1, (3, 3)), coarse]))


def traceable() -> dict[str, nn.Module]:
    others = {
        "Haar": Restoration("haar"),
        "db2": Restoration("db2"),
        "PATM": nn.Sequential(nn.Conv2d(3, 8, 1), wk.FusedPATM(8), wavemlp.Mlp(8, 16)),
        "head": nn.Sequential(nn.Conv2d(3, 8, 1), FusedExpansion(8, 1, 3)),
        "DWTForward": DWTForward(2),
        "DWTForward db2": DWTForward(1, "db2"),
    }
    forms = {name: m for name, m in models().items() if not name.startswith("reference")}
    return {
        **models(), **others,
        **{f"export_form {name}": wk.export_form(m.eval()) for name, m in forms.items()},
        **{f"inference {name}": wk.fuse_for_inference(m.eval()) for name, m in forms.items()},
    }  # fmt: skip


def assert_equal(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", traceable())
def test_symbolic_trace(name):
    """torch.fx on any model, for a pass of one's own or quantisation: a Proxy was refused with a TypeError."""
    model = traceable()[name].eval()
    traced = torch.fx.symbolic_trace(model)
    for size in (32, 48):
        x = torch.randn(2, 3, size, size)
        assert_equal(traced(x), model(x))
    x = x.contiguous(memory_format=torch.channels_last)
    got, want = traced(x), model(x)
    assert_equal(got, want)
    if isinstance(got, Tensor):
        assert got.stride() == want.stride()
    assert_equal(copy.deepcopy(traced)(x), want)
    assert_equal(pickle.loads(pickle.dumps(traced))(x), want)


@pytest.mark.parametrize("name", models())
def test_a_traced_model_trains(name):
    """The graph is of the model's own blocks: gradients and running statistics are those of the model."""
    model = models()[name].double().train()
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    twin = copy.deepcopy(model)
    traced, x = torch.fx.symbolic_trace(twin), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for run in (traced, model):
        out = run(x)
        sum(t.pow(2).sum() for t in (out if isinstance(out, list) else [out])).backward()
    for (key, got), want in zip(twin.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-6, atol=1e-8, msg=key)
    for (key, got), want in zip(twin.named_buffers(), model.buffers(), strict=True):
        assert_equal(got, want)
        assert key in dict(traced.named_buffers())


@pytest.mark.parametrize("call", {
    "haar_dwt2d": lambda x: wk.haar_dwt2d(x, 2, mode="reflect")[1][0],
    "haar_idwt2d": lambda x: wk.haar_idwt2d(x[:, :1], [x.unsqueeze(1)], add=None),
    "haar_pyramid": lambda x: haar_pyramid(x, 2)[1],
    "haar_bands": lambda x: haar_from_bands(haar_bands(x)),
    "reduce_haar": lambda x: reduce_haar(x, torch.ones(2, 3, 1, 1), None, 1)[0],
    "pointwise_mlp": lambda x: pointwise_mlp(x, torch.ones(4, 3), None, torch.ones(2, 4), None),
    "deconv": lambda x: deconv(x, torch.ones(3, 2, 4, 4)),
    "phase_aggregate": lambda x: phase_aggregate(
        x, x, x, x, x, *(torch.ones(3) for _ in range(4)), torch.ones(3, 2, 1, 7), torch.ones(3, 2, 7, 1)
    )[2],
}.items(), ids=lambda item: item[0])  # fmt: skip
def test_functions_are_nodes(call):
    """A model of somebody else that calls an operator in its forward; the backend it was traced under is kept."""
    function = call[1]

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    x = torch.randn(2, 3, 16, 16)
    with wk.backend("reference"):
        traced = torch.fx.symbolic_trace(Model())
    assert_equal(traced(x), function(x))
    nodes = [n for n in traced.graph.nodes if n.op == "call_function" and "wavemix" in str(n.target.__module__)]
    assert nodes
    assert all(n.kwargs["backend"] == "reference" for n in nodes)


@pytest.mark.parametrize("make", [
    lambda: wk.FusedWaveblock(final_dim=8).eval().fuse_for_inference(), lambda: wavemlp.WaveBlock(8),
])  # fmt: skip
def test_one_block_alone_is_told_what_works(make):
    """symbolic_trace of a single fused block, which would be the one node of its own graph."""
    with pytest.raises(TypeError, match=r"trace a module that holds it: nn.Sequential\(block\)"):
        torch.fx.symbolic_trace(make())
    torch.fx.symbolic_trace(nn.Sequential(make()))


def test_single_blocks_of_layers_are_traced_into():
    """A fused block that is made of layers gives these as the graph."""
    for block in (
        wk.FusedWaveblock(final_dim=8),
        wk.FusedPATM(8),
        wavemlp.Mlp(8),
        FusedExpansion(8, 1, 3),
    ):
        x = torch.randn(2, 8, 8, 8)
        assert_equal(torch.fx.symbolic_trace(block.eval())(x), block(x))


@pytest.mark.parametrize("library", ["torchvision.models.feature_extraction", "timm.models"])
def test_feature_extraction(library):
    """create_feature_extractor by the names of a model's blocks, for a detection head."""
    tools = pytest.importorskip(library)
    x = torch.randn(2, 3, 32, 32)
    for name, node in (("classification", "layers.0"), ("WaveNet", "network.2.0"), ("Haar", "mix")):
        model, seen = traceable()[name].eval(), []
        extractor = tools.create_feature_extractor(model, {node: "block"})
        handle = model.get_submodule(node).register_forward_hook(lambda _m, _x, out, seen=seen: seen.append(out))
        model(x)
        handle.remove()
        assert_equal(extractor(x)["block"], seen[0])


# --- ONNX -------------------------------------------------------------------------------------------------


ONNX = [
    *("classification", "WaveNet fork_feat", "Haar"),
    *(pytest.param(name, marks=pytest.mark.prove) for name in ("sisr", "SemSegment", "db2", "inference WaveNet")),
]


@pytest.mark.parametrize("name", ONNX)
def test_direct_onnx_export(name):
    """torch.onnx.export(model, dynamo=True) of the model itself, without export_form."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x = traceable()[name].eval(), torch.rand(2, 3, 32, 32)
    file = io.BytesIO()
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    program.save(file)
    session = runtime.InferenceSession(file.getvalue())
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    want = model(x)
    for g, w in zip(got, want if isinstance(want, list) else [want], strict=True):
        assert_equal(torch.from_numpy(g), w.detach())
    assert {node.domain for node in program.model.graph} <= {""}


# --- torch.compile ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wave", ["haar", "db1", ((0.5, 0.5), (0.5, -0.5)), "db2"])
def test_transform_made_inside_a_compiled_forward(wave):
    """Neural operators make a DWTForward in their forward, for the size that comes: compiled as one graph."""

    def operator(x: Tensor) -> Tensor:
        dwt, idwt = DWTForward(J=2, wave=wave, mode="symmetric"), DWTInverse(wave=wave, mode="symmetric")
        low, highs = dwt(x)
        return idwt((low * 2, highs))

    x = torch.randn(2, 3, 16, 16)
    torch._dynamo.reset()
    assert_equal(torch.compile(operator, fullgraph=True, backend="aot_eager")(x), operator(x))
