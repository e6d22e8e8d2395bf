"""The compiled kernels ahead of time, without a GPU: each rule, over the table of all kernels and chips.

Kernels that kept the rules before, and have not changed, are not compiled again (:mod:`benchmarks.predict.kept`).
`python -m tests.aot.test_rules --anew` compiles and prints all; with `--renew` the program writes which kept the rules.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from benchmarks.predict import kept
from benchmarks.predict.core import ARCHS
from tests.aot import cuda_kernels, test_rocm, triton_kernels
from tests.aot.table import KEPT, MAX_REGISTERS, SHARED_OF_SM, SHARED_OF_SYSTEM, Demands, Kernel

pytestmark = pytest.mark.prove
STATIC = 48 * 1024  # bytes of shared memory, the most that nvcc gives a block


def spills(kernel: Kernel) -> Iterator[str]:
    """No local memory: an array that did not fit the registers shows here, too."""
    if kernel.local > kernel.demands.most_local or (kernel.has("LDL|STL") and not kernel.demands.most_local):
        yield f"{kernel.local} bytes of local memory"
    if kernel.registers > MAX_REGISTERS:
        yield f"{kernel.registers} registers"


def fits(kernel: Kernel) -> Iterator[str]:
    """In registers and shared memory; in twos and threes where one is to compute while another waits for memory."""
    demands, most = kernel.demands, SHARED_OF_SM[kernel.arch] - SHARED_OF_SYSTEM
    if demands.most_shared is not None:
        most = min(most, demands.most_shared)
    if kernel.shared > most:
        yield f"more than {most} bytes of shared memory"
    if kernel.name.startswith("cuda") and kernel.shared > STATIC:
        yield f"more than {STATIC} bytes of static shared memory"
    if kernel.blocks < demands.blocks or kernel.blocks * kernel.threads < 32 * demands.warps:
        yield f"room for {kernel.blocks} blocks, expected {demands.blocks} and {demands.warps} warps"


def accesses(kernel: Kernel) -> Iterator[str]:
    """Memory moves in wide accesses."""
    yield from (f"no {pattern}" for pattern in kernel.demands.accesses if not kernel.has(pattern))
    if kernel.demands.only_wide:
        yield from (op for op in kernel.instructions if re.match(r"(LDG|STG)\b(?!.*\.128)", op))


def products(kernel: Kernel) -> Iterator[str]:
    """Matrix products use tensor cores, or exact arithmetic."""
    yield from (f"no {pattern}" for pattern in kernel.demands.products if not kernel.has(pattern))


def forbidden(kernel: Kernel) -> Iterator[str]:
    """Approximate sines, exchange between threads where each works alone, loads of single pixels, another chip's
    matrix instruction, tensor cores in exact arithmetic."""
    yield from (pattern for pattern in kernel.demands.never if kernel.has(pattern))


RULES = (spills, fits, accesses, products, forbidden)


def broken(table: list[Kernel]) -> list[str]:
    """A line for each kernel and rule that it breaks."""
    return [
        f"{kernel}\n    {rule.__name__}: {', '.join(found)}"
        for kernel in table
        for rule in RULES
        if (found := list(rule(kernel)))
    ]


@pytest.mark.parametrize("kernels", [cuda_kernels, triton_kernels], ids=["cuda", "triton"])
def test_kernels_keep_the_rules(kernels: object) -> None:
    table = kernels.kernels()
    if lines := broken(table):
        pytest.fail(f"of {len(table)} kernels:\n" + "\n".join(lines), pytrace=False)


#: A kernel that keeps every rule, and one that breaks each.
GOOD = Kernel(
    "cuda good", 90, "float16", 128, 64, 1024, 0, {"LDG.E.128": 1, "STG.E.128": 1, "HMMA.16816.F32": 2},
    Demands(products=(r"HMMA\.",), never=("BAR",), only_wide=True),
)  # fmt: skip
BAD = {
    "spills": {"local": 8},
    "fits": {"shared": 60 * 1024},
    "accesses": {"instructions": {**GOOD.instructions, "LDG.E.U16": 1}},
    "products": {"instructions": {"LDG.E.128": 1}},
    "forbidden": {"instructions": {**GOOD.instructions, "BAR.SYNC": 1}},
}


@pytest.mark.parametrize("rule", BAD)
def test_rules_see_a_broken_kernel(rule: str) -> None:
    assert broken([GOOD]) == []
    (line,) = broken([replace(GOOD, **BAD[rule])])
    assert f"{rule}:" in line


def test_every_form_is_met() -> None:
    """Every chip; every dtype of a kernel family; the wide and the tensor-core forms."""
    cuda, files, names = cuda_kernels.forms(), cuda_kernels.keys(), triton_kernels.made()[0]
    triton = {re.fullmatch(r"triton (?:tf32 )?(\w+).* (\w+), \d+ warps, sm_(\d+)", name).groups() for name in names}
    halves = {"float16", "bfloat16"}
    every = {"float64", "float32", *halves}
    chips = {int(name.rpartition("_")[2]) for name in files}
    assert chips == {int(arch) for *_, arch in triton} == set(ARCHS)
    assert {kernel.dtype for kernel in cuda} == {dtype for _, dtype, _ in triton} == every

    def forms(pattern: str) -> set[tuple[str, ...]]:
        return {found.groups() for kernel in cuda if (found := re.match(f"cuda {pattern}", kernel.name))}

    wide = {(f"{d}_{layout}", t) for d in ("analysis", "synthesis") for layout in ("rows", "channels") for t in every}
    assert {(name, t) for name, t, n in forms(r"(\w+_(?:rows|channels))<(\w+), (\d+)") if n != "1"} >= wide
    phases = {"phase_forward", "phase_backward", "phase_statistics"}
    assert forms(r"(phase_\w+)<(\w+).*wide") == {(name, dtype) for name in phases for dtype in every}
    products = {("float64", "fma"), ("float32", "fma"), *((dtype, "mma") for dtype in (*halves, "float32"))}
    assert forms(r"reduce_haar<(\w+), (\w+)") == products
    families = {"haar", "haar_pyramid", "haar_blocks", "dwt", "patm", "pre_norm", "deconv", "mlp", "reduce_haar"}
    families |= {"batch_norm", "sums", "running", "branch_weights", "quads", "wtconv"}
    assert {family for family, *_ in triton} == families


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.aot.test_rules", description="all kernels of all chips")
    parser.add_argument("--renew", action="store_true", help=f"write {KEPT.name}, if no rule is broken")
    parser.add_argument("--anew", action="store_true", help="compile what has not changed, too")
    options = parser.parse_args()
    anew = ["--anew"] if options.anew else []
    of_triton, triton = triton_kernels.compile_new(*anew)
    of_cuda, cuda = cuda_kernels.compile_new(options.anew)
    of_amd, amd = test_rocm.compile_new(*anew)
    today, table = of_cuda | of_triton | of_amd, [*cuda, *triton]
    print(*table, sep="\n")
    if lines := [*broken(table), *test_rocm.broken(amd)]:
        print(*lines, sep="\n", file=sys.stderr)
        return 1
    if options.renew:
        kept.write(KEPT, {name: kept.Kept(made_of) for name, made_of in today.items()}, today)
    return 0


if __name__ == "__main__":
    sys.exit(main())
