"""Threads, coroutines and processes: a choice of backend is its block's own, and results are right on all of them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import wavemix_kernels as wk
from tests.models.subjects import SUBJECTS, normal
from wavemix_kernels import backends, wavemlp


def test_blocks_of_two_threads_overlap() -> None:
    """The first to begin is the first to end."""
    began, ended = threading.Event(), threading.Event()
    seen: list[str] = []

    def other() -> None:
        began.wait()
        with wk.backend("cpu"):
            ended.set()
            seen.append(backends.requested())
            first.join()
            seen.append(backends.requested())
        seen.append(backends.requested())

    def one() -> None:
        with wk.backend("reference"):
            began.set()
            ended.wait()
            seen.append(backends.requested())

    first, second = threading.Thread(target=one), threading.Thread(target=other)
    second.start()
    first.start()
    second.join()
    assert sorted(seen) == ["auto", "cpu", "cpu", "reference"]
    assert backends.requested() == "auto"


def test_one_object_is_used_nested() -> None:
    choice = wk.backend("reference")
    with choice:
        with wk.backend("cpu"), choice:
            assert backends.requested() == "reference"
        assert backends.requested() == "reference"
    assert backends.requested() == "auto"


def test_coroutines_take_turns_inside_of_their_blocks() -> None:
    async def run(name: str, pause: float) -> None:
        with wk.backend(name):
            await asyncio.sleep(pause)

    async def both() -> None:
        await asyncio.gather(run("reference", 0.0), run("cpu", 0.01))

    asyncio.run(both())
    assert backends.requested() == "auto"


def test_a_generator_is_left_inside_of_its_block() -> None:
    def batches() -> Iterator[int]:
        with wk.backend("reference"):
            yield from range(3)

    running = batches()
    next(running)
    with wk.backend("cpu"):
        running.close()
        assert backends.requested() == "cpu"
    assert backends.requested() == "auto"


def test_a_block_ends_on_another_thread() -> None:
    choice = wk.backend("reference")
    choice.__enter__()
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match=r"backend\('reference'\).*another thread"):
        pool.submit(choice.__exit__).result()
    choice.__exit__()
    assert backends.requested() == "auto"


def test_a_compiled_model_follows_the_choice_of_each_thread() -> None:
    """The same graph must not serve two backends."""
    chosen: list[str] = []

    def watching(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        arguments = [a for node in graph.graph.nodes for a in node.args if isinstance(a, str) and a in backends.NAMES]
        chosen.extend(arguments or ["reference"])
        return graph

    compiled = torch.compile(wk.haar_dwt2d, backend=watching, fullgraph=True)
    x = normal(1, 2, 4, 4)
    expected = wk.haar_dwt2d(x)
    compiled(x)
    with wk.backend("cpu"):
        torch.testing.assert_close(compiled(x), expected)
        with ThreadPoolExecutor(1) as pool:
            torch.testing.assert_close(pool.submit(compiled, x).result(), expected)
            torch.testing.assert_close(pool.submit(wk.backend("reference")(compiled), x).result(), expected)
    compiled(x)
    assert chosen == ["auto", "cpu", "reference"]


def test_a_compiled_function_has_a_block_inside() -> None:
    def function(x: Tensor) -> Tensor:
        with wk.backend("reference"):
            return wk.haar_dwt2d(x)[0]

    x = normal(1, 2, 4, 4)
    torch.testing.assert_close(torch.compile(function, backend="eager", fullgraph=True)(x), function(x))
    assert backends.requested() == "auto"


@pytest.mark.parametrize("name", ["waveblock 2 deconv", "patm", "wave block"])
def test_backward_runs_on_another_thread_after_the_block(name: str) -> None:
    """autograd's threads, and a caller's."""
    module = SUBJECTS[name].fused().double()
    grads = []
    for backend in ("reference", "cpu"):
        x = SUBJECTS[name].x().requires_grad_()
        torch.manual_seed(0)
        with wk.backend(backend):
            out = module(x)
        kinds = {type(node).__name__ for node in ancestors(out)}
        assert any("Convolution" in kind for kind in kinds) == (backend == "reference")
        with ThreadPoolExecutor(1) as pool:
            pool.submit(out.sum().backward).result()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def ancestors(out: Tensor) -> list[torch.autograd.graph.Node]:
    found, waiting = [], [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            found.append(node)
            waiting += [before for before, _ in node.next_functions]
    return found


def test_a_checkpointed_block_runs_again_on_the_backend_of_its_decorator() -> None:
    """Recomputation happens in backward, after a `with` block has ended."""
    block = wk.FusedWaveblock(final_dim=8, ff_channel=8, dropout=0.0).double()
    grads = []
    for function in (wk.backend("reference")(block), block):
        x = normal(2, 8, 8, 8).requires_grad_()
        checkpoint(function, x, use_reentrant=False).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def served() -> list[nn.Module]:
    torch.manual_seed(0)
    net = wavemlp.WaveNet([1, 1, 1, 1], embed_dims=[8, 8, 16, 16], mlp_ratios=[2] * 4, num_classes=5).eval()
    return [wk.export_form(net), wk.fuse_for_inference(net), net, wk.wavemix.Level2Waveblock(final_dim=8).eval()]


def test_a_pool_of_threads_serves_several_models() -> None:
    """Kernels, their caches and the choice of backends are shared by all threads."""
    models = served()
    images = [normal(2, 8 if i % 4 == 3 else 3, 32, 32, seed=i, dtype=torch.float32) for i in range(64)]
    with torch.no_grad():
        expected = [models[i % 4](x) for i, x in enumerate(images)]

    def serve(i: int) -> Tensor:
        with torch.no_grad(), wk.backend("cpu" if i % 8 == 2 else "auto"):
            return models[i % 4](images[i])

    with ThreadPoolExecutor(8) as pool:
        for got, want in zip(pool.map(serve, range(64)), expected, strict=True):
            torch.testing.assert_close(got, want)


FORKED = """
import multiprocessing, torch
import wavemix_kernels as wk

block = wk.FusedWaveblock(final_dim=32, dropout=0.0)
x = torch.randn(4, 32, 64, 64)

def run(answers, threads):
    torch.set_num_threads(threads)
    out = block(x.requires_grad_())
    out.sum().backward()
    answers.put((out.sum().item(), wk.haar_dwt2d(x.detach(), 2)[0].sum().item()))

class Here:
    put = lambda self, value: setattr(self, "value", value)

if __name__ == "__main__":
    here = Here()
    run(here, 2)
    answers = multiprocessing.get_context("fork").SimpleQueue()
    child = multiprocessing.get_context("fork").Process(target=run, args=(answers, 1))
    child.start()
    got = answers.get()
    child.join()
    assert all(abs(a - b) <= 1e-4 * abs(b) + 1e-2 for a, b in zip(got, here.value)), (got, here.value)
"""


def test_a_process_forks_after_kernels_ran_on_several_threads() -> None:
    """On one thread, as a DataLoader's workers run: GCC's OpenMP has no others in the child, and torch's own operators
    hang there on two."""
    run = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


LOADED = """
import torch
from torch.utils.data import DataLoader, Dataset
import wavemix_kernels as wk

class Images(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.cat([t.flatten() for t in wk.haar_dwt2d(torch.full((1, 3, 256, 256), float(i)))[1]])

if __name__ == "__main__":
    torch.set_num_threads(2)
    wk.haar_dwt2d(torch.ones(8, 16, 256, 256))
    for batch in DataLoader(Images(), batch_size=4, num_workers=2):
        assert batch.abs().max() == 0
"""


def test_workers_of_a_data_loader_transform_images() -> None:
    run = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
