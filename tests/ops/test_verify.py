"""A kernel proves itself before its first result is used: wavemix_kernels/ops/verify.py.

The CPU plays a device whose kernels nobody has verified.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import wavemix_kernels as wk
from tests.tools.helpers import python
from wavemix_kernels import backends, cache, ops
from wavemix_kernels.ops import choose, tuned, verify
from wavemix_kernels.ops.common import selftest
from wavemix_kernels.ops.common.precision import products_in
from wavemix_kernels.ops.mlp import channel
from wavemix_kernels.ops.verified import VERIFIED, Verified

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
Tests = list[tuple[str, str, torch.dtype]]


@pytest.fixture
def tests(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Tests:
    """The self-tests run, on a CPU that has to prove its kernels."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    cache.forget()
    monkeypatch.setattr(verify, "DEVICES", {"cpu"})
    monkeypatch.setattr(verify, "MODE", "")
    ran: Tests = []
    run = verify._self_test

    def counted(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
        ran.append((op, backend, dtype))
        return run(op, backend, device, dtype)

    monkeypatch.setattr(verify, "_self_test", counted)
    return ran


def next_process() -> None:
    """Forgets what is not in the cache's file."""
    cache.forget()
    verify.forget()


def arguments(dtype: torch.dtype = FP32) -> list[Tensor]:
    p = selftest.pattern
    tensors = p(2, 8, 3, 5), p(24, 8, 1, 1), p(24), p(8, 24, 1, 1), p(8)
    return [t.to(dtype).requires_grad_() for t in tensors]


def results(backend: str = "auto", dtype: torch.dtype = FP32) -> list[Tensor]:
    """The channel MLP's output and gradients."""
    leaves = arguments(dtype)
    out = channel.fused(*leaves, backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def plant(monkeypatch: pytest.MonkeyPatch, function: str, fault: Callable[[Tensor], Any], backend: str = "cpu") -> None:
    """Puts a wrong kernel in the place of the channel MLP's own: ``fault`` of what that one writes first."""
    right = channel.BACKENDS[backend]

    def wrong(*args: Any) -> Any:
        out = right.functions[function](*args)
        fault(tree_leaves(out)[0])
        return out

    planted = dataclasses.replace(right, functions={**right.functions, function: wrong})
    monkeypatch.setitem(channel.BACKENDS, backend, planted)


def off(t: Tensor) -> None:
    """By a thousandth, where fp32 rounding explains a hundredth of that."""
    t[..., -1:].mul_(1.001)


def nothing_written(t: Tensor) -> None:
    t[..., -1:].fill_(float("nan"))


def raise_an_error(t: Tensor) -> None:
    raise RuntimeError("ptxas died")


def off_in_bfloat16(t: Tensor) -> None:
    if t.dtype == BF16:
        t.mul_(1.1)


# --- Right kernels -----------------------------------------------------------------------------------------


def test_a_right_kernel_is_tested_once(tests: Tests) -> None:
    with wk.backend("cpu"):
        want = results()
    assert tests == [("channel_mlp", "cpu", FP32)]
    for _ in range(2):
        assert same(results(), want)
        next_process()
    assert len(tests) == 1
    results(dtype=BF16)
    assert tests[1:] == [("channel_mlp", "cpu", BF16)]


@pytest.mark.prove
def test_the_verdict_is_kept_across_processes(tests: Tests) -> None:
    program = """
import torch, wavemix_kernels as wk
from wavemix_kernels.ops import verify
verify.DEVICES = {"cpu"}
verify.examine = lambda *call, run=verify.examine: (print("tested", *call), run(*call))[1]
wk.haar_dwt2d(torch.ones(1, 1, 4, 4), backend="cpu")
print("ran")
"""
    runs = [python("-c", program, WAVEMIX_KERNELS_VERIFY=mode) for mode in ("", "", "1", "0")]
    assert [run.stdout.splitlines() for run in runs] == [
        ["tested haar cpu cpu torch.float32", "ran"], ["ran"], ["tested haar cpu cpu torch.float32", "ran"], ["ran"],
    ], runs  # fmt: skip


def test_what_a_gpu_has_verified_is_not_tested(tests: Tests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERIFIED, ("channel_mlp", "cpu", "cpu"), Verified("0" * 40, "2027-01-01"))
    results()
    assert not tests
    verify.forget()
    monkeypatch.setattr(verify, "MODE", "1")
    results()
    assert len(tests) == 1


def test_the_list_names_what_there_is() -> None:
    for (op, backend, architecture), (commit, date) in VERIFIED.items():
        assert backend in ops.load(op).BACKENDS
        assert re.fullmatch(r"(sm_\d+|gfx\w+) [0-9a-f]{40} \d{4}-\d\d-\d\d", f"{architecture} {commit} {date}")


@pytest.mark.parametrize("mode, times", [("", 1), ("0", 0), ("1", 2)])
def test_the_variable(mode: str, times: int, tests: Tests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(verify.VARIABLE, mode)
    monkeypatch.setattr(verify, "MODE", verify._mode())
    results()
    next_process()
    results()
    assert len(tests) == times


def test_another_value_of_the_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(verify.VARIABLE, "yes")
    with pytest.raises(ValueError, match="WAVEMIX_KERNELS_VERIFY='yes': expected '0' or '1'"):
        verify._mode()


def test_it_neither_sees_nor_changes_the_state_of_the_caller(tests: Tests) -> None:
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", BF16), NoSelfTest():
        wk.haar_dwt2d(torch.ones(1, 1, 4, 4), backend="cpu")
    assert tests == [("haar", "cpu", FP32)]
    assert torch.equal(torch.get_rng_state(), before)
    assert verify.known_fault(ops.load("haar").BACKENDS, "cpu", torch.ones(1)) is None


def test_backward_stays_in_the_thread_of_the_self_test(tests: Tests, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it would run in another one, which would wait for the verdict."""
    haar, seen = ops.load("haar"), []
    own = haar.self_test

    def noted(*call: Any) -> tuple[float, float]:
        seen.append((torch._C._is_multithreading_enabled(), threading.current_thread() is threading.main_thread()))
        return own(*call)

    monkeypatch.setattr(haar, "self_test", noted)
    wk.haar_dwt2d(torch.ones(1, 1, 4, 4), backend="cpu")
    assert seen == [(False, False)]


def test_the_tuner_does_not_record_self_tests(tests: Tests) -> None:
    met: list[Any] = []

    class Recorder:
        def met(self, key: Any, *rest: Any) -> None:
            met.append(key)

        def run(self, name: str, function: Any, args: Any, kwargs: Any) -> Any:
            met.append(name)
            return function(*args, **kwargs)

    with tuned.recording(Recorder()):
        wk.haar_dwt2d(torch.ones(1, 1, 4, 4), backend="cpu")
    assert tests == [("haar", "cpu", FP32)]
    assert met == ["haar_analysis"]


class NoSelfTest(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where the operators of a self-test, which ask for gradients, come by."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not (args and isinstance(args[0], Tensor) and args[0].requires_grad)
        return function(*args, **(kwargs or {}))


def test_threads_wait_for_one_test(tests: Tests) -> None:
    want, got = results("reference"), []
    threads = [threading.Thread(target=lambda: got.append(results())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tests) == 1
    for made in got:
        for a, b in zip(made, want, strict=True):
            torch.testing.assert_close(a, b)


# --- Wrong kernels -----------------------------------------------------------------------------------------

FAULTS = [("forward", off), ("backward", off), ("backward", nothing_written), ("forward", raise_an_error)]


@pytest.mark.parametrize("function, fault", FAULTS)
def test_a_wrong_kernel_is_refused_and_the_result_is_right(
    function: str, fault: Any, tests: Tests, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plant(monkeypatch, function, fault)
    what = "its self-test raised RuntimeError: ptxas died" if fault is raise_an_error else "error "
    said = f"channel_mlp, backend 'cpu', float32 on cpu: {what}"
    with pytest.warns(RuntimeWarning, match=said) as caught:
        got = results()
    assert same(got, results("reference"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(results(), results("reference"))  # said once
    assert len(caught) == 1
    assert verify.REPORT in str(caught[0].message)
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR] == [str(caught[0].message)]
    with pytest.raises(RuntimeError, match=f"backend='cpu' failed its self-test: {said}"):
        results("cpu")

    next_process()
    with pytest.warns(RuntimeWarning, match=said) as caught:
        assert same(results(), results("reference"))
    assert "(found on 20" in str(caught[0].message)
    assert len(tests) == 1


def test_only_the_dtype_that_fails_is_refused(tests: Tests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_BFLOAT16_PRODUCTS", False)
    plant(monkeypatch, "forward", off_in_bfloat16)
    with wk.backend("cpu"):
        results()
    with pytest.warns(RuntimeWarning, match="bfloat16"):
        assert same(results(dtype=BF16), results("reference", BF16))


def test_the_next_backend_serves(tests: Tests, monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := backends.triton_why_not(torch.ones(1))) is not None:
        pytest.skip(f"triton: {reason}")
    monkeypatch.setitem(choose.AUTO, "cpu", ("triton", "cpu", "reference"))
    plant(monkeypatch, "backward", off, "triton")
    with pytest.warns(RuntimeWarning, match="channel_mlp, backend 'triton'"):
        got = results()
    assert same(got, results("cpu"))
    assert tests == [("channel_mlp", "triton", FP32), ("channel_mlp", "cpu", FP32)]


def test_the_log_tells_why_another_backend_serves(
    tests: Tests, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plant(monkeypatch, "forward", off)
    caplog.set_level(logging.INFO, logger="wavemix_kernels")
    shape = [1, 8, 1, 3]  # of no other test: a call is logged once
    with pytest.warns(RuntimeWarning):
        channel.fused(torch.ones(shape), *arguments()[1:], "auto")
    (line,) = [r.getMessage() for r in caplog.records if "(1, 8, 1, 3)" in r.getMessage()]
    assert ": reference (" in line
    assert "cpu: channel_mlp, backend 'cpu', float32 on cpu: error " in line


def test_without_memory_there_is_no_lasting_verdict(tests: Tests, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate")

    with monkeypatch.context() as patch:
        patch.setattr(verify, "_self_test", exhausted)
        with pytest.warns(RuntimeWarning, match="no memory is left to verify it"):
            got = results()
    assert same(got, results("reference"))
    next_process()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results("cpu")


def test_a_lost_device_is_told_of(tests: Tests, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "forward", raise_an_error)
    monkeypatch.setattr(verify, "device_is_lost", lambda device: True)
    with pytest.warns(RuntimeWarning, match="No call on cpu works in this process any more; the next process will"):
        results()


def test_a_foreign_verdict_is_asked_again(tests: Tests, caplog: pytest.LogCaptureFixture) -> None:
    cache.write(CPU, "verified", {"channel_mlp cpu float32": {"right": True}})
    results()
    assert len(tests) == 1
    assert "is no verdict; the kernel is verified again" in caplog.text
    next_process()
    results()
    assert len(tests) == 1


# --- Captured and traced calls -----------------------------------------------------------------------------


def test_a_capture_asks_for_warmup(tests: Tests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match=r"not verified yet.*call wavemix_kernels.warmup\(model, example\) before"):
        results()
    assert not tests
    with monkeypatch.context() as patch:
        patch.setattr(verify, "_capturing", lambda device: False)
        results()
    results()
    next_process()
    results()  # the file is enough
    assert len(tests) == 1


@pytest.mark.parametrize("planted", [False, True])
def test_a_compiled_graph_asks_when_it_runs(planted: bool, tests: Tests, monkeypatch: pytest.MonkeyPatch) -> None:
    if planted:
        plant(monkeypatch, "backward", off)
    want, traced = results("reference"), []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        traced.append(len(tests))
        return graph.forward

    torch._dynamo.reset()
    function = torch.compile(lambda *leaves: channel.fused(*leaves, "auto"), fullgraph=True, backend=compiler)
    leaves = arguments()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = function(*leaves)
        got = [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]
    assert traced == [0]
    assert len(tests) == 1
    assert any("backend 'cpu', float32 on cpu: error" in str(w.message) for w in caught) == planted
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert same(got, want) or not planted


def test_traced_calls_test_nothing(tests: Tests) -> None:
    class Transform(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return wk.haar_dwt2d(x, backend="cpu")[0]

    torch.export.export(Transform(), (torch.ones(1, 1, 4, 4),), strict=False)
    table = ops.load("haar").BACKENDS
    with FakeTensorMode() as mode:
        wk.haar_dwt2d(mode.from_tensor(torch.ones(1, 1, 4, 4)), backend="cpu")
        assert choose.pick("haar_dwt2d", table, "auto", torch.ones(1)) == "cpu"
    assert not tests


# --- Self-tests --------------------------------------------------------------------------------------------

EACH_BACKEND = pytest.mark.parametrize(
    "op, backend", [(op, b) for op in ops.OPS for b in ops.load(op).BACKENDS], indirect=["backend"]
)


@pytest.mark.prove
@EACH_BACKEND
def test_a_self_test_runs_every_function_of_its_backend(
    op: str, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dispatch that does not go by the table is the reference's, which tests nothing of its own."""
    table, called = ops.load(op).BACKENDS, set()

    def noted(name: str) -> Callable[..., Any]:
        return lambda *args: (called.add(name), own.functions[name](*args))[1]

    own = table[backend]
    monkeypatch.setitem(table, backend, dataclasses.replace(own, functions={n: noted(n) for n in own.functions}))
    ops.load(op).self_test(backend, torch.device(device), own.dtype)
    assert called == set(own.functions) or backend == "reference"


class Sharing(TorchDispatchMode):
    """Collects this package's operators whose results share memory with each other or with an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "wavemix_kernels":
            given, made = (
                [t.untyped_storage().data_ptr() for t in tree_leaves(tree) if isinstance(t, Tensor) and t.numel()]
                for tree in ((args, kwargs), result)
            )
            if len(set(made)) < len(made) or not set(made).isdisjoint(given):
                self.found.add(str(func))
        return result


@pytest.mark.prove
@EACH_BACKEND
def test_results_share_no_memory(op: str, backend: str, device: str) -> None:
    """torch.compile is told so: it warns where results do, and would be wrong after a write to one of them."""
    with Sharing() as mode:
        ops.load(op).self_test(backend, torch.device(device), ops.load(op).BACKENDS[backend].dtype)
    assert not mode.found


@pytest.mark.prove
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, BF16], ids=str)
@EACH_BACKEND
def test_right_kernels_pass_in_every_dtype(op: str, backend: str, dtype: torch.dtype, device: str) -> None:
    one = ops.load(op).BACKENDS[backend]
    if (reason := one.why_not(torch.ones(one.example, dtype=dtype, device=device))) is not None:
        pytest.skip(reason)
    verdict = verify.examine(op, backend, torch.device(device), dtype)
    assert verdict.fault is None, verdict


def test_a_nan_in_any_result_is_the_largest_error() -> None:
    ones, nan = torch.ones(2), torch.tensor([1.0, float("nan")])
    for got in ([nan, ones], [ones, nan]):
        assert not selftest.largest_error(got, [ones.double(), ones.double()]) <= 1


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("convolutions", [False, True])
def test_self_tests_run_without_tf32(precision: str, convolutions: bool) -> None:
    def state() -> list[Any]:
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        newer = [s.fp32_precision for s in (matmul, cudnn.conv, cudnn.rnn)] if hasattr(cudnn, "conv") else []
        return [torch.get_float32_matmul_precision(), matmul.allow_tf32, cudnn.allow_tf32, *newer]

    untouched = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions
        before = state()
        with products_in("ieee"):
            assert state()[:3] == ["highest", False, False]
        assert state() == before
    finally:
        torch.set_float32_matmul_precision(untouched[0])
        torch.backends.cudnn.allow_tf32 = untouched[1]
