"""Copies of a module in every state: pickle, deepcopy, torch.save, safetensors, spawned workers."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing import spawn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

import wavemix_kernels as wk
from tests.usage.test_tracing import Restoration, models
from wavemix_kernels import wavemlp
from wavemix_kernels.nn.wavemix.expansion import FusedExpansion


def modules() -> dict[str, nn.Module]:
    """Each takes images of three channels."""
    blocks = {
        **{f"FusedWaveblock {u}": wk.FusedWaveblock(level=2, final_dim=8, ff_channel=8, upsample=u)
           for u in ("deconv", "bilinear", "pixelshuffle")},
        "FusedPATM": wk.FusedPATM(8),
        "FusedPATM depthwise": wk.FusedPATM(8, mode="depthwise"),
        "FusedWaveBlock": wavemlp.WaveBlock(8, norm_layer=wavemlp.MyNorm),
        "FusedMlp": wavemlp.Mlp(8, 16),
        "FusedExpansion": FusedExpansion(8, 1, 3),
    }  # fmt: skip
    wide = {name: nn.Sequential(nn.Conv2d(3, 8, 1), block) for name, block in blocks.items()}
    return wide | models() | {"Haar": Restoration("haar"), "db2": Restoration("db2")}


def outputs(module: nn.Module, x: Tensor) -> list[Tensor]:
    out = module(x)
    return out if isinstance(out, list) else [out]


def trained(m: nn.Module) -> nn.Module:
    optimizer = torch.optim.AdamW(m.parameters())
    sum(t.pow(2).sum() for t in outputs(m.train(), torch.randn(2, 3, 32, 32))).backward()
    optimizer.step()
    return m


def pruned(m: nn.Module) -> nn.Module:
    for layer in list(m.modules()):
        if type(layer) is nn.Conv2d:
            prune.l1_unstructured(layer, "weight", 0.5)
    outputs(m, torch.randn(2, 3, 32, 32))
    for layer in list(m.modules()):
        if type(layer) is nn.Conv2d:
            prune.remove(layer, "weight")  # before that torch itself copies no pruned layer
    return m


def assigned(m: nn.Module) -> nn.Module:
    empty = copy.deepcopy(m).to("meta")
    empty.load_state_dict(m.state_dict(), assign=True)
    return empty


def inference(m: nn.Module) -> nn.Module:
    try:
        return wk.fuse_for_inference(m)
    except ValueError as error:
        pytest.skip(str(error))


def averaged(old: Tensor, new: Tensor, _count: Tensor) -> Tensor:
    return old.lerp(new, 0.1)  # torch's own get_ema_avg_fn is a closure, which pickle refuses


STATES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fresh": lambda m: m,
    "trained": trained,
    "half": lambda m: m.half(),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "accelerated": lambda m: wk.accelerate(m).model,
    "pruned": pruned,
    "assigned": assigned,
    "SWA": AveragedModel,
    "EMA": lambda m: AveragedModel(m, avg_fn=averaged, use_buffers=True),
    "inference": inference,
    "inference of channels_last": lambda m: inference(m.to(memory_format=torch.channels_last)),
    "export_form": wk.export_form,
    "half export_form": lambda m: wk.export_form(m).half(),
}


def made(name: str, state: str) -> tuple[nn.Module, Tensor]:
    x = torch.randn(2, 3, 32, 32)
    return STATES[state](modules()[name]).eval(), x.half() if "half" in state else x


def saved(m: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def covered(states):
    """Every module in every state: a quarter of the pairs, in which each of both occurs, by `make test`."""
    return [
        pytest.param(name, state, marks=[] if (i + j) % 4 == 0 else pytest.mark.prove)
        for i, name in enumerate(modules()) for j, state in enumerate(states)
    ]  # fmt: skip


@pytest.mark.parametrize("name, state", covered(STATES))
def test_copies_compute_the_same(name, state):
    """A model goes through pickle, deepcopy and torch.save: a checkpoint, a remote worker, an EMA copy."""
    module, x = made(name, state)
    want = outputs(module, x)
    for copied in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module), saved(module)):
        assert type(copied).__name__ == type(module).__name__
        assert list(copied.state_dict()) == list(module.state_dict())
        for g, w in zip(outputs(copied, x), want, strict=True):
            assert torch.equal(g, w)


@pytest.mark.parametrize("name", models())
def test_copies_of_an_export_form_stay_one(name):
    """An export_form that was pickled or copied is exported then: standard operators only, whatever the backend."""
    form, x = made(name, "export_form")
    for copied in (pickle.loads(pickle.dumps(form)), copy.deepcopy(form)):
        with wk.backend("cpu"):
            graph = torch.export.export(copied, (x,)).graph
        assert not [node for node in graph.nodes if "wavemix_kernels" in str(node.target)]


@pytest.mark.parametrize("name, state", covered([s for s in STATES if "channels_last" not in s]))
def test_state_dicts_go_into_safetensors(name, state):
    """safetensors takes contiguous tensors that share no memory, and gives them back."""
    safetensors = pytest.importorskip("safetensors.torch")
    module, _ = made(name, state)
    module.load_state_dict(safetensors.load(safetensors.save(module.state_dict())), strict=True)


@pytest.mark.parametrize("name", modules())
def test_folded_tensors_are_contiguous_whatever_the_weights_are(name):
    """A channels_last model, fused for inference: what we make of its weights can be saved as it is."""
    module, _ = made(name, "inference of channels_last")
    for key, buffer in module.named_buffers():
        assert buffer.is_contiguous(), key


@pytest.mark.parametrize("name", ["FusedPATM", "FusedWaveblock deconv", "classification"])
def test_parametrized_modules_copy_as_torch_lets_them(name):
    """weight_norm on a layer: deepcopy works, pickle is refused by torch itself, which says to use state_dict."""
    module = modules()[name].eval()
    parametrizations.weight_norm(next(m for m in module.modules() if type(m) is nn.Conv2d))
    twin, x = copy.deepcopy(module), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(twin(x), module(x))
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(module)
    twin.load_state_dict(module.state_dict(), strict=True)


def _work(_rank: int, module: nn.Module, x: Tensor, out: Tensor) -> None:
    with torch.no_grad():
        out.copy_(module(x))


@pytest.mark.prove
@pytest.mark.parametrize("state", ["export_form", "inference"])
def test_spawned_workers(state):
    """torch.multiprocessing.spawn hands a model to a fresh process."""
    module, x = made("classification", state)
    want = module(x).detach()
    got = torch.zeros_like(want).share_memory_()
    spawn(_work, (module, x, got), nprocs=1)
    torch.testing.assert_close(got, want)
