"""The emulator itself: it runs right kernels and catches wrong ones; the kernels under its sanitizers."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests import passed
from tests.emulator import build
from tests.kernels.cuda.support import ORDERS, sanitized_python
from tests.ops.contract import randn


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return own_kernels()


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAVEMIX_EMULATOR_ORDER", request.param)


def own_kernels() -> ModuleType:
    return build.load(Path(build.emulated_core().__file__).parent, "_emulator_tests")


#: Files of each family with the fewest tests that they run in the emulator: every instantiation of the kernels, layouts
#: of all kinds, thin and empty images.
SANITIZED = {
    "haar": (300, "tests/kernels/test_haar_outputs.py", "tests/kernels/cuda/test_haar.py"),
    "reduce_haar": (80, "tests/ops/test_reduce_haar.py"),
    "patm": (50, "tests/ops/test_patm.py", "tests/ops/test_sincos.py", "tests/kernels/cuda/test_patm.py"),
}
#: Sources of the emulator.
EMULATOR = (
    *(f"csrc/{folder}/**/*" for folder in ("cuda", "include", "bindings", "emulator")),
    *("tests/emulator/*", "tests/kernels/cuda/*.py"),
)  # fmt: skip


@pytest.mark.prove
@pytest.mark.parametrize("family", SANITIZED)
def test_kernels_pass_the_sanitizers(family: str, request: pytest.FixtureRequest) -> None:
    ops = [f"wavemix_kernels/ops/{name}/*.py" for name in ("common", family)]
    made_of = *passed.HELPERS, *SANITIZED[family][1:], *EMULATOR, *ops
    with passed.unless_passed(request, f"sanitizers {family}", made_of, build.compiler_version()):
        run_sanitized(*SANITIZED[family])


def run_sanitized(least: int, *files: str) -> None:
    build.build(build.ADDRESS_AND_UNDEFINED)  # or skips
    # -v and -s: the report of a sanitizer follows the name of the case that it ends.
    done = sanitized_python("-m", "pytest", "-vs", "-pno:cacheprovider", "--few", "-m", "emulated", *files)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found = re.search(r"= (\d+) passed", done.stdout)
    assert found, done.stdout[-3000:]
    assert int(found[1]) >= least, f"{found[1]} tests of {files} ran in the emulator, expected {least} at least"
    assert " skipped" not in done.stdout, done.stdout[-3000:]


# --- Wrong kernels ----------------------------------------------------------------------------------------

COUNT = 64
# kernel -> what the emulator says of it
CAUGHT = {
    "shared_out_of_bounds": r"'tile': read of element 64 out of bounds, it has 64",
    "missing_barrier": r"'tile': (read of|write to) element \d+ races with a (read|write) by thread",
    "missing_read_barrier": r"'tile': (read of|write to) element \d+ races with a (read|write) by thread",
    "missing_warp_barrier": r"'tile': read of element \d+, which was never written",
    "uninitialised_shared": r"'tile': read of element 0, which was never written",
    "divergent_barrier": r"divergent barrier: reached wrong_kernels.cu:\d+ while thread",
    "early_return": r"divergent barrier: ",
    "divergent_shuffle": r"__shfl_down_sync .*lane \d+ of its mask has left the kernel|no thread can go on",
    "shuffle_from_outside": r"reads lane \d+, which is not in its mask",
    "missing_copy_wait": r"'tile': read of element \d+ while an asynchronous copy .* has not been waited for",
    "copy_wait_too_short": r"'tile': read of element \d+ while an asynchronous copy .* has not been waited for",
    "missing_copy_barrier": r"'tile': (read|write).* (races with|while an asynchronous copy|never written)",
    "unordered_sum": r"'sum': (read of|write to) element 0 races with a (read|write) by thread",
}
ONLY_SANITIZED = {  # kernel -> what the sanitizers say
    "global_out_of_bounds": "heap-buffer-overflow",
    "global_misaligned": "misaligned address",
}


def run_kernel(kernels: ModuleType, name: str, wrong: bool) -> torch.Tensor:
    data, output = torch.arange(1.0, COUNT + 1), torch.full((COUNT,), float("nan"))
    kernels.run_wrong_kernel(name, wrong, data.data_ptr(), output.data_ptr(), COUNT)
    assert wrong or torch.equal(output, data + data.roll(-1))
    return output


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("name", [*CAUGHT, *ONLY_SANITIZED, "order_dependent"])
def test_right_kernel_passes(kernels: ModuleType, name: str) -> None:
    run_kernel(kernels, name, wrong=False)


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("name", CAUGHT)
def test_wrong_kernel_is_caught(kernels: ModuleType, name: str) -> None:
    with pytest.raises(RuntimeError, match=CAUGHT[name]) as caught:
        run_kernel(kernels, name, wrong=True)
    assert str(caught.value).startswith(f"{name}, block (0, 0, 0)")


def test_order_of_threads_shows_in_an_order_dependent_kernel(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A race in global memory is not traced; running the threads the other way round changes its result."""
    outputs = set()
    for order in ORDERS:
        monkeypatch.setenv("WAVEMIX_EMULATOR_ORDER", order)
        outputs.add(tuple(run_kernel(kernels, "order_dependent", wrong=True).tolist()))
    assert len(outputs) == len(ORDERS)


RUN = "import sys; from tests.kernels.cuda.test_emulator import *; run_kernel(own_kernels(), *eval(sys.argv[1]))"


@pytest.mark.prove
@pytest.mark.parametrize("name", ONLY_SANITIZED)
def test_wrong_global_access_is_caught_by_the_sanitizers(name: str, request: pytest.FixtureRequest) -> None:
    with passed.unless_passed(request, f"sanitizers {name}", EMULATOR, build.compiler_version()):
        run_wrong_global_access(name)


def run_wrong_global_access(name: str) -> None:
    build.build(build.ADDRESS_AND_UNDEFINED)  # or skips
    right, wrong = (sanitized_python("-c", RUN, repr((name, wrong))) for wrong in (False, True))
    assert right.returncode == 0, right.stderr[-4000:]
    assert wrong.returncode != 0
    assert ONLY_SANITIZED[name] in wrong.stderr
    assert "wrong_kernels.cu" in wrong.stderr


# --- Tensor-core instructions -----------------------------------------------------------------------------


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("dtype, name", [("float16", "f16"), ("bfloat16", "bf16"), ("float32", "tf32")])
def test_mma(kernels: ModuleType, dtype: str, name: str) -> None:
    """cp.async, ldmatrix (plain and transposed) and mma against a product in float64."""
    inner = 8 if name == "tf32" else 16
    a, b = (randn(*shape).to(getattr(torch, dtype)) for shape in ((16, inner), (inner, 16)))
    d = torch.full((16, 16), float("nan"))
    getattr(kernels, f"matmul_{name}")(a.data_ptr(), b.data_ptr(), d.data_ptr())
    a, b = (tf32(t) if name == "tf32" else t.double() for t in (a, b))
    assert torch.equal(d, (a @ b).float())


def tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 rounded to a mantissa of 10 bits, ties away from zero."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp(torch.trunc(mantissa * 2**11 + 0.5 * mantissa.sign()), exponent - 11)
