"""Ahead-of-time proof of the Triton kernels of Haar and PATM: compiled for real chips without one, and read back from
the cubin.

Run as a script (`python -m tests.test_triton_aot`) it prints the table as JSON. The test runs it as a process of
its own: kernels defined under TRITON_INTERPRET=1, which the CPU test session sets, do not compile.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.triton import search_spaces
from wavemix_kernels.ops.haar.tiles import MAX_LEVELS, TileConfig

ROOT = Path(__file__).resolve().parent.parent
#: Shared memory one block may have, bytes (CUDA C++ programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
MAX_REGISTERS = 255
BIG = (64, 192, 64, 64)  # dense, every size and stride a multiple of a vector at all levels
ODD = (3, 35, 55, 57)

pytestmark = pytest.mark.timeout(1800)  # a minute and a half on two idle cores


@dataclass(frozen=True)
class Point:
    arch: int
    dtype: str
    layout: str
    levels: int
    synthesis: bool
    config: TileConfig | None = None  # None: the default of the shape
    shape: tuple[int, int, int, int] = BIG
    edge: int = 0
    add: bool = False

    @property
    def aligned(self) -> bool:
        return self.shape == BIG and self.layout != "strided"


def points() -> list[Point]:
    """The whole search space on sm_90 in fp16; the default tiles of the other chips, dtypes and cases."""
    both = (False, True)
    dense = ("rows", "channels")
    found = [
        Point(90, "float16", layout, levels, synthesis, config)
        for layout in dense
        for levels in range(1, MAX_LEVELS + 1)
        for config in search_spaces.haar(layout, levels, 2)
        for synthesis in both
    ]
    found += [
        Point(arch, "bfloat16", layout, levels, synthesis)
        for arch in (80, 100, 120)
        for layout, levels in (("rows", 1), ("channels", 4))
        for synthesis in both
    ]
    found += [
        Point(90, dtype, layout, levels, synthesis)
        for dtype, levels in (("float32", 1), ("float64", 3))
        for layout in dense
        for synthesis in both
    ]
    found += [Point(90, "float32", layout, 2, s, shape=ODD, edge=1) for layout in (*dense, "strided") for s in both]
    found += [Point(90, "float16", layout, 1, True, add=True) for layout in dense]
    return found


@dataclass(frozen=True)
class PatmPoint:
    """A default tile on the channels of a projection to five images: slices, 16-byte vectors aligned."""

    arch: int
    dtype: str
    kernel: str  # "forward", "backward" of phase_aggregate; "sum", "sum backward" of branch_sum

    def launch(self) -> Any:
        import torch

        from wavemix_kernels.ops.patm import triton_branches as branch_sum
        from wavemix_kernels.ops.patm import triton_phases, triton_phases_backward, waves

        dtype = getattr(torch, self.dtype)
        n, c, h, w = 64, 64, 56, 56
        last = torch.channels_last
        z, theta, third, d_z, d_theta = (
            torch.empty(n, 5 * c, h, w, dtype=dtype, device="meta").to(memory_format=last).chunk(5, 1)
        )
        image = torch.empty(n, c, h, w, dtype=dtype, device="meta").to(memory_format=last)
        if self.kernel.startswith("sum"):
            grad = image if "backward" in self.kernel else None
            a = torch.empty(3, n, c, device="meta")
            return branch_sum.launch(image, (image, image, third), a, grad)[0]
        vector, taps = (torch.empty(*size, device="meta") for size in ((c,), (c, 2, 1, 7)))
        branch = waves.Branch(z, theta, vector, vector, taps)
        if self.kernel == "forward":
            return triton_phases.forward_launch(image, branch, third)[0]
        weights = torch.empty(n, c, device="meta")
        cotangent = waves.Cotangent(image, weights, weights, weights, vector)
        return triton_phases_backward.backward_launch(d_z, d_theta, third, cotangent, branch)[0]


def patm_points() -> list[PatmPoint]:
    """What models run: fp64 is there for checks, and spills."""
    both = ("forward", "backward")
    found = [PatmPoint(90, dtype, kernel) for dtype in ("float32", "float16", "bfloat16") for kernel in both]
    found += [PatmPoint(arch, "float16", kernel) for arch in (80, 100, 120) for kernel in both]
    return found + [
        PatmPoint(90, dtype, kernel) for dtype in ("float32", "bfloat16") for kernel in ("sum", "sum backward")
    ]


# ------------------------------------------------------------------------------------------ the child process


def allocate(shape: tuple[int, ...], point: Point) -> Any:
    """A tensor without storage; its null address counts as 16-byte aligned, as an allocator's does."""
    import torch

    dtype = getattr(torch, point.dtype)
    if point.layout == "strided":
        return torch.empty((*shape[:-1], 2 * shape[-1]), dtype=dtype, device="meta")[..., ::2]
    if point.layout == "rows":
        return torch.empty(shape, dtype=dtype, device="meta")
    order = (0, 3, 4, 1, 2) if len(shape) == 5 else (0, 2, 3, 1)
    dense = torch.empty([shape[axis] for axis in order], dtype=dtype, device="meta")
    return dense.permute([order.index(axis) for axis in range(len(shape))])


def compile_launch(arch: int, launch: Any) -> dict[str, Any]:
    """Compiles one launch exactly as JITFunction specialises it, and reads the cubin's resources and SASS."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Target:
        """The part of a driver that compiling asks for; "device" numbers are architectures."""

        def get_current_device(self) -> int:
            return arch

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

    driver.set_active(Target())
    start = time.perf_counter()
    compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants)
    seconds = time.perf_counter() - start

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(option: str) -> str:
            done = subprocess.run([cuobjdump, option, file.name], capture_output=True, text=True, check=True)
            return done.stdout + done.stderr

        usage, sass = dump("-res-usage"), dump("-sass")
    registers, local = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "LOCAL"))  # type: ignore[index]
    constants = {name: str(value) if name == "REAL" else value for name, value in launch.constants.items()}
    return {
        "constants": constants,
        "registers": registers,
        "local": local,
        "shared": compiled.metadata.shared,
        "accesses": dict(
            Counter(re.findall(r"\b((?:LD|ST)[GLS]\.[.\w]+|LDL|STL|BAR\.SYNC|MUFU\.(?:SIN|COS))\b", sass))
        ),
        "seconds": round(seconds, 2),
    }


def compile_point(point: Point) -> dict[str, Any]:
    from wavemix_kernels.ops.haar import triton_analysis, triton_plan, triton_synthesis

    bands = [triton_plan.band_shape(point.shape, level) for level in range(1, point.levels + 1)]
    image, ll = allocate(point.shape, point), allocate((*point.shape[:2], *bands[-1][3:]), point)
    highs, options = [allocate(band, point) for band in bands], {"edge": point.edge, "config": point.config}
    if point.synthesis:
        add = allocate(point.shape, point) if point.add else None
        launch = triton_synthesis.launch(image, ll, highs, add=add, **options)
    else:
        launch = triton_analysis.launch(image, ll, highs, **options)
    return {**asdict(point), "aligned": point.aligned, **compile_launch(point.arch, launch)}


def compile_patm_point(point: PatmPoint) -> dict[str, Any]:
    return {**asdict(point), **compile_launch(point.arch, point.launch())}


def main() -> None:
    # Two processes: a compilation is one thread of Python, LLVM and ptxas.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        haar, patm = pool.map(compile_point, points(), chunksize=4), pool.map(compile_patm_point, patm_points())
        json.dump({"haar": list(haar), "patm": list(patm)}, sys.stdout)


# ------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def tables(request: pytest.FixtureRequest) -> dict[str, list[dict[str, Any]]]:
    pytest.importorskip("triton", reason="Triton is not installed: pip install wavemix-kernels[triton]")
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_CURRENT_TEST")}
    environment["TRITON_CACHE_DIR"] = str(ROOT / "build/triton-aot")  # a second run compiles only what changed
    start = time.perf_counter()
    command = [sys.executable, "-m", "tests.test_triton_aot"]
    # A session of its own, so that a timeout takes the compiling processes along.
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, errors = process.communicate()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"compiling failed:\n{errors[-4000:]}"
    found = json.loads(output)
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{sum(map(len, found.values()))} Triton kernels compiled in {time.perf_counter() - start:.0f} s")
    return found


@pytest.fixture(scope="module")
def table(tables: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return tables["haar"]


def line(row: dict[str, Any]) -> str:
    c, direction = row["constants"], "synthesis" if row["synthesis"] else "analysis"
    return (
        f"sm_{row['arch']} {row['dtype']} {row['layout']} L{row['levels']} {direction} "
        f"{c['ROWS']}x{c['COLS']}x{c['PLANES']}, {c['num_warps']} warps: {row['registers']} registers, "
        f"{row['local']} B local, {row['shared']} B shared, {row['accesses']}, {row['seconds']} s"
    )


def fail_on(bad: list[dict[str, Any]], table: list[dict[str, Any]], what: str) -> None:
    if bad:
        pytest.fail(
            f"{len(bad)} of {len(table)} kernels {what}:\n" + "\n".join(map(line, bad))
            + "\n\nall:\n" + "\n".join(map(line, table)), pytrace=False,
        )  # fmt: skip


def test_every_point_compiles(table: list[dict[str, Any]]) -> None:
    assert len(table) == len(points())
    assert {row["arch"] for row in table} == set(SHARED_LIMIT)


def test_no_spills(table: list[dict[str, Any]]) -> None:
    spilled = [
        row
        for row in table
        if row["local"] or row["registers"] > MAX_REGISTERS or any(a[:3] in ("LDL", "STL") for a in row["accesses"])
    ]
    fail_on(spilled, table, "spill registers")


def test_shared_memory_within_limits(table: list[dict[str, Any]]) -> None:
    fail_on([row for row in table if row["shared"] > SHARED_LIMIT[row["arch"]]], table, "want too much shared memory")


def global_accesses(row: dict[str, Any]) -> dict[str, int]:
    return {name: count for name, count in row["accesses"].items() if name[:3] in ("LDG", "STG")}


def test_aligned_images_move_in_16_byte_accesses(table: list[dict[str, Any]]) -> None:
    """All of level 1; of deeper transforms the finest level at least, whose share is three quarters."""
    aligned = [row for row in table if row["aligned"]]
    assert aligned

    def narrow(row: dict[str, Any]) -> bool:
        names = global_accesses(row)
        wide = {kind for kind in ("LDG", "STG") if any(n.startswith(kind) and ".128" in n for n in names)}
        return wide != {"LDG", "STG"} or (row["levels"] == 1 and any(".128" not in n for n in names))

    fail_on([row for row in aligned if narrow(row)], table, "use narrower accesses")


def test_level_one_is_thread_local(table: list[dict[str, Any]]) -> None:
    """No exchange at all, but for the row-major synthesis, which stores whole rows through shared memory."""
    local = [
        row
        for row in table
        if row["aligned"] and row["levels"] == 1 and not (row["layout"] == "rows" and row["synthesis"])
    ]
    assert local
    fail_on([row for row in local if row["shared"] or "BAR.SYNC" in row["accesses"]], table, "exchange between threads")


def test_patm_kernels_leave_room(tables: dict[str, list[dict[str, Any]]]) -> None:
    """No spills; ten warps fit a multiprocessor's 64K registers, in two blocks at least; no approximate sines."""
    table = tables["patm"]
    assert len(table) == len(patm_points())
    listing = "\n".join(map(str, table))
    for row in table:
        warps = row["constants"]["num_warps"]
        blocks = 65536 // (-(-row["registers"] // 8) * 8 * 32 * warps)
        assert row["local"] == 0, f"{row} spills, of\n{listing}"
        assert not {"LDL", "STL"} & {name[:3] for name in row["accesses"]}, f"{row} spills, of\n{listing}"
        assert blocks >= 2, f"{row} leaves no room for two blocks, of\n{listing}"
        assert blocks * warps >= 10, f"{row} leaves room for {blocks * warps} warps, of\n{listing}"
        assert row["shared"] * blocks <= SHARED_LIMIT[row["arch"]], f"{row} wants much shared memory, of\n{listing}"
        assert not any(name.startswith("MUFU") for name in row["accesses"]), f"{row} approximates, of\n{listing}"


def test_patm_kernels_move_vectors(tables: dict[str, list[dict[str, Any]]]) -> None:
    """A thread's channels in one access: of branch_sum 16 bytes; of phase_aggregate four channels forward and two
    backward, which is what registers leave room for; outputs are half as many."""
    bytes_of = {4: "", 8: ".64", 16: ".128"}
    listing = "\n".join(map(str, tables["patm"]))
    for row in tables["patm"]:
        itemsize = 4 if row["dtype"] == "float32" else 2
        load, store = {"forward": (4, 2), "backward": (2, 2)}.get(row["kernel"], (16 // itemsize,) * 2)
        assert "LDG.E" + bytes_of[load * itemsize] in row["accesses"], f"{row} loads narrowly, of\n{listing}"
        assert "STG.E" + bytes_of[store * itemsize] in row["accesses"], f"{row} stores narrowly, of\n{listing}"
        assert "STG.E.U16" not in row["accesses"], f"{row} stores single channels, of\n{listing}"


if __name__ == "__main__":
    main()
