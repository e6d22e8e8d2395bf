"""The CUDA sources, run on the host: the real kernels are right, and the emulator catches wrong ones."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.emulator import build, haar_cases, reduce_haar_cases
from tests.emulator.haar_cases import Case, argument, check_analysis, check_synthesis, decode, encode, launches

LEVELS = range(1, 6)
ORDERS = ("forward", "reverse", "7")


@pytest.fixture(scope="module")
def core(emulated_core: ModuleType) -> ModuleType:
    assert len(LEVELS) == emulated_core.MAX_HAAR_LEVELS
    return emulated_core


@pytest.fixture(scope="module")
def kernels(emulated_core: ModuleType) -> ModuleType:
    return build.load(Path(emulated_core.__file__).parent, "_emulator_tests")


# --- The Haar kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("dtype", haar_cases.DTYPES)
def test_analysis(core: ModuleType, dtype: str, levels: int) -> None:
    for case in haar_cases.cases(dtype, levels):
        with_case(check_analysis, core, case)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("dtype", haar_cases.DTYPES)
def test_synthesis(core: ModuleType, dtype: str, levels: int) -> None:
    for case in haar_cases.synthesis_cases(dtype, levels):
        with_case(check_synthesis, core, case)


def with_case(check: Callable[[ModuleType, Case], object], core: ModuleType, case: Case) -> None:
    try:
        check(core, case)
    except Exception as error:
        raise AssertionError(f"{case}: {error}") from error


@pytest.mark.parametrize("edge", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("levels", LEVELS)
def test_synthesis_is_the_adjoint_of_analysis(core: ModuleType, levels: int, layout: str, edge: float) -> None:
    """<analysis(x), y> = <x, synthesis(y)> from the kernels' own outputs, no reference in between."""
    case = Case("float64", levels, (2, 2, 23, 37), edge, layout, layout)
    sizes = case.sizes()
    x, y_image = case.random(*case.shape), case.random(2, 2, *sizes[-1])
    ys = [y_image, *(case.random(2, 2, 3, *size) for size in sizes[1:])]
    outputs = check_analysis(core, case)
    adjoint = check_synthesis(core, case)  # of the same random bands: Case.random depends on shapes alone
    left = sum(float((a * y).sum()) for a, y in zip(outputs, ys, strict=True))
    right = float((x * adjoint).sum())
    scale = sum(float(np.abs(a * y).sum()) for a, y in zip(outputs, ys, strict=True))
    assert abs(left - right) <= 1e-13 * scale


@pytest.mark.parametrize("dtype", haar_cases.DTYPES)
@pytest.mark.parametrize(
    "image, bands, shape, form",
    [
        ("nchw", "nchw", (2, 3, 9, 32), "rows (wide"),
        ("padded_rows", "padded_rows", (2, 3, 9, 32), "rows (wide"),
        ("nchw", "nchw", (2, 3, 9, 31), "rows (narrow"),
        ("misaligned", "nchw", (2, 3, 9, 32), "rows (narrow"),
        ("nchw", "misaligned", (2, 3, 9, 32), "rows (narrow"),
        ("transposed", "transposed", (2, 3, 9, 32), "rows (narrow"),
        ("nhwc", "nhwc", (2, 8, 9, 7), "channels (wide"),
        ("nhwc", "nhwc", (2, 7, 9, 7), "channels (narrow"),
        ("nhwc", "nchw", (2, 8, 9, 7), "channels (narrow"),
        ("nhwc_misaligned", "nhwc", (2, 8, 9, 7), "channels (narrow"),
        ("nhwc", "nchw", (2, 1, 9, 32), "rows (wide"),  # one channel: the same memory as NCHW
    ],
)
@pytest.mark.parametrize("low", [False, True])
def test_shapes_reach_the_kernel_meant_for_them(
    core: ModuleType, dtype: str, image: str, bands: str, shape: tuple[int, int, int, int], form: str, low: bool
) -> None:
    case = Case(dtype, 3, shape, 0.0, image, bands, low=bands if low else None)
    launches(core)
    check_analysis(core, case)
    check_synthesis(core, case)
    ran = launches(core)
    assert ran
    assert {name.split(", ")[0] for name in ran} == {f"haar_analysis_{form}", f"haar_synthesis_{form}"}


def test_large_tensors_are_cut_into_several_launches(core: ModuleType) -> None:
    """The emulated core allows 1,024 tasks a launch instead of 2^31; every axis gets cut."""
    for shape in ((40, 4, 16, 16), (1, 2048, 4, 4), (1, 1, 700, 20), (1, 1, 20, 700)):
        for layout in ("nchw", "nhwc"):
            for levels in (1, 2, 5):
                launches(core)
                case = Case("float32", levels, shape, -1.0, layout, layout, low=layout)
                check_analysis(core, case)
                assert len(launches(core)) > 1 or levels > 1, case
                check_synthesis(core, case)


@pytest.mark.parametrize("levels", [1, 3, 5])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_result_does_not_depend_on_the_order_of_threads(
    core: ModuleType, monkeypatch: pytest.MonkeyPatch, layout: str, levels: int
) -> None:
    case = Case("float32", levels, (1, 8, 33, 32), 1.0, layout, layout, low=layout)
    results = []
    for order in ORDERS:
        monkeypatch.setenv("WAVEMIX_EMULATOR_ORDER", order)
        results.append([*check_analysis(core, case), check_synthesis(core, case)])
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_overlapping_input_is_read_in_place(core: ModuleType) -> None:
    """Strides of zero, as torch.Tensor.expand makes them."""
    row = np.arange(16.0, dtype=np.float32)
    image = np.broadcast_to(row, (2, 3, 8, 16))
    ll, high = np.empty((2, 3, 4, 8), np.float32), np.empty((2, 3, 3, 4, 8), np.float32)
    core.haar_analysis_cuda(1, 1, image.shape, 0.0, argument(image), argument(ll), [argument(high)], 0, 0)
    np.testing.assert_array_equal(ll, np.broadcast_to(row[::2] + row[1::2], ll.shape))
    np.testing.assert_array_equal(high[:, :, 1], np.full(ll.shape, -1.0))
    assert not high[:, :, 0].any()
    assert not high[:, :, 2].any()


HUGE = 2**31 + 64  # elements; a multiple of every word


@contextmanager
def huge_view(shape: tuple[int, ...], position: int) -> Iterator[np.ndarray]:
    """float16 with one stride beyond 2^31 elements, in memory of which only the touched pages exist."""
    extent = shape[position]
    strides, step = [0] * len(shape), 1
    for i in reversed(range(len(shape))):
        if i != position:
            strides[i], step = step, step * shape[i]
    strides[position] = HUGE
    size = 2 * (HUGE * (extent - 1) + step)
    reserve = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE; named since Python 3.13
    with mmap.mmap(-1, size, flags=reserve) as memory:
        huge = np.ndarray(shape, np.float16, memory, strides=[2 * s for s in strides])
        try:
            yield huge
        finally:
            del huge  # a mapping with a live view cannot be closed


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@pytest.mark.parametrize("side", ["image", "high", "ll", "add"])
def test_offsets_are_64_bit(core: ModuleType, side: str, axis: int) -> None:
    shape = {"image": (2, 2, 2, 16), "add": (2, 2, 2, 16), "ll": (2, 2, 2, 2), "high": (2, 2, 3, 2, 2)}[side]
    position = axis if side != "high" or axis <= 2 else axis + 1  # 2: the band's own stride
    shape = (*shape[:position], min(shape[position], 3), *shape[position + 1 :])
    with huge_view(shape, position) as huge:
        check_huge(core, side, huge)


def check_huge(core: ModuleType, side: str, huge: np.ndarray) -> None:
    def put(shape: tuple[int, ...], here: bool) -> np.ndarray:
        view = huge if here else np.empty(shape, np.float16)
        view[...] = encode(np.random.default_rng(len(shape)).standard_normal(shape), "float16")
        return view

    if side in ("image", "add"):
        n, c, h, w = huge.shape
    else:
        n, c, *_, h, w = (*huge.shape[:-2], 2 * huge.shape[-2], 2 * huge.shape[-1])
    half = (-(-h // 2), -(-w // 2))
    image, add = put((n, c, h, w), side == "image"), put((n, c, h, w), side == "add")
    ll, high = put((n, c, *half), side == "ll"), put((n, c, 3, *half), side == "high")
    wanted = haar_cases.synthesis(decode(ll, "float16"), [decode(high, "float16")], (h, w), 1.0) + add
    image[...] = np.nan
    core.haar_synthesis_cuda(
        2, 1, (n, c, h, w), 1.0, argument(image), argument(add), argument(ll), [argument(high)], 0, 0
    )
    np.testing.assert_allclose(image.astype(np.float64), wanted, rtol=2.0**-10, atol=2.0**-10)
    wanted_ll, (wanted_high,) = haar_cases.analysis(decode(image, "float16"), 1, 1.0)
    ll[...] = np.nan
    high[...] = np.nan
    core.haar_analysis_cuda(2, 1, (n, c, h, w), 1.0, argument(image), argument(ll), [argument(high)], 0, 0)
    np.testing.assert_allclose(ll.astype(np.float64), wanted_ll, rtol=2.0**-10, atol=2.0**-10)
    np.testing.assert_allclose(high.astype(np.float64), wanted_high, rtol=2.0**-10, atol=2.0**-10)


# --- reduce_haar ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", reduce_haar_cases.KINDS)
def test_reduce_haar(core: ModuleType, kind: str) -> None:
    for case in reduce_haar_cases.cases(kind):
        try:
            reduce_haar_cases.check(core, case)
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.parametrize(
    "kind, channels, outputs, layout, kernel",
    [
        ("float16", 144, 36, "nhwc", "float16, tensor cores, 5 tiles of outputs, 16 bytes along C"),
        ("bfloat16", 192, 48, "nchw", "bfloat16, tensor cores, 6 tiles of outputs, 16 bytes along W"),
        ("float16", 16, 64, "nhwc", "float16, tensor cores, 8 tiles of outputs, 16 bytes along C"),
        ("float16", 20, 5, "nhwc", "float16, tensor cores, 2 tiles of outputs, 8 bytes along C"),
        ("float16", 20, 5, "nhwc_misaligned", "float16, tensor cores, 2 tiles of outputs, 2 bytes along C"),
        ("tf32", 16, 16, "nchw", "float32, tensor cores, 2 tiles of outputs, 16 bytes along W"),
        ("float32", 16, 64, "nchw", "float32, fma, 4 tiles of outputs, 16 bytes along W"),
        ("float32", 7, 36, "nhwc", "float32, fma, 5 tiles of outputs, 4 bytes along C"),
        ("float64", 16, 36, "transposed", "float64, fma, 2 tiles of outputs, 8 bytes along C"),
    ],
)
def test_reduce_haar_takes_the_kernel_meant_for_the_shape(
    core: ModuleType, kind: str, channels: int, outputs: int, layout: str, kernel: str
) -> None:
    launches(core)
    reduce_haar_cases.check(core, reduce_haar_cases.Case(kind, 1, (1, channels, 4, 16), outputs, layout, layout))
    assert launches(core) == [f"reduce_haar ({kernel}, 1 levels)"]


def test_reduce_haar_cuts_large_batches_into_several_launches(core: ModuleType) -> None:
    """The emulated core allows 8 blocks a launch instead of 2^31."""
    for shape, outputs, expected in (((19, 4, 4, 4), 8, 3), ((2, 4, 20, 66), 8, 2), ((5, 4, 4, 4), 200, 3)):
        launches(core)
        reduce_haar_cases.check(core, reduce_haar_cases.Case("float16", 1, shape, outputs, "nhwc", "nhwc"))
        assert len(launches(core)) == expected


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("kind", ["float16", "tf32", "float32"])
def test_reduce_haar_does_not_depend_on_the_order_of_threads(
    core: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str, layout: str
) -> None:
    case = reduce_haar_cases.Case(kind, 5, (1, 40, 32, 32), 12, layout, layout)
    results = []
    for order in ORDERS:
        monkeypatch.setenv("WAVEMIX_EMULATOR_ORDER", order)
        results.append(reduce_haar_cases.check(core, case))
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("side, axis", [*((side, axis) for side in "xz" for axis in range(4)), ("w", 0), ("w", 1)])
def test_reduce_haar_offsets_are_64_bit(core: ModuleType, side: str, axis: int) -> None:
    n, c, h, w, o = 2, 3, 4, 4, 2
    shapes = {"x": (n, c, h, w), "z": (n, 4 * o, h // 2, w // 2), "w": (o, c)}
    with huge_view(shapes[side], axis) as huge:
        x, z, weight = (huge if name == side else np.empty(shapes[name], np.float16) for name in "xzw")
        random = np.random.default_rng(0)
        x[...], weight[...] = random.standard_normal(x.shape), random.standard_normal(weight.shape)
        z[...] = np.nan
        core.reduce_haar_cuda(2, 1, x.shape, o, argument(x), argument(weight), [], [argument(z)], False, 0, 0)
        r = np.einsum("nchw,oc->nohw", x.astype(np.float64), weight.astype(np.float64))
        ll, (high,) = haar_cases.analysis(r, 1, 0.0)
        wanted = np.concatenate([ll, high.reshape(n, 3 * o, h // 2, w // 2)], 1)
        np.testing.assert_allclose(z.astype(np.float64), wanted, rtol=2.0**-10, atol=2.0**-10)
        del x, z, weight  # the mapping closes


def test_reduce_haar_keeps_non_finite_values_in_their_quad(core: ModuleType) -> None:
    """What lies beside an infinity, in the same words and fragments, stays finite; also beyond C and O."""
    for layout in ("nchw", "nhwc"):
        for dtype in ("float16", "float32"):
            values = np.ones((1, 5, 8, 8))
            values[0, 2, 3, 4] = np.inf
            x, _ = haar_cases.place(values, layout, dtype)
            weight, _ = haar_cases.place(np.ones((3, 5, 1, 1)), "nchw", dtype)
            z = haar_cases.Poisoned((1, 12, 4, 4), layout, dtype)
            core.reduce_haar_cuda(
                haar_cases.DTYPES[dtype][0], 1, values.shape, 3, argument(x), argument(weight)[:3], [],
                [argument(z.view)], False, 0, 0,
            )  # fmt: skip
            finite = np.isfinite(z.take())
            expected = np.ones_like(finite)
            expected[0, :, 1, 2] = False
            np.testing.assert_array_equal(finite, expected)


def test_reduce_haar_rejects_sizes_that_do_not_halve(core: ModuleType) -> None:
    case = reduce_haar_cases.Case("float32", 2, (1, 4, 6, 8), 4)
    with pytest.raises(ValueError, match="got 6 x 8 pixels; multiples of 4 would work"):
        reduce_haar_cases.check(core, case)
    with pytest.raises(ValueError, match="levels: got 6"):
        reduce_haar_cases.check(core, reduce_haar_cases.Case("float32", 6, (1, 4, 64, 64), 4))


def test_unknown_device_is_an_error_and_the_current_one_is_kept(core: ModuleType) -> None:
    case = Case("float32", 1, (1, 1, 4, 4))
    check_analysis(core, case, device=1)
    with pytest.raises(RuntimeError, match=r"cudaSetDevice\(9\) failed: invalid device ordinal"):
        check_analysis(core, case, device=9)
    check_analysis(core, case)


def test_order_must_be_known(core: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAVEMIX_EMULATOR_ORDER", "sideways")
    with pytest.raises(ValueError, match="got 'sideways'; forward, reverse or a seed would work"):
        check_analysis(core, Case("float32", 1, (1, 1, 4, 4)))


# --- The same under AddressSanitizer and UndefinedBehaviorSanitizer ---------------------------------------


def sanitized_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    gcc = shutil.which("gcc") or "g++"
    runtime = subprocess.run([gcc, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    path = runtime.stdout.strip()
    if not os.path.isabs(path):
        pytest.skip(f"{gcc} comes without AddressSanitizer's runtime (libasan.so)")
    environment = os.environ | {
        "LD_PRELOAD": path,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own allocations
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=build.ROOT, check=False)


@pytest.fixture(scope="module")
def sanitized() -> Path:
    return build.build("address,undefined")


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
