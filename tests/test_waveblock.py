"""The Waveblock, reference and fused: upstream's values, its state dict, and torch's own machinery around it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import wavemix_kernels as wk
from tests.golden_models import FOLDER, assert_reproduces
from tests.tolerances import UNIT_ROUNDOFF
from wavemix_kernels import wavemix
from wavemix_kernels.nn.wavemix.reference import UPSAMPLES
from wavemix_kernels.reference import Waveblock

BLOCKS = {"reference": Waveblock, "fused": wk.FusedWaveblock}
both = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
each_level = pytest.mark.parametrize("level", [1, 2, 3, 4])


def small(block: type[nn.Module], level: int = 2, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return block(**{"level": level, "mult": 2, "ff_channel": 8, "final_dim": 8, "dropout": 0.0} | options)


@both
@each_level
def test_reproduces_upstream(block: type[nn.Module], level: int) -> None:
    assert_reproduces(f"waveblock_level{level}", block)


@each_level
def test_drop_in_reproduces_upstream(level: int) -> None:
    def build(*, level: int, **arguments: Any) -> nn.Module:
        return getattr(wavemix, f"Level{level}Waveblock")(**arguments)

    assert_reproduces(f"waveblock_level{level}", build)


@each_level
def test_state_dict_is_upstreams(level: int) -> None:
    recorded = json.loads((FOLDER / "wavemix_state_dicts.json").read_text())
    of_level = {1: ("sisr", 144), 3: ("classification", 192), 4: ("SemSegment", 256)}
    if level == 2:  # no model of upstream's defaults to level 2: its recorded block has the names
        import numpy as np

        with np.load(FOLDER / "waveblock_level2.npz") as arrays:
            state = {k.removeprefix("state/"): list(arrays[k].shape) for k in arrays.files if k.startswith("state/")}
        drop_in = wavemix.Level2Waveblock(mult=3, ff_channel=8, final_dim=8)
    else:
        model, width = of_level[level]
        prefix = "layers.0."
        state = {
            k.removeprefix(prefix): v for k, v in recorded[f"wavemix.{model}.WaveMix"].items() if k.startswith(prefix)
        }
        drop_in = getattr(wavemix, f"Level{level}Waveblock")(ff_channel=width, final_dim=width)
    # Order too: an optimizer's state refers to parameters by their position.
    assert [(k, list(v.shape)) for k, v in drop_in.state_dict().items()] == list(state.items())


class Analyses(TorchDispatchMode):
    """Counts the DWT levels that run."""

    levels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        ops = torch.ops.wavemix_kernels
        where = {ops.haar_analysis.default: 1, ops.haar_pyramid.default: 1, ops.reduce_haar.default: 3}
        if func in where:
            self.levels += args[where[func]]
        return func(*args, **(kwargs or {}))


def test_level_4_runs_four_dwt_levels() -> None:
    block = small(wk.FusedWaveblock, level=4)
    with Analyses() as count:
        block(torch.randn(1, 8, 32, 16))
    assert count.levels == 4


@both
@pytest.mark.parametrize("upsample", UPSAMPLES)
def test_channels_last(block: type[nn.Module], upsample: str) -> None:
    module = small(block, upsample=upsample).double()
    x = torch.randn(2, 8, 12, 20, dtype=torch.float64)
    plain, last = x.clone().requires_grad_(), x.to(memory_format=torch.channels_last).requires_grad_()
    out = module(plain)
    g = torch.randn_like(out)
    out.backward(g)
    got = module(last)
    got.backward(g)
    torch.testing.assert_close(got, out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last.grad, plain.grad, rtol=1e-12, atol=1e-12)


def test_keeps_channels_last() -> None:
    block = small(wk.FusedWaveblock).to(memory_format=torch.channels_last)  # float32: oneDNN has it, float64 has not
    out = block(torch.randn(2, 8, 12, 20).to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_compiles_whole_with_dynamic_shapes() -> None:
    block = small(wk.FusedWaveblock).double()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")

    def step(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        out.sin().sum().backward()  # not square(): its sum is the same for everything BatchNorm gives
        assert leaf.grad is not None
        return out.detach(), leaf.grad

    for shape in ((2, 8, 12, 20), (3, 8, 16, 8)):
        x = torch.randn(shape, dtype=torch.float64)
        expected, got = step(block, x), step(compiled, x)
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@both
@pytest.mark.parametrize("level", [1, 3])
def test_autocast_bfloat16(block: type[nn.Module], level: int) -> None:
    """Forward and backward. In eval mode, where rounding is not divided by a batch's own small variance."""
    module = small(block, level=level).eval()
    x = torch.randn(2, 8, 16, 24)

    def run(enabled: bool) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = module(leaf)
        out.float().square().sum().backward()
        assert leaf.grad is not None
        return out.detach(), leaf.grad

    exact, exact_grad = run(False)
    out, grad = run(True)
    assert out.dtype == torch.bfloat16
    assert grad.dtype == torch.float32
    # Five roundings one after the other (reduction, bands, three convolutions), each relative to its values; what comes
    # up from coarser levels is rounded as often and adds at most as much again. The backward pass doubles the chain.
    bound = 2 * 5 * UNIT_ROUNDOFF[torch.bfloat16]
    assert (out.float() - exact).norm() <= bound * exact.norm()
    assert (grad - exact_grad).norm() <= 2 * bound * exact_grad.norm()
    module.train()
    run(True)


@both
def test_dropout_acts_in_training_only(block: type[nn.Module]) -> None:
    module = small(block, dropout=0.5)
    x = torch.randn(1, 8, 8, 8)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize("upsample", UPSAMPLES)
@pytest.mark.parametrize("level", [1, 3])
def test_upsamplings_agree_between_blocks(upsample: str, level: int) -> None:
    reference = small(Waveblock, level=level, upsample=upsample).double()
    fused = small(wk.FusedWaveblock, level=level, upsample=upsample).double()
    fused.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(2, 8, 16, 8, dtype=torch.float64)
    expected = reference(x)
    assert expected.shape == x.shape
    torch.testing.assert_close(fused(x), expected, rtol=1e-12, atol=1e-12)
    # BatchNorm ends every form, at the same index, so that running statistics keep their names.
    name = "feedforward.5" if level == 1 else "feedforward1.5"
    assert isinstance(fused.get_submodule(name), nn.BatchNorm2d)


def test_upsamplings_compute_what_they_say() -> None:
    torch.manual_seed(0)
    z = torch.randn(1, 8, 5, 6)

    def upsampling(upsample: str) -> nn.Module:
        return small(Waveblock, level=1, upsample=upsample).get_submodule("feedforward.4")

    nearest = upsampling("nearest")(z)
    torch.testing.assert_close(nearest, z.repeat_interleave(2, 2).repeat_interleave(2, 3), rtol=0, atol=0)
    # Bilinear by two, centres aligned: 3/4 and 1/4 of the neighbours, replicated at the border.
    padded = nn.functional.pad(z, (1, 1, 1, 1), mode="replicate")
    even = 0.75 * z + 0.25 * padded[:, :, :-2, 1:-1]
    even_padded = 0.75 * padded[:, :, 1:-1] + 0.25 * padded[:, :, :-2]
    even_even = 0.75 * even + 0.25 * even_padded[..., :-2]
    torch.testing.assert_close(upsampling("bilinear")(z)[:, :, ::2, ::2], even_even, rtol=1e-5, atol=1e-6)
    shuffle = upsampling("pixelshuffle")
    n, c, h, w = z.shape
    interleaved = z.reshape(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)
    convolution = shuffle[1]
    expected = nn.functional.conv2d(interleaved, convolution.weight, convolution.bias, padding=1)
    torch.testing.assert_close(shuffle(z), expected, rtol=0, atol=0)
    assert not list(upsampling("nearest").parameters()) + list(upsampling("bilinear").parameters())


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"level": 5}, "level=5"),
        ({"level": 2.0}, "level=2.0"),
        ({"final_dim": 6}, "4 or 8"),
        ({"upsample": "cubic"}, "'deconv', 'bilinear', 'nearest', 'pixelshuffle'"),
        ({"upsample": "pixelshuffle", "ff_channel": 6}, "ff_channel=6"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"mult": 0}, "mult"),
    ],
)
@both
def test_rejects_arguments(block: type[nn.Module], arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        block(**arguments)


@both
def test_rejects_inputs(block: type[nn.Module]) -> None:
    module = small(block, level=3)
    with pytest.raises(ValueError, match=r"H=28.*24 or 32"):
        module(torch.randn(1, 8, 28, 32))
    with pytest.raises(ValueError, match="8 channels"):
        module(torch.randn(1, 4, 32, 32))
    with pytest.raises(ValueError, match="4 dimensions"):
        module(torch.randn(8, 32, 32))


@pytest.mark.parametrize("recompute, share", [("mlp", 0.52), ("all", 0.27)])
@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_saves_half_or_a_quarter_of_what_upstream_saves(level: int, recompute: str, share: float) -> None:
    pytest.importorskip("pytorch_wavelets", reason="upstream's transform is not installed", exc_type=ImportError)
    from benchmarks.harness.memory import saved_bytes
    from benchmarks.harness.rivals import UpstreamWaveblock

    config = {"level": level, "final_dim": 16, "ff_channel": 16, "mult": 2, "dropout": 0.5}
    x = torch.randn(2, 16, 32, 32, requires_grad=True)
    before = x * 1  # the block's input is an activation that it decides to keep, not a leaf that lives anyway

    def saved(block: nn.Module) -> int:
        return saved_bytes(lambda: block(before), [*block.parameters(), *block.buffers()])

    assert saved(wk.FusedWaveblock(**config, recompute=recompute)) <= share * saved(UpstreamWaveblock(**config))


def test_dropout_is_reproducible_and_its_mask_the_same_in_backward() -> None:
    block = small(wk.FusedWaveblock, level=2, dropout=0.5).double()
    x = torch.randn(2, 8, 8, 12, dtype=torch.float64, requires_grad=True)

    def step(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(seed)
        out = block(x)
        return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]

    (first, grad), (again, same), (other, _) = step(1), step(1), step(2)
    assert torch.equal(first, again)
    assert torch.equal(grad, same)
    assert not torch.equal(first, other)

    def function(t: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return block(t)

    # A finite difference of the same masked function: a mask drawn anew in backward could not match it.
    assert torch.autograd.gradcheck(function, x, fast_mode=True)
    torch.manual_seed(4)
    plain = block(x)
    torch.manual_seed(4)
    kept = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    g = torch.randn_like(plain)
    (want,), (got,) = torch.autograd.grad(plain, x, g), torch.autograd.grad(kept, x, g)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_residual_frozen_statistics_and_fallbacks() -> None:
    block, twin = small(wk.FusedWaveblock, level=2).double(), small(Waveblock, level=2).double()
    twin.load_state_dict(block.state_dict())
    x = torch.randn(2, 8, 8, 12, dtype=torch.float64)
    torch.testing.assert_close(block(x, residual=True), x + twin(x), rtol=1e-10, atol=1e-10)
    for module in (block, twin):
        module.feedforward1[5].eval()  # frozen while the rest trains
        module.feedforward2[5].momentum = None
    torch.testing.assert_close(block(x), twin(x), rtol=1e-10, atol=1e-10)
    for (name, got), want in zip(block.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    seen = []
    block.feedforward2[1].register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(block(x), twin(x), rtol=1e-10, atol=1e-10)
    assert seen, "a hook on a part must run: the modules themselves stand in"
    synchronised = torch.nn.SyncBatchNorm.convert_sync_batchnorm(small(wk.FusedWaveblock)).double()
    torch.testing.assert_close(synchronised.eval()(x), small(Waveblock).double().eval()(x), rtol=1e-10, atol=1e-10)


# --- Inference form --------------------------------------------------------------------------------------


def _trained(block: torch.nn.Module) -> torch.nn.Module:
    """Statistics and affine maps that are not those of a fresh BatchNorm."""
    generator = torch.Generator().manual_seed(5)
    for module in block.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low in ((module.running_mean, -1.0), (module.running_var, 0.5), (module.weight, 0.5)):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * 2 + low)
            module.bias.data.copy_(torch.randn(module.bias.shape, generator=generator))
    return block.eval()


@pytest.mark.parametrize("upsample", UPSAMPLES)
@pytest.mark.parametrize("level", [1, 3])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_inference_form_is_the_block_in_evaluation(upsample: str, level: int, backend: str) -> None:
    torch.manual_seed(level)
    block = _trained(wk.FusedWaveblock(level=level, final_dim=16, ff_channel=12, upsample=upsample).double())
    fused = block.fuse_for_inference()
    assert not any(isinstance(m, (torch.nn.BatchNorm2d, torch.nn.Dropout)) for m in fused.modules())
    assert not list(fused.parameters())
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 16, 16, 24, dtype=torch.float64).contiguous(memory_format=memory_format)
        with wk.backend(backend), torch.no_grad():
            for residual in (False, True):
                got, want = fused(x, residual=residual), block(x, residual=residual)
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
                assert got.stride() == x.stride()
        # An image whose gradient is wanted, as attribution methods do, gets it; the residual's part included.
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        with wk.backend(backend):
            out, want = fused(leaves[0], residual=True), block(leaves[1], residual=True)
        grads = [torch.autograd.grad(y, leaf, x) for y, leaf in zip((out, want), leaves, strict=True)]
        torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)
    # Folding rounds each weight once more: single precision stays within the block's own rounding.
    with torch.no_grad():
        want = fused(x)
        got = block.float().fuse_for_inference()(x.float())
    assert (got - want).norm() <= 16 * (6 * level + 1) * 2.0**-24 * want.norm()


def test_inference_form_of_a_model() -> None:
    from wavemix_kernels.wavemix.classification import WaveMix

    torch.manual_seed(0)
    model = _trained(WaveMix(num_classes=5, depth=2, final_dim=16, ff_channel=16, level=2).double())
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        want = model(image)
        model.train()
        assert wk.fuse_for_inference(model) is model
        assert not model.training
        torch.testing.assert_close(model(image), want, rtol=1e-12, atol=1e-12)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(image), want, rtol=1e-12, atol=1e-12)
    state = model.state_dict()
    again = wk.fuse_for_inference(WaveMix(num_classes=5, depth=2, final_dim=16, ff_channel=16, level=2).double())
    again.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(again(image), model(image))


def test_inference_form_errors() -> None:
    block = wk.FusedWaveblock(level=1, final_dim=8)
    block.feedforward[5] = torch.nn.BatchNorm2d(8, track_running_stats=False)
    with pytest.raises(ValueError, match=r"feedforward\.5: track_running_stats=False"):
        block.fuse_for_inference()
    with pytest.raises(ValueError, match=r"0: feedforward\.5"):
        wk.fuse_for_inference(torch.nn.Sequential(block))
    block = wk.FusedWaveblock(level=1, final_dim=8)
    block.feedforward[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks"):
        block.fuse_for_inference()
    with pytest.raises(ValueError, match="accelerate"):
        wk.fuse_for_inference(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="expected a torch"):
        wk.fuse_for_inference(torch.nn.functional.relu)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="final_dim"):
        wk.FusedWaveblock(level=1, final_dim=8).fuse_for_inference()(torch.zeros(1, 4, 8, 8))
