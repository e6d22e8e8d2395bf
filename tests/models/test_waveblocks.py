"""Waveblocks in a row: joined by one kernel between two of them, and what they give one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wavemix_kernels as wk
from benchmarks.harness import memory
from tests.emulator.build import launches
from tests.ops.contract import image, randn
from tests.tolerances import UNIT_ROUNDOFF, assert_within
from wavemix_kernels import backends
from wavemix_kernels.nn.wavemix import stack
from wavemix_kernels.ops import choose, waveblocks
from wavemix_kernels.ops.common import plan
from wavemix_kernels.reference import Waveblock
from wavemix_kernels.wavemix.backbone import through

HALF = torch.float16


@pytest.fixture(autouse=True)
def as_on_a_gpu(core: ModuleType | None, device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The emulator's CPU tensors take the backends that a GPU's take: the library's transposed convolution, Triton."""
    if device == "cpu":
        monkeypatch.setitem(choose.AUTO, "cpu", choose.AUTO["cuda"])
        for rule in ("deconv", "deconv_backward_weight"):
            monkeypatch.setattr(choose, rule, lambda *_: ("reference",))
    with wk.backend("cuda"):
        yield


def stacked(count: int = 3, dtype: torch.dtype = HALF, device: str = "cpu", **more: Any) -> nn.ModuleList:
    torch.manual_seed(0)
    options: dict[str, Any] = {"level": 2, "ff_channel": 16, "final_dim": 16, "dropout": 0.0, "recompute": "hidden"}
    blocks = (wk.FusedWaveblock(**(options | more)) for _ in range(count))
    return nn.ModuleList(blocks).to(device, dtype)


def pixels(device: str = "cpu", dtype: torch.dtype = HALF, layout: str = "channels_last") -> Tensor:
    return image(randn(2, 16, 8, 16), dtype, device, layout).requires_grad_()


def step(blocks: nn.ModuleList, x: Tensor, joined: bool, pooled: bool = False) -> dict[str, Tensor]:
    """Output, gradients and running statistics; ``pooled``: the output is the average over all pixels."""
    blocks.zero_grad()
    x.grad = None
    torch.manual_seed(7)
    out: Tensor | None = stack.through(list(blocks), x, pooled) if joined else x
    for block in () if joined else blocks:
        out = block(out, residual=True)
    assert out is not None
    if pooled and not joined:
        out = nn.functional.adaptive_avg_pool2d(out, 1)
    out.backward(image(randn(*out.shape, seed=1), out.dtype, str(out.device), "channels_last"))
    gradients = {name: p.grad for name, p in blocks.named_parameters()}
    named = {"output": out.detach(), "x": x.grad, **gradients, **dict(blocks.named_buffers())}
    return {name: t.clone() for name, t in named.items() if t is not None}


@pytest.mark.parametrize("level", [1, 3])
def test_equal_the_reference(core: ModuleType | None, device: str, level: int) -> None:
    """Beside float64, by the bound of a block (tests/ops/test_waveblock_backends.py) for each, in half precision."""
    blocks, x = stacked(2, device=device, level=level), pixels(device)
    options = {"level": level, "ff_channel": 16, "final_dim": 16, "dropout": 0.0}
    truth = nn.ModuleList(Waveblock(**options) for _ in range(2)).double()
    truth.load_state_dict(blocks.state_dict())
    if core is not None:
        launches(core)
    made = step(blocks, x, True)
    if core is not None:
        names = [name.partition(" (")[0] for name in launches(core)]
        assert names.count("norm_reduce_haar") == 1
        assert names.count("reduce_haar") == 1
        assert names.count("reduce_haar_gradients") == 2
    wide = x.detach().cpu().double().requires_grad_()
    out = wide
    for block in truth:
        out = out + block(out)
    out.backward(randn(*out.shape, seed=1))
    exact = {
        "output": out,
        "x": wide.grad,
        **{n: p.grad for n, p in truth.named_parameters()},
        **dict(truth.named_buffers()),
    }
    largest = max(float(p.grad.abs().max()) for p in truth.parameters())
    for name, want in exact.items():
        if not want.is_floating_point():
            assert torch.equal(made[name].cpu(), want)
            continue
        own = name in ("output", "x") or "running" in name
        scale = float(want.detach().abs().max()) if own else largest
        bound = 2 * level * 5 * 2 * UNIT_ROUNDOFF[HALF] * scale
        assert_within(made[name].cpu(), want.detach(), torch.full_like(want, bound), name)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("upsample", ["deconv", "bilinear"])
def test_equal_blocks_one_after_the_other(device: str, upsample: str, pooled: bool) -> None:
    """The same dropout masks, and the same roundings but for sums of a gradient, or an image, before it is rounded."""
    x = pixels(device)
    joined, apart = (
        step(stacked(device=device, dropout=0.5, upsample=upsample), x, joined, pooled) for joined in (True, False)
    )
    assert_close(joined, apart)


def assert_close(made: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Within a few roundings of each tensor's largest value, parameters' gradients of all of theirs: some are zero but
    for rounding (of a bias before a BatchNorm)."""
    assert made.keys() == want.keys()
    sizes = {name: float(t.double().abs().max()) for name, t in want.items()}
    largest = max((size for name, size in sizes.items() if name.endswith((".weight", ".bias"))), default=0.0)
    for name, t in want.items():
        scale = largest if name.endswith((".weight", ".bias")) else sizes[name]
        bound = torch.full_like(t, 8 * UNIT_ROUNDOFF[HALF] * scale, dtype=torch.float64)
        assert_within(made[name], t.double(), bound, name)


@pytest.mark.parametrize("last", ["Apply", "Pool"])
def test_go_by_plans(device: str, last: str) -> None:
    x, pooled = pixels(device), last == "Pool"
    with plan.everywhere():
        blocks, apart = stacked(device=device), stacked(device=device)
        for _ in range(3):
            made, want = step(blocks, x, True, pooled), step(apart, x, False, pooled)
        names = [f"_{name}.{way}" for name in ("Block", "Levels", last) for way in ("forward", "backward")]
        # An image's gradient of one value for all its pixels has strides of its own.
        assert [len(plan.tables[name].plans) for name in names] == [1, 1 + pooled, 1, 1, 1, 1]
    assert_close(made, want)


@pytest.mark.parametrize("pooled", [False, True])
def test_compile_into_one_graph(device: str, pooled: bool) -> None:
    blocks, x = stacked(device=device, dropout=0.5), pixels(device)
    want = step(blocks, x, True, pooled)
    blocks = stacked(device=device, dropout=0.5)
    run = stack.through
    compiled = torch.compile(lambda image: run(list(blocks), image, pooled), backend="aot_eager", fullgraph=True)
    torch.manual_seed(7)
    out = compiled(x)
    x.grad = None
    out.backward(image(randn(*out.shape, seed=1), out.dtype, device, "channels_last"))
    assert_close({"output": out.detach(), "x": x.grad}, {name: want[name] for name in ("output", "x")})


def test_keep_as_much_as_blocks_do(device: str) -> None:
    x, blocks = pixels(device), stacked(4, device=device)
    parameters = [*blocks.parameters(), *blocks.buffers()]

    def apart() -> Tensor:
        out: Tensor = x
        for block in blocks:
            out = block(out, residual=True)
        return out

    joined = memory.saved_bytes(lambda: stack.through(list(blocks), x), parameters)
    assert 0 < joined <= 1.02 * memory.saved_bytes(apart, parameters)


def freeze(blocks: nn.ModuleList) -> None:
    blocks[1].feedforward1[5].eval()


def evaluate(blocks: nn.ModuleList) -> None:
    blocks.eval()


@pytest.mark.parametrize(
    "more, x, change, reason",
    [
        ({"recompute": "mlp"}, {}, None, "blocks make more than their hidden layers again in backward"),
        ({}, {}, freeze, "a BatchNorm has statistics of its own, not the batch's"),
        ({}, {}, evaluate, "it is in evaluation"),
        ({"dtype": torch.float32}, {"dtype": torch.float32}, None, "no kernel joins their passes here"),
        ({}, {"layout": "channels_slice"}, None, "no kernel joins their passes here"),
    ],
)
def test_run_one_after_the_other_for_a_reason(
    device: str, caplog: pytest.LogCaptureFixture, more: Any, x: Any, change: Any, reason: str
) -> None:
    caplog.set_level("INFO", "wavemix_kernels")
    blocks = stacked(device=device, **more)
    if change is not None:
        change(blocks)
    assert stack.through(list(blocks), pixels(device, **x)) is None
    assert f"runs as one block after the other: {reason}" in caplog.text


def test_hooks_are_called(device: str) -> None:
    """A block that somebody listens to is called by itself, and so are the others."""
    blocks, seen = stacked(device=device), []
    blocks[1].register_forward_hook(lambda *_: seen.append(1))
    through(blocks, pixels(device))
    assert seen == [1]


def test_cpu_tensors_go_one_by_one() -> None:
    with wk.backend("auto"):
        assert stack.through(list(stacked(dtype=torch.float32)), pixels(dtype=torch.float32)) is None


def test_few_channels_have_faster_kernels_by_themselves(device: str) -> None:
    blocks, x = [block.prepared(pixels(device))[1] for block in stacked(device=device)], pixels(device)
    assert waveblocks.why_not(x, blocks, "cuda") is None
    assert waveblocks.why_not(x, blocks, "auto") == "16 channels have faster kernels by themselves"


@pytest.mark.parametrize("unused", [True, False])
def test_models_join_their_blocks(core: ModuleType | None, device: str, unused: bool) -> None:
    """A classifier's blocks between stem and head; ``unused``: a part of the image alone has a gradient."""
    if core is None:
        pytest.skip("counts the emulator's launches")
    from wavemix_kernels.wavemix.classification import WaveMix

    model = WaveMix(num_classes=2, depth=3, ff_channel=16, final_dim=16, level=1, patch_size=2).to(HALF)
    for block in model.layers:
        block.recompute = "hidden"
    launches(core)
    out = model.features(torch.randn(1, 3, 16, 16).to(HALF))
    (out[..., :1] if unused else out).sum().backward()
    names = [name.partition(" (")[0] for name in launches(core)]
    assert names.count("norm_reduce_haar") == 2
    assert all(p.grad is not None for p in model.layers.parameters())
    assert backends.requested() == "cuda"


class Watcher:
    """The shapes that a module is called with."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, _: nn.Module, given: tuple[Tensor]) -> None:
        self.seen.append(tuple(given[0].shape))


@pytest.mark.parametrize("watched", ["", "pool", "pool.0", "pool.1", "pool.2"])
def test_classifiers_average_without_the_image(device: str, watched: str) -> None:
    """Unless somebody looks at what goes into the head or its average."""
    from wavemix_kernels.wavemix.classification import WaveMix

    torch.manual_seed(0)
    model = WaveMix(num_classes=2, depth=2, ff_channel=16, final_dim=16, level=1, patch_size=2, dropout=0.0)
    model = model.to(device, HALF)
    for block in model.layers:
        block.recompute = "hidden"
    watcher, img = Watcher(), torch.randn(2, 3, 16, 16).to(device, HALF)
    if watched:
        model.get_submodule(watched).register_forward_pre_hook(watcher)
    with choose.watched() as calls:
        made = model(img)
    assert ("batch_norm_pool" in {call[0] for call in calls}) == (watched in ("", "pool.1", "pool.2"))
    assert watcher.seen == {"": [], "pool.1": [(2, 16, 1, 1)], "pool.2": [(2, 16)]}.get(watched, [(2, 16, 8, 8)])
    want = model.pool(model.features(img))
    assert_within(made, want.double(), torch.full_like(want, 8 * UNIT_ROUNDOFF[HALF], dtype=torch.float64))


def test_a_subclass_s_features_are_what_its_head_averages(device: str) -> None:
    from wavemix_kernels.wavemix.classification import WaveMix

    class Doubled(WaveMix):
        def features(self, img: Tensor) -> Tensor:
            return 2 * super().features(img)

    torch.manual_seed(0)
    model = Doubled(num_classes=2, depth=2, ff_channel=16, final_dim=16, level=1, patch_size=2, dropout=0.0)
    model, img = model.to(device, HALF), torch.randn(2, 3, 16, 16).to(device, HALF)
    with choose.watched() as calls:
        made = model(img)
    assert "batch_norm_pool" not in {call[0] for call in calls}
    torch.testing.assert_close(made, model.pool(model.features(img)))
