"""The compiled kernels ahead of time, without a GPU: each rule once, over the table of all kernels and chips.

`python -m tests.aot.test_rules` prints the table.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from benchmarks.predict.core import ARCHS
from tests.aot import cuda_kernels, triton_kernels
from tests.aot.table import MAX_REGISTERS, SHARED_OF_SM, SHARED_OF_SYSTEM, Kernel

pytestmark = pytest.mark.prove


@pytest.fixture(scope="session", params=[cuda_kernels, triton_kernels], ids=["cuda", "triton"])
def table(request: pytest.FixtureRequest) -> list[Kernel]:
    return request.param.kernels()


def fail_on(table: list[Kernel], bad: Callable[[Kernel], object]) -> None:
    wrong = [f"{kernel} {found}" for kernel in table if (found := bad(kernel))]
    if wrong:
        pytest.fail(f"{len(wrong)} of {len(table)} kernels:\n" + "\n".join(wrong), pytrace=False)


def test_every_form_is_met() -> None:
    """Every chip; every dtype of a kernel family; the wide and the tensor-core forms."""
    cuda, triton = cuda_kernels.kernels(), triton_kernels.kernels()
    halves = {"float16", "bfloat16"}
    for table in (cuda, triton):
        assert {kernel.arch for kernel in table} == set(ARCHS)
        assert {kernel.dtype for kernel in table} == {"float64", "float32", *halves}

    def forms(pattern: str) -> set[tuple[str, ...]]:
        return {found.groups() for kernel in cuda if (found := re.match(f"cuda {pattern}", kernel.name))}

    every = {"float64", "float32", *halves}
    wide = {(f"{d}_{layout}", t) for d in ("analysis", "synthesis") for layout in ("rows", "channels") for t in every}
    assert {(name, t) for name, t, n in forms(r"(\w+_(?:rows|channels))<(\w+), (\d+)") if n != "1"} >= wide
    phases = {"phase_forward", "phase_backward", "phase_statistics"}
    assert forms(r"(phase_\w+)<(\w+).*wide") == {(name, dtype) for name in phases for dtype in every}
    products = {("float64", "fma"), ("float32", "fma"), *((dtype, "mma") for dtype in (*halves, "float32"))}
    assert forms(r"reduce_haar<(\w+), (\w+)") == products
    families = {"haar", "haar_pyramid", "haar_blocks", "dwt", "patm", "pre_norm", "deconv", "mlp", "reduce_haar"}
    families |= {"batch_norm", "sums", "running", "branch_weights"}
    assert {re.match(r"triton (?:tf32 )?(\w+)", kernel.name)[1] for kernel in triton} == families


def test_no_kernel_spills(table: list[Kernel]) -> None:
    """Nor keeps local memory: an array that did not fit the registers shows here."""
    fail_on(
        table,
        lambda k: (
            k.local > k.demands.most_local
            or (k.has("LDL|STL") and not k.demands.most_local)
            or k.registers > MAX_REGISTERS
        ),
    )


def test_blocks_fit_the_chip(table: list[Kernel]) -> None:
    """In registers and shared memory; in twos and threes where one is to compute while another waits for memory."""

    def wrong(kernel: Kernel) -> str:
        demands, most = kernel.demands, SHARED_OF_SM[kernel.arch] - SHARED_OF_SYSTEM
        if demands.most_shared is not None:
            most = min(most, demands.most_shared)
        if kernel.shared > most:
            return f"more than {most} bytes of shared memory"
        if kernel.blocks < demands.blocks or kernel.blocks * kernel.threads < 32 * demands.warps:
            return f"room for {kernel.blocks} blocks, expected {demands.blocks} and {demands.warps} warps"
        return ""

    fail_on(table, wrong)


def test_static_shared_memory_of_cuda_kernels() -> None:
    fail_on(cuda_kernels.kernels(), lambda kernel: kernel.shared > 48 * 1024)


def test_memory_moves_in_wide_accesses(table: list[Kernel]) -> None:
    def narrow(kernel: Kernel) -> list[str]:
        missing = [pattern for pattern in kernel.demands.accesses if not kernel.has(pattern)]
        only = kernel.demands.only_wide
        return missing + [op for op in kernel.instructions if only and re.match(r"(LDG|STG)\b(?!.*\.128)", op)]

    fail_on(table, narrow)


def test_matrix_products_use_tensor_cores(table: list[Kernel]) -> None:
    fail_on(table, lambda kernel: [pattern for pattern in kernel.demands.products if not kernel.has(pattern)])


def test_no_forbidden_instruction(table: list[Kernel]) -> None:
    """Approximate sines, exchange between threads where each works alone, loads of single pixels, another chip's
    matrix instruction, tensor cores in exact arithmetic."""
    fail_on(table, lambda kernel: [pattern for pattern in kernel.demands.never if kernel.has(pattern)])


if __name__ == "__main__":
    print(*cuda_kernels.kernels(), *triton_kernels.kernels(), sep="\n")
