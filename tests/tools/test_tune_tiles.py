"""Tiles of Triton's kernels: which one is chosen, and what happens where one does not fit the device.

The kernels run in Triton's interpreter, behind a launch that says what a GPU would: that a tile needs too much, that it
spills, how long it takes.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tools.helpers import python
from wavemix_kernels import cache
from wavemix_kernels.ops import choose, tuned
from wavemix_kernels.ops.common import triton_launch
from wavemix_kernels.ops.patm import branches

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from triton.runtime.errors import OutOfResources

from wavemix_kernels.ops.patm.triton_branches import SumConfig, search_space
from wavemix_kernels.tune import tune

CPU = torch.device("cpu")
SHAPE = (2, 40, 3, 5)
DEFAULT = 64  # channels of the default tile for 40


@dataclasses.dataclass
class Gpu:
    """Launches by the channels of their tiles."""

    too_large: set[int] = dataclasses.field(default_factory=set)
    spills: dict[int, int] = dataclasses.field(default_factory=dict)
    launched: list[int] = dataclasses.field(default_factory=list)

    def run(self, launch: triton_launch.Launch, like: Tensor) -> None:
        channels = launch.constants["CHANNELS"]
        self.launched.append(channels)
        if channels in self.too_large:
            raise OutOfResources(200_000, 101_376, "shared memory")
        launch.kernel[launch.grid](*launch.args, **launch.constants)
        for observe in triton_launch.observers:
            observe(SimpleNamespace(n_spills=self.spills.get(channels, 0)))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, device: str) -> Iterator[Gpu]:
    if device != "cpu":
        pytest.skip("the interpreter stands for a GPU")
    gpu = Gpu()
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.setitem(choose.AUTO, "cpu", ("triton", "reference"))
    monkeypatch.setattr(triton_launch.Launch, "run", lambda launch, like: gpu.run(launch, like))
    monkeypatch.setattr(tuned._State, "watching", False)
    cache.forget()
    tuned.forget()
    yield gpu
    monkeypatch.undo()
    cache.forget()
    tuned.forget()


def arguments() -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    images = (torch.randn(SHAPE).contiguous(memory_format=torch.channels_last) for _ in range(3))
    return *images, torch.randn(3, *SHAPE[:2])


def check(backend: str = "auto") -> None:
    *images, a = arguments()
    want = sum(image * weight[:, :, None, None] for image, weight in zip(images, a, strict=True))
    torch.testing.assert_close(branches.branch_sum(*images, a, backend), want)


def key() -> tuned.Key:
    out = torch.empty(SHAPE).contiguous(memory_format=torch.channels_last)
    return tuned.key_of("branch_sum tile", (out,), (False, False))


# --- A tile that does not fit --------------------------------------------------------------------------------


def test_the_next_tile_serves_and_stays(gpu: Gpu, caplog: pytest.LogCaptureFixture) -> None:
    gpu.too_large = {DEFAULT, 16}
    check()
    assert gpu.launched == [DEFAULT, DEFAULT, 16, 32]  # once without, once with notes
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert lines[0] == (
        "branch_sum: the default tile does not fit cpu (out of resource: shared memory, Required: 200000, Hardware "
        "limit: 101376. Reducing block sizes or `num_stages` may help.): trying another"
    )
    assert "SumConfig(positions=128, channels=16, num_warps=4) does not fit" in lines[1]
    gpu.launched.clear()
    check()
    check("triton")
    assert gpu.launched == [32, 32]
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 2


def test_after_the_measured_tile_its_next_best_then_the_default(gpu: Gpu) -> None:
    best, second = SumConfig(64, 32), SumConfig(128, 16)
    tuned.put(CPU, key(), [best, second])
    check()
    assert gpu.launched == [32]
    gpu.launched.clear()
    gpu.too_large = {32}
    check()
    assert gpu.launched == [32, 32, 16]
    gpu.launched.clear()
    gpu.too_large = {32, 16}
    check()
    assert gpu.launched == [16, DEFAULT]


def test_tiles_of_other_fields_are_left_out(gpu: Gpu, caplog: pytest.LogCaptureFixture) -> None:
    tuned.put(CPU, key(), [[1, 2, 3, 4, 5]])
    check()
    check()
    assert gpu.launched == [DEFAULT, DEFAULT]
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert line.startswith("tuned: left out the tiles of branch_sum tile (")


def test_where_no_tile_fits_the_next_backend_serves(gpu: Gpu, caplog: pytest.LogCaptureFixture) -> None:
    gpu.too_large = {16, 32, 64, 128}
    check()
    assert any("branch_sum: no tile of backend 'triton' fits" in line for line in caplog.messages), caplog.messages
    gpu.launched.clear()
    check()
    assert not gpu.launched
    with pytest.raises(RuntimeError, match="branch_sum: backend='triton' cannot serve this call: no tile of"):
        check("triton")


def test_other_errors_are_raised(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(gpu, "run", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        check()


# --- Tuning --------------------------------------------------------------------------------------------------


class Sum(nn.Module):
    def forward(self, h: Tensor, w: Tensor, c: Tensor, a: Tensor) -> Tensor:
        return branches.branch_sum(h, w, c, a, "auto")


class Clock:
    """Seconds by the tile that a step launches, or of the reference."""

    def __init__(self, gpu: Gpu, seconds: dict[int, float], reference: float) -> None:
        self.gpu, self.seconds, self.reference = gpu, seconds, reference

    def repeats(self, step: Any) -> int:
        return 1

    def sample(self, step: Any, repeats: int) -> float:
        self.gpu.launched.clear()
        step()
        return sum(self.seconds[channels] for channels in self.gpu.launched) or self.reference


def tuned_by(gpu: Gpu, seconds: dict[int, float], reference: float) -> dict[str, Any]:
    report = tune(Sum(), *arguments(), train=False, clock=Clock(gpu, seconds, reference))
    return {result.key[0]: result for result in report.results}


def test_the_fastest_tile_that_fits_and_does_not_spill(gpu: Gpu) -> None:
    gpu.too_large, gpu.spills = {128}, {16: 40}
    results = tuned_by(gpu, {64: 3.0, 32: 2.0}, 4.0)
    tile = results["branch_sum tile"]
    assert (tile.default, tile.chosen) == (None, SumConfig(64, 32))
    assert tile.left_out[SumConfig(16, 128)].startswith("OutOfResources: out of resource: shared memory")
    assert tile.left_out[SumConfig(128, 16)] == "it spills 40 registers, the default 0"
    assert set(tile.times) == {None, SumConfig(64, 32), SumConfig(32, 64)}
    assert results["branch_sum"].chosen == "triton"
    for _ in range(2):
        gpu.launched.clear()
        check()
        assert gpu.launched == [32]
        cache.forget()  # the second time as another process, from the file
        tuned.forget()


def test_a_backend_is_timed_with_its_best_tile(gpu: Gpu) -> None:
    """The default tile alone would lose against the reference."""
    seconds = {64: 3.0, 32: 1.0, 16: 5.0, 128: 5.0}
    assert tuned_by(gpu, seconds, 2.0)["branch_sum"].chosen == "triton"
    assert tuned_by(gpu, seconds, 0.5)["branch_sum"].chosen != "triton"


def test_a_default_that_does_not_fit_gives_way(gpu: Gpu) -> None:
    gpu.too_large = {DEFAULT}
    tile = tuned_by(gpu, {16: 1.0, 32: 2.0, 128: 3.0}, 9.0)["branch_sum tile"]
    assert tile.left_out[None].startswith("OutOfResources")
    assert tile.chosen == SumConfig(128, 16)
    gpu.launched.clear()
    check()
    assert gpu.launched == [16]


def test_the_space_holds_other_tiles_than_the_default() -> None:
    assert {config.channels for config in search_space()} > {DEFAULT}


# --- Compiled for a chip, launched by a stub -----------------------------------------------------------------


@pytest.mark.prove
@pytest.mark.parametrize("too_many_threads, chosen, left_out, default_fits", [
    ([], "SumConfig(positions=64, channels=32, num_warps=4)", {128: "it spills 12 registers, the default 0"}, True),
    ([64, 32], "SumConfig(positions=16, channels=128, num_warps=4)", {
        32: "OutOfResources: out of resource: threads, Required: 128, Hardware limit: 64. Reducing block sizes or "
            "`num_stages` may help.",
    }, False),
])  # fmt: skip
def test_on_a_stub_of_a_driver(
    tmp_path: Any, too_many_threads: list[int], chosen: str, left_out: dict[int, str], default_fits: bool
) -> None:
    """The same with what Triton compiled: its limits are those of loading, its spills those of the binary."""
    done = python(
        "-m", "tests.tools.stub_gpu", *map(str, too_many_threads),
        TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path / "triton"), WAVEMIX_KERNELS_CACHE=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["chosen"] == {"branch_sum": "triton", "branch_sum tile": chosen}
    for channels, why in left_out.items():
        assert found["left out"][str(SumConfig(2048 // channels, channels))] == why
    assert ("None" in found["timed"]["branch_sum tile"]) == default_fits
    assert [("the default tile does not fit" in line) for line in found["lines"]] == [True] * (not default_fits)
    assert found["seconds of a call"] == pytest.approx(2e-6 if default_fits else 1e-6)
