"""Fused models under DistributedDataParallel: two gloo processes on half of a batch each against one on the whole."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tests.tolerances import GOLDEN, UNIT_ROUNDOFF
from tests.tools.two_processes import WORLD, TwoProcesses
from wavemix_kernels.nn.wavemix.block import FusedWaveblock
from wavemix_kernels.nn.wavemlp.block import FusedWaveBlock
from wavemix_kernels.nn.wavemlp.norm import why_not
from wavemix_kernels.nn.wavemlp.patm import FusedPATM
from wavemix_kernels.wavemix.classification import WaveMix, WaveMixLite
from wavemix_kernels.wavemlp import MyNorm, WaveNet

pytestmark = pytest.mark.prove

BATCH, CLASSES = 4, 10
_TINY: dict[str, Any] = {"layers": (1, 1), "embed_dims": (8, 12), "mlp_ratios": (2, 2), "num_classes": CLASSES}
_LEVEL_2: dict[str, Any] = {"num_classes": CLASSES, "ff_channel": 8, "final_dim": 8, "level": 2, "patch_size": 2}

Step = tuple[Tensor, dict[str, Tensor]]  # loss and gradients
MODELS: dict[str, Callable[[], nn.Module]] = {
    "wavemix-lite deconv": lambda: WaveMixLite(final_dim=8, depth=2, upsample="deconv", dropout=0.0),
    "wavemix-lite bilinear": lambda: WaveMixLite(final_dim=8, depth=2, dropout=0.0),
    "wavemix level 2": lambda: WaveMix(depth=1, dropout=0.0, **_LEVEL_2),
    "wave-mlp": lambda: WaveNet(**_TINY),
    "wave-mlp depthwise": lambda: WaveNet(**_TINY, mode="depthwise"),
    "wave-mlp one block": lambda: WaveNet((1,), embed_dims=(8,), mlp_ratios=(2,), num_classes=CLASSES),
    "wave-mlp group norm": lambda: WaveNet(**_TINY, norm_layer=MyNorm, qkv_bias=True),
}


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
    return images.contiguous(memory_format=torch.channels_last), torch.arange(BATCH) % CLASSES


def made(name: str, dtype: torch.dtype, frozen: bool) -> nn.Module:
    """The same model wherever it is called; with ``frozen`` BatchNorms use running statistics of their own."""
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            module.train(not frozen)
    return model


def half(values: Tensor) -> Tensor:
    return values.chunk(WORLD)[dist.get_rank()]


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def distributed_steps(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor], list[str]]:
    """Loss of the whole batch, gradients and warnings of the last of two steps without an update. DDP raises in the
    second one where a parameter got no gradient in the first."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ddp = DistributedDataParallel(model)
        for _ in range(2):
            model.zero_grad()
            loss = F.cross_entropy(ddp(half(images)), half(labels))
            loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total / WORLD, gradients_of(model), [str(warning.message) for warning in caught]


def on_halves(name: str, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor], list[str]]:
    return distributed_steps(made(name, dtype, frozen=True), *data(dtype))


def on_whole(model: nn.Module, images: Tensor, labels: Tensor) -> Step:
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    return loss.detach(), gradients_of(model)


def distance(left: dict[str, Tensor], right: dict[str, Tensor], name: str) -> float:
    return float((left[name].double() - right[name].double()).norm())


@pytest.mark.parametrize("name", MODELS)
def test_halves_give_the_gradients_of_the_whole(name: str, two: TwoProcesses) -> None:
    """BatchNorm is frozen: its batch statistics differ between halves by definition (SyncBatchNorm is below). In
    float64 the two agree to its rounding; in float32 both err, and halves by no more than twice what the whole does,
    plus one rounding of the average. DDP warns of a gradient whose strides are not those of its weight, here in
    channels_last, where they are peculiar along axes of length 1."""
    exact_loss, exact = on_whole(made(name, torch.float64, frozen=True), *data(torch.float64))
    for loss, gradients, _ in two.run(on_halves, name, torch.float64):
        assert abs(loss - exact_loss) <= GOLDEN * exact_loss
        for parameter, gradient in exact.items():
            assert distance(gradients, exact, parameter) <= GOLDEN * gradient.norm(), parameter
    one_loss, one = on_whole(made(name, torch.float32, frozen=True), *data(torch.float32))
    unit = UNIT_ROUNDOFF[torch.float32]
    for loss, gradients, warned in two.run(on_halves, name, torch.float32):
        assert abs(loss - exact_loss) <= 2 * abs(one_loss - exact_loss) + 4 * unit * exact_loss
        for parameter, gradient in exact.items():
            bound = 2 * distance(one, exact, parameter) + 2 * unit * gradient.norm()
            assert distance(gradients, exact, parameter) <= bound, parameter
        assert not warned


# --- Dropout, stochastic depth, checkpointing, compilation ---------------------------------------------------


class Wrapped(nn.Module):
    """A block, made again in backward or not; models then add the residual themselves, to the last bit alike."""

    def __init__(self, block: nn.Module, again: bool) -> None:
        super().__init__()
        self.block, self.again = block, again

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False) if self.again else self.block(x)


def wrapped(model: nn.Module, again: bool) -> nn.Module:
    for blocks in [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]:
        for i, block in enumerate(blocks):
            if isinstance(block, (FusedWaveblock, FusedWaveBlock)):
                blocks[i] = Wrapped(block, again)
    assert any(isinstance(module, Wrapped) for module in model.modules())
    return model


def dropping() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "wavemix-lite": WaveMixLite(final_dim=8, depth=2, dropout=0.5),
        "wave-mlp": WaveNet(**_TINY, norm_layer=MyNorm, drop_path_rate=0.5),
    }


def checkpointed_and_not(seeded_by_rank: bool) -> dict[str, Tensor]:
    """Per model, the outputs of this rank for the same image; checkpointing must not change a bit of a gradient."""
    images, labels = data(torch.float32)
    outputs = {}
    for name, model in dropping().items():
        seed, found = 7 + seeded_by_rank * dist.get_rank(), []
        for again in (False, True):
            torch.manual_seed(seed)
            found.append(distributed_steps(wrapped(copy.deepcopy(model), again), images, labels)[1])
        assert all(torch.equal(found[0][k], found[1][k]) for k in found[0]), name
        torch.manual_seed(seed)
        outputs[name] = model(images).detach()
    return outputs


def test_checkpointing_repeats_the_masks_and_each_rank_draws_its_own(two: TwoProcesses) -> None:
    first, second = two.run(checkpointed_and_not, True)
    assert all(not torch.equal(first[name], second[name]) for name in first)
    first, second = two.run(checkpointed_and_not, False)
    assert all(torch.equal(first[name], second[name]) for name in first)


def compiled_and_not(name: str) -> tuple[float, int]:
    """The largest relative distance of a gradient, and how many graphs were made."""
    images, labels = data(torch.float64)
    _, eager, _ = distributed_steps(made(name, torch.float64, frozen=True), images, labels)
    model = made(name, torch.float64, frozen=True)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(DistributedDataParallel(model), backend=counter)
    F.cross_entropy(compiled(half(images)), half(labels)).backward()
    gradients = gradients_of(model)
    return max(distance(gradients, eager, k) / float(eager[k].norm()) for k in eager), counter.frame_count


@pytest.mark.parametrize("name", ["wavemix-lite bilinear", "wave-mlp one block"])
def test_compiled_ddp_gives_the_same_gradients(name: str, two: TwoProcesses) -> None:
    for worst, graphs in two.run(compiled_and_not, name):
        assert worst <= GOLDEN
        assert graphs >= 1


# --- SyncBatchNorm -------------------------------------------------------------------------------------------


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def assert_same_step(model: nn.Module, wanted: Step, found: Step, buffers: dict[str, Tensor]) -> None:
    """Gradients that BatchNorm makes zero are rounding errors on both sides."""
    (loss, gradients), (its_loss, its) = wanted, found
    assert abs(its_loss - loss) <= GOLDEN * loss
    largest = max(gradient.norm() for gradient in gradients.values())
    for parameter in gradients:
        assert distance(its, gradients, parameter) <= GOLDEN * largest, parameter
    for buffer, value in model.named_buffers():
        torch.testing.assert_close(buffers[buffer], value, rtol=GOLDEN, atol=GOLDEN)


@pytest.mark.parametrize("name", ["wavemix-lite deconv", "wavemix level 2", "wave-mlp", "wave-mlp depthwise"])
@pytest.mark.parametrize("training", [True, False])
def test_converted_models_fall_back_to_their_modules(name: str, training: bool) -> None:
    """Without a process group SyncBatchNorm is BatchNorm, on any device: results, gradients and statistics stay."""
    exact = made(name, torch.float64, frozen=False).train(training)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(exact))
    assert count(converted, nn.SyncBatchNorm) == count(exact, nn.BatchNorm2d)
    assert converted.state_dict().keys() == exact.state_dict().keys()
    said = "{} is SyncBatchNorm, expected BatchNorm2d"
    for module in converted.modules():
        if isinstance(module, FusedWaveblock):
            assert module.why_not_fused() is not None
        if isinstance(module, FusedPATM):
            assert module.why_not_fused() == said.format("theta_h_conv.1")
        if isinstance(module, nn.SyncBatchNorm):
            assert why_not("norm", module) == said.format("norm")
    wanted = on_whole(exact, *data(torch.float64))
    assert_same_step(exact, wanted, on_whole(converted, *data(torch.float64)), dict(converted.named_buffers()))


def synchronised(norm: nn.SyncBatchNorm, x: Tensor) -> Tensor:
    """SyncBatchNorm in training by collectives that gloo has: the module's own takes CUDA tensors alone."""
    from torch.distributed.nn.functional import all_reduce

    values = x.shape[0] * x.shape[2] * x.shape[3] * WORLD
    mean = all_reduce(x.sum((0, 2, 3), keepdim=True)) / values
    var = all_reduce((x - mean).square().sum((0, 2, 3), keepdim=True)) / values
    with torch.no_grad():
        norm.running_mean.lerp_(mean.flatten(), norm.momentum)
        norm.running_var.lerp_(var.flatten() * values / (values - 1), norm.momentum)
        norm.num_batches_tracked.add_(1)
    weight, bias = norm.weight.view(1, -1, 1, 1), norm.bias.view(1, -1, 1, 1)
    return (x - mean) * torch.rsqrt(var + norm.eps) * weight + bias


def converted_on_halves(name: str) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], str]:
    def converted() -> nn.Module:
        return nn.SyncBatchNorm.convert_sync_batchnorm(made(name, torch.float64, frozen=False))

    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the test reads what it says
        converted()(half(data(torch.float64)[0]))
    model = converted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.SyncBatchNorm, "forward", synchronised)
        loss, gradients = on_whole(model, *map(half, data(torch.float64)))
    for value in (loss, *gradients.values()):  # as DDP would, whose constructor refuses the class on a CPU, too
        dist.all_reduce(value)
        value /= WORLD
    return loss, gradients, dict(model.named_buffers()), str(caught.value)


@pytest.mark.parametrize("name", ["wavemix-lite deconv", "wavemix level 2", "wave-mlp depthwise"])
def test_synchronised_batch_norm_gives_the_gradients_of_the_whole_batch(name: str, two: TwoProcesses) -> None:
    """In training, statistics included. PyTorch's own SyncBatchNorm refuses CPU tensors, so a stand-in sums here; what
    is proved is all around it: the fall-back, and that nothing else depends on how the batch is split."""
    model = made(name, torch.float64, frozen=False)
    wanted = on_whole(model, *data(torch.float64))
    for loss, gradients, buffers, refusal in two.run(converted_on_halves, name):
        assert "expected input tensor to be on GPU" in refusal
        assert_same_step(model, wanted, (loss, gradients), buffers)
