"""The emulator itself: it runs right kernels and catches wrong ones; the kernels under its sanitizers."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.emulator import build, haar_cases, reduce_haar_cases
from tests.emulator.haar_cases import decode, encode
from tests.kernels.cuda.support import ORDERS, sanitized_python


@pytest.fixture(scope="module")
def kernels(emulated_core: ModuleType) -> ModuleType:
    return build.load(Path(emulated_core.__file__).parent, "_emulator_tests")


@pytest.fixture(scope="module")
def sanitized() -> Path:
    return build.build("address,undefined")


@pytest.mark.prove
@pytest.mark.parametrize("cases", [haar_cases, reduce_haar_cases], ids=["haar", "reduce_haar"])
def test_kernels_pass_the_sanitizers(sanitized: Path, cases: ModuleType) -> None:
    (module,) = sanitized.glob("_emulated.*")
    done = sanitized_python("-m", cases.__name__, str(module))
    assert done.returncode == 0, done.stderr[-6000:]
    assert "cases passed" in done.stdout


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


def run_kernel(kernels: ModuleType, name: str, wrong: bool) -> None:
    data = np.arange(1, COUNT + 1, dtype=np.float32)
    output = np.full(COUNT, np.nan, np.float32)
    kernels.run_wrong_kernel(name, wrong, data.ctypes.data, output.ctypes.data, COUNT)
    np.testing.assert_array_equal(output, data + np.roll(data, -1))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", [*CAUGHT, *ONLY_SANITIZED, "order_dependent"])
def test_right_kernel_passes(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, order: str) -> None:
    monkeypatch.setenv("WAVEMIX_EMULATOR_ORDER", order)
    run_kernel(kernels, name, wrong=False)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CAUGHT)
def test_wrong_kernel_is_caught(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, order: str) -> None:
    monkeypatch.setenv("WAVEMIX_EMULATOR_ORDER", order)
    with pytest.raises(RuntimeError, match=CAUGHT[name]) as caught:
        run_kernel(kernels, name, wrong=True)
    assert str(caught.value).startswith(f"{name}, block (0, 0, 0)")


def test_order_of_threads_shows_in_an_order_dependent_kernel(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A race in global memory is not traced; running the threads the other way round changes its result."""
    outputs = []
    for order in ORDERS:
        monkeypatch.setenv("WAVEMIX_EMULATOR_ORDER", order)
        data, output = np.arange(1, COUNT + 1, dtype=np.float32), np.zeros(COUNT, np.float32)
        kernels.run_wrong_kernel("order_dependent", True, data.ctypes.data, output.ctypes.data, COUNT)
        outputs.append(tuple(output))
    assert len(set(outputs)) == len(ORDERS)


SANITIZED_RUN = """
import sys
import numpy as np
from importlib.util import module_from_spec, spec_from_file_location
path, name, wrong = sys.argv[1:]
spec = spec_from_file_location("_emulator_tests", path)
kernels = module_from_spec(spec)
spec.loader.exec_module(kernels)
data, output = np.arange(64, dtype=np.float32), np.empty(64, np.float32)
kernels.run_wrong_kernel(name, wrong == "wrong", data.ctypes.data, output.ctypes.data, 64)
assert (output == data + np.roll(data, -1)).all()
"""


@pytest.mark.prove
@pytest.mark.parametrize("name", ONLY_SANITIZED)
def test_wrong_global_access_is_caught_by_the_sanitizers(sanitized: Path, name: str) -> None:
    (module,) = sanitized.glob("_emulator_tests.*")
    right = sanitized_python("-c", SANITIZED_RUN, str(module), name, "right")
    assert right.returncode == 0, right.stderr[-4000:]
    wrong = sanitized_python("-c", SANITIZED_RUN, str(module), name, "wrong")
    assert wrong.returncode != 0
    assert ONLY_SANITIZED[name] in wrong.stderr
    assert "wrong_kernels.cu" in wrong.stderr


# --- Tensor-core instructions -----------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "tf32"])
def test_mma(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: str, order: str) -> None:
    """cp.async, ldmatrix (plain and transposed) and mma against a product in float64."""
    monkeypatch.setenv("WAVEMIX_EMULATOR_ORDER", order)
    random = np.random.default_rng(0)
    inner = 8 if dtype == "tf32" else 16
    a, b = random.standard_normal((16, inner)), random.standard_normal((inner, 16))
    d = np.full((16, 16), np.nan, np.float32)
    if dtype == "tf32":
        a_bits, b_bits = a.astype(np.float32), b.astype(np.float32)
        a_values, b_values = tf32(a_bits), tf32(b_bits)
        run = kernels.matmul_tf32
    else:
        a_bits, b_bits = encode(a, dtype), encode(b, dtype)
        a_values, b_values = decode(a_bits, dtype), decode(b_bits, dtype)
        run = {"float16": kernels.matmul_f16, "bfloat16": kernels.matmul_bf16}[dtype]
    run(a_bits.ctypes.data, b_bits.ctypes.data, d.ctypes.data)
    np.testing.assert_array_equal(d, (a_values @ b_values).astype(np.float32))


def tf32(x: np.ndarray) -> np.ndarray:
    """float32 rounded to a mantissa of 10 bits, ties away from zero."""
    mantissa, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(np.trunc(mantissa * 2**11 + np.copysign(0.5, mantissa)), exponent - 11)
