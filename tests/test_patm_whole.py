"""PATM from its image to its output in one kernel: the operators against their reference, FusedPATM on them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wavemix_kernels as wk
from tests import golden_models
from tests.test_patm import compare, pair
from tests.test_wavemlp import normal, randomised
from tests.tolerances import DTYPES, UNDERFLOW, UNIT_ROUNDOFF, accumulation, assert_within
from wavemix_kernels import _native
from wavemix_kernels.nn.wavemlp.patm import FusedPATM
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.patm import whole as op
from wavemix_kernels.ops.patm.weights import Affine, Weights

# (dim, size): thinner than the taps reach, several rows to a step and none, more places than channels.
SIZES = [(4, (3, 21)), (10, (8, 2)), (6, (1, 1)), (4, (1, 9)), (34, (9, 5)), (16, (4, 70))]


@pytest.fixture(autouse=True)
def on_the_cpu(device: str) -> None:
    if device != "cpu":
        pytest.skip("the CPU's part; a GPU has no such kernel")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def some_weights(c: int, dtype: torch.dtype, biased: bool = True) -> tuple[Weights, Affine]:
    """Phases of a few radians, mostly above 0."""
    hidden, values = max(c // 4, 1), {}
    for i, name in enumerate((*Weights._fields, *Affine._fields)):
        if name in ("fc1", "fc2"):
            shape: tuple[int, ...] = (hidden, c, 1, 1) if name == "fc1" else (3 * c, hidden, 1, 1)
        elif name.startswith("taps"):
            shape = (c, 2, 1, 7) if name == "taps_h" else (c, 2, 7, 1)
        elif name in Affine._fields or name.endswith("bias"):
            shape = (hidden if name == "fc1_bias" else 3 * c if name == "fc2_bias" else c,)
        else:
            shape = (c, c, 1, 1)
        value = normal(*shape, seed=i) / (c**0.5 if len(shape) > 1 else 4)
        values[name] = (value + 1 if name in Affine._fields else value).to(dtype)
        if not biased and name in ("z_h_bias", "theta_w_bias", "z_c_bias", "proj_bias"):
            values[name] = None
    maps = Affine(*(values.pop(name) for name in Affine._fields))
    return Weights(**values), maps


def some_batch(image: op.Image, dtype: torch.dtype) -> op.Batch:
    c = image.x.shape[1]
    mean, covariance = op.moments(image, "reference")
    return op.Batch((0.1 * normal(2, c)).to(dtype), 1 + normal(2, c).square().to(dtype), mean, covariance)


def widened(values: Any) -> Any:
    return type(values)(*(None if t is None else t.double() for t in values))


@pytest.mark.parametrize("of_batch", [False, True], ids=["constants", "batch statistics"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operators_match_the_reference(dtype: torch.dtype, of_batch: bool) -> None:
    """As a residual branch behind an affine map by image, on slices of larger tensors."""
    n, c, h, w = 2, 10, 9, 11
    wide = accumulation(dtype)
    x = normal(n, h, 2 * w, 2 * c).to(dtype)[:, :, ::2, 3 : 3 + c].permute(0, 3, 1, 2)
    grad = normal(n, c, h, w, seed=1).to(dtype)
    image = op.Image(x, (1 + normal(n, c, seed=2) / 4).to(wide), normal(n, c, seed=3).to(wide))
    path, (weights, maps) = torch.tensor([0.0, 1.25], dtype=wide), some_weights(c, wide, biased=of_batch)
    batch = some_batch(image, wide) if of_batch else None
    results = []
    for name in ("cpu", "reference"):
        if name == "reference":
            image, weights, maps, path, grad = *map(widened, (image, weights, maps)), path.double(), grad.double()
            batch = None if batch is None else widened(batch)
        out, mean = op.forward(image, path, True, weights, maps, name)
        grads = op.backward(grad, mean, batch, image, path, weights, maps, name)
        results.append({"out": out, "branch_mean": mean, "image": grads.image, "sums": grads.sums} | grads.weights)
    read = image.x * image.scale[..., None, None] + image.shift[..., None, None]
    phases = [torch.einsum("oc,nchw->nohw", t.flatten(1), read) for t in (weights.theta_h, weights.theta_w)]
    phase = max(t.abs().max().item() for t in phases)
    # The longest sums: over pixels, over the joined projections' channels, over taps. A phase turns its wave by its own
    # rounding error, and the chain is walked twice, forward and backward.
    terms = n * h * w + 5 * c + 14
    for key, got in results[0].items():
        want = results[1][key]
        size = want.abs().max() if key != "sums" else want.abs().amax((0, 2), keepdim=True)
        stored = UNIT_ROUNDOFF[dtype] * want.abs() + UNDERFLOW[dtype] if key in ("out", "image") else 0.0
        bound = 2 * terms * UNIT_ROUNDOFF[wide] * (1 + phase) * size + stored
        assert got.dtype == (dtype if key in ("out", "image") else wide), key
        assert_within(got, want, torch.broadcast_to(torch.as_tensor(bound), want.shape), key)


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("count", [1, 3])
def test_moments(offset: float, count: int) -> None:
    """In float64 whatever the input; a large mean cancels before anything is squared."""
    x = (offset + normal(3, 6, 9, 15)).float()
    with threads(count):
        mean, covariance = op.moments(op.Image(x, None, None), "cpu")
    rows = x.double().permute(1, 0, 2, 3).flatten(1)
    # Sums of 405 terms, of differences from one of the pixels that are at most 10.
    unit = UNIT_ROUNDOFF[torch.float64] * rows.shape[1] * 10**2
    assert_within(mean, rows.mean(1), unit + UNIT_ROUNDOFF[torch.float64] * rows.mean(1).abs(), "mean")
    assert_within(covariance, torch.cov(rows, correction=0), torch.full((6, 6), 4 * unit), "covariance")
    assert torch.equal(covariance, covariance.t())


@pytest.mark.parametrize("power", [3, 4, 6])
def test_large_phases(power: int) -> None:
    """Where weights pass one channel through, the output is the cosine itself: 1.32 roundoffs, and those of two sums
    with zeros, which are none."""
    c, u = 32, UNIT_ROUNDOFF[torch.float32]
    x = (10.0**power * (1 + normal(2, c, 3, 5).abs())).float()
    eye, zero, one = torch.eye(c)[:, :, None, None], torch.zeros(c), torch.ones(c)
    taps = torch.zeros(c, 2, 7)
    taps[:, 0, 3] = 1
    nothing, pass_on = (0 * eye, zero), (eye, zero)
    choose = torch.tensor([200.0, 0.0, 0.0]).repeat(c)  # the branch along W, to the last bit
    weights = Weights(
        0 * eye, one, 0 * eye, one, *nothing, *pass_on, *pass_on, *pass_on, taps[:, :, None], taps[..., None],
        torch.zeros(1, c, 1, 1), torch.zeros(1), torch.zeros(3 * c, 1, 1, 1), choose,
    )  # fmt: skip
    maps = Affine(one, zero, one, zero)
    out, _ = op.forward(op.Image(x, None, None), None, False, weights, maps, "cpu")
    exact = x.double()[:, ::2]
    assert_within(out, torch.cat((exact.cos(), exact.sin()), 1), torch.full(x.shape, 1.32 * u), "waves")


def test_opcheck() -> None:
    image = op.Image(normal(2, 4, 3, 5).float(), normal(2, 4).float(), normal(2, 4).float())
    weights, maps = some_weights(4, torch.float32, biased=False)
    batch, grad = some_batch(image, torch.float32), normal(2, 4, 3, 5).float()
    ops, path = torch.ops.wavemix_kernels, torch.rand(2)
    for name in op.BACKENDS:
        torch.library.opcheck(ops.patm_moments, (*image, name))
        torch.library.opcheck(ops.patm_whole, (*image, path, True, *weights, *maps, name))
    _, mean = op.forward(image, path, True, weights, maps, "cpu")
    for given in (batch, (None,) * 4):  # (the reference's backward is autograd, which opcheck turns off)
        torch.library.opcheck(ops.patm_whole_backward, (grad, mean, *given, *image, path, *weights, *maps, "cpu"))


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set(isa: str) -> None:
    """The variants that this CPU would not pick: the op's own check in a process of its own."""
    script = (
        "import torch\n"
        "from wavemix_kernels import _native\n"
        "from wavemix_kernels.ops.patm import whole as patm_whole\n"
        f"assert _native.core.cpu_isa() == {isa!r}\n"
        "error, bound = patm_whole.self_test('cpu', torch.device('cpu'))\n"
        "assert error <= bound, (error, bound)\n"
    )
    environment = os.environ | {"WAVEMIX_KERNELS_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    if f"WAVEMIX_KERNELS_CPU_ISA={isa}: this CPU and build have" in result.stderr:
        pytest.skip(result.stderr.strip().splitlines()[-1])
    assert result.returncode == 0, result.stderr


def test_core_refuses_what_it_cannot_read() -> None:
    core: Any = _native.core
    x = torch.zeros(1, 4, 2, 2).contiguous(memory_format=torch.channels_last)
    image = 1, x.shape, _native.address(x), 0, 0, False
    with pytest.raises(ValueError, match="weights: expected 22 addresses, got 1"):
        core.patm_forward_cpu(image, [0], 1, False, 0, _native.address(x), 0, 1)
    with pytest.raises(ValueError, match="scale, shift: expected both or neither"):
        core.patm_moments_cpu((*image[:3], 1, 0, False), 0, 0, 1)
    with pytest.raises(ValueError, match="x: expected contiguous channels, got a channel stride of 4"):
        core.patm_moments_cpu((1, x.shape, _native.address(x.contiguous()), 0, 0, False), 0, 0, 1)


# --- FusedPATM -------------------------------------------------------------------------------------------


def runs(module: nn.Module, x: Tensor) -> bool:
    """Whether the kernel ran."""
    called: list[int] = []
    original = op.BACKENDS["cpu"].functions["forward"]

    def counted(*arguments: Any) -> Any:
        called.append(1)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(op.BACKENDS["cpu"].functions, "forward", counted)
        module(x)
    return bool(called)


def test_serves_up_to_a_width() -> None:
    assert runs(FusedPATM(8), torch.randn(2, 8, 5, 4))
    assert runs(FusedPATM(8).eval().fuse_for_inference(), torch.randn(2, 8, 5, 4))
    assert not runs(FusedPATM(8, mode="depthwise"), torch.randn(2, 8, 5, 4))
    assert not runs(FusedPATM(5), torch.randn(2, 5, 5, 4))
    wide = choose.WHOLE + 2
    assert not runs(FusedPATM(wide), torch.randn(2, wide, 2, 2))
    with wk.backend("cpu"):
        assert runs(FusedPATM(8), torch.randn(2, 8, 5, 4))


def test_reproduces_upstream() -> None:
    golden_models.assert_reproduces("patm_fc", lambda *, dropout, **arguments: FusedPATM(**arguments))


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dim, size", SIZES, ids=str)
def test_matches_reference(dim: int, size: tuple[int, int], training: bool, qkv_bias: bool) -> None:
    fused, exact = pair(dim, qkv_bias=qkv_bias)
    compare(fused.train(training), exact.train(training), normal(3, dim, *size))


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("batch", [1, 3])
def test_bands_of_rows(batch: int, count: int) -> None:
    """Fewer images than threads: a thread takes some rows of one, and its neighbours' where taps reach."""
    fused, exact = pair(16)
    x = normal(batch, 16, 37, 56)
    with threads(count):
        compare(fused, exact, x)
        grads = []
        for _ in range(2):
            fused.zero_grad()
            fused(x).square().sum().backward()
            grads.append([p.grad.clone() for p in fused.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


class Branch(nn.Module):
    """x + path mixer(norm(x)), in one function or of the modules."""

    def __init__(self, mixer: nn.Module, norm: nn.Module, path: Tensor) -> None:
        super().__init__()
        self.mixer, self.norm, self.path = mixer, norm, path

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.mixer, FusedPATM):
            return self.mixer.residual(x, self.norm, self.path, "auto")
        return x + self.path * self.mixer(self.norm(x))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("frozen", ["none", "norm", "phases", "all"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_norm_in_front_and_sum_behind(norm: str, frozen: str, channels_last: bool) -> None:
    branches = []
    for mixer in pair(8, qkv_bias=True):
        in_front = randomised(nn.BatchNorm2d(8) if norm == "batch" else nn.GroupNorm(1, 8)).double()
        branches.append(Branch(mixer, in_front, torch.tensor([0.0, 1.25, 1.25]).double().reshape(3, 1, 1, 1)))
        in_front.train(frozen not in ("norm", "all"))
        mixer.train(frozen not in ("phases", "all"))
    x = 1 + normal(3, 8, 5, 12)
    compare(*branches, x.contiguous(memory_format=torch.channels_last) if channels_last else x)


def test_compiles_whole_with_dynamic_shapes() -> None:
    torch._dynamo.reset()
    fused, _ = pair(4)
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    state = {name: value.clone() for name, value in fused.state_dict().items()}
    for shape in ((2, 4, 5, 6), (3, 4, 7, 4)):
        results = []
        for run in (fused, compiled):
            fused.load_state_dict(state)
            fused.zero_grad()
            x = normal(*shape).requires_grad_()
            run(x).sin().sum().backward()
            results.append([x.grad, *(p.grad.clone() for p in fused.parameters()), *fused.buffers()])
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_keeps_its_input_and_statistics() -> None:
    """Beside x: two BatchNorms', the branches' mean, and the moments of 32 channels."""
    fused = FusedPATM(32)
    own = {t.untyped_storage().data_ptr() for t in (*fused.parameters(), *fused.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(2, 32, 28, 28).contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fused(x)
    assert sum(storages.values()) <= x.nbytes + 8 * (32 + 32 * 32) + 4 * (2 * 2 + 2) * 32


def test_unusual_inputs() -> None:
    fused, exact = pair(6)
    compare(fused, exact, normal(3, 13, 9, 14)[1:, 1::2, 2:-1, ::3])
    fused.eval()
    empty = torch.zeros(0, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    fused.zero_grad()
    fused(empty).sum().backward()
    assert empty.grad.shape == empty.shape
    assert all((p.grad == 0).all() for p in fused.parameters())
    with torch.inference_mode():
        x = normal(2, 6, 4, 5)
        torch.testing.assert_close(fused(x), exact.eval()(x), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(fused.fuse_for_inference()(x), exact(x), rtol=1e-10, atol=1e-10)
