"""The .cu files through nvcc for every supported chip, without a GPU."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.predict import core, kept
from benchmarks.predict.core import ARCHS
from benchmarks.predict.tools import ROOT, Missing, key
from tests.aot.table import KEPT, SHARED_OF_SYSTEM, Demands, Kernel, cuobjdump, machine_code
from tests.ptx.parser import Module

THREADS = 128  # of every block, unless its pattern says otherwise
#: The package's as predictions compile them, and the kernels that test the emulated matrix instructions.
SOURCES = (*core.kernels(), ROOT / "tests" / "emulator" / "mma_kernels.cu")
DTYPES = {"d": "float64", "f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}
_TYPE = r"(d|f|6__half|13__nv_bfloat16)"
HAAR = re.compile(rf"((?:analysis|synthesis)_(?:rows|channels))I{_TYPE}Li(\d+)ELi(\d+)E")
REDUCE = re.compile(rf"(reduce_haar)I{_TYPE}Lb([01])ELi(\d+)E")
NORM_REDUCE = re.compile(rf"(norm_reduce_haar)I{_TYPE}Li(\d+)E")
GRADIENTS = re.compile(rf"(reduce_haar_(?:gradients|sums))I{_TYPE}(?:Li(\d)ELb([01])ELb([01])E)?E")
PHASE = re.compile(rf"(phase_[a-z_]+)I{_TYPE}(?:Li(\d+)E)?(?:Lb([01])E)?E")
PATM = re.compile(rf"(patm_[a-z_]+)I(?:{_TYPE})?(?:NS\d_5(?:Strip|Slice)I)?Li(\d+)E")
PATM_ROWS = re.compile(r"(patm_sum_rows)()()")
MMA = re.compile(rf"(matmul_16_bit|matmul_tf32_kernel)(?:I{_TYPE}E)?")
_MOVES = r"(\.CONSTANT|\.STRONG\.\w+)*$"

#: Matrix instructions of sm_80, which the later chips run, too.
PRODUCTS = {"float16": r"HMMA\.16816\.F32$", "bfloat16": r"HMMA\.16816\.F32\.BF16", "float32": r"HMMA\.1688\.F32\.TF32"}
#: Loads and stores of a wide form: whole pairs of channels, as many as the registers hold, and of outputs half of
#: that (16-bit elements one by one). The pass for batch statistics is limited by memory alone.
PHASE_ACCESSES = {
    **{("phase_forward", size): ("LDG.E.128", "STG.E.64") for size in (4, 8)},
    ("phase_forward", 2): ("LDG.E.64", "STG.E"),
    ("phase_backward", 4): ("LDG.E.64", "STG.E.64"), ("phase_backward", 2): ("LDG.E", "STG.E"),
    ("phase_backward", 8): ("LDG.E.128", "STG.E.128"),
    **{("phase_statistics", size): ("LDG.E.128", "STG.E.128") for size in (2, 4, 8)},
}  # fmt: skip
_SIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def haar(match: re.Match[str], arch: int) -> tuple[str, Demands]:
    """The forms move 16, 8 or 4 bytes at a time, and never more: nothing is aligned to that. No threads exchange
    anything by shared memory."""
    words = {16: r"\.128", 8: r"\.64", 4: ""}
    size = int(match[3]) * _SIZE[DTYPES[match[2]]]
    accesses = tuple(rf"{op}\.E{words.get(size, '')}" for op in ("LDG", "STG"))
    never = tuple(rf"(LDG|STG)\.E{bits}" for wider, bits in words.items() if bits and wider > size)
    return f"{match[3]}, {match[4]}", Demands(accesses=accesses, never=("BAR", *never), most_shared=0)


def reduce_haar(match: re.Match[str], arch: int) -> tuple[str, Demands]:
    """One block computes while the other waits for memory."""
    dtype, mma = DTYPES[match[2]], match[3] == "1"
    accesses, never = (r"LDGSTS\.E\.BYPASS", r"STG\.E\.128"), () if mma else ("HMMA|DMMA",)
    if mma:
        accesses += (r"LDSM\.16\.M88\.4", *([r"LDSM\.16\.MT88\.4"] if dtype != "float32" else []))
    products = (PRODUCTS[dtype] if mma else "DFMA" if dtype == "float64" else "FFMA",)
    return f"{('fma', 'mma')[mma]}, {match[4]}", Demands(blocks=2, accesses=accesses, products=products, never=never)


def norm_reduce_haar(match: re.Match[str], arch: int) -> tuple[str, Demands]:
    """The same; the image is stored by whole words as well as Z."""
    accesses = (r"LDGSTS\.E\.BYPASS", r"STG\.E\.128", r"LDSM\.16\.M88\.4")
    return match[3], Demands(blocks=2, accesses=accesses, products=(PRODUCTS[DTYPES[match[2]]],))


def gradients(match: re.Match[str], arch: int) -> tuple[str, Demands]:
    """Sums stay in registers, which limits the blocks of a multiprocessor."""
    if match[3] is None:
        return "", Demands(accesses=(r"LDG\.E",))
    accesses = (r"LDGSTS\.E\.BYPASS\.128", r"LDSM\.16\.M88\.4", r"LDSM\.16\.MT88\.4", r"STG\.E\.128")
    blocks = {"1": 3, "2": 2, "3": 2, "4": 1}[match[3]]
    form = f"{match[3]}, {('channels_last', 'along W')[int(match[4])]}{', norm' if match[5] == '1' else ''}"
    return form, Demands(blocks=blocks, accesses=accesses, products=(PRODUCTS[DTYPES[match[2]]],))


def phase(match: re.Match[str], arch: int) -> tuple[str, Demands]:
    """Sines are the approximate ones in half types alone."""
    kernel, dtype, wide = match[1], DTYPES[match[2]], match[4] == "1"
    accesses: tuple[str, ...] = ()
    of_chip = _SIZE[dtype] == 2 and kernel in ("phase_forward", "phase_backward")
    sines = (r"MUFU\.SIN", r"MUFU\.COS") if of_chip else ()
    never = ["RRO"] if of_chip else [r"MUFU\.(SIN|COS)", "RRO"]
    if wide and arch in (80, 90):  # later chips name their accesses otherwise
        accesses = tuple(re.escape(a) + _MOVES for a in PHASE_ACCESSES[kernel, _SIZE[dtype]])
        never += [r"(LDG|STG)\.E\.U16" + _MOVES] if kernel != "phase_backward" else []
    form = [*filter(None, [match[3]]), *([] if match[4] is None else ["wide" if wide else "narrow"])]
    return ", ".join(form), Demands(
        blocks=2 if dtype == "float64" else 3, accesses=accesses, products=sines, never=tuple(never)
    )


#: Threads of a block by channels; bytes of dynamic shared memory as the launches ask for them.
PATM_THREADS = {
    "patm_sum_products": lambda c: 512, "patm_branch_mlp": lambda c: 256, "patm_products": lambda c: 4 * c,
    "patm_statistics": lambda c: 4 * c, "patm_through_statistics": lambda c: 4 * c,
    "patm_mixed_sums": lambda c: 2 * c,
    "patm_branch_sums": lambda c: 4 * c, "patm_mix": lambda c: {64: 512, 96: 384, 128: 256}[c],
    "patm_mixed_gradients": lambda c: 4 * c, "patm_wave_gradients": lambda c: 4 * c,
    "patm_image_gradients": lambda c: {64: 512, 96: 384, 128: 512}[c],
}  # fmt: skip


def patm(match: re.Match[str], arch: int) -> tuple[str, Demands]:
    """Tensor cores on what came asynchronously; sums of partial results are in plain loads."""
    kernel, dtype = match[1], DTYPES[match[2] or "f"]
    if kernel in (
        "patm_sum_products", "patm_branch_mlp", "patm_statistics", "patm_through_statistics", "patm_mixed_sums"
    ):  # fmt: skip
        return match[3], Demands(accesses=(r"LDG\.E",))
    local = 0
    if kernel == "patm_image_gradients" and match[3] == "128":
        local = 64  # 80 sums of the weights' gradient stay in 128 registers; a dozen words beside them do not fit
    if kernel == "patm_wave_gradients":
        local = 16  # up to four words that are read once a tile
    accesses, products = (r"LDGSTS\.E\.BYPASS", r"LDSM\.16\.M"), (PRODUCTS[dtype],)
    return match[3], Demands(accesses=accesses, products=products, most_local=local)


def patm_rows(match: re.Match[str], arch: int) -> tuple[str, Demands]:
    return "", Demands(accesses=(r"LDG\.E",))


def mma(match: re.Match[str], arch: int) -> tuple[str, Demands]:
    moves = (r"LDGSTS\.E\.BYPASS\.128", r"LDSM\.16\.M88\.4", r"LDSM\.16\.MT88\.4")
    dtype = DTYPES[match[2] or "f"]
    return "", Demands(accesses=moves if dtype != "float32" else (), products=(PRODUCTS[dtype],))


def described(row: Kernel) -> Kernel:
    """With a readable name, a dtype and demands."""
    families = (
        (HAAR, haar), (REDUCE, reduce_haar), (NORM_REDUCE, norm_reduce_haar), (GRADIENTS, gradients), (PHASE, phase),
        (PATM, patm), (MMA, mma), (PATM_ROWS, patm_rows),
    )  # fmt: skip
    for pattern, of in families:
        if match := pattern.search(row.name):
            form, demands = of(match, row.arch)
            dtype = DTYPES[match[2] or "f"]
            name = f"cuda {match[1]}<{', '.join(filter(None, [dtype, form]))}>"
            threads = 256 if of in (gradients, patm_rows) else row.threads
            threads = PATM_THREADS[match[1]](int(match[3])) if of is patm else threads
            return replace(row, name=name, dtype=dtype, threads=threads, demands=demands)
    raise AssertionError(f"{row.name}: tests/aot/cuda_kernels.py does not say what this kernel is held to")


def rows_of(source: Path, arch: int) -> list[Kernel]:
    """Every kernel of a source for one chip: what it takes, its machine code, and what it is held to."""
    usage = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    binary = core.cubin(source, arch)
    code = machine_code(binary)
    reserved = SHARED_OF_SYSTEM if arch >= 90 else 0  # where the tool counts it
    return [
        described(
            Kernel(name, arch, "", THREADS, registers, max(shared - reserved, 0), stack + local, dict(code[name]))
        )
        for name, *numbers in re.findall(usage, cuobjdump(binary, "-res-usage"))
        for registers, stack, shared, local in [map(int, numbers)]
    ]


def keys() -> dict[str, str]:
    """`cuda FILE.cu, sm_NN` -> a key of what is compiled, and of the rules."""
    rules = key([Path(__file__).with_name(f"{name}.py") for name in ("table", "test_rules", "cuda_kernels")])
    return {name: kept.key(rules, core.key_of(source), arch) for name, (source, arch) in _points().items()}


def _points() -> dict[str, tuple[Path, int]]:
    return {f"cuda {source.name}, sm_{arch}": (source, arch) for source in SOURCES for arch in ARCHS}


def compile_new(anew: bool = False) -> tuple[dict[str, str], list[Kernel]]:
    """(:func:`keys`, the kernels of files that are new, or whose day it is: :mod:`benchmarks.predict.kept`)."""
    today, known = keys(), kept.read(KEPT)
    new = [point for name, point in _points().items() if not kept.serves(known.get(name), today[name], anew)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return today, [row for rows in pool.map(lambda point: rows_of(*point), new) for row in rows]


@functools.cache
def kernels() -> list[Kernel]:
    with _or_skipped():
        return compile_new()[1]


@functools.cache
def forms() -> list[Kernel]:
    """Every kernel's name and dtype, from the PTX that other tests need, too."""
    with _or_skipped():
        names = [name for text in core.ptx().values() for name in Module(text).names()]
    return [described(Kernel(name, core.PTX, "", THREADS, 0, 0, 0, {})) for name in names]


@contextmanager
def _or_skipped() -> Iterator[None]:
    try:
        yield
    except Missing as missing:
        pytest.skip(str(missing))
