"""The CUDA sources through nvcc for every supported chip, without a GPU: resources and machine code of each.

`python -m tests.test_cuda_aot` prints the resource table.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.emulator import build

SOURCES = build.ROOT / "csrc"
TEST_SOURCES = build.ROOT / "tests" / "emulator"
ARCHS = (80, 90, 100, 120)
THREADS_PER_BLOCK = 128
REGISTER_FILE = 65536  # 32-bit registers of one multiprocessor, on each of these chips
MAX_REGISTERS = 255  # of one thread
MAX_STATIC_SHARED = 48 * 1024
SHARED_OF_SM = {80: 164, 90: 228, 100: 228, 120: 100}  # KiB of one multiprocessor
SHARED_OF_SYSTEM = 1024  # bytes of each block
HAAR_KERNEL = re.compile(r"(analysis|synthesis)_(rows|channels)I(d|f|6__half|13__nv_bfloat16)Li(\d+)ELi(\d+)E")
REDUCE_KERNEL = re.compile(r"reduce_haarI(d|f|6__half|13__nv_bfloat16)Lb([01])ELi(\d+)E")
PHASE_KERNEL = re.compile(r"(phase_[a-z_]+)I(d|f|6__half|13__nv_bfloat16)(?:Li(\d+)E)?(?:Lb([01])E)?E")
# The wide forms: elements in 16 bytes.
WIDE = {"d": 2, "f": 4, "6__half": 8, "13__nv_bfloat16": 8}


@dataclass(frozen=True)
class Resources:
    source: str
    kernel: str
    arch: int
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int

    def row(self) -> str:
        return (
            f"{self.source:20} {self.kernel:44} sm_{self.arch:<4} registers {self.registers:4} "
            f"shared {self.shared:6} stack {self.stack:4} spills {self.spill_stores:4} / {self.spill_loads:<4}"
        )


def readable(mangled: str) -> str:
    if match := HAAR_KERNEL.search(mangled):
        direction, layout, dtype, per_word, levels = match.groups()
        return f"{direction}_{layout}<{dtype.lstrip('0123456789')}, {per_word}, {levels}>"
    if match := REDUCE_KERNEL.search(mangled):
        dtype, tensor_cores, tiles = match.groups()
        return f"reduce_haar<{dtype.lstrip('0123456789')}, {('fma', 'mma')[int(tensor_cores)]}, {tiles}>"
    if match := PHASE_KERNEL.search(mangled):
        kernel, dtype, pairs, wide = match.groups()
        form = [*([pairs] if pairs else []), *([("narrow", "wide")[int(wide)]] if wide else [])]
        return f"{kernel}<{', '.join([dtype.lstrip('0123456789'), *form])}>"
    return mangled


def sources() -> list[Path]:
    return sorted(SOURCES.glob("cuda/*/*.cu"))


def source_of(name: str) -> Path:
    (path,) = SOURCES.glob(f"cuda/*/{name}.cu")
    return path


@functools.cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="wavemix-aot-")  # removed with the process


@functools.cache
def compiled(source: Path, archs: tuple[int, ...] = ARCHS) -> tuple[Path, list[Resources]]:
    """The fat binary of one source, and what ptxas says of each kernel in it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH: install the CUDA toolkit to compile the kernels")
    target = Path(scratch().name) / f"{source.stem}.fatbin"
    command = [
        *(nvcc, "-std=c++17", "-fatbin", str(source), "-o", str(target)),
        *("-I", str(SOURCES), "-I", str(SOURCES / "include")),
        *("-Xptxas", "-v", "--threads", "2", "-Werror", "all-warnings"),
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-6000:]}"
    return target, parse(source.name, done.stderr)


def parse(source: str, log: str) -> list[Resources]:
    found = []
    for entry in re.split(r"Compiling entry function ", log)[1:]:
        kernel, arch = re.match(r"'(\S+)' for 'sm_(\d+)\w*'", entry).groups()
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
        ).groups()
        registers = re.search(r"Used (\d+) registers", entry)[1]
        shared = re.search(r"(\d+) bytes smem", entry)
        found.append(
            Resources(
                source, readable(kernel), int(arch), int(registers), int(shared[1]) if shared else 0,
                int(stack), int(stores), int(loads),
            )
        )  # fmt: skip
    return found


def machine_code(binary: Path, arch: int) -> dict[str, Counter[str]]:
    """kernel (mangled) -> how often each instruction occurs in its SASS."""
    tool = shutil.which("cuobjdump")
    top = build.toolkit()
    if tool is None and top is not None and (top / "bin" / "cuobjdump").is_file():
        tool = str(top / "bin" / "cuobjdump")
    if tool is None and (triton := importlib.util.find_spec("triton")) is not None:
        place = Path(next(iter(triton.submodule_search_locations))) / "backends/nvidia/bin/cuobjdump"
        tool = str(place) if place.is_file() else None
    if tool is None:
        pytest.skip("cuobjdump is neither on PATH, nor in the toolkit, nor in a triton package")
    command = [tool, "-sass", "-arch", f"sm_{arch}", str(binary)]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = re.split(r"\n\s*Function : (\S+)\n", sass)[1:]
    return {
        name: Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", body))
        for name, body in zip(functions[::2], functions[1::2], strict=True)
    }


@pytest.mark.parametrize("source", sources(), ids=lambda path: path.name)
def test_resources_stay_within_the_chips(source: Path) -> None:
    """No kernel spills or keeps local memory: an array that did not fit the registers shows here."""
    _, kernels = compiled(source)
    assert {kernel.arch for kernel in kernels} == set(ARCHS)
    wrong = [
        kernel.row()
        for kernel in kernels
        if kernel.stack or kernel.spill_stores or kernel.spill_loads
        or kernel.registers > MAX_REGISTERS
        or kernel.registers * THREADS_PER_BLOCK > REGISTER_FILE
        or kernel.shared > MAX_STATIC_SHARED
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong) + "\n\nall kernels:\n" + "\n".join(kernel.row() for kernel in kernels)


def test_haar_kernels_use_no_shared_memory() -> None:
    for source in (source_of("haar_analysis"), source_of("haar_synthesis")):
        assert not [kernel.row() for kernel in compiled(source)[1] if kernel.shared]


@pytest.mark.parametrize("direction", ["analysis", "synthesis"])
def test_wide_haar_kernels_move_16_bytes_at_a_time(direction: str) -> None:
    binary, _ = compiled(source_of(f"haar_{direction}"))
    seen = set()
    for name, instructions in machine_code(binary, 90).items():
        match = HAAR_KERNEL.search(name)
        assert match is not None, name
        _, layout, dtype, per_word, _ = match.groups()
        if int(per_word) != WIDE[dtype]:
            continue
        seen.add((layout, dtype))
        wide = {
            access: sum(count for op, count in instructions.items() if op.startswith(f"{access}.E.128"))
            for access in ("LDG", "STG")
        }
        assert all(wide.values()), f"{readable(name)}: {wide}\n{instructions}"
        assert not any(op.startswith(("LDL", "STL", "BAR")) for op in instructions), readable(name)
    assert seen == {(layout, dtype) for layout in ("rows", "channels") for dtype in WIDE}


def blocks_of_sm(kernel: Resources) -> int:
    granule = 8 * THREADS_PER_BLOCK  # registers are handed out by eights to each thread
    by_registers = REGISTER_FILE // (-(-kernel.registers * THREADS_PER_BLOCK // granule) * granule)
    return min(by_registers, SHARED_OF_SM[kernel.arch] * 1024 // (kernel.shared + SHARED_OF_SYSTEM))


@pytest.mark.parametrize("source", ["reduce_haar", "phase_aggregate", "phase_aggregate_backward"])
def test_two_blocks_fit_on_every_chip(source: str) -> None:
    """One block computes while the other waits for memory."""
    for kernel in compiled(source_of(source))[1]:
        assert blocks_of_sm(kernel) >= 2, kernel.row()


@pytest.mark.parametrize("source", ["phase_aggregate", "phase_aggregate_backward"])
def test_three_blocks_of_the_phase_kernels_fit_below_float64(source: str) -> None:
    for kernel in compiled(source_of(source))[1]:
        assert blocks_of_sm(kernel) >= 3 or "<d" in kernel.kernel, kernel.row()


# Bits of a wide form's loads and stores: whole pairs of channels, as many as the registers hold, and of outputs half of
# that (16-bit elements one by one). The pass for batch statistics is limited by memory alone.
PHASE_ACCESSES = {
    "phase_forward<float, wide>": ("LDG.E.128", "STG.E.64"),
    "phase_forward<half, wide>": ("LDG.E.64", "STG.E"),
    "phase_forward<double, wide>": ("LDG.E.128", "STG.E.64"),
    "phase_backward<float, wide>": ("LDG.E.64", "STG.E.64"),
    "phase_backward<half, wide>": ("LDG.E", "STG.E"),
    "phase_backward<double, wide>": ("LDG.E.128", "STG.E.128"),
    "phase_statistics<float, wide>": ("LDG.E.128", "STG.E.128"),
    "phase_statistics<half, wide>": ("LDG.E.128", "STG.E.128"),
    "phase_statistics<double, wide>": ("LDG.E.128", "STG.E.128"),
}


@pytest.mark.parametrize("arch", [80, 90])
def test_wide_phase_kernels_move_whole_words(arch: int) -> None:
    kinds = {"d": "double", "f": "float", "6__half": "half", "13__nv_bfloat16": "half"}
    seen = set()
    for source in ("phase_aggregate", "phase_aggregate_backward"):
        for name, instructions in machine_code(compiled(source_of(source))[0], arch).items():
            match = PHASE_KERNEL.search(name)
            assert match is not None, name
            kernel, dtype, _, wide = match.groups()
            assert not any(op.startswith(("LDL", "STL")) for op in instructions), readable(name)
            if wide != "1":
                continue
            key = f"{kernel}<{kinds[dtype]}, wide>"
            seen.add(key)
            found = {re.sub(r"\.(CONSTANT|STRONG\.\w+)", "", op) for op in instructions}
            assert found >= set(PHASE_ACCESSES[key]), f"{readable(name)}: {sorted(instructions)}"
            if kernel != "phase_backward":
                assert not found & {"LDG.E.U16", "STG.E.U16"}, f"{readable(name)}: {sorted(instructions)}"
    assert seen == set(PHASE_ACCESSES)


@pytest.mark.parametrize("arch", ARCHS)
def test_sines_are_not_the_approximate_ones(arch: int) -> None:
    for source in ("phase_aggregate", "phase_aggregate_backward"):
        for name, instructions in machine_code(compiled(source_of(source))[0], arch).items():
            assert not any(op.startswith(("MUFU.SIN", "MUFU.COS", "RRO")) for op in instructions), readable(name)


@pytest.mark.parametrize("arch", ARCHS)
def test_reduce_haar_uses_tensor_cores_and_wide_asynchronous_copies(arch: int) -> None:
    binary, _ = compiled(source_of("reduce_haar"))
    mma = {"6__half": "HMMA.16816.F32", "13__nv_bfloat16": "HMMA.16816.F32.BF16", "f": "HMMA.1688.F32.TF32"}
    seen = set()
    for name, instructions in machine_code(binary, arch).items():
        match = REDUCE_KERNEL.search(name)
        assert match is not None, name
        dtype, tensor_cores, _ = match.groups()
        seen.add((dtype, tensor_cores))
        expected = ["LDGSTS.E.BYPASS", "STG.E.128"]
        if tensor_cores == "1":
            expected += [mma[dtype], "LDSM.16.M88.4", *(["LDSM.16.MT88.4"] if dtype != "f" else [])]
        else:
            expected += ["DFMA" if dtype == "d" else "FFMA"]
            assert not any(op.startswith(("HMMA", "DMMA")) for op in instructions), readable(name)
        for instruction in expected:
            assert any(op.startswith(instruction) for op in instructions), (
                f"{readable(name)}: no {instruction}: {sorted(instructions)}"
            )
        assert not any(op.startswith(("LDL", "STL")) for op in instructions), readable(name)
    assert seen == {("d", "0"), ("f", "0"), ("f", "1"), ("6__half", "1"), ("13__nv_bfloat16", "1")}


@pytest.mark.parametrize("arch", [80, 90])
def test_mma_wrappers_become_tensor_core_instructions(arch: int) -> None:
    """The same kernels that test the emulated forms, in PTX."""
    binary, _ = compiled(TEST_SOURCES / "mma_kernels.cu", (80, 90))
    code = machine_code(binary, arch)
    movement = ("LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS.E.BYPASS.128")
    expected = {
        "matmul_16_bitI6__half": ("HMMA.16816.F32", *movement),
        "matmul_16_bitI13__nv_bfloat16": ("HMMA.16816.F32.BF16", *movement),
        "matmul_tf32_kernel": ("HMMA.1688.F32.TF32",),
    }
    for part, instructions in expected.items():
        (found,) = (counts for name, counts in code.items() if part in name)
        for instruction in instructions:
            assert any(op.startswith(instruction) for op in found), f"{part}: no {instruction}: {sorted(found)}"


if __name__ == "__main__":
    for path in sources():
        print("\n".join(kernel.row() for kernel in compiled(path)[1]))
